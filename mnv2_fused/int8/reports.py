"""``quantized_report``: how far each layer on integers is from float, and what stayed float."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..convert.find import check_model
from .modules import is_quantized


@dataclass(frozen=True)
class LayerError:
    """How far one layer's result is from float's, with all layers before it on integers, too."""

    sqnr: float  # dB: the power of float's result over that of the difference
    error: float  # the largest difference

    @staticmethod
    def of(expected: Tensor, given: Tensor) -> LayerError:
        return LayerError(sqnr(expected, given), float((expected - given).abs().max()))


def sqnr(expected: Tensor, given: Tensor) -> float:
    """The signal-to-quantisation-noise ratio of ``given`` in dB: 10 lg (sum of expected^2 / sum of differences^2)."""
    expected, given = expected.detach(), given.detach()
    noise = float((expected - given).double().square().sum())
    signal = float(expected.double().square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True)
class QuantizedLayerReport:
    """One row of a :class:`QuantizedReport`."""

    name: str
    what: str
    quantized: bool
    reason: str | None = None  # why it stayed float
    sqnr: float | None = None  # dB, on images of the calibration; None where nothing was calibrated
    error: float | None = None  # the largest difference there


@dataclass(frozen=True)
class QuantizedReport:
    """What :func:`mnv2_fused.quantize` made of a model. ``print`` it for a table."""

    layers: tuple[QuantizedLayerReport, ...]
    images: int = 0  # of the calibration, on which errors were measured
    sqnr: float | None = None  # dB, of the model's result, where that is one tensor
    top1_agreement: float | None = None  # part of the images with float's class, where there are classes

    @property
    def quantized(self) -> tuple[QuantizedLayerReport, ...]:
        return tuple(row for row in self.layers if row.quantized)

    @property
    def unquantized(self) -> tuple[QuantizedLayerReport, ...]:
        return tuple(row for row in self.layers if not row.quantized)

    def with_results(self, images: int, expected: Any, given: Any) -> QuantizedReport:
        """The same with the whole model's figures; results of other types than tensors give none."""
        found = agreement = None
        if isinstance(expected, Tensor) and isinstance(given, Tensor):
            found = sqnr(expected, given)
            if expected.dim() == 2 and expected.shape[1] > 1:
                agreement = float((expected.argmax(1) == given.argmax(1)).float().mean())
        return QuantizedReport(self.layers, images, found, agreement)

    def __str__(self) -> str:
        rows = [("layer", "what", "SQNR", "largest error", "stays float because")]
        for row in self.layers:
            figures = "" if row.sqnr is None else f"{row.sqnr:.1f} dB", "" if row.error is None else f"{row.error:.3g}"
            rows.append((row.name or "(model)", row.what, *figures, row.reason or ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = f"{len(self.quantized)} quantised, {len(self.unquantized)} float"
        if self.sqnr is not None:
            total += f"; result {self.sqnr:.1f} dB"
        if self.top1_agreement is not None:
            total += f", the class of float on {self.top1_agreement:.1%}"
        if self.images:
            total += f"{', on' if self.top1_agreement is None else ' of'} {self.images} calibration images"
        return "\n".join([*lines, total])


ATTRIBUTE = "_mnv2_fused_quantized"  # of a quantised model: where its report lies


def quantized_report(model: nn.Module) -> QuantizedReport:
    """What runs on integers in a model that :func:`mnv2_fused.quantize` or ``quantized_like`` made, and how exactly.

    Errors are those of the simulation that corrected biases, on a few images of the calibration. Raises TypeError for
    what is no module, ValueError for a model that is not quantised.
    """
    check_model(model)
    found = vars(model).get(ATTRIBUTE)
    if not isinstance(found, QuantizedReport):
        inside = ", though a part of it is" if any(map(is_quantized, model.modules())) else ""
        raise ValueError(f"the {type(model).__name__} is not quantised{inside}: give what mnv2_fused.quantize returned")
    return found
