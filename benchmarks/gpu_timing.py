"""What ``gpu_report.py`` measures on a GPU: every candidate checked, then timed by device events in one run.

Cold: between two calls a buffer several times L2 is written and read back, so a call finds neither its input nor its
weights there, and no dirty lines to evict either. Warm: calls back to back. Nothing here touches a device on import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_block import eager_block
from torch import Tensor, nn
from triton_prediction import Prediction

from mnv2_fused import backends, cuda_plan, testing
from mnv2_fused.testing import Timing
from mnv2_fused.tools import bench, engines
from mnv2_fused.tools.bench_results import V1
from mnv2_fused.tools.engines import CHANNELS_LAST, FUSED, Call

DEVICE = "cuda"
GRAPHED = ", graphed"
COMPILED = "torch.compile "
STATES = ("cold", "warm")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_ROUNDS = (5, 30)  # least and most
_SECONDS = 2.5  # of timing for one row, once its candidates are built
_WARM_CALLS = 5

Builders = dict[str, Callable[[], Call]]


@dataclass
class Row:
    """One workload, its candidates interleaved; times are of one call, in microseconds."""

    what: str
    shape: list[int]  # of the input, [N, C, H, W]
    dtype: str
    microseconds: dict[str, dict[str, float]] = field(default_factory=dict)  # cold or warm -> candidate -> median
    spread: dict[str, dict[str, float]] = field(default_factory=dict)  # half the quartiles' distance over the median
    over_fused: dict[str, dict[str, float]] = field(default_factory=dict)  # median over rounds of time over fused's
    rounds: int = 0
    error: dict[str, float] = field(default_factory=dict)  # largest deviation from float64, first and last image
    wrong: dict[str, str] = field(default_factory=dict)  # candidates with a wrong result: these have no time
    missing: dict[str, str] = field(default_factory=dict)  # candidates that could not run, and why
    bytes: int = 0  # of a block: to and from memory, by its plan
    flops: int = 0  # useful operations of a block, no recompute
    predicted: float = 0  # microseconds that the first fused kernel's planner expects of an H200
    floor: float = 0  # microseconds: the largest of bytes, products and depthwise at the rates measured in this run


def timed(
    candidates: dict[str, Call],
    *,
    rounds: int,
    flush: Call,
    event: Callable[[], Any],
    calls: int = _WARM_CALLS,
) -> dict[str, dict[str, Timing]]:
    """Cold and warm seconds per call of each candidate, in turn, so that clocks and heat are alike for all.

    ``event()`` makes what ``torch.cuda.Event(enable_timing=True)`` makes. The flush also keeps the GPU busy until
    the call behind it is queued, so launching a graph is not part of its time.
    """
    found = {state: {name: Timing() for name in candidates} for state in STATES}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            marks = [event() for _ in range(4)]
            flush()
            marks[0].record()
            candidate()
            marks[1].record()
            candidate()  # after this one its working set is where the next call finds it
            marks[2].record()
            for _ in range(calls):
                candidate()
            marks[3].record()
            marks[3].synchronize()
            found["cold"][name].seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
            found["warm"][name].seconds.append(marks[2].elapsed_time(marks[3]) / 1e3 / calls)
    return found


def flusher(device: torch.device) -> Call:
    """Writes and reads back four times the device's L2."""
    floats = torch.cuda.get_device_properties(device).L2_cache_size  # of four bytes
    buffer = torch.empty(floats, device=device)
    total = torch.empty((), device=device)

    def flush() -> None:
        buffer.fill_(1.0)
        torch.sum(buffer, 0, out=total)

    return flush


def cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Graphed:
    """``call`` as a CUDA graph; each replay writes, and returns, the same output."""

    def __init__(self, call: Call) -> None:
        self.call = call  # kept, since the graph reads its weights and its input
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = call()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.y


APART = ", launches apart"


def graphed_apart(call: Call) -> Graphed:
    """``call`` as a graph, none of whose kernels starts before the one in front of it has ended."""
    backends._cuda.allow_early_starts(False)
    try:
        return Graphed(call)
    finally:
        backends._cuda.allow_early_starts(True)


def compiled(model: nn.Module, x: Tensor, mode: str) -> Call:
    """``torch.compile`` of the channels_last model; its CUDA graph reads ``x`` in place, as the others do."""
    module = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last), mode=mode)
    x = x.contiguous(memory_format=torch.channels_last)
    torch._dynamo.mark_static_address(x)

    def call() -> Tensor:
        with torch.inference_mode():
            return module(x)

    for _ in range(3):  # compiles, records the graph, replays it
        call()
    return call


def runnable_backends() -> list[str]:
    """The project's own that run CUDA tensors here."""
    reasons = backends.backend_reasons(torch.device("cuda"))
    return [name for name, why in reasons.items() if why is None and name != "eager"]


def network_builders(model: nn.Module, v1: nn.Module, x: Tensor, modes: Sequence[str] = ()) -> Builders:
    """What runs a whole network; with ``modes`` of torch.compile, those against the fastest of the others only."""
    dtype = x.dtype
    builders: Builders = {}
    for backend in runnable_backends():
        call = lambda backend=backend: engines.fused(model, x, dtype, 1, backend)  # noqa: E731
        builders[f"{FUSED} {backend}{GRAPHED}"] = lambda call=call: Graphed(call())
        if not modes:
            builders[f"{FUSED} {backend}"] = call
        if not modes and backend == "cuda":
            builders[f"{FUSED} {backend}{GRAPHED}{APART}"] = lambda call=call: graphed_apart(call())
    channels_last = lambda of=model: engines.eager_channels_last(of, x, dtype, 1)  # noqa: E731
    builders[CHANNELS_LAST] = channels_last
    builders[CHANNELS_LAST + GRAPHED] = lambda: Graphed(channels_last())
    if modes:
        return builders | {COMPILED + mode: lambda mode=mode: compiled(model, x, mode) for mode in modes}
    builders["eager"] = lambda: engines.eager(model, x.contiguous(), dtype, 1)
    builders[V1] = lambda: channels_last(v1)
    builders[V1 + GRAPHED] = lambda: Graphed(channels_last(v1))
    return builders


def block_builders(block: nn.Module, x: Tensor) -> Builders:
    """What runs one block, as graphs."""
    found: Builders = {
        f"{FUSED} {backend}{GRAPHED}": lambda backend=backend: Graphed(
            engines.fused(block, x, x.dtype, 1, backend),
        )
        for backend in runnable_backends()
    }
    return found | {CHANNELS_LAST + GRAPHED: lambda: Graphed(engines.eager_channels_last(block, x, x.dtype, 1))}


def build(builders: Builders, ends: Callable[[Tensor], Tensor], expected: tuple[Tensor, Tensor], row: Row) -> Builders:
    """The candidates that run and are right; the others' reasons go to ``row``.

    Each runs twice, its first output overwritten with NaN in between: a graph's output is the same memory again, so
    an element that it leaves unwritten shows. ``ends`` picks the images that are compared, ``expected`` is those of
    eager in the same dtype and in float64. MobileNetV1 is another network, timed beside this one and not compared.
    """
    calls: Builders = {}
    for name, builder in builders.items():
        try:
            call = builder()
            with torch.inference_mode():
                call().fill_(float("nan"))
                y = call()
                if not name.startswith(V1):
                    row.error[name] = bench.check(name, engines.as_tensor(ends(y)), *expected)
        except bench.WrongResult as wrong:
            row.wrong[name] = str(wrong)
        except Exception as error:  # whatever a peer cannot do must not cost the others' numbers
            row.missing[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            calls[name] = call
    return calls


def fill(row: Row, timings: dict[str, dict[str, Timing]]) -> None:
    """Medians, spreads and ratios of what was timed; nothing of a candidate whose result is wrong."""
    for state, by_name in timings.items():
        right = {name: t for name, t in by_name.items() if name not in row.wrong and t.seconds}
        row.microseconds[state] = {name: t.median * 1e6 for name, t in right.items()}
        row.spread[state] = {name: t.spread for name, t in right.items()}
        first = next((t for name, t in right.items() if name.split()[0] == FUSED), None)
        row.over_fused[state] = {} if first is None else {name: testing.ratio(t, first) for name, t in right.items()}
        row.rounds = max([row.rounds, *(len(t.seconds) for t in right.values())])


def measure(row: Row, builders: Builders, model: nn.Module, x: Tensor, flush: Call) -> Row:
    """Builds, checks and times the candidates of one workload into ``row``; ``model`` is what they should compute."""

    def ends(t: Tensor) -> Tensor:
        return t[:1] if len(t) == 1 else t[:: len(t) - 1]

    with torch.no_grad():
        some = ends(x)
        expected = model(some), copy.deepcopy(model).double()(some.double())
    calls = build(builders, ends, expected, row)
    if calls:
        once = sum(t.median for t in timed(calls, rounds=1, flush=flush, event=cuda_event)["warm"].values())
        rounds = int(_SECONDS / (once * (_WARM_CALLS + 2)))
        rounds = max(_ROUNDS[0], min(_ROUNDS[1], rounds))
        fill(row, timed(calls, rounds=rounds, flush=flush, event=cuda_event))
    return row


class Networks:
    """MobileNetV2 and V1 with fitted statistics."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.v2 = bench.mobilenet_v2(1.0).to(device)
        v1 = testing.perturb_batch_norm(bench.mobilenet_v1())
        self.v1 = testing.fit_batch_norm(v1, torch.randn(8, 3, 224, 224)).to(device)

    def images(self, batch: int, size: tuple[int, int], dtype: str) -> Tensor:
        x = torch.randn(batch, 3, *size, device=self.device)
        return x.to(DTYPES[dtype], memory_format=torch.channels_last)

    def measure(self, batch: int, size: tuple[int, int], dtype: str, flush: Call, modes: Sequence[str] = ()) -> Row:
        x = self.images(batch, size, dtype)
        v2, v1 = (copy.deepcopy(m).to(DTYPES[dtype]) for m in (self.v2, self.v1))
        row = Row("MobileNetV2" + (", compiled" if modes else ""), list(x.shape), dtype)
        return measure(row, network_builders(v2, v1, x, modes), v2, x, flush)

    def memory(self, batch: int, size: tuple[int, int], dtype: str) -> dict[str, Any]:
        """Bytes that torch's allocator held at most during one call, over what it held before."""
        x = self.images(batch, size, dtype)
        model, peaks = copy.deepcopy(self.v2).to(DTYPES[dtype]), {}
        for name, builder in network_builders(model, self.v1, x).items():
            if GRAPHED in name or name.startswith(V1):  # a graph's memory is its own, and lasting
                continue
            call = builder()
            call()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        return {"shape": list(x.shape), "dtype": dtype, "peak_bytes": peaks}


def measure_block(
    index: int, found: Prediction, batch: int, limits: dict[str, float], flush: Call, device: str = "cuda"
) -> Row:
    """One block in float16; its useful operations, and bytes and prediction of the first kernel's plan, go beside."""
    dtype = "fp16"
    block = eager_block(found.spec, DTYPES[dtype]).to(device)
    x = torch.randn(batch, found.spec.in_channels, *found.size, device=device)
    x = x.to(DTYPES[dtype], memory_format=torch.channels_last)
    row = Row(f"block {index + 1}: {found.spec}", list(x.shape), dtype)
    plan = cuda_plan(found.spec, x.shape, dtype=x.dtype) if runnable_backends()[0] == "cuda" else found.plan
    row.bytes, row.flops = plan.bytes, found.products + found.depthwise
    row.predicted = plan.seconds * 1e6
    row.floor = found.floor(limits["copy bytes"], limits["fp16 product flops"], limits["fp32 product flops"]) * 1e6
    return measure(row, block_builders(block, x), block, x, flush)


def limits(flush: Call) -> dict[str, float]:
    """Bytes and operations a second of this device, and the least time that is seen, on random data.

    fp32 is a matrix product without TF32, which its multiply-add instructions bound.
    """
    n = 8192
    half = torch.randn(n, n, device="cuda").half()
    single = torch.randn(n, n, device="cuda")
    source = torch.randn(2**28, device="cuda")
    target, y16, y32, one = torch.empty_like(source), half.clone(), single.clone(), torch.zeros(1, device="cuda")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        calls: dict[str, Call] = {
            "copy": lambda: target.copy_(source),
            "fp16": lambda: torch.mm(half, half, out=y16),
            "fp32": lambda: torch.mm(single, single, out=y32),
            "nothing": Graphed(lambda: one.zero_()),
        }
        found = timed(calls, rounds=9, flush=flush, event=cuda_event)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    warm = {name: t.median for name, t in found["warm"].items()}
    return {
        "copy bytes": 2 * source.nbytes / warm["copy"],
        "fp16 product flops": 2 * n**3 / warm["fp16"],
        "fp32 product flops": 2 * n**3 / warm["fp32"],
        "graph of one small kernel, cold us": found["cold"]["nothing"].median * 1e6,
        "graph of one small kernel, warm us": warm["nothing"] * 1e6,
    }


def device() -> dict[str, str]:
    """The GPU, its driver and the versions that decide, beside :func:`mnv2_fused.tools.bench_results.machine`."""
    import triton

    p = torch.cuda.get_device_properties(0)
    return {
        "device": p.name,
        "compute capability": f"{p.major}.{p.minor}",
        "processors": str(p.multi_processor_count),
        "L2 bytes": str(p.L2_cache_size),
        "memory bytes": str(p.total_memory),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "CUDA kernel": backends._cuda.architectures
        if backends._cuda
        else f"none: {backends.backend_reasons()['cuda']}",
        "cudnn.allow_tf32": str(torch.backends.cudnn.allow_tf32),
        "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
    }
