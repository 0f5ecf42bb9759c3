"""Inverted residuals in 8-bit integers: ``quantize``."""

from .reports import LayerError, QuantizedLayerReport, QuantizedReport, quantized_report
from .swap import quantize, quantized_like

__all__ = [
    "LayerError",
    "QuantizedLayerReport",
    "QuantizedReport",
    "quantize",
    "quantized_like",
    "quantized_report",
]
