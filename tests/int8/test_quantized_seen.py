"""Networks of any class, whose forward is seen to run modules in a row: quantised as one."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.int8 import smooth, sqnr
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from mnv2_fused import quantize, quantized_like, quantized_report
from mnv2_fused.int8.modules import QuantizedBlock, QuantizedModel, QuantizedRow, Unfold
from mnv2_fused.testing import fit_batch_norm


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        total = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        return super().forward(F.pad(x, (total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2))))


class Static(nn.Conv2d):
    """Pads so for even sizes, whatever the size."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.kernel_size[0] > 1 else x)


class Reflects(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1), mode="reflect") if self.kernel_size[0] > 1 else x)


class Network(nn.Module):
    """A network as anyone writes one: blocks in a ModuleList."""

    def __init__(self, conv=nn.Conv2d, padding=1):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = conv(3, 16, 3, 2, padding, bias=False), nn.BatchNorm2d(16)
        settings = [(16, 8, 1, 1), (8, 12, 2, 3), (12, 12, 1, 3), (12, 16, 2, 3)]
        self.blocks = nn.ModuleList(InvertedResidual(*setting) for setting in settings)
        self.head, self.head_norm = conv(16, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.act, self.pool, self.classifier = nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)
        fit_batch_norm(self.eval(), smooth(16, 3, 64))

    def features(self, x):
        x = self.act(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.act(self.head_norm(self.head(x)))

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))


IMAGES, X = smooth(16, 3, 64, seed=1), smooth(4, 3, 96, seed=2)


def near(int8, model):
    return sqnr(model(X), int8(X)) > 20


def test_a_network_of_any_class_is_one_row():
    model = Network()
    int8 = quantize(model, IMAGES)
    assert type(int8) is QuantizedRow and near(int8, model)
    report = quantized_report(int8)
    names = ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "head", "classifier"]
    assert [row.name for row in report.layers] == names and not report.unquantized
    other = quantized_like(model)
    other.load_state_dict(int8.state_dict())
    assert torch.equal(other(X), int8(X)) and torch.equal(copy.deepcopy(int8)(X), int8(X))
    with torch.no_grad():
        compiled = torch.compile(int8, fullgraph=True, backend="eager")
        assert torch.equal(compiled(X), int8(X))


def test_without_rows_it_stays_of_its_class():
    model = Network()
    int8 = quantize(model, IMAGES, rows=False)
    assert type(int8) is Network and all(type(block) is QuantizedBlock for block in int8.blocks)
    assert near(int8, model) and int8.features(X).shape == (4, 64, 12, 12)


@pytest.mark.parametrize("conv", [Same, Static])
def test_a_stem_that_pads_otherwise_runs_on_what_lies_under_it(conv):
    model = Network(conv, padding=0)
    int8 = quantize(model, IMAGES)
    assert [type(step) for step in int8.children()] == [Unfold, QuantizedRow] and near(int8, model)
    assert [row.name for row in quantized_report(int8).layers][::5] == ["blocks.0", "classifier"]
    for x in (smooth(2, 3, 64)[..., :61], smooth(2, 3, 64)[..., :63, :]):  # odd sizes
        assert sqnr(model(x), int8(x)) > 20
    with torch.no_grad():
        program = torch.export.export(int8, (X,), dynamic_shapes=({0: torch.export.Dim("images", min=2)},))
        assert torch.equal(program.module()(X[:3]), int8(X[:3]))


def test_a_stem_that_no_layer_computes_stays_float_and_the_head_does_not():
    model = Network(Reflects, padding=0)
    int8 = quantize(model, IMAGES)
    assert type(int8) is QuantizedModel and near(int8, model)
    assert [type(step) for step in int8.children()] == [Reflects, nn.BatchNorm2d, nn.ReLU6, QuantizedRow]
    assert [row.name for row in quantized_report(int8).quantized][-2:] == ["head", "classifier"]


@pytest.mark.parametrize("skip", ["stem", "head", "blocks.2", "classifier"])
@pytest.mark.parametrize("conv", [nn.Conv2d, Same])
def test_what_skip_names_stays_float(skip, conv):
    model = Network(conv, padding=int(conv is nn.Conv2d))
    int8 = quantize(model, IMAGES, skip=(skip,))
    assert near(int8, model)
    kept = [row.name for row in quantized_report(int8).unquantized]
    assert kept == ["blocks.0" if skip == "stem" else skip]
    assert quantized_like(model, skip=(skip,)).state_dict().keys() == int8.state_dict().keys()


class Pyramid(Network):
    """Gives what lies between its blocks, too."""

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        between = []
        for block in self.blocks:
            x = block(x)
            between.append(x)
        return between


def test_a_network_that_does_more_is_quantised_block_by_block():
    model = Pyramid()
    int8 = quantize(model, IMAGES)
    assert type(int8).__name__ == "Pyramid"
    assert all(sqnr(a, b) > 20 for a, b in zip(model(X), int8(X), strict=True))


class BySize(Network):
    def forward(self, x):
        return super().forward(x * 0.5 if x.shape[2] > 100 else x)


def test_a_forward_that_depends_on_the_size_is_refused():
    assert type(quantize(BySize(), IMAGES)) is QuantizedRow
    with pytest.raises(ValueError, match=r"depends on the size of images.*give rows=False"):
        quantize(BySize(), smooth(4, 3, 128))


def test_images_of_many_sizes():
    model = Network()
    int8 = quantize(model, [smooth(1, 3, 64 + 4 * i, seed=i) for i in range(20)])
    assert type(int8) is QuantizedRow and near(int8, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_050", "efficientnet_lite0"])
def test_timm(name):
    torch.manual_seed(0)
    model = fit_batch_norm(timm.create_model(name, num_classes=10).eval(), smooth(8, 3, 64))
    int8 = quantize(model, smooth(8, 3, 64, seed=1))
    assert type(int8) is QuantizedRow and not quantized_report(int8).unquantized
