"""Every model of the zoo, eager channels_last beside fused: writes results/families.json and docs/families.md.

A wrong result is not timed: it ends the run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from zoo import ZOO, Entry, build, tensors_in

from mnv2_fused import fuse, report, testing
from mnv2_fused.tools import bench_results
from mnv2_fused.tools.engines import Call

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/families.json"
PAGE = ROOT / "docs/families.md"
LIBRARIES = ("torchvision", "timm", "transformers", "segmentation-models-pytorch")
THREADS = (1, 2)


@dataclass(frozen=True)
class Row:
    """What was measured of a model on one image."""

    model: str
    size: tuple[int, int]
    fused: int
    skipped: dict[str, int]  # how many blocks, by reason
    error: float  # of the result that comes nearest to its limit: the largest deviation from float64,
    limit: float  # and what the tolerance rule allows
    milliseconds: dict[str, float]  # fused, by threads
    ratio: dict[str, float]  # eager's time over fused's, by threads: median over rounds
    eager_peak: int  # bytes that torch's allocator held at most
    fused_peak: int


def agreement_of(ours: object, eager: object, truth: object) -> testing.Agreement:
    """Of the result that comes nearest to its limit."""
    found = [
        testing.agreement(*results)
        for results in zip(tensors_in(ours), tensors_in(eager), tensors_in(truth), strict=True)
    ]
    return max(found, key=lambda a: (not a.ok, a.error / a.limit))


def measure(name: str, entry: Entry, seconds: float) -> Row:
    """About so many seconds of timing for each number of threads. Raises RuntimeError for a wrong result."""
    with torch.no_grad():
        model = build(entry, entry.size)
        fused = fuse(model)
        blocks = report(fused)
        x = torch.randn(1, 3, *entry.size).to(memory_format=torch.channels_last)
        found = agreement_of(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
        if not found.ok:
            raise RuntimeError(f"{name} is wrong, so there is nothing to time: {found}")
    calls = {"eager": call_of(model, x), "fused": call_of(fused, x)}
    milliseconds, ratio = {}, {}
    for threads in THREADS:
        with testing.threads(threads):
            once = sum(t.median for t in testing.interleave(calls, rounds=1, warmup=1).values())
            rounds = max(5, min(60, int(seconds / once)))
            timings = testing.interleave(calls, rounds=rounds, warmup=1, settle=0.01)
        milliseconds[str(threads)] = timings["fused"].median * 1e3
        ratio[str(threads)] = testing.ratio(timings["eager"], timings["fused"])
    with testing.threads(1):
        peaks = {engine: testing.peak_activation_bytes(call) for engine, call in calls.items()}
    return Row(
        name,
        entry.size,
        len(blocks.fused),
        dict(Counter(str(b.reason) for b in blocks.skipped)),
        found.error,
        found.limit,
        milliseconds,
        ratio,
        peaks["eager"],
        peaks["fused"],
    )


def call_of(model: nn.Module, x: Tensor) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def page(content: dict) -> str:
    """The Markdown of what was kept."""
    machine = content["machine"]
    head = [
        "# Models and what `fuse` makes of them",
        "",
        "Written by `make families`, which builds each model with random weights, compares its results with float64's,",
        "and times it, on one image, against the same model run by torch in channels_last: both in inference mode, in",
        "turn. Of a detector it is backbone and heads, without the sorting of boxes.",
        "",
        f"On {machine['cores']} shared cores of {machine['processor']}, {machine['instruction set']}, float32, torch",
        f"{machine['torch']}, " + ", ".join(f"{name} {machine[name]}" for name in LIBRARIES) + ".",
        "",
        "- error: the largest deviation from float64, and in brackets what the tolerance rule allows it: twice eager's",
        "  own and four units in the last place, of the result that comes nearest to that.",
        "- time: eager's over fused's, on one and on two threads: the median over rounds; above 1 fused is faster.",
        "- memory: the most that torch's allocator held during a call, eager's over fused's.",
        "",
        "| model | image | fused | left | error | time | 2 threads | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [Row(**row) for row in content["models"]]
    notes = {reason: i + 1 for i, reason in enumerate(dict.fromkeys(r for row in rows for r in row.skipped))}
    lines = []
    for row in rows:
        left = ", ".join(f"{count} ({notes[reason]})" for reason, count in row.skipped.items()) or "0"
        size = f"{row.size[0]}x{row.size[1]}" if row.size[0] != row.size[1] else str(row.size[0])
        memory = f"{row.eager_peak / 1e6:.1f} MB, {row.eager_peak / row.fused_peak:.1f}x"
        cells = (
            *(row.model, size, row.fused, left, f"{row.error:.1e} ({row.limit:.1e})"),
            *(f"{row.ratio[str(t)]:.2f}x" for t in THREADS),
            memory,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    reasons = [f"({number}) {reason}" for reason, number in notes.items()]
    return "\n".join([*head, *lines, "", *reasons]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="print models whose name has it in it, and keep nothing")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a model and number of threads")
    options = parser.parse_args(arguments)
    names = [name for name in ZOO if options.only is None or options.only in name]
    if not names:
        parser.error(f"no model's name has {options.only!r} in it; there are {', '.join(ZOO)}")
    rows = []
    for name in names:
        rows.append(measure(name, ZOO[name], options.seconds))
        print(f"{name}: {rows[-1].ratio}, {rows[-1].eager_peak / rows[-1].fused_peak:.1f}x less", file=sys.stderr)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    content = {"machine": {**bench_results.machine(), **versions}, "models": [asdict(row) for row in rows]}
    publish(content, page(content), *(() if options.only else (RESULTS, PAGE)))
    return 0


def publish(content: dict, text: str, results: Path | None = None, where: Path | None = None) -> None:
    """Keeps what was measured, and its page; prints the page where no files are given."""
    if results is None or where is None:
        print(text)
        return
    results.write_text(json.dumps(content, indent=1) + "\n")
    where.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
