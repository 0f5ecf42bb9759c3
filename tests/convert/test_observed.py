"""Blocks of classes that nobody told us of, read by what they compute; and modules that only look like blocks."""

import copy
import io
import pickle
import random
import types
import warnings
from contextlib import nullcontext
from typing import Protocol

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mnv2_fused import FusedBlock, fuse, report, unfuse
from mnv2_fused.module import FusedObserved, probe
from mnv2_fused.testing import agreement, perturb_batch_norm


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class SavingSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


def nothing(x):
    return x


ACTIVATIONS = {
    "swish written out": Swish,
    "swish as a function of autograd": lambda: SavingSwish.apply,
    "relu6 by clamp": lambda: lambda x: x.clamp(0, 6),
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardswish by relu6": lambda: lambda x: x * F.relu6(x + 3) / 6,
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "leaky by maximum": lambda: lambda x: torch.maximum(x, 0.2 * x),
    "leaky in place": lambda: nn.LeakyReLU(0.3, inplace=True),
    "gelu": lambda: F.gelu,
    "relu": lambda: torch.relu,
    "none": lambda: nothing,
}
LEAKY = ("leaky by maximum", "leaky in place")
GATES = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid written out": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardsigmoid of slope 1/5": lambda x: F.relu6(1.2 * x + 3) / 6,
}


class Block(nn.Module):
    """One block, in many ways of writing it; none of its names is known."""

    def __init__(
        self,
        *,
        channels=8,
        hidden=24,
        out=8,
        kernel=3,
        stride=1,
        dilation=1,
        act="relu6 by clamp",
        second_act=None,
        act_of_sum="none",
        expand=True,
        norms=True,
        bias=False,
        pad="convolution",
        squeeze=None,
        gate="sigmoid",
        residual=False,
    ):
        super().__init__()
        hidden = hidden if expand else channels
        self.act, self.pad, self.gate = ACTIVATIONS[act](), pad, GATES[gate]
        self.second_act = self.act if second_act is None else ACTIVATIONS[second_act]()
        self.act_of_sum = ACTIVATIONS[act_of_sum]()
        stride = stride if isinstance(stride, tuple) else (stride, stride)
        self.extent, self.stride, self.residual = (kernel - 1) * dilation + 1, stride, residual
        around = self.extent // 2
        own = {"convolution": around, "same": "same"}.get(pad, 0)
        norm = nn.BatchNorm2d if norms else lambda channels: nn.Identity()
        self.zulu = nn.Conv2d(hidden, out, 1, bias=bias)
        self.norm3 = norm(out)
        self.yankee = nn.Conv2d(hidden, hidden, kernel, stride, own, dilation, groups=hidden, bias=bias)
        self.norm2 = norm(hidden)
        if expand:
            self.first_of_all = nn.Conv2d(channels, hidden, 1, bias=bias)
            self.norm1 = norm(hidden)
        self.zero = nn.ZeroPad2d((around, around, around, around)) if pad == "module" else None
        self.squeeze = squeeze
        if squeeze == "convolutions":
            self.down, self.up = nn.Conv2d(hidden, 5, 1), nn.Conv2d(5, hidden, 1)
        elif squeeze:
            self.gates = nn.ModuleList([nn.Linear(hidden, 5), nn.Linear(5, hidden)])

    def padded(self, x):
        if self.zero is not None:
            return self.zero(x)
        if self.pad == "tensorflow":
            pads = []
            for size, stride in zip((x.shape[3], x.shape[2]), self.stride[::-1], strict=True):
                total = max((-(-size // stride) - 1) * stride + self.extent - size, 0)
                pads += [total // 2, total - total // 2]
            return F.pad(x, pads)
        return x

    def gated(self, x):
        if self.squeeze == "convolutions":
            return x * self.gate(self.up(self.act(self.down(F.adaptive_avg_pool2d(x, 1)))))
        if self.squeeze == "sides":
            pooled = x.mean(3, keepdim=True).mean(2, keepdim=True)
            return x * self.gate(self.gates[1](self.gates[0](pooled.flatten(1)).relu()))[..., None, None]
        g = self.gates[1](torch.relu(self.gates[0](x.mean((2, 3)))))
        return self.gate(g).unsqueeze(-1).unsqueeze(-1).expand_as(x) * x

    def forward(self, image, scale=1.0, drop_rate=None):
        x = image
        if hasattr(self, "first_of_all"):
            x = self.act(self.norm1(self.first_of_all(x)))
        x = self.second_act(self.norm2(self.yankee(self.padded(x))))
        if self.squeeze:
            x = self.gated(x)
        x = self.norm3(self.zulu(x))
        if drop_rate and self.training:
            x = x * (torch.rand(x.shape[0], 1, 1, 1) > drop_rate)
        if scale != 1.0:
            x = x * scale
        return self.act_of_sum(x + image if self.residual else x)


def model_of(block):
    """With something before it, so that the block is a child."""
    return perturb_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), block)).eval()


def image(batch=2, height=33, width=30):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def check_fused(model, *args, **kwargs):
    fused = fuse(model, strict=True)
    assert isinstance(fused[1], FusedObserved), type(fused[1])
    x = image()
    with torch.inference_mode():
        y = fused(x)
        found = agreement(y, model(x), copy.deepcopy(model).double()(x.double()))
    assert found.ok, found
    assert ran_on_kernels(fused)
    return fused


def ran_on_kernels(model):
    """Whether its last call ran blocks in a row, or one by itself, as a Sequential of blocks does without expansion."""
    prepared = getattr(model, "_prepared", None)
    return (prepared is not None and prepared.runs) or model[1]._ready is not None


def check_refused(model, why):
    x = image()
    with pytest.warns(UserWarning, match=why):
        left = fuse(model)
    assert not any(isinstance(m, FusedBlock) for m in left.modules())
    with torch.no_grad():
        assert torch.equal(left(x), model(x))


STYLES = {
    "plain": {},
    "residual": {"residual": True},
    "no expansion": {"expand": False},
    "no norms": {"norms": False, "bias": True},
    "norms and biases": {"bias": True},
    "stride 2, 5x5": {"stride": 2, "kernel": 5},
    "dilated": {"dilation": 2},
    "padding by a module": {"pad": "module"},
    "padding as TensorFlow's": {"pad": "tensorflow", "stride": 2},
    "padding same": {"pad": "same", "kernel": 5},
    "no padding": {"pad": "none"},
    "gate of convolutions": {"squeeze": "convolutions"},
    "gate of Linears": {"squeeze": "linears"},
    "gate written out": {"squeeze": "convolutions", "gate": "hardsigmoid written out", "residual": True},
    "gate of a mean by sides": {"squeeze": "sides"},
    "gate of another slope": {"squeeze": "linears", "gate": "hardsigmoid of slope 1/5"},
    "7x7": {"kernel": 7, "residual": True},
    "stride (2, 1)": {"stride": (2, 1), "kernel": 5},
    "stride (1, 2), padding as TensorFlow's": {"stride": (1, 2), "pad": "tensorflow"},
    "nothing after the depthwise": {"second_act": "none", "act_of_sum": "relu"},
    "activation of the sum": {"act": "gelu", "residual": True, "act_of_sum": "gelu"},
    "activation of the sum in place": {"residual": True, "act_of_sum": "relu6 in place"},
    "activation of the sum written out": {"residual": True, "act_of_sum": "swish written out"},
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_styles(style):
    check_fused(model_of(Block(**style)))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_however_written(act):
    check_fused(model_of(Block(act=act)))


@given(
    style=st.fixed_dictionaries(
        {
            "hidden": st.sampled_from([16, 17, 40]),
            "out": st.sampled_from([8, 9]),
            "kernel": st.sampled_from([3, 5, 7]),
            "stride": st.sampled_from([1, 2, (2, 1), (1, 2)]),
            "dilation": st.sampled_from([1, 2]),
            "act": st.sampled_from(list(ACTIVATIONS)),
            "second_act": st.sampled_from([None, None, *ACTIVATIONS]),
            "act_of_sum": st.sampled_from(["none", *ACTIVATIONS]),
            "expand": st.booleans(),
            "norms": st.booleans(),
            "bias": st.booleans(),
            "pad": st.sampled_from(["convolution", "module", "tensorflow", "none"]),
            "squeeze": st.sampled_from([None, "convolutions", "linears", "sides"]),
            "gate": st.sampled_from(list(GATES)),
            "residual": st.booleans(),
        }
    )
)
def test_any_block_is_right_or_refused(style):
    if style["residual"] and (style["stride"] != 1 or style["out"] != 8 or style["pad"] == "none"):
        style["residual"] = False
    second = style["second_act"] or style["act"]
    run = {
        second,
        style["act_of_sum"],
        *([style["act"]] if style["expand"] or style["squeeze"] == "convolutions" else []),
    }
    if len(run & set(LEAKY)) > 1:
        return check_refused(model_of(Block(**style)), "slopes of|does not run on|dilation must be 1")
    if style["stride"] != 1 and style["dilation"] == 2:
        return check_refused(model_of(Block(**style)), "dilation must be 1 where stride is 2|does not run on")
    # Without padding a 5x5 kernel with dilation 2 spans more than the smallest image that blocks are looked at on.
    fits = not (style["pad"] == "none" and style["kernel"] > 3 and style["dilation"] == 2)
    model = model_of(Block(**style))
    if fits:
        check_fused(model)
    else:
        check_refused(model, "does not run on")


class Universal(nn.Module):
    """As MobileNetV4's: a depthwise convolution and its norm, a block, a scale of each channel, and the sum."""

    def __init__(self, stride=1, scale=True, skip=True, act=nn.ReLU):
        super().__init__()
        self.ahead = nn.Sequential(nn.Conv2d(8, 8, 5, stride, 2, groups=8, bias=False), nn.BatchNorm2d(8))
        self.widen = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), act())
        self.spread = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), act())
        self.narrow = nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8))
        self.scale = Scale() if scale else nn.Identity()
        self.drop, self.skip = nn.Dropout(0.5), skip

    def forward(self, x):
        y = self.drop(self.scale(self.narrow(self.spread(self.widen(self.ahead(x))))))
        return x + y if self.skip else y


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 2, 8))

    def forward(self, x):
        return x * self.gamma.view(-1, 1, 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": False}, {"skip": False, "stride": 2}, {"act": nn.SiLU, "scale": False, "skip": False}],
    ids=str,
)
def test_what_runs_around_a_block(options, frozen):
    model = model_of(Universal(**options))
    x = image()
    with torch.no_grad():
        fused = fuse(model, strict=True, frozen=frozen)
        found = agreement(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert found.ok, found
    if frozen:
        return
    block = fused[1]
    assert block._ready is not None and block.spec.residual is False
    # Whatever makes the modules run, the result is theirs.
    block.backend = "eager"
    fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    back = unfuse(fused)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert sorted(back.state_dict()) == sorted(model.state_dict()) == sorted(fused.state_dict())


def test_gradients_and_training_of_what_runs_around_a_block():
    model = model_of(Universal())
    fused = fuse(model)
    grads = []
    for m in (model, fused):
        m(image()).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    results = []
    for m in (model, fused):
        torch.manual_seed(0)
        results.append(m.train()(image()))
    assert torch.equal(*results)


def test_compiled_graphs_have_what_runs_around_a_block():
    model = model_of(Universal())
    fused = torch.compile(fuse(model), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), model(image()), rtol=1e-4, atol=1e-4)


CHANGES = {
    "no sum": lambda b: setattr(b, "skip", False),
    "an activation that no kernel has": lambda b: b.spread.__setitem__(2, nn.Softmax(1)),
    "a forward of the scale's own": lambda b: setattr(b.scale, "forward", lambda t: t * 2),
    "nothing in front": lambda b: setattr(b, "ahead", nn.Identity()),
    "something behind": lambda b: setattr(b, "narrow", nn.Sequential(b.narrow, nn.Softmax(1))),
    "a forward of the depthwise stage's own": lambda b: setattr(b.spread, "forward", lambda t: t * 2),
    "a hook in front": lambda b: b.ahead.register_forward_hook(lambda m, given, y: y * 2),
    "a hook inside": lambda b: b.narrow.register_forward_hook(lambda m, given, y: y * 2),
    "a hook behind": lambda b: b.scale.register_forward_hook(lambda m, given, y: y * 2),
}


@pytest.mark.filterwarnings("ignore:an inverted residual")
@pytest.mark.parametrize("when", ["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_runs_around_a_block_may_change(change, when):
    model = model_of(Universal())
    fused, x = fuse(model), image()
    with torch.no_grad():
        fused(x)
        for m in (model, fused):
            change(m[1])
        run = torch.compile(fused, backend="eager") if when == "compiled" else fused
        for _ in range(2):
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:an inverted residual")
def test_what_comes_to_run_around_a_block():
    block = Universal(scale=False, skip=False)
    ahead, block.ahead = block.ahead, nn.Identity()
    model = model_of(block)
    fused, x = fuse(model), image()
    with torch.no_grad():
        fused(x)
        for m in (model, fused):
            m[1].ahead = copy.deepcopy(ahead).eval()
        for _ in range(2):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


class Options(nn.Sequential):
    def forward(self, x, act=True):
        return super().forward(x).relu() if act else super().forward(x)


class GivesOptions(Universal):
    """By keyword, to a child of the row."""

    def __init__(self):
        super().__init__()
        self.narrow = Options(*self.narrow)

    def forward(self, x):
        return self.scale(self.narrow(self.spread(self.widen(self.ahead(x))), act=False)) + x


class SharesInFront(nn.Module):
    """What runs in front is an activation of the block, too."""

    def __init__(self):
        super().__init__()
        self.act, self.spread, self.narrow = nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.narrow(self.act(self.spread(self.act(x))))


@pytest.mark.filterwarnings("ignore:an inverted residual")
def test_a_module_that_runs_in_front_and_inside():
    model = model_of(SharesInFront())
    fused, x = fuse(model, strict=True), image()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        for m in (model, fused):
            m[1].act.register_forward_hook(lambda module, given, y: y * 0.5 + 1)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


class Freezes(Universal):
    def forward(self, x):
        with torch.no_grad():
            y = self.ahead(x)
        return x + self.scale(self.narrow(self.spread(self.widen(y))))


class Detaches(Universal):
    def forward(self, x):
        return x + self.scale(self.narrow(self.spread(self.widen(self.ahead(x).detach()))))


class OtherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(Universal):
    def forward(self, x):
        return self.narrow(OtherGradient.apply(self.spread[:2](self.widen(x))))


@pytest.mark.parametrize("kind", [Freezes, Detaches, StraightThrough])
def test_another_gradient_is_refused(kind):
    check_refused(model_of(kind()), "its gradient is another|do not run in a row")


def test_what_children_are_given_beside_x_is_kept():
    check_refused(model_of(GivesOptions()), "do not run in a row")


def test_frozen_with_gradients_on():
    model = model_of(Universal())
    fused, x = fuse(model, frozen=True), image()
    y = fused[1](fused[0](x).detach())
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"frozen for torch\.float32"):
        fused[1](torch.zeros(1, 8, 9, 9, dtype=torch.float64))


class NoRow(Universal):
    def forward(self, x):
        return self.narrow(self.spread(self.widen(self.ahead(x).relu())))


class TwoAhead(Universal):
    def forward(self, x):
        return self.narrow(self.spread(self.widen(self.scale(self.ahead(x)))))


class SumOfTheMiddle(Universal):
    def forward(self, x):
        y = self.ahead(x)
        return y + self.narrow(self.spread(self.widen(y)))


class ActivationOfTheSum(Universal):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("kind", [NoRow, TwoAhead, SumOfTheMiddle, ActivationOfTheSum])
def test_what_is_more_than_a_row_around_a_block(kind):
    check_refused(model_of(kind()), "1 x test_observed.*: ")


class SaysNothing(Block):
    """Whose train(), and so whose eval(), gives None, as in some libraries."""

    def train(self, mode=True):
        super().train(mode)


class HasSize(Protocol):
    def size(self): ...


class OfAProtocol(Block, HasSize):
    """Whose classes have one that no class is asked for."""


@pytest.mark.parametrize("kind", [SaysNothing, OfAProtocol])
def test_classes_of_other_kinds(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), kind())
    model.eval()
    check_fused(perturb_batch_norm(model))


def test_a_wrapper_that_only_says_that_it_is_a_module():
    class Wrapper:
        __class__ = nn.Module

    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got a Wrapper"):
        fuse(Wrapper())


class Hooked(nn.Module):
    """A network that sees what lies inside its blocks by hooks of its own, which it removes."""

    def __init__(self):
        super().__init__()
        self.block = Block(channels=3)

    def forward(self, x):
        seen = []
        handle = self.block.norm2.register_forward_hook(lambda module, given, y: seen.append(y))
        y = self.block(x)
        handle.remove()
        return [y, *seen]


def test_hooks_see_nothing_of_how_a_module_is_looked_at():
    model = perturb_batch_norm(Hooked()).eval()
    fused = fuse(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            for ours, theirs in zip(fused(image()), model(image()), strict=True):
                assert torch.equal(ours, theirs)


class Wrong(Block):
    """Blocks that compute something else."""

    def forward(self, image):
        x = self.act(self.norm1(self.first_of_all(image)))
        x = self.act(self.norm2(self.yankee(x)))
        return self.end(x, image)

    def end(self, x, image):
        return self.norm3(self.zulu(x))


class NormFirst(Wrong):
    def forward(self, image):
        x = self.act(self.first_of_all(image))
        return self.norm3(self.zulu(self.act(self.yankee(self.norm1(x)))))


class OtherResidual(Wrong):
    def end(self, x, image):
        return super().end(x, image) + self.first_of_all(image)[:, :8]


class Weighted(Wrong):
    def end(self, x, image):
        return super().end(x, image).add(image, alpha=0.5)


class Doubled(Wrong):
    def end(self, x, image):
        return super().end(x, image) + image + image


class Branches(Wrong):
    def end(self, x, image):
        return super().end(x, image) * (2 if x.mean() > 0 else 1)


class Counts(Wrong):
    calls = 0

    def end(self, x, image):
        self.calls += 1
        return super().end(x, image)


class CountsInABuffer(Wrong):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def end(self, x, image):
        self.calls += 1
        return super().end(x, image)


class Drops(Wrong):
    def end(self, x, image):
        return super().end(F.dropout(x, 0.1), image)  # in eval, too


class ChangesInput(Wrong):
    def end(self, x, image):
        image.mul_(2)
        return super().end(x, image)


class UsesTwice(Wrong):
    def end(self, x, image):
        return super().end(self.act(self.norm2(self.yankee(x))), image)


class ReturnsTwo(Wrong):
    def forward(self, image):
        return (super().forward(image),) * 2


class MovesPixels(Wrong):
    def end(self, x, image):
        return super().end(x.roll(1, 3), image)


class MeanOfRows(Wrong):
    def end(self, x, image):
        return super().end(x * x.mean(3, keepdim=True).sigmoid(), image)


class DependsOnSize(Wrong):
    def end(self, x, image):
        return super().end(x, image) * (1.0 if x.shape[2] % 2 else 2.0)


class Reordered(Wrong):
    """A view whose elements lie elsewhere in the tensor that it is of."""

    def end(self, x, image):
        n, c, h, w = x.shape
        return super().end(x.view(n, h, w, c).reshape(n, c, w, h).view(n, c, h, w).flip(1), image)


class LearnsASlope(Wrong):
    """Of a LeakyReLU that is a weight, not a number."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        del self.act

    def act(self, x):
        return torch.maximum(x, self.slope.sigmoid() * x)


class HoldsASlope(Wrong):
    """In a tensor that is no buffer, whose change nobody would notice."""

    def __init__(self):
        super().__init__()
        slope = torch.tensor(0.2)
        self.act = lambda x: torch.maximum(x, slope * x)


class RoundsOnTheWay(Wrong):
    """By operations that leave elements where they were."""

    def end(self, x, image):
        return super().end(x.to(torch.float32).to(x.dtype), image)


class StandardisesWeights(Wrong):
    def end(self, x, image):
        w = self.zulu.weight
        return self.norm3(F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True)))


WRONG = {
    NormFirst: "aten::clamp where its expand",
    OtherResidual: "aten::add of two tensors",
    Weighted: "weighted",
    Doubled: "aten::add of two tensors",
    Branches: "looks at values",
    Counts: "changes attributes",
    CountsInABuffer: "changes calls",
    Drops: "random numbers",
    ChangesInput: "changes its input",
    UsesTwice: "the expand convolution is no 1x1",
    MovesPixels: "aten::roll where its depthwise",
    MeanOfRows: "is none of hardsigmoid",
    DependsOnSize: "function after a norm ends in aten::mul",
    Reordered: "aten::flip where its depthwise",
    LearnsASlope: "aten::maximum of two tensors",
    HoldsASlope: "aten::maximum of two tensors",
    RoundsOnTheWay: "computes something else",
    StandardisesWeights: "where its project",
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_computes_something_else_is_refused(kind):
    model = model_of(kind())
    x = image()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x)
    with pytest.warns(UserWarning, match=WRONG[kind]):
        left = fuse(model)
    assert not any(isinstance(m, FusedBlock) for m in left.modules())
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(left(x), expected)


def test_what_returns_more_than_a_tensor_is_refused():
    with pytest.warns(UserWarning, match="returns a tuple"):
        fuse(nn.Sequential(nn.Conv2d(3, 8, 1), ReturnsTwo()).eval())


def test_arguments_that_change_nothing_in_eval():
    model = model_of(Block(residual=True))
    fused = check_fused(model)
    x = image(height=9, width=9)[:, :1].repeat(1, 8, 1, 1)
    block, original = fused[1], model[1]
    with torch.no_grad():
        y = block(x)
        assert torch.equal(block(x, drop_rate=0.3), y) and torch.equal(block(image=x), y)
        assert torch.equal(block(x, 1.0, None), y) and block._allowed[(1.0, None), (), False]
        for args, kwargs in [((2.0,), {}), ((), {"scale": 0.5}), ((torch.tensor(2.0),), {})]:
            torch.testing.assert_close(block(x, *args, **kwargs), original(x, *args, **kwargs))
        with pytest.raises(TypeError):
            block(x, nonsense=1)
        with pytest.raises(TypeError):
            block()


def test_train_is_looked_at_once_more():
    """A forward that computes the same in train() trains fused, also with arguments that change nothing."""
    model = model_of(Block(residual=True))
    fused, truth = fuse(model).train(), copy.deepcopy(model).double().train()
    assert report(fused).blocks[0].not_trained is None
    x = torch.randn(4, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    found = []
    for block, leaf in ((fused[1], x.requires_grad_()), (truth[1], x.detach().double().requires_grad_())):
        y = block(leaf, 1.0, drop_rate=0.0)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert type(found[0][0].grad_fn).__name__ == "_NormedBackward"
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_train_runs_the_modules_where_random_numbers_are_drawn():
    model = model_of(Block(residual=True))
    fused = fuse(model).train()
    block = copy.deepcopy(model.train())[1]
    x = torch.randn(4, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    y = fused[1](x, drop_rate=0.5)
    torch.manual_seed(3)
    expected = block.to(memory_format=torch.channels_last)(x, drop_rate=0.5)
    torch.testing.assert_close(y, expected)
    assert not torch.equal(fused[1](x, drop_rate=0.999), fused[1](x))
    fused[1](x).sum().backward()
    assert fused[1].yankee.weight.grad is not None


class OtherInTraining(Block):
    def forward(self, image, *args, **kwargs):
        return super().forward(image, *args, **kwargs) * (2 if self.training else 1)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize("why", ["in train()", "forward of their own", "statistics"])
def test_train_runs_the_modules_where_they_do_something_else(why):
    model = model_of(OtherInTraining(residual=True) if why == "in train()" else Block(residual=True))
    if "own" in why:
        model[1].norm2.__class__ = OwnNorm
    fused = fuse(model).train()
    model.train()
    if why == "statistics":  # all norms frozen: there is nothing to train by
        for norm in (m for net in (model, fused) for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
    assert why in fused[1].training_objection()
    x = torch.randn(4, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused[1](x), model[1].to(memory_format=torch.channels_last)(x))


def test_changes_after_fusing():
    model = model_of(Block(act="relu6 in place", residual=True))
    fused, x = check_fused(model), image()
    with torch.no_grad():
        for change in (
            lambda m: m[1].yankee.weight.mul_(2),
            lambda m: setattr(m[1].norm2, "eps", 0.5),
            lambda m: setattr(m[1], "act", nn.Hardswish()),
            lambda m: setattr(m[1], "residual", False),
        ):
            for m in (model, fused):
                change(m)
            check = agreement(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
            assert check.ok and ran_on_kernels(fused)
        for m in (model, fused):
            m[1].act = nn.Tanh()
        with pytest.warns(UserWarning, match="aten::tanh"):
            torch.testing.assert_close(fused(x), model(x))


def test_a_function_set_later_is_noticed():
    model = model_of(Block(act="gelu"))
    fused, x = check_fused(model), image()
    with torch.no_grad():
        fused(x)
        model[1].act = fused[1].act = F.silu
        torch.testing.assert_close(fused(x), model(x))


def test_copies_files_and_unfuse():
    model = model_of(Block(squeeze="linears", act="relu6 in place"))
    fused, x = check_fused(model), image()
    with torch.no_grad():
        y = fused(x)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        for again in (
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(file, weights_only=False),
            fuse(fused),
        ):
            assert torch.equal(again(x), y) and isinstance(again[1], FusedObserved)
        plain = unfuse(fused)
        assert type(plain[1]) is Block and vars(plain[1]).keys() == vars(model[1]).keys()
        torch.testing.assert_close(plain(x), model(x))
        assert list(plain.state_dict()) == list(model.state_dict()) == list(fused.state_dict())


def test_frozen_compiled_and_gradients():
    model = model_of(Block(squeeze="convolutions", act="swish written out", residual=True))
    fused, frozen, x = fuse(model), fuse(model, frozen=True), image()
    with torch.no_grad():
        y = fused(x)
        assert torch.equal(frozen(x), y)
    loss = fused(x).square().sum()
    loss.backward()
    model(x).square().sum().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))


@pytest.mark.slow
def test_compiled_with_arguments():
    model = model_of(Block(residual=True))
    fused = check_fused(model)
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled = torch.compile(lambda x: fused[1](x, drop_rate=0.2), fullgraph=True)
        torch.testing.assert_close(compiled(x), fused[1](x))


def test_nothing_keeps_a_block_alive():
    import gc
    import weakref

    fused = check_fused(model_of(Block()))
    block = weakref.ref(fused[1])
    del fused
    gc.collect()
    assert block() is None


def test_hooks_of_a_call_cost_no_look(monkeypatch):
    """As of a feature extractor that hooks every module anew, calls, and takes its hooks away."""
    model = model_of(Block(residual=True))
    fused, x = check_fused(model), image(height=9, width=9)[:, :1].repeat(1, 8, 1, 1)
    block, original, structures = fused[1], model[1], []
    structure = probe._structure
    monkeypatch.setattr(probe, "_structure", lambda block: structures.append(block) or structure(block))
    with torch.no_grad():
        before = block(x)
        for options in ({}, {"drop_rate": 0.2}):
            structures.clear()
            with pytest.warns(UserWarning, match="a hook on a BatchNorm2d inside") if not options else nullcontext():
                seen = []
                hook = block.norm2.register_forward_hook(lambda module, given, y, seen=seen: seen.append(y))
                y = block(x, **options)
                hook.remove()
            assert len(seen) == 1 and not structures
            assert torch.equal(y, original(x))
        assert torch.equal(block(x), before) and block.fallback_reason() is None


def test_a_block_is_looked_at_once(monkeypatch):
    runs = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: (runs.append(self), forward(self, *args))[1])
    fused = fuse(model_of(Block(residual=True)))
    looked = len(runs)
    report(fused)
    with torch.no_grad():
        fused(image())
    assert 0 < looked == len(runs) < 8


def test_report_counts_what_is_never_written():
    model = model_of(Block(residual=True, act="relu6 in place"))
    for found in (report(fuse(model), (1, 3, 33, 30)), report(model, (1, 3, 33, 30))):
        assert [block.name for block in found.blocks] == ["1"]
    assert report(fuse(model), (1, 3, 33, 30)).blocks[0].bytes_never_written == 2 * 24 * 17 * 15 * 4


def test_meta():
    model = model_of(Block(squeeze="linears"))
    fused = fuse(model).to("meta")
    assert fused(image().to("meta")).shape == model(image()).shape


def test_a_block_inside_what_is_none():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block(residual=True)

        def forward(self, x):
            return self.inner(x).tanh()

    model = model_of(Outer())
    fused = fuse(model, strict=True)
    assert type(fused[1]) is Outer and isinstance(fused[1].inner, FusedObserved)
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), model(image()))


PACKAGES = {
    "efficientnet_pytorch": lambda p: p.EfficientNet.from_name("efficientnet-b0"),
    "monai.networks.nets": lambda p: p.EfficientNetBN("efficientnet-b0", pretrained=False),
    "segmentation_models_pytorch": lambda p: p.encoders.get_encoder("efficientnet-b0", weights=None),
    "transformers.models.efficientnet": lambda p: p.EfficientNetModel(
        p.EfficientNetConfig(image_size=64, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_efficientnets_of_other_packages(package):
    model = PACKAGES[package](pytest.importorskip(package)).eval()
    perturb_batch_norm(model)
    fused = fuse(model, strict=True)
    assert len(report(fused).fused) == 16

    def run(model, x):
        with torch.inference_mode():
            y = model(x)
        y = y[-1] if isinstance(y, list) else y
        return y if isinstance(y, torch.Tensor) else y[0]

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = agreement(run(fused, x), run(model, x), run(copy.deepcopy(model).double(), x.double()))
    assert found.ok, found
    assert {block.backend for block in report(fused).blocks} == {"cpu"}


class NamedAsOurs(Block):
    """With an attribute that has a name of ours, and says something else."""

    def __init__(self):
        super().__init__()
        self.backend = 2.0

    def forward(self, x):
        return super().forward(self.backend * x)


def test_a_block_that_has_a_name_of_ours_is_left_alone():
    block = NamedAsOurs().eval()
    with pytest.warns(UserWarning, match="its backend has a name that fused blocks use"):
        fused = fuse(block)
    assert type(fused) is NamedAsOurs and fused.backend == 2.0


class _Options:
    def __init__(self, activates):
        self.activates = activates


class _LooksIntoAnObject(nn.Module):
    """Of two such blocks only what an attribute's object holds differs."""

    def __init__(self, activates):
        super().__init__()
        self.options = _Options(activates)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pw = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        y = self.pw(F.relu(self.dw(x)))
        return F.relu(y) if self.options.activates else y


def test_blocks_that_differ_inside_an_object_are_each_looked_at():
    torch.manual_seed(0)
    model = nn.Sequential(_LooksIntoAnObject(True), nn.Sigmoid(), nn.Conv2d(16, 8, 1), _LooksIntoAnObject(False)).eval()
    fused = fuse(model)
    assert len(report(fused).fused) == 2
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


class Dropping(Block):
    """Drops in training, in many ways that a look at modules does not tell."""

    _rate = 0.0

    def __init__(self, how):
        super().__init__(residual=True)
        self.how = how
        if how == "private":
            self._rate = 0.0
        if how == "object":
            self.settings = types.SimpleNamespace(rate=0.0)
        if how == "aside":
            self.aside = nn.BatchNorm2d(8)

    def forward(self, image, *args, **kwargs):
        if self.training and self.how == "aside":
            self.aside(image)
        if self.training and self.how == "python" and random.random() < 0.01:
            return image
        y = super().forward(image, *args, **kwargs)
        rate = self.settings.rate if self.how == "object" else self._rate
        return F.dropout(y, rate, self.training) if rate else y


@pytest.mark.parametrize("how", ["private", "object", "python", "aside"])
def test_train_follows_what_a_forward_does_in_training_alone(how):
    state = random.getstate()
    model = model_of(Dropping(how))
    fused = fuse(model).train()
    model.train()
    assert random.getstate() == state
    x = torch.randn(4, 8, 9, 9)
    for rate in (0.0, 0.5):
        for net in (model, fused):
            setattr(net[1].settings, "rate", rate) if how == "object" else setattr(net[1], "_rate", rate)
        found = []
        for net in (model, fused):
            torch.manual_seed(1)
            random.seed(1)
            found.append([net[1](x), *net[1].buffers()])
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class OtherMomentum(Block):
    def forward(self, image, *args, **kwargs):
        y = self.first_of_all(image)
        norm = self.norm1
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.3, norm.eps)
        return self.norm3(self.zulu(self.act(self.norm2(self.yankee(self.act(y))))))


def test_train_leaves_running_statistics_as_forward_does():
    model = model_of(OtherMomentum())
    fused = fuse(model).train()
    model.train()
    x = torch.randn(4, 8, 9, 9)
    torch.testing.assert_close(fused[1](x), model[1](x), rtol=1e-4, atol=1e-5)
    for ours, expected in zip(fused[1].buffers(), model[1].buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert "in another way than a norm's forward does" in report(fused).blocks[0].not_trained
