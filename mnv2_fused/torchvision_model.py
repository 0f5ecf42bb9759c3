"""torchvision's networks as one call, from the stem to the classifier. Imports torchvision."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from .module import become
from .sequence import RunsWhole


class _HasImplementation(RunsWhole):
    _forward_impl: Callable[[Tensor], Tensor]  # torchvision's


class _RunsWhole(_HasImplementation):
    def forward(self, x: Tensor) -> Tensor:
        y = self.run_fused(x)
        return self._forward_impl(x) if y is None else y

    def _forward_impl(self, x: Tensor) -> Tensor:
        y = self.run_fused(x)
        return super()._forward_impl(x) if y is None else y

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        children, parents = super().fusable_children()
        return [] if "_forward_impl" in vars(self) else children, parents


class MobileNetV2(_RunsWhole, torchvision.models.MobileNetV2):
    """What :func:`mnv2_fused.fuse` makes of a ``torchvision.models.MobileNetV2``."""


class MobileNetV3(_RunsWhole, torchvision.models.MobileNetV3):
    """What :func:`mnv2_fused.fuse` makes of a ``torchvision.models.MobileNetV3``."""


class EfficientNet(_RunsWhole, torchvision.models.EfficientNet):
    """What :func:`mnv2_fused.fuse` makes of a ``torchvision.models.EfficientNet``."""


def _pooled_by_function(self, x):  # compared with, never called
    x = self.features(x)
    x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
    x = torch.flatten(x, 1)
    x = self.classifier(x)
    return x


def _pooled_by_module(self, x):  # compared with, never called
    x = self.features(x)
    x = self.avgpool(x)
    x = torch.flatten(x, 1)
    x = self.classifier(x)
    return x


_KNOWN = {
    torchvision.models.MobileNetV2: (MobileNetV2, _pooled_by_function),
    torchvision.models.MobileNetV3: (MobileNetV3, _pooled_by_module),
    torchvision.models.EfficientNet: (EfficientNet, _pooled_by_module),
}


def run_whole(model: nn.Module) -> None:
    """Makes ``model`` run in one call, if it is exactly torchvision's, of a release whose forward is a known one."""
    fused, known = _KNOWN.get(type(model), (None, None))
    if fused is None or {"forward", "_forward_impl"} & vars(model).keys():
        return
    code, expected = vars(type(model))["_forward_impl"].__code__, known.__code__
    if (code.co_code, code.co_names) == (expected.co_code, expected.co_names):
        become(model, fused)
