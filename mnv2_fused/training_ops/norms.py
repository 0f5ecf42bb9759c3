"""Norms that take their statistics from the batch, of one process or of several; and those that do not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .layout import channels_last, count_of, dtype_of, padded, without_autocast


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


class Affine(NamedTuple):
    """What a norm does with given statistics, float64 [C]: scale * (v - mean) + bias."""

    mean: Tensor  # without the bias of the convolution in front
    variance: Tensor
    inverse: Tensor  # one over the standard deviation
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, norm: Norm, mean: Tensor, variance: Tensor) -> Affine:
        inverse = (variance + norm.eps).rsqrt()
        scale = inverse if norm.weight is None else inverse * norm.weight.double()
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
        return cls(mean, variance, inverse, scale, bias)

    @classmethod
    def fixed(cls, norm: Norm, conv_bias: Tensor | None) -> Affine:
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


def together(group: Any, count: float, mean: Tensor, squares: Tensor) -> tuple[float, Tensor, Tensor]:
    """Of the values of all processes: how many, their mean and their variance or covariance, from one process's own."""
    if group is None:
        return count, mean, squares
    totals = summed(group, torch.cat([mean * count, mean.new_tensor([count])]))
    total = float(totals[-1])
    of_all = totals[:-1] / total
    off = mean - of_all
    spread = squares + (off * off if squares.dim() == 1 else torch.outer(off, off))
    return total, of_all, summed(group, spread * count) / total


def summed(group: Any, t: Tensor) -> Tensor:
    """Over all processes."""
    if group is None:
        return t
    t = t.contiguous()
    dist.all_reduce(t, group=group)
    return t


def rows_of(of_d: Affine, dtype: torch.dtype, share: Tensor | None = None) -> Tensor:
    """What kernels take of the second norm. ``share`` [2, E]: what statistics of the batch add to the gradient of d,
    once and times its normalised value."""
    more = torch.zeros_like(of_d.mean).expand(2, -1) if share is None else share
    return padded(torch.stack([of_d.scale, of_d.shift, of_d.mean, of_d.inverse, *more])).to(dtype)


def normed(
    p: Tensor, norm: Norm, added: Tensor | None = None
) -> tuple[Tensor, Statistics]:  # [N, C, H, W], the norm's statistics
    """norm(p), plus ``added``, by a norm that takes its statistics from the batch; with gradients."""
    y, *found = _Normed.apply(p, norm.weight, norm.bias, norm.eps, norm.group, added)
    return y, Statistics(*found)


class _Normed(torch.autograd.Function):
    """Keeps p and a few numbers of each channel."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, p: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any, added: Tensor | None
    ) -> Any:
        ctx.save_for_backward(p, weight, bias)
        dtype = p.dtype if added is None else torch.promote_types(p.dtype, added.dtype)
        p = channels_last(p)
        mean, variance = torch.ops.mnv2_fused.training_moments(p)
        ctx.count, mean, variance = together(group, count_of(p), mean, variance)
        affine = Affine.of(Norm(weight, bias, eps), mean, variance)
        values = padded(torch.stack([mean, affine.scale, affine.bias])).to(p.dtype)
        other = None if added is None else channels_last(added.to(p.dtype))
        ctx.affine, ctx.eps, ctx.group = affine, eps, group
        ctx.added = None if added is None else added.dtype
        ctx.mark_non_differentiable(mean, variance)
        return torch.ops.mnv2_fused.training_normalise(p, values, other).to(dtype), mean, variance, ctx.count

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        p, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        added = g.to(ctx.added) if ctx.needs_input_grad[5] else None
        if torch.is_grad_enabled():
            refuse_group(ctx.group)
            dtype = dtype_of(p)
            given = (None if t is None else t.to(dtype) for t in (weight, bias))
            y = F.batch_norm(p.to(dtype), None, None, *given, training=True, eps=ctx.eps)
            wanted = [t for t, need in zip((p, weight, bias), needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, g.to(dtype), create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None, added)
        to, affine = p.dtype, ctx.affine
        p = channels_last(p)
        g = channels_last(g.to(p.dtype))
        rows = [affine.mean, affine.inverse]
        of_p = padded(torch.stack(rows)).to(p.dtype)
        sums = torch.ops.mnv2_fused.training_gradient_sums(g, p, of_p)
        total = summed(ctx.group, sums.clone() if ctx.group else sums)
        share = affine.scale / ctx.count
        rows += [affine.scale, -share * total[0], -share * total[1]]
        g_p = torch.ops.mnv2_fused.training_gradient(g, p, padded(torch.stack(rows)).to(p.dtype))
        grads = (None if t is None else s.to(t.dtype) for t, s in ((weight, sums[1]), (bias, sums[0])))
        return g_p.to(to), *grads, None, None, added


def refuse_group(group: Any) -> None:
    if group is not None:
        raise RuntimeError(
            "a norm whose statistics are those of several processes has no second derivative here (create_graph=True)"
        )


def of_conv_bias(bias: Tensor | None, norm: Norm | None, affine: Affine, total: Tensor) -> Tensor | None:
    """A norm with the batch's statistics takes a bias in front of it off again."""
    if bias is None:
        return None
    assert norm is not None
    return torch.zeros_like(bias) if norm.live else (affine.scale * total).to(bias.dtype)
