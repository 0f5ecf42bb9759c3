"""Mean and covariance of what an expansion multiplies: what the norm behind it takes its statistics from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import channels_last, count_of, dtype_of, padded
from .norms import together
from .weights import Weights, is_stem

# Where the mean of a channel is more deviations away from 0, a pilot is taken off. Up to there rounding of products
# grows by a factor of 65, and stays below what torch's own statistics are off.
_FAR = 8.0


class Moments(NamedTuple):
    """Of what an expansion multiplies, [N, C, H, W] less ``pilot``: what the norm behind it needs."""

    pilot: Tensor | None  # [C]: about a mean, in the dtype that kernels compute in; None where no channel is _FAR
    rest: Tensor  # float64 [C]: the mean that is left
    covariance: Tensor | None = None  # float64 [C, C]
    count: float = 0.0  # pixels


def moments_of(x: Tensor, weights: Weights, group: Any) -> tuple[Tensor, Moments]:
    """A mean that is far from 0 is taken off before anything is squared."""
    x = channels_last(x)
    some = sorted({0, x.shape[0] // 2, x.shape[0] - 1})  # images: near enough, as the rest is taken off in float64
    means, variances = zip(*(torch.ops.mnv2_fused.training_moments(x[i : i + 1]) for i in some), strict=True)
    far = any((m * m > _FAR**2 * v).any() for m, v in zip(means, variances, strict=True))
    pilot = torch.stack(means).mean(0).to(x.dtype) if far else None
    if is_stem(weights):
        centred = torch.ops.mnv2_fused.training_patches(x, pilot)
        pilot = None if pilot is None else pilot.repeat(9)
        _, total, products = torch.ops.mnv2_fused.training_centre(centred, None)
    elif pilot is None:
        centred = x
        _, total, products = torch.ops.mnv2_fused.training_centre(x, None)
    else:
        centred, total, products = torch.ops.mnv2_fused.training_centre(x, padded(pilot[None]))
    own = count_of(centred)
    rest = total[0] / own
    covariance = products / own - torch.outer(rest, rest)
    if group is None:
        return centred, Moments(pilot, rest, covariance, own)
    off = 0.0 if pilot is None else pilot.double()
    count, mean, covariance = together(group, own, rest + off, covariance)
    return centred, Moments(pilot, mean - off, covariance, count)


def taken(x: Tensor, weights: Weights, pilot: Tensor | None = None) -> Tensor:
    """What the expansion multiplies, less ``pilot``, channels_last."""
    x = x.to(dtype_of(x))
    if is_stem(weights):
        return torch.ops.mnv2_fused.training_patches(channels_last(x), None if pilot is None else pilot[: x.shape[1]])
    return channels_last(x if pilot is None else x - pilot[:, None, None])
