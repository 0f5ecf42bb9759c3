#!/usr/bin/env bash
# torch 2.13.0: hardswish lacks the tag "pointwise" in both its forms, gelu_ lacks it where gelu has it.
#
# Expected: every operation that computes each element from one element has torch.Tag.pointwise, in place or not.
# Happens: aten.hardswish and aten.hardswish_ have it in no form; aten.gelu has it and aten.gelu_ does not, where silu,
#   relu, hardtanh, hardsigmoid and leaky_relu have it in both. What is sorted by the tag takes a MobileNetV3's
#   activations for something else.
# Here: mnv2_fused/module/recording.py, _POINTWISE.
# Takes some 200 MB to 3 GB (whichever build pip takes), and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch

EXPECTED = {  # (the form that returns, the form in place)
    "relu": (True, True),
    "silu": (True, True),
    "hardtanh": (True, True),
    "hardsigmoid": (True, True),
    "leaky_relu": (True, True),
    "gelu": (True, False),
    "hardswish": (False, False),
}
x = torch.linspace(-4, 4, 9)
found = {}
for name in EXPECTED:
    forms = [getattr(torch.ops.aten, form).default for form in (name, name + "_")]
    for form in forms:  # each does compute element by element
        assert torch.equal(form(x.clone())[3:5], form(x[3:5].clone()))
    found[name] = tuple(torch.Tag.pointwise in form.tags for form in forms)
    print(f"{name:12} tagged {found[name][0]}, in place {found[name][1]}")
sys.exit(found != EXPECTED)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
