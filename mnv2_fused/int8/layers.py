"""Layers on 8-bit integers: what every kernel computes, and the reference in plain torch that all of them equal.

A tensor of real values is uint8 with one scale and zero point: real = (q - zero) * scale. Weights are int8 with one
scale for each output channel and no zero point, in [-127, 127] where they are quantised here; kernels take -128, too,
which torch's have. Sums are int32 and exact. A :class:`Stage` is a convolution with what follows it, in float32 without
fused multiply-adds, each operation rounded to nearest even:

    v = float32(sum + bias) * multiplier
    v = function(v) * scale                      where the activation is no clip
    q = round(min(max(v, low), high)) + zero

NaN counts as ``low``. Padding holds the zero point of what is padded, which stands for 0.0. Scales of channels between
the stages of a block are part of ``multiplier``, ``scale`` and the next stage's weights: no kernel sees them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoding import LayerKind
from ..spec import BlockSpec

HIGHEST = 255  # of a uint8
STEM_STRIDE = 2


class Quantizer(NamedTuple):
    """How the uint8 of one tensor stand for reals: real = (q - zero) * scale."""

    scale: float
    zero: int

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest of float values: uint8."""
        scaled = x.to(torch.float32) * (torch.ones((), dtype=torch.float32) / self.scale)
        return (_rounded(scaled, -self.zero, HIGHEST - self.zero) + self.zero).to(torch.uint8)

    def dequantize(self, q: Tensor) -> Tensor:
        """float32."""
        return (q.to(torch.int32) - self.zero).to(torch.float32) * torch.tensor(self.scale, dtype=torch.float32)


class Stage(NamedTuple):
    """A convolution on integers and what follows it; see this module's docstring. ``C``: its output channels."""

    weight: Tensor  # int8, [C, terms] of a 1x1 product, [C, k, k] of a depthwise, [C, C_in, 3, 3] of a stem
    bias: Tensor  # int32 [C], with what the zero point of the stage's input adds
    multiplier: Tensor  # float32 [C]
    low: Tensor  # float32 [C], whole numbers: the least q - zero
    high: Tensor  # float32 [C]: the greatest
    zero: int  # of the result
    activation: str = "identity"  # a name of FUNCTIONS; clips are in low and high
    scale: Tensor | None = None  # float32 [C], one over the result's scale behind a function of FUNCTIONS

    def requantize(self, sums: Tensor, added: Tensor | None = None) -> Tensor:
        """uint8 of int32 ``sums`` [N, C, ...] without bias; ``added``: float32, joins behind the multiplier."""
        shape = (1, -1) + (1,) * (sums.dim() - 2)
        v = (sums + self.bias.view(shape)).to(torch.float32) * self.multiplier.view(shape)
        if self.activation != "identity":
            assert self.scale is not None
            v = FUNCTIONS[self.activation](v) * self.scale.view(shape)
        if added is not None:
            v = v + added
        return (_rounded(v, self.low.view(shape), self.high.view(shape)) + self.zero).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Squeeze:
    """Squeeze-and-excite: the mean of d over the pixels as uint8, two products, the gate in float32.

    mean = round(min(max(float32(sum of (d - zero of d)) * (mean_scale / float32(pixels)), low), high)) + mean_zero
    d' = round(min(max(float32(d - zero of d) * (gate * gated_scale), low), high)) + zero of d, in place of d
    """

    mean_scale: Tensor  # float32 [E]: a channel's scale of d over the scale of the mean
    mean_zero: int
    reduce: Stage
    excite: Stage  # only weight, bias and multiplier count: its result is float32, the gate's argument
    gate: str
    gated_scale: Tensor  # float32 [E]


@dataclasses.dataclass(frozen=True)
class Int8Layer:
    """One layer of a row on uint8 tensors in channels_last order."""

    kind: LayerKind
    x: Quantizer
    y: Quantizer | None  # None behind a linear layer whose result is float32
    project: Stage  # of a layer that is no block its only stage
    spec: BlockSpec | None = None  # of a block
    expand: Stage | None = None  # of a stem's layer the stem
    depthwise: Stage | None = None
    squeeze: Squeeze | None = None
    residual_scale: float = 0.0  # scale of x over that of y, of a block with a residual
    pool_scale: Tensor | None = None  # float32 [C] of a pooled layer, as mean_scale of a squeeze; y is the mean's


def _rounded(v: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """int32, to nearest even, of values within the bounds; NaN is the lower one."""
    low_t, high_t = (torch.as_tensor(bound, dtype=torch.float32) for bound in (low, high))
    v = torch.where(v > low_t, v, low_t)
    return torch.where(v < high_t, v, high_t).round().to(torch.int32)


def _float(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


_SIXTH = _float(1 / 6)


def hardswish(v: Tensor) -> Tensor:
    t = torch.clamp(v + 3, 0, 6)
    return (v * t) * _SIXTH


_LOG2_E, _LN2_HIGH, _LN2_LOW = _float(1.4426950408889634), _float(0.693359375), _float(-2.12194440054690583e-4)
# exp(r) for |r| <= ln(2) / 2, to an ulp or two of float32: Taylor's terms fitted to that interval.
_EXP = [_float(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)]
_EXP_LEAST, _EXP_MOST = -87.0, 87.0


def exponential(v: Tensor) -> Tensor:
    """e^v, of v clamped to [-87, 87], in the operations that every kernel repeats."""
    v = torch.clamp(v, _EXP_LEAST, _EXP_MOST)
    n = (v * _LOG2_E).round()
    r = (v - n * _LN2_HIGH) - n * _LN2_LOW
    p = _EXP[0]
    for c in _EXP[1:]:
        p = p * r + c
    p = (p * (r * r) + r) + 1
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def sigmoid(v: Tensor) -> Tensor:
    return 1 / (exponential(-v) + 1)


def silu(v: Tensor) -> Tensor:
    return v / (exponential(-v) + 1)


def hardsigmoid(v: Tensor) -> Tensor:
    return torch.clamp(v + 3, 0, 6) * _SIXTH


# Functions that are no clip, and gates. One name, one sequence of float32 operations.
FUNCTIONS = {"hardswish": hardswish, "silu": silu}
GATES = {"hardsigmoid": hardsigmoid, "sigmoid": sigmoid}
# Activations that bound q alone.
CLIPS = ("identity", "relu", "relu6")


def product(q: Tensor, weight: Tensor) -> Tensor:
    """int32 sums of a 1x1 product: q uint8 [N, K, ...], weight int8 [C, K]; exact."""
    n, k, *pixels = q.shape
    return torch.matmul(weight.double(), q.double().view(n, k, -1)).to(torch.int32).view(n, -1, *pixels)


def convolution(q: Tensor, weight: Tensor, padding: tuple[int, int, int, int], zero: int, **options: Any) -> Tensor:
    """int32 sums of a convolution; padding left, right, top, bottom holds ``zero``."""
    return F.conv2d(F.pad(q.double(), padding, value=zero), weight.double(), **options).to(torch.int32)


def run_reference(x: Tensor, layers: list[Int8Layer]) -> Tensor:
    """A row of layers: x float [N, C, H, W] -> float32, as every kernel computes it to the bit.

    float32 values pass between layers as integers alone. The result is [N, C, H', W'], behind a linear layer [N, C].
    """
    q = layers[0].x.quantize(x)
    for layer in layers:
        q = run_layer(q, layer)
    last = layers[-1]
    y = q if last.y is None else last.y.dequantize(q)
    return y.flatten(1) if last.kind is LayerKind.LINEAR else y


def run_layer(q: Tensor, layer: Int8Layer) -> Tensor:
    """uint8 [N, C, H, W] -> uint8, or float32 of a linear layer without y."""
    stage = layer.project
    if layer.spec is not None:
        return _run_block(q, layer, layer.spec)
    sums = product(q, stage.weight)
    if layer.y is None:
        shape = (1, -1, 1, 1)
        return (sums + stage.bias.view(shape)).to(torch.float32) * stage.multiplier.view(shape)
    y = stage.requantize(sums)
    if layer.pool_scale is None:
        return y
    return mean(y, stage.zero, layer.pool_scale, layer.y.zero)


def mean(q: Tensor, zero: int, scale: Tensor, mean_zero: int) -> Tensor:
    """uint8 [N, C, 1, 1] of uint8 [N, C, H, W]."""
    pixels = q.shape[2] * q.shape[3]
    sums = q.sum((2, 3), dtype=torch.int64).to(torch.int32) - pixels * zero
    v = sums.to(torch.float32) * (scale / _float(pixels))
    return (_rounded(v, -mean_zero, HIGHEST - mean_zero) + mean_zero).to(torch.uint8)[:, :, None, None]


def _run_block(q: Tensor, layer: Int8Layer, spec: BlockSpec) -> Tensor:
    x, zero = q, layer.x.zero
    if layer.kind is LayerKind.STEM_AND_BLOCK:
        assert layer.expand is not None
        sums = convolution(q, layer.expand.weight, (1, 1, 1, 1), zero, stride=STEM_STRIDE)
        q, zero = layer.expand.requantize(sums), layer.expand.zero
    elif layer.expand is not None:
        q, zero = layer.expand.requantize(product(q, layer.expand.weight)), layer.expand.zero
    depthwise = layer.depthwise
    assert depthwise is not None
    padding = spec.padding_of(*q.shape[2:])
    options = {"stride": spec.strides, "dilation": spec.dilation, "groups": q.shape[1]}
    sums = convolution(q, depthwise.weight[:, None], padding, zero, **options)
    d = depthwise.requantize(sums)
    if layer.squeeze is not None:
        d = _gated(d, depthwise, layer.squeeze)
    added = None
    if spec.residual:
        added = (x.to(torch.int32) - layer.x.zero).to(torch.float32) * _float(layer.residual_scale)
    return layer.project.requantize(product(d, layer.project.weight), added)


def _gated(d: Tensor, depthwise: Stage, s: Squeeze) -> Tensor:
    zero = depthwise.zero
    m = s.reduce.requantize(product(mean(d, zero, s.mean_scale, s.mean_zero), s.reduce.weight))
    shape = (1, -1, 1, 1)
    v = (product(m, s.excite.weight) + s.excite.bias.view(shape)).to(torch.float32) * s.excite.multiplier.view(shape)
    factor = GATES[s.gate](v) * s.gated_scale.view(shape)
    gated = (d.to(torch.int32) - zero).to(torch.float32) * factor
    return (_rounded(gated, -zero, HIGHEST - zero) + zero).to(torch.uint8)
