"""The MobileNetV2 inverted-residual block as one kernel, without the expanded tensor."""

from . import models
from .block import inverted_residual
from .convert import Report, fuse, report, unfuse
from .fold import BlockWeights, PackedWeights, pack
from .module import FusedBlock, FusedInvertedResidual
from .plans.cpu import Plan, plan
from .plans.cuda import CudaPlan, cuda_plan
from .plans.triton import TritonPlan, triton_plan
from .reference import inverted_residual_reference
from .spec import BlockSpec
from .version import __version__ as __version__

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
