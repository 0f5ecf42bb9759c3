"""Blocks with gradients: keeping a block's input alone, and computing the expanded tensor again in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import function_of
from ..fold import conv_norms
from ..spec import BlockSpec

BatchNorm = nn.modules.batchnorm._BatchNorm  # of any number of dimensions


def unfolded(
    x: Tensor,  # [N, C_in, H, W]
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    spec: BlockSpec,
    batch: tuple[bool, ...],
    norms: Sequence[BatchNorm | None] | None = None,
) -> Tensor:  # [N, C_out, H', W']
    """The block as separate convolutions and norms, from the tensors that :mod:`mnv2_fused.module.parameters` folds.

    ``batch``: which norms take their statistics from the batch. ``norms``, if given, then note them, as each does in
    train().
    """
    stages, squeeze = conv_norms(parameters, len(eps))
    y = x
    left, right, top, bottom = spec.padding_of(*x.shape[2:])
    for i, (conv, e) in enumerate(zip(stages, eps, strict=True)):
        if i == len(eps) - 2:  # depthwise
            even = left == right and top == bottom
            y = y if even else F.pad(y, (left, right, top, bottom))
            around = (top, left) if even else (0, 0)
            groups = conv.weight.shape[0]
            y = F.conv2d(y, conv.weight, conv.bias, spec.stride, around, spec.dilation, groups)
        else:
            y = F.conv2d(y, conv.weight, conv.bias)
        if batch[i]:
            y = _of_batch(y, conv.norm_weight, conv.norm_bias, e, None if norms is None else norms[i])
        elif conv.mean is not None:
            y = F.batch_norm(y, conv.mean, conv.variance, conv.norm_weight, conv.norm_bias, training=False, eps=e)
        act = (spec.expanded_by, spec.activation, spec.out_activation)[i - len(eps)]
        if i == len(eps) - 1 and spec.activates_sum:
            y = y + x
        y = function_of(act, spec.negative_slope)(y)
        if squeeze and i == len(eps) - 2:
            reduce, excite = squeeze
            s = F.conv2d(y.mean((2, 3), keepdim=True), reduce.weight, reduce.bias)
            s = function_of(spec.squeeze_activation, spec.negative_slope)(s)
            y = y * function_of(spec.gate)(F.conv2d(s, excite.weight, excite.bias))
    return y + x if spec.residual and not spec.activates_sum else y


def _of_batch(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: BatchNorm | None) -> Tensor:
    """Normalised by its own statistics, which ``norm``, if given, averages as torch's ``_BatchNorm`` does."""
    if norm is None or not norm.track_running_stats:
        return F.batch_norm(y, None, None, weight, bias, training=True, eps=eps)
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the plain average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(
        y, norm.running_mean, norm.running_var, weight, bias, training=True, momentum=momentum or 0.0, eps=eps
    )


# Of one expanded tensor, while a backward pass computes it again, where the block's input is not larger: small beside
# a network's activations at the batches that need care, large enough for a GPU to be busy.
_SLICE_BYTES = 2**23


class Recomputed(torch.autograd.Function):
    """Forward by ``run``; backward through :func:`unfolded`, computed again from the saved input.

    Where no norm takes statistics from the batch, images are independent: backward then works through slices of the
    batch and adds the weights' gradients up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        eps: Sequence[float],
        spec: BlockSpec,
        batch: tuple[bool, ...],
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.block = functools.partial(unfolded, eps=eps, spec=spec, batch=batch)
        ctx.spec, ctx.whole = spec, any(batch)
        device = ctx.device = x.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        enabled, dtype = ctx.autocast
        if not enabled:
            return run(x)
        # A weight that autocast casts here, where nothing records, must not be what others find in its cache.
        with torch.autocast(device, enabled=True, dtype=dtype, cache_enabled=False):
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused block has no second derivative here (create_graph=True); run it with backend='eager' or "
                "unfuse the model"
            )
        x, *parameters = ctx.saved_tensors
        x_needed, *needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(parameters, needed, strict=True)
        ]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
        x_grads: list[Tensor] = []
        totals: list[Tensor] = []
        enabled, dtype = ctx.autocast
        size = _slice_size(x, ctx.spec, ctx.whole)
        for some, some_grad in zip(x.split(size), grad.split(size), strict=True):
            some = some.detach().requires_grad_(x_needed)
            with torch.enable_grad(), torch.autocast(ctx.device, enabled=enabled, dtype=dtype):
                y = ctx.block(some, leaves)
            found = torch.autograd.grad(y, [some, *wanted] if x_needed else wanted, some_grad)
            if x_needed:
                x_grads.append(found[0])
                found = found[1:]
            if not totals:
                # Half precision would lose what each slice adds.
                half = size < x.shape[0] and any(t.itemsize == 2 for t in found)
                totals = [t.float() if half else t for t in found]
            else:
                for total, part in zip(totals, found, strict=True):
                    total += part
        results = iter(total.to(leaf.dtype) for total, leaf in zip(totals, wanted, strict=True))
        x_grad = None
        if x_needed:
            x_grad = x_grads[0] if len(x_grads) == 1 else torch.cat(x_grads)
        return x_grad, None, None, None, None, *(next(results) if need else None for need in needed)


def _slice_size(x: Tensor, spec: BlockSpec, whole: bool) -> int:
    """Images of which backward computes the expanded tensors at a time."""
    images = max(x.shape[0], 1)
    if whole:
        return images
    per_image = spec.hidden_channels * x.shape[2] * x.shape[3] * x.itemsize
    return min(max(max(_SLICE_BYTES, x.nbytes) // per_image, 1), images)
