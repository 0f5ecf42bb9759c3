#!/usr/bin/env bash
# torch 2.13.0, CPU: a training batch norm's statistics lose digits in channels_last, a hundred times and more of those
#   that the same values lose in contiguous order.
#
# Expected: F.batch_norm(training=True) on float32 takes mean and variance in double, or by Welford's method, in either
#   memory format, so that both are off by some 1e-7 of a standard deviation.
# Happens: 32 images of 112x112, one thread. Contiguous: the mean is off by 1e-6 of a deviation and less where it is
#   one deviation from 0, the deviation by 1e-6 of itself and less. channels_last: both are off by more than a hundred
#   times as much (some 1e-5); with a mean 100 deviations from 0, the mean by 1e-4 to 1e-2 of a deviation. The sums are
#   float32's, over all pixels.
# Here: tests/training compare with float64, never with eager's float32; csrc/cpu/training sums in float32 over 256
#   pixels at most, then in double, less the mean where that is far from 0.
# Takes some 200 MB to 3 GB (whichever build pip takes) and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
off = {}
for shift in (1.0, 100.0):
    x = torch.randn(32, 16, 112, 112) + shift
    exact = x.double()
    mean, deviation = exact.mean((0, 2, 3)), exact.std((0, 2, 3), unbiased=False)
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        given = x.contiguous(memory_format=layout)
        _, found, inverse = torch.native_batch_norm(given, None, None, None, None, True, 0.1, 0.0)
        of_mean = ((found.double() - mean).abs() / deviation).max().item()
        of_deviation = (1 / (inverse.double() * deviation) - 1).abs().max().item()
        off[name, shift] = of_mean, of_deviation
        print(f"{name}, mean {shift:g} deviations from 0: mean off by {of_mean:.1e}, deviation by {of_deviation:.1e}")
assert max(off["contiguous", 1.0]) < 1e-6
assert all(a > 100 * b for a, b in zip(off["channels_last", 1.0], off["contiguous", 1.0]))
assert 1e-4 < off["channels_last", 100.0][0] < 1e-2 and off["contiguous", 100.0][0] < 1e-5
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
