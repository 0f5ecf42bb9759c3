"""torchvision's MobileNetV2 as one call, from the stem to the classifier. Imports torchvision."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from . import layers
from .sequence import FusedSequential, RunsFused

# What forward does between its two modules, as modules.
_POOL, _FLATTEN = nn.AdaptiveAvgPool2d(1).eval(), nn.Flatten().eval()


class MobileNetV2(RunsFused, torchvision.models.MobileNetV2):
    """What :func:`mnv2_fused.fuse` makes of a ``torchvision.models.MobileNetV2``.

    Called directly, ``features`` and ``classifier`` still give what they always gave.
    """

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        parents = [self, *self.children()]
        if any(type(m).forward not in (nn.Sequential.forward, FusedSequential.forward) for m in parents[1:]):
            return [], parents
        if any("forward" in vars(m) or layers.has_hooks(m) for m in parents[1:]):
            return [], parents
        return [*self.features._modules.values(), _POOL, _FLATTEN, *self.classifier._modules.values()], parents

    def _forward_impl(self, x: Tensor) -> Tensor:
        y = self.run_fused(x)
        return super()._forward_impl(x) if y is None else y


def _forward_impl(self, x):  # compared with, never called
    x = self.features(x)
    x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
    x = torch.flatten(x, 1)
    x = self.classifier(x)
    return x


def takes(model: nn.Module) -> bool:
    """Whether ``model`` is exactly torchvision's, of a release whose forward is the known one."""
    if type(model) is not torchvision.models.MobileNetV2 or {"forward", "_forward_impl"} & vars(model).keys():
        return False
    code, expected = type(model)._forward_impl.__code__, _forward_impl.__code__
    return (code.co_code, code.co_names) == (expected.co_code, expected.co_names)
