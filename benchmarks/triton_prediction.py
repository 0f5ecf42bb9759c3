"""What the Triton planner expects of each block on an H200, before anyone measured it.

``python benchmarks/triton_prediction.py`` writes ``benchmarks/notes-triton.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mnv2_fused import BlockSpec, TritonPlan, triton_plan
from mnv2_fused.gpus import H200
from mnv2_fused.testing import mobilenet_v2_blocks, multiply_adds

NOTES = Path(__file__).parent / "notes-triton.md"
BATCH = 256
_MATRIX_FLOPS = 780e12  # measured of wgmma, which the floor is allowed and this kernel's mma.sync is not

HEAD = f"""# The Triton kernel on an H200: a prediction

Made by `python benchmarks/triton_prediction.py` from the planner's numbers alone; **nothing here was measured**. Blocks
of MobileNetV2 1.0 at 224, float16, batch {BATCH}, on an {H200.name}: {H200.processors} processors,
{H200.shared_per_block // 1024} KiB of shared memory a program, {H200.copy_bytes / 1e12:.1f} TB/s copied,
{_MATRIX_FLOPS / 1e12:.0f} TFLOP/s in products ({H200.matrix_flops / 1e12:.0f} by `mma.sync`),
{H200.fp32_flops / 1e12:.0f} in float32.

- MB: to and from memory, x, y and weights once. Products: GFLOP of the 1x1 products, with recompute and padding.
  Beside them: GFLOP in float32, of bias, ReLU6 and depthwise, with recompute.
- Floor: the largest of bytes, useful products and useful depthwise, each at the rate above. Expected: the planner's
  estimate; it is instructions issued that bound it, a minimum or maximum counting as two.
"""

TAIL = """
What would prove it wrong, and what to try then:

- Processors hold 8 warps at a time, two for each scheduler (255 registers a thread). If latency shows, `num_warps=8`
  with a group of 64 halves the registers, and patches of 1x2 take two thirds of them.
- Weights come from L2 once for each program of 64 outputs: 600 KB for the last blocks. If L2 bounds those, 32 patches
  a program halve it.
- The expansion at the rim is computed four times an output. Whoever has shared memory to shift in computes it 1.3
  times: at best a third of the instructions fall away.
- A launch of some 40 arguments from Python takes tens of microseconds, which batch 1 sees unless CUDA graphs replay it.

Squeeze-and-excite, which MobileNetV2 has none of, is computed in two passes, the second of which expands and convolves
again. A buffer of the depthwise results would spare that: it is E channels written and read at the size of the output,
where recomputing is instructions, and by the estimate above instructions are what is short. But memory is what the
fused block is for: with the buffer a tensor of E channels would exist after all. Only sums of one row of E channels a
program, and one row of gates an image, are written. If a GPU shows the second pass to cost more than the buffer's
bytes would, a buffer where it is small is what to try.

Beside each of these the planner's other configurations are at hand: `triton_plan(spec, shape, num_warps=8)` forces one
value, `MNV2_FUSED_AUTOTUNE=1` measures all of them once.
"""


@dataclass(frozen=True)
class Prediction:
    """What is expected of one block at one batch size, in float16."""

    spec: BlockSpec
    size: tuple[int, int]
    plan: TritonPlan
    products: int  # useful operations of the 1x1 products
    depthwise: int  # useful operations of the depthwise convolution

    def floor(
        self,
        copy_bytes: float = H200.copy_bytes,
        matrix_flops: float = _MATRIX_FLOPS,
        fp32_flops: float = H200.fp32_flops,
    ) -> float:
        """Seconds below which nothing can go, at these rates a second."""
        return max(self.plan.bytes / copy_bytes, self.products / matrix_flops, self.depthwise / fp32_flops)


def predictions(batch: int = BATCH) -> list[Prediction]:
    """One for each block of MobileNetV2 1.0 at 224."""
    found = []
    for spec, (height, width) in mobilenet_v2_blocks(224):
        shape = (batch, spec.in_channels, height, width)
        pixels = batch * ((height - 1) // spec.stride + 1) * ((width - 1) // spec.stride + 1)
        depthwise = 2 * 9 * pixels * spec.hidden_channels
        products = 2 * multiply_adds(spec, shape) - depthwise
        plan = triton_plan(spec, shape, dtype=torch.float16)
        found.append(Prediction(spec, (height, width), plan, products, depthwise))
    return found


def notes() -> str:
    lines = [
        "| block | input | plan | MB | products | beside | floor us | expected us | over floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    floors = expected = 0.0
    for found in predictions():
        p, floor, (height, width) = found.plan, found.floor(), found.size
        floors, expected = floors + floor, expected + p.seconds
        plan = f"{p.tile_rows}x{p.tile_cols} x{p.patches}, group {p.group}, {p.num_warps} warps, {p.programs} programs"
        lines.append(
            f"| {found.spec} | {height}x{width} | {plan} | {p.bytes / 1e6:.0f} | {p.matrix_flops / 1e9:.0f} "
            f"| {p.flops / 1e9:.1f} | {floor * 1e6:.0f} | {p.seconds * 1e6:.0f} | {p.seconds / floor:.1f} |"
        )
    lines.append(f"| all | | | | | | {floors * 1e6:.0f} | {expected * 1e6:.0f} | {expected / floors:.1f} |")
    return HEAD + "\n" + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    NOTES.write_text(notes())
    print(NOTES.read_text())
