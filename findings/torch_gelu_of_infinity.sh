#!/usr/bin/env bash
# torch 2.13.0, x86-64: exact GELU of infinity in float32 is infinity or NaN, by the number of elements.
#
# Expected: F.gelu(inf) is inf in every dtype, as the formula x / 2 (1 + erf(x / sqrt 2)) gives it, torch.erf(inf)
#   being 1; and an element's result does not depend on how many others there are.
# Happens: with AVX-512 and with AVX2 (by the environment's ATEN_CPU_CAPABILITY) one inf gives inf, 16 of them give NaN:
#   whole vectors take another formula than what is left. In float64 both give inf.
# Here: csrc/cpu/kernel/activation.h gives inf, so that a kernel may have infinity where the reference in eager has NaN.
# Takes some 200 MB to 3 GB (whichever build pip takes) and a minute. Exits with 1 where torch behaves otherwise, with
# 0 and a word where the processor has no AVX-512.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import torch
import torch.nn.functional as F

capability = torch.backends.cpu.get_cpu_capability()
found = [capability]
for dtype in (torch.float32, torch.float64):
    for count in (1, 16):
        x = torch.full((count,), float("inf"), dtype=dtype)
        found.append(f"{dtype} {count}: gelu {F.gelu(x)[0].item()}, erf {torch.erf(x)[0].item()}")
print("; ".join(found))
PYTHON
run() { "$folder/venv/bin/python" -W ignore "$folder/show.py"; }
here=$(run)
echo "$here"
case $here in
  AVX512*) ;;
  *)
    echo "no AVX-512 here: nothing to see"
    exit 0
    ;;
esac
less=$(ATEN_CPU_CAPABILITY=avx2 run)
echo "$less"
rest="torch.float64 1: gelu inf, erf 1.0; torch.float64 16: gelu inf, erf 1.0"
one="torch.float32 1: gelu inf, erf 1.0"
[ "$here" = "AVX512; $one; torch.float32 16: gelu nan, erf 1.0; $rest" ]
[ "$less" = "AVX2; $one; torch.float32 16: gelu nan, erf 1.0; $rest" ]
