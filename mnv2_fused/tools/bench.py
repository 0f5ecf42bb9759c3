"""MobileNetV2 through every engine in one interleaved run: what ``python -m mnv2_fused bench`` and
``benchmarks/bench_model.py`` measure, print, keep and draw."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import backends, testing
from ..version import __version__
from .engines import CHANNELS_LAST, ENGINES, FUSED, PEERS, Call, EngineMissing, as_tensor

HIGH_RESOLUTION = (1088, 1920)
GROWTH = ((128, 128), (224, 224), (448, 448), (736, 1280), HIGH_RESOLUTION)
V1 = "MobileNetV1"
_SETTLE = 0.02  # seconds until the thread pool of the engine before has gone to sleep


@dataclass(frozen=True)
class Case:
    """One network on one input."""

    size: tuple[int, int] = (224, 224)
    batch: int = 1
    threads: int = 1
    width: float = 1.0
    engines: tuple[str, ...] = tuple(ENGINES)
    bfloat16: tuple[str, ...] = (CHANNELS_LAST, "OpenVINO", FUSED)  # engines that run it once more so
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


@dataclass
class Row:
    """What was measured of a case."""

    case: str
    threads: int
    batch: int
    pixels: int
    milliseconds: dict[str, float] = field(default_factory=dict)  # median of a call, by engine
    over_fused: dict[str, float] = field(default_factory=dict)  # median over rounds of its time over fused's
    over_bfloat16: dict[str, float] = field(default_factory=dict)  # the same over fused bfloat16's
    peak_bytes: dict[str, int] = field(default_factory=dict)  # activations that torch's allocator held at most
    error: dict[str, float] = field(default_factory=dict)  # largest deviation from float64, first image
    missing: dict[str, str] = field(default_factory=dict)  # engines that could not run, and why


@dataclass
class Results:
    """All that a run of the benchmark found."""

    rows: list[Row] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)  # bytes by engine, see measure_resident
    growth: dict[str, dict[str, float]] = field(default_factory=dict)  # ns per pixel by engine and size


def bfloat16(engine: str) -> str:
    """How a row calls an engine that runs in bfloat16."""
    return f"{engine} bfloat16"


def mobilenet_v1() -> nn.Sequential:
    """MobileNetV1 1.0 (Howard et al. 2017, table 1): 569 M multiply-adds to V2's 301 M."""

    def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        padding = kernel // 2
        layer = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]

    layers, channels = conv(3, 32, 3, 2), 32
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for c_out, stride in plan:
        layers += conv(channels, channels, 3, stride, channels) + conv(channels, c_out, 1)
        channels = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


def _torchvision(width: float) -> nn.Module:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    return mobilenet_v2(width_mult=width).eval()


def mobilenet_v2(width: float) -> nn.Module:
    """torchvision's, in eval, with random weights and statistics fitted to random images."""
    model = _torchvision(width)
    return testing.fit_batch_norm(testing.perturb_batch_norm(model), torch.randn(8, 3, 224, 224))


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
        if case.v1:
            calls[V1] = ENGINES[CHANNELS_LAST](mobilenet_v1().eval(), x, torch.float32, case.threads)
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
        features = mobilenet_v2(1.0).features
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


def machine() -> dict[str, str]:
    """What a result was measured on: processor, instruction set, versions and commit."""
    versions = {"mnv2_fused": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("torchvision", "onnxruntime", "openvino"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        family, model = fields.get("cpu family", "?"), fields.get("model", "?")
        processor = f"{fields.get('model name', processor)} (family {family}, model {model})"
    root = Path(__file__).parent.parent
    commit = ""
    if (root / ".git").exists() and shutil.which("git"):
        asked = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = asked.stdout.strip()
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "instruction set": backends._C.instruction_set(),
        "commit": commit,
        **versions,
    }


def save(path: Path, results: Results, **tables: Any) -> None:
    """Writes results with the machine they came from, as JSON."""
    content = {
        "machine": machine(),
        "models": [asdict(row) for row in results.rows],
        "resident": results.resident,
        "growth": results.growth,
        **tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> tuple[Results, dict[str, Any]]:
    """What :func:`save` wrote: the results, and everything."""
    content = json.loads(path.read_text())
    return Results([Row(**row) for row in content["models"]], content["resident"], content["growth"]), content


def table(rows: Sequence[Row], engines: Sequence[str]) -> str:
    """Markdown: a line per row, milliseconds per engine and how many times as long as fused it takes."""
    lines = ["| MobileNetV2 | threads | " + " | ".join(engines) + " |", "|---|---|" + "---|" * len(engines)]
    for row in rows:
        cells = []
        for engine in engines:
            ms = row.milliseconds.get(engine)
            if ms is None:
                cells.append("")
                continue
            of_bfloat16 = engine.endswith("bfloat16")
            over = (row.over_bfloat16 if of_bfloat16 else row.over_fused)[engine]
            digits = 2 if ms < 10 else 1 if ms < 100 else 0
            time = f"{ms:.{digits}f} ms"
            cells.append(f"**{time}**" if engine in (FUSED, bfloat16(FUSED)) else f"{time}, {over:.2f}x")
        lines.append(f"| {row.case} | {row.threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


FLOAT32_COLUMNS = ("eager", CHANNELS_LAST, "torch.compile", *PEERS, FUSED)
BFLOAT16_COLUMNS = tuple(bfloat16(e) for e in (CHANNELS_LAST, "OpenVINO", FUSED))


def memory_table(rows: Sequence[Row], resident: dict[str, int]) -> str:
    """Markdown: peak activation bytes, and by how much a process grows on the large image."""
    lines = ["| peak activation memory | eager channels_last | fused | | fused bfloat16 |", "|---|---|---|---|---|"]
    for row in rows:
        found = row.peak_bytes
        if row.threads != 1 or bfloat16(FUSED) not in found:
            continue
        less = found[CHANNELS_LAST] / found[FUSED]
        mb = {name: f"{count / 1e6:.1f} MB" for name, count in found.items()}
        lines.append(f"| {row.case} | {mb[CHANNELS_LAST]} | {mb[FUSED]} | {less:.1f}x less | {mb[bfloat16(FUSED)]} |")
    if resident:
        lines += ["", "| the process grows by | " + " | ".join(resident) + " |", "|---|" + "---|" * len(resident)]
        cells = " | ".join(f"{grown / 1e6:.0f} MB" for grown in resident.values())
        lines.append(f"| 1088x1920 | {cells} |")
    return "\n".join(lines)


def puzzle_table(rows: Sequence[Row]) -> str:
    """Markdown: V2's time over V1's, eager and fused, beside the ratio of their multiply-adds."""
    lines = [
        "| V2's time over V1's | threads | eager channels_last | fused | fused bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if V1 not in row.milliseconds:
            continue
        v1 = row.over_fused[V1]
        cells = (row.over_fused[CHANNELS_LAST] / v1, 1 / v1, 1 / row.over_bfloat16[V1])
        lines.append(f"| {row.case} | {row.threads} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    return "\n".join(lines)


def growth_table(growth: dict[str, dict[str, float]]) -> str:
    """Markdown: ns per pixel of the feature extractor, and how far the sizes lie apart."""
    sizes = list(dict.fromkeys(size for found in growth.values() for size in found))
    lines = ["| ns per pixel | " + " | ".join(sizes) + " | most over least |", "|---|" + "---|" * (len(sizes) + 1)]
    for name, found in growth.items():
        cells = " | ".join(f"{found[size]:.1f}" if size in found else "" for size in sizes)
        lines.append(f"| {name} | {cells} | {max(found.values()) / min(found.values()):.2f} |")
    return "\n".join(lines)


def tables(results: Results) -> list[str]:
    """Everything worth printing."""
    rows = results.rows
    main = [row for row in rows if V1 in row.milliseconds]
    rest = [row for row in rows if row not in main]
    found = [table(main, FLOAT32_COLUMNS), table(main, BFLOAT16_COLUMNS)]
    if rest:
        found.append(table(rest, (CHANNELS_LAST, *PEERS, FUSED, *BFLOAT16_COLUMNS[1:])))
    found += [memory_table(main, results.resident), puzzle_table(main)]
    return [*found, growth_table(results.growth)] if results.growth else found


_COLOURS = {
    "eager": "#d9dde3",
    CHANNELS_LAST: "#9aa5b5",
    "torch.compile": "#6f7d92",
    "ONNX Runtime": "#5b8db8",
    "OpenVINO": "#7a5ba6",
    FUSED: "#e4572e",
    V1: "#3c4657",
}


def _style(name: str) -> dict[str, Any]:
    half = name.endswith(" bfloat16")
    colour = _COLOURS.get(name.removesuffix(" bfloat16"), "#000000")
    return {"color": colour, "alpha": 0.55 if half else 1.0}


def draw(results: Results, output: Path) -> None:
    """Writes the picture: latency over fused's, memory, growth with pixels, and the puzzle of V1 and V2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    resident = results.resident
    one = [row for row in results.rows if row.threads == 1 and V1 in row.milliseconds]
    figure, ((latency, memory), (growth, puzzle)) = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")

    names = [n for n in (*FLOAT32_COLUMNS, *BFLOAT16_COLUMNS) if any(n in row.milliseconds for row in one)]
    height = 0.85 / len(names)
    for i, name in enumerate(names):
        at = [
            (k + (i - len(names) / 2) * height, r.over_fused[name]) for k, r in enumerate(one) if name in r.over_fused
        ]
        bars = latency.barh([y for y, _ in at], [v for _, v in at], height, label=name, **_style(name))
        latency.bar_label(bars, [f"{v:.2f}" for _, v in at], fontsize=7, padding=2)
    latency.axvline(1, color="#e4572e", linewidth=0.8)
    latency.set_yticks(range(len(one)), [row.case for row in one])
    latency.invert_yaxis()
    latency.margins(x=0.1)
    latency.set_title("time over fused float32's, one thread")
    latency.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)

    bars = memory.barh(list(resident), [v / 1e6 for v in resident.values()])
    for bar, name in zip(bars, resident, strict=True):
        bar.set(**_style(name))
    memory.bar_label(bars, [f"{v / 1e6:.0f}" for v in resident.values()], padding=2)
    memory.invert_yaxis()
    memory.margins(x=0.1)
    memory.set_title("MB by which a process grows, one 1088x1920 image")

    for name, found in results.growth.items():
        megapixels = [math.prod(map(int, size.split("x"))) / 1e6 for size in found]
        line = "--" if name.endswith("bfloat16") else "-"
        growth.plot(megapixels, found.values(), f"{line}o", label=name, markersize=4, **_style(name))
    growth.set(xscale="log", xlabel="megapixels", ylabel="ns per input pixel", ylim=(0, None))
    growth.set_title("time per pixel of the feature extractor, batch 1, one thread")
    if results.growth:
        growth.legend(fontsize=8)

    for i, name in enumerate((CHANNELS_LAST, FUSED, bfloat16(FUSED))):
        values = [row.over_fused[name] / row.over_fused[V1] for row in one]
        bars = puzzle.bar([k + (i - 1) * 0.27 for k in range(len(one))], values, 0.25, label=name, **_style(name))
        puzzle.bar_label(bars, [f"{v:.2f}" for v in values], padding=2)
    puzzle.axhline(0.53, color="#3c4657", linewidth=1, linestyle=":")
    puzzle.annotate("multiply-adds: 0.53", (len(one) - 0.55, 0.54), ha="right", fontsize=8)
    puzzle.axhline(1, color="#3c4657", linewidth=0.8)
    puzzle.set_xticks(range(len(one)), [row.case for row in one])
    puzzle.set_title("MobileNetV2's time over eager MobileNetV1's, one thread")
    puzzle.margins(y=0.15)
    puzzle.legend(fontsize=8, loc="upper left")

    figure.savefig(output, dpi=110, format="png")
    plt.close(figure)


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
