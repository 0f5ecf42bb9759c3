"""A block in training on the CPU, whose norms take their statistics from the batch.

What runs on the kernels of ``csrc/cpu/training`` and never writes an expanded tensor, and what follows from their sums
in float64. With M pixels of x, and ``^`` for normalised values::

    e = W x        a1 = norm1(e)   h1 = act(a1)
    d = K * h1     a2 = norm2(d)   h2 = act(a2)      p = P h2

norm1's statistics need no pass over e: its mean is W times x's, its variance the diagonal of W cov(x) W'. norm2's take
one pass that sums d up. Backward, one pass sums up the gradient of a2 and its products with d^, another one goes on to
x. What norm1 adds to the gradients of W and x has a closed form in cov(x) and the sums G of products of a1's gradient
with x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .activations import function_of
from .encoding import BLOCK_FIELDS, shape_of
from .flops import count_flops
from .fold import PANEL, BlockWeights, pack_block
from .ops import packed_inverted_residual
from .spec import BlockSpec, stem_size

# Activations whose derivative the kernels know; csrc/cpu/training/derivative.h is the twin.
DIFFERENTIATED = ("relu6", "relu", "identity", "hardswish", "silu", "leaky_relu")


def objection(spec: BlockSpec) -> str | None:
    """Why no kernel trains this block, None if they do."""
    if spec.squeeze_channels:
        return "it has a squeeze-and-excite"
    activations = (spec.activation, spec.expanded_by) if spec.expand else (spec.activation,)
    for activation in activations:
        if activation not in DIFFERENTIATED:
            return f"no kernel has the derivative of {activation}"
    return None


class Norm(NamedTuple):
    """A norm with its parameters, and the statistics it uses: None for those of the batch."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float
    mean: Tensor | None = None  # [C]
    variance: Tensor | None = None  # [C]

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
        mean = norm.mean.double()
        return cls.of(norm, mean if conv_bias is None else mean - conv_bias.double(), norm.variance.double())

    @property
    def shift(self) -> Tensor:
        return self.bias - self.scale * self.mean


class _Moments(NamedTuple):
    """Of what an expansion multiplies, [N, C, H, W] less ``pilot``: what the norm behind it needs."""

    pilot: Tensor | None  # [C]: a mean, rounded to x's dtype
    rest: Tensor  # float64 [C]: the mean that is left
    covariance: Tensor | None = None  # float64 [C, C]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last order -> [N H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _moments(x: Tensor, weights: Weights) -> tuple[Tensor, _Moments]:
    """Of a float32 or float64 x: the mean is taken off before anything is squared."""
    x = _channels_last(x)
    mean = torch.ops.mnv2_fused.training_moments(x)[0].to(x.dtype)
    if _is_stem(weights):
        centred, pilot = _patches(x, mean), mean.repeat(9)
        _, total, products = torch.ops.mnv2_fused.training_centre(centred, None)
    else:
        pilot = mean
        centred, total, products = torch.ops.mnv2_fused.training_centre(x, _padded(pilot[None]))
    count = centred.shape[0] * centred.shape[2] * centred.shape[3]
    rest = total[0] / count
    return centred, _Moments(pilot, rest, products / count - torch.outer(rest, rest))


def _taken(x: Tensor, weights: Weights, pilot: Tensor | None = None) -> Tensor:
    """What the expansion multiplies, less ``pilot``, channels_last."""
    if _is_stem(weights):
        return _patches(x, None if pilot is None else pilot[: x.shape[1]])
    return _channels_last(x if pilot is None else x - pilot[:, None, None])


def _is_stem(weights: Weights) -> bool:
    return weights.expand is not None and weights.expand.shape[-1] > 1


def _panels(weight: Tensor) -> Tensor:
    """[C, K] -> [C/16, K, 16], zeros past the last channel."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL))
    return padded.view(-1, PANEL, weight.shape[1]).mT.contiguous()


def _padded(t: Tensor) -> Tensor:
    return F.pad(t, (0, -t.shape[-1] % PANEL))


class _Kernel(NamedTuple):
    """What every pass takes of a block."""

    w_expand: Tensor | None  # [E/16, C_in, 16], norm1's scale folded in
    b_expand: Tensor | None  # [E/16 * 16]
    w_depthwise: Tensor  # [E/16, taps, 16]
    block: list[int]


def _kernel(spec: BlockSpec, x: Tensor, w_expand: Tensor | None, b_expand: Tensor | None, w_depthwise: Tensor):
    dtype = x.dtype
    n, _, height, width = x.shape
    return _Kernel(
        None if w_expand is None else _panels(w_expand.to(dtype)),
        None if b_expand is None else _padded(b_expand.to(dtype)),
        _panels(w_depthwise.flatten(1)),
        list(shape_of(spec, n, height, width).values()),
    )


def _patches(x: Tensor, pilot: Tensor | None = None) -> Tensor:
    """[N, C, H, W] less ``pilot`` -> [N, 9 C, H', W'], channels_last: what a stem's 3x3 convolution of stride 2
    multiplies, by rows of the kernel, columns, channels. So that convolution is a product, as an expansion is.
    """
    n, c, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)
    if pilot is None:
        around = x.new_zeros(n, height + 2, width + 2, c)
        around[:, 1:-1, 1:-1] = pixels
    else:
        around = (-pilot).repeat(n, height + 2, width + 2, 1)
        torch.sub(pixels, pilot, out=around[:, 1:-1, 1:-1])
    image, row, _, _ = around.stride()
    size = stem_size(height), stem_size(width)
    windows = around.as_strided((n, *size, 3, 3 * c), (image, 2 * row, 2 * c, row, 1))
    return windows.reshape(n, *size, 9 * c).permute(0, 3, 1, 2)


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


def _weights_of(tensors: Sequence[Any]) -> Weights:
    return Weights(*tensors[:6])


class Statistics(NamedTuple):
    """Means and biased variances that norms took from the batch, float64 [E]; None of others."""

    expand: tuple[Tensor, Tensor] | None
    depthwise: tuple[Tensor, Tensor] | None


def projected(
    x: Tensor, weights: Weights, norms: tuple[Norm | None, Norm], spec: BlockSpec
) -> tuple[Tensor, Statistics]:
    """The block up to its projection's result p [N, C_out, H', W'], channels_last, with gradients; and what running
    statistics are updated by.

    ``norms``: behind the expansion, where there is one, and behind the depthwise convolution. Where a network's stem is
    the expansion, ``spec`` is that of its patches, and an image gets no gradient.
    """
    first, second = norms
    of_first = (None, None) if first is None else (first.weight, first.bias)
    p, *found = _Projected.apply(x, spec, norms, *weights, *of_first, second.weight, second.bias)
    means = iter(found)
    pairs = [(next(means), next(means)) if norm is not None and norm.live else None for norm in norms]
    return p, Statistics(*pairs)


class _Projected(torch.autograd.Function):
    """Keeps x, weights and a few numbers of each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: BlockSpec, norms: tuple[Norm | None, Norm], *tensors: Tensor | None) -> Any:
        weights = _weights_of(tensors)
        first, second = norms
        statistics: list[Tensor] = []
        of_e, w_expand, b_expand = None, None, None
        if weights.expand is None or first is None:
            centred, given = _channels_last(x), _Moments(None, x.new_zeros(0, dtype=torch.float64))
        else:
            w = _matrix(weights.expand).double()
            if first.live:
                centred, given = _moments(x, weights)
                assert given.pilot is not None and given.covariance is not None
                variance = ((w @ given.covariance) * w).sum(1).clamp(min=0)
                # Less the pilot's part, which is taken off x.
                of_e = _Affine.of(first, w @ given.rest, variance)
                mean = of_e.mean + w @ given.pilot.double()
                statistics += [mean if weights.expand_bias is None else mean + weights.expand_bias, variance]
            else:
                centred, given = _taken(x, weights), _Moments(None, w.new_zeros(w.shape[1]))
                of_e = _Affine.fixed(first, weights.expand_bias)
            w_expand, b_expand = of_e.scale[:, None] * w, of_e.shift
        kernel = _kernel(spec, centred, w_expand, b_expand, weights.depthwise)
        if second.live:
            d = torch.ops.mnv2_fused.training_statistics(centred, *kernel)
            of_d = _Affine.of(second, d[0], d[1])
            statistics += [d[0] if weights.depthwise_bias is None else d[0] + weights.depthwise_bias, d[1]]
        else:
            of_d = _Affine.fixed(second, weights.depthwise_bias)
        p = _project(centred, spec, w_expand, b_expand, weights, of_d)
        ctx.spec, ctx.norms, ctx.affines = spec, norms, (of_e, of_d)
        ctx.given = given
        ctx.save_for_backward(x, *tensors)
        ctx.mark_non_differentiable(*statistics)
        return p, *statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_torch(ctx, g, x, tensors)
        weights, spec, (of_e, of_d) = _weights_of(tensors), ctx.spec, ctx.affines
        first, second = ctx.norms
        dtype, given = x.dtype, ctx.given
        centred = _taken(x, weights, given.pilot)
        x_needed = ctx.needs_input_grad[0]
        w = w_expand = b_expand = None
        if of_e is not None and weights.expand is not None:
            w = _matrix(weights.expand).double()
            w_expand, b_expand = of_e.scale[:, None] * w, of_e.shift
        kernel = _kernel(spec, centred, w_expand, b_expand, weights.depthwise)
        g = _channels_last(g)
        pixels = g.shape[0] * g.shape[2] * g.shape[3]
        zero = torch.zeros_like(of_d.mean)

        def rows(offset: Tensor, slope: Tensor) -> Tensor:
            return _padded(torch.stack([of_d.scale, of_d.shift, of_d.mean, of_d.inverse, offset, slope])).to(dtype)

        w_project = _panels(weights.project.flatten(1).mT)
        sums, dw_project = torch.ops.mnv2_fused.training_backward_project(
            centred, *kernel[:3], g, w_project, rows(zero, zero), kernel.block
        )
        s2 = of_d.scale / pixels
        of_d_rows = rows(-s2 * sums[0], -s2 * sums[1]) if second.live else rows(zero, zero)
        w_input = None if w_expand is None or not x_needed else _panels(_padded_rows(w_expand).mT.to(dtype))
        g_x, e_sums, dw_expand, dw_depthwise = torch.ops.mnv2_fused.training_backward_expand(
            centred, *kernel[:3], g, w_project, of_d_rows, w_input, kernel.block
        )
        grads: list[Tensor | None] = [None] * len(tensors)
        grads[2] = dw_depthwise.mT.reshape(weights.depthwise.shape)
        grads[3] = _of_conv_bias(weights.depthwise_bias, second, of_d, sums[0])
        grads[4] = dw_project.view(weights.project.shape)
        grads[5] = None if weights.project_bias is None else g.sum((0, 2, 3))
        grads[8], grads[9] = sums[1].to(dtype), sums[0].to(dtype)
        if w is not None and of_e is not None and weights.expand is not None:
            s1a = e_sums[0]
            products = dw_expand.mT.double() - torch.outer(s1a, given.rest)  # G
            if first.live:
                s1b = (w * products).sum(1) * of_e.inverse
                correction = (s1b * of_e.inverse)[:, None] * (w @ given.covariance)
                grads[0] = of_e.scale[:, None] * (products - correction)
                if x_needed:
                    count = x.shape[0] * x.shape[2] * x.shape[3]
                    weighted = (of_e.scale * s1b * of_e.inverse / count)[:, None] * w
                    a = w.mT @ weighted
                    constant = w.mT @ (of_e.scale * s1a / count) - a @ given.rest
                    pixels_of = _pixels(g_x)
                    pixels_of.addmm_(_pixels(centred), a.to(dtype), alpha=-1).sub_(constant.to(dtype))
            else:
                s1b = ((w * products).sum(1) - of_e.mean * s1a) * of_e.inverse
                grads[0] = of_e.scale[:, None] * products
            grads[0] = _of_matrix(grads[0].to(dtype), weights.expand)
            grads[1] = _of_conv_bias(weights.expand_bias, first, of_e, s1a)
            grads[6], grads[7] = s1b.to(dtype), s1a.to(dtype)
        found = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
        return g_x if x_needed else None, None, None, *found


def normed(
    p: Tensor, norm: Norm, added: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # [N, C, H, W], the norm's statistics
    """norm(p), plus ``added``, by a norm that takes its statistics from the batch; with gradients."""
    y, mean, variance = _Normed.apply(p, norm.weight, norm.bias, norm.eps, added)
    return y, (mean, variance)


class _Normed(torch.autograd.Function):
    """Keeps p and a few numbers of each channel."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, added: Tensor | None
    ) -> Any:
        p = _channels_last(p)
        mean, variance = torch.ops.mnv2_fused.training_moments(p)
        affine = _Affine.of(Norm(weight, bias, eps), mean, variance)
        values = _padded(torch.stack([mean, affine.scale, affine.bias])).to(p.dtype)
        other = None if added is None else _channels_last(added)
        ctx.save_for_backward(p, weight, bias)
        ctx.affine, ctx.eps = affine, eps
        ctx.mark_non_differentiable(mean, variance)
        return torch.ops.mnv2_fused.training_normalise(p, values, other), mean, variance

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        p, weight, bias = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:3], False, False)
        added = g if ctx.needs_input_grad[4] else None
        if torch.is_grad_enabled():
            y = F.batch_norm(p, None, None, weight, bias, training=True, eps=ctx.eps)
            wanted = [t for t, need in zip((p, weight, bias), needs, strict=False) if need]
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            return (*(next(found) if need else None for need in needs[:3]), None, added)
        g, affine = _channels_last(g), ctx.affine
        rows = [affine.mean, affine.inverse]
        of_p = _padded(torch.stack(rows)).to(p.dtype)
        sums = torch.ops.mnv2_fused.training_gradient_sums(g, p, of_p)
        share = affine.scale / (p.shape[0] * p.shape[2] * p.shape[3])
        rows += [affine.scale, -share * sums[0], -share * sums[1]]
        g_p = torch.ops.mnv2_fused.training_gradient(g, p, _padded(torch.stack(rows)).to(p.dtype))
        grads = None if weight is None else sums[1].to(p.dtype), None if bias is None else sums[0].to(p.dtype)
        return g_p, *grads, None, added


def _padded_rows(t: Tensor) -> Tensor:
    return F.pad(t, (0, 0, 0, -t.shape[0] % PANEL))


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
        None if w_expand is None else w_expand.to(x.dtype)[..., None, None],
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
    weights, spec = _weights_of(tensors), ctx.spec
    affine = [tensors[6:8], tensors[8:10]]

    def normalised(y: Tensor, i: int) -> Tensor:
        norm = ctx.norms[i]
        return F.batch_norm(y, norm.mean, norm.variance, *affine[i], training=norm.live, eps=norm.eps)

    y = x
    if weights.expand is not None:
        of_stem = (2, 1) if _is_stem(weights) else ()  # stride and padding
        y = normalised(F.conv2d(y, weights.expand, weights.expand_bias, *of_stem), 0)
        y = function_of(spec.expanded_by, spec.negative_slope)(y)
    y = F.pad(y, spec.padding_of(*y.shape[2:]))
    groups = weights.depthwise.shape[0]
    y = F.conv2d(y, weights.depthwise, weights.depthwise_bias, spec.stride, 0, spec.dilation, groups)
    y = function_of(spec.activation, spec.negative_slope)(normalised(y, 1))
    y = F.conv2d(y, weights.project, weights.project_bias)
    wanted = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in (x, *tensors)]
    return grads[0], None, None, *grads[1:]


def _hidden(block: Sequence[int]) -> int:
    return block[4]  # of BLOCK_FIELDS


def _statistics_fake(x, w_expand, b_expand, w_depthwise, block):
    return x.new_empty(2, _hidden(block), dtype=torch.float64)


def _backward_project_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, block):
    e = _hidden(block)
    return x.new_empty(2, e, dtype=torch.float64), x.new_empty(g.shape[1], e)


def _backward_expand_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, w_input, block):
    e, taps = _hidden(block), w_depthwise.shape[1]
    channels = 0 if w_expand is None else x.shape[1]
    g_x = x.new_empty(0) if channels and w_input is None else _like(x)
    return g_x, x.new_empty(1, e, dtype=torch.float64), x.new_empty(channels, e), x.new_empty(taps, e)


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _moments_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.float64)


def _centre_fake(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    return (
        x.new_empty(0) if mean is None else _like(x),
        x.new_empty(1, c, dtype=torch.float64),
        x.new_empty(c, c, dtype=torch.float64),
    )


_FAKES: dict[str, Any] = {
    "training_statistics": _statistics_fake,
    "training_backward_project": _backward_project_fake,
    "training_backward_expand": _backward_expand_fake,
    "training_moments": _moments_fake,
    "training_centre": _centre_fake,
    "training_normalise": _like,
    "training_gradient_sums": _moments_fake,
    "training_gradient": _like,
}


def _counted(expand: int, depthwise: int, project: int) -> Callable[..., int]:
    """Multiply-adds of a pass that computes each product so many times; of the other arguments ``block`` is last."""

    def count(x: Tensor, w_expand: Tensor | None, b_expand: Tensor | None, w_depthwise: Tensor, *others: Any) -> int:
        block = dict(zip(BLOCK_FIELDS, others[-1], strict=True))
        height, width = block["height"], block["width"]
        left, right, top, bottom = (block[f"pad_{side}"] for side in ("left", "right", "top", "bottom"))
        extent, stride = block["dilation"] * (block["kernel"] - 1) + 1, block["stride"]
        rows = (height + top + bottom - extent) // stride + 1
        columns = (width + left + right - extent) // (block["column_stride"] or stride) + 1
        terms = 0 if w_expand is None else expand * x.shape[1] * height * width
        after = depthwise * block["kernel"] ** 2 + project * block["out_channels"]
        return x.shape[0] * block["hidden_channels"] * (terms + after * rows * columns)

    return count


def _none(*_: Any) -> int:
    return 0


_COUNTS: dict[str, Callable[..., int]] = {
    "training_statistics": _counted(1, 1, 0),
    "training_backward_project": _counted(1, 1, 2),
    "training_backward_expand": _counted(3, 3, 1),
    "training_centre": lambda x, mean: x.numel() * x.shape[1],
}

if backends._C is not None:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"mnv2_fused::{_name}", _fake)
        count_flops(getattr(torch.ops.mnv2_fused, _name), _COUNTS.get(_name, _none))
