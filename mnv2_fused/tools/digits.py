"""``python -m mnv2_fused demo --train-digits``: learned weights for real, in a minute or two."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module import FusedInvertedResidual
from ..testing import agreement
from ..testing import threads as torch_threads
from .demo import progress, require_extras

# Smaller strides and fewer blocks than ImageNet's: (expand ratio, channels, repeats, stride) for 32x32 images.
DIGITS_STAGES = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2]]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_train, x_test, y_train, y_test): scikit-learn's 8x8 digits as [N, 3, 32, 32]; a quarter held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.utils import Bunch

    found = cast(Bunch, load_digits())  # a tuple only where one is asked for
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    x = F.interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    train, test = train_test_split(range(len(x)), test_size=0.25, random_state=0, stratify=found.target)
    y = torch.from_numpy(found.target)
    return x[train], x[test], y[train], y[test]


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int = 64) -> None:
    """Trains the model's parameters in place, a bar and a line for each epoch."""
    steps = len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * steps)
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(x))
        loss_sum, correct = 0.0, 0
        with progress(steps, f"epoch {epoch}/{epochs}") as bar:
            for step in range(steps):
                index = order[step * batch : (step + 1) * batch]
                logits = model(x[index])
                loss = F.cross_entropy(logits, y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.item()
                correct += int((logits.argmax(1) == y[index]).sum())
                bar.set_postfix(loss=f"{loss_sum / (step + 1):.3f}", accuracy=f"{correct / (step + 1) / batch:.1%}")
                bar.update()
        print(f"epoch {epoch:2}/{epochs}: loss {loss_sum / steps:.3f}, accuracy {correct / steps / batch:.1%}")


def train_digits(*, epochs: int, threads: int) -> int:
    """Trains a MobileNetV2 of fused blocks on digits, then compares it with torchvision's own blocks.

    Returns 0 when both are right on more than 95 % of the test images, agree on every prediction, and the logits
    keep the tolerance rule; else 1. Raises DemoError.
    """
    require_extras()
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    sizes = {"num_classes": 10, "width_mult": 0.35, "inverted_residual_setting": DIGITS_STAGES}
    model = mobilenet_v2(**sizes, block=FusedInvertedResidual)
    plain = mobilenet_v2(**sizes)
    x_train, x_test, y_train, y_test = digits()
    print(f"training MobileNetV2 0.35 of fused blocks on {len(x_train)} digits, testing on {len(x_test)}")
    with torch_threads(threads):
        fit(model, x_train, y_train, epochs)
        plain.load_state_dict(model.state_dict())
        model.eval()
        plain.eval()
        with torch.inference_mode():
            fused, eager = model(x_test), plain(x_test)
            verdict = agreement(fused, eager, copy.deepcopy(plain).double()(x_test.double()))
    right = [(logits.argmax(1) == y_test).float().mean().item() for logits in (eager, fused)]
    differing = int((fused.argmax(1) != eager.argmax(1)).sum())
    print(f"test accuracy: {right[0]:.2%} with torchvision's blocks, {right[1]:.2%} fused")
    print(f"predictions: {len(y_test) - differing} of {len(y_test)} identical, {differing} differ")
    print(f"logits: {verdict}")
    if min(right) > 0.95 and not differing and verdict.ok:
        print("fused blocks train, and give the answers of the ordinary ones")
        return 0
    print("FAILED: accuracy must be above 95 %, predictions identical and the logits within their limit")
    return 1
