#!/usr/bin/env bash
# torch 2.13.0: a package of AOTInductor calls an operator with None where the exported program has an empty list.
#
# Expected: an operator with an argument int[] gets [] from the package, as it does from the exported program.
# Happens: the program passes [] and [1, 2] as they are. Its package passes [1, 2], and None for []: an operator in C++
#   or Python whose schema allows no None is refused with an error at the call, not when the package is made.
# Here: mnv2_fused/module/fused_block.py, _forward_compiled.
# Takes some 200 MB to 3 GB (whichever build pip takes), g++, and two minutes. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6 setuptools==80.9.0
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package

seen = []


@torch.library.custom_op("demo::copied", mutates_args=())
def copied(x: torch.Tensor, sides: list[int]) -> torch.Tensor:
    seen.append(list(sides))
    return x.clone()


copied.register_fake(lambda x, sides: torch.empty_like(x))


class Model(torch.nn.Module):
    def __init__(self, sides):
        super().__init__()
        self.sides = sides

    def forward(self, x):
        return copied(x, self.sides)


def passed(run, x):
    seen.clear()
    try:
        run(x)
    except Exception as error:
        assert "None" in str(error), error
        return "None, refused"
    return str(*seen)


found = {}
for sides in ([1, 2], []):
    x = torch.zeros(3)
    program = torch.export.export(Model(sides), (x,))
    package = aoti_compile_and_package(program, package_path=f"{sys.argv[1]}/{len(sides)}.pt2")
    found[str(sides)] = passed(program.module(), x), passed(aoti_load_package(package), x)
    print(f"{sides!s:7} the program passes {found[str(sides)][0]}, its package {found[str(sides)][1]}")
sys.exit(found != {"[1, 2]": ("[1, 2]", "[1, 2]"), "[]": ("[]", "None, refused")})
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder"
