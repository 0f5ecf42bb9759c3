"""The fused block as a function on folded weights.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), section 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Unpack

from . import backends, ops
from .fold import BlockWeights, PackedWeights, pack_block
from .plans.cpu import Plan
from .plans.cuda import CudaPlan
from .plans.triton import TritonPlan
from .reference import inverted_residual_reference
from .spec import ACTIVATIONS, GATES, BlockSpec, Geometry
from .tensors import channels_of, check_dtype, check_input, check_tensor

__all__ = ["ACTIVATIONS", "GATES", "BlockSpec", "Geometry", "inverted_residual", "inverted_residual_reference", "pack"]


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def pack(weights: BlockWeights, dtype: torch.dtype = torch.float32, backend: str = "auto") -> PackedWeights:
    """Packs folded weights for activations of ``dtype``. Differentiable; the cast is the only rounding.

    For the kernel that ``backend`` names; ``"auto"`` is the one that runs on the weights' own device. Raises ValueError
    for shapes that make no block and for a backend or dtype that no kernel has, TypeError for weights that are packed.
    """
    if isinstance(weights, PackedWeights):
        raise TypeError("weights are packed already; pack the BlockWeights that they were made of")
    BlockSpec.of(weights)
    check_dtype(dtype, _DTYPES)
    if backend not in backends.BACKENDS or backend == "eager":
        kernels = ", ".join(name for name in backends.BACKENDS if name != "eager")
        raise ValueError(f"backend must be one of {kernels}, got {backend!r}; the reference takes weights unpacked")
    return pack_block(weights, dtype, backend)


def inverted_residual(
    x: Tensor,  # [N, C_in, H, W]; channels_last is read in place, other strides are copied once
    weights: BlockWeights | PackedWeights,
    *,
    backend: str = "auto",
    plan: Plan | CudaPlan | TritonPlan | None = None,
    **geometry: Unpack[Geometry],
) -> Tensor:  # [N, C_out, H', W'], in x's dtype and memory format
    """The block as one kernel, one group of expanded channels at a time; the expanded tensor never exists.

    ``geometry`` is what the weights do not tell: see :class:`Geometry`. A depthwise kernel of 3x3, 5x5 or 7x7 and a
    squeeze-and-excite are told by the weights. With a squeeze-and-excite there are two passes over the channel groups,
    the second of which computes the first's again or reads its depthwise results from a buffer: see
    :func:`mnv2_fused.plan`.

    float32 and float64 compute in their own precision; float16 is widened to float32 inside. bfloat16 rounds the
    packed weights of both 1x1 products, what lies between depthwise and project, and the result; sums are float32. A
    block with an odd number of expanded channels is widened as float16 is.
    Differentiable in ``x`` and the weights, by recomputing the expansion. Folded weights are packed on every
    call: pass ``mnv2_fused.pack(weights)`` for repeated calls, or use :class:`FusedInvertedResidual`.

    On a GPU float16, bfloat16 and float32 compute in their own precision (float32 rounds its products to TF32 where
    ``torch.backends.cudnn.allow_tf32``, as convolutions do), with sums in float32; the CUDA kernel rounds the taps of
    the depthwise to half precision with the rest, Triton's keeps them in float32.

    ``plan`` forces the tiling (see :func:`mnv2_fused.plan`, :func:`mnv2_fused.cuda_plan` and
    :func:`mnv2_fused.triton_plan`). Raises ValueError for shapes, strides or plans out of range, and weights packed for
    another backend, TypeError for an ``x`` that is not floating point, RuntimeError when no
    kernel takes the call. Paper: section 5.1.
    """
    check_tensor(x)
    spec = BlockSpec.of(weights, channels_of(x), **geometry)
    check_input(x, spec.in_channels, spec)
    backend, why = ops.kernel_for(spec, backend, x.device)
    if why is not None:
        raise RuntimeError(f"{why}; use backend='eager'")
    if backend == "eager":
        return inverted_residual_reference(x, weights, **geometry)
    if forward_ad._current_level >= 0:
        raise RuntimeError("the kernel has no forward-mode derivative; use backend='eager'")
    packed = weights if isinstance(weights, PackedWeights) else pack_block(weights, x.dtype, backend)
    packed.check_layout(backend)
    forced = ()
    if plan is not None:
        maker, kind = {
            "cpu": ("plan", Plan),
            "cuda": ("cuda_plan", CudaPlan),
            "triton": ("triton_plan", TritonPlan),
        }[backend]
        if not isinstance(plan, kind):
            raise ValueError(f"plan: backend {backend!r} takes one of mnv2_fused.{maker}, got a {type(plan).__name__}")
        forced = plan.forced()
    if isinstance(plan, Plan):
        for name, value, limit in zip(("tile_rows", "tile_cols"), forced, spec.out_size(*x.shape[2:]), strict=False):
            if not 1 <= value <= limit:
                raise ValueError(f"plan: {name} must be 1 to {limit} for this input, got {value}")
    return ops.packed_inverted_residual(
        x, packed, spec.strides[0], spec.residual, forced, backend, spec.options(*x.shape[2:])
    )
