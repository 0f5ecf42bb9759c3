#!/usr/bin/env bash
# torch 2.13.0: a quantised depthwise convolution is far off with activations of 8 bits, on processors with VNNI, too.
#
# Expected: the engine `fbgemm` needs activations of 7 bits (reduce_range) where processors lack VNNI; `x86` chooses
#   among fbgemm and oneDNN so that 8 bits are right where there is VNNI.
# Happens: depthwise convolutions add pairs of products in 16 bits and saturate: 82 where 146 is right. Of fbgemm at any
#   number of channels; of x86 at 144, not at 64. oneDNN and QNNPACK are right at both. Nothing is said.
# Here: docs/quantize.md, on models that torch quantised.
# Takes some 200 MB to 3 GB (whichever build pip takes), and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
import torch.ao.nn.quantized as nnq


def middle(engine, channels):
    """The middle of a 3x3 depthwise convolution: nine times 255 x 127 / 2000, 145.7."""
    torch.backends.quantized.engine = engine
    convolution = nnq.Conv2d(channels, channels, 3, padding=1, groups=channels)
    weight = torch.full((channels, 1, 3, 3), 127.0)
    convolution.set_weight_bias(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None)
    convolution.scale = 2000.0
    x = torch.quantize_per_tensor(torch.full((1, channels, 3, 3), 255.0), 1.0, 0, torch.quint8)
    assert x.int_repr().eq(255).all()
    return int(convolution(x).int_repr()[0, 0, 1, 1])


found = {f"{e} {c}": middle(e, c) for e in ("fbgemm", "x86", "onednn", "qnnpack") for c in (64, 144)}
print(f"engine and channels: {', '.join(f'{name} {value}' for name, value in found.items())}; right is 146")
wrong = {name for name, value in found.items() if value != 146}
sys.exit(not {"fbgemm 64", "fbgemm 144", "x86 144"} <= wrong)  # without VNNI x86 64, too
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
