#!/usr/bin/env bash
# torch 2.13.0, CPU: FlopCounterMode counts no convolution of a model that torch.jit.optimize_for_inference made.
#
# Expected: the same number as of the eager model, as of one that torch.jit.trace or torch.jit.freeze made: the
#   counter sees whatever operator runs.
# Happens: convolutions became oneDNN's and run inside of the interpreter, past the dispatcher. What is left is counted
#   without a word: of an inverted residual with a classifier behind it, the classifier.
# Here: docs/behaviour.md says so where it speaks of FLOP counters; fused ops count themselves (mnv2_fused/flops.py).
# Takes some 200 MB to 3 GB (whichever build pip takes) and half a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def counted(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(16, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
    *(nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
    *(nn.Conv2d(96, 16, 1, bias=False), nn.BatchNorm2d(16)),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
).eval()
x = torch.randn(1, 16, 28, 28)
traced = torch.jit.trace(model, x)
frozen = torch.jit.freeze(traced)
optimized = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
optimized(x)  # the first calls of a script are its profile
found = {
    "eager": counted(model),
    "traced": counted(traced),
    "frozen": counted(frozen),
    "optimized for inference": counted(optimized),
}
for name, flops in found.items():
    print(f"{name}: {flops}")
convolutions, classifier = 2 * 28 * 28 * 96 * (16 + 9 + 16), 2 * 16 * 10
assert found["eager"] == found["traced"] == found["frozen"] == convolutions + classifier
assert found["optimized for inference"] == classifier
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
