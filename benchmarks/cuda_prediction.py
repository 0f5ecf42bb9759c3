"""What the CUDA planner expects of each block on an H200, before anyone measured it.

``python benchmarks/cuda_prediction.py`` writes the tables of ``benchmarks/notes-cuda.md``; its words are kept by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from triton_prediction import predictions

from mnv2_fused import cuda_plan

NOTES = Path(__file__).parent / "notes-cuda.md"
BATCHES = (256, 1)


def table(batch: int) -> str:
    """Of the 17 blocks of MobileNetV2 1.0 at 224, in float16."""
    lines = [
        "| block | input | tile | strips | group | splits | thread blocks | resident | shared KiB | recompute | MB "
        "| floor us | expected us | over floor |",
        "|" + "---|" * 14,
    ]
    floors = expected = 0.0
    for found in predictions(batch):
        height, width = found.size
        p = cuda_plan(found.spec, (batch, found.spec.in_channels, height, width))
        floor = found.floor()
        floors, expected = floors + floor, expected + p.seconds
        tile = f"{p.images} of {p.tile_rows}x{p.tile_cols}"
        blocks = f"{p.thread_blocks} of {p.warps} warps"
        lines.append(
            f"| {found.spec} | {height}x{width} | {tile} | {p.strip_rows} | {p.group} | {p.splits} | {blocks} "
            f"| {p.resident} | {p.shared_bytes / 1024:.0f} | {p.recompute:.2f} | {p.bytes / 1e6:.1f} "
            f"| {floor * 1e6:.1f} | {p.seconds * 1e6:.1f} | {p.seconds / floor:.1f} |"
        )
    last = f"{floors * 1e6:.0f} | {expected * 1e6:.0f} | {expected / floors:.1f}"
    lines.append(f"| all | | | | | | | | | | | {last} |")
    return "\n".join(lines)


def notes(text: str) -> str:
    """``text`` with its tables made anew, each below a line that says of which batch it is."""
    for batch in BATCHES:
        pattern = rf"(<!-- batch {batch} -->\n).*?(\n<!-- end -->)"
        assert re.search(pattern, text, re.DOTALL), f"notes-cuda.md lacks the table of batch {batch}"
        text = re.sub(pattern, lambda m, batch=batch: m[1] + table(batch) + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    NOTES.write_text(notes(NOTES.read_text()))
