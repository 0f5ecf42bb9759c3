"""A block, and a row of layers, as the integers that ops and planners in C++ take; ``csrc/layers.cpp`` is the twin."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .fold import conv_norms
from .spec import ACTIVATIONS, GATES, BlockSpec


class LayerKind(enum.IntEnum):
    """What a layer of the op's ``layers`` is; csrc/layers.h has its twin.

    Seven values tell of each layer: kind, C_in, E (of a block), C_out, stride, residual, and how many further ones
    follow. None do for what MobileNetV2 has. Else a block's are kernel, dilation, padding left, right, top and bottom
    (-1: "same"), activation, of the output, channels of a squeeze-and-excite, its activation and gate, and activation
    of a stem; another layer's is its activation. Numbers of activations and gates are their places in
    :data:`mnv2_fused.spec.ACTIVATIONS` and :data:`mnv2_fused.spec.GATES`.
    """

    BLOCK = 0
    BLOCK_WITHOUT_EXPAND = 1
    STEM_AND_BLOCK = 2
    POINTWISE = 3
    POOLED = 4
    LINEAR = 5


def split_layers(layers: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(the first six values, further ones) of each layer of the op's ``layers``."""
    first = 0
    while first < len(layers):
        end = first + 7 + layers[first + 6]
        yield layers[first : first + 6], layers[first + 7 : end]
        first = end


# Dilation, padding and activations of MobileNetV2's block: the op's defaults.
PLAIN_OPTIONS = (1, (), 0, 2, 1, 0)


def op_rest(spec: BlockSpec) -> list[int]:
    """What neither weights nor MobileNetV2's block tell of ``spec``; :func:`spec_of_rest` reads it."""
    if spec.options(8, 8) == ():
        return []
    padding = [-1] if isinstance(spec.padding, str) else list(spec.padding or ())
    names = spec.activation, spec.out_activation, spec.squeeze_activation
    return [spec.dilation, *map(ACTIVATIONS.index, names), GATES.index(spec.gate), *padding]


def make_spec(
    in_channels: int,
    hidden: int,
    out_channels: int,
    kernel: int,
    squeezed: int,
    stages: int,
    stride: int,
    residual: bool,
    rest: tuple[int, ...],
) -> BlockSpec:
    dilation, activation, out_activation, squeeze_activation, gate, *padding = rest or (1, 0, 2, 1, 0)
    sides: Any = "same" if padding == [-1] else tuple(padding) or None
    return BlockSpec(
        *(in_channels, hidden, out_channels, stride, stages == 3, residual, kernel, dilation),
        padding=sides,
        activation=ACTIVATIONS[activation],
        out_activation=ACTIVATIONS[out_activation],
        squeeze_channels=squeezed,
        squeeze_activation=ACTIVATIONS[squeeze_activation],
        gate=GATES[gate],
    )


cached_spec: Callable[..., BlockSpec] = functools.lru_cache(maxsize=1024)(make_spec)


def spec_of_rest(
    sources: Sequence[Any],  # tensors, or None for a bias that is not there
    stages: int,
    stride: int,
    residual: bool,
    rest: Sequence[int],
    make: Callable[..., BlockSpec] = cached_spec,
) -> BlockSpec:
    found, squeeze = conv_norms(sources, stages)
    shapes = [stage.weight.shape for stage in found]
    return make(
        shapes[0][1] if stages == 3 else shapes[0][0],
        *(shapes[-1][1], shapes[-1][0], shapes[-2][-1]),
        squeeze[0].weight.shape[0] if squeeze else 0,
        *(stages, stride, residual, tuple(rest)),
    )


def block_values(spec: BlockSpec, stem_activation: str) -> list[int]:
    """A block's further values in the op's ``layers``: none where all is as in MobileNetV2."""
    if not spec.beyond_mobilenet_v2 and stem_activation == "relu6":
        return []
    padding = [-1] * 4 if spec.padding == "same" else spec.padding_of(1, 1)
    activation, out, squeezed, stem = map(
        ACTIVATIONS.index, (spec.activation, spec.out_activation, spec.squeeze_activation, stem_activation)
    )
    gate = GATES.index(spec.gate)
    return [spec.kernel, spec.dilation, *padding, activation, out, spec.squeeze_channels, squeezed, gate, stem]


SQUEEZE_CHANNELS = 8  # their place among those


def shape_of(spec: BlockSpec, batch: int, height: int, width: int) -> tuple[int, ...]:
    """What the planners in C++ take of a block and its input."""
    return (
        *(batch, height, width, spec.in_channels, spec.hidden_channels, spec.out_channels),
        *(spec.stride, spec.expand, spec.residual, spec.kernel, spec.dilation),
        *spec.padding_of(height, width),
        *(ACTIVATIONS.index(spec.activation), ACTIVATIONS.index(spec.out_activation), spec.squeeze_channels),
        *(ACTIVATIONS.index(spec.squeeze_activation), GATES.index(spec.gate)),
    )
