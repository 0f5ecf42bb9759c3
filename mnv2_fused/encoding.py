"""A block, and a row of layers, as the integers that ops and planners in C++ take; ``csrc/layers.cpp`` is the twin."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import backends
from .activations import ACTIVATIONS, GATES, LEAKY_RELU, NEGATIVE_SLOPE, slope_bits, slope_of_bits
from .fold import conv_norms
from .spec import BlockSpec


class LayerKind(enum.IntEnum):
    """What a layer of the op's ``layers`` is; csrc/layers.h has its twin.

    Seven values tell of each layer: kind, C_in, E (of a block), C_out, stride, residual, and how many further ones
    follow. None do for what MobileNetV2 has. Else a block's are kernel, dilation, padding left, right, top and bottom
    (-1: "same"), activation, of the output, channels of a squeeze-and-excite, its activation and gate, and activation
    of a stem; another layer's is its activation. Where one of them is a "leaky_relu", the bits of its slope follow,
    of a double; of a block three more may follow that, :attr:`mnv2_fused.spec.BlockSpec.last_values`. Numbers of
    activations and gates are their places in :data:`mnv2_fused.activations.ACTIVATIONS` and
    :data:`mnv2_fused.activations.GATES`.
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
    """What neither weights nor MobileNetV2's block tell of ``spec``; :func:`spec_of_rest` reads it.

    Dilation, activation, of the output, of a squeeze-and-excite, its gate; then padding, of no, one (-1: "same") or
    four values; then a slope, where there is one. With :attr:`BlockSpec.last_values` behind them there are 13 of all:
    four of padding (-2: None), and a slope.
    """
    if spec.options(8, 8) == ():
        return []
    padding = [-1] if isinstance(spec.padding, str) else list(spec.padding or ())
    names = spec.activation, spec.out_activation, spec.squeeze_activation
    slope = [slope_bits(spec.negative_slope)] if spec.has_slope else []
    last = spec.last_values
    if last:
        slope = [slope_bits(spec.negative_slope)]
        padding = (padding or [_NO_PADDING]) * (1 if len(padding) == 4 else 4)
    return [spec.dilation, *map(ACTIVATIONS.index, names), GATES.index(spec.gate), *padding, *slope, *last]


_NO_PADDING, _ALL_VALUES = -2, 13


def rest_activates_sum(rest: Sequence[int]) -> bool:
    """:attr:`BlockSpec.activates_sum` of what :func:`op_rest` made."""
    return len(rest) == _ALL_VALUES and bool(rest[-1])


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
    negative_slope = NEGATIVE_SLOPE
    expand_activation, column_stride, activates_sum = -1, 0, 0
    if len(rest) == _ALL_VALUES:
        *padding, bits, expand_activation, column_stride, activates_sum = padding
        negative_slope = slope_of_bits(bits)
        padding = [] if padding[0] == _NO_PADDING else padding[:1] if padding[0] == -1 else padding
    elif ACTIVATIONS.index(LEAKY_RELU) in (activation, out_activation, squeeze_activation if squeezed else -1):
        *padding, bits = padding
        negative_slope = slope_of_bits(bits)
    sides: Any = "same" if padding == [-1] else tuple(padding) or None
    return BlockSpec(
        *(in_channels, hidden, out_channels, (stride, column_stride) if column_stride else stride),
        *(stages == 3, residual, kernel, dilation),
        padding=sides,
        activation=ACTIVATIONS[activation],
        out_activation=ACTIVATIONS[out_activation],
        squeeze_channels=squeezed,
        squeeze_activation=ACTIVATIONS[squeeze_activation],
        gate=GATES[gate],
        negative_slope=negative_slope,
        expand_activation=None if expand_activation == -1 else ACTIVATIONS[expand_activation],
        activates_sum=bool(activates_sum),
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


def block_values(spec: BlockSpec, stem_activation: str = "relu6", stem_slope: float = NEGATIVE_SLOPE) -> list[int]:
    """A block's further values in the op's ``layers``: none where all is as in MobileNetV2.

    Raises ValueError where block and stem have slopes that differ: one kernel computes both.
    """
    if not spec.beyond_mobilenet_v2 and stem_activation == "relu6":
        return []
    padding = [-1] * 4 if spec.padding == "same" else spec.padding_of(1, 1)
    activation, out, squeezed, stem = map(
        ACTIVATIONS.index, (spec.activation, spec.out_activation, spec.squeeze_activation, stem_activation)
    )
    gate = GATES.index(spec.gate)
    values = [spec.kernel, spec.dilation, *padding, activation, out, spec.squeeze_channels, squeezed, gate, stem]
    slopes = {spec.negative_slope} if spec.has_slope else set()
    if stem_activation == LEAKY_RELU:
        slopes.add(stem_slope)
    if spec.last_values:
        slopes = slopes or {NEGATIVE_SLOPE}
    if len(slopes) > 1:
        raise ValueError(f"one kernel has one negative_slope, got {sorted(slopes)} of a block and the stem before it")
    return [*values, *map(slope_bits, slopes), *spec.last_values]


def layer_values(usual: str, activation: str, negative_slope: float = NEGATIVE_SLOPE) -> list[int]:
    """The same of a layer that is no block: none where its activation is the ``usual`` one."""
    if activation == usual:
        return []
    return [ACTIVATIONS.index(activation), *([slope_bits(negative_slope)] if activation == LEAKY_RELU else [])]


SQUEEZE_CHANNELS, COLUMN_STRIDE = 8, 14  # their places among those


# The fields of a block, in the order of csrc/block.h, and what they are where nothing else is said.
BLOCK_FIELDS = {
    **dict.fromkeys(("batch", "height", "width", "in_channels", "hidden_channels", "out_channels", "stride"), 0),
    "expand": 0,  # of EXPANDS
    "residual": 0,
    **dict.fromkeys(("image_height", "image_width"), 0),  # of what a stem in front takes
    "kernel": 3,
    "dilation": 1,
    **dict.fromkeys(("pad_left", "pad_right", "pad_top", "pad_bottom"), 1),
    "activation": ACTIVATIONS.index("relu6"),
    "expand_activation": ACTIVATIONS.index("relu6"),
    "out_activation": ACTIVATIONS.index("identity"),
    "squeeze_channels": 0,
    "squeeze_activation": ACTIVATIONS.index("relu"),
    "gate": GATES.index("hardsigmoid"),
    "negative_slope": slope_bits(NEGATIVE_SLOPE),
    "column_stride": 0,
    "activates_sum": 0,
}
EXPANDS = ("none", "pointwise", "stem")


def library_differs() -> str | None:
    """What the compiled library takes otherwise than this file says, in words; None where they agree."""
    if backends._C is None:
        return None
    tables = {
        "fields of a block": (list(BLOCK_FIELDS.items()), backends._C.block_fields()),
        "activations": (list(ACTIVATIONS), backends._C.activations()),
        "gates": (list(GATES), backends._C.gates()),
    }
    for what, (here, there) in tables.items():
        if here != there:
            return f"its {what} are {there}, here they are {here}: build it again"
    return None


if (_why := library_differs()) is not None:
    backends.refuse_library(_why)


def shape_of(
    spec: BlockSpec, batch: int, height: int, width: int, stem: tuple[str, int, int, int] | None = None
) -> dict[str, int]:
    """The fields of a block on an expanded tensor of this size: what the planners in C++ take.

    ``stem``: activation of a network's stem in front, that runs in the same kernel, and channels, height and width of
    the image that it takes.
    """
    left, right, top, bottom = spec.padding_of(height, width)
    fields = BLOCK_FIELDS | {
        "batch": batch,
        "height": height,
        "width": width,
        "in_channels": spec.in_channels,
        "hidden_channels": spec.hidden_channels,
        "out_channels": spec.out_channels,
        "stride": spec.strides[0],
        "expand": EXPANDS.index("pointwise" if spec.expand else "none"),
        "residual": int(spec.residual),
        "kernel": spec.kernel,
        "dilation": spec.dilation,
        "pad_left": left,
        "pad_right": right,
        "pad_top": top,
        "pad_bottom": bottom,
        "activation": ACTIVATIONS.index(spec.activation),
        "expand_activation": ACTIVATIONS.index(spec.expanded_by),
        "out_activation": ACTIVATIONS.index(spec.out_activation),
        "squeeze_channels": spec.squeeze_channels,
        "squeeze_activation": ACTIVATIONS.index(spec.squeeze_activation),
        "gate": GATES.index(spec.gate),
        "negative_slope": slope_bits(spec.negative_slope),
        "column_stride": spec.stride[1] if isinstance(spec.stride, tuple) else 0,
        "activates_sum": int(spec.activates_sum),
    }
    if stem is None:
        return fields
    activation, in_channels, image_height, image_width = stem
    return fields | {
        "in_channels": in_channels,
        "expand": EXPANDS.index("stem"),
        "image_height": image_height,
        "image_width": image_width,
        "expand_activation": ACTIVATIONS.index(activation),
    }
