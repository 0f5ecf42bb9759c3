"""Stages on integers of folded weights and of the scales around them."""

from __future__ import annotations

import torch
from torch import Tensor

from .floats import Affine
from .layers import CLIPS, HIGHEST, Stage
from .observers import ChannelScales

MOST_WEIGHT = 127
# Of a bias: sums beside it are below 2^25, so that an int32 holds both.
MOST_BIAS = 2.0**30
# Of float32(sum + bias) * multiplier, in units of the result: one that is far above the 255 it is clamped to, and far
# below 2^31, where a conversion to int32 ends.
MOST_RESULT = 2.0**24
_DEAD_BIAS = 2.0**20  # of a channel without weights: its bias is kept to a millionth


def _columns(values: Tensor, weight: Tensor) -> Tensor:
    """``values`` of the input's channels, or one of all, beside a weight: they are the rows of a depthwise one."""
    if values.dim() == 0:
        return values
    shape = (-1, 1, 1) if weight.dim() == 3 else (1, -1) + (1,) * (weight.dim() - 2)
    return values.view(shape)


def least_scales(affine: Affine, reach: Tensor) -> Tensor:
    """[C] float64: scales of a result whose quotients stay below ``MOST_RESULT``; ``reach``: of the input's channels
    the greatest magnitude that integers stand for."""
    weight = affine.weight.abs() * _columns(reach, affine.weight)
    return (weight.flatten(1).sum(1) + affine.bias.abs()) / MOST_RESULT


def reach_of(given: ChannelScales) -> Tensor:
    """The greatest magnitude that integers of these scales stand for."""
    return given.scale * max(given.zero, HIGHEST - given.zero)


def make_stage(affine: Affine, given: ChannelScales, result: ChannelScales, activation: str) -> Stage:
    """The stage from integers of the scales ``given``, of each channel or one [] of all, to those of ``result``."""
    weight = affine.weight * _columns(given.scale, affine.weight)
    rows = weight.flatten(1)
    scale = rows.abs().amax(1) / MOST_WEIGHT
    scale = scale.maximum(affine.bias.abs() / MOST_BIAS)
    out = result.scale.expand(scale.shape)
    dead = torch.where(affine.bias == 0, out, affine.bias.abs() / _DEAD_BIAS)
    scale = torch.where(rows.abs().amax(1) == 0, dead, scale)
    q = (rows / scale[:, None]).round().clamp(-MOST_WEIGHT, MOST_WEIGHT)
    bias = (affine.bias / scale).round() - given.zero * q.sum(1)
    is_clip = activation in CLIPS
    low, high = bounds(activation, out, result.zero)
    return Stage(
        q.to(torch.int8).view(weight.shape),
        bias.to(torch.int32),
        (scale / out if is_clip else scale).float(),
        low,
        high,
        result.zero,
        "identity" if is_clip else activation,
        None if is_clip else (1 / out).float(),
    )


def bounds(activation: str, scale: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Least and greatest q - zero behind an activation, float32 [C]."""
    low = torch.full(scale.shape, -float(zero), dtype=torch.float64)
    high = torch.full(scale.shape, float(HIGHEST - zero), dtype=torch.float64)
    if activation in ("relu", "relu6"):
        low = low.clamp(min=0)
    if activation == "relu6":
        high = high.minimum((6 / scale).round())
    return low.float(), high.float()
