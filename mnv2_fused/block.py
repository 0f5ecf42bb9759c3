"""The inverted-residual block: its spec, its reference and the fused function.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), section 3.3 for the block
and section 5.1 for computing it without its expanded tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .cuda_plan import CudaPlan
from .fold import (
    FRAGMENT,
    PANEL,
    BlockWeights,
    PackedWeights,
    fragment_channels,
    hidden_channels,
    in_fragments,
    pack,
    unpack,
)
from .plan import Plan
from .triton_plan import TritonPlan


@dataclass(frozen=True)
class BlockSpec:
    """Geometry of one block. ``expand=False`` is t = 1: no expansion, ``hidden_channels == in_channels``."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    stride: int = 1
    expand: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {self.stride}; use backend='eager'")
        if not self.expand and self.hidden_channels != self.in_channels:
            raise ValueError(
                f"without an expansion hidden_channels must equal in_channels ({self.in_channels}), "
                f"got {self.hidden_channels}"
            )
        if self.residual and (self.stride != 1 or self.in_channels != self.out_channels):
            raise ValueError(
                "a residual needs stride 1 and in_channels equal to out_channels, got stride "
                f"{self.stride}, {self.in_channels} and {self.out_channels}"
            )

    def __str__(self) -> str:
        hidden = f" -> {self.hidden_channels}" if self.expand else ""
        residual = ", residual" if self.residual else ""
        return f"{self.in_channels}{hidden} -> {self.out_channels}, stride {self.stride}{residual}"

    @staticmethod
    def of(
        weights: BlockWeights | PackedWeights,
        stride: int = 1,
        residual: bool = False,
        in_channels: int | None = None,
    ) -> BlockSpec:
        """The spec that these weights have; raises ValueError where their shapes disagree.

        ``in_channels`` of the input at hand: weights packed in pairs do not tell an odd number from the next.
        """
        if (weights.w_expand is None) != (weights.b_expand is None):
            raise ValueError("w_expand and b_expand must both be given or both be None")
        packed = isinstance(weights, PackedWeights)
        pairs = packed and weights.w_project.dim() == 4 and weights.w_project.shape[3] == 2
        fragments = packed and in_fragments(weights)
        for name, tensor in zip(weights._fields, weights, strict=True):
            is_product = name in ("w_expand", "w_project")
            dims = 1 if name.startswith("b_") else 3 if packed and not (pairs and is_product) else 4
            if tensor is not None and tensor.dim() != dims and (dims > 1 or packed):
                raise ValueError(f"{name} must have {dims} dimensions, got {list(tensor.shape)}")
        if packed:
            hidden, out_channels = hidden_channels(weights), weights.b_project.shape[0]
        else:
            hidden, out_channels = weights.w_depthwise.shape[0], weights.w_project.shape[0]
        given, in_channels = in_channels, hidden if weights.w_expand is None else weights.w_expand.shape[1]
        if pairs and weights.w_expand is not None:
            in_channels = given if given == 2 * in_channels - 1 else 2 * in_channels
        if fragments:
            in_channels = fragment_channels(weights)
        panels, out_panels = -(-hidden // PANEL), -(-out_channels // PANEL)

        def product(panels: int, terms: int) -> tuple[int, ...]:
            return (panels, (terms + 1) // 2, PANEL, 2) if pairs else (panels, terms, PANEL)

        if fragments:
            shapes = [
                (panels, -(-in_channels // PANEL), FRAGMENT),
                (panels * PANEL + in_channels,),
                (panels, 9, PANEL),
                (hidden + PANEL,),
                (panels, out_panels, FRAGMENT),
                (out_channels,),
            ]
        elif packed:
            shapes = [
                product(panels, in_channels),
                (panels * PANEL,),
                (panels, 9, PANEL),
                (panels * PANEL,),
                product(out_panels, hidden),
                (out_channels,),
            ]
        else:
            shapes = [
                (hidden, in_channels, 1, 1),
                (hidden,),
                (hidden, 1, 3, 3),
                (hidden,),
                (out_channels, hidden, 1, 1),
                (out_channels,),
            ]
        for name, tensor, shape in zip(weights._fields, weights, shapes, strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        return BlockSpec(
            in_channels, hidden, out_channels, stride, expand=weights.w_expand is not None, residual=residual
        )


def _channels_of(x: Tensor) -> int | None:
    return x.shape[1] if x.dim() == 4 else None


def check_input(x: Tensor, in_channels: int) -> None:
    """Raises ValueError or TypeError, saying what to do, for an ``x`` that no backend takes."""
    if x.layout != torch.strided:
        raise TypeError(f"x must be dense, got layout {x.layout}; convert it with x.to_dense()")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C_in, H, W], got {list(x.shape)}; add a batch with x[None]")
    if x.shape[1] != in_channels:
        raise ValueError(f"x must have {in_channels} channels, got {x.shape[1]} in {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; convert it with x.float()")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"height and width must be at least 1, got {list(x.shape)}")


def inverted_residual_reference(
    x: Tensor,  # [N, C_in, H, W]
    weights: BlockWeights | PackedWeights,
    *,
    stride: int = 1,
    residual: bool = False,
) -> Tensor:  # [N, C_out, H', W'], H' = (H - 1) // stride + 1
    """The block in plain torch ops, any floating dtype, any device: the truth every kernel is checked against.

    ``relu6(conv1x1(x))``, then ``relu6(depthwise3x3)`` with zero padding of the *expanded* tensor, then a linear
    1x1 projection, then ``+ x`` when ``residual``. Weights are cast to ``x.dtype``. Raises as
    :func:`inverted_residual` does. Paper: section 3.3, table 1.
    """
    spec = BlockSpec.of(weights, stride, residual, _channels_of(x))
    check_input(x, spec.in_channels)
    if isinstance(weights, PackedWeights):
        weights = unpack(weights, spec.in_channels)
    w = BlockWeights(*(None if t is None else t.to(x.dtype) for t in weights))
    expanded = x if w.w_expand is None else F.relu6(F.conv2d(x, w.w_expand, w.b_expand))
    depthwise = F.relu6(
        F.conv2d(expanded, w.w_depthwise, w.b_depthwise, stride, padding=1, groups=spec.hidden_channels)
    )
    y = F.conv2d(depthwise, w.w_project, w.b_project)
    return y + x if residual else y


def inverted_residual(
    x: Tensor,  # [N, C_in, H, W]; channels_last is read in place, other strides are copied once
    weights: BlockWeights | PackedWeights,
    *,
    stride: int = 1,
    residual: bool = False,
    backend: str = "auto",
    plan: Plan | CudaPlan | TritonPlan | None = None,
) -> Tensor:  # [N, C_out, H', W'], H' = (H - 1) // stride + 1, in x's dtype and memory format
    """The block as one kernel, one group of expanded channels at a time; the expanded tensor never exists.

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
    spec = BlockSpec.of(weights, stride, residual, _channels_of(x))
    check_input(x, spec.in_channels)
    backend = ops.resolve_backend(backend, x.device)
    if backend == "eager":
        return inverted_residual_reference(x, weights, stride=stride, residual=residual)
    if forward_ad._current_level >= 0:
        raise RuntimeError("the kernel has no forward-mode derivative; use backend='eager'")
    packed = weights if isinstance(weights, PackedWeights) else pack(weights, x.dtype, backend)
    if in_fragments(packed) != (backend == "cuda"):
        raise ValueError(
            f"the weights are packed for another backend than {backend!r}, which runs here; pack them with "
            f"mnv2_fused.pack(weights, x.dtype, {backend!r})"
        )
    forced = ()
    if plan is not None:
        forced = plan.forced()
        maker, kind = {
            "cpu": ("plan", Plan),
            "cuda": ("cuda_plan", CudaPlan),
            "triton": ("triton_plan", TritonPlan),
        }[backend]
        if not isinstance(plan, kind):
            raise ValueError(f"plan: backend {backend!r} takes one of mnv2_fused.{maker}, got a {type(plan).__name__}")
    if isinstance(plan, Plan):
        limits = ((x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
        for name, value, limit in zip(("tile_rows", "tile_cols"), forced, limits, strict=False):
            if not 1 <= value <= limit:
                raise ValueError(f"plan: {name} must be 1 to {limit} for this input, got {value}")
    return ops.packed_inverted_residual(x, packed, stride, residual, forced, backend)
