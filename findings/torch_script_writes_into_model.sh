#!/usr/bin/env bash
# torch 2.13.0: torch.jit.script puts what __prepare_scriptable__ returns into the model that it is given.
#
# Expected: the hook says what is compiled in a module's place; the model that one scripts stays as it is.
# Happens: the scripted model's parent module holds the replacement afterwards, so that eager calls run that, too. Only
#   where the outermost module has the hook, and returns another one around other children, nothing is written.
# Here: mnv2_fused/module/fused_block.py and mnv2_fused/sequence/fused.py, __prepare_scriptable__.
# Takes some 200 MB to 3 GB (whichever build pip takes), and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from torch import nn


class Plain(nn.Module):
    def forward(self, x):
        return x + 1


class Fancy(nn.Module):
    def forward(self, x):
        return Plain()(x)  # what torch.jit.script cannot compile

    def __prepare_scriptable__(self):
        return Plain()


parent, alone = nn.Sequential(Fancy()), Fancy()
for model in (parent, alone):
    assert torch.jit.script(model)(torch.zeros(1)).item() == 1
print(f"the parent's child was Fancy and is {type(parent[0]).__name__} now; a Fancy alone is {type(alone).__name__}")
sys.exit((type(parent[0]), type(alone)) != (Plain, Fancy))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
