"""Inverted residuals in 8-bit integers: ``quantize``."""

from .reports import LayerError, QuantizedLayerReport, QuantizedReport, quantized_report
from .swap import quantize, quantized_like
from .torch_quantized import quantized_from

__all__ = [
    "LayerError",
    "QuantizedLayerReport",
    "QuantizedReport",
    "quantize",
    "quantized_from",
    "quantized_like",
    "quantized_report",
]
