"""Whole MobileNetV2 through every engine, each case one interleaved run; kept in results/cpu.json with --results."""

import pytest

from mnv2_fused import bench
from mnv2_fused.engines import FUSED


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
