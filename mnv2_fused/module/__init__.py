"""Fused blocks as modules, and how their packed weights follow the modules' own."""

from .drop_in import FusedInvertedResidual
from .flat import FusedFlat
from .fused_block import FusedBlock, Reader
from .in_place import FusedInPlace, _restored, become, fuse_in_place
from .observed import FusedObserved, is_depthwise, is_pointwise, observe, why_no_candidate

__all__ = [
    "FusedBlock",
    "FusedFlat",
    "FusedInPlace",
    "FusedInvertedResidual",
    "FusedObserved",
    "Reader",
    "_restored",
    "become",
    "fuse_in_place",
    "is_depthwise",
    "is_pointwise",
    "observe",
    "why_no_candidate",
]
