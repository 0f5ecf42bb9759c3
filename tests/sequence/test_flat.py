"""Blocks whose layers lie among others' in one nn.Sequential: what is found, what runs, and what must stay right."""

import copy
import gc
import random
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
import torchvision
from support.flat import MODELS, V1, check, depthwise, fitted, grouped, pointwise, separable, stem
from support.inputs import channels_last, image
from support.models import BW, HEAD, LINEAR, POOLED, STEM, B, near
from torch import nn
from torch.nn.utils import prune
from torchvision.models.mobilenetv2 import InvertedResidual

from mnv2_fused import fuse, report, unfuse
from mnv2_fused.sequence import FusedSequential
from mnv2_fused.sequence.seen import RunsAsSeen
from mnv2_fused.testing import perturb_batch_norm
from mnv2_fused.tools.cost import cost

pytestmark = pytest.mark.usefixtures("nothing_records")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_found_and_run(name, dtype, ran):
    _, expected, names = MODELS[name]
    plain = copy.deepcopy(fitted(name)).to(dtype)
    model = fuse(plain, strict=True)
    assert [(block.name, block.fused, block.backend) for block in report(model).blocks] == [
        (n, True, "cpu") for n in names
    ]
    assert [(block.name, block.fused) for block in report(plain).blocks] == [(n, False) for n in names]
    for x in (image(2, 3, 33, 40, dtype=dtype), channels_last(1, 3, 64, 64, dtype=dtype)):
        ran.clear()
        before = x.clone()
        check(model, plain, x)
        assert ran == expected and torch.equal(x, before)


@pytest.mark.parametrize("name", MODELS)
def test_the_tree_stays_as_it_was(name):
    plain, x = fitted(name), image(2, 3, 33, 40)
    model = fuse(plain)
    assert type(model) is FusedSequential and len(model) == len(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    y = model(x)
    for other in (unfuse(model), unfuse(fuse(model))):
        assert type(other) is nn.Sequential and vars(other).keys() == vars(plain).keys()
        assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(other(x), plain(x))
    assert torch.equal(model(x), y) and torch.equal(fuse(model)(x), y)


def test_indexing_and_slices(ran):
    plain, model, x = fitted("MobileNetV1"), fuse(fitted("MobileNetV1")), image(2, 3, 33, 40)
    model(x)
    ran.clear()
    y = x
    for i in range(len(plain)):
        assert torch.equal(model[i](y), plain[i](y.clone()))
        y = plain[i](y.clone())
    for cut in (slice(0, 5), slice(3, None), slice(5, 12)):
        given = x if cut.start == 0 else plain[: cut.start](x)
        assert torch.equal(model[cut](given.clone()), plain[cut](given.clone()))
    assert not ran
    check(model, plain, x)
    assert len(ran) == 1


def test_copies_and_pickles(copied, ran):
    model, x = fuse(fitted("MobileNetV2")), image(2, 3, 33, 40)
    y = model(x)
    other = copied(model)
    ran.clear()
    assert torch.equal(other(x), y) and ran == MODELS["MobileNetV2"][1]
    # Its blocks are of its own layers.
    other[3].weight.mul_(2)
    check(other, unfuse(other), x)
    assert torch.equal(model(x), y) and not torch.equal(other(x), y)


def test_frozen(ran):
    for name in MODELS:
        plain, x = fitted(name), image(2, 3, 33, 40)
        frozen = fuse(plain, frozen=True)
        ran.clear()
        y = check(frozen, plain, x)
        assert name and ran == MODELS[name][1] and torch.equal(y, fuse(plain)(x))
        assert not any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in frozen.modules())


class Subclass(nn.Sequential):
    pass


def with_forward():
    model = nn.Sequential(*V1)
    model.forward = lambda x: x.mean()
    return model


# Reasons of blocks that stay unfused, by the depthwise convolution's name.
REFUSED = {
    "multiplier": (lambda: [nn.Conv2d(8, 16, 3, 1, 1, groups=8), *stem(16)[1:], *pointwise(16, 8)], "out_channels"),
    "kernel": (lambda: [*depthwise(8, kernel=9, padding=4), *pointwise(8, 8)], "weight is"),
    "dilated": (lambda: [*depthwise(8, dilation=(1, 2)), *pointwise(8, 8)], "dilation"),
    "reflecting": (lambda: [*depthwise(8, padding_mode="reflect"), *pointwise(8, 8)], "padding_mode"),
    "strided 1x1": (lambda: [*depthwise(8), *pointwise(8, 8, stride=2)], "project convolution has stride"),
    "grouped 1x1": (lambda: [*depthwise(8), *pointwise(8, 8, groups=2)], "groups"),
    "activation": (lambda: [*depthwise(8)[:2], nn.Softplus(), *pointwise(8, 8)], "activation is"),
    "idle": (lambda: [*depthwise(8)[:2], nn.Identity(), *pointwise(8, 8)], "does nothing"),
    "dropout": (lambda: [*depthwise(8)[:2], nn.Dropout(0.5), *pointwise(8, 8)], "does nothing"),
    "channels": (lambda: [*depthwise(8), *pointwise(6, 8)], "do not match"),
    "pruned": (lambda: [*depthwise(8), pruned(), nn.BatchNorm2d(8)], "computed from others"),
    "hooked": (lambda: [*depthwise(8)[:2], hooked(), *pointwise(8, 8)], "hook"),
    "no statistics": (lambda: [depthwise(8)[0], no_statistics(), nn.ReLU(), *pointwise(8, 8)], "statistics"),
    "half": (lambda: [*depthwise(8), *(m.double() for m in pointwise(8, 8))], "mixed"),
}


def pruned():
    return prune.identity(nn.Conv2d(8, 8, 1), "weight")


def no_statistics():
    return nn.BatchNorm2d(8, track_running_stats=False)


def hooked():
    act = nn.ReLU()
    act.register_forward_hook(lambda *_: None)
    return act


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_block_stays(name, ran):
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    plain = nn.Sequential(*stem(), *make(), nn.Sigmoid(), *separable(8, 8)).eval()
    rows = report(plain).blocks
    fits = [row for row in rows if row.spec is not None]
    assert len(fits) == 1 and int(fits[0].name.split("-")[0]) > 6
    refused = [row for row in rows if row.spec is None]
    assert [row.name for row in refused] == ([] if reason is None else ["3"])
    assert all(reason in row.reason for row in refused)
    model, x = fuse(plain), image(2, 3, 33, 40)
    if name in ("channels", "half"):
        with pytest.raises(RuntimeError):
            plain(x)
        with pytest.raises(RuntimeError):
            model(x)
    else:
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    if reason is not None:
        with pytest.raises(ValueError, match="would leave"):
            fuse(plain, strict=True)


def test_layers_that_run_twice_stay():
    norm, conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
    for shared in (
        [conv, norm, nn.ReLU(), *pointwise(8, 8), conv, nn.BatchNorm2d(8), nn.ReLU(), *pointwise(8, 8)],
        [conv, norm, nn.ReLU(), nn.Conv2d(8, 8, 1), norm, nn.ReLU()],
        2 * separable(8, 8),
    ):
        plain = perturb_batch_norm(nn.Sequential(*stem(), *shared, nn.Sigmoid(), *separable(8, 4)).eval())
        model, x = fuse(plain), image(2, 3, 33, 40)
        assert len(report(model).fused) == 1
        assert any("twice" in (row.reason or "") for row in report(plain).skipped)
        check(model, plain, x)
        assert cost(plain, x.shape).fused_bytes < cost(plain, x.shape).eager_bytes


@pytest.mark.parametrize("make", [lambda: Subclass(*V1), with_forward], ids=["subclass", "forward"])
def test_sequentials_that_do_something_else(make):
    plain, x = make().eval(), image(2, 3, 33, 40)
    with pytest.warns(UserWarning, match="fused nothing"):
        model = fuse(plain)
    assert type(model) is type(plain) and torch.equal(model(x), plain(x))
    assert all(row.reason for row in report(plain).blocks) and len(report(plain).blocks) == 3


def test_names_that_fused_blocks_use():
    for name in ("backend", "flat_now", "_flat", "_apart", "parts"):
        layers = OrderedDict(zip(["a", "b", name, "d", "e", "f"], separable(8, 8), strict=True))
        plain, x = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1)), image(2, 8, 9, 9)
        for key, layer in layers.items():
            plain.add_module(key, layer)
        plain.eval()
        with pytest.warns(UserWarning, match=f"child {name} has a name"):
            model = fuse(plain)
        assert torch.equal(model(x), plain(x))


def test_an_expansion_is_not_taken_from_the_layer_before():
    """A 1x1 convolution whose block would not fit stays what it was; the block behind it runs without it."""
    for first in (pointwise(8, 12, stride=2), pointwise(8, 12, groups=2), [nn.Conv2d(8, 12, 3, 1, 1), *stem(12)[1:]]):
        plain = perturb_batch_norm(nn.Sequential(*stem(), *first, *separable(12, 16)).eval())
        assert [row.name for row in report(fuse(plain)).fused] == ["6-11"]
        check(fuse(plain), plain, image(2, 3, 33, 40))
    plain = perturb_batch_norm(nn.Sequential(*stem(), *pointwise(8, 12), *separable(12, 16)).eval())
    assert [row.name for row in report(fuse(plain)).fused] == ["3-11"]


def test_a_filter_and_a_backend(ran):
    plain, x = fitted("MobileNetV1"), image(2, 3, 33, 40)
    names = []
    model = fuse(plain, filter_fn=lambda name, block: names.append((name, type(block))) or name != "9-14")
    assert names == [(name, nn.Sequential) for name in ("3-8", "9-14", "15-20")]
    check(model, plain, x)
    assert ran == [[STEM], [HEAD, BW]]
    assert [row.name for row in report(model).fused] == ["3-8", "15-20"]
    ran.clear()
    check(fuse(model), plain, x)
    assert ran == [[STEM, BW, BW]]
    eager = fuse(plain, backend="eager")
    assert torch.equal(eager(x), plain(x)) and {row.backend for row in report(eager).blocks} == {"eager"}
    assert torch.equal(fuse(plain, backend="cpu")(x), fuse(plain)(x))


def test_report_and_cost_know_what_is_not_written():
    plain = fitted("MobileNetV2")
    model = fuse(plain)
    found = report(model, (1, 3, 32, 32))
    # What the expand and depthwise convolutions of each block give, in float32.
    assert [row.bytes_never_written for row in found.blocks] == [
        4 * 8 * 256,
        4 * 30 * (256 + 64),
        4 * 36 * (64 + 64),
    ]
    assert [(row.name, row.what) for row in found.layers] == [
        ("0", "3x3 stem, inside the block behind it"),
        ("24", "1x1 convolution and pooling"),
        ("30", "classifier"),
    ]
    by_call = report(model, example_inputs=image(1, 3, 32, 32))
    assert by_call.blocks == found.blocks and by_call.layers == found.layers
    costs = cost(plain, (1, 3, 32, 32))
    # Each block's result, of the head's kernel the mean, and the classifier's.
    assert costs.fused_bytes == 4 * (10 * 256 + 12 * 64 + 12 * 64 + 24 + 5)
    for name in MODELS:
        costs = cost(fitted(name), (2, 3, 32, 32))
        assert costs.fused_bytes < costs.eager_bytes and costs.fused_peak > 0


class Network(nn.Module):
    """Whose forward runs a flat Sequential among other layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*copy.deepcopy(V1))
        self.tail = nn.Sequential(*grouped(*separable(16, 20)))
        self.head, self.norm, self.act = pointwise(20, 24)
        self.classifier = nn.Linear(24, 5)

    def forward(self, x):
        x = self.act(self.norm(self.head(self.tail(self.features(x)))))
        return self.classifier(x.mean([2, 3]))


class InPieces(Network):
    """Who takes results from inside the Sequential."""

    def forward(self, x):
        inside = []
        for layer in self.features:
            x = layer(x)
            inside.append(x.mean())
        return self.classifier(self.head(self.tail(x)).mean([2, 3])) + torch.stack(inside).sum()


class Sliced(Network):
    def forward(self, x):
        return self.features[4:](self.features[:4](x)).mean([2, 3])


@pytest.mark.parametrize("cls", [Network, InPieces, Sliced])
def test_networks_of_any_class(cls, ran, copied):
    torch.manual_seed(0)
    plain, x = perturb_batch_norm(cls().eval()), image(2, 3, 33, 40)
    model = fuse(plain)
    assert isinstance(model, RunsAsSeen) and len(report(model).fused) == 4
    for _ in range(3):
        ran.clear()
        y = check(model, plain, x)
    if cls is Network:
        assert ran == [[STEM, BW, BW, BW, POOLED, LINEAR]]
    other = copied(model)
    for _ in range(2):
        other(x)
    assert torch.equal(other(x), y)
    model.features[3].weight.mul_(2)
    plain.features[3].weight.mul_(2)
    check(model, plain, x)
    for one in (model, plain):
        one.features[6] = copy.deepcopy(one.features[6])
        one.features[6].weight.mul_(0.5)
        one.features[8] = nn.ReLU6()
    for _ in range(3):
        check(model, plain, x)
    assert type(unfuse(model).features) is nn.Sequential


def any_row(rng):
    """Channels of its input, and layers as they might lie one after the other, a block or not."""
    channels, row, relu, pointwise_next = rng.choice([4, 8]), [], nn.ReLU(inplace=True), True
    first = channels
    for _ in range(rng.randint(2, 9)):
        pointwise_next = not pointwise_next
        out, size, options = channels, 1, {"bias": rng.random() < 0.3}
        if rng.random() < 0.15:
            size, options["groups"] = rng.choice([(1, 2), (3, 1), (3, channels // 2)])
        elif pointwise_next:
            out, options["stride"] = rng.choice([4, 6, 8, 12]), rng.choice([1] * 9 + [2])
        else:
            size, options["groups"] = rng.choice([3, 3, 3, 5, 7, 9]), channels
            out, options["stride"] = rng.choice([channels] * 5 + [2 * channels]), rng.choice([1, 1, 2])
        group = [nn.Conv2d(channels, out, size, padding=size // 2, **options)]
        channels = out
        if rng.random() < 0.85:
            group.append(nn.GroupNorm(2, out) if rng.random() < 0.1 else nn.BatchNorm2d(out))
        if rng.random() < 0.8:
            others = nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Identity, nn.Sigmoid, nn.Dropout
            group.append(relu if rng.random() < 0.7 else rng.choice(others)())
        row += [nn.Sequential(*group)] if rng.random() < 0.3 else group
    cut = rng.randint(1, len(row)) if rng.random() < 0.3 else 0
    return first, nn.Sequential(*([nn.Sequential(*row[:cut])] if cut else []), *row[cut:])


@pytest.mark.parametrize("seed", range(40))
def test_any_row_of_layers(seed):
    torch.manual_seed(seed)
    channels, plain = any_row(random.Random(seed))
    perturb_batch_norm(plain.eval())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"fuse\(\) fused nothing")
        for dtype in (torch.float32, torch.float64):
            x = image(2, channels, 21, 18, dtype=dtype)
            check(fuse(plain.to(dtype)), plain, x)
            assert near(fuse(plain, frozen=True)(x), plain(x))
        assert [n for n, _ in unfuse(fuse(plain)).named_modules()] == [n for n, _ in plain.named_modules()]
        assert cost(plain, x.shape).multiply_adds > 0 and report(fuse(plain), x.shape) is not None


def test_torchvisions_mnasnet(ran):
    torch.manual_seed(0)
    plain = perturb_batch_norm(torchvision.models.mnasnet0_5(num_classes=7).eval())
    model, x = fuse(plain, strict=True), image(2, 3, 64, 64)
    for _ in range(3):
        ran.clear()
        check(model, plain, x)
    assert ran == [[STEM, *[B] * 16, POOLED, LINEAR]]
    assert report(model).fused[0].name == "layers.3-7" and len(report(model).fused) == 17
    frozen = fuse(plain, frozen=True)
    assert torch.equal(frozen(x), model.classifier(model.layers(x).mean([2, 3])))
    features = model.layers(x)
    assert near(features, plain.layers(x)) and ran[-1] == [STEM, *[B] * 16, HEAD]


def test_nothing_keeps_layers_alive():
    model, x = fuse(fitted("MobileNetV1")), image(2, 3, 33, 40)
    model(x)
    gone = weakref.ref(model[6])
    del model
    gc.collect()
    assert gone() is None


def test_a_block_of_a_library_keeps_its_layers():
    """A chain of a Sequential of its own is a block by itself, whatever lies in front of it."""
    plain = perturb_batch_norm(nn.Sequential(*stem(), *pointwise(8, 12), nn.Sequential(*separable(12, 16))).eval())
    assert [row.name for row in report(fuse(plain)).fused] == ["6"]
    check(fuse(plain), plain, image(2, 3, 33, 40))
    sequence = nn.Sequential(*copy.deepcopy(V1), InvertedResidual(16, 16, 1, 3)).eval()
    model = fuse(sequence)
    assert len(report(model).fused) == 4
    check(model, sequence, image(2, 3, 33, 40))
