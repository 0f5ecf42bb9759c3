"""Tables and picture of what the benchmark found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench_results import V1, Results, Row, bfloat16, int8
from .engines import CHANNELS_LAST, FROZEN, FUSED, PEERS


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
            time = _milliseconds(ms)
            cells.append(f"**{time}**" if engine in (FUSED, bfloat16(FUSED)) else f"{time}, {over:.2f}x")
        lines.append(f"| {row.case} | {row.threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(ms: float) -> str:
    return f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f} ms"


FLOAT32_COLUMNS = ("eager", CHANNELS_LAST, "torch.compile", *PEERS, FUSED)
BFLOAT16_COLUMNS = tuple(bfloat16(e) for e in (CHANNELS_LAST, "OpenVINO", FUSED))
INT8_ENGINES = (int8("ONNX Runtime"), int8("OpenVINO"), bfloat16(int8("OpenVINO")), int8(FUSED))
# Each in what it is best at; those that were not measured are left out.
INT8_COLUMNS = (
    *(CHANNELS_LAST, FUSED, FROZEN, *map(bfloat16, ("OpenVINO", FUSED, FROZEN))),
    *INT8_ENGINES,
)


def int8_table(rows: Sequence[Row]) -> str:
    """Markdown: a line per row, milliseconds per engine and how many times as long as fused int8 it takes."""
    engines = [name for name in INT8_COLUMNS if any(name in row.milliseconds for row in rows)]
    lines = ["| MobileNetV2 | threads | " + " | ".join(engines) + " |", "|---|---|" + "---|" * len(engines)]
    for row in rows:
        cells = []
        for engine in engines:
            ms = row.milliseconds.get(engine)
            time = "" if ms is None else _milliseconds(ms)
            over = "" if ms is None else f", {row.over_int8[engine]:.2f}x"
            cells.append(f"**{time}**" if engine == int8(FUSED) else time + over)
        lines.append(f"| {row.case} | {row.threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cosine_table(rows: Sequence[Row]) -> str:
    """Markdown: how near int8 engines' results are to float64's."""
    engines = [name for name in INT8_ENGINES if any(name in row.cosine for row in rows)]
    lines = ["| cosine similarity with float64 | " + " | ".join(engines) + " |", "|---|" + "---|" * len(engines)]
    for case, cosine in {row.case: row.cosine for row in rows}.items():
        cells = (f"{cosine[name]:.4f}" if name in cosine else "" for name in engines)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def int8_memory_table(rows: Sequence[Row]) -> str:
    """Markdown: peak activation bytes of what torch runs."""
    engines = (CHANNELS_LAST, FUSED, bfloat16(FUSED), int8(FUSED))
    lines = ["| peak activation memory | " + " | ".join(engines) + " |", "|---|" + "---|" * len(engines)]
    for row in rows:
        if row.threads == 1 and all(name in row.peak_bytes for name in engines):
            cells = (f"{row.peak_bytes[name] / 1e6:.2f} MB" for name in engines)
            lines.append(f"| {row.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    if quantized := [row for row in rows if row.over_int8]:
        found += [int8_table(quantized), cosine_table(quantized), int8_memory_table(quantized)]
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
    colour = _COLOURS.get(name.removesuffix(" bfloat16").removesuffix(" int8"), "#000000")
    style = {"color": colour, "alpha": 0.55 if name.endswith(" bfloat16") else 1.0}
    return style | {"hatch": "//", "edgecolor": "white"} if " int8" in name else style


def draw(results: Results, output: Path) -> None:
    """Writes the picture: latency over fused's, memory, growth with pixels, and the puzzle of V1 and V2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    resident = results.resident
    one = [row for row in results.rows if row.threads == 1 and V1 in row.milliseconds]
    figure, ((latency, memory), (growth, puzzle)) = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")

    columns = (*FLOAT32_COLUMNS, *BFLOAT16_COLUMNS, *INT8_ENGINES)
    names = [name for name in columns if any(name in row.milliseconds for row in one)]
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
