"""Fused blocks of an installed wheel against eager: exits with an error where the wheel does not work.

The only argument is the folder that the package has to be imported from; without it the environment of this Python.
"""

import sys
from pathlib import Path

import torch

import mnv2_fused
from mnv2_fused import BlockSpec, backends, inverted_residual, models, report, testing, unfuse

package = Path(mnv2_fused.__file__).resolve().parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else sys.prefix).resolve()
if not package.is_relative_to(folder):
    sys.exit(f"{package} was imported, not the wheel that is installed in {folder}")
if (why := backends.backend_reasons()["cpu"]) is not None:
    sys.exit(f"the CPU kernel cannot run: {why}")
# Wheels with the CUDA kernel, where the build found a toolkit: the library has to load, also without a GPU.
if backends._C.no_cuda is None and backends._cuda is None:
    sys.exit(f"the CUDA kernel is in the wheel, but {backends._cuda_error}")
print(f"CUDA kernel: {backends._C.no_cuda or f'for {backends._cuda.architectures}'}")

torch.manual_seed(0)
with torch.inference_mode():
    for spec in (BlockSpec(16, 96, 16, residual=True), BlockSpec(24, 96, 40, stride=2, kernel=5, squeeze_channels=8)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weights = torch.randn(1, spec.in_channels, 28, 28, dtype=dtype), testing.random_weights(spec)
            y = inverted_residual(x, weights, **spec.geometry, backend="cpu")
            found = testing.block_agreement(y, x, weights, spec)
            print(f"{spec}, {dtype}: {found}")
            if not found.ok:
                sys.exit("the kernel's result is wrong")
    x = torch.randn(4, 3, 224, 224)
    model = testing.fit_batch_norm(models.mobilenet_v2().eval(), x)
    blocks = report(model).fused
    if [block.backend for block in blocks] != 17 * ["cpu"]:
        sys.exit(f"17 fused blocks were expected, got {report(model)}")
    eager = unfuse(model)(x)
    error = ((model(x) - eager).abs().max() / eager.abs().max()).item()
    print(f"MobileNetV2: {len(blocks)} fused blocks, off eager by {error:.1e} of its largest result")
    if not error < 1e-4:
        sys.exit("the model's result is wrong")
