"""The latency benchmark as users run it: which rows stand side by side, on the CPU and, with a stand-in, on a GPU."""

import json
import os
import subprocess
import sys

import pytest
from support.source_tree import BENCHMARKS, ROOT

pytest.importorskip("torchvision")

GPU_ROWS = ["eager", "eager channels_last", "fused cpu"]


def run(tmp_path, *arguments, **environment):
    kept = tmp_path / "kept.json"
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-only"]
    command += [f"--benchmark-json={kept}", str(BENCHMARKS), *arguments]
    paths = os.pathsep.join([str(ROOT), str(BENCHMARKS), str(ROOT / "tests")])
    # Where this file is run by xdist, which nothing is timed under.
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = around | {"PYTHONPATH": paths} | environment
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    groups = {}
    if kept.exists() and kept.stat().st_size:
        for row in json.loads(kept.read_text())["benchmarks"]:
            groups.setdefault(row["group"], {})[row["name"]] = row
    return ran, groups


def test_eager_and_fused_side_by_side(tmp_path):
    ran, groups = run(tmp_path, "--device", "cpu", "-k", "(block1- or block17- or network-fp32) and not compile")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = {f"{what}, fp32, batch 1, cpu, 1 thread" for what in ("block 1", "block 17", "network")}
    assert set(groups) == names
    for name, rows in groups.items():
        assert set(rows) == {"eager", "eager channels_last", "fused"}
        assert all(0 < row["stats"]["median"] < 1 and "error" in row["extra_info"] for row in rows.values())
        assert name in ran.stdout and "fused" in ran.stdout


@pytest.mark.slow
def test_torch_compile_is_a_row(tmp_path):
    ran, groups = run(tmp_path, "--device", "cpu", "--threads", "2", "-k", "block17- and (compile or channels_last)")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(groups["block 17, fp32, batch 1, cpu, 2 threads"]) == {"torch.compile", "eager channels_last"}


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_way_of_a_gpu(tmp_path, wrong):
    """Plain calls and graphs, by a GPU's clock; a wrong result has no time, and nothing else of benchmarks/ runs."""
    arguments = ["-p", "support.gpu_stand_in", "--device", "cuda", "--dtypes", "fp32", "--batches", "1,3"]
    ran, groups = run(tmp_path, *arguments, "-k", "block17-", **({"STAND_IN_WRONG": "1"} if wrong else {}))
    assert (ran.returncode != 0) is wrong, ran.stdout + ran.stderr
    expected = {*GPU_ROWS, "torch.compile reduce-overhead"}
    if wrong:
        assert "WrongResult" in ran.stdout
    else:
        expected |= {f"{name}, graphed" for name in GPU_ROWS}
    assert groups.keys() == {f"block 17, fp32, batch {batch}, cuda" for batch in (1, 3)}
    for rows in groups.values():
        assert set(rows) == expected
        # Rounds of some ms, on a clock a thousand times faster.
        assert all(row["stats"]["median"] > 0.05 for row in rows.values())


def test_what_a_gpu_runs_where_nothing_is_asked_for(tmp_path):
    arguments = ["-p", "support.gpu_stand_in", "--device", "cuda", "--collect-only"]
    ran, _ = run(tmp_path, *arguments)
    listed = [line for line in ran.stdout.splitlines() if "bench_" in line]
    assert listed and all("bench_latency.py" in line for line in listed)
    for words in ("block1-fp16-batch1-", "block17-fp16-batch256-", "network-fp16-batch256-", "network-bf16-batch1-"):
        assert any(words in line for line in listed), words
    assert any("network-fp32-batch16-torch.compile_max-autotune" in line for line in listed)
    assert any("network-fp16-batch1-fused_cpu-graphed" in line for line in listed)


def test_a_dtype_that_is_none(tmp_path):
    ran, _ = run(tmp_path, "--dtypes", "fp64")
    assert ran.returncode != 0 and "must be one of fp32, bf16, fp16, got 'fp64'" in ran.stderr
