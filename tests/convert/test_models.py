"""MobileNetV1, V2, V3: published counts, torchvision's weights, fused against the ordinary modules."""

import copy
import re
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

import mnv2_fused
from mnv2_fused import models
from mnv2_fused.module import FusedBlock
from mnv2_fused.testing import agreement, fit_batch_norm, perturb_batch_norm
from mnv2_fused.tools.cost import cost

BLOCKS = {"mobilenet_v1": 13, "mobilenet_v2": 17, "mobilenet_v3_large": 15, "mobilenet_v3_small": 11}
by_name = pytest.mark.parametrize("name", BLOCKS)
by_torchvisions_name = pytest.mark.parametrize("name", [name for name in BLOCKS if name != "mobilenet_v1"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(*size, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, *size, dtype=dtype).to(memory_format=torch.channels_last)


def build(name, size=(64, 64), **options):
    """A model in eval whose statistics fit random images of ``size``."""
    model = perturb_batch_norm(getattr(models, name)(**options)).eval()
    return fit_batch_norm(model, images(*size, batch=8)).eval()


def ran_fused(model, x):
    """The model's result, and how many blocks had folded weights for it, alone or within a run of several."""
    y = model(x)
    runs = [step.modules for step in model._prepared.steps if hasattr(step, "geometry")]
    in_runs = {m for modules in runs for m in modules}
    blocks = [m for m in model.features if isinstance(m, FusedBlock)]
    return y, sum(block in in_runs or block._ready is not None for block in blocks)


# Millions of parameters and of multiply-adds, each from least to most of what was published: the MobileNetV1 paper's
# tables 6 and 7, its code's README (569), the V2 paper's table 4 and its code's README, the V3 paper's table 3, and
# what torchvision documents for its models.
PUBLISHED = [
    ("mobilenet_v1", 1.0, 224, (4.2, 4.2), (569, 575)),
    ("mobilenet_v1", 0.75, 224, (2.6, 2.6), (325, 325)),
    ("mobilenet_v1", 0.5, 224, (1.3, 1.3), (149, 150)),
    ("mobilenet_v1", 0.25, 224, (0.5, 0.5), (41, 41)),
    ("mobilenet_v1", 1.0, 192, (4.2, 4.2), (418, 418)),
    ("mobilenet_v1", 1.0, 160, (4.2, 4.2), (290, 291)),
    ("mobilenet_v1", 1.0, 128, (4.2, 4.2), (186, 186)),
    ("mobilenet_v2", 1.0, 224, (3.4, 3.5), (300, 301)),
    ("mobilenet_v2", 1.4, 224, (6.1, 6.9), (582, 585)),
    ("mobilenet_v2", 0.75, 224, (2.6, 2.6), (209, 209)),
    ("mobilenet_v2", 0.5, 224, (2.0, 2.0), (97, 97)),
    ("mobilenet_v3_large", 1.0, 224, (5.4, 5.5), (217, 219)),
    ("mobilenet_v3_small", 1.0, 224, (2.5, 2.9), (56, 66)),
]


@pytest.mark.parametrize("name, width, resolution, parameters, multiply_adds", PUBLISHED)
def test_counts_are_the_published_ones(name, width, resolution, parameters, multiply_adds):
    found = cost(getattr(models, name)(width_mult=width), (1, 3, resolution, resolution))
    least, most = parameters
    assert least <= round(found.parameters / 1e6, 1) <= most
    least, most = multiply_adds
    assert least <= round(found.multiply_adds / 1e6) <= most
    assert len(found.report.fused) == BLOCKS[name] and not found.report.skipped


@pytest.mark.slow
@by_torchvisions_name
@pytest.mark.parametrize("width", [1.0, 0.35, 0.75, 1.4])
def test_torchvisions_weights_load_and_give_its_logits(name, width):
    theirs = getattr(torchvision.models, name)(width_mult=width)
    theirs = fit_batch_norm(perturb_batch_norm(theirs).eval(), images(64, 64, batch=8))
    ours = getattr(models, name)(width_mult=width).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(mnv2_fused.report(ours).fused) == BLOCKS[name]
    theirs, x = theirs.to(memory_format=torch.channels_last), images(64, 64, batch=4)
    with torch.no_grad():
        reference = copy.deepcopy(theirs).double()(x.double())
        found = agreement(ours(x), theirs(x), reference)
        assert found.ok, found
        torch.testing.assert_close(ours.double()(x.double()), reference, rtol=1e-11, atol=1e-11)


@by_torchvisions_name
def test_the_same_seed_gives_torchvisions_initial_weights(name):
    torch.manual_seed(7)
    ours = getattr(models, name)().state_dict()
    torch.manual_seed(7)
    theirs = getattr(torchvision.models, name)().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


by_width_and_size = pytest.mark.parametrize(
    "width, size", [(1.0, (64, 64)), (0.25, (97, 65)), (0.6, (33, 130)), (1.3, (75, 51)), (0.5, (7, 31)), (0.5, (1, 1))]
)


@pytest.mark.slow
@by_name
@by_width_and_size
def test_fused_is_within_the_rule(name, width, size):
    model, x = build(name, width_mult=width), images(*size, batch=4)
    plain = mnv2_fused.unfuse(model)
    with torch.no_grad():
        y, fused = ran_fused(model, x)
        assert fused == BLOCKS[name]
        found = agreement(y, plain(x), plain.double()(x.double()))
    assert y.shape == (4, 1000)
    assert found.ok, found


@by_name
@by_width_and_size
def test_each_block_is_within_the_rule_in_float64(name, width, size):
    """Not the whole network: eager in float64 is its own reference, and the rule then allows the rounding of one op."""
    model, x = build(name, width_mult=width).double(), images(*size, dtype=torch.float64)
    blocks = 0
    with torch.no_grad():
        for layer, plain in zip(model.features, mnv2_fused.unfuse(model).features, strict=True):
            expected = plain(x)
            if isinstance(layer, FusedBlock):
                found = agreement(layer(x), expected, expected)
                assert found.ok, f"{layer.spec}: {found}"
                blocks += layer._ready is not None
            x = expected
    assert blocks == BLOCKS[name]


@by_name
def test_every_block_is_reported_as_fused(name):
    report = mnv2_fused.report(getattr(models, name)().eval(), (1, 3, 224, 224))
    assert len(report.fused) == BLOCKS[name] and not report.skipped
    assert [block.reason for block in report.blocks] == [None] * BLOCKS[name]
    assert {block.backend for block in report.blocks} == {"cpu"}
    assert report.bytes_never_written > 2**20


def test_what_each_block_computes():
    def specs(name):
        return [block.spec for block in mnv2_fused.report(getattr(models, name)()).blocks]

    v1 = specs("mobilenet_v1")
    assert all(not spec.expand and not spec.residual and spec.out_activation == "relu6" for spec in v1)
    assert sum(spec.stride == 2 for spec in v1) == 4
    expected = [spec for spec, _ in mnv2_fused.testing.mobilenet_v2_blocks()]
    assert specs("mobilenet_v2") == expected
    large, small = specs("mobilenet_v3_large"), specs("mobilenet_v3_small")
    assert [spec.squeeze_channels for spec in large] == [0] * 3 + [24, 32, 32] + [0] * 4 + [120, 168, 168, 240, 240]
    assert [spec.squeeze_channels for spec in small] == [8, 0, 0, 24, 64, 64, 32, 40, 72, 144, 144]
    assert {spec.gate for spec in large + small if spec.squeeze_channels} == {"hardsigmoid"}


@by_name
def test_training_gives_the_gradients_of_the_ordinary_modules(name):
    model = getattr(models, name)(width_mult=0.25, num_classes=5, dropout=0.0).double().train()
    plain, x = mnv2_fused.unfuse(model), images(48, 48, batch=4, dtype=torch.float64)
    target = torch.arange(4)
    for m in (model, plain):
        nn.functional.cross_entropy(m(x), target).backward()
    grads = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad)
    assert sum(p.grad.abs().max() > 0 for p in model.parameters()) == len(grads)
    # And the statistics moved, as those of the ordinary modules did.
    moved, fresh = dict(model.named_buffers()), dict(getattr(models, name)(width_mult=0.25).named_buffers())
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(moved[key], buffer)
        assert not torch.equal(buffer, fresh[key].to(buffer.dtype))


@by_torchvisions_name
def test_training_is_torchvisions(name):
    options = {"width_mult": 0.25, "num_classes": 5, "dropout": 0.0}
    theirs = getattr(torchvision.models, name)(**options).double()
    ours = getattr(models, name)(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x, target = images(48, 48, batch=4, dtype=torch.float64), torch.arange(4)
    for m in (ours, theirs):
        nn.functional.cross_entropy(m(x), target).backward()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    for buffer, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@by_name
def test_gradients_in_eval(name):
    model = build(name, width_mult=0.25, num_classes=5).double()
    plain, x = mnv2_fused.unfuse(model), images(48, 48, dtype=torch.float64)
    for m in (model, plain):
        m(x).square().sum().backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-8, atol=1e-8)


@by_name
def test_weights_that_change_after_a_call_are_noticed(name):
    model, x = build(name, width_mult=0.25, num_classes=5), images(64, 64)
    other = build(name, width_mult=0.25, num_classes=5)
    with torch.no_grad():
        first = model(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x)) and not torch.equal(model(x), first)
        for key, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.mul_(1.5).add_(0.01)
            assert not torch.equal(model(x), other(x)), key
            parameter.copy_(saved)
            assert torch.equal(model(x), other(x)), key


@by_name
def test_copies_run_fused_and_unfuse(name, copied):
    model, x = build(name, width_mult=0.25, num_classes=5), images(64, 64)
    with torch.no_grad():
        other, expected = copied(model), model(x)
        y, fused = ran_fused(other, x)
        assert torch.equal(y, expected) and fused == BLOCKS[name]
        plain = mnv2_fused.unfuse(other)
        torch.testing.assert_close(copied(plain)(x), expected, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, FusedBlock) for m in plain.modules())
    assert list(plain.state_dict()) == list(model.state_dict())


@by_name
def test_built_on_the_meta_device(name):
    with torch.device("meta"):
        model = getattr(models, name)(width_mult=0.25, num_classes=5).eval()
    loaded = build(name, width_mult=0.25, num_classes=5)
    model = model.to_empty(device="cpu")
    model.load_state_dict(loaded.state_dict())
    x = images(64, 64)
    with torch.no_grad():
        y, fused = ran_fused(model, x)
        assert torch.equal(y, loaded(x)) and fused == BLOCKS[name]


def test_channels_are_multiples_of_8():
    for name in BLOCKS:
        for width in (0.1, 0.33, 0.85, 1.17, 2.0):
            convs = [m for m in getattr(models, name)(width_mult=width).features.modules() if isinstance(m, nn.Conv2d)]
            assert all(conv.out_channels % 8 == 0 for conv in convs), (name, width)
    # 11.2 channels are not rounded down to 8, which is less than 90 % of them.
    assert models.mobilenet_v2(width_mult=0.35).features[0][0].out_channels == 16
    assert models.mobilenet_v2(width_mult=0.5).classifier[1].in_features == 1280
    assert models.mobilenet_v2(width_mult=1.4).classifier[1].in_features == 1792


@by_name
@pytest.mark.parametrize(
    "options, named",
    [
        ({"width_mult": 0.0}, "width_mult .*0.0"),
        ({"width_mult": float("nan")}, "width_mult .*nan"),
        ({"width_mult": float("inf")}, "width_mult .*inf"),
        ({"num_classes": 0}, "num_classes .*0"),
        ({"dropout": 1.5}, "1.5"),
    ],
    ids=str,
)
def test_bad_options_are_named(name, options, named):
    with pytest.raises(ValueError, match=named):
        getattr(models, name)(**options)


def test_dropout_is_passed_on():
    for name in BLOCKS:
        dropouts = [m for m in getattr(models, name)(dropout=0.4).modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in dropouts] == [0.4]


def test_models_and_cost_without_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import mnv2_fused, torch\n"
        "from mnv2_fused.__main__ import main\n"
        "from mnv2_fused import models\n"
        f"for name in {list(BLOCKS)}:\n"
        "    model = getattr(models, name)(width_mult=0.25).eval()\n"
        "    x = torch.randn(1, 3, 33, 33)\n"
        "    torch.testing.assert_close(model(x), mnv2_fused.unfuse(model)(x))\n"
        "    assert main(['cost', name, '--resolution', '64']) == 0\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for name, count in BLOCKS.items():
        assert f"{name} on 1x3x64x64" in ran.stdout and f"{count} blocks, " in ran.stdout


def test_cost_as_a_command():
    command = [sys.executable, "-m", "mnv2_fused", "cost", "mobilenet_v1", "--resolution", "224"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    totals = r"parameters +4,231,976", r"multiply-adds +568,740,352", r"separable +13 pair", r"fused +13 blocks, "
    for total in totals:
        assert re.search(rf"^{total}", ran.stdout, re.MULTILINE), total
