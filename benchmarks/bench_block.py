"""Each of MobileNetV2's 17 blocks against eager channels_last and against the core's multiply-add peak."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

import mnv2_fused
from mnv2_fused import testing

BLOCKS = testing.mobilenet_v2_blocks(224)
PHOTO_BLOCKS = testing.mobilenet_v2_blocks((1088, 1920))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager_block(spec: mnv2_fused.BlockSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The block as a user has it: torchvision's."""
    ratio = spec.hidden_channels // spec.in_channels
    with torch.inference_mode(False):  # parameters made under it could not be watched for changes
        block = InvertedResidual(spec.in_channels, spec.out_channels, spec.stride, ratio)
        return testing.perturb_batch_norm(block).eval().to(dtype, memory_format=torch.channels_last)


def fused(model: nn.Module) -> nn.Module:
    with torch.inference_mode(False):
        return mnv2_fused.fuse(model)


def measure(spec, batch, size, threads, dtype, *, rounds=12):
    """Interleaved timings of eager, fused and the core's multiply-adds, after checking the result."""
    x = torch.randn(batch, spec.in_channels, *size).to(dtype, memory_format=torch.channels_last)
    eager = eager_block(spec, dtype)
    block = fused(eager)
    check = testing.agreement(block(x), eager(x), copy.deepcopy(eager).double()(x.double()))
    if not check.ok:
        pytest.fail(f"wrong result, so no speed: {check}")
    with testing.threads(threads):
        # Several calls a turn: the block by itself, with its weights in cache. test_all_blocks has them cold.
        candidates = {
            "eager": lambda: eager(x),
            "fused": lambda: block(x),
            "peak": lambda: testing.multiply_adds_at_peak(dtype),
        }
        timings = testing.interleave(candidates, rounds=rounds, calls={"eager": 8, "fused": 8})
    return x, block, timings, check


@pytest.mark.parametrize("row", ["eager channels_last", "fused"])
@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("float32", 2), ("bfloat16", 1)])
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block(benchmark, table, index, dtype, threads, row):
    """Eager is timed in turns with fused, whose row has the ratio, and once more by itself, for a row of its own."""
    spec, size = BLOCKS[index]
    benchmark.group, benchmark.name = f"block {index + 1}, {dtype}, {threads} threads", row
    if row != "fused":
        x = torch.randn(1, spec.in_channels, *size).to(DTYPES[dtype], memory_format=torch.channels_last)
        with testing.threads(threads):
            benchmark.pedantic(eager_block(spec, DTYPES[dtype]), (x,), rounds=10, warmup_rounds=1)
        return
    x, block, timings, check = measure(spec, 1, size, threads, DTYPES[dtype])
    work = 2 * testing.multiply_adds(spec, x.shape)
    with testing.threads(threads):
        benchmark.pedantic(block, (x,), rounds=10, warmup_rounds=1)
        of_peak = testing.of_peak(work, timings["fused"], timings["peak"], DTYPES[dtype])
    benchmark.extra_info.update(
        threads=threads,
        dtype=dtype,
        ratio=testing.ratio(timings["eager"], timings["fused"]),
        of_peak=of_peak,
        error=check.error,
    )
    plan = mnv2_fused.plan(spec, x.shape, dtype=DTYPES[dtype], threads=threads)
    table(
        {
            "block": str(index + 1),
            "shape": f"{spec} at {size[0]}x{size[1]}",
            "dtype": dtype,
            "threads": str(threads),
            "tile": f"{plan.tile_rows}x{plan.tile_cols}",
            "group": str(plan.group),
            "eager us": f"{timings['eager'].median * 1e6:.0f}",
            "fused us": f"{timings['fused'].median * 1e6:.0f}",
            "ratio": f"{benchmark.extra_info['ratio']:.2f}",
            "GFLOP/s": f"{work / timings['fused'].median / 1e9:.1f}",
            "of peak": f"{of_peak:.0%}",
            "max error": f"{check.error:.1e}",
        }
    )


WORKLOADS = {
    "batch 1": (BLOCKS, 1),
    "batch 16": (BLOCKS, 16),
    "1088x1920": (PHOTO_BLOCKS, 1),
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_all_blocks(benchmark, table, workload):
    """All 17 in a row, one and two threads interleaved, and the activation memory of the whole chain."""
    blocks, batch = WORKLOADS[workload]
    benchmark.group = f"17 blocks, {workload}"
    eager = nn.Sequential(*(eager_block(spec) for spec, _ in blocks))
    chain = fused(eager)
    spec, size = blocks[0]
    x = torch.randn(batch, spec.in_channels, *size).to(memory_format=torch.channels_last)
    check = testing.agreement(chain(x[:1]), eager(x[:1]), copy.deepcopy(eager).double()(x[:1].double()))
    if not check.ok:
        pytest.fail(f"wrong result, so no speed: {check}")

    candidates = {
        "eager": lambda: eager(x),
        "fused": lambda: chain(x),
        "fused 2 threads": lambda: chain(x),
        "peak": testing.multiply_adds_at_peak,
        # Twice the work; what the machine gives to a loop that shares nothing.
        "peak 2 threads": testing.multiply_adds_at_peak,
    }
    threads = {name: 2 if name.endswith("2 threads") else 1 for name in candidates}
    rounds = 20 if workload == "batch 1" else 4
    timings = testing.interleave(candidates, rounds=rounds, warmup=1, threads=threads)
    with testing.threads(1):
        benchmark.pedantic(candidates["fused"], rounds=3, warmup_rounds=1)
    work = 2 * sum(testing.multiply_adds(s, (batch, s.in_channels, *hw)) for s, hw in blocks)
    with testing.threads(1):
        memory = {name: testing.peak_activation_bytes(lambda m=m: m(x)) for name, m in (("e", eager), ("f", chain))}
        of_peak = testing.of_peak(work, timings["fused"], timings["peak"])
    one = timings["fused"].median
    second_core = 2 * testing.ratio(timings["peak"], timings["peak 2 threads"])
    benchmark.extra_info.update(
        ratio=testing.ratio(timings["eager"], timings["fused"]),
        of_peak=of_peak,
        second_core=second_core,
        two_threads=testing.ratio(timings["fused"], timings["fused 2 threads"]),
        memory_ratio=memory["e"] / memory["f"],
        error=check.error,
    )
    table(
        {
            "block": "1-17",
            "shape": workload,
            "dtype": "float32",
            "threads": "1",
            "eager us": f"{timings['eager'].median * 1e6:.0f}",
            "fused us": f"{one * 1e6:.0f}",
            "ratio": f"{benchmark.extra_info['ratio']:.2f}",
            "GFLOP/s": f"{work / one / 1e9:.1f}",
            "of peak": f"{of_peak:.0%}",
            "max error": f"{check.error:.1e}",
            "us per image": f"{one / batch * 1e6:.0f}",
            "2 threads over 1": f"{benchmark.extra_info['two_threads']:.2f}x of {second_core:.2f}x",
            "memory eager MB": f"{memory['e'] / 1e6:.1f}",
            "fused MB": f"{memory['f'] / 1e6:.1f}",
            "memory ratio": f"{memory['e'] / memory['f']:.1f}",
        }
    )
