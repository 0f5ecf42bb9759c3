"""Sequentials in which the layers of blocks lie among others."""

import copy
from collections import OrderedDict
from functools import cache

import torch
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from mnv2_fused.testing import agreement, perturb_batch_norm

from .models import BW, LINEAR, POOLED, STEM, B


def stem(c=8, stride=2):
    return [nn.Conv2d(3, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]


def depthwise(c, stride=1, act=nn.ReLU, **options):
    options = {"padding": 1, "groups": c, "bias": False} | options
    return [nn.Conv2d(c, c, options.pop("kernel", 3), stride, **options), nn.BatchNorm2d(c), act(inplace=True)]


def pointwise(c, out, act=nn.ReLU, **options):
    conv = nn.Conv2d(c, out, 1, **({"bias": False} | options))
    return [conv, nn.BatchNorm2d(out), *([] if act is None else [act(inplace=True)])]


def separable(c, out, stride=1, act=nn.ReLU, last=True):
    return [*depthwise(c, stride, act), *pointwise(c, out, act if last else None)]


def head(c, classes=5):
    return [*pointwise(c, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, classes)]


def grouped(*layers):
    """Three at a time in a Sequential."""
    groups, last = [], []
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and last:
            groups, last = [*groups, nn.Sequential(*last)], []
        last.append(layer)
    return [*groups, nn.Sequential(*last)]


def torchvisions():
    act = {"activation_layer": nn.ReLU6}
    return nn.Sequential(
        Conv2dNormActivation(3, 8, stride=2, **act),
        *(Conv2dNormActivation(8, 8, groups=8, **act), Conv2dNormActivation(8, 12, 1, **act)),
        *(Conv2dNormActivation(12, 12, stride=2, groups=12, **act), Conv2dNormActivation(12, 16, 1, **act)),
    )


V1 = [*stem(), *separable(8, 12), *separable(12, 16, 2), *separable(16, 16, act=nn.ReLU6)]
V2 = [*stem(), *separable(8, 10, act=nn.ReLU6, last=False)]
for c, out, s in ((10, 12, 2), (12, 12, 1)):
    V2 += [*pointwise(c, 3 * c, nn.ReLU6), *depthwise(3 * c, s, nn.ReLU6), *pointwise(3 * c, out, None)]
SQUEEZED = [*stem(), *pointwise(8, 24), *depthwise(24), SqueezeExcitation(24, 6), *pointwise(24, 8, None)]

NAMES = ["stem", "n", "a", "dw", "n1", "a1", "pw", "n2"]
# (model, kinds of layers in each call of the op, names of the blocks)
MODELS = {
    "MobileNetV1": (lambda: nn.Sequential(*V1), [[STEM, BW, BW]], ["3-8", "9-14", "15-20"]),
    "MobileNetV2": (
        lambda: nn.Sequential(*V2, *head(12)),
        [[STEM, B, B, POOLED, LINEAR]],
        ["3-7", "8-15", "16-23"],
    ),
    "convolutions with bias alone": (
        lambda: nn.Sequential(*stem()[:1], nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        [[BW]],
        ["1-3"],
    ),
    "a squeeze-and-excite": (lambda: nn.Sequential(*SQUEEZED), [[B]], ["3-11"]),
    "groups": (
        lambda: nn.Sequential(*grouped(*V1), *grouped(*pointwise(16, 24)), nn.AdaptiveAvgPool2d(1)),
        [[STEM, BW, BW, POOLED]],
        ["1-2", "3-4", "5-6"],
    ),
    "torchvision's layers": (torchvisions, [[STEM, BW]], ["1-2", "3-4"]),
    "names": (
        lambda: nn.Sequential(OrderedDict(zip(NAMES, [*stem(), *V2[3:8]], strict=True))),
        [[STEM]],
        ["dw-n2"],
    ),
    "one activation everywhere": (
        lambda: (lambda act: nn.Sequential(*(act if isinstance(m, nn.ReLU) else m for m in V1[:15])))(nn.ReLU()),
        [[STEM, BW]],
        ["3-8", "9-14"],
    ),
    "among modules": (
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.Identity(), *V1, nn.Sigmoid()),
        [[STEM, BW, BW]],
        ["5-10", "11-16", "17-22"],
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(*V1[:9]), nn.Sequential(*V1[9:]), *head(16)),
        [[STEM, BW, BW, POOLED, LINEAR]],
        ["0.3-8", "1.0-5", "1.6-11"],
    ),
    "beside other blocks": (
        lambda: nn.Sequential(*V1[:9], InvertedResidual(12, 12, 1, 3), *separable(12, 16)),
        [[STEM, B, BW]],
        ["3-8", "9", "10-15"],
    ),
}


@cache
def fitted(name):
    torch.manual_seed(0)
    # A copy: lists of layers are shared by models.
    return perturb_batch_norm(copy.deepcopy(MODELS[name][0]()).eval())


def check(model, plain, x):
    """Holds the result to the tolerance rule; returns it."""
    y = model(x)
    found = agreement(y, plain(x), copy.deepcopy(plain).double()(x.double()))
    assert found.ok, found
    return y
