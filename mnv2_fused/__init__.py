"""The MobileNetV2 inverted-residual block as one kernel, without the expanded tensor."""

from . import models
from .block import BlockSpec, inverted_residual, inverted_residual_reference
from .convert import Report, fuse, report, unfuse
from .cuda_plan import CudaPlan, cuda_plan
from .fold import BlockWeights, PackedWeights, pack
from .module import FusedBlock, FusedInvertedResidual
from .plan import Plan, plan
from .triton_plan import TritonPlan, triton_plan

__version__ = "0.1.0"

__all__ = [
    "BlockSpec",
    "BlockWeights",
    "CudaPlan",
    "FusedBlock",
    "FusedInvertedResidual",
    "PackedWeights",
    "Plan",
    "Report",
    "TritonPlan",
    "cuda_plan",
    "fuse",
    "inverted_residual",
    "inverted_residual_reference",
    "models",
    "pack",
    "plan",
    "report",
    "triton_plan",
    "unfuse",
]
