"""Converting a model: ``fuse``, ``unfuse``, ``report``."""

from .reports import BlockReport, LayerReport, Report, report
from .swap import fuse, unfuse

__all__ = ["BlockReport", "LayerReport", "Report", "fuse", "report", "unfuse"]
