"""Whole MobileNetV2 through every engine, each case one interleaved run; kept in results/cpu.json with --results."""

import copy

import pytest
import torch

from mnv2_fused import testing
from mnv2_fused.tools import bench
from mnv2_fused.tools.engines import ENGINES, FUSED, as_tensor


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: f"{case.name}, {case.threads} threads")
def test_model(benchmark, keep, case):
    benchmark.group = f"MobileNetV2, {case.name}"
    seconds = 8 if case.pixels < 500_000 else 14
    row = bench.measure(case, seconds, lambda calls: benchmark.pedantic(calls[FUSED], rounds=3, warmup_rounds=1))
    benchmark.extra_info.update(ratios=row.over_fused, milliseconds=row.milliseconds, error=row.error)
    keep.rows.append(row)


def test_resident_growth(benchmark, keep):
    keep.resident.update(benchmark.pedantic(bench.measure_resident, rounds=1))
    benchmark.extra_info.update(keep.resident)


def test_growth(benchmark, keep):
    keep.growth.update(benchmark.pedantic(bench.measure_growth, rounds=1))
    benchmark.extra_info.update(keep.growth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_threads(benchmark, table, dtype):
    """The whole network on two threads over one, beside what two cores give to a loop that shares nothing."""
    benchmark.group = "MobileNetV2, two threads"
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(1, 3, 224, 224)
        model = bench.mobilenet_v2(1.0)
        call = ENGINES[FUSED](model, x, dtype, 1)
        rounded = copy.deepcopy(model).to(dtype)
        error = bench.check(FUSED, as_tensor(call()), rounded(x.to(dtype)), rounded.double()(x.to(dtype).double()))
    candidates = {
        "1": call,
        "2": call,
        "peak 1": lambda: testing.multiply_adds_at_peak(dtype),
        "peak 2": lambda: testing.multiply_adds_at_peak(dtype),
    }
    threads = {name: int(name[-1]) for name in candidates}
    timings = testing.interleave(candidates, rounds=40, calls={"1": 4, "2": 4}, threads=threads)
    with testing.threads(2):
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    times = testing.ratio(timings["1"], timings["2"])
    benchmark.extra_info.update(two_threads=times, error=error)
    table(
        {
            "network": f"MobileNetV2 at 224, {str(dtype).removeprefix('torch.')}",
            "1 thread ms": f"{timings['1'].median * 1e3:.2f}",
            "2 threads ms": f"{timings['2'].median * 1e3:.2f}",
            "2 threads over 1": f"{times:.2f}x of {2 * testing.ratio(timings['peak 1'], timings['peak 2']):.2f}x",
            "max error": f"{error:.1e}",
        }
    )
