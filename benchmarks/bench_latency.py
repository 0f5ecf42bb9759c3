"""Latency as users compare it: eager, torch.compile and fused, a row each, of each block and the whole network.

On the CPU, or with ``--device cuda`` on a GPU, where calls run plainly and as CUDA graphs. ``--dtypes``, ``--batches``
and ``--threads`` choose what is timed; results are checked against float64 first.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import gpu_timing
import pytest
import torch
from bench_block import BLOCKS, eager_block
from torch import Tensor, nn

from mnv2_fused import testing
from mnv2_fused.tools import bench
from mnv2_fused.tools.engines import CHANNELS_LAST, ENGINES, FUSED, Call, as_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What is timed where nothing is asked for: (dtypes, batches) of the network and of single blocks.
USUAL = {
    "cpu": {"network": (["fp32", "bf16"], [1]), "block": (["fp32"], [1])},
    "cuda": {"network": (["fp16", "bf16", "fp32"], [1, 16, 256]), "block": (["fp16"], [1, 256])},
}
_ON_CPU = ("eager", CHANNELS_LAST, "torch.compile", FUSED)
_SECONDS = 0.4  # of a row, about


class Workload(NamedTuple):
    index: int  # of the block; -1: the whole network
    dtype: str
    batch: int
    device: str
    threads: int

    def __str__(self) -> str:
        what = "network" if self.index < 0 else f"block {self.index + 1}"
        where = self.device if self.device == "cuda" else f"cpu, {self.threads} thread{'s'[: self.threads > 1]}"
        return f"{what}, {self.dtype}, batch {self.batch}, {where}"

    @property
    def id(self) -> str:
        return f"{'network' if self.index < 0 else f'block{self.index + 1}'}-{self.dtype}-batch{self.batch}"


class Clock:
    """Seconds: the host's, or, while a GPU is timed, those between events on its own clock."""

    def __init__(self) -> None:
        self.device = "cpu"
        self._last, self._seconds = None, 0.0

    def __call__(self) -> float:
        if self.device == "cpu":
            return time.perf_counter()
        now = gpu_timing.cuda_event()
        now.record()
        now.synchronize()
        if self._last is not None:
            self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds


clock = Clock()


def candidates(device: str, kind: str) -> list[str]:
    """Names of the rows of a group."""
    if device == "cpu":
        return list(_ON_CPU)
    graphed = gpu_timing.GRAPHED
    modes = ["reduce-overhead"] + (["max-autotune"] if kind == "network" else [])
    own = [f"{FUSED} {backend}" for backend in gpu_timing.runnable_backends()]
    compiled = [gpu_timing.COMPILED + mode for mode in modes]
    return [name + ending for name in ("eager", CHANNELS_LAST, *own) for ending in ("", graphed)] + compiled


def build(name: str, model: nn.Module, x: Tensor, device: str, threads: int) -> Call:
    """What one row calls."""
    if device == "cpu":
        return ENGINES[name](model, x, x.dtype, threads)
    if name.startswith(gpu_timing.COMPILED):
        return gpu_timing.compiled(model, x, name.removeprefix(gpu_timing.COMPILED))
    plain = name.removesuffix(gpu_timing.GRAPHED)
    if plain.startswith(FUSED):
        call = ENGINES[FUSED](model, x, x.dtype, 1, plain.removeprefix(FUSED).strip())
    else:
        call = ENGINES[plain](model, x, x.dtype, 1)
    return call if name == plain else gpu_timing.Graphed(call)


@functools.lru_cache(maxsize=1)
def prepared(workload: Workload) -> tuple[nn.Module, Tensor, Callable[[str, Call], float]]:
    """The model as users have it, its input, and a check of a row's first and last image."""
    device, dtype = gpu_timing.DEVICE if workload.device == "cuda" else "cpu", DTYPES[workload.dtype]
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        if workload.index < 0:
            model, shape = bench.mobilenet_v2(1.0), (3, 224, 224)
        else:
            spec, size = BLOCKS[workload.index]
            model, shape = eager_block(spec).to(memory_format=torch.contiguous_format), (spec.in_channels, *size)
        model = model.to(device, dtype)
        x = torch.randn(workload.batch, *shape, device=device).to(dtype)
        ends = [0, -1] if workload.batch > 1 else [0]
        some = x[ends]
        expected = model(some).float().cpu(), copy.deepcopy(model).double()(some.double()).cpu()

    def check(name: str, call: Call) -> float:
        return bench.check(name, as_tensor(call()).cpu()[ends], *expected)

    return model, x, check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, kind = option("--device"), "network" if "network" in metafunc.function.__name__ else "block"
    dtypes, batches = USUAL[device][kind]
    dtypes, batches = option("--dtypes") or dtypes, option("--batches") or batches
    indices = [-1] if kind == "network" else range(len(BLOCKS))
    found = [
        (Workload(index, dtype, batch, device, option("--threads")), name)
        for index in indices
        for dtype in dtypes
        for batch in batches
        for name in candidates(device, kind)
    ]
    metafunc.parametrize(("workload", "name"), found, ids=[_words(f"{workload.id}-{name}") for workload, name in found])


def _words(text: str) -> str:
    """As -k takes it."""
    return text.replace(", ", "-").replace(" ", "_")


def measure(benchmark, workload: Workload, name: str) -> None:
    benchmark.group, benchmark.name = str(workload), name
    model, x, check = prepared(workload)
    clock.device = workload.device
    torch._dynamo.reset()
    with torch.inference_mode(False), testing.threads(workload.threads):
        call = build(name, model, x, workload.device, workload.threads)
        benchmark.extra_info["error"] = check(name, call)
        start = clock()
        call()
        once = max(clock() - start, 1e-6)
        calls = max(1, min(20, int(0.005 / once)))
        rounds = max(5, min(40, int(_SECONDS / (once * calls))))
        benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=2)
    clock.device = "cpu"


@pytest.mark.benchmark(timer=clock)
def test_block(benchmark, workload, name):
    measure(benchmark, workload, name)


@pytest.mark.benchmark(timer=clock)
def test_network(benchmark, workload, name):
    measure(benchmark, workload, name)
