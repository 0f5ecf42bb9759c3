"""Why the bottleneck is linear: ReLU in few dimensions loses what was there (the paper's Figure 1).

``python examples/relu_information_loss.py`` puts a 2-D spiral into n dimensions by a random matrix, applies ReLU, comes
back by the matrix's pseudo-inverse, and draws what is left. Prints, as medians over 100 matrices, how far the spiral is
from where it was, and how many of its points passed through fewer than two dimensions: those cannot come back.

Needs ``pip install 'mnv2_fused[demo]'``. Paper: MobileNetV2 (arXiv 1801.04381), figure 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DIMENSIONS = (2, 3, 5, 15, 30)


class Loss(NamedTuple):
    """Of one number of dimensions, medians over matrices."""

    dimensions: int
    error: float  # root mean square of what is lost, over that of the spiral, after the scale that fits best
    collapsed: float  # part of the points at which fewer than two dimensions are left, so that 2-D cannot come back


def spiral(points: int = 1000, turns: float = 2.5) -> Tensor:  # [points, 2]
    """Evenly along the angle, from the centre to radius 1."""
    angle = torch.linspace(0.3, 2 * math.pi * turns, points, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1) * (angle / angle.max())[:, None]


def through_relu(
    x: Tensor,  # [points, 2]
    matrix: Tensor,  # [n, 2]
) -> tuple[Tensor, Tensor]:  # [points, 2], [points, n]
    """The spiral after ReLU in n dimensions and back, and whether each dimension let a point through."""
    embedded = x @ matrix.T
    return embedded.relu() @ torch.linalg.pinv(matrix).T, embedded > 0


def loss(x: Tensor, dimensions: int, matrices: int = 100, seed: int = 0) -> Loss:
    """Over random Gaussian matrices, the same for every call with this seed."""
    generator = torch.Generator().manual_seed(seed)
    errors, collapsed = [], []
    for _ in range(matrices):
        matrix = torch.randn(dimensions, 2, generator=generator, dtype=torch.float64)
        back, passed = through_relu(x, matrix)
        scale = (back * x).sum() / (back * back).sum().clamp_min(1e-300)
        errors.append(((scale * back - x).square().sum() / x.square().sum()).sqrt())
        collapsed.append((passed.sum(1) < 2).double().mean())
    return Loss(dimensions, float(torch.stack(errors).median()), float(torch.stack(collapsed).median()))


def draw(x: Tensor, output: Path, seed: int = 0) -> None:
    """The spiral, and what comes back from each number of dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    generator = torch.Generator().manual_seed(seed)
    figure, axes = plt.subplots(1, 1 + len(DIMENSIONS), figsize=(13, 2.6), layout="constrained")
    shown = {"the spiral": x}
    for n in DIMENSIONS:
        matrix = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        shown[f"ReLU in {n} dimensions"] = through_relu(x, matrix)[0]
    for ax, (title, points) in zip(axes, shown.items(), strict=True):
        ax.scatter(*points.T.numpy(), c=torch.arange(len(points)).numpy(), s=3, cmap="viridis")
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal", "datalim")
        ax.set(xticks=[], yticks=[])
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("relu_information_loss.png"), help="where the picture goes")
    args = parser.parse_args()
    x = spiral()
    print("dimensions  lost (rms, relative)  points that cannot come back")
    for n in DIMENSIONS:
        found = loss(x, n)
        print(f"{found.dimensions:>10}  {found.error:>20.3f}  {found.collapsed:>28.0%}")
    draw(x, args.output)
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
