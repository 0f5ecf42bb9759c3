"""Layers in a row as one call: stem, inverted residuals, head, pooling and classifier of a network."""

from .fused import FusedSequential, RunsFused, RunsWhole

__all__ = ["FusedSequential", "RunsFused", "RunsWhole"]
