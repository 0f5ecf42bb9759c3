#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts the weight gradient of a depthwise convolution as that of a dense one.
#
# Expected: backward of a convolution counts twice its forward, one product for the input and one for the weight, whatever
#   its groups.
# Happens: of one group twice; of two groups three times; of a depthwise convolution with 64 channels 65 times, since the
#   formula of the weight's gradient leaves groups out. A training step of MobileNetV2 is counted as several times what it
#   computes, the more the wider its blocks. torch 2.11.0 does the same.
# Here: docs/behaviour.md warns of it; tests/convert/test_other_tools.py compares no counts of backward with torch's.
# Takes some 300 MB and a minute. Exits with 1 where torch counts otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

CHANNELS = 64
found = {}
for groups in (1, 2, CHANNELS):
    conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(1, CHANNELS, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = conv(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    found[groups] = backward.get_total_flops() / forward.get_total_flops()
    print(f"{groups} groups: backward counts {found[groups]:.0f} times as much as forward")
sys.exit(found != {1: 2, 2: 3, CHANNELS: CHANNELS + 1})
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
