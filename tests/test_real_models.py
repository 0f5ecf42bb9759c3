"""Whole models, random weights: every block fused or skipped with a reason, results within the rule, names kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, segmentation

from mnv2_fused import fuse, report, unfuse
from mnv2_fused.testing import agreement, fit_batch_norm, perturb_batch_norm, threads


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield


def timm_model(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, **({} if options else {"num_classes": 10}), **options)


def transformers_model(**options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.MobileNetV2Model(transformers.MobileNetV2Config(depth_multiplier=0.35, **options))


def smp_model(name: str, **options) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return getattr(smp, name)("mobilenet_v2", encoder_weights=None, **options)


def segmentation_model(name: str) -> nn.Module:
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


def detection_backbone_and_heads(name: str) -> nn.Module:
    """A detector's convolutional part; what follows sorts boxes, where rounding decides which comes first."""
    detector = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3)
    if name.startswith("ssdlite"):
        return _Ssdlite(detector)
    return detector.backbone


class _Ssdlite(nn.Module):
    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


# model, and how many of its blocks are fused
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=10), 17),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), 11),
    "mobilenet_v3_large": (lambda: models.mobilenet_v3_large(num_classes=10), 15),
    "mnasnet0_5": (lambda: models.mnasnet0_5(num_classes=10), 16),
    "mnasnet0_75": (lambda: models.mnasnet0_75(num_classes=10), 16),
    "mnasnet1_0": (lambda: models.mnasnet1_0(num_classes=10), 16),
    "mnasnet1_3": (lambda: models.mnasnet1_3(num_classes=10), 16),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=10), 16),
    "efficientnet_b1": (lambda: models.efficientnet_b1(num_classes=10), 23),
    "efficientnet_b2": (lambda: models.efficientnet_b2(num_classes=10), 23),
    "ssdlite320_mobilenet_v3_large": (lambda: detection_backbone_and_heads("ssdlite320_mobilenet_v3_large"), 31),
    "lraspp_mobilenet_v3_large": (lambda: segmentation_model("lraspp_mobilenet_v3_large"), 15),
    "deeplabv3_mobilenet_v3_large": (lambda: segmentation_model("deeplabv3_mobilenet_v3_large"), 15),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        lambda: detection_backbone_and_heads("fasterrcnn_mobilenet_v3_large_320_fpn"),
        15,
    ),
    **{
        f"timm {name}": (lambda name=name: timm_model(name), count)
        for name, count in {
            "mobilenetv2_035": 17,
            "mobilenetv2_050": 17,
            "mobilenetv2_100": 17,
            "mobilenetv2_110d": 22,
            "mobilenetv2_120d": 26,
            "mobilenetv2_140": 17,
            "mobilenetv3_large_100": 15,
            "efficientnet_b0": 16,
            "efficientnet_lite0": 16,
            "tf_efficientnet_b0": 16,
            "mnasnet_100": 17,
        }.items()
    },
    "timm features_only": (lambda: timm_model("mobilenetv2_035", features_only=True), 17),
    **{
        f"transformers, stride {stride}{', tf_padding' if tf_padding else ''}": (
            lambda stride=stride, tf_padding=tf_padding: transformers_model(
                output_stride=stride, tf_padding=tf_padding
            ),
            17,
        )
        for stride in (8, 16, 32)
        for tf_padding in (True, False)
    },
    "smp Unet": (lambda: smp_model("Unet"), 17),
    "smp DeepLabV3Plus": (lambda: smp_model("DeepLabV3Plus"), 22),
    "smp DeepLabV3Plus, stride 8": (lambda: smp_model("DeepLabV3Plus", encoder_output_stride=8), 22),
}
SKIPPED = {name: ["its layers lie among others' in one Sequential"] for name in MODELS if name.startswith("mnasnet")}


def tensors_in(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from tensors_in(value)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name):
    make, count = MODELS[name]
    torch.manual_seed(0)
    model = perturb_batch_norm(make()).eval()
    x = torch.randn(1, 3, 64, 64)
    # Random weights with made-up statistics would forget the input.
    fit_batch_norm(model, torch.randn(4, 3, 64, 64))
    fused = fuse(model)
    rows = report(fused)
    assert [b.backend for b in rows.fused] == ["cpu"] * count
    assert all(b.reason is None for b in rows.fused)
    expected = SKIPPED.get(name, [])
    assert len(rows.skipped) == len(expected)
    assert all(part in b.reason for part, b in zip(expected, rows.skipped, strict=True))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert type(fused) is type(model) or issubclass(type(fused), type(model))

    # What is not a block runs in channels_last in a fused model: so does eager's, down to the strides of a 1x1 kernel.
    x = x.to(memory_format=torch.channels_last)
    model._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [list(tensors_in(m(x))) for m in (fused, model)]
        truth = list(tensors_in(copy.deepcopy(model).double()(x.double())))
    assert len(truth) == len(results[0]) > 0
    for ours, theirs, reference in zip(*results, truth, strict=True):
        found = agreement(ours, theirs, reference)
        assert found.ok, found
    assert truth[-1].std() > 0
    with torch.no_grad():
        for ours, theirs in zip(tensors_in(unfuse(fused)(x)), results[1], strict=True):
            assert torch.equal(ours, theirs)


def test_bytes_never_written_of_a_model_beyond_mobilenet_v2():
    model = models.mobilenet_v3_small(num_classes=10).eval()
    result = report(fuse(model), (1, 3, 64, 64))
    first = result.blocks[1]  # 16 -> 72 at 16x16, stride 2
    assert str(first.spec).startswith("16 -> 72 -> 24, stride 2")
    assert first.bytes_never_written == 72 * (16 * 16 + 8 * 8) * 4
    assert result.bytes_never_written == sum(b.bytes_never_written for b in result.blocks)
