"""The same block by torch's own derivatives, for second ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import function_of
from .gate import gate_of
from .layout import dtype_of
from .norms import refuse_group
from .weights import WEIGHTS, is_stem, weights_of


def by_torch(ctx: Any, g: Tensor, x: Tensor, tensors: Sequence[Tensor | None]) -> Any:
    """The same by torch's own derivatives, which have derivatives themselves."""
    dtype = dtype_of(x)
    weights, spec = weights_of(tensors, dtype), ctx.spec

    def normalised(y: Tensor, i: int) -> Tensor:
        norm, affine = ctx.norms[i], tensors[WEIGHTS + 2 * i : WEIGHTS + 2 * i + 2]
        refuse_group(norm.group)
        if not norm.live and norm.eps == 0.0:  # a convolution alone
            return y
        mean, variance, *affine = (None if t is None else t.to(dtype) for t in (norm.mean, norm.variance, *affine))
        return F.batch_norm(y, mean, variance, *affine, training=norm.live, eps=norm.eps)

    y = x.to(dtype)
    if weights.expand is not None:
        of_stem = (2, 1) if is_stem(weights) else ()  # stride and padding
        y = normalised(F.conv2d(y, weights.expand, weights.expand_bias, *of_stem), 0)
        y = function_of(spec.expanded_by, spec.negative_slope)(y)
    y = F.pad(y, spec.padding_of(*y.shape[2:]))
    groups = weights.depthwise.shape[0]
    y = F.conv2d(y, weights.depthwise, weights.depthwise_bias, spec.stride, 0, spec.dilation, groups)
    y = function_of(spec.activation, spec.negative_slope)(normalised(y, 1))
    if weights.reduce is not None:
        y = y * gate_of(y.mean((2, 3)).double(), weights[6:10], spec).to(dtype)[..., None, None]
    y = F.conv2d(y, weights.project, weights.project_bias)
    wanted = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, g.to(dtype), create_graph=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in (x, *tensors)]
    return grads[0], None, None, None, *grads[1:]
