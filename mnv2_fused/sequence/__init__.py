"""Layers in a row as one call: stem, inverted residuals, head, pooling and classifier of a network."""

from .frozen import FrozenBlock, FrozenModel, FrozenRow
from .fused import FusedSequential, RunsFused, RunsWhole

__all__ = ["FrozenBlock", "FrozenModel", "FrozenRow", "FusedSequential", "RunsFused", "RunsWhole"]
