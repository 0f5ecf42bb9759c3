"""Layers on 8-bit integers as one row of bytes and integers: what ``mnv2_fused::int8_sequence`` takes.

``csrc/cpu/int8/sequence.cpp`` is the twin. Parts lie one after the other, each on cache lines of its own.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..activations import ACTIVATIONS
from ..activations import GATES as GATE_NAMES
from ..encoding import LayerKind, block_values
from .layers import Int8Layer, Quantizer, Squeeze, Stage

_PANEL, _LINE = 16, 64


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


def pack(layers: list[Int8Layer], depth: int, element: int) -> Tensor:
    """The weights of ``layers`` for kernels that read ``depth`` elements of ``element`` bytes side by side: [bytes]."""
    x, y = layers[0].x, layers[-1].y or Quantizer(1.0, 0)
    inverse = float(torch.ones((), dtype=torch.float32) / x.scale)
    parts = [_bytes(struct.pack("<fifi", inverse, x.zero, y.scale, y.zero))]
    for layer in layers:
        parts += _layer(layer, depth, element)
    return torch.cat([F.pad(part, (0, -part.numel() % _LINE)) for part in parts])


def layout() -> tuple[int, int]:
    """Depth and bytes of an element, of the instruction set in use."""
    return backends._C.int8_layout()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _view(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def _layer(layer: Int8Layer, depth: int, element: int) -> list[Tensor]:
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
        parts += _stage(layer.expand, _product(weight, depth, element, depth))
    if layer.depthwise is not None:
        parts += _stage(layer.depthwise, _taps(layer.depthwise.weight, depth, element))
    parts += _stage(layer.project, _product(layer.project.weight, depth, element))
    if squeeze is not None:
        parts += _squeeze(squeeze, depth, element)
    if layer.pool_scale is not None:
        parts.append(_channels(layer.pool_scale))
    return parts


def _squeeze(squeeze: Squeeze, depth: int, element: int) -> list[Tensor]:
    parts = [_channels(squeeze.mean_scale), _channels(squeeze.gated_scale)]
    for stage in (squeeze.reduce, squeeze.excite):
        parts += _stage(stage, _product(stage.weight, depth, element))
    return parts


def _stage(stage: Stage, weight: Tensor) -> list[Tensor]:
    scale = torch.ones_like(stage.multiplier) if stage.scale is None else stage.scale
    vectors = [_channels(t) for t in (stage.bias, stage.multiplier, stage.low, stage.high, scale)]
    header = _bytes(struct.pack("<ii", stage.zero, ACTIVATIONS.index(stage.activation)))
    return [header, _view(weight), *vectors]


def _channels(t: Tensor) -> Tensor:
    """A value of each channel, zeros up to a whole panel."""
    return _view(F.pad(t, (0, -t.numel() % _PANEL)))


def _stored(t: Tensor, element: int) -> Tensor:
    return t.to(torch.int8 if element == 1 else torch.int16)


def _product(weight: Tensor, depth: int, element: int, multiple: int = _PANEL) -> Tensor:
    """[C, K] -> [C/16, K/depth, 16, depth], with K up to a multiple."""
    c, k = weight.shape
    padded = F.pad(weight, (0, -k % multiple, 0, -c % _PANEL))
    panels = padded.view(-1, _PANEL, padded.shape[1] // depth, depth)
    return _stored(panels.permute(0, 2, 1, 3), element)


def _taps(weight: Tensor, depth: int, element: int) -> Tensor:
    """[E, k, k] -> [E/16, k, dots, 16, depth]: of each row the last taps first, zeros before the first tap."""
    e, k, _ = weight.shape
    padded = F.pad(weight, (-k % depth, 0, 0, 0, 0, -e % _PANEL))
    dots = padded.view(-1, _PANEL, k, padded.shape[2] // depth, depth).flip(3)
    return _stored(dots.permute(0, 2, 3, 1, 4), element)
