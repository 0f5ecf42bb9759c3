"""Accuracy on scikit-learn's digits before and after ``quantize``, over three seeds: the table of docs/quantize.md.

``python benchmarks/int8_digits.py`` trains MobileNetV2 0.35, MobileNetV3-small and EfficientNet-B0 from scratch in some
ten minutes; exits with 1 where a network learnt too little to lose anything, or loses more than 0.3 points, on average
over its seeds. Written into the page where none does.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from statistics import mean

import torch
import torch.nn.functional as F
from int8 import PAGE, with_tables
from torch import Tensor, nn
from torchvision.models import efficientnet_b0, mobilenet_v2, mobilenet_v3_small

from mnv2_fused import quantize
from mnv2_fused.tools.digits import DIGITS_STAGES, digits, fit

BEGIN, END = "<!-- Table of int8_digits.py -->", "<!-- End of the digits -->"
MOST_LOST = 0.3  # percentage points
LEAST_RIGHT = 95.0  # percent of float: of a network that learnt nothing, nothing can be lost
SEEDS = (0, 1, 2)
CALIBRATED_ON = 256  # training images

# Of each network its builder, and the images' height and width: five strides of 2 need more pixels.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MobileNetV2 0.35": (
        lambda: mobilenet_v2(num_classes=10, width_mult=0.35, inverted_residual_setting=DIGITS_STAGES),
        32,
    ),
    # Its own running statistics follow by a hundredth a step, too slowly for so few steps.
    "MobileNetV3-small": (
        lambda: mobilenet_v3_small(num_classes=10, norm_layer=functools.partial(nn.BatchNorm2d, momentum=0.1)),
        64,
    ),
    "EfficientNet-B0": (lambda: efficientnet_b0(num_classes=10, stochastic_depth_prob=0.0), 64),
}


def accuracies(build: Callable[[], nn.Module], size: int, seed: int, epochs: int) -> tuple[float, float]:
    """Of float and of int8, on the quarter that neither training nor calibration saw; in percent."""
    torch.manual_seed(seed)
    x_train, x_test, y_train, y_test = digits()
    x_train, x_test = (F.interpolate(x, size=size, mode="bilinear") for x in (x_train, x_test))
    model = build()
    fit(model, x_train, y_train, epochs)
    model.eval()
    integers = quantize(model, x_train[:CALIBRATED_ON].split(64))

    def right(network: nn.Module) -> float:
        with torch.inference_mode():
            logits: Tensor = network(x_test)
        return 100 * (logits.argmax(1) == y_test).float().mean().item()

    found = right(model), right(integers)
    print(f"seed {seed}: float {found[0]:.2f} %, int8 {found[1]:.2f} %", flush=True)
    return found


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: a row for each network, accuracies by seed."""
    lines = ["| network | float, by seed | int8, by seed | lost, on average |", "|---|---|---|---|"]
    for name, pairs in found.items():
        by_seed = (", ".join(f"{value:.2f} %" for value in side) for side in zip(*pairs, strict=True))
        lines.append(f"| {name} | {' | '.join(by_seed)} | {lost(pairs):.2f} points |")
    return "\n".join(lines)


def lost(pairs: Sequence[tuple[float, float]]) -> float:
    return mean(before - after for before, after in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", choices=NETWORKS, help="print one network's row, and keep nothing")
    options = parser.parse_args(arguments)
    found = {
        name: [accuracies(build, size, seed, options.epochs) for seed in SEEDS]
        for name, (build, size) in NETWORKS.items()
        if options.only in (None, name)
    }
    print(table(found))
    if untrained := [name for name, pairs in found.items() if min(pairs)[0] < LEAST_RIGHT]:
        print(
            f"FAILED: {', '.join(untrained)} did not learn the digits: below {LEAST_RIGHT} % in float", file=sys.stderr
        )
        return 1
    worse = [name for name, pairs in found.items() if lost(pairs) > MOST_LOST]
    if worse:
        print(f"FAILED: {', '.join(worse)} lost more than {MOST_LOST} points", file=sys.stderr)
        return 1
    if options.only is None:
        PAGE.write_text(with_tables(PAGE.read_text(), table(found), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
