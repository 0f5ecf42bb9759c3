"""What a block is: its fields, their limits, and what follows from them.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), section 3.3.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from typing_extensions import Unpack

from .activations import ACTIVATIONS, GATES, LEAKY_RELU, NEGATIVE_SLOPE
from .fold import FRAGMENT, PANEL, BlockWeights, Layout, PackedWeights, fragment_channels, hidden_channels


def _named(name: str, number: int, names: tuple[str, ...]) -> str:
    if not 0 <= number < len(names):
        raise ValueError(f"{name} must be 0 to {len(names) - 1} ({', '.join(names)}), got {number}")
    return names[number]


def integer(name: str, value: Any) -> Any:
    """``value``, an int or a symbol that stands for one. Raises TypeError for anything else, a bool too."""
    if type(value) is int or type(value).__name__ == "SymInt":
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


class Geometry(TypedDict, total=False):
    """What a block's weights do not tell: the keyword arguments of :func:`inverted_residual` and its reference."""

    stride: int | tuple[int, int]  # of the depthwise convolution, 1 or 2, or of rows and of columns; default 1
    residual: bool  # whether x is added to the result; default False
    dilation: int  # of the depthwise convolution; default 1
    # Rows and columns of zeros around the expanded tensor: None for dilation * (kernel - 1) / 2 on every side, "same"
    # for TensorFlow's, which rests on the image's size and puts the odd one behind, or (left, right, top, bottom).
    padding: str | tuple[int, int, int, int] | None
    activation: str  # after the depthwise convolution and the expansion, one of ACTIVATIONS; default "relu6"
    out_activation: str  # of the projection's result, before x is added; default "identity"
    squeeze_activation: str  # between the two products of a squeeze-and-excite; default "relu"
    gate: str  # behind them, one of GATES; default "hardsigmoid"
    negative_slope: float  # of every "leaky_relu" among the activations; default 0.01
    expand_activation: str | None  # after the expansion, where that has another one; default None
    activates_sum: bool  # whether out_activation comes after x is added, not before; default False


def stem_size(size: Any) -> Any:
    """Rows or columns that a stem (3x3, stride 2, padding 1) makes of an image's, an int or a symbol for one."""
    return (size - 1) // 2 + 1


KERNELS = (3, 5, 7)  # sizes of a depthwise kernel
KERNELS_IN_WORDS = "3, 5 or 7"
_PLAIN = (1, "relu6", "identity", "relu", "hardsigmoid")  # dilation, activations and gate of MobileNetV2's block


@dataclass(frozen=True)
class BlockSpec:
    """Geometry of one block. ``expand=False`` is t = 1: no expansion, ``hidden_channels == in_channels``.

    ``kernel``, ``dilation``, ``stride`` and ``padding`` are the depthwise convolution's. ``squeeze_channels`` is 0
    without a squeeze-and-excite (MobileNetV3, section 5.3) between it and the projection.
    """

    in_channels: int
    hidden_channels: int
    out_channels: int
    stride: int | tuple[int, int] = 1
    expand: bool = True
    residual: bool = False
    kernel: int = 3
    dilation: int = 1
    padding: str | tuple[int, int, int, int] | None = None
    activation: str = "relu6"
    out_activation: str = "identity"
    squeeze_channels: int = 0
    squeeze_activation: str = "relu"
    gate: str = "hardsigmoid"
    negative_slope: float = NEGATIVE_SLOPE
    expand_activation: str | None = None
    activates_sum: bool = False

    def __post_init__(self) -> None:
        for name in (
            "in_channels",
            "hidden_channels",
            "out_channels",
            "kernel",
            "dilation",
            "squeeze_channels",
        ):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        for name in ("expand", "residual", "activates_sum"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("in_channels", "hidden_channels", "out_channels", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_stride()
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be {KERNELS_IN_WORDS}, got {self.kernel}; use backend='eager'")
        if self.dilation > 1 and self.stride != 1:
            raise ValueError(f"dilation must be 1 where stride is 2, got {self.dilation}; use backend='eager'")
        if self.squeeze_channels < 0:
            raise ValueError(f"squeeze_channels must be at least 0, got {self.squeeze_channels}")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("out_activation", ACTIVATIONS),
            ("squeeze_activation", ACTIVATIONS),
            ("gate", GATES),
            ("expand_activation", (None, *ACTIVATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        # One value where nothing rests on it: such blocks are equal.
        if not self.expand or self.expand_activation == self.activation:
            object.__setattr__(self, "expand_activation", None)
        if not self.residual or self.out_activation == "identity":
            object.__setattr__(self, "activates_sum", False)
        self._check_slope()
        self._check_padding()
        if not self.expand and self.hidden_channels != self.in_channels:
            raise ValueError(
                f"without an expansion hidden_channels must equal in_channels ({self.in_channels}), "
                f"got {self.hidden_channels}"
            )
        if self.residual and (self.stride != 1 or self.in_channels != self.out_channels):
            raise ValueError(
                "a residual needs stride 1 and in_channels equal to out_channels, got stride "
                f"{self.stride}, {self.in_channels} and {self.out_channels}"
            )

    @property
    def has_slope(self) -> bool:
        """Whether one of its activations is a "leaky_relu"."""
        squeeze = self.squeeze_activation if self.squeeze_channels else ""
        return LEAKY_RELU in (self.activation, self.out_activation, self.expand_activation, squeeze)

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row, and from column to column."""
        return self.stride if isinstance(self.stride, tuple) else (self.stride, self.stride)

    @property
    def expanded_by(self) -> str:
        """The expansion's activation, whether it is the depthwise convolution's or not."""
        return self.expand_activation or self.activation

    def _check_stride(self) -> None:
        stride = self.stride
        if isinstance(stride, (tuple, list)):
            if len(stride) != 2:
                raise ValueError(f"stride must be 1, 2 or two of these, of rows and of columns, got {stride!r}")
            rows, cols = (integer("stride", s) for s in stride)
            stride = rows if rows == cols else (rows, cols)
        else:
            stride = integer("stride", stride)
        object.__setattr__(self, "stride", stride)
        if not set(self.strides) <= {1, 2}:
            raise ValueError(f"stride must be 1 or 2, got {stride}; use backend='eager'")

    def _check_slope(self) -> None:
        if not isinstance(self.negative_slope, (int, float)) or not abs(self.negative_slope) < math.inf:
            raise ValueError(f"negative_slope must be a finite number, got {self.negative_slope!r}")
        object.__setattr__(self, "negative_slope", float(self.negative_slope) if self.has_slope else NEGATIVE_SLOPE)

    def _check_padding(self) -> None:
        if self.padding is None or self.padding == "same":
            return
        if not isinstance(self.padding, Sequence) or isinstance(self.padding, str) or len(self.padding) != 4:
            raise ValueError(f"padding must be None, 'same' or (left, right, top, bottom), got {self.padding!r}")
        object.__setattr__(self, "padding", tuple(integer("padding", p) for p in self.padding))
        most = self.extent - 1
        if not all(0 <= p <= most for p in self.padding):
            raise ValueError(f"padding must be 0 to {most} on each side, got {self.padding}; use backend='eager'")
        left, right, top, bottom = self.padding
        if self.residual and (left + right, top + bottom) != (most, most):
            raise ValueError(f"a residual needs padding that adds {most} rows and columns, got {self.padding}")

    @property
    def extent(self) -> int:
        """Rows (and columns) that the depthwise kernel spans: dilation * (kernel - 1) + 1."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def geometry(self) -> Geometry:
        """The keyword arguments that, with weights, make this block."""
        found: Any = {name: getattr(self, name) for name in Geometry.__annotations__}
        return found

    def padding_of(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) for an image of this size."""
        if isinstance(self.padding, tuple):
            return self.padding
        around = (self.extent - 1) // 2
        if self.padding is None:
            return around, around, around, around

        def same(size: int, stride: int) -> tuple[int, int]:
            total = max((-(-size // stride) - 1) * stride + self.extent - size, 0)
            return total // 2, total - total // 2

        rows, cols = self.strides
        return *same(width, cols), *same(height, rows)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') for an image of this size."""
        left, right, top, bottom = self.padding_of(height, width)
        rows, cols = self.strides
        return (
            (height + top + bottom - self.extent) // rows + 1,
            (width + left + right - self.extent) // cols + 1,
        )

    def options(self, height: int, width: int, *, written_out: bool = False) -> tuple[Any, ...]:
        """What the op takes behind its plan: nothing for MobileNetV2's block, unless all is to be ``written_out``."""
        padding = self.padding if self.padding != "same" or self.stride != 1 else None
        rest = (self.dilation, self.activation, self.out_activation, self.squeeze_activation, self.gate)
        last = self.last_values
        if not written_out and padding is None and not last and rest == _PLAIN:
            return ()
        explicit = [] if padding is None and not written_out else list(self.padding_of(height, width))
        activations = (ACTIVATIONS.index(a) for a in rest[1:4])
        slope = (self.negative_slope,) if self.has_slope or last else ()
        return (self.dilation, explicit, *activations, GATES.index(self.gate), *slope, *last)

    @property
    def last_values(self) -> tuple[int, ...]:
        """What ops take behind the slope: nothing where the expansion has the depthwise convolution's activation, rows
        and columns one stride, and no activation follows the sum with x.

        Else the expansion's activation (-1: the depthwise convolution's), the columns' stride (0: the rows'), and 1
        where the output's activation follows the sum.
        """
        if self.expand_activation is None and not isinstance(self.stride, tuple) and not self.activates_sum:
            return ()
        expand = -1 if self.expand_activation is None else ACTIVATIONS.index(self.expand_activation)
        return expand, self.stride[1] if isinstance(self.stride, tuple) else 0, int(self.activates_sum)

    @property
    def beyond_mobilenet_v2(self) -> bool:
        """Whether it has anything that MobileNetV2's block does not have."""
        plain = self.kernel == 3 and self.squeeze_channels == 0 and self.options(8, 8) == ()
        return not plain

    @staticmethod
    def of_op(
        packed: PackedWeights,
        in_channels: int,
        stride: int,
        residual: bool,
        dilation: int = 1,
        padding: Sequence[int] = (),
        activation: int = 0,
        out_activation: int = 2,
        squeeze_activation: int = 1,
        gate: int = 0,
        negative_slope: float = NEGATIVE_SLOPE,
        expand_activation: int = -1,
        column_stride: int = 0,
        activates_sum: bool = False,
    ) -> BlockSpec:
        """The block that the op's arguments describe, its plan left out: what :meth:`options` makes, read back."""
        sides: Any = tuple(padding) or None
        return BlockSpec.of(
            packed,
            in_channels,
            stride=(stride, column_stride) if column_stride else stride,
            residual=residual,
            dilation=dilation,
            padding=sides,
            activation=_named("activation", activation, ACTIVATIONS),
            out_activation=_named("out_activation", out_activation, ACTIVATIONS),
            squeeze_activation=_named("squeeze_activation", squeeze_activation, ACTIVATIONS),
            gate=_named("gate", gate, GATES),
            negative_slope=negative_slope,
            expand_activation=(
                None if expand_activation == -1 else _named("expand_activation", expand_activation, ACTIVATIONS)
            ),
            activates_sum=bool(activates_sum),
        )

    def _named(self, activation: str) -> str:
        return f"{activation}({self.negative_slope:g})" if activation == LEAKY_RELU else activation

    def __str__(self) -> str:
        hidden = f" -> {self.hidden_channels}" if self.expand else ""
        parts = [f"{self.in_channels}{hidden} -> {self.out_channels}"]
        if self.kernel != 3:
            parts.append(f"kernel {self.kernel}")
        parts.append(f"stride {self.stride}" if self.stride in (1, 2) else "stride {}x{}".format(*self.strides))
        if self.dilation != 1:
            parts.append(f"dilation {self.dilation}")
        if self.padding is not None:
            parts.append(f"padding {self.padding}")
        if self.expand_activation is not None:
            parts.append(f"{self._named(self.expand_activation)}, then {self._named(self.activation)}")
        elif self.activation != "relu6":
            parts.append(self._named(self.activation))
        if self.squeeze_channels:
            parts.append(f"squeeze {self.squeeze_channels} ({self._named(self.squeeze_activation)}, {self.gate})")
        if self.out_activation != "identity" and not self.activates_sum:
            parts.append(f"output {self._named(self.out_activation)}")
        if self.residual:
            parts.append("residual")
        if self.activates_sum:
            parts.append(f"{self._named(self.out_activation)} of the sum")
        return ", ".join(parts)

    @staticmethod
    def of(
        weights: BlockWeights | PackedWeights, in_channels: int | None = None, **geometry: Unpack[Geometry]
    ) -> BlockSpec:
        """The spec that these weights have; raises ValueError where their shapes disagree.

        ``in_channels`` of the input at hand: weights packed in pairs do not tell an odd number from the next.
        """
        if not isinstance(weights, (BlockWeights, PackedWeights)):
            raise TypeError(
                f"weights must be mnv2_fused.BlockWeights, or what mnv2_fused.pack makes of them, got a "
                f"{type(weights).__name__}"
            )
        if (weights.w_expand is None) != (weights.b_expand is None):
            raise ValueError("w_expand and b_expand must both be given or both be None")
        squeeze = weights.w_squeeze is not None
        if any((t is not None) != squeeze for t in weights[6:]):
            raise ValueError("w_squeeze, b_squeeze, w_excite and b_excite must all be given or all be None")
        packed = isinstance(weights, PackedWeights)
        pairs = packed and weights.layout is Layout.PAIRS
        fragments = packed and weights.layout is Layout.FRAGMENTS
        for name, tensor in zip(weights._fields, weights, strict=True):
            is_product = name in ("w_expand", "w_project")
            dims = 1 if name.startswith("b_") else 3 if packed and not (pairs and is_product) else 4
            if tensor is not None and tensor.dim() != dims and (dims > 1 or packed):
                raise ValueError(f"{name} must have {dims} dimensions, got {list(tensor.shape)}")
        if packed:
            hidden, out_channels = hidden_channels(weights), weights.b_project.shape[0]
        else:
            hidden, out_channels = weights.w_depthwise.shape[0], weights.w_project.shape[0]
        channels = hidden if weights.w_expand is None else weights.w_expand.shape[1]
        if pairs and weights.w_expand is not None:
            channels = 2 * channels - 1 if in_channels == 2 * channels - 1 else 2 * channels
        if fragments and isinstance(weights, PackedWeights):
            channels = fragment_channels(weights)
        panels, out_panels = -(-hidden // PANEL), -(-out_channels // PANEL)
        taps = weights.w_depthwise.shape[1] if packed else math.prod(weights.w_depthwise.shape[2:])
        kernel = next((k for k in KERNELS if k * k == taps), KERNELS[0])  # else shapes disagree below
        taps = kernel * kernel
        squeezed = 0 if weights.w_excite is None else weights.w_excite.shape[1]
        squeezed_panels = -(-squeezed // PANEL)

        def product(panels: int, terms: int) -> tuple[int, ...]:
            return (panels, (terms + 1) // 2, PANEL, 2) if pairs else (panels, terms, PANEL)

        if fragments:
            shapes = [
                (panels, -(-channels // PANEL), FRAGMENT),
                (panels * PANEL + channels,),
                (panels, taps, PANEL),
                (hidden + PANEL,),
                (panels, out_panels, FRAGMENT),
                (out_channels,),
            ]
        elif packed:
            shapes = [
                product(panels, channels),
                (panels * PANEL,),
                (panels, taps, PANEL),
                (panels * PANEL,),
                product(out_panels, hidden),
                (out_channels,),
            ]
        else:
            shapes = [
                (hidden, channels, 1, 1),
                (hidden,),
                (hidden, 1, kernel, kernel),
                (hidden,),
                (out_channels, hidden, 1, 1),
                (out_channels,),
                (squeezed, hidden, 1, 1),
                (squeezed,),
                (hidden, squeezed, 1, 1),
                (hidden,),
            ]
        if packed:
            shapes += [
                (squeezed_panels, hidden, PANEL),
                (squeezed_panels * PANEL,),
                (panels, squeezed, PANEL),
                (panels * PANEL,),
            ]
        for name, tensor, shape in zip(weights._fields, weights, shapes, strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        return BlockSpec(
            channels,
            hidden,
            out_channels,
            expand=weights.w_expand is not None,
            kernel=kernel,
            squeeze_channels=squeezed,
            **geometry,
        )
