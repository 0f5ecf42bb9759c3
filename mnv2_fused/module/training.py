"""Blocks in training: by kernels that never write an expanded tensor, or keeping a block's input alone and computing
the expanded tensor again in backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import training_ops
from ..activations import function_of
from ..fold import ConvNorm, conv_norms
from ..spec import BlockSpec
from .parameters import Norm

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


def _momentum(norm: BatchNorm) -> float | None:
    """How much of one batch's statistics goes into the running ones, which it counts in; None where there are none."""
    if not norm.track_running_stats or norm.running_mean is None:
        return None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the plain average
            return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


def _of_batch(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: BatchNorm | None) -> Tensor:
    """Normalised by its own statistics, which ``norm``, if given, averages as torch's ``_BatchNorm`` does."""
    momentum = None if norm is None else _momentum(norm)
    if norm is None or momentum is None:
        return F.batch_norm(y, None, None, weight, bias, training=True, eps=eps)
    return F.batch_norm(y, norm.running_mean, norm.running_var, weight, bias, training=True, momentum=momentum, eps=eps)


def _note(norm: Norm | None, found: training_ops.Statistics | None) -> None:
    """Averages what a norm took from the batch into its running statistics."""
    if found is None or not isinstance(norm, BatchNorm):
        return
    mean, variance, count = found
    momentum = _momentum(norm)
    if momentum is None:
        return
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)


TRAINED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def takes_dtypes(x: torch.dtype, weight: torch.dtype) -> bool:
    """Whether the kernels stand in for modules with such weights, given such an x: of one dtype, or what autocast
    converts."""
    if torch.is_autocast_enabled("cpu"):
        return all(dtype in TRAINED_DTYPES and dtype != torch.float64 for dtype in (x, weight))
    return x == weight and x in TRAINED_DTYPES


def is_live(norm: Norm | None) -> bool:
    """Whether a norm takes its statistics from the batch. A FrozenBatchNorm2d has no parameters."""
    return norm is not None and norm.training and len(norm._parameters) > 0


def _group_of(norm: Norm | None) -> Any:
    """The processes that a norm has statistics together with, None for this one alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def fewest_values(norms: Sequence[Norm | None]) -> int:
    """Values that a channel must have here: two, or one where other processes have more."""
    return 1 if all(_group_of(norm) is not None for norm in norms if is_live(norm)) else 2


def input_objection(x: Tensor, weight: torch.dtype, norms: Sequence[Norm | None], spec: BlockSpec) -> str | None:
    """Why the training kernels do not take ``x``; ``weight``: the parameters' dtype."""
    if (
        type(x) not in (Tensor, nn.Parameter)
        or not takes_dtypes(x.dtype, weight)
        or not x.is_cpu
        or x.layout != torch.strided
        or x.dim() != 4
        or x.numel() == 0
    ):
        return "its input is not what the training kernels take"
    n, channels, height, width = x.shape
    if channels != spec.in_channels:
        return "its input has another number of channels"  # which the modules say better
    out_height, out_width = spec.out_size(height, width)
    few = min(n * height * width, n * out_height * out_width) < fewest_values(norms)
    return "a channel has one value" if few or min(out_height, out_width) < 1 else None


def _norm_of(stage: ConvNorm, eps: float, norm: Norm | None) -> training_ops.Norm:
    if is_live(norm):
        return training_ops.Norm(stage.norm_weight, stage.norm_bias, eps, group=_group_of(norm))
    if stage.mean is None:  # a convolution alone
        none = torch.zeros_like(stage.weight[:, 0, 0, 0])
        return training_ops.Norm(None, None, 0.0, none, torch.ones_like(none))
    return training_ops.Norm(stage.norm_weight, stage.norm_bias, eps, stage.mean, stage.variance)


def norm_live(x: Tensor, norm: Norm, added: Tensor | None = None) -> Tensor:
    """What ``norm`` makes of x on the CPU with statistics of the batch, plus ``added``; its running ones follow."""
    assert isinstance(norm, BatchNorm)
    made = training_ops.Norm(norm.weight, norm.bias, norm.eps, group=_group_of(norm))
    y, found = training_ops.normed(x, made, added)
    _note(norm, found)
    return y


def train_fused(
    x: Tensor,  # [N, C_in, H, W]
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    spec: BlockSpec,
    norms: Sequence[Norm | None],
    drops: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # [N, C_out, H', W']
    """The block by the kernels of :mod:`mnv2_fused.training_ops`; running statistics follow.

    What is kept for backward: x, and the projection's result in front of its norm. The first stage may be a network's
    stem, see :func:`mnv2_fused.training_ops.projected`. ``drops``: stochastic depth in front
    of the sum with x.
    """
    stages, squeeze = conv_norms(parameters, len(eps))
    made = [_norm_of(*stage) for stage in zip(stages, eps, norms, strict=True)]
    expand = stages[-3] if len(stages) == 3 else None
    depthwise, project = stages[-2:]
    weights = training_ops.Weights(
        *((None, None) if expand is None else (expand.weight, expand.bias)),
        *(depthwise.weight, depthwise.bias, project.weight, project.bias),
        *(t for conv in squeeze for t in conv[:2]),
    )
    inner = dataclasses.replace(spec, residual=False, out_activation="identity", activates_sum=False)
    first = made[-3] if expand is not None else None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    p, found = training_ops.projected(x, weights, (first, made[-2]), inner, dtype)
    for norm, statistics in zip((norms[-3] if first else None, norms[-2]), found, strict=True):
        _note(norm, statistics)
    act = function_of(spec.out_activation, spec.negative_slope)
    plain = spec.out_activation == "identity" or spec.activates_sum
    with_sum = spec.residual and plain and drops is None
    last = norms[-1]
    if last is not None and is_live(last):
        y = norm_live(p, last, x if with_sum else None)
    else:
        scale, bias = project.norm_weight, project.norm_bias
        y = p if project.mean is None else F.batch_norm(p, project.mean, project.variance, scale, bias, eps=eps[-1])
        y = y + x if with_sum else y
    if not plain:
        y = act(y)
    if spec.residual and not with_sum:
        y = (y if drops is None else drops(y)) + x
    return act(y) if spec.activates_sum else y


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
