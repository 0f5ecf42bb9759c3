"""The MobileNetV2 inverted-residual block as one kernel, without the expanded tensor."""

import sys as _sys

from . import models
from .block import inverted_residual, pack
from .convert import Report, fuse, report, unfuse
from .fold import BlockWeights, PackedWeights
from .int8 import QuantizedReport, quantize, quantized_from, quantized_like, quantized_report
from .module import FusedBlock, FusedInvertedResidual
from .plans.cpu import Plan, plan
from .plans.cuda import CudaPlan, cuda_plan
from .plans.triton import TritonPlan, triton_plan
from .reference import inverted_residual_reference
from .spec import BlockSpec
from .version import __version__ as __version__

# Pickles of version 0.1.0 name these modules; the package's attributes of the same names are functions.
for _planner in (plan, cuda_plan, triton_plan):
    _sys.modules[f"{__name__}.{_planner.__name__}"] = _sys.modules[_planner.__module__]

__all__ = [
    "BlockSpec",
    "BlockWeights",
    "CudaPlan",
    "FusedBlock",
    "FusedInvertedResidual",
    "PackedWeights",
    "Plan",
    "QuantizedReport",
    "Report",
    "TritonPlan",
    "cuda_plan",
    "fuse",
    "inverted_residual",
    "inverted_residual_reference",
    "models",
    "pack",
    "plan",
    "quantize",
    "quantized_from",
    "quantized_like",
    "quantized_report",
    "report",
    "triton_plan",
    "unfuse",
]
