"""Layers on 8-bit integers as one row of bytes and integers: what ``mnv2_fused::int8_sequence`` takes.

``csrc/cpu/int8/sequence.cpp`` is the twin. Parts lie one after the other, each on cache lines of its own.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..activations import GATES as GATE_NAMES
from ..encoding import LayerKind, block_values
from ..spec import BlockSpec
from .layers import HIGHEST, Int8Layer, Quantizer, Squeeze, Stage

_PANEL, _QUAD, _LINE = 16, 4, 64
_MOST = 2.0**31 * 0.999  # of values before they are rounded to an int32, in float32


def geometry_of(layers: list[Int8Layer]) -> list[int]:
    """The op's ``layers``; activations do not matter there, since the stages have them."""
    values: list[int] = []
    for layer in layers:
        weight = layer.project.weight
        spec = layer.spec
        if spec is None:
            values += [layer.kind, weight.shape[1], 0, weight.shape[0], 1, 0, 0]
            continue
        stem = layer.kind is LayerKind.STEM_AND_BLOCK
        c_in = layer.expand.weight.shape[1] if stem and layer.expand is not None else spec.in_channels
        further = block_values(spec)
        values += [layer.kind, c_in, spec.hidden_channels, spec.out_channels, spec.strides[0], int(spec.residual)]
        values += [len(further), *further]
    return values


def pack(layers: list[Int8Layer]) -> Tensor:
    """The weights of ``layers``, of one layout for all instruction sets: [bytes]."""
    x, y = layers[0].x, layers[-1].y or Quantizer(1.0, 0)
    inverse = float(torch.ones((), dtype=torch.float32) / x.scale)
    parts = [_bytes(struct.pack("<fifi", inverse, x.zero, y.scale, y.zero))]
    for layer in layers:
        parts += _layer(layer)
    return torch.cat([F.pad(part, (0, -part.numel() % _LINE)) for part in parts])


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _view(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def _layer(layer: Int8Layer) -> list[Tensor]:
    squeeze = layer.squeeze
    pool_zero = layer.y.zero if layer.pool_scale is not None and layer.y is not None else 0
    header = struct.pack(
        "<ifiiii",
        layer.x.zero,
        layer.residual_scale,
        int(layer.y is None),
        pool_zero,
        squeeze.mean_zero if squeeze else 0,
        GATE_NAMES.index(squeeze.gate) if squeeze else 0,
    )
    parts = [_bytes(header)]
    if layer.expand is not None:
        weight = layer.expand.weight
        if weight.dim() == 4:  # of a stem: rows, columns, channels, as they lie in x
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        parts += _stage(layer.expand, _product(weight, _QUAD))
    if layer.depthwise is not None and layer.spec is not None:
        parts += _stage(layer.depthwise, _taps(layer.depthwise.weight, layer.spec))
    parts += _stage(layer.project, _product(layer.project.weight))
    if squeeze is not None:
        parts += _squeeze(squeeze)
    if layer.pool_scale is not None:
        parts.append(_channels(layer.pool_scale))
    return parts


def _squeeze(squeeze: Squeeze) -> list[Tensor]:
    parts = [_channels(squeeze.mean_scale), _channels(squeeze.gated_scale)]
    for stage in (squeeze.reduce, squeeze.excite):
        parts += _stage(stage, _product(stage.weight))
    return parts


def _stage(stage: Stage, weight: Tensor) -> list[Tensor]:
    scale = torch.ones_like(stage.multiplier) if stage.scale is None else stage.scale
    vectors = [_channels(t) for t in (stage.bias, stage.multiplier, stage.low, stage.high, scale)]
    header = struct.pack("<iii", stage.zero, ACTIVATIONS.index(stage.activation), int(_saturates(stage)))
    return [_bytes(header), _view(weight), *vectors]


def _saturates(stage: Stage) -> bool:
    """Whether bounds are those of a uint8, and no value leaves an int32 before they apply."""
    if stage.activation != "identity":
        return False
    most = HIGHEST * stage.weight.double().abs().flatten(1).sum(1) + stage.bias.double().abs()
    within = (most * stage.multiplier.double().abs() < _MOST).all()
    return bool(within and (stage.low == -stage.zero).all() and (stage.high == HIGHEST - stage.zero).all())


def _channels(t: Tensor) -> Tensor:
    """A value of each channel, zeros up to a whole panel."""
    return _view(F.pad(t, (0, -t.numel() % _PANEL)))


def _product(weight: Tensor, multiple: int = _PANEL) -> Tensor:
    """[C, K] -> [C/16, K/4, 16, 4], with K up to a multiple."""
    c, k = weight.shape
    padded = F.pad(weight, (0, -k % multiple, 0, -c % _PANEL))
    return padded.view(-1, _PANEL, padded.shape[1] // _QUAD, _QUAD).permute(0, 2, 1, 3)


def _taps(weight: Tensor, spec: BlockSpec) -> Tensor:
    """[E, k, k] -> [E/16, k, phases, dots, 16, 4]: the taps of a row where they lie in quads of columns.

    Quads begin at every second column, so at stride 1 there are two phases: the first tap at the first column of its
    quad, or at the second. Dilated, a quad has one tap alone.
    """
    e, k, _ = weight.shape
    phases, dots = (2 if spec.strides[1] == 1 else 1), (k if spec.dilation > 1 else -(-(k + 1) // _QUAD))
    padded = F.pad(weight, (0, 0, 0, 0, 0, -e % _PANEL)).view(-1, _PANEL, k, k)
    taps = weight.new_zeros(padded.shape[0], k, phases, dots, _PANEL, _QUAD)
    for phase in range(phases):
        for tap in range(k):
            column = phase + tap * spec.dilation
            dot, byte = (tap, column % 2) if spec.dilation > 1 else divmod(column, _QUAD)
            taps[:, :, phase, dot, :, byte] = padded[..., tap].transpose(1, 2)
    return taps
