"""Is a linear bottleneck better than one with ReLU6? The paper's section 3.2 and figure 6a, on digits, in a minute.

``python examples/linear_bottleneck.py`` trains a small network of inverted residuals on scikit-learn's digits twice
for each seed: as it is, and with a ReLU6 behind each block's projection. A seed is a split into training and test
halves, initial weights and an order of batches; both networks get the same. Prints and draws test accuracies and
silent depthwise filters, and says whether the difference is more than the spread over seeds. The linear network is
tested fused, too, which must not change a prediction; ``fuse`` leaves the other one alone.

Needs ``pip install 'mnv2_fused[demo]'``. Paper: MobileNetV2 (arXiv 1801.04381), section 3.2, figure 6a.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual

import mnv2_fused
from mnv2_fused.testing import agreement

# (expand ratio, channels, repeats, stride) for 16x16 images; with a width of 0.35, 8 or 16 channels a bottleneck.
STAGES = [[1, 16, 1, 1], [6, 24, 3, 1], [6, 32, 3, 2]]
WIDTH = 0.35
BATCH = 64
LINEAR, RELU6 = "linear", "ReLU6"
COLOURS = {LINEAR: "#e4572e", RELU6: "#7d8ba1"}


class Relu6Bottleneck(InvertedResidual):
    """An inverted residual whose bottleneck is not linear: ReLU6 behind the projection, before the residual."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv.append(nn.ReLU6(inplace=True))


BLOCKS: dict[str, type[InvertedResidual]] = {LINEAR: InvertedResidual, RELU6: Relu6Bottleneck}


class Outcome(NamedTuple):
    """One trained network on its test half."""

    accuracy: float
    silent: Tensor  # [depthwise filters], of each: on which part of the images its output is 0 everywhere

    @property
    def dead(self) -> int:
        """Depthwise filters whose output is 0 everywhere on every image."""
        return int((self.silent == 1).sum())


class Difference(NamedTuple):
    """Accuracy of linear less that of ReLU6, seed by seed."""

    mean: float
    half_width: float  # of the 95 % interval of that mean (Student's t); infinite for one seed

    def __str__(self) -> str:
        found = f"linear less ReLU6: {self.mean * 100:+.2f} points"
        if math.isinf(self.half_width):
            return f"{found}; one seed cannot say whether that is chance"
        found = f"{found}, 95 % interval ±{self.half_width * 100:.2f}"
        if abs(self.mean) <= self.half_width:
            return f"{found}: the spread over seeds swallows the difference, so nothing follows"
        better = "linear is better, as in the paper" if self.mean > 0 else "ReLU6 is better, NOT as in the paper"
        return f"{found}: {better}"


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_train, x_test, y_train, y_test): digits as [N, 3, 16, 16], halves that the seed chooses."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    x = F.interpolate(torch.from_numpy(found.images).float()[:, None] / 8 - 1, size=16, mode="bilinear")
    x, y = x.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target)
    train, test = train_test_split(range(len(x)), test_size=0.5, random_state=seed, stratify=found.target)
    return x[train], x[test], y[train], y[test]


def train(block: type[InvertedResidual], x: Tensor, y: Tensor, *, seed: int, epochs: int) -> nn.Module:
    """A network of such blocks, fitted to ``x`` [N, 3, 16, 16] and classes ``y`` [N], in eval."""
    torch.manual_seed(seed)
    model = mobilenet_v2(num_classes=10, width_mult=WIDTH, inverted_residual_setting=STAGES, block=block)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * (len(x) // BATCH))
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Outcome, Tensor]:  # [N] predictions
    """Accuracy, silent filters and predictions of a network in eval."""
    silent: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        silent.append((output.amax((2, 3)) == 0).double().mean(0))

    # A depthwise layer is (convolution, norm, ReLU6); what counts is behind its ReLU6.
    layers = [m for m in model.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)]
    handles = [m.register_forward_hook(note) for m in layers if m[0].groups > 1]
    with torch.inference_mode():
        predictions = model(x).argmax(1)
    for handle in handles:
        handle.remove()
    return Outcome((predictions == y).double().mean().item(), torch.cat(silent)), predictions


def check_fused(model: nn.Module, x: Tensor, predictions: Tensor) -> None:
    """Raises RuntimeError unless the fused network predicts the same, with logits within the tolerance rule."""
    fused = mnv2_fused.fuse(model, strict=True)
    with torch.inference_mode():
        logits = fused(x)
        verdict = agreement(logits, model(x), copy.deepcopy(model).double()(x.double()))
    differing = int((logits.argmax(1) != predictions).sum())
    if differing or not verdict.ok:
        raise RuntimeError(f"fused, {differing} of {len(x)} predictions change; logits: {verdict}")


def compare(seed: int, epochs: int) -> dict[str, Outcome]:
    """Both networks of one seed. Raises RuntimeError where fusing changes what the linear one says."""
    x_train, x_test, y_train, y_test = digits(seed)
    outcomes = {}
    for name, block in BLOCKS.items():
        model = train(block, x_train, y_train, seed=seed, epochs=epochs)
        outcomes[name], predictions = evaluate(model, x_test, y_test)
        if name == LINEAR:
            check_fused(model, x_test, predictions)
    return outcomes


def difference(linear: Sequence[float], relu6: Sequence[float]) -> Difference:
    """What the accuracies of the same seeds say."""
    from scipy.stats import t

    by_seed = [a - b for a, b in zip(linear, relu6, strict=True)]
    mean, n = statistics.fmean(by_seed), len(by_seed)
    if n == 1:
        return Difference(mean, math.inf)
    return Difference(mean, float(t.ppf(0.975, n - 1)) * statistics.stdev(by_seed) / math.sqrt(n))


def draw(outcomes: list[dict[str, Outcome]], title: str, output: Path) -> None:
    """Accuracies on the left, joined seed by seed; how silent the depthwise filters are on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for outcome in outcomes:
        left.plot([0, 1], [outcome[n].accuracy * 100 for n in BLOCKS], "-", color="#c9ced6", zorder=1)
    for at, name in enumerate(BLOCKS):
        accuracies = [outcome[name].accuracy * 100 for outcome in outcomes]
        left.scatter([at] * len(accuracies), accuracies, color=COLOURS[name], s=28, zorder=2)
        mean = statistics.fmean(accuracies)
        left.plot([at - 0.15, at + 0.15], [mean, mean], color=COLOURS[name], linewidth=2.5)
        outwards, side = (-0.18, "right") if at == 0 else (0.18, "left")  # away from the lines
        left.annotate(f"mean {mean:.2f} %", (at + outwards, mean), va="center", ha=side, color=COLOURS[name])
        # Filters of all seeds in order of silence: a dead one is at 100 %.
        silent = torch.cat([outcome[name].silent for outcome in outcomes]).sort().values * 100
        dead = sum(outcome[name].dead for outcome in outcomes)
        part = torch.arange(1, len(silent) + 1) / len(silent) * 100
        label = f"{name}: {dead} of {len(silent)} dead"
        right.plot(part.numpy(), silent.numpy(), color=COLOURS[name], linewidth=2, label=label)
    left.set(xlim=(-0.75, 1.75), ylabel="test accuracy, %", title="each line is a seed")
    left.set_xticks([0, 1], [f"{name} bottlenecks" for name in BLOCKS])
    right.set(xlabel="depthwise filters in order, %", ylabel="test images on which it is 0 everywhere, %")
    right.set(ylim=(-3, 103), title="dead depthwise filters would be at 100 %")
    right.legend(frameon=False, loc="upper left")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(output, dpi=110, format="png")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many pairs of networks to train (5)")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="passes over the training half (8)")
    parser.add_argument("--output", type=Path, default=Path("linear_bottleneck.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        parser.error(f"--seeds and --epochs must be 1 or more, got {args.seeds} and {args.epochs}")

    outcomes = []
    print("seed  linear  ReLU6   dead filters, linear and ReLU6")
    for seed in range(args.seeds):
        outcomes.append(compare(seed, args.epochs))
        linear, relu6 = outcomes[-1][LINEAR], outcomes[-1][RELU6]
        filters = len(linear.silent)
        accuracies = f"{linear.accuracy:>6.2%}  {relu6.accuracy:>6.2%}"
        print(f"{seed:>4}  {accuracies}  {linear.dead} and {relu6.dead} of {filters}", flush=True)
    found = {name: [outcome[name].accuracy for outcome in outcomes] for name in BLOCKS}
    for name, accuracies in found.items():
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
        silent = torch.cat([outcome[name].silent for outcome in outcomes])
        dead = (silent == 1).double().mean()
        print(
            f"{name:>6}: accuracy {statistics.fmean(accuracies):.2%}, standard deviation {spread:.2%}; "
            f"depthwise filters: {dead:.2%} dead, one is silent on {silent.mean():.1%} of the images on average"
        )
    verdict = difference(found[LINEAR], found[RELU6])
    print(f"{verdict}\nthe linear networks, fused, made the same predictions")
    draw(outcomes, str(verdict), args.output)
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
