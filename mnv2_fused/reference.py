"""The block in plain torch: the truth that every kernel is checked against."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from .activations import function_of
from .fold import BlockWeights, PackedWeights, unpack
from .spec import BlockSpec, Geometry
from .tensors import channels_of, check_input


def inverted_residual_reference(
    x: Tensor,  # [N, C_in, H, W]
    weights: BlockWeights | PackedWeights,
    **geometry: Unpack[Geometry],
) -> Tensor:  # [N, C_out, H', W']
    """The block in plain torch ops, any floating dtype, any device: the truth every kernel is checked against.

    ``act(conv1x1(x))``, then ``act(depthwise)`` with zero padding of the *expanded* tensor, then, with squeeze weights,
    ``d * gate(conv1x1(act(conv1x1(mean(d)))))``, then a linear 1x1 projection (or ``out_activation`` of it), then
    ``+ x`` when ``residual`` (and ``out_activation`` of that when ``activates_sum``). ``geometry``: see
    :class:`Geometry`. Weights are cast to ``x.dtype``. Raises as :func:`inverted_residual` does. Papers: MobileNetV2,
    section 3.3, table 1; MobileNetV3, section 5.
    """
    spec = BlockSpec.of(weights, channels_of(x), **geometry)
    check_input(x, spec.in_channels, spec)
    if isinstance(weights, PackedWeights):
        weights = unpack(weights, spec.in_channels)
    tensors: list[Any] = [None if t is None else t.to(x.dtype) for t in weights]
    return in_torch(x, BlockWeights(*tensors), spec)


def in_torch(x: Tensor, w: BlockWeights, spec: BlockSpec) -> Tensor:
    """The reference on weights of ``x``'s dtype that are known to be of ``spec``."""
    act = function_of(spec.activation, spec.negative_slope)
    expanded = x
    if w.w_expand is not None:
        expanded = function_of(spec.expanded_by, spec.negative_slope)(F.conv2d(x, w.w_expand, w.b_expand))
    left, right, top, bottom = spec.padding_of(*x.shape[2:])
    if left == right and top == bottom:
        around = (top, left)
    else:
        expanded, around = F.pad(expanded, (left, right, top, bottom)), (0, 0)
    d = act(
        F.conv2d(
            expanded, w.w_depthwise, w.b_depthwise, spec.stride, around, spec.dilation, groups=spec.hidden_channels
        )
    )
    if w.w_squeeze is not None and w.w_excite is not None:
        squeezed = F.conv2d(d.mean((2, 3), keepdim=True), w.w_squeeze, w.b_squeeze)
        squeezed = function_of(spec.squeeze_activation, spec.negative_slope)(squeezed)
        d = d * function_of(spec.gate)(F.conv2d(squeezed, w.w_excite, w.b_excite))
    y = F.conv2d(d, w.w_project, w.b_project)
    out = function_of(spec.out_activation, spec.negative_slope)
    if spec.activates_sum:
        return out(y + x)
    return out(y) + x if spec.residual else out(y)
