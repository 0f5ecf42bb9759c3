"""MobileNetV1, V2 and V3, made of ordinary torch modules, whose blocks run fused in eval from construction.

V2 and V3 have torchvision's layout and names in the ``state_dict``: published weights load. torchvision itself is not
needed. V1, for which torchvision has no counterpart, is laid out in the same style. Weights are random, drawn as
torchvision draws them.

Every model takes [N, 3, H, W], floating point, of any H and W, in the dtype of its parameters, and returns logits,
[N, num_classes]. ``width_mult`` scales the channels of every layer, rounded to multiples of 8, and must be above 0;
``dropout`` is the probability in front of the classifier, from 0 to 1. Other values raise ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .families import read_mobilenet_v3, read_sequential
from .module import FusedInvertedResidual, fuse_in_place
from .sequence import FusedSequential, RunsWhole
from .workloads import MOBILENET_V2_STAGES

__all__ = [
    "InvertedResidual",
    "InvertedResidualV3",
    "MobileNet",
    "SqueezeExcitation",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
]

# (output channels, stride) of the 13 separable blocks: table 1 of the MobileNetV1 paper. Its second to last row says
# stride 2 for the last depthwise convolution, but the sizes around it, 7x7, need stride 1.
_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

# (kernel, expanded channels, output channels, squeeze-and-excite, activation, stride): tables 1 and 2 of the
# MobileNetV3 paper.
_V3Row = tuple[int, int, int, bool, type[nn.Module], int]
_V3_LARGE: tuple[_V3Row, ...] = (
    (3, 16, 16, False, nn.ReLU, 1),
    (3, 64, 24, False, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 1),
    (5, 72, 40, True, nn.ReLU, 2),
    (5, 120, 40, True, nn.ReLU, 1),
    (5, 120, 40, True, nn.ReLU, 1),
    (3, 240, 80, False, nn.Hardswish, 2),
    (3, 200, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 480, 112, True, nn.Hardswish, 1),
    (3, 672, 112, True, nn.Hardswish, 1),
    (5, 672, 160, True, nn.Hardswish, 2),
    (5, 960, 160, True, nn.Hardswish, 1),
    (5, 960, 160, True, nn.Hardswish, 1),
)
_V3_SMALL: tuple[_V3Row, ...] = (
    (3, 16, 16, True, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 2),
    (3, 88, 24, False, nn.ReLU, 1),
    (5, 96, 40, True, nn.Hardswish, 2),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 120, 48, True, nn.Hardswish, 1),
    (5, 144, 48, True, nn.Hardswish, 1),
    (5, 288, 96, True, nn.Hardswish, 2),
    (5, 576, 96, True, nn.Hardswish, 1),
    (5, 576, 96, True, nn.Hardswish, 1),
)
_V3_NORM = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def _make_divisible(channels: float) -> int:
    """The multiple of 8 nearest to ``channels``, at least 8 and at least 90 % of them, as the papers' code rounds."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _conv(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Callable[..., nn.Module] | None = nn.ReLU6,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution, norm, activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm(out_channels), *([] if activation is None else [activation(inplace=True)]))


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """MobileNetV1's block: depthwise, then 1x1, each with norm and ReLU6."""
    depthwise = _conv(in_channels, in_channels, 3, stride, groups=in_channels)
    return fuse_in_place(nn.Sequential(depthwise, _conv(in_channels, out_channels)), read_sequential)


class InvertedResidual(nn.Module):
    """MobileNetV2's block as ordinary modules, which :func:`mnv2_fused.unfuse` gives back."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        layers: list[nn.Module] = [] if expand_ratio == 1 else [_conv(in_channels, hidden)]
        layers.append(_conv(hidden, hidden, 3, stride, groups=hidden))
        self.conv: nn.Sequential = nn.Sequential(*layers, *_conv(hidden, out_channels, activation=None))
        self.stride = stride
        self.use_res_connect: bool = stride == 1 and in_channels == out_channels
        self.out_channels = out_channels
        self._is_cn = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        # Instruction for instruction torchvision's, by which fuse() knows the block.
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)

    def fused(self) -> FusedInvertedResidual:
        """The block that runs fused in eval, around the same modules."""
        block = FusedInvertedResidual.adopt(self.conv, stride=self.stride, residual=self.use_res_connect)
        block._original = (self,)  # so that unfuse() needs no class of torchvision's
        return block


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number from 0 to 1 computed from all channels' means: ReLU between, hard sigmoid."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool: nn.AdaptiveAvgPool2d = nn.AdaptiveAvgPool2d(1)
        self.fc1: nn.Conv2d = nn.Conv2d(channels, squeezed, 1)
        self.fc2: nn.Conv2d = nn.Conv2d(squeezed, channels, 1)
        self.activation: nn.ReLU = nn.ReLU()
        self.scale_activation: nn.Hardsigmoid = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class InvertedResidualV3(nn.Module):
    """MobileNetV3's block: kernel 3 or 5, ReLU or hard swish, perhaps with squeeze-and-excite."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int,
        squeeze: bool,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        conv = functools.partial(_conv, norm=_V3_NORM)
        layers: list[nn.Module] = [] if hidden == in_channels else [conv(in_channels, hidden, activation=activation)]
        layers.append(conv(hidden, hidden, kernel, stride, groups=hidden, activation=activation))
        if squeeze:
            layers.append(SqueezeExcitation(hidden, _make_divisible(hidden // 4)))
        self.block: nn.Sequential = nn.Sequential(*layers, conv(hidden, out_channels, activation=None))
        self.use_res_connect: bool = stride == 1 and in_channels == out_channels
        self.out_channels = out_channels
        self._is_cn = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return x + y if self.use_res_connect else y


class MobileNet(nn.Module):
    """``features``, the mean over their pixels, and ``classifier``. All in channels_last."""

    def __init__(self, features: Iterable[nn.Module], classifier: Iterable[nn.Module]) -> None:
        super().__init__()
        self.features: FusedSequential = FusedSequential(*features)
        self.avgpool: nn.AdaptiveAvgPool2d = nn.AdaptiveAvgPool2d(1)
        self.classifier: nn.Sequential = nn.Sequential(*classifier)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, num_classes]
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class FusedMobileNet(RunsWhole, MobileNet):
    """A :class:`MobileNet` that runs in one call in eval; what this module's functions return."""

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, num_classes]
        y = self.run_fused(x)
        return super().forward(x) if y is None else y


def _check(width_mult: float, num_classes: int) -> None:
    if not 0 < width_mult < float("inf"):
        raise ValueError(f"width_mult must be above 0 and finite, got {width_mult!r}; 1.0 is the paper's network")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes!r}; for features call model.features")


def mobilenet_v1(width_mult: float = 1.0, num_classes: int = 1000, dropout: float = 0.001) -> MobileNet:
    """MobileNetV1 (Howard et al. 2017, table 1): a stem and 13 depthwise separable blocks.

    ReLU6 as in the common weights and the authors' code; the paper says ReLU. 1.0 at 224x224: 4.2 M parameters,
    569 M multiply-adds. Shapes, ``width_mult`` and errors: see the module.
    """
    _check(width_mult, num_classes)
    channels = _make_divisible(32 * width_mult)
    features: list[nn.Module] = [_conv(3, channels, 3, 2)]
    for out, stride in _V1:
        out_channels = _make_divisible(out * width_mult)
        features.append(_separable(channels, out_channels, stride))
        channels = out_channels
    return FusedMobileNet(features, [nn.Dropout(dropout), nn.Linear(channels, num_classes)])


def mobilenet_v2(width_mult: float = 1.0, num_classes: int = 1000, dropout: float = 0.2) -> MobileNet:
    """MobileNetV2 (Sandler et al. 2018, table 2): a stem, 17 inverted residuals, and a 1x1 convolution.

    As everyone reads the table, the stride of a stage is that of its first block. A width multiplier above 1 widens
    the last convolution's 1280 channels, one below 1 does not. torchvision's names; 1.0 at 224x224: 3.5 M parameters,
    301 M multiply-adds. Shapes, ``width_mult`` and errors: see the module.
    """
    _check(width_mult, num_classes)
    channels = _make_divisible(32 * width_mult)
    features: list[nn.Module] = [_conv(3, channels, 3, 2)]
    for expand_ratio, out, repeats, first_stride in MOBILENET_V2_STAGES:
        out_channels = _make_divisible(out * width_mult)
        for i in range(repeats):
            block = InvertedResidual(channels, out_channels, first_stride if i == 0 else 1, expand_ratio)
            features.append(block.fused())
            channels = out_channels
    last = _make_divisible(1280 * max(1.0, width_mult))
    features.append(_conv(channels, last))
    return FusedMobileNet(features, [nn.Dropout(dropout), nn.Linear(last, num_classes)])


def _mobilenet_v3(rows: Iterable[_V3Row], last: int, width_mult: float, num_classes: int, dropout: float) -> MobileNet:
    _check(width_mult, num_classes)
    channels, last = _make_divisible(16 * width_mult), _make_divisible(last * width_mult)
    conv = functools.partial(_conv, activation=nn.Hardswish, norm=_V3_NORM)
    features: list[nn.Module] = [conv(3, channels, 3, 2)]
    for kernel, expanded, out, squeeze, activation, stride in rows:
        hidden, out_channels = _make_divisible(expanded * width_mult), _make_divisible(out * width_mult)
        options = {"kernel": kernel, "stride": stride, "squeeze": squeeze, "activation": activation}
        features.append(fuse_in_place(InvertedResidualV3(channels, hidden, out_channels, **options), read_mobilenet_v3))
        channels = out_channels
    features.append(conv(channels, 6 * channels))
    hidden = [nn.Linear(6 * channels, last), nn.Hardswish(inplace=True), nn.Dropout(dropout, inplace=True)]
    return FusedMobileNet(features, [*hidden, nn.Linear(last, num_classes)])


def mobilenet_v3_large(width_mult: float = 1.0, num_classes: int = 1000, dropout: float = 0.2) -> MobileNet:
    """MobileNetV3-Large (Howard et al. 2019, table 1): a stem, 15 blocks, a 1x1 convolution, two linear layers.

    torchvision's names; 1.0 at 224x224: 5.5 M parameters, 217 M multiply-adds. Shapes, ``width_mult`` and errors: see
    the module.
    """
    return _mobilenet_v3(_V3_LARGE, 1280, width_mult, num_classes, dropout)


def mobilenet_v3_small(width_mult: float = 1.0, num_classes: int = 1000, dropout: float = 0.2) -> MobileNet:
    """MobileNetV3-Small (Howard et al. 2019, table 2): a stem, 11 blocks, a 1x1 convolution, two linear layers.

    torchvision's names; 1.0 at 224x224: 2.5 M parameters, 57 M multiply-adds. Shapes, ``width_mult`` and errors: see
    the module.
    """
    return _mobilenet_v3(_V3_SMALL, 1024, width_mult, num_classes, dropout)
