"""What the CUDA planner expects of each block on an H200, before anyone measured it.

``python benchmarks/cuda_prediction.py`` writes the tables of ``benchmarks/notes-cuda.md``; its words are kept by hand.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from triton_prediction import predictions

from mnv2_fused import CudaPlan, cuda_plan

NOTES = Path(__file__).parent / "notes-cuda.md"
BATCHES = (256, 1)


def table(batch: int) -> str:
    """Of the 17 blocks of MobileNetV2 1.0 at 224, in float16, and of the first with the stem in front of it."""
    lines = [
        "| block | input | tile | strips | group | splits | thread blocks | resident | shared KiB | recompute | MB "
        "| floor us | expected us | over floor |",
        "|" + "---|" * 14,
    ]
    floors = expected = 0.0
    found = predictions(batch)
    for block in found:
        height, width = block.size
        p = cuda_plan(block.spec, (batch, block.spec.in_channels, height, width))
        floors, expected = floors + block.floor(), expected + p.seconds
        lines.append(row(str(block.spec), block.size, p, block.floor()))
    last = f"{floors * 1e6:.0f} | {expected * 1e6:.0f} | {expected / floors:.1f}"
    lines.append(f"| all | | | | | | | | | | | {last} |")
    first = found[0]
    p = cuda_plan(first.spec, (batch, 3, 224, 224), stem="relu6")
    products = first.products + 2 * batch * 112 * 112 * 27 * first.spec.hidden_channels
    floor = dataclasses.replace(first, plan=p, products=products).floor()
    lines.append(row(f"stem and {first.spec}", (224, 224), p, floor))
    return "\n".join(lines)


def row(name: str, size: tuple[int, int], p: CudaPlan, floor: float) -> str:
    """A line of the table; ``floor`` in seconds."""
    tile = f"{p.images} of {p.tile_rows}x{p.tile_cols}"
    return (
        f"| {name} | {size[0]}x{size[1]} | {tile} | {p.strip_rows} | {p.group} | {p.splits} "
        f"| {p.thread_blocks} of {p.warps} warps | {p.resident} | {p.shared_bytes / 1024:.0f} | {p.recompute:.2f} "
        f"| {p.bytes / 1e6:.1f} | {floor * 1e6:.1f} | {p.seconds * 1e6:.1f} | {p.seconds / floor:.1f} |"
    )


def notes(text: str) -> str:
    """``text`` with its tables made anew, each below a line that says of which batch it is."""
    for batch in BATCHES:
        pattern = rf"(<!-- batch {batch} -->\n).*?(\n<!-- end -->)"
        assert re.search(pattern, text, re.DOTALL), f"notes-cuda.md lacks the table of batch {batch}"
        text = re.sub(pattern, lambda m, batch=batch: m[1] + table(batch) + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    NOTES.write_text(notes(NOTES.read_text()))
