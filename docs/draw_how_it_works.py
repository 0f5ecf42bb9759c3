"""Draws the pictures of how-it-works.md and gpu.md beside this file: ``python docs/draw_how_it_works.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

INK, PALE, GREY = "#2b3340", "#eef1f5", "#c5ccd6"
EXPANDED, NEW, OUT, HALO = "#9cc0de", "#5b8db8", "#e4572e", "#f6c7b8"
WRITTEN = "#9aa5b5"


def _axes(width: float, height: float, x: float, y: float) -> tuple[plt.Figure, Axes]:
    """A figure of so many inches whose axes span [0, x] and [0, y], y downwards."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=(0, x), ylim=(y, 0), aspect="equal")
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, **style) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, **{"linewidth": 0.7, **style}))


def _grid(axes: Axes, x: float, y: float, rows: int, cols: int, colour: str, size: float = 1.0) -> None:
    for row in range(rows):
        for col in range(cols):
            _box(axes, x + col * size, y + row * size, size, size, colour, linewidth=0.5)


def _text(axes: Axes, x: float, y: float, text: str, size: float = 9, **style) -> None:
    axes.text(x, y, text, fontsize=size, **{"color": INK, "ha": "center", "va": "center", **style})


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.1})


def _slab(axes: Axes, x: float, bottom: float, channels: float, colour: str, shown: tuple[float, float] | None) -> None:
    """An image of so many channels: a slab as high as it has channels. ``shown``: the part that exists."""
    width, slant = 2.6, 0.9
    top = bottom - channels
    exists = shown is None
    for face in (
        [(x, top), (x + width, top), (x + width, bottom), (x, bottom)],
        [(x, top), (x + slant, top - slant), (x + width + slant, top - slant), (x + width, top)],
        [(x + width, top), (x + width + slant, top - slant), (x + width + slant, bottom - slant), (x + width, bottom)],
    ):
        style = {"facecolor": colour if exists else "none", "edgecolor": INK, "linewidth": 0.8}
        axes.add_patch(Polygon(face, **style, linestyle="-" if exists else (0, (3, 2))))
    if shown is not None:
        first, last = shown
        axes.add_patch(
            Polygon(
                [
                    *((x, bottom - first), (x + width, bottom - first), (x + width + slant, bottom - first - slant)),
                    *(
                        (x + width + slant, bottom - last - slant),
                        (x + slant, bottom - last - slant),
                        (x, bottom - last),
                    ),
                ],
                **{"facecolor": colour, "edgecolor": INK, "linewidth": 0.8},
            )
        )
        right, high = x + width, bottom - last
        axes.plot([x, right, right + slant], [high, high, high - slant], color=INK, linewidth=0.8)
        axes.plot([right, right], [bottom - first, high], color=INK, linewidth=0.8)


def draw_group(output: Path) -> None:
    """What exists: layer by layer, and one group at a time."""
    figure, axes = _axes(9, 5.4, 29, 17.4)
    names = ("x", "e, expanded", "d, filtered", "y")
    heights, places = (1.2, 6, 6, 1.2), (4.2, 10.6, 17.0, 23.4)
    rows = (
        (7.6, "layer by layer", (None, None, None, None)),
        (16.2, "fused", (None, (2, 3), (2, 3), None)),
    )
    for bottom, title, shown in rows:
        _text(axes, 0.1, bottom - 3, title, 11, ha="left", weight="bold")
        for x, height, part, name in zip(places, heights, shown, names, strict=True):
            colour = (OUT if part else WRITTEN) if name[0] in "ed" else EXPANDED
            _slab(axes, x, bottom, height, colour, part)
            _text(axes, x + 1.7, bottom + 0.6, name)
        for x in places[:3]:
            _arrow(axes, (x + 4.0, bottom - 0.9), (x + 6.1, bottom - 0.9))
    for x, name in zip(places[:3], ("expand\n1x1", "depthwise\n3x3", "project\n1x1"), strict=True):
        _text(axes, x + 4.9, 8.6 - 0.4, name, 8)
    _text(axes, 0.1, 5.6, "e and d are\nwritten to memory", 8, ha="left", va="top")
    _text(axes, 0.1, 14.2, "one group of\nchannels exists,\nin cache", 8, ha="left", va="top")
    figure.savefig(output / "how_group.png", dpi=110)
    plt.close(figure)


def draw_tile(output: Path) -> None:
    """A tile of outputs, and the window of expanded pixels under it."""
    figure, axes = _axes(9, 4.4, 31, 15)
    _text(axes, 6, 0.9, "y: output image, cut into tiles", 10)
    _grid(axes, 0.5, 2, 10, 12, PALE)
    _grid(axes, 4.5, 7, 5, 4, OUT)
    for x in (0.5, 4.5, 8.5):
        for y in (2, 7):
            _box(axes, x, y, 4, 5, "none", linewidth=2)
    _text(axes, 6.5, 13.0, "one tile: 5x4 output pixels", 9)
    _text(axes, 22.5, 0.9, "e: expanded image under that tile", 10)
    _grid(axes, 16.5, 2, 10, 12, PALE)
    _grid(axes, 19.5, 6, 6, 6, HALO)
    _grid(axes, 20.5, 7, 5, 4, EXPANDED)
    for col in range(6):  # zeros below the image
        _box(axes, 19.5 + col, 12, 1, 1, "white", linewidth=0.5, linestyle=":")
        _text(axes, 20 + col, 12.5, "0", 8)
    _box(axes, 19.5, 6, 6, 7, "none", linewidth=2)
    _text(axes, 22.5, 13.7, "its window: 7x6 pixels, with padding below the image", 9)
    _arrow(axes, (12.9, 7), (16.1, 7))
    _text(axes, 14.5, 6.1, "3x3, stride 1", 8)
    _text(axes, 28.8, 9.5, "halo", 9, ha="left")
    axes.annotate("", (25.0, 9.5), (28.7, 9.5), arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.9})
    figure.savefig(output / "how_tile.png", dpi=110)
    plt.close(figure)


def draw_ring(output: Path) -> None:
    """Three bands of two rows on a ring of four rows."""
    figure, axes = _axes(9, 5.2, 30, 17.3)
    stride, extent, band_rows, bands = 1, 3, 2, 3
    ring_rows = (band_rows - 1) * stride + extent
    done, held = 0, [-1] * ring_rows
    for band in range(bands):
        x = 1.2 + 10 * band
        to = (band * band_rows + band_rows - 1) * stride + extent
        new = range(done, to)
        for row in new:
            held[row % ring_rows] = row
        _text(axes, x + 3.7, 0.8, f"band {band}", 11, weight="bold")
        _text(axes, x + 3.7, 2.1, "ring of expanded rows", 9)
        for slot, row in enumerate(held):
            y = 2.9 + 1.5 * slot
            _box(axes, x + 1.2, y, 5, 1.3, NEW if row in new else EXPANDED)
            _text(axes, x + 3.7, y + 0.68, f"row {row}", 9, color="white" if row in new else INK)
            _text(axes, x + 0.55, y + 0.68, str(slot), 8, color="#7a8594")
            _text(axes, x + 6.4, y + 0.68, "new" if row in new else "kept", 8, ha="left")
        _arrow(axes, (x + 3.7, 9.0), (x + 3.7, 10.9))
        _text(axes, x + 4.1, 9.9, "depthwise, project", 8, ha="left")
        for i in range(band_rows):
            y = 11.1 + 1.5 * i
            out = band * band_rows + i
            _box(axes, x + 1.2, y, 5, 1.3, OUT)
            _text(axes, x + 3.7, y + 0.68, f"output row {out}", 9, color="white")
            first = out * stride
            _text(axes, x + 6.4, y + 0.68, f"of {first}-{first + extent - 1}", 8, ha="left")
        done = to
    rule = "Row r lies in slot r % 4. Two rows of each band stay for the next one: no row is computed twice."
    _text(axes, 0.2, 15.4, rule, 9.5, ha="left")
    size = "Ring rows: (band rows - 1) x stride + dilation x (kernel - 1) + 1 = (2 - 1) x 1 + 3 = 4."
    _text(axes, 0.2, 16.6, size, 9.5, ha="left")
    figure.savefig(output / "how_ring.png", dpi=110)
    plt.close(figure)


def draw_panel(output: Path) -> None:
    """Projection weights of 40 output channels in three panels, a group of expanded channels marked."""
    figure, axes = _axes(9, 4.6, 30, 15.3)
    expanded, first, last = 10, 4, 7
    _text(axes, 6.0, 0.8, "W_p [C_out = 40, E]", 10)
    parts = ((2, "0 .. 15", 4.0), (6, "16 .. 31", 4.0), (10, "32 .. 39", 2.0))
    for i, (top, channels, height) in enumerate(parts):
        for col in range(expanded):
            _box(
                axes,
                2.5 + col * 0.75,
                top,
                0.75,
                height,
                OUT if first <= col < last else (PALE, GREY)[i % 2],
                linewidth=0.5,
            )
        _text(axes, 2.2, top + height / 2, channels, 8, ha="right")
    _text(axes, 6.2, 12.7, "columns: expanded channels e", 8.5)
    _text(axes, 7.0, 1.55, "one group", 8.5, color=OUT)
    _arrow(axes, (10.8, 7), (13.2, 7))
    _text(axes, 12, 6.2, "pack", 9)
    _text(axes, 22.0, 0.8, "packed [panels = 3, E, 16], one panel after the other in memory", 10)
    for i, (_, channels, _) in enumerate(parts):
        x = 14.3 + 5.3 * i
        _text(axes, x + 2, 1.8, f"panel {i}", 9)
        for row in range(expanded):
            y = 2.3 + row * 0.9
            _box(axes, x, y, 4, 0.9, OUT if first <= row < last else (PALE, GREY)[i % 2], linewidth=0.5)
            if i == 2:
                _box(axes, x + 2, y, 2, 0.9, "white", linewidth=0.5)
                _text(axes, x + 3, y + 0.48, "0", 7)
        _text(axes, x + 2, 11.9, f"channels\n{channels}", 8)
    _text(axes, 13.9, 6.8, "rows: e", 8.5, rotation=90)
    why = "A row of a panel is 16 output channels of one e: the vector that one broadcast value of d multiplies."
    _text(axes, 0.2, 14.3, why, 9.5, ha="left")
    figure.savefig(output / "how_panel.png", dpi=110)
    plt.close(figure)


def draw_gpu(output: Path) -> None:
    """A thread block of the CUDA kernel: its strips of outputs by warp, and what lies where."""
    figure, axes = _axes(9, 4.9, 30, 16.4)
    _text(axes, 5.6, 0.8, "tile: 4x5 outputs in strips of 2 rows", 10)
    for strip in range(10):
        x, y = 1.1 + strip % 5 * 1.8, 1.9 + strip // 5 * 3.4
        colour = NEW if strip < 8 else GREY
        _box(axes, x, y, 1.8, 3.4, colour, linewidth=1.6)
        axes.plot([x, x + 1.8], [y + 1.7, y + 1.7], color=INK, linewidth=0.5)
        _text(axes, x + 0.9, y + 0.9, f"strip {strip}", 8, color="white" if strip < 8 else INK)
    _text(axes, 1.1, 9.7, "blue: warp 0, strips 0 to 7; grey: warp 1", 8.5, ha="left")
    _text(
        axes,
        1.1,
        10.7,
        "Four lanes hold a strip, each a quad (4)\nof the 16 channels of a panel.",
        8.5,
        ha="left",
        va="top",
    )
    rows = (
        ("global memory", ((0, "x, y", EXPANDED), (2, "packed\nweights", PALE))),
        (
            "shared memory",
            ((0, "x: tile\n+ halo", EXPANDED), (1, "e: one\ngroup", HALO), (2, "weights of\n2 groups", PALE)),
        ),
        ("registers", ((1, "d: one\npanel", HALO), (2, "sums of y,\nall groups", OUT))),
    )
    for i, (where, parts) in enumerate(rows):
        y = 1.9 + 4.3 * i
        _text(axes, 12.6, y + 1.3, where, 9.5, ha="left", weight="bold")
        for j, what, colour in parts:
            _box(axes, 17.2 + 4.4 * j, y, 3.0, 2.6, colour)
            _text(axes, 18.7 + 4.4 * j, y + 1.3, what, 8, color="white" if colour == OUT else INK)
    for x, y, what in ((18.7, 4.6, "once a tile"), (27.5, 4.6, "once a\ngroup"), (23.1, 8.9, "depthwise")):
        _arrow(axes, (x, y), (x, y + 1.5))
        _text(axes, x + 0.4, y + 0.7, what, 8, ha="left")
    for x, y, what in ((20.3, 7.5, "expand"), (24.7, 11.8, "project")):
        _arrow(axes, (x, y), (x + 1.2, y))
        _text(axes, x + 0.6, y + 0.65, what, 7)
    _text(axes, 12.6, 15.4, "e and d never reach global memory.", 9.5, ha="left")
    figure.savefig(output / "how_gpu.png", dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures (docs)")
    output = parser.parse_args(argv).output
    for draw in (draw_group, draw_tile, draw_ring, draw_panel, draw_gpu):
        draw(output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
