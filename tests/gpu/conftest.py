"""Around the GPU kernels: where the CUDA kernel cannot run, the reference does."""

import pytest
import torch
from support.devices import STANDS_IN

from mnv2_fused import backends, ops, tensors
from mnv2_fused import inverted_residual_reference as reference
from mnv2_fused.fold import PackedWeights


@pytest.fixture(autouse=True, scope="module")
def stand_in():
    """Where the CUDA kernel cannot run, the reference does: what is around the kernel is tested all the same."""
    if not STANDS_IN:
        yield
        return

    def inverted_residual_cuda(x, *arguments):
        packed, (stride, residual) = PackedWeights(*arguments[:10]), arguments[10:12]
        result = reference(x, packed, stride=stride, residual=residual)
        return tensors.empty_output(x, *result.shape[1:2], result.shape[2:]).copy_(result)

    library = torch.library.Library("mnv2_fused", "IMPL")
    library.impl("inverted_residual_cuda", inverted_residual_cuda, "CPU")
    rule = ops.half_autocast_rule(torch.ops.mnv2_fused.inverted_residual_cuda.default, "CPU", (0, 4))
    library.impl("inverted_residual_cuda", rule, "AutocastCPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_cuda_reason", lambda device: None)
        yield
    library._destroy()
