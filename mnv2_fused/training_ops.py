"""A block in training on the CPU, whose norms take their statistics from the batch.

What runs on the kernels of ``csrc/cpu/training`` and never writes an expanded tensor, and what follows from their sums
in float64. With M pixels of x, and ``^`` for normalised values::

    e = W x        a1 = norm1(e)   h1 = act(a1)
    d = K * h1     a2 = norm2(d)   h2 = act(a2)      p = P h2

norm1's statistics need no pass over e: its mean is W times x's, its variance the diagonal of W cov(x) W'. norm2's take
one pass that sums d up. Backward, one pass sums up the gradient of a2 and its products with d^, another one goes on to
x. What norm1 adds to the gradients of W and x has a closed form in cov(x) and the sums G of products of a1's gradient
with x.

Neither norm mixes channels: groups of expanded channels go through both passes of a direction one after the other, and
d of a group, backward h1 and q = P'g as well, stay in memory in between. Not so where a group's are large, where other
processes have to be asked in between, or a gate.

A squeeze-and-excite takes one pass more, which sums h2 up over each image; p = P (gate h2). Backward, five sums of each
image give the gate's gradient, and with it norm2's.

Kernels compute in float32 or float64. Tensors in half precision are converted where they are as wide as the block's own
input and result, and stay in half precision where they are kept for backward. Under autocast, too, every number inside
is a float32.

Norms of one process group take their statistics from the batches of all its processes: what they sum up is summed over
processes, in float64. Gradients of parameters are each process's part: their sum over processes is the gradient of the
sum of losses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .activations import ACTIVATIONS, function_of
from .encoding import BLOCK_FIELDS, shape_of
from .flops import count_flops
from .fold import PANEL, BlockWeights, pack_block
from .ops import packed_inverted_residual
from .spec import BlockSpec, stem_size

# Activations whose derivative the kernels know; csrc/cpu/training/derivative.h is the twin.
DIFFERENTIATED = ("relu6", "relu", "identity", "hardswish", "silu", "leaky_relu")
# Of these, whose results tell their derivatives; csrc/activations.h's is_clip is the twin.
_CLIPS = ("relu6", "relu", "identity")


def objection(spec: BlockSpec) -> str | None:
    """Why no kernel trains this block, None if they do."""
    activations = (spec.activation, spec.expanded_by) if spec.expand else (spec.activation,)
    for activation in activations:
        if activation not in DIFFERENTIATED:
            return f"no kernel has the derivative of {activation}"
    return None


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.autocast decorates, but with a context of each call: threads would share its state."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return call


class Norm(NamedTuple):
    """A norm with its parameters, and the statistics it uses: None for those of the batch."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float
    mean: Tensor | None = None  # [C]
    variance: Tensor | None = None  # [C]
    group: Any = None  # torch.distributed's, whose processes have statistics together

    @property
    def live(self) -> bool:
        return self.mean is None


class _Affine(NamedTuple):
    """What a norm does with given statistics, float64 [C]: scale * (v - mean) + bias."""

    mean: Tensor  # without the bias of the convolution in front
    variance: Tensor
    inverse: Tensor  # one over the standard deviation
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, norm: Norm, mean: Tensor, variance: Tensor) -> _Affine:
        inverse = (variance + norm.eps).rsqrt()
        scale = inverse if norm.weight is None else inverse * norm.weight.double()
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
        return cls(mean, variance, inverse, scale, bias)

    @classmethod
    def fixed(cls, norm: Norm, conv_bias: Tensor | None) -> _Affine:
        assert norm.mean is not None and norm.variance is not None
        # Copies: backward is of the statistics that forward had.
        mean, variance = (t.to(torch.float64, copy=True) for t in (norm.mean, norm.variance))
        return cls.of(norm, mean if conv_bias is None else mean - conv_bias.double(), variance)

    @property
    def shift(self) -> Tensor:
        return self.bias - self.scale * self.mean


class Statistics(NamedTuple):
    """What a norm took from the batch."""

    mean: Tensor  # float64 [C]
    variance: Tensor  # float64 [C], biased
    count: float  # of values in each channel


def _together(group: Any, count: float, mean: Tensor, squares: Tensor) -> tuple[float, Tensor, Tensor]:
    """Of the values of all processes: how many, their mean and their variance or covariance, from one process's own."""
    if group is None:
        return count, mean, squares
    totals = _summed(group, torch.cat([mean * count, mean.new_tensor([count])]))
    total = float(totals[-1])
    of_all = totals[:-1] / total
    off = mean - of_all
    spread = squares + (off * off if squares.dim() == 1 else torch.outer(off, off))
    return total, of_all, _summed(group, spread * count) / total


def _summed(group: Any, t: Tensor) -> Tensor:
    """Over all processes."""
    if group is None:
        return t
    t = t.contiguous()
    dist.all_reduce(t, group=group)
    return t


# Where the mean of a channel is more deviations away from 0, a pilot is taken off. Up to there rounding of products
# grows by a factor of 65, and stays below what torch's own statistics are off.
_FAR = 8.0


class _Moments(NamedTuple):
    """Of what an expansion multiplies, [N, C, H, W] less ``pilot``: what the norm behind it needs."""

    pilot: Tensor | None  # [C]: about a mean, in the dtype that kernels compute in; None where no channel is _FAR
    rest: Tensor  # float64 [C]: the mean that is left
    covariance: Tensor | None = None  # float64 [C, C]
    count: float = 0.0  # pixels


def _dtype_of(x: Tensor) -> torch.dtype:
    """What kernels compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _channels_last(x: Tensor) -> Tensor:
    """In the dtype that kernels compute in."""
    return x.to(_dtype_of(x)).contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last order -> [N H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _count(x: Tensor) -> int:
    """Values in each channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def _moments(x: Tensor, weights: Weights, group: Any) -> tuple[Tensor, _Moments]:
    """A mean that is far from 0 is taken off before anything is squared."""
    x = _channels_last(x)
    some = sorted({0, x.shape[0] // 2, x.shape[0] - 1})  # images: near enough, as the rest is taken off in float64
    means, variances = zip(*(torch.ops.mnv2_fused.training_moments(x[i : i + 1]) for i in some), strict=True)
    far = any((m * m > _FAR**2 * v).any() for m, v in zip(means, variances, strict=True))
    pilot = torch.stack(means).mean(0).to(x.dtype) if far else None
    if _is_stem(weights):
        centred = torch.ops.mnv2_fused.training_patches(x, pilot)
        pilot = None if pilot is None else pilot.repeat(9)
        _, total, products = torch.ops.mnv2_fused.training_centre(centred, None)
    elif pilot is None:
        centred = x
        _, total, products = torch.ops.mnv2_fused.training_centre(x, None)
    else:
        centred, total, products = torch.ops.mnv2_fused.training_centre(x, _padded(pilot[None]))
    own = _count(centred)
    rest = total[0] / own
    covariance = products / own - torch.outer(rest, rest)
    if group is None:
        return centred, _Moments(pilot, rest, covariance, own)
    off = 0.0 if pilot is None else pilot.double()
    count, mean, covariance = _together(group, own, rest + off, covariance)
    return centred, _Moments(pilot, mean - off, covariance, count)


def _taken(x: Tensor, weights: Weights, pilot: Tensor | None = None) -> Tensor:
    """What the expansion multiplies, less ``pilot``, channels_last."""
    x = x.to(_dtype_of(x))
    if _is_stem(weights):
        return torch.ops.mnv2_fused.training_patches(_channels_last(x), None if pilot is None else pilot[: x.shape[1]])
    return _channels_last(x if pilot is None else x - pilot[:, None, None])


def _is_stem(weights: Weights) -> bool:
    return weights.expand is not None and weights.expand.shape[-1] > 1


def _panels(weight: Tensor) -> Tensor:
    """[C, K] -> [C/16, K, 16], zeros past the last channel."""
    return _padded_rows(weight).reshape(-1, PANEL, weight.shape[1]).mT.contiguous()


def _padded(t: Tensor) -> Tensor:
    more = -t.shape[-1] % PANEL
    return F.pad(t, (0, more)) if more else t.contiguous()


def _padded_rows(t: Tensor) -> Tensor:
    more = -t.shape[0] % PANEL
    return F.pad(t, (0, 0, 0, more)) if more else t


class _Kernel(NamedTuple):
    """What every pass takes of a block."""

    w_expand: Tensor | None  # [E/16, C_in, 16], norm1's scale folded in
    b_expand: Tensor | None  # [E/16 * 16]
    w_depthwise: Tensor  # [E/16, taps, 16]
    block: list[int]


def _kernel(spec: BlockSpec, x: Tensor, w_expand: Tensor | None, b_expand: Tensor | None, w_depthwise: Tensor):
    dtype = x.dtype
    n, _, height, width = x.shape
    spec = dataclasses.replace(spec, squeeze_channels=0)  # its gate is an argument of its own
    return _Kernel(
        None if w_expand is None else _panels(w_expand),
        None if b_expand is None else _padded(b_expand.to(dtype)),
        _panels(w_depthwise.flatten(1)),
        list(shape_of(spec, n, height, width).values()),
    )


def _matrix(weight: Tensor) -> Tensor:
    """[E, C, k, k] -> [E, k k C], in the order of a patch."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _of_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """The other way round, in the shape of ``weight``."""
    e, c, *size = weight.shape
    return matrix.view(e, *size, c).permute(0, 3, 1, 2)


class Weights(NamedTuple):
    """The convolutions' own tensors."""

    expand: Tensor | None  # [E, C_in, 1, 1], of a stem [E, C, 3, 3]
    expand_bias: Tensor | None  # [E]
    depthwise: Tensor  # [E, 1, k, k]
    depthwise_bias: Tensor | None  # [E]
    project: Tensor  # [C_out, E, 1, 1]
    project_bias: Tensor | None  # [C_out]
    # Of a squeeze-and-excite.
    reduce: Tensor | None = None  # [S, E, 1, 1]
    reduce_bias: Tensor | None = None  # [S]
    excite: Tensor | None = None  # [E, S, 1, 1]
    excite_bias: Tensor | None = None  # [E]


_WEIGHTS = len(Weights._fields)


def _weights_of(tensors: Sequence[Any], dtype: torch.dtype) -> Weights:
    converted: list[Any] = [None if t is None else t.to(dtype) for t in tensors[:_WEIGHTS]]
    return Weights(*converted)


def _gate(pooled: Tensor, squeeze: Sequence[Tensor | None], spec: BlockSpec) -> Tensor:  # [N, E] both
    """The factors of a squeeze-and-excite. ``squeeze``: weight and bias of its two convolutions.

    In float64: how many threads torch's products are shared out among is lost when the result is rounded.
    """
    reduce, reduce_bias, excite, excite_bias = (None if t is None else t.double() for t in squeeze)
    assert reduce is not None and excite is not None
    s = F.linear(pooled, reduce.flatten(1), reduce_bias)
    s = function_of(spec.squeeze_activation, spec.negative_slope)(s)
    return function_of(spec.gate)(F.linear(s, excite.flatten(1), excite_bias))


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
    @_without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        spec: BlockSpec,
        norms: tuple[Norm | None, Norm],
        p_dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> Any:
        weights = _weights_of(tensors, _dtype_of(x))
        first, second = norms
        statistics: list[Any] = []
        of_e, w_expand, b_expand = None, None, None
        if weights.expand is None or first is None:
            centred, given = _channels_last(x), _Moments(None, x.new_zeros(0, dtype=torch.float64))
        else:
            w = _matrix(weights.expand)
            exact = w.double()
            if first.live:
                centred, given = _moments(x, weights, first.group)
                assert given.covariance is not None
                spread = exact @ given.covariance
                variance = (spread * exact).sum(1).clamp(min=0)
                ctx.spread = spread.to(w.dtype)
                # Less the pilot's part, which is taken off x.
                of_e = _Affine.of(first, exact @ given.rest, variance)
                mean = of_e.mean if given.pilot is None else of_e.mean + exact @ given.pilot.double()
                mean = mean if weights.expand_bias is None else mean + weights.expand_bias
                statistics += [mean, variance, given.count]
            else:
                centred, given = _taken(x, weights), _Moments(None, exact.new_zeros(w.shape[1]))
                of_e = _Affine.fixed(first, weights.expand_bias)
            w_expand, b_expand = _scaled(of_e.scale, w), of_e.shift
        kernel = _kernel(spec, centred, w_expand, b_expand, weights.depthwise)
        ctx.count = 0.0
        own = x.shape[0] * math.prod(spec.out_size(*centred.shape[2:]))
        p = totals = None
        if second.live and second.group is None:
            p, totals, d = _forward(centred, spec, kernel, weights, second)
            ctx.count, mean, variance = own, *d
        elif second.live:
            d = torch.ops.mnv2_fused.training_statistics(centred, *kernel)
            ctx.count, mean, variance = _together(second.group, own, *d)
        if second.live:
            of_d = _Affine.of(second, mean, variance)
            mean = mean if weights.depthwise_bias is None else mean + weights.depthwise_bias
            statistics += [mean, variance, ctx.count]
        else:
            of_d = _Affine.fixed(second, weights.depthwise_bias)
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
    @_without_autocast
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_torch(ctx, g, x, tensors)
        dtype, given = _dtype_of(x), ctx.given
        weights, spec, (of_e, of_d) = _weights_of(tensors, dtype), ctx.spec, ctx.affines
        first, second = ctx.norms
        centred = _taken(x, weights, given.pilot)
        x_needed = ctx.needs_input_grad[0]
        kernel = ctx.kernel
        g = _channels_last(g.to(dtype))
        grads: list[Tensor | None] = [None] * len(tensors)

        w_project = _panels(weights.project.flatten(1).mT)
        w_input = gate = of_pooled = None
        if of_e is not None and weights.expand is not None and x_needed:
            w_input = _panels(_padded_rows(_scaled(of_e.scale, _matrix(weights.expand))).mT)
        of_d_rows = _rows(of_d, dtype)
        if weights.reduce is not None:
            factors, differentiate = _differentiable_gate(ctx.pooled, weights, spec)
            gate = _padded(factors).to(dtype)
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
                of_pooled = _padded(of_image).to(dtype)
                sums = torch.stack([(factors * images[:, i] + of_image * images[:, i + 1]).sum(0) for i in (1, 3)])
            if second.live:
                share = -of_d.scale / ctx.count * _summed(second.group, sums.clone() if second.group else sums)
                of_d_rows = _rows(of_d, dtype, share)
            g_x, e_sums, dw_expand, dw_depthwise = torch.ops.mnv2_fused.training_backward_expand(
                centred, *kernel[:3], g, w_project, of_d_rows, gate, of_pooled, w_input, kernel.block
            )
        grads[2] = dw_depthwise.mT.reshape(weights.depthwise.shape)
        grads[3] = _of_conv_bias(weights.depthwise_bias, second, of_d, sums[0])
        grads[4] = dw_project.view(weights.project.shape)
        grads[5] = None if weights.project_bias is None else g.sum((0, 2, 3))
        grads[_WEIGHTS + 2 :] = sums[1], sums[0]
        if of_e is not None and weights.expand is not None:
            w, s1a = _matrix(weights.expand), e_sums[0]
            products = torch.addr(dw_expand.mT, s1a.to(dtype), given.rest.to(dtype), alpha=-1)  # G
            of_w = (w * products).sum(1, dtype=torch.float64)
            if first.live:
                s1b = of_w * of_e.inverse
                total_a, total_b = _summed(first.group, torch.stack([s1a, s1b]))
                share = total_b * of_e.inverse / given.count
                # Of all processes' pixels, this one's.
                products -= _scaled(share * _count(centred), ctx.spread)
                if x_needed:
                    a = w.mT @ _scaled(of_e.scale * share, w)
                    constant = (of_e.scale * total_a / given.count).to(dtype) @ w - a @ given.rest.to(dtype)
                    _pixels(g_x).addmm_(_pixels(centred), a, alpha=-1).sub_(constant)
            else:
                s1b = (of_w - of_e.mean * s1a) * of_e.inverse
            grads[0] = _of_matrix(_scaled(of_e.scale, products), weights.expand)
            grads[1] = _of_conv_bias(weights.expand_bias, first, of_e, s1a)
            grads[_WEIGHTS : _WEIGHTS + 2] = s1b, s1a
        found = (None if t is None else _gradient_of(t, grad) for t, grad in zip(tensors, grads, strict=True))
        return g_x.to(x.dtype) if x_needed else None, None, None, None, *found


def _scaled(scale: Tensor, rows: Tensor) -> Tensor:
    """Each row times its value, in the rows' dtype."""
    return scale.to(rows.dtype)[:, None] * rows


def _gradient_of(t: Tensor, grad: Tensor | None) -> Tensor | None:
    """In the dtype and strides of t, which DistributedDataParallel wants."""
    if grad is None or grad.stride() == t.stride():
        return None if grad is None else grad.to(t.dtype)
    return torch.empty_like(t).copy_(grad)


def _rows(of_d: _Affine, dtype: torch.dtype, share: Tensor | None = None) -> Tensor:
    """What kernels take of the second norm. ``share`` [2, E]: what statistics of the batch add to the gradient of d,
    once and times its normalised value."""
    more = torch.zeros_like(of_d.mean).expand(2, -1) if share is None else share
    return _padded(torch.stack([of_d.scale, of_d.shift, of_d.mean, of_d.inverse, *more])).to(dtype)


# Of act(e), d and q of 64 channels, where one group of channels goes through both passes backward before the next one:
# memory is slower than computing them again.
_NEAR = 2**23


def _near(spec: BlockSpec, x: Tensor) -> bool:
    """Whether what a group of channels keeps between the passes backward is soon read again."""
    pixels = x.shape[2] * x.shape[3] + 2 * math.prod(spec.out_size(*x.shape[2:]))
    return x.shape[0] * pixels * 64 * x.itemsize <= _NEAR


def _forward(
    x: Tensor, spec: BlockSpec, kernel: _Kernel, weights: Weights, norm: Norm
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """p, or with a squeeze-and-excite the sums of h2 over each image; norm2's mean and variance [2, E]."""
    ones = torch.ones(weights.depthwise.shape[0], dtype=torch.float64)
    affine = torch.stack([*(o if t is None else t.double() for t, o in ((norm.weight, ones), (norm.bias, 0 * ones)))])
    gated = weights.reduce is not None
    result, d = torch.ops.mnv2_fused.training_forward(
        x, *kernel[:3], affine, norm.eps, None if gated else _w_output(weights), kernel.block
    )
    if gated:
        return None, result, d
    if weights.project_bias is not None:
        result += weights.project_bias[:, None, None]
    return result, None, d


def _w_output(weights: Weights) -> Tensor:
    return _panels(_padded(weights.project.flatten(1)))


def _project_gated(
    x: Tensor, spec: BlockSpec, kernel: _Kernel, weights: Weights, of_d: _Affine, totals: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p, and the means of h2 over each image [N, E]. ``totals``: its sums where they are known."""
    e = of_d.scale.shape[0]
    arguments = (x, *kernel[:3], _rows(of_d, x.dtype))
    sums = torch.ops.mnv2_fused.training_pool(*arguments, kernel.block) if totals is None else totals
    pooled = sums[:, :e] / math.prod(spec.out_size(*x.shape[2:]))
    gate = _gate(pooled, weights[6:10], spec).to(x.dtype)
    p = torch.ops.mnv2_fused.training_project(*arguments, _padded(gate), _w_output(weights), kernel.block)
    if weights.project_bias is not None:
        p += weights.project_bias[:, None, None]
    return p, pooled


def _differentiable_gate(
    pooled: Tensor, weights: Weights, spec: BlockSpec
) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
    """The gate [N, E] in float64, and what turns its gradient into those of ``pooled`` [N, E] and of its weights."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (pooled, *weights[6:10])]
    with torch.enable_grad():
        first = leaves[0]
        assert first is not None
        gate = _gate(first, leaves[1:], spec)

    def differentiate(g: Tensor) -> list[Any]:
        found = iter(torch.autograd.grad(gate, [t for t in leaves if t is not None], g))
        return [None if t is None else next(found) for t in leaves]

    return gate.detach(), differentiate


def normed(
    p: Tensor, norm: Norm, added: Tensor | None = None
) -> tuple[Tensor, Statistics]:  # [N, C, H, W], the norm's statistics
    """norm(p), plus ``added``, by a norm that takes its statistics from the batch; with gradients."""
    y, *found = _Normed.apply(p, norm.weight, norm.bias, norm.eps, norm.group, added)
    return y, Statistics(*found)


class _Normed(torch.autograd.Function):
    """Keeps p and a few numbers of each channel."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, p: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any, added: Tensor | None
    ) -> Any:
        ctx.save_for_backward(p, weight, bias)
        dtype = p.dtype if added is None else torch.promote_types(p.dtype, added.dtype)
        p = _channels_last(p)
        mean, variance = torch.ops.mnv2_fused.training_moments(p)
        ctx.count, mean, variance = _together(group, _count(p), mean, variance)
        affine = _Affine.of(Norm(weight, bias, eps), mean, variance)
        values = _padded(torch.stack([mean, affine.scale, affine.bias])).to(p.dtype)
        other = None if added is None else _channels_last(added.to(p.dtype))
        ctx.affine, ctx.eps, ctx.group = affine, eps, group
        ctx.added = None if added is None else added.dtype
        ctx.mark_non_differentiable(mean, variance)
        return torch.ops.mnv2_fused.training_normalise(p, values, other).to(dtype), mean, variance, ctx.count

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        p, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        added = g.to(ctx.added) if ctx.needs_input_grad[5] else None
        if torch.is_grad_enabled():
            _refuse_group(ctx.group)
            dtype = _dtype_of(p)
            given = (None if t is None else t.to(dtype) for t in (weight, bias))
            y = F.batch_norm(p.to(dtype), None, None, *given, training=True, eps=ctx.eps)
            wanted = [t for t, need in zip((p, weight, bias), needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, g.to(dtype), create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None, added)
        to, affine = p.dtype, ctx.affine
        p = _channels_last(p)
        g = _channels_last(g.to(p.dtype))
        rows = [affine.mean, affine.inverse]
        of_p = _padded(torch.stack(rows)).to(p.dtype)
        sums = torch.ops.mnv2_fused.training_gradient_sums(g, p, of_p)
        total = _summed(ctx.group, sums.clone() if ctx.group else sums)
        share = affine.scale / ctx.count
        rows += [affine.scale, -share * total[0], -share * total[1]]
        g_p = torch.ops.mnv2_fused.training_gradient(g, p, _padded(torch.stack(rows)).to(p.dtype))
        grads = (None if t is None else s.to(t.dtype) for t, s in ((weight, sums[1]), (bias, sums[0])))
        return g_p.to(to), *grads, None, None, added


def _refuse_group(group: Any) -> None:
    if group is not None:
        raise RuntimeError(
            "a norm whose statistics are those of several processes has no second derivative here (create_graph=True)"
        )


def _of_conv_bias(bias: Tensor | None, norm: Norm | None, affine: _Affine, total: Tensor) -> Tensor | None:
    """A norm with the batch's statistics takes a bias in front of it off again."""
    if bias is None:
        return None
    assert norm is not None
    return torch.zeros_like(bias) if norm.live else (affine.scale * total).to(bias.dtype)


def _project(
    x: Tensor, spec: BlockSpec, w_expand: Tensor | None, b_expand: Tensor | None, weights: Weights, of_d: _Affine
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


def _by_torch(ctx: Any, g: Tensor, x: Tensor, tensors: Sequence[Tensor | None]) -> Any:
    """The same by torch's own derivatives, which have derivatives themselves."""
    dtype = _dtype_of(x)
    weights, spec = _weights_of(tensors, dtype), ctx.spec

    def normalised(y: Tensor, i: int) -> Tensor:
        norm, affine = ctx.norms[i], tensors[_WEIGHTS + 2 * i : _WEIGHTS + 2 * i + 2]
        _refuse_group(norm.group)
        if not norm.live and norm.eps == 0.0:  # a convolution alone
            return y
        mean, variance, *affine = (None if t is None else t.to(dtype) for t in (norm.mean, norm.variance, *affine))
        return F.batch_norm(y, mean, variance, *affine, training=norm.live, eps=norm.eps)

    y = x.to(dtype)
    if weights.expand is not None:
        of_stem = (2, 1) if _is_stem(weights) else ()  # stride and padding
        y = normalised(F.conv2d(y, weights.expand, weights.expand_bias, *of_stem), 0)
        y = function_of(spec.expanded_by, spec.negative_slope)(y)
    y = F.pad(y, spec.padding_of(*y.shape[2:]))
    groups = weights.depthwise.shape[0]
    y = F.conv2d(y, weights.depthwise, weights.depthwise_bias, spec.stride, 0, spec.dilation, groups)
    y = function_of(spec.activation, spec.negative_slope)(normalised(y, 1))
    if weights.reduce is not None:
        y = y * _gate(y.mean((2, 3)).double(), weights[6:10], spec).to(dtype)[..., None, None]
    y = F.conv2d(y, weights.project, weights.project_bias)
    wanted = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, g.to(dtype), create_graph=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in (x, *tensors)]
    return grads[0], None, None, None, *grads[1:]


def _hidden(block: Sequence[int]) -> int:
    return block[4]  # of BLOCK_FIELDS


def _statistics_fake(x, w_expand, b_expand, w_depthwise, block):
    return x.new_empty(2, _hidden(block), dtype=torch.float64)


def _pool_fake(x, w_expand, b_expand, w_depthwise, of_d, block):
    return x.new_empty(x.shape[0], of_d.shape[1], dtype=torch.float64)


def _project_fake(x, w_expand, b_expand, w_depthwise, of_d, gate, w_output, block):
    fields = dict(zip(BLOCK_FIELDS, block, strict=True))
    size = fields["out_channels"], *_out_size(fields)
    return x.new_empty(x.shape[0], *size).contiguous(memory_format=torch.channels_last)


def _forward_fake(x, w_expand, b_expand, w_depthwise, affine, eps, w_output, block):
    statistics = x.new_empty(2, _hidden(block), dtype=torch.float64)
    if w_output is None:
        return x.new_empty(x.shape[0], w_depthwise.shape[0] * PANEL, dtype=torch.float64), statistics
    return _project_fake(x, w_expand, b_expand, w_depthwise, None, None, w_output, block), statistics


def _backward_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, count, w_input, block):
    arguments = (x, w_expand, b_expand, w_depthwise, g, w_project, of_d, None)
    return (
        *_backward_project_fake(*arguments, block),
        *_backward_expand_fake(*arguments, None, w_input, block),
    )


def _backward_project_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, gate, block):
    e = _hidden(block)
    size = (2, e) if gate is None else (x.shape[0], 5, of_d.shape[1])
    return x.new_empty(size, dtype=torch.float64), x.new_empty(g.shape[1], e)


def _backward_expand_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, gate, of_pooled, w_input, block):
    e, taps = _hidden(block), w_depthwise.shape[1]
    channels = 0 if w_expand is None else x.shape[1]
    g_x = x.new_empty(0) if channels and w_input is None else _like(x)
    return g_x, x.new_empty(1, e, dtype=torch.float64), x.new_empty(channels, e), x.new_empty(taps, e)


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _moments_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.float64)


def _patches_fake(x: Tensor, mean: Tensor | None) -> Tensor:
    n, c, height, width = x.shape
    return x.new_empty(n, 9 * c, stem_size(height), stem_size(width)).contiguous(memory_format=torch.channels_last)


def _centre_fake(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    return (
        x.new_empty(0) if mean is None else _like(x),
        x.new_empty(1, c, dtype=torch.float64),
        x.new_empty(c, c, dtype=torch.float64),
    )


_FAKES: dict[str, Any] = {
    "training_statistics": _statistics_fake,
    "training_pool": _pool_fake,
    "training_project": _project_fake,
    "training_backward_project": _backward_project_fake,
    "training_backward_expand": _backward_expand_fake,
    "training_forward": _forward_fake,
    "training_backward": _backward_fake,
    "training_moments": _moments_fake,
    "training_patches": _patches_fake,
    "training_centre": _centre_fake,
    "training_normalise": _like,
    "training_gradient_sums": _moments_fake,
    "training_gradient": _like,
}


def _out_size(block: dict[str, int]) -> tuple[int, int]:
    height, width = block["height"], block["width"]
    left, right, top, bottom = (block[f"pad_{side}"] for side in ("left", "right", "top", "bottom"))
    extent, stride = block["dilation"] * (block["kernel"] - 1) + 1, block["stride"]
    columns = (width + left + right - extent) // (block["column_stride"] or stride) + 1
    return (height + top + bottom - extent) // stride + 1, columns


def _counted(expand: int, depthwise: int, project: int) -> Callable[..., int]:
    """Multiply-adds of a pass that computes each product so many times; of the other arguments ``block`` is last."""

    def count(x: Tensor, w_expand: Tensor | None, b_expand: Tensor | None, w_depthwise: Tensor, *others: Any) -> int:
        block = dict(zip(BLOCK_FIELDS, others[-1], strict=True))
        height, width = block["height"], block["width"]
        rows, columns = _out_size(block)
        terms = 0 if w_expand is None else expand * x.shape[1] * height * width
        after = depthwise * block["kernel"] ** 2 + project * block["out_channels"]
        return x.shape[0] * block["hidden_channels"] * (terms + after * rows * columns)

    return count


def _forward_count(*arguments: Any) -> int:
    gated = arguments[6] is None  # w_output
    return _counted(1, 1, 0 if gated else 1)(*arguments)


def _backward_count(*arguments: Any) -> int:
    """Where act(e) does not tell the derivative, the second pass expands again."""
    block = dict(zip(BLOCK_FIELDS, arguments[-1], strict=True))
    clips = ACTIVATIONS[block["expand_activation"]] in _CLIPS
    return _counted(3 if clips else 4, 3, 2)(*arguments)


def _none(*_: Any) -> int:
    return 0


_COUNTS: dict[str, Callable[..., int]] = {
    "training_statistics": _counted(1, 1, 0),
    "training_pool": _counted(1, 1, 0),
    "training_project": _counted(1, 1, 1),
    "training_forward": _forward_count,
    "training_backward": _backward_count,
    "training_backward_project": _counted(1, 1, 2),
    "training_backward_expand": _counted(3, 3, 1),
    "training_centre": lambda x, mean: x.numel() * x.shape[1],
}

if backends._C is not None:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"mnv2_fused::{_name}", _fake)
        count_flops(getattr(torch.ops.mnv2_fused, _name), _COUNTS.get(_name, _none))
