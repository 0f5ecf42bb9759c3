"""Fine-tuning with frozen batch norms, eager and fused: the same losses and gradients in a part of the memory.

``python examples/finetune_frozen_bn.py`` trains torchvision's MobileNetV2 on the digits 0 to 4 of scikit-learn for a
moment, freezes its batch norms, gives it a new classifier and fine-tunes all weights on the digits 5 to 9, eager and
fused from the same start. Prints both losses, the gradients' errors against float64 and the peak memory of a training
step, and draws losses and memory.

Both usual ways to freeze run fused: ``model.eval()`` alone (weights still get gradients, ``requires_grad`` decides
that; dropout is off until ``model.classifier.train()``), and ``model.train()`` and then ``.eval()`` on every norm.
Freeze again after each ``model.train()``.

Without frozen norms ``fuse(model, recompute=True)`` saves memory, too: the last two bars of the picture.

Needs ``pip install 'mnv2_fused[demo]'``. Backward recomputes each block's expanded tensors instead of keeping them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import mnv2_fused
from mnv2_fused.testing import Agreement, agreement, fit_batch_norm, peak_activation_bytes

BLOCKS = slice(1, 18)  # of mobilenet_v2().features
EAGER, FUSED = "eager channels_last", "fused"
COLOURS = {EAGER: "#7d8ba1", FUSED: "#e4572e"}
CLASSES = 5


class Digits(NamedTuple):
    """Enlarged digits of a task with five classes."""

    x: Tensor  # [N, 1, 8, 8], -1 to 1
    y: Tensor  # [N], 0 to 4

    def batch(self, index: Tensor, resolution: int) -> tuple[Tensor, Tensor]:  # [n, 3, H, W] channels_last, [n]
        enlarged = F.interpolate(self.x[index], size=resolution, mode="bilinear").expand(-1, 3, -1, -1)
        return enlarged.contiguous(memory_format=torch.channels_last), self.y[index]


class GradientErrors(NamedTuple):
    """Of one batch, against float64, each parameter's gradient divided by its largest value."""

    by_block: dict[str, Agreement]  # of each block's input and parameters, by name; the same x and dy for all
    relative: dict[str, list[float]]  # through the whole network, of each parameter: |error| / |gradient|, by model
    other_gates: dict[str, int]  # ReLU6s that pass the gradient where float64's does not or the reverse, by model
    gates: int

    @property
    def worst(self) -> str:
        """The block's parameter that uses up most of its limit."""
        return max(self.by_block, key=lambda name: self.by_block[name].error / self.by_block[name].limit)

    @property
    def ok(self) -> bool:
        return all(verdict.ok for verdict in self.by_block.values())


def tasks() -> tuple[Digits, Digits]:
    """The digits 0 to 4, and 5 to 9."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target)
    return Digits(x[y < CLASSES], y[y < CLASSES]), Digits(x[y >= CLASSES], y[y >= CLASSES] - CLASSES)


def train(model: nn.Module, digits: Digits, resolution: int, *, steps: int, rate: float, batch: int) -> list[float]:
    """Steps of AdamW in the mode that the model is in; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x, y = digits.batch(torch.randint(len(digits.y), (batch,), generator=generator), resolution)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pretrained(digits: Digits, resolution: int, *, steps: int = 30, batch: int = 32) -> nn.Module:
    """A network that knows the first task, in eval and channels_last, with a new classifier for the next one."""
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=CLASSES).to(memory_format=torch.channels_last)
    train(model, digits, resolution, steps=steps, rate=2e-3, batch=batch)
    # So few steps leave the running averages behind.
    fit_batch_norm(model, digits.batch(torch.randperm(len(digits.y))[:128], resolution)[0])
    model.classifier[1].reset_parameters()
    return model.eval()


def freeze_norms_only(model: nn.Module) -> nn.Module:
    """train(), then eval() on the norms: dropout drops."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


WAYS_TO_FREEZE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "model.eval()": nn.Module.eval,
    "model.train(), norms eval()": freeze_norms_only,
}


def open_gates(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Where each ReLU6 passes the gradient on, in the order of the layers; a block's follow from its input."""
    for layer in model.features:
        inner = x
        for stage in getattr(layer, "conv", [layer]):
            inner = stage(inner)
            if isinstance(stage, nn.Sequential):
                yield (inner > 0) & (inner < 6)
        x = layer(x)


def gradient_errors(eager: nn.Module, fused: nn.Module, x: Tensor, y: Tensor) -> GradientErrors:
    """Both models in eval on ``x`` [N, 3, H, W] with classes ``y`` [N]."""
    models = {EAGER: eager, FUSED: fused}
    reference = copy.deepcopy(eager).double()

    def scaled_agreement(fused: Tensor, eager: Tensor, reference: Tensor) -> Agreement:
        scale = reference.abs().max()  # small gradients are held as strictly as large ones
        return agreement(fused / scale, eager / scale, reference / scale)

    def backward(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    truth = backward(reference, x.double())
    relative = {
        name: [((g - t).norm() / t.norm()).item() for g, t in zip(backward(model, x), truth, strict=True)]
        for name, model in models.items()
    }

    by_block = {}
    h = eager.features[0](x).detach()
    for i, block in list(enumerate(eager.features))[BLOCKS]:
        generator = torch.Generator().manual_seed(i)
        grad = torch.randn(block(h).shape, generator=generator).contiguous(memory_format=torch.channels_last)

        def block_backward(model: nn.Module, dtype: torch.dtype, i=i, h=h, grad=grad) -> tuple[Tensor, ...]:
            leaf = h.to(dtype).requires_grad_()
            block = model.features[i]
            return torch.autograd.grad(block(leaf), [leaf, *block.parameters()], grad.to(dtype))

        names = ["x", *(name for name, _ in block.named_parameters())]
        gradients = [block_backward(m, d) for m, d in ((fused, h.dtype), (eager, h.dtype), (reference, torch.float64))]
        for name, *of_models in zip(names, *gradients, strict=True):
            by_block[f"features.{i}.{name}"] = scaled_agreement(*of_models)
        h = block(h).detach()

    with torch.no_grad():
        true_gates = list(open_gates(reference, x.double()))
        other_gates = {
            name: sum(int((a != b).sum()) for a, b in zip(open_gates(model, x), true_gates, strict=True))
            for name, model in models.items()
        }
    return GradientErrors(by_block, relative, other_gates, sum(gates.numel() for gates in true_gates))


def training_peak(modules: nn.Module, x: Tensor) -> int:
    """Bytes that forward and backward through ``modules`` hold at most: activations, and gradients of all weights.

    Weights, also folded ones, are there before and do not count.
    """
    parameters = list(modules.parameters())
    wanted = [x, *parameters] if x.requires_grad else parameters

    def call() -> tuple[Tensor, ...]:
        y = modules(x)
        return torch.autograd.grad(y, wanted, torch.ones_like(y))

    call()  # after a change of mode, weights are folded in the first calls
    return peak_activation_bytes(call)


class Memory(NamedTuple):
    """Peak bytes of one training step."""

    blocks: dict[str, int]  # of the 17 blocks alone, by model
    step: dict[str, int]  # of the whole network, by model, model.eval()
    fused_by_way: dict[str, int]  # of the whole network, fused, by the way the norms were frozen
    recomputed: dict[str, int]  # of the whole network in train(), by model, fused with recompute=True
    largest_block: tuple[str, int]  # the block that needs most when it runs alone, fused; its output counts


def measure_memory(eager: nn.Module, fused: nn.Module, batch: int, resolution: int) -> Memory:
    """At one batch size and resolution, on noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, resolution, resolution, generator=generator).to(memory_format=torch.channels_last)
    models = {EAGER: eager, FUSED: fused}
    h = eager.features[0](x).detach()
    blocks = {name: training_peak(model.features[BLOCKS], h.clone().requires_grad_()) for name, model in models.items()}
    step = {name: training_peak(model, x) for name, model in models.items()}
    alone = {}
    for i, block in list(enumerate(fused.features))[BLOCKS]:
        alone[f"features.{i}"] = training_peak(block, h.clone().requires_grad_())
        h = block(h).detach()
    by_way = {way: training_peak(freeze(fused), x) for way, freeze in WAYS_TO_FREEZE.items()}
    fused.eval()
    in_train = {EAGER: copy.deepcopy(eager), FUSED: mnv2_fused.fuse(eager, recompute=True)}
    recomputed = {name: training_peak(model.train(), x) for name, model in in_train.items()}
    largest = max(alone, key=alone.__getitem__)
    return Memory(blocks, step, by_way, recomputed, (largest, alone[largest]))


def draw(losses: dict[str, list[float]], memory: Memory, what: str, output: Path) -> None:
    """Losses on the left, peak memory of a training step on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    left.plot(losses[EAGER], color=COLOURS[EAGER], linewidth=4, label=EAGER)
    left.plot(losses[FUSED], color=COLOURS[FUSED], linewidth=1.5, label=FUSED)
    left.set(xlabel="step", ylabel="loss", title="fine-tuning with frozen batch norms", ylim=(0, None))
    left.legend(frameon=False)

    groups = {
        "17 blocks": memory.blocks,
        "whole network\nmodel.eval()": memory.step,
        "whole network\nmodel.train(),\nnorms eval()": {
            EAGER: memory.step[EAGER],
            FUSED: memory.fused_by_way["model.train(), norms eval()"],
        },
        "not frozen:\nmodel.train(),\nrecompute=True": memory.recomputed,
    }
    for k, name in enumerate((EAGER, FUSED)):
        values = [peaks[name] / 1e6 for peaks in groups.values()]
        bars = right.bar([at + (k - 0.5) * 0.38 for at in range(len(values))], values, 0.36, color=COLOURS[name])
        shares = [peaks[name] / peaks[EAGER] for peaks in groups.values()]
        texts = [f"{v:.0f}" if name == EAGER else f"{v:.0f}\n{s:.0%}" for v, s in zip(values, shares, strict=True)]
        right.bar_label(bars, texts, padding=2, color=COLOURS[name])
    right.set_xticks(range(len(groups)), list(groups), fontsize=8)
    right.set(ylabel="MB", title=f"peak memory of a training step, {what}")
    right.margins(y=0.18)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110, format="png")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of fine-tuning (40)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a step (32)")
    parser.add_argument("--resolution", type=int, default=96, metavar="PIXELS", help="of the enlarged digits (96)")
    parser.add_argument("--memory-batch", type=int, default=32, metavar="N", help="images where memory is metered (32)")
    parser.add_argument("--memory-resolution", type=int, default=224, metavar="PIXELS", help="their size (224)")
    parser.add_argument("--output", type=Path, default=Path("finetune_frozen_bn.png"), help="where the picture goes")
    args = parser.parse_args()
    for name in ("steps", "batch", "resolution", "memory_batch", "memory_resolution"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")

    first, second = tasks()
    print("training on the digits 0 to 4 ...", flush=True)
    eager = pretrained(first, args.resolution, batch=args.batch)
    models = {EAGER: eager, FUSED: mnv2_fused.fuse(eager, strict=True)}

    errors = gradient_errors(*models.values(), *second.batch(torch.arange(8), args.resolution))
    worst = errors.by_block[errors.worst]
    print(
        f"gradients of each block, all from the same x and dy, {len(errors.by_block)} tensors; over their largest value"
    )
    print(f"  worst, {errors.worst}: {worst}")
    print("gradients through the whole network, relative error (L2), median and worst of the parameters")
    for name, relative in errors.relative.items():
        found = torch.tensor(relative)
        gates = f"{errors.other_gates[name]} of {errors.gates} ReLU6 gates not as in float64"
        print(f"  {name:<20} {found.median():.1e} {found.max():.1e}; {gates}")
    print("  (a gate that rounding opens or closes makes the gradient jump, in eager as in fused: no rule holds there)")
    if not errors.ok:
        print("WRONG GRADIENT of a block: nothing to train with")
        return 1

    memory = measure_memory(*models.values(), args.memory_batch, args.memory_resolution)
    losses, seconds = {}, {}
    for name, model in models.items():
        start = time.perf_counter()
        losses[name] = train(model, second, args.resolution, steps=args.steps, rate=1e-4, batch=args.batch)
        seconds[name] = (time.perf_counter() - start) / args.steps
    print(f"\nloss on the digits 5 to 9 ({seconds[EAGER]:.2f} s a step eager, {seconds[FUSED]:.2f} s fused)")
    print(f"step  {EAGER}   {FUSED}")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 8)), args.steps - 1}):
        print(f"{step:>4}  {losses[EAGER][step]:>19.4f}  {losses[FUSED][step]:>6.4f}")

    what = f"batch {args.memory_batch} at {args.memory_resolution}"
    print(f"\npeak memory of a training step, {what}")
    rows = {
        "the 17 blocks": memory.blocks,
        "the whole network": memory.step,
        "not frozen, train(), recompute=True": memory.recomputed,
    }
    for where, peaks in rows.items():
        share = peaks[FUSED] / peaks[EAGER]
        print(f"  {where:<35}  eager {peaks[EAGER] / 1e6:>6.0f} MB  fused {peaks[FUSED] / 1e6:>6.0f} MB  {share:.0%}")
    name, peak = memory.largest_block
    print(f"  {peak / 1e6:.0f} MB is what {name} alone takes, fused, with its output kept")
    print("fused, whole network, by the way the norms are frozen")
    for way, peak in memory.fused_by_way.items():
        print(f"  {way:<38}  {peak / 1e6:>6.0f} MB")
    draw(losses, memory, what, args.output)
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
