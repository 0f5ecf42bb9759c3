"""Networks of classes that nobody told us of, whose forward is seen to run modules in a row; and those that do more."""

import copy
import io
import pickle
from functools import cache

import pytest
import timm
import torch
import torchvision
from support.inputs import image
from torch import nn
from torch.nn.modules import module as torch_module
from torchvision.models.mobilenetv2 import InvertedResidual

from mnv2_fused import FusedBlock, fuse, report, unfuse
from mnv2_fused.sequence.fused import Run
from mnv2_fused.sequence.seen import RunsAsSeen
from mnv2_fused.testing import agreement, perturb_batch_norm


def body():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            "norm": nn.BatchNorm2d(8),
            "act": nn.ReLU6(inplace=True),
            "blocks": nn.Sequential(
                InvertedResidual(8, 10, 1, 1), InvertedResidual(10, 12, 2, 3), InvertedResidual(12, 12, 1, 3)
            ),
            "head": nn.Conv2d(12, 40, 1, bias=False),
            "head_norm": nn.BatchNorm2d(40),
            "head_act": nn.ReLU6(inplace=True),
            "classifier": nn.Linear(40, 5),
        }
    )


class Network(nn.Module):
    """A network as anyone writes one."""

    def __init__(self):
        super().__init__()
        for name, module in body().items():
            self.add_module(name, module)
        self.flag, self._scale, self.calls = True, 1.0, 0

    def features(self, x):
        x = self.act(self.norm(self.stem(x)))
        return self.head_act(self.head_norm(self.head(self.blocks(x))))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class Flattens(Network):
    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


class Pools(Network):
    def __init__(self):
        super().__init__()
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2)

    def forward(self, x):
        return self.classifier(self.drop(self.pool(self.features(x)).flatten(1)))


class Timm(nn.Module):
    """timm's stages, with norms that hold their activation."""

    def __new__(cls):
        torch.manual_seed(0)
        return timm.create_model("mobilenetv2_035", num_classes=7)


ROWS = {
    "mean": Network,
    "functions": Flattens,
    "modules": Pools,
    "timm": Timm,
    "timm with squeezes": lambda: timm.create_model("efficientnet_b0", num_classes=7),
    "torchvision's MNASNet": lambda: torchvision.models.mnasnet0_5(num_classes=7),
}


@cache
def original(name):
    torch.manual_seed(0)
    return perturb_batch_norm((ROWS.get(name) or OTHERS[name])().eval())


def same(found, model, x):
    with torch.no_grad():
        expected = model(x), copy.deepcopy(model).double()(x.double())
    assert agreement(found, *expected).ok, agreement(found, *expected)
    return True


def runs(model):
    """How many runs, and modules by themselves, the network is now."""
    prepared = model._prepared
    steps = prepared.steps if prepared is not None and prepared.runs else []
    return sum(isinstance(step, Run) for step in steps), sum(not isinstance(step, Run) for step in steps)


def called(model, x, times=3):
    with torch.no_grad():
        return [model(x) for _ in range(times)]


@pytest.mark.parametrize("name", ROWS)
def test_the_whole_network_in_one_call(name):
    model, plain = fuse(original(name)), original(name)
    assert isinstance(model, RunsAsSeen) and isinstance(model, type(plain))
    for size in ((2, 3, 40, 33), (1, 3, 64, 64)):
        x = image(*size)
        seen, first, again = called(model, x)
        assert same(seen, plain, x) and same(first, plain, x) and torch.equal(first, again)
        assert runs(model) == (1, 0)
    assert len(model._shapes) == 2
    assert not torch_module._has_any_global_hook()


def test_with_gradients_and_in_training_it_runs_as_it_did():
    model, plain, x = fuse(original("mean")), original("mean"), image(2, 3, 40, 33)
    called(model, x)
    y = model(x)
    assert y.requires_grad and same(y.detach(), plain, x)
    y.sum().backward()
    assert model.stem.weight.grad is not None
    model.train()
    model(x)
    assert model._row is None
    with torch.inference_mode():
        model.eval()
        for _ in range(3):
            y = model(x)
    assert runs(model) == (1, 0)


def test_gradients_that_nobody_wants_do_not_count():
    model, x = fuse(original("mean")).requires_grad_(False), image(2, 3, 40, 33)
    for _ in range(3):
        y = model(x)
    assert runs(model) == (1, 0) and same(y, original("mean"), x)


class Widens(Network):
    """What is there under autocast alone."""

    def forward(self, x):
        return super().forward(x).float()


@pytest.mark.parametrize("called_before", [False, True])
def test_under_autocast_its_forward_runs(called_before):
    torch.manual_seed(0)
    plain, x = perturb_batch_norm(Widens().eval()), image(2, 3, 33, 40)
    model, wide = fuse(plain), copy.deepcopy(plain).double()(x.double())
    if called_before:
        called(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        for y in called(model, x):
            assert y.dtype == expected.dtype == torch.float32
            assert agreement(y.bfloat16(), expected.bfloat16(), wide).ok
    assert same(called(model, x)[-1], plain, x) and runs(model) == (1, 0)


class Adds(Network):
    def forward(self, x):
        return self.classifier((self.features(x) + 1).mean([2, 3]))


class AddsInPlace(Network):
    def forward(self, x):
        return self.classifier(self.features(x).add_(1).mean([2, 3]))


class AddsToTheInput(Network):
    def forward(self, x):
        return super().forward(x.mul(0.5))


class AddsToTheResult(Network):
    def forward(self, x):
        return super().forward(x).mul_(2)


class SumsRows(Network):
    def forward(self, x):
        return self.classifier(self.features(x).mean([2]).mean([2]))


class Keeps(Network):
    """Two results of one tensor."""

    def forward(self, x):
        y = self.features(x)
        return self.classifier(y.mean([2, 3])) + y.amax([2, 3])[:, :5]


class Loops(Network):
    """A block that runs twice."""

    def forward(self, x):
        x = self.blocks(self.act(self.norm(self.stem(x))))
        x = self.blocks[2](x)
        return self.classifier(self.head_act(self.head_norm(self.head(x))).mean([2, 3]))


class BranchesOnSize(Network):
    def forward(self, x):
        x = self.blocks(self.act(self.norm(self.stem(x))))
        if x.shape[2] > 6:
            x = self.blocks[2](x)
        return self.classifier(self.head_act(self.head_norm(self.head(x))).mean([2, 3]))


class BranchesOnData(Network):
    def forward(self, x):
        y = self.features(x).mean([2, 3])
        return self.classifier(y) if x.mean() > 0 else self.classifier(-y)


class BranchesOnFlag(Network):
    def forward(self, x):
        y = self.features(x).mean([2, 3])
        return self.classifier(y) if self.flag and self._scale == 1 else self.classifier(3 * y)


class Counts(Network):
    def forward(self, x):
        self.calls += 1
        y = super().forward(x)
        return y * self.calls if self.calls > 4 else y


class TwoBranches(Network):
    """The first of which nobody takes."""

    def __init__(self):
        super().__init__()
        self.second, self.act = copy.deepcopy(self.blocks), nn.ReLU6()

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        self.blocks(x)
        x = self.second(x)
        return self.classifier(self.head_act(self.head_norm(self.head(x))).mean([2, 3]))


class Times(nn.Module):
    def forward(self, x, times=1.0):
        return x * times


class PassesMore(Network):
    def __init__(self):
        super().__init__()
        self.times = Times()

    def forward(self, x):
        return self.classifier(self.times(self.features(x), 3.0).mean([2, 3]))


class PassesMoreByName(PassesMore):
    def forward(self, x):
        return self.classifier(self.times(self.features(x), times=3.0).mean([2, 3]))


class Remembers(Network):
    """Of each call what it was given, in a list."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, x):
        self.given.append(x.shape)
        return super().forward(x) * (2 if len(self.given) > 4 else 1)


class GivesTwo(Network):
    def forward(self, x):
        return (super().forward(x),)


class TakesMore(Network):
    def forward(self, x, scale=1.0):
        return super().forward(x) if scale == 1.0 else super().forward(scale * x)


_OTHERS = (
    *(Adds, AddsInPlace, AddsToTheInput, AddsToTheResult, SumsRows, Keeps, Loops, TwoBranches),
    *(BranchesOnSize, BranchesOnData, BranchesOnFlag, Counts, Remembers, TakesMore, PassesMore, PassesMoreByName),
)
OTHERS = {cls.__name__: cls for cls in _OTHERS}


@pytest.mark.parametrize("name", OTHERS)
def test_forwards_that_do_more_stay_right(name):
    model, plain = fuse(original(name)), copy.deepcopy(original(name))
    for size in ((2, 3, 40, 33), (1, 3, 16, 16), (2, 3, 40, 33)):
        for seed in (0, 1, 2, 3):
            x = image(*size, seed=seed) - (1 if seed == 2 else 0)
            with torch.no_grad():
                found, expected = model(x), plain(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["Adds", "AddsInPlace", "AddsToTheInput", "AddsToTheResult", "SumsRows", "Keeps", "Counts"]
)
def test_operations_in_between_are_no_row(name):
    model = fuse(original(name))
    called(model, image(2, 3, 40, 33))
    assert model._row == [] and runs(model) == (0, 0)


def test_means_over_other_axes_are_no_pooling():
    class MeansOfChannels(Network):
        def forward(self, x):
            return self.classifier(self.features(x).mean([1, 2]))

    plain, x = MeansOfChannels().eval(), image(2, 3, 40, 40)
    plain.classifier = nn.Linear(10, 5)
    model = fuse(plain)
    assert all(same(y, plain, x) for y in called(model, x))
    assert model._row == []


def test_a_block_that_runs_twice_is_in_the_row_twice():
    model, x = fuse(original("Loops")), image(2, 3, 40, 33)
    *_, y = called(model, x)
    assert runs(model) == (1, 0) and same(y, original("Loops"), x)


def test_sizes_that_take_another_way():
    model = fuse(original("BranchesOnSize"))
    called(model, image(2, 3, 16, 16))
    assert runs(model) == (1, 0)
    called(model, image(2, 3, 40, 33))
    assert model._row == [] and model._shapes == frozenset()


def test_a_result_that_is_no_tensor():
    model, plain, x = fuse(GivesTwo().eval()), GivesTwo().eval(), image(2, 3, 40, 33)
    plain.load_state_dict(model.state_dict())
    for (y,) in called(model, x):
        torch.testing.assert_close(y, plain(x)[0], rtol=1e-4, atol=1e-4)
    assert model._row == []


def test_more_arguments_are_passed_on():
    model, plain, x = fuse(original("TakesMore")), original("TakesMore"), image(2, 3, 40, 33)
    called(model, x)
    with torch.no_grad():
        for call in (lambda m: m(x, 3.0), lambda m: m(x, scale=3.0), lambda m: m(x=x)):
            torch.testing.assert_close(call(model), call(plain), rtol=1e-4, atol=1e-4)


CHANGES = {
    "a weight": lambda m: m.stem.weight.data.mul_(2),
    "a statistic": lambda m: m.head_norm.running_mean.add_(1),
    "an eps": lambda m: setattr(m.norm, "eps", 0.5),
    "a flag": lambda m: setattr(m, "flag", False),
    "a private number": lambda m: setattr(m, "_scale", 2.0),
    "an activation": lambda m: setattr(m, "head_act", nn.SiLU()),
    "a block": lambda m: m.blocks.__setitem__(2, nn.Identity()),
    "a classifier": lambda m: setattr(m, "classifier", nn.Linear(40, 2)),
    "a hook on a norm": lambda m: m.norm.register_forward_hook(lambda m, a, y: 2 * y),
    "a hook on the blocks": lambda m: m.blocks.register_forward_hook(lambda m, a, y: 2 * y),
    "a hook on a block": lambda m: m.blocks[1].register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "a hook on the network": lambda m: m.register_forward_hook(lambda m, a, y: 2 * y),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed_at_the_next_call(name):
    torch.manual_seed(3)
    model, plain, x = fuse(original("BranchesOnFlag")), copy.deepcopy(original("BranchesOnFlag")), image(2, 3, 40, 33)
    called(model, x)
    assert runs(model) == (1, 0)
    for changed in (model, plain):
        torch.manual_seed(4)
        with torch.no_grad():
            CHANGES[name](changed)
    with torch.no_grad():
        expected = plain(x)
    for y in called(model, x):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


TIMM_CHANGES = {
    "an eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "an activation": lambda m: setattr(m.bn1, "act", nn.SiLU()),
    "a statistic": lambda m: m.bn2.running_var.mul_(2),
    "a parameter": lambda m: setattr(m.bn2, "weight", nn.Parameter(torch.full_like(m.bn2.weight, 0.3))),
    "a hook": lambda m: m.bn1.register_forward_hook(lambda m, a, y: 2 * y),
    "a classifier": lambda m: m.reset_classifier(3),
    "pooling": lambda m: m.reset_classifier(7, "max"),
}


@pytest.mark.parametrize("name", TIMM_CHANGES)
def test_changes_of_norms_that_hold_their_activation(name):
    model, plain, x = fuse(original("timm")), copy.deepcopy(original("timm")), image(2, 3, 64, 64)
    called(model, x)
    assert runs(model) == (1, 0)
    for changed in (model, plain):
        torch.manual_seed(4)
        with torch.no_grad():
            TIMM_CHANGES[name](changed)
    with torch.no_grad():
        expected = plain(x)
    for y in called(model, x):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_back():
    model, x = fuse(original("timm")), image(2, 3, 64, 64)
    *_, y = called(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and other._row is None
        assert torch.equal(called(other, x)[-1], y) and runs(other) == (1, 0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(called(torch.load(file, weights_only=False), x)[-1], y)
    plain = unfuse(model)
    assert type(plain) is type(original("timm")) and vars(plain).keys() == vars(original("timm")).keys()
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(x), original("timm")(x))


def test_report_names_what_runs_with_the_blocks():
    model, x = fuse(original("timm")), image(2, 3, 64, 64)
    assert not report(model).layers
    called(model, x)
    found = report(model, tuple(x.shape))
    assert [(row.name, row.what) for row in found.layers] == [
        ("conv_stem", "3x3 stem, inside the block behind it"),
        ("conv_head", "1x1 convolution and pooling"),
        ("classifier", "classifier"),
    ]
    assert (
        found.bytes_never_written > report(fuse(nn.Sequential(*model.blocks)), (2, 16, 32, 32)).bytes_never_written / 9
    )
    assert str(found)


def test_compiled_and_exported():
    torch._dynamo.reset()
    model, plain, x = fuse(original("timm")), original("timm"), image(2, 3, 64, 64)
    called(model, x)
    with torch.no_grad():
        assert same(torch.compile(model, backend="eager", fullgraph=True)(x), plain, x)
        assert same(torch.export.export(model, (x,)).module()(x), plain, x)


class Saves(Network):
    def save_pretrained(self, folder):
        raise AssertionError(folder)


class Prepares(Network):
    """By a method whose name is one of ours."""

    def _prepare(self, x):
        return x + 1

    def forward(self, x):
        return super().forward(self._prepare(x))


class HasARow(Network):
    def __init__(self):
        super().__init__()
        self._row = 2.0

    def forward(self, x):
        return super().forward(self._row * x)


class CopiesItself(Network):
    def __getstate__(self):
        return self.__dict__ | {"calls": 7}


@pytest.mark.parametrize("cls", [Saves, Prepares, HasARow, CopiesItself], ids=lambda cls: cls.__name__)
def test_networks_that_stay_of_their_class(cls):
    """They write its name into files, have names of their own for what we have, or know how they are copied."""
    plain, x = perturb_batch_norm(cls().eval()), image(2, 3, 40, 33)
    model = fuse(plain)
    assert type(model) is cls and sum(isinstance(m, FusedBlock) for m in model.modules()) == 3
    assert all(same(y, plain, x) for y in called(model, x))


def test_a_thread_beside_it_does_not_count():
    """Hooks that see a network's calls are every thread's."""
    import threading

    model, other, x = fuse(original("mean")), fuse(original("timm")), image(2, 3, 64, 64)
    stop = threading.Event()

    def go_on():
        while not stop.is_set():
            with torch.no_grad():
                other(x)

    beside = threading.Thread(target=go_on)
    beside.start()
    try:
        results = called(model, x, 20)
    finally:
        stop.set()
        beside.join()
    assert all(same(y, original("mean"), x) for y in results)
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) == 3
    called(model, x)
    assert runs(model) == (1, 0)
