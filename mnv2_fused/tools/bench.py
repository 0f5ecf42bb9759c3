"""MobileNetV2 through every engine in one interleaved run, for ``python -m mnv2_fused bench`` and
``benchmarks/bench_model.py``: cases and measurement. The results and their file lie in ``bench_results.py``, tables
and picture in ``bench_tables.py``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import models, testing
from ..convert import unfuse
from .bench_results import V1, Results, Row, bfloat16, int8
from .bench_tables import draw, tables
from .engines import CHANNELS_LAST, ENGINES, FROZEN, FUSED, PEERS, Call, EngineMissing, as_tensor
from .int8_engines import QUANTIZERS, Quantized

HIGH_RESOLUTION = (1088, 1920)
GROWTH = ((128, 128), (224, 224), (448, 448), (736, 1280), HIGH_RESOLUTION)
_SETTLE = 0.02  # seconds until the thread pool of the engine before has gone to sleep


@dataclass(frozen=True)
class Case:
    """One network on one input."""

    size: tuple[int, int] = (224, 224)
    batch: int = 1
    threads: int = 1
    width: float = 1.0
    engines: tuple[str, ...] = tuple(name for name in ENGINES if name != FROZEN)
    bfloat16: tuple[str, ...] = (CHANNELS_LAST, "OpenVINO", FUSED)  # engines that run it once more so
    int8: tuple[str, ...] = ()  # quantisers, each of which runs it once more or twice
    v1: bool = False  # MobileNetV1, eager channels_last, beside it

    @property
    def name(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}" if self.size[0] != self.size[1] else str(self.size[0])
        width = "" if self.width == 1 else f"width {self.width:g}, "
        return width + size + ("" if self.batch == 1 else f", batch {self.batch}")

    @property
    def pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]


_TORCH_AND_PEERS = (CHANNELS_LAST, *PEERS, FUSED)
CASES = (
    *(Case(threads=t, v1=True) for t in (1, 2)),
    *(
        Case(size, batch, t, engines=_TORCH_AND_PEERS, v1=True)
        for size, batch in (((224, 224), 16), (HIGH_RESOLUTION, 1))
        for t in (1, 2)
    ),
    *(Case(width=width, engines=_TORCH_AND_PEERS) for width in (0.35, 1.4)),
    *(Case((side, side), engines=_TORCH_AND_PEERS) for side in (96, 128, 160, 192)),
)
QUICK = tuple(case for case in CASES if case.width == 1 and case.threads == 1 and case.v1)


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 1.0 as ordinary modules, in eval: 569 M multiply-adds to V2's 301 M."""
    return unfuse(models.mobilenet_v1()).eval()


def _torchvision(width: float) -> nn.Module:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    return mobilenet_v2(width_mult=width).eval()


def mobilenet_v2(width: float) -> nn.Module:
    """torchvision's, in eval, with random weights and statistics fitted to random images."""
    model = _torchvision(width)
    return testing.fit_batch_norm(testing.perturb_batch_norm(model), torch.randn(8, 3, 224, 224))


CALIBRATION_IMAGES = 32  # random as the weights are: what more of them change is nobody's accuracy


@functools.cache
def quantized(engine: str, width: float) -> Quantized:
    """The benchmark's network by an engine's quantiser, calibrated on random images. Raises EngineMissing."""
    model = mobilenet_v2(width)
    images = torch.randn(CALIBRATION_IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return QUANTIZERS[engine](model, images.split(16))


class WrongResult(RuntimeError):
    """An engine computes something else, so its speed means nothing."""


def check(name: str, y: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor) -> float:
    """The error of an engine's result ``y``; raises WrongResult for one whose speed means nothing.

    ``eager``: torch's own result in the same dtype; ``reference``: in float64.
    """
    error = (y.double() - reference).abs().max().item()
    if name.split()[0] == FUSED:
        found = testing.agreement(y.to(eager.dtype), eager, reference)
        if not found.ok:
            raise WrongResult(f"{name} is wrong, so there is nothing to time: {found}")
    # Peers round where they like; a wrong network is off by the size of its result.
    elif not error <= 4 * (eager.double() - reference).abs().max().item() + 1e-3 * reference.abs().max().item():
        raise WrongResult(f"{name} is wrong by {error:.2g}, so there is nothing to time")
    return error


LEAST_COSINE = 0.9  # random networks forgive quantisers less than trained ones: 0.98 is usual here, 0 another network


def check_int8(name: str, y: torch.Tensor, reference: torch.Tensor) -> float:
    """The cosine similarity of an int8 engine's result with float64's; raises WrongResult for another network."""
    cosine = F.cosine_similarity(y.double().flatten(), reference.flatten(), dim=0).item()
    if not cosine >= LEAST_COSINE:
        raise WrongResult(
            f"{name} is wrong, so there is nothing to time: its cosine similarity with float64 is {cosine:.3f}, below "
            f"{LEAST_COSINE}"
        )
    return cosine


def measure(case: Case, seconds: float = 8.0, also: Callable[[dict[str, Call]], None] | None = None) -> Row:
    """Builds, checks and times the case's engines in turn, for about so many seconds of timing.

    ``also`` gets the calls by engine, under the case's number of threads, to do more with them. Engines that are not
    installed are named in ``Row.missing``. Raises WrongResult.
    """
    row = Row(case.name, case.threads, case.batch, case.pixels)
    calls: dict[str, Call] = {}
    with testing.threads(case.threads), torch.inference_mode(False), torch.no_grad():
        model = mobilenet_v2(case.width)
        x = torch.randn(case.batch, 3, *case.size)
        for names, dtype in ((case.engines, torch.float32), (case.bfloat16, torch.bfloat16)):
            rounded = copy.deepcopy(model).to(dtype)
            one = x[:1].to(dtype)
            expected = rounded(one)
            # bfloat16 engines are held to the network of rounded weights; the others' own rounding differs.
            reference = rounded.double()(one.double())
            for engine in names:
                name = engine if dtype == torch.float32 else bfloat16(engine)
                try:
                    calls[name] = ENGINES[engine](model, x, dtype, case.threads)
                except EngineMissing as error:
                    row.missing[name] = str(error)
                else:
                    row.error[name] = check(name, as_tensor(calls[name]())[:1], expected, reference)
        reference = copy.deepcopy(model).double()(x[:1].double()) if case.int8 else torch.empty(0)
        for engine in case.int8:
            try:
                found = quantized(engine, case.width)
            except EngineMissing as error:
                row.missing[int8(engine)] = str(error)
                continue
            for name, build in found.engines.items():
                calls[name] = build(x, case.threads)
                y = as_tensor(calls[name]())[:1]
                row.cosine[name] = check_int8(name, y, reference)
                row.error[name] = (y.double() - reference).abs().max().item()
        if case.v1:
            calls[V1] = ENGINES[CHANNELS_LAST](mobilenet_v1(), x, torch.float32, case.threads)
        once = sum(t.median for t in testing.interleave(calls, rounds=1, warmup=1).values())
        # A model that is served finds its weights where it left them, not behind all the others'.
        repeat = max(1, min(5, int(seconds / 12 / once)))
        rounds = max(3, min(40, int(seconds / (once * (repeat + 1)))))
        settle = _SETTLE if once < 1 else 0  # a call of a second does not notice
        timings = testing.interleave(calls, rounds=rounds, warmup=0, calls=dict.fromkeys(calls, repeat), settle=settle)
        for name in calls:
            if name.split()[0] in ("eager", "fused"):
                row.peak_bytes[name] = testing.peak_activation_bytes(calls[name])
        if also is not None:
            also(calls)
    row.milliseconds = {name: t.median * 1e3 for name, t in timings.items()}
    row.over_fused = {name: testing.ratio(t, timings[FUSED]) for name, t in timings.items()}
    if bfloat16(FUSED) in timings:
        row.over_bfloat16 = {name: testing.ratio(t, timings[bfloat16(FUSED)]) for name, t in timings.items()}
    if int8(FUSED) in timings:
        row.over_int8 = {name: testing.ratio(t, timings[int8(FUSED)]) for name, t in timings.items()}
    return row


def _resident_growth(engine: str, dtype_name: str, size: tuple[int, int], threads: int, out: Any) -> None:
    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    torch.set_num_threads(threads)
    with torch.no_grad():
        x = torch.randn(1, 3, *size)
        try:
            model = testing.perturb_batch_norm(_torchvision(1.0))
            call = ENGINES[engine](model, x, getattr(torch, dtype_name), threads)
        except EngineMissing:
            out.put(None)
            return
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = status("VmRSS")
        for _ in range(3):
            result = call()
        del result
        out.put(status("VmHWM") - before)


def resident_growth(engine: str, dtype: torch.dtype, size: tuple[int, int], threads: int) -> int | None:
    """Bytes by which a process grows while an engine runs: from before its first call to the peak of three.

    Measured in a process of its own (Linux). What an engine allocates when it is built does not count. None where
    the engine is missing.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    name = str(dtype).removeprefix("torch.")
    process = context.Process(target=_resident_growth, args=(engine, name, size, threads, queue))
    process.start()
    process.join(300)
    if process.exitcode != 0:
        raise RuntimeError(f"measuring {engine} failed with exit code {process.exitcode}")
    return queue.get()


RESIDENT = (
    *((engine, torch.float32) for engine in (CHANNELS_LAST, *PEERS, FUSED)),
    *((engine, torch.bfloat16) for engine in ("OpenVINO", FUSED)),
)


def measure_resident(threads: int = 1) -> dict[str, int]:
    """:func:`resident_growth` on one 1088x1920 image, by engine, in bytes."""
    found = {}
    for engine, dtype in RESIDENT:
        grown = resident_growth(engine, dtype, HIGH_RESOLUTION, threads)
        if grown is not None:
            found[engine if dtype == torch.float32 else bfloat16(engine)] = grown
    return found


def measure_growth(sizes: Sequence[tuple[int, int]] = GROWTH, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Nanoseconds per pixel of the feature extractor on one image, one thread: all engines and sizes in one run.

    Without the classifier, whose cost does not grow with the image. Engines that are not installed are left out.
    Raises RuntimeError for a wrong result.
    """
    engines = [(e, torch.float32) for e in _TORCH_AND_PEERS] + [(e, torch.bfloat16) for e in ("OpenVINO", FUSED)]
    calls: dict[tuple[str, tuple[int, int]], Call] = {}
    with testing.threads(1), torch.inference_mode(False), torch.no_grad():
        features: Any = mobilenet_v2(1.0).features
        for size in sizes:
            x = torch.randn(1, 3, *size)
            for engine, dtype in engines:
                name = engine if dtype == torch.float32 else bfloat16(engine)
                rounded = copy.deepcopy(features).to(dtype)
                with contextlib.suppress(EngineMissing):
                    call = ENGINES[engine](features, x, dtype, 1)
                    if size == sizes[0]:
                        rounded_x = x.to(dtype)
                        expected = rounded(rounded_x)
                        check(name, as_tensor(call()), expected, rounded.double()(rounded_x.double()))
                    calls[name, size] = call
        # Small images several times a turn, so that every turn takes long enough to be timed.
        repeat = {at: max(1, 300_000 // (at[1][0] * at[1][1])) for at in calls}
        timings = testing.interleave(calls, rounds=rounds, warmup=1, calls=repeat)
    found: dict[str, dict[str, float]] = {}
    for (name, (height, width)), timing in timings.items():
        found.setdefault(name, {})[f"{height}x{width}"] = timing.median / (height * width) * 1e9
    return found


def run(cases: Sequence[Case], *, seconds: float, plot: Path | None, quick: bool) -> int:
    """Measures the cases, and unless ``quick`` memory and growth; prints and draws them; returns the exit code."""
    results = Results()
    for case in cases:
        print(f"{case.name}, {case.threads} thread(s) ...", file=sys.stderr, flush=True)
        results.rows.append(measure(case, seconds))
    if not quick:
        results.resident = measure_resident()
        print("growth with the image ...", file=sys.stderr, flush=True)
        results.growth = measure_growth()
    return show(results, plot)


def show(results: Results, plot: Path | None) -> int:
    """Prints the tables and draws the picture; returns the exit code."""
    print("\n\n".join(tables(results)))
    for name, reason in {name: why for row in results.rows for name, why in row.missing.items()}.items():
        print(f"\nnot measured: {name}: {reason}")
    if plot is not None:
        draw(results, plot)
        print(f"\nplot: {plot}")
    return 0
