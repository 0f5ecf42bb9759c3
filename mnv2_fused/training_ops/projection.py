"""A block up to its projection, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..fold import BlockWeights, pack_block
from ..ops import packed_inverted_residual
from ..spec import BlockSpec
from .gate import differentiable_gate, gate_of
from .layout import (
    channels_last,
    count_of,
    dtype_of,
    matrix,
    of_matrix,
    padded,
    padded_rows,
    panels,
    pixels,
    scaled,
    without_autocast,
)
from .moments import Moments, moments_of, taken
from .norms import Affine, Norm, Statistics, of_conv_bias, rows_of, summed, together
from .torch_derivatives import by_torch
from .weights import WEIGHTS, Kernel, Weights, kernel_of, w_output, weights_of


def projected(
    x: Tensor,
    weights: Weights,
    norms: tuple[Norm | None, Norm],
    spec: BlockSpec,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Statistics | None, Statistics | None]]:
    """The block up to its projection's result p [N, C_out, H', W'], channels_last, with gradients; and what running
    statistics are updated by, None of norms that are not live.

    ``norms``: behind the expansion, where there is one, and behind the depthwise convolution. Where a network's stem is
    the expansion, ``spec`` is that of its patches, and an image gets no gradient. ``dtype``: p's, else x's.
    """
    first, second = norms
    of_first = (None, None) if first is None else (first.weight, first.bias)
    p, *found = _Projected.apply(x, spec, norms, dtype or x.dtype, *weights, *of_first, second.weight, second.bias)
    values = iter(found)
    of_e, of_d = (
        Statistics(next(values), next(values), next(values)) if norm is not None and norm.live else None
        for norm in norms
    )
    return p, (of_e, of_d)


class _Projected(torch.autograd.Function):
    """Keeps x, weights and a few numbers of each channel, with a squeeze-and-excite of each channel of an image."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        spec: BlockSpec,
        norms: tuple[Norm | None, Norm],
        p_dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> Any:
        weights = weights_of(tensors, dtype_of(x))
        first, second = norms
        statistics: list[Any] = []
        of_e, w_expand, b_expand = None, None, None
        if weights.expand is None or first is None:
            centred, given = channels_last(x), Moments(None, x.new_zeros(0, dtype=torch.float64))
        else:
            w = matrix(weights.expand)
            exact = w.double()
            if first.live:
                centred, given = moments_of(x, weights, first.group)
                assert given.covariance is not None
                spread = exact @ given.covariance
                variance = (spread * exact).sum(1).clamp(min=0)
                ctx.spread = spread.to(w.dtype)
                # Less the pilot's part, which is taken off x.
                of_e = Affine.of(first, exact @ given.rest, variance)
                mean = of_e.mean if given.pilot is None else of_e.mean + exact @ given.pilot.double()
                mean = mean if weights.expand_bias is None else mean + weights.expand_bias
                statistics += [mean, variance, given.count]
            else:
                centred, given = taken(x, weights), Moments(None, exact.new_zeros(w.shape[1]))
                of_e = Affine.fixed(first, weights.expand_bias)
            w_expand, b_expand = scaled(of_e.scale, w), of_e.shift
        kernel = kernel_of(spec, centred, w_expand, b_expand, weights.depthwise)
        ctx.count = 0.0
        own = x.shape[0] * math.prod(spec.out_size(*centred.shape[2:]))
        p = totals = None
        if second.live and second.group is None:
            p, totals, d = _forward(centred, spec, kernel, weights, second)
            ctx.count, mean, variance = own, *d
        elif second.live:
            d = torch.ops.mnv2_fused.training_statistics(centred, *kernel)
            ctx.count, mean, variance = together(second.group, own, *d)
        if second.live:
            of_d = Affine.of(second, mean, variance)
            mean = mean if weights.depthwise_bias is None else mean + weights.depthwise_bias
            statistics += [mean, variance, ctx.count]
        else:
            of_d = Affine.fixed(second, weights.depthwise_bias)
        if weights.reduce is not None:
            p, ctx.pooled = _project_gated(centred, spec, kernel, weights, of_d, totals)
        elif p is None:
            p = _project(centred, spec, w_expand, b_expand, weights, of_d)
        ctx.spec, ctx.norms, ctx.affines = spec, norms, (of_e, of_d)
        ctx.given, ctx.kernel = given, kernel
        ctx.save_for_backward(x, *tensors)
        ctx.mark_non_differentiable(*(t for t in statistics if isinstance(t, Tensor)))
        return p.to(p_dtype), *statistics

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_torch(ctx, g, x, tensors)
        dtype, given = dtype_of(x), ctx.given
        weights, spec, (of_e, of_d) = weights_of(tensors, dtype), ctx.spec, ctx.affines
        first, second = ctx.norms
        centred = taken(x, weights, given.pilot)
        x_needed = ctx.needs_input_grad[0]
        kernel = ctx.kernel
        g = channels_last(g.to(dtype))
        grads: list[Tensor | None] = [None] * len(tensors)

        w_project = panels(weights.project.flatten(1).mT)
        w_input = gate = of_pooled = None
        if of_e is not None and weights.expand is not None and x_needed:
            w_input = panels(padded_rows(scaled(of_e.scale, matrix(weights.expand))).mT)
        of_d_rows = rows_of(of_d, dtype)
        if weights.reduce is not None:
            factors, differentiate = differentiable_gate(ctx.pooled, weights, spec)
            gate = padded(factors).to(dtype)
        if gate is None and second.group is None and _near(spec, centred):
            sums, dw_project, g_x, e_sums, dw_expand, dw_depthwise = torch.ops.mnv2_fused.training_backward(
                centred, *kernel[:3], g, w_project, of_d_rows, ctx.count, w_input, kernel.block
            )
        else:
            sums, dw_project = torch.ops.mnv2_fused.training_backward_project(
                centred, *kernel[:3], g, w_project, of_d_rows, gate, kernel.block
            )
            if gate is not None:
                images = sums[:, :, : of_d.mean.shape[0]]
                of_mean, *grads[6:10] = differentiate(images[:, 0])
                of_image = of_mean / (g.shape[2] * g.shape[3])  # of each pixel
                of_pooled = padded(of_image).to(dtype)
                sums = torch.stack([(factors * images[:, i] + of_image * images[:, i + 1]).sum(0) for i in (1, 3)])
            if second.live:
                share = -of_d.scale / ctx.count * summed(second.group, sums.clone() if second.group else sums)
                of_d_rows = rows_of(of_d, dtype, share)
            g_x, e_sums, dw_expand, dw_depthwise = torch.ops.mnv2_fused.training_backward_expand(
                centred, *kernel[:3], g, w_project, of_d_rows, gate, of_pooled, w_input, kernel.block
            )
        grads[2] = dw_depthwise.mT.reshape(weights.depthwise.shape)
        grads[3] = of_conv_bias(weights.depthwise_bias, second, of_d, sums[0])
        grads[4] = dw_project.view(weights.project.shape)
        grads[5] = None if weights.project_bias is None else g.sum((0, 2, 3))
        grads[WEIGHTS + 2 :] = sums[1], sums[0]
        if of_e is not None and weights.expand is not None:
            w, s1a = matrix(weights.expand), e_sums[0]
            products = torch.addr(dw_expand.mT, s1a.to(dtype), given.rest.to(dtype), alpha=-1)  # G
            of_w = (w * products).sum(1, dtype=torch.float64)
            if first.live:
                s1b = of_w * of_e.inverse
                total_a, total_b = summed(first.group, torch.stack([s1a, s1b]))
                share = total_b * of_e.inverse / given.count
                # Of all processes' pixels, this one's.
                products -= scaled(share * count_of(centred), ctx.spread)
                if x_needed:
                    a = w.mT @ scaled(of_e.scale * share, w)
                    constant = (of_e.scale * total_a / given.count).to(dtype) @ w - a @ given.rest.to(dtype)
                    pixels(g_x).addmm_(pixels(centred), a, alpha=-1).sub_(constant)
            else:
                s1b = (of_w - of_e.mean * s1a) * of_e.inverse
            grads[0] = of_matrix(scaled(of_e.scale, products), weights.expand)
            grads[1] = of_conv_bias(weights.expand_bias, first, of_e, s1a)
            grads[WEIGHTS : WEIGHTS + 2] = s1b, s1a
        found = (None if t is None else _gradient_of(t, grad) for t, grad in zip(tensors, grads, strict=True))
        return g_x.to(x.dtype) if x_needed else None, None, None, None, *found


def _gradient_of(t: Tensor, grad: Tensor | None) -> Tensor | None:
    """In the dtype and strides of t, which DistributedDataParallel wants."""
    if grad is None or grad.stride() == t.stride():
        return None if grad is None else grad.to(t.dtype)
    return torch.empty_like(t).copy_(grad)


# Of act(e), d and q of 64 channels, where one group of channels goes through both passes backward before the next one:
# memory is slower than computing them again.
_NEAR = 2**23


def _near(spec: BlockSpec, x: Tensor) -> bool:
    """Whether what a group of channels keeps between the passes backward is soon read again."""
    pixels = x.shape[2] * x.shape[3] + 2 * math.prod(spec.out_size(*x.shape[2:]))
    return x.shape[0] * pixels * 64 * x.itemsize <= _NEAR


def _forward(
    x: Tensor, spec: BlockSpec, kernel: Kernel, weights: Weights, norm: Norm
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """p, or with a squeeze-and-excite the sums of h2 over each image; norm2's mean and variance [2, E]."""
    ones = torch.ones(weights.depthwise.shape[0], dtype=torch.float64)
    affine = torch.stack([*(o if t is None else t.double() for t, o in ((norm.weight, ones), (norm.bias, 0 * ones)))])
    gated = weights.reduce is not None
    result, d = torch.ops.mnv2_fused.training_forward(
        x, *kernel[:3], affine, norm.eps, None if gated else w_output(weights), kernel.block
    )
    if gated:
        return None, result, d
    if weights.project_bias is not None:
        result += weights.project_bias[:, None, None]
    return result, None, d


def _project_gated(
    x: Tensor, spec: BlockSpec, kernel: Kernel, weights: Weights, of_d: Affine, totals: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p, and the means of h2 over each image [N, E]. ``totals``: its sums where they are known."""
    e = of_d.scale.shape[0]
    arguments = (x, *kernel[:3], rows_of(of_d, x.dtype))
    sums = torch.ops.mnv2_fused.training_pool(*arguments, kernel.block) if totals is None else totals
    pooled = sums[:, :e] / math.prod(spec.out_size(*x.shape[2:]))
    gate = gate_of(pooled, weights[6:10], spec).to(x.dtype)
    p = torch.ops.mnv2_fused.training_project(*arguments, padded(gate), w_output(weights), kernel.block)
    if weights.project_bias is not None:
        p += weights.project_bias[:, None, None]
    return p, pooled


def _project(
    x: Tensor, spec: BlockSpec, w_expand: Tensor | None, b_expand: Tensor | None, weights: Weights, of_d: Affine
) -> Tensor:
    """p by the kernel of inference, both norms folded in."""
    e = of_d.scale.shape[0]
    bias = weights.project_bias
    folded = BlockWeights(
        None if w_expand is None else w_expand[..., None, None],
        None if b_expand is None else b_expand.to(x.dtype),
        (of_d.scale.view(e, 1, 1, 1) * weights.depthwise.double()).to(x.dtype),
        of_d.shift.to(x.dtype),
        weights.project.detach(),
        x.new_zeros(weights.project.shape[0]) if bias is None else bias.detach(),
    )
    packed = pack_block(folded, x.dtype, "cpu")
    return packed_inverted_residual(
        x, packed, spec.strides[0], False, backend="cpu", op_options=spec.options(*x.shape[2:])
    )
