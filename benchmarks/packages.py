"""Every model of :mod:`zoo_packages`, eager beside fused: writes results/packages.json and docs/packages.md.

How many blocks a model has is counted by hooks on its convolutions, without asking this project. A wrong result ends
the run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import agreement_of, call_of, publish
from torch import Tensor, nn
from zoo_packages import BESIDE, PINS, ZOO, Model

from mnv2_fused import FusedBlock, fuse, report, testing
from mnv2_fused.convert.find import blocks_of
from mnv2_fused.tools import bench_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/packages.json"
PAGE = ROOT / "docs/packages.md"


@dataclass(frozen=True)
class Row:
    """What was found of a model on one image."""

    model: str
    package: str
    size: tuple[int, int]
    blocks: int  # expand, depthwise, project, by hooks
    blocks_fused: int
    pairs: int  # depthwise convolutions that a 1x1 one follows, those of the blocks among them
    pairs_fused: int
    left: dict[str, int]  # depthwise convolutions of such pairs that no fused block has, by class and reason
    error: float  # the largest deviation from float64
    limit: float  # what the tolerance rule allows
    float64: bool  # else the model insists on float32, and the deviation is from eager's result
    fuse_seconds: float
    milliseconds: float  # fused, on one thread
    ratio: float  # eager's time over fused's, on one thread: median over rounds
    eager_peak: int  # bytes that torch's allocator held at most
    fused_peak: int


class _Called(NamedTuple):
    """One call of a convolution."""

    name: str
    conv: nn.Conv2d
    on_pixel: bool  # whether it takes images of one pixel, as a squeeze-and-excite does


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels > 1 and max(conv.kernel_size) > 1


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and tuple(conv.kernel_size) == (1, 1)


def count_pairs(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Names of depthwise convolutions with a 1x1 one behind, and whether each is one of a block.

    Of a block: the convolution before is a 1x1 that gives more channels than it takes, the one behind gives fewer.
    """
    calls: list[_Called] = []
    handles = []

    def note(name: str) -> Any:
        def hook(conv: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            assert isinstance(conv, nn.Conv2d)
            calls.append(_Called(name, conv, tuple(given[0].shape[2:]) == (1, 1)))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    found: dict[str, bool] = {}
    for i, (name, conv, on_pixel) in enumerate(calls):
        if name in found or not _is_depthwise(conv):
            continue
        beside = [c for c in calls[i + 1 :] if on_pixel or not c.on_pixel]
        after = next((c.conv for c in beside if c.conv.in_channels == conv.out_channels), None)
        if after is None or not _is_pointwise(after):
            continue
        before = next((c.conv for c in reversed(calls[:i]) if on_pixel or not c.on_pixel), None)
        expands = before is not None and _is_pointwise(before) and before.out_channels == conv.in_channels
        found[name] = expands and before.in_channels < conv.in_channels and after.out_channels < conv.out_channels
    return found


def _left(fused: nn.Module, names: set[str]) -> dict[str, int]:
    """Of these depthwise convolutions, why each is in no fused block."""
    reasons: dict[nn.Module, str] = {}
    for _, block, found in blocks_of(fused):
        if not isinstance(block, FusedBlock):
            reasons |= dict.fromkeys(block.modules(), f"{type(block).__qualname__}: {found}")
    modules = dict(fused.named_modules())
    for row in report(fused).unknown:
        for name in row.names:
            for module in modules[name].modules():
                reasons.setdefault(module, f"{row.kind.rpartition('.')[2]}: {row.reason}")
    beyond = "its layers are spread over other modules"
    return dict(Counter(reasons.get(modules[name], beyond) for name in names if name in modules))


def _float64(model: nn.Module, x: Tensor) -> Any:
    """The model's result in float64; None where it insists on float32."""
    try:
        return copy.deepcopy(model).double()(x.double())
    except (RuntimeError, TypeError):
        return None


def build(entry: Model, images: int = 4, seed: int = 0) -> nn.Module:
    """The model in eval, with batch norms fitted to random images."""
    torch.manual_seed(seed)
    model = testing.perturb_batch_norm(entry.make())
    model.eval()  # which of some classes gives None
    testing.fit_batch_norm(model, torch.randn(images, 3, *entry.size))
    return model


def measure(name: str, entry: Model, seconds: float) -> Row:
    """About so many seconds of timing. Raises RuntimeError for a wrong result."""
    with torch.no_grad(), warnings.catch_warnings(), testing.threads(1):
        warnings.simplefilter("ignore")
        model = build(entry)
        model = model.to(memory_format=torch.channels_last)
        x = torch.randn(1, 3, *entry.size).to(memory_format=torch.channels_last)
        pairs = count_pairs(model, x)
        begin = time.perf_counter()
        fused = fuse(model)
        fuse_seconds = time.perf_counter() - begin
        stages = [c for _, m, _ in blocks_of(fused) if isinstance(m, FusedBlock) for c, _ in m._pairs]
        names = {conv: name for name, conv in fused.named_modules()}
        inside = {names[conv] for conv in stages}
        # Of four images: of one, the limit follows eager's luck.
        images = torch.randn(4, 3, *entry.size).to(memory_format=torch.channels_last)
        eager, truth = model(images), _float64(model, images)
        found = agreement_of(fused(images), eager, eager if truth is None else truth)
        if not found.ok and truth is not None:
            raise RuntimeError(f"{name} is wrong, so there is nothing to time: {found}")
        calls = {"eager": call_of(model, x), "fused": call_of(fused, x)}
        once = sum(t.median for t in testing.interleave(calls, rounds=1, warmup=2).values())
        timings = testing.interleave(calls, rounds=max(5, min(60, int(seconds / once))), warmup=1)
        peaks = {engine: testing.peak_activation_bytes(call) for engine, call in calls.items()}
        return Row(
            name,
            entry.package,
            entry.size,
            sum(pairs.values()),
            sum(pairs[name] for name in pairs if name in inside),
            len(pairs),
            len(pairs.keys() & inside),
            _left(fused, pairs.keys() - inside),
            found.error,
            found.limit,
            truth is not None,
            fuse_seconds,
            timings["fused"].median * 1e3,
            testing.ratio(timings["eager"], timings["fused"]),
            peaks["eager"],
            peaks["fused"],
        )


def page(content: dict) -> str:
    """The Markdown of what was kept."""
    machine, rows = content["machine"], [Row(**row) for row in content["models"]]
    slow = [row for row in rows if row.fuse_seconds > 3]

    def fused(of: str) -> str:
        there, done = (sum(getattr(row, field) for row in rows) for field in (of, f"{of}_fused"))
        return f"{done} of {there} ({done / max(there, 1):.0%})"

    head = [
        "# Models of many packages",
        "",
        "Written by `make packages`: it installs what `benchmarks/zoo_packages.py` pins, builds each model with random",
        "weights and runs it on one image and one thread, by torch in channels_last and fused in turn.",
        "",
        f"{len(rows)} models of {len({row.package for row in rows})} packages on {machine['processor']},",
        f"{machine['instruction set']}, float32, torch {machine['torch']}. Fused are",
        "",
        f"- **{fused('blocks')} of the expand-depthwise-project blocks;**",
        f"- {fused('pairs')} of the depthwise convolutions that a 1x1 one follows, those of the blocks among them.",
        "",
        f"`fuse` took {max(row.fuse_seconds for row in rows):.1f} s at most, and more than 3 s {len(slow)} times.",
        "",
        "- blocks: a 1x1 convolution to more channels, a depthwise one, a 1x1 to fewer. They are counted by hooks on",
        "  the convolutions, in the order of their calls: how many are fused, and how many there are.",
        "- pairs: the same of depthwise convolutions with a 1x1 one behind.",
        "- left: pairs that are not fused, with the number of the reason below.",
        "- error: the largest deviation from float64 over what the tolerance rule allows; x: from eager's result, of a",
        "  model that insists on float32.",
        "- time: eager's over fused's, median over rounds: above 1 fused is faster. memory: the same of the most bytes",
        "  that torch's allocator held.",
        "",
        "| model | image | blocks | pairs | left | error | time | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = {reason: i + 1 for i, reason in enumerate(dict.fromkeys(r for row in rows for r in row.left))}
    lines = []
    for row in rows:
        left = ", ".join(f"{count} ({notes[reason]})" for reason, count in row.left.items())
        size = f"{row.size[0]}x{row.size[1]}" if row.size[0] != row.size[1] else str(row.size[0])
        cells = (
            *(row.model, size, f"{row.blocks_fused} of {row.blocks}", f"{row.pairs_fused} of {row.pairs}", left),
            f"{row.error / row.limit:.2f}{'' if row.float64 else ' x'}",
            *(f"{row.ratio:.2f}x", f"{row.eager_peak / row.fused_peak:.1f}x"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*head, *lines, "", *reasons]).rstrip() + "\n"


def _is_here(package: str, version: str) -> bool:
    try:
        return importlib.metadata.version(package) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="print models whose name has it in it, and keep nothing")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a model")
    parser.add_argument(
        "--requirements", action="store_true", help="print what is not installed, for pip install --no-deps"
    )
    options = parser.parse_args(arguments)
    if options.requirements:
        print(
            "\n".join(
                f"{name}=={version}" for name, version in {**PINS, **BESIDE}.items() if not _is_here(name, version)
            )
        )
        return 0
    rows = []
    for name in [name for name in ZOO if options.only is None or options.only in name]:
        rows.append(measure(name, ZOO[name], options.seconds))
        print(
            f"{name}: {rows[-1].blocks_fused} of {rows[-1].blocks}, {rows[-1].ratio:.2f}x", file=sys.stderr, flush=True
        )
    content = {"machine": bench_results.machine(), "models": [asdict(row) for row in rows]}
    publish(content, page(content), *(() if options.only else (RESULTS, PAGE)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")  # some packages draw when they are imported
    sys.exit(main())
