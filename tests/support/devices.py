"""What can run here, and marks for tests that need it: instruction sets, a GPU, the CUDA and the Triton kernel."""

import pytest
import torch

from mnv2_fused import backends
from mnv2_fused.testing import available_instruction_sets, random_weights

ISAS = available_instruction_sets()
by_isa = pytest.mark.parametrize("isa", ISAS)

# Where the Triton kernel runs: on a GPU, or in Triton's interpreter on the CPU.
DEVICE = "cpu" if backends.triton_interpreted() or not torch.cuda.is_available() else "cuda"
NO_TRITON = backends.backend_reasons()["triton"]
NO_CUDA = backends.backend_reasons()["cuda"]
NO_CUDA_THERE = backends.backend_reasons(torch.device(DEVICE))["cuda"]
# Whether the reference stands in for the CUDA kernel, so that what is around the kernel is tested without a GPU.
STANDS_IN = NO_CUDA_THERE is not None and DEVICE == "cpu" and not backends.triton_interpreted()

gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
triton_kernel = pytest.mark.skipif(NO_TRITON is not None, reason=f"{NO_TRITON}: runs in test_in_the_interpreter")
cuda_kernel = pytest.mark.skipif(NO_CUDA is not None, reason=f"the CUDA kernel cannot run: {NO_CUDA}")
# Of what takes DEVICE's tensors: the CUDA kernel alone, and the CUDA kernel or its stand-in.
cuda_kernel_there = pytest.mark.skipif(NO_CUDA_THERE is not None, reason=f"the CUDA kernel cannot run: {NO_CUDA_THERE}")
cuda_op_there = pytest.mark.skipif(
    NO_CUDA_THERE is not None and not STANDS_IN, reason=f"the CUDA kernel cannot run: {NO_CUDA_THERE}"
)


def weights_on(device, spec, **options):
    """``testing.random_weights`` on a device."""
    weights = random_weights(spec, **options)
    return weights._make(None if t is None else t.to(device) for t in weights)
