"""What ``gpu_report.py`` writes: one JSON, one Markdown, one picture. Needs nothing but Python's own library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FUZZ = 40  # examples of each fuzz test: on a GPU each shape is another kernel to compile

CUTS = f"""\
- torch.compile only in float16, on whole networks, at batch 256, 1 and 32. It is timed in a run of its own, against
  fused and eager, because compiling may not fit the time.
- Blocks one by one only in float16, as graphs, at batch 256 and 1.
- Fuzz tests: {FUZZ} examples instead of 300.
- Three formats only at batch 256 and 1; batches 8, 32 and 128 and the 1088x1920 image in float16."""


@dataclass
class Report:
    """All that is written."""

    machine: dict[str, str] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    rows: list[Any] = field(default_factory=list)  # gpu_timing.Row
    memory: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # section -> why
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # that a section took
    plot: str = ""  # why there is none

    @property
    def ok(self) -> bool:
        """Whether tests passed, nothing failed, and no result was wrong."""
        return self.tests.get("ok", False) and not self.failed and not any(row.wrong for row in self.rows)

    def save(self, folder: Path) -> None:
        """Each file is replaced as a whole."""
        for name, text in ("gpu.json", json.dumps(asdict(self), indent=1) + "\n"), ("gpu.md", markdown(self)):
            temporary = folder / (name + ".tmp")
            temporary.write_text(text)
            temporary.replace(folder / name)


def number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def cell(row: Any, state: str, name: str) -> str:
    """Microseconds, spread and the ratio to fused; for a wrong result no speed at all."""
    if name in row.wrong:
        return "**wrong**"
    us = row.microseconds.get(state, {}).get(name)
    if us is None:
        return "missing" if name in row.missing else ""
    ratio = row.over_fused.get(state, {}).get(name)
    over = "" if ratio is None or ratio == 1 else f", {ratio:.2f}x"
    return f"{number(us)} ±{row.spread[state][name]:.0%}{over}"


def grid(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def candidates_of(rows: Sequence[Any]) -> list[str]:
    """Every candidate that was built, in order of appearance."""
    timed = (name for row in rows for by_name in row.microseconds.values() for name in by_name)
    return list(dict.fromkeys([*timed, *(name for row in rows for name in (*row.wrong, *row.missing))]))


def network_tables(rows: Sequence[Any]) -> list[str]:
    found = []
    for state in ("cold", "warm"):
        for what in dict.fromkeys(row.what for row in rows):
            some = [row for row in rows if row.what == what]
            names = candidates_of(some)
            lines = [
                [
                    f"{row.dtype} {'x'.join(map(str, row.shape))}",
                    *(cell(row, state, name) for name in names),
                    ", ".join(f"{e:.1e}" for name, e in row.error.items() if name.startswith("fused")),
                ]
                for row in some
            ]
            found.append(f"### {what}, {state} L2\n\n" + grid([f"us, {state} L2", *names, "max error of fused"], lines))
    return found


def block_table(rows: Sequence[Any], limits: dict[str, float]) -> str:
    """A line a block: times, what they reach of this run's limits, and what was predicted of an H200."""
    names = candidates_of(rows)
    fused = next((name for name in names if name.startswith("fused")), "")
    columns = ["block", "input", *(f"{name}, {state} us" for name in names for state in ("cold", "warm"))]
    columns += ["GB/s cold", "of copy", "TFLOP/s", "of product", "predicted (H200) us", "measured over predicted"]
    columns += ["floor here us", "over floor", "max error"]
    lines = []
    for row in rows:
        line = [row.what, "x".join(map(str, row.shape))]
        line += [cell(row, state, name) for name in names for state in ("cold", "warm")]
        us = None if fused in row.wrong else row.microseconds.get("cold", {}).get(fused)
        if us is None:
            line += [""] * 4 + [number(row.predicted), "", number(row.floor), "", ""]
        else:
            bytes_a_second, flops = row.bytes / us * 1e6, row.flops / us * 1e6
            line += [f"{bytes_a_second / 1e9:.0f}", f"{bytes_a_second / limits['copy bytes']:.0%}"]
            line += [f"{flops / 1e12:.1f}", f"{flops / limits['fp16 product flops']:.0%}"]
            line += [number(row.predicted), f"{us / row.predicted:.2f}", number(row.floor), f"{us / row.floor:.1f}"]
            line += [f"{row.error[fused]:.1e}"]
        lines.append(line)
    complete = fused and all(fused in row.microseconds.get("cold", {}) and fused not in row.wrong for row in rows)
    if complete and len(rows) == 17:
        total, predicted, floor = (
            sum(values)
            for values in zip(*((r.microseconds["cold"][fused], r.predicted, r.floor) for r in rows), strict=True)
        )
        sums = {f"{fused}, cold us": number(total), "predicted (H200) us": number(predicted)}
        sums |= {"measured over predicted": f"{total / predicted:.2f}", "floor here us": number(floor)}
        sums |= {"block": "all", "over floor": f"{total / floor:.1f}"}
        lines.append([sums.get(column, "") for column in columns])
    return grid(columns, lines)


def markdown(report: Report) -> str:
    """The report for reading."""
    parts = ["# mnv2_fused on a GPU", grid(["what", "value"], [[k, v] for k, v in report.machine.items()])]
    if report.tests:
        shown = ", ".join(f"{k}: {v}" for k, v in report.tests.items() if k != "bad")
        bad = "".join(f"\n- FAILED {name}" for name in report.tests.get("bad", ()))
        parts.append(f"## Tests on the GPU\n\n{'passed' if report.tests['ok'] else '**NOT PASSED**'} ({shown}){bad}")
    if report.limits:
        lines = [[name, f"{value:.3g}"] for name, value in report.limits.items()]
        parts.append("## Limits measured in this run\n\n" + grid(["limit", "a second, or us"], lines))
    networks = [row for row in report.rows if not row.what.startswith("block")]
    if networks:
        head = (
            "Medians of rounds of interleaved calls, ± half the quartiles' distance, and times the first fused column."
        )
        parts += [f"## Whole networks\n\n{head}", *network_tables(networks)]
    blocks = [row for row in report.rows if row.what.startswith("block")]
    for batch in dict.fromkeys(row.shape[0] for row in blocks):
        some = [row for row in blocks if row.shape[0] == batch]
        parts.append(f"## Blocks, batch {batch}\n\n{block_table(some, report.limits)}")
    if report.memory:
        names = list(dict.fromkeys(name for m in report.memory for name in m["peak_bytes"]))
        lines = [
            [
                f"{m['dtype']} {'x'.join(map(str, m['shape']))}",
                *(f"{m['peak_bytes'].get(n, 0) / 1e6:.1f}" for n in names),
            ]
            for m in report.memory
        ]
        parts.append("## Peak activation memory, MB\n\n" + grid(["network", *names], lines))
    for title, found in ("Not measured", report.skipped), ("Failed", report.failed):
        if found:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {name}: {why}" for name, why in found.items()))
    reasons = {f"{name} ({row.what}): {why}" for row in report.rows for name, why in (row.wrong | row.missing).items()}
    if reasons:
        parts.append("## Candidates without a time\n\n" + "\n".join(f"- {reason}" for reason in sorted(reasons)))
    parts.append(f"## Cut to fit the time\n\n{CUTS}")
    if report.plot:
        parts.append(f"No roofline plot: {report.plot}.")
    return "\n\n".join(parts) + "\n"


def draw(report: Report, output: Path) -> None:
    """The roofline of this run's limits, with each block's cold time on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    copy, peak = report.limits["copy bytes"], report.limits["fp16 product flops"]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    ends = [1, peak / copy, 2000]
    axes.plot(
        ends, [min(i * copy, peak) / 1e12 for i in ends], color="#3c4657", label="copy and fp16 product, measured"
    )
    rows = [row for row in report.rows if row.bytes]
    for (batch, name), marker in zip(
        ((b, n) for b in dict.fromkeys(r.shape[0] for r in rows) for n in candidates_of(rows)), "osv^Dx*", strict=False
    ):
        some = [
            r for r in rows if r.shape[0] == batch and name in r.microseconds.get("cold", {}) and name not in r.wrong
        ]
        points = [(r.flops / r.bytes, r.flops / r.microseconds["cold"][name] / 1e6) for r in some]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=f"{name}, batch {batch}")
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte of the fused block", ylabel="TFLOP/s, cold L2")
    axes.legend(fontsize=8)
    axes.set_title(f"MobileNetV2's blocks, float16, {report.machine.get('device', '')}")
    figure.savefig(output, dpi=110)
    plt.close(figure)
