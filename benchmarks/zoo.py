"""The models that people have: every family the converter knows, with random weights.

A detector is its convolutional part: behind it boxes are sorted, and rounding decides which come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import testing


class Entry(NamedTuple):
    """A model, and what :func:`mnv2_fused.fuse` makes of it."""

    make: Callable[[], nn.Module]
    blocks: int  # that it fuses
    size: tuple[int, int] = (224, 224)  # of the images that its users give it
    skipped: tuple[str, ...] = ()  # a part of the reason for each block that it leaves
    frozen: bool = False  # its norms are FrozenBatchNorm2d, as torchvision builds it for trained weights


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(weights=None)

    return make


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return make


def _transformers(**options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return transformers.MobileNetV2Model(transformers.MobileNetV2Config(**options))

    return make


def _smp(name: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("mobilenet_v2", encoder_weights=None, **options)

    return make


def _segmentation(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21)

    return make


def detector(name: str) -> nn.Module:
    """torchvision's whole detector, boxes and all."""
    from torchvision.models import detection

    return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=21)


class _Ssdlite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = detector("ssdlite320_mobilenet_v3_large")
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


_TIMM = {
    "mobilenetv2_035": 17,
    "mobilenetv2_050": 17,
    "mobilenetv2_075": 17,
    "mobilenetv2_100": 17,
    "mobilenetv2_110d": 22,
    "mobilenetv2_120d": 26,
    "mobilenetv2_140": 17,
    "mobilenetv3_large_100": 15,
    "efficientnet_b0": 16,
    "efficientnet_lite0": 16,
    "tf_efficientnet_b0": 16,
    "mnasnet_100": 17,
}

ZOO: dict[str, Entry] = {
    **{
        f"mnv2_fused {name}": Entry(lambda name=name: mnv2_fused.unfuse(getattr(mnv2_fused.models, name)()), blocks)
        for name, blocks in {
            "mobilenet_v1": 13,
            "mobilenet_v2": 17,
            "mobilenet_v3_small": 11,
            "mobilenet_v3_large": 15,
        }.items()
    },
    "torchvision mobilenet_v2": Entry(_torchvision("mobilenet_v2"), 17),
    "torchvision mobilenet_v3_small": Entry(_torchvision("mobilenet_v3_small"), 11),
    "torchvision mobilenet_v3_large": Entry(_torchvision("mobilenet_v3_large"), 15),
    **{
        f"torchvision {name}": Entry(_torchvision(name), 17)
        for name in ("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3")
    },
    "torchvision efficientnet_b0": Entry(_torchvision("efficientnet_b0"), 16),
    "torchvision efficientnet_b1": Entry(_torchvision("efficientnet_b1"), 23, (240, 240)),
    "torchvision efficientnet_b2": Entry(_torchvision("efficientnet_b2"), 23, (288, 288)),
    "torchvision ssdlite320_mobilenet_v3_large": Entry(_Ssdlite, 31, (320, 320)),
    "torchvision lraspp_mobilenet_v3_large": Entry(_segmentation("lraspp_mobilenet_v3_large"), 15, (520, 520)),
    "torchvision deeplabv3_mobilenet_v3_large": Entry(_segmentation("deeplabv3_mobilenet_v3_large"), 15, (520, 520)),
    "torchvision fasterrcnn_mobilenet_v3_large_fpn": Entry(
        lambda: detector("fasterrcnn_mobilenet_v3_large_fpn").backbone, 15, (800, 1088), frozen=True
    ),
    "torchvision fasterrcnn_mobilenet_v3_large_320_fpn": Entry(
        lambda: detector("fasterrcnn_mobilenet_v3_large_320_fpn").backbone, 15, (320, 448), frozen=True
    ),
    **{f"timm {name}": Entry(_timm(name), blocks) for name, blocks in _TIMM.items()},
    "timm mobilenetv2_100, features_only": Entry(_timm("mobilenetv2_100", features_only=True), 17),
    "timm mobilenetv3_large_100, features_only": Entry(_timm("mobilenetv3_large_100", features_only=True), 15),
    **{
        f"transformers MobileNetV2, output_stride={stride}, tf_padding={tf_padding}": Entry(
            _transformers(output_stride=stride, tf_padding=tf_padding), 17
        )
        for stride in (32, 16, 8)
        for tf_padding in (True, False)
    },
    "smp Unet": Entry(_smp("Unet"), 17, (512, 512)),
    "smp DeepLabV3Plus": Entry(_smp("DeepLabV3Plus"), 22, (512, 512)),
    "smp DeepLabV3Plus, encoder_output_stride=8": Entry(_smp("DeepLabV3Plus", encoder_output_stride=8), 22, (512, 512)),
}


def _freeze_norms(model: nn.Module) -> None:
    from torchvision.ops import FrozenBatchNorm2d

    for parent in list(model.modules()):
        for name, norm in parent._modules.items():
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
                frozen.load_state_dict(norm.state_dict())
                parent._modules[name] = frozen


def build(entry: Entry, size: tuple[int, int], images: int = 4, seed: int = 0) -> nn.Module:
    """The model in eval and channels_last, with batch norms fitted to random images of this height and width.

    Raises ImportError where the library it comes from is not installed.
    """
    torch.manual_seed(seed)
    model = testing.perturb_batch_norm(entry.make())
    model.eval()  # which of some classes gives None
    testing.fit_batch_norm(model, torch.randn(images, 3, *size))
    if entry.frozen:
        _freeze_norms(model)
    return model.to(memory_format=torch.channels_last)


def tensors_in(result: object) -> Iterator[Tensor]:
    """A model's results, whatever it puts them in."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from tensors_in(value)
