#!/usr/bin/env bash
# torch 2.13.0: a step with fused=True changes parameters without torch counting it.
#
# Expected: an optimizer writes in place, so `_version` grows, and backward through a graph that saved the parameter
#   raises "modified by an inplace operation", whichever implementation the optimizer uses.
# Happens: SGD, Adam, AdamW and Adagrad with fused=True leave `_version` as it was. Backward after such a step raises
#   nothing and returns the gradient at the new parameter, where the plain optimizer's step makes it raise.
# Here: mnv2_fused/module/guard.py notes such steps by a hook and compares memory.
# Takes some 200 MB to 3 GB (whichever build pip takes), and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

found = {}
for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    for fused in (False, True):
        weight = torch.nn.Parameter(torch.full((3,), 2.0))
        y = (weight * weight).sum()  # saves weight for backward
        weight.grad = torch.ones(3)
        version = weight._version
        optimizer([weight], lr=0.5, fused=fused).step()
        weight.grad = None
        try:
            y.backward()
            then = f"gradient {weight.grad[0].item():g} where it was {2 * 2.0:g}"
        except RuntimeError as error:
            then = "raises" if "modified by an inplace operation" in str(error) else str(error)
        found[optimizer.__name__, fused] = weight._version > version, then
        print(f"{optimizer.__name__}(fused={fused}): counted {weight._version > version}, backward {then}")
plain = all(found[name, False] == (True, "raises") for name, _ in found)
silent = all(not found[name, True][0] and found[name, True][1].startswith("gradient") for name, _ in found)
sys.exit(not (plain and silent))
PYTHON
