#!/usr/bin/env bash
# torch 2.13.0: a global forward hook with keyword arguments leaves every module's call on the slow way once it is removed.
#
# Expected: after handle.remove() all is as before the hook was registered.
# Happens: register_module_forward_hook(hook, with_kwargs=True) notes the handle in a second dictionary, which remove()
#   does not clear. Module.__call__ looks at it: from then on each call of each module takes the way with hooks, and what
#   asks whether there are global hooks is told yes, until the process ends.
# Here: mnv2_fused/sequence/seen.py, record.
# Takes some 200 MB to 3 GB (whichever build pip takes), and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from torch.nn.modules import module

left = {}
for with_kwargs in (False, True):
    handle = module.register_module_forward_hook(lambda *given: None, with_kwargs=with_kwargs)
    torch.nn.Identity()(torch.zeros(1))
    handle.remove()
    left[with_kwargs] = bool(module._has_any_global_hook())
    print(f"with_kwargs={with_kwargs}: after remove() global hooks are said to be there: {left[with_kwargs]}")
sys.exit(left != {False: False, True: True})
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
