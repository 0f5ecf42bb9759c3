"""fuse, unfuse and report: what is replaced, what is left alone and why, and that results and weights stay."""

from __future__ import annotations

import builtins
import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.models import scripted
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models import mobilenet_v2, resnet18
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.quantization import mobilenet_v2 as quantizable_mobilenet_v2
from torchvision.models.quantization import mobilenet_v3_large as quantizable_mobilenet_v3_large
from torchvision.ops import FrozenBatchNorm2d

from mnv2_fused import FusedInvertedResidual, fuse, report, unfuse
from mnv2_fused.activations import ACTIVATIONS
from mnv2_fused.module import FusedObserved
from mnv2_fused.testing import agreement, perturb_batch_norm


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def block(inp: int = 8, oup: int = 8, stride: int = 1, ratio: float = 2, **kwargs) -> InvertedResidual:
    torch.manual_seed(0)
    return perturb_batch_norm(InvertedResidual(inp, oup, stride, ratio, **kwargs)).eval()


def two_blocks() -> nn.Sequential:
    return nn.Sequential(block(), block(8, 16, 2))


def assert_agrees(converted: nn.Module, eager: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        result = agreement(converted(x), eager(x), truth)
    assert truth.std() > 0
    assert result.ok, str(result)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


def kinds(model: nn.Module) -> tuple[int, int]:
    """How many fused blocks and how many of torchvision's the model has."""
    modules = [type(m) for m in model.modules()]
    return modules.count(FusedInvertedResidual), modules.count(InvertedResidual)


# --- fuse: what it does


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_every_width_is_fused_with_the_same_result_and_weights(width):
    torch.manual_seed(0)
    eager = perturb_batch_norm(mobilenet_v2(width_mult=width, num_classes=10)).eval()
    fused = fuse(eager)
    assert kinds(fused) == (17, 0)
    assert_agrees(fused, eager, (2, 3, 64, 64))
    assert_same_state(fused, eager)


@pytest.mark.parametrize("norm_layer", [FrozenBatchNorm2d, nn.SyncBatchNorm, partial(nn.BatchNorm2d, eps=1e-2)])
def test_every_foldable_norm_is_fused(norm_layer):
    torch.manual_seed(0)
    eager = perturb_batch_norm(mobilenet_v2(width_mult=0.35, num_classes=10, norm_layer=norm_layer)).eval()
    fused = fuse(eager)
    assert kinds(fused) == (17, 0)
    assert_agrees(fused, eager, (2, 3, 64, 64))
    assert_same_state(fused, eager)


def test_state_dicts_load_both_ways():
    torch.manual_seed(0)
    published = perturb_batch_norm(mobilenet_v2(width_mult=0.35, num_classes=10)).eval()
    fused = fuse(mobilenet_v2(width_mult=0.35, num_classes=10).eval())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = fused(x)
        fused.load_state_dict(published.state_dict())
        assert not torch.allclose(fused(x), before)
    assert_agrees(fused, published, (1, 3, 32, 32))

    back = mobilenet_v2(width_mult=0.35, num_classes=10).eval()
    back.load_state_dict(fused.state_dict())
    assert_agrees(fused, back, (1, 3, 32, 32))


def test_the_original_is_untouched_unless_inplace():
    model = two_blocks()
    before = copy.deepcopy(model)
    strides = [p.stride() for p in model.parameters()]
    fused = fuse(model)
    assert fused is not model
    assert kinds(model) == (0, 2)
    assert_same_state(model, before)
    assert [p.stride() for p in model.parameters()] == strides
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in fused.parameters())


def test_inplace_keeps_the_model_and_its_parameters():
    model = two_blocks()
    parameters = list(model.parameters())
    assert fuse(model, inplace=True) is model
    assert kinds(model) == (2, 0)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_block_as_root_is_returned_fused():
    eager = block()
    for inplace in (False, True):
        fused = fuse(copy.deepcopy(eager), inplace=inplace)
        assert type(fused) is FusedInvertedResidual
        assert_agrees(fused, eager, (1, 8, 9, 7))
        assert type(unfuse(fused, inplace=inplace)) is InvertedResidual


@pytest.mark.parametrize("found", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_keep_their_memory_format(found):
    """Results of fused blocks are in channels_last all the same, so that what lies between them runs in it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block(), nn.Conv2d(8, 8, 3), block()).eval().to(memory_format=found)
    strides = [p.stride() for p in model.parameters()]
    fused = fuse(model)
    assert [p.stride() for p in fused.parameters()] == strides
    assert [p.stride() for p in unfuse(fused).parameters()] == strides
    seen = []
    for module in fused:
        module.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        y = fused(torch.randn(2, 3, 12, 13))
    assert len(seen) == 4
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (*seen[1:], y))
    recorded = fused[1](torch.randn(2, 8, 12, 13))
    assert recorded.requires_grad and recorded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_training_and_requires_grad_stay(training):
    model = two_blocks().train(training)
    model[0].conv[0][1].eval()
    model[1].training = not training  # unlike the modules inside it
    model[1].conv[0][0].weight.requires_grad_(False)
    fused = fuse(model)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in fused.parameters()] == [p.requires_grad for p in model.parameters()]
    plain = unfuse(fused)
    assert [m.training for m in plain.modules()] == [m.training for m in model.modules()]


def test_fusing_twice_changes_nothing():
    fused = fuse(two_blocks(), backend="eager")
    blocks = list(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(fused, inplace=True, strict=True) is fused
        again = fuse(fused)
    assert list(fused) == blocks
    assert [b.backend for b in again] == ["eager", "eager"]
    assert_same_state(again, fused)


def test_a_block_with_two_parents_stays_one_block():
    shared = block()
    model = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": nn.Sequential(shared)})
    fused = fuse(model)
    assert type(fused["a"][0]) is FusedInvertedResidual
    assert fused["a"][0] is fused["a"][1] is fused["b"][0]
    assert_same_state(fused, model)
    plain = unfuse(fused)
    assert type(plain["a"][0]) is InvertedResidual
    assert plain["a"][0] is plain["a"][1] is plain["b"][0]
    assert len(report(model).blocks) == 1


def test_a_convolution_in_two_blocks_stays_shared():
    model = nn.Sequential(block(), block())
    model[1].conv[1][0] = model[0].conv[1][0]
    fused = fuse(model)
    assert kinds(fused) == (2, 0)
    assert fused[1].conv[1][0] is fused[0].conv[1][0]
    with torch.no_grad():
        fused[0].conv[1][0].weight.mul_(2)
        model[0].conv[1][0].weight.mul_(2)
    assert_agrees(fused, model, (1, 8, 6, 6))


def test_attributes_that_others_read_stay():
    for b in two_blocks():
        fused = fuse(b)
        names = ("stride", "use_res_connect", "out_channels", "_is_cn")
        assert [getattr(fused, n) for n in names] == [getattr(b, n) for n in names]
        assert not hasattr(fused, "fuse")


@pytest.mark.parametrize("convert", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_run_and_unfuse(convert):
    eager = two_blocks()
    copied = convert(fuse(eager))
    assert kinds(copied) == (2, 0)
    assert_agrees(copied, eager, (1, 8, 8, 8))
    plain = unfuse(copied, inplace=True).double()
    assert kinds(plain) == (0, 2)
    assert plain[0].conv[0][0].weight.dtype == torch.float64
    assert_same_state(plain, eager.double())


def test_backend_is_passed_on_and_checked():
    assert fuse(block(), backend="eager").backend == "eager"
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'gpu'"):
        fuse(block(), backend="gpu")


def test_geometry_comes_from_the_convolutions():
    eager = block(8, 8, 2)
    eager.conv[1][0].stride = 1  # a plain int, while eager.stride still says 2
    eager.conv[0][0].dilation = (2, 2)  # without effect on a 1x1
    assert not eager.use_res_connect
    fused = fuse(eager)
    assert fused.spec.stride == 1
    assert not fused.spec.residual
    assert_agrees(fused, eager, (1, 8, 9, 9))


def test_convolutions_with_bias_are_fused():
    eager = block()
    eager.conv[0][0].bias = nn.Parameter(torch.randn(16))
    eager.conv[2].bias = nn.Parameter(torch.randn(8))
    fused = fuse(eager)
    assert type(fused) is FusedInvertedResidual
    assert_agrees(fused, eager, (1, 8, 9, 9))


# --- fuse: what it leaves alone, and why


class QuantizableLike(InvertedResidual):
    pass


def _set(path: str, value) -> Callable[[nn.Module], None]:
    def change(b: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        parent = b.get_submodule(owner)
        child = value(getattr(parent, name)) if callable(value) else value
        setattr(parent, name, child)

    return change


def _hook(path: str, register: str) -> Callable[[nn.Module], None]:
    return lambda b: getattr(b.get_submodule(path), register)(lambda *_: None)


def _subclass_of_conv(conv: nn.Conv2d) -> nn.Conv2d:
    class LoraConv2d(nn.Conv2d):
        pass

    conv.__class__ = LoraConv2d
    return conv


class _Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "norm without statistics": (
        _set("conv.3", lambda n: nn.BatchNorm2d(8, track_running_stats=False)),
        "no running statistics",
    ),
    "9x9 kernel": (
        _set("conv.1.0", lambda c: nn.Conv2d(16, 16, 9, padding=4, groups=16)),
        r"depthwise convolution's weight is \[16, 1, 9, 9\]",
    ),
    "oblong kernel": (
        _set("conv.1.0", lambda c: nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16)),
        r"depthwise convolution's weight is \[16, 1, 3, 5\]",
    ),
    "oblong dilation": (
        _set("conv.1.0", lambda c: nn.Conv2d(16, 16, 3, padding=(2, 1), dilation=(2, 1), groups=16)),
        r"depthwise convolution has dilation \(2, 1\)",
    ),
    "residual against a smaller result": (_set("conv.1.0.dilation", (2, 2)), "a residual needs padding that adds 4"),
    "padding too large": (_set("conv.1.0.padding", (3, 3)), r"padding must be 0 to 2 on each side, got \(3, 3, 3, 3\)"),
    "string padding": (_set("conv.1.0.padding", "same"), "depthwise convolution has padding 'same'"),
    "padding mode": (_set("conv.1.0.padding_mode", "reflect"), "padding_mode 'reflect'"),
    "uneven stride": (_set("conv.1.0.stride", (1, 3)), r"depthwise convolution has stride \(1, 3\)"),
    "stride 3": (_set("conv.1.0.stride", (3, 3)), r"stride \(3, 3\), the fused op takes 1 or 2"),
    "groups": (
        _set("conv.1.0", lambda c: nn.Conv2d(16, 16, 3, padding=1, groups=8)),
        "depthwise convolution has groups 8, the fused op takes 16",
    ),
    "depth multiplier": (
        _set("conv.1.0", lambda c: nn.Conv2d(16, 32, 3, padding=1, groups=16)),
        "depthwise convolution has out_channels 32, the fused op takes 16",
    ),
    "1x1 stride": (_set("conv.0.0.stride", (2, 2)), r"expand convolution has stride \(2, 2\)"),
    "1x1 padding": (_set("conv.2.padding", (1, 1)), r"project convolution has padding \(1, 1\)"),
    "1x1 groups": (_set("conv.2", lambda c: nn.Conv2d(16, 8, 1, groups=2)), "project convolution has groups 2"),
    "cut channels": (_set("conv.2", lambda c: nn.Conv2d(12, 8, 1)), "channels do not match"),
    "elu": (_set("conv.1.2", lambda a: nn.ELU()), "activation is torch.nn.modules.activation.ELU,"),
    "clip": (_set("conv.1.2", lambda a: nn.Hardtanh(0, 1)), "activation is torch.nn.modules.activation.Hardtanh,"),
    "two activations": (_set("conv.0.2", lambda a: nn.Sequential(a, nn.ReLU())), "layers are not"),
    "extra layer": (lambda b: b.conv.append(nn.Conv2d(8, 8, 1)), "layers are not"),
    "stage with a forward": (
        _set("conv.0", lambda s: type("Odd", (nn.Sequential,), {"forward": lambda self, x: x})(*s)),
        "Odd where a torch.nn.Conv2d is needed",
    ),
    "convolution subclass": (_set("conv.0.0", _subclass_of_conv), "LoraConv2d where a torch.nn.Conv2d"),
    "quantized convolution": (
        _set("conv.2", lambda c: torch.ao.nn.quantized.Conv2d(16, 8, 1)),
        r"torch\.ao\.nn\.quantized\.modules\.conv\.Conv2d",
    ),
    "block forward hook": (_hook("", "register_forward_hook"), "a hook on it"),
    "block pre-hook": (_hook("", "register_forward_pre_hook"), "a hook on it"),
    "inner forward hook": (_hook("conv.0.2", "register_forward_hook"), "a hook on a ReLU6 inside"),
    "inner pre-hook": (_hook("conv", "register_forward_pre_hook"), "a hook on a Sequential inside"),
    "inner backward hook": (_hook("conv.2", "register_full_backward_hook"), "a hook on a Conv2d inside"),
    "inner backward pre-hook": (_hook("conv.3", "register_full_backward_pre_hook"), "a hook on a BatchNorm2d"),
    "own forward": (lambda b: setattr(b, "forward", lambda x: x), "a forward of its own"),
    "inner forward": (lambda b: setattr(b.conv[2], "forward", lambda x: x), "Conv2d inside, or a forward"),
    "parametrized": (
        lambda b: parametrize.register_parametrization(b.conv[2], "weight", _Doubled()),
        "remove_parametrizations first",
    ),
    "pruned": (lambda b: prune.l1_unstructured(b.conv[2], "weight", 0.5), "computed from others"),
    "meta": (lambda b: b.to("meta"), "meta device"),
    "mixed dtypes": (lambda b: b.conv[0][0].half(), "mixed: torch.float16 on cpu, torch.float32 on cpu"),
    "tensor subclass": (
        _set("conv.2.weight", lambda w: nn.Parameter(w.detach().as_subclass(type("Packed", (Tensor,), {})))),
        "a weight is a Packed",
    ),
    "residual against geometry": (_set("conv.1.0.stride", (2, 2)), "a residual needs stride 1"),
    "no residual attribute": (lambda b: delattr(b, "use_res_connect"), "no attribute use_res_connect"),
    "more children": (lambda b: b.add_module("se", nn.Identity()), "holds more than its module conv"),
    "subclass": (lambda b: setattr(b, "__class__", QuantizableLike), "QuantizableLike is a subclass"),
    "compiled inside": (lambda b: b.conv[0].compile(), "compiled or scripted"),
    "scripted inside": (_set("conv.1", torch.jit.script), "compiled or scripted"),
    "compiled": (lambda b: b.compile(), "it is compiled"),
}


# Of those, what torchvision's reader refuses, and is seen to compute a block all the same.
SEEN = ["string padding", "two activations", "convolution subclass", "more children", "subclass"]


@pytest.mark.parametrize("name", SEEN)
def test_a_changed_block_is_read_as_it_computes(name):
    changed = perturb_batch_norm(block())
    CHANGES[name][0](changed)
    fused = fuse(changed)
    assert isinstance(fused, FusedObserved) and type(unfuse(fused)) is type(changed)
    assert_agrees(fused, changed, (2, 8, 9, 7))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in SEEN])
def test_a_changed_block_is_left_alone_with_its_reason(name):
    change, reason = CHANGES[name]
    changed, ordinary = block(), block()
    change(changed)
    model = nn.Sequential(changed, ordinary)
    fuse(model, inplace=True)
    assert model[0] is changed
    assert type(model[1]) is FusedInvertedResidual
    row = report(model).skipped[0]
    assert row.name == "0"
    with pytest.warns(UserWarning, match=reason):
        assert fuse(changed, inplace=True) is changed
    assert report(changed).blocks[0].reason == row.reason


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:an inverted residual runs unfused")
@pytest.mark.parametrize(
    "compute",
    [lambda conv: prune.l1_unstructured(conv, "weight", 0.5), nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=["pruned", "weight norm", "spectral norm"],
)
def test_weights_computed_from_others_are_copied_and_left_alone(compute):
    model = two_blocks()
    compute(model[0].conv[2])
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = model(x)
        fused = fuse(model)
        assert kinds(fused) == (1, 1)
        assert fused[0].conv[2].weight is not model[0].conv[2].weight
        row, other = report(fused, x.shape).blocks
        assert "computed from others" in row.reason and other.bytes_never_written > 0
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)

        later = fuse(two_blocks())
        compute(later[0].conv[2])
        for converted in (fuse(later), unfuse(later)):
            torch.testing.assert_close(converted(x), later(x))
        assert kinds(unfuse(later)) == (0, 2)


class OtherFrozenBatchNorm2d(FrozenBatchNorm2d):
    """Of the same name as torchvision's below, and it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


OtherFrozenBatchNorm2d.__name__ = "FrozenBatchNorm2d"


class EpsInForward(FrozenBatchNorm2d):
    """As those of transformers' detectors: no attribute says it."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


EpsInForward.__name__ = "SomeFrozenBatchNorm2d"


def test_frozen_norms_of_other_libraries_are_judged_by_what_they_compute():
    eager = block(norm_layer=OtherFrozenBatchNorm2d)
    with pytest.warns(UserWarning, match=r"FrozenBatchNorm2d of \S*test_convert computes something else than a batch"):
        assert type(fuse(eager)) is InvertedResidual
    eager = perturb_batch_norm(block(norm_layer=EpsInForward))
    fused = fuse(eager)
    assert type(fused) is FusedInvertedResidual
    assert_agrees(fused, eager, (2, 8, 9, 7))


def test_the_norms_of_a_detector_of_transformers():
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    model = nn.Sequential(block(), block())
    with torch.no_grad():
        detr.replace_batch_norm(model)
    assert "DetrFrozenBatchNorm2d" in str(model)
    fused = fuse(model)
    assert sum(isinstance(m, FusedInvertedResidual) for m in fused) == 2
    assert_agrees(fused, model, (2, 8, 9, 7))


class CountingNorm(nn.BatchNorm2d):
    """Another class, the same forward."""

    def reset_parameters(self):
        super().reset_parameters()
        self.resets = getattr(self, "resets", 0) + 1


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_of_batch_norm_that_keep_its_forward():
    eager = perturb_batch_norm(block(norm_layer=CountingNorm))
    fused = fuse(eager)
    assert type(fused) is FusedInvertedResidual
    assert_agrees(fused, eager, (2, 8, 9, 7))
    with pytest.warns(UserWarning, match="ScaledNorm cannot be folded"):
        fuse(block(norm_layer=ScaledNorm))


def test_strides_as_a_list():
    eager = block()
    eager.conv[0][0].stride = [1, 1]
    eager.conv[1][0].stride = [1, 1]
    assert_agrees(fuse(eager), eager, (2, 8, 9, 7))
    assert type(fuse(eager)) is FusedInvertedResidual


def test_quantizable_blocks_are_left_alone():
    model = quantizable_mobilenet_v2(weights=None, width_mult=0.35)
    with pytest.warns(UserWarning, match="17 x QuantizableInvertedResidual is a subclass"):
        fused = fuse(model)
    assert_same_state(fused, model)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


def test_quantizable_blocks_of_mobilenet_v3_are_left_alone():
    model = quantizable_mobilenet_v3_large(weights=None)
    with pytest.warns(UserWarning, match=r"15 x torchvision\S*\.QuantizableInvertedResidual is not"):
        assert type(fuse(model)) is type(model)


def test_group_norm_is_left_alone():
    model = mobilenet_v2(width_mult=0.35, norm_layer=partial(nn.GroupNorm, 1))
    with pytest.warns(UserWarning, match="17 x GroupNorm cannot be folded"):
        assert kinds(fuse(model)) == (0, 17)


@pytest.mark.parametrize("reason", ["compiled", "scripted"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_inside_compiled_and_scripted_models_are_left_alone(reason):
    model = scripted(two_blocks) if reason == "scripted" else torch.compile(two_blocks())
    with pytest.warns(UserWarning, match=f"2 x it is {reason}: fuse first"):
        fuse(model, inplace=True)


def _copied_class(forward: Callable) -> type:
    """A class as older releases and forks have: same structure, another module."""
    return type("InvertedResidual", (nn.Module,), {"forward": forward})


def _forward_as_torchvision(self, x):
    if self.use_res_connect:
        return x + self.conv(x)
    else:
        return self.conv(x)


def _forward_scaled(self, x):
    if self.use_res_connect:
        return x - self.conv(x)
    else:
        return self.conv(x)


def _as(cls: type, source: nn.Module) -> nn.Module:
    copied = cls()
    class_of_stage = type("ConvBNReLU", (nn.Sequential,), {})
    stages = [class_of_stage(*s) if isinstance(s, nn.Sequential) else s for s in source.conv]
    copied.conv, copied.use_res_connect = nn.Sequential(*stages), source.use_res_connect
    return copied.eval()


def test_older_releases_and_exact_copies_match():
    eager = _as(_copied_class(_forward_as_torchvision), block())
    fused = fuse(eager)
    assert type(fused) is FusedInvertedResidual
    assert_agrees(fused, eager, (1, 8, 6, 6))
    assert type(unfuse(fused)) is type(eager)


def test_a_copy_with_another_forward_does_not_match():
    with pytest.warns(UserWarning, match="has a forward that is not torchvision's"):
        fuse(_as(_copied_class(_forward_scaled), block()))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), resnet18(), nn.Sequential()])
def test_a_model_without_blocks_warns(model):
    with pytest.warns(UserWarning, match="no inverted residual was found"):
        fused = fuse(model)
    assert type(fused) is type(model)
    with pytest.raises(ValueError, match="no inverted residual was found"):
        fuse(model, strict=True)


def test_the_warning_counts_distinct_reasons_and_points_here():
    model = nn.Sequential(*(block(norm_layer=partial(nn.GroupNorm, 1)) for _ in range(2)), block())
    model[2].conv[1][2] = nn.ELU()
    with pytest.warns(UserWarning, match="2 x GroupNorm .*; 1 x its activation is") as caught:
        fuse(model)
    assert [w.filename for w in caught] == [__file__]


def test_strict_refuses_a_skipped_block_before_changing_anything():
    model = two_blocks()
    model[1].conv[1][2] = nn.ELU()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(fuse(model)) == (1, 1)
    with pytest.raises(ValueError, match=r"1 x its activation is torch\.nn\.modules\.activation\.ELU"):
        fuse(model, strict=True, inplace=True)
    assert kinds(model) == (0, 2)
    assert kinds(fuse(two_blocks(), strict=True)) == (2, 0)


def test_filter_fn_chooses_by_name_and_block():
    seen = {}

    def choose(name: str, b: nn.Module) -> bool:
        seen[name] = type(b)
        return name == "1"

    fused = fuse(two_blocks(), filter_fn=choose, strict=True)  # what the user left out is no failure
    assert seen == {"0": InvertedResidual, "1": InvertedResidual}
    assert [type(b) for b in fused] == [InvertedResidual, FusedInvertedResidual]
    with pytest.warns(UserWarning, match="2 x filter_fn left it out"):
        fuse(two_blocks(), filter_fn=lambda name, b: False)
    with pytest.raises(ValueError, match="2 x filter_fn left it out"):
        fuse(two_blocks(), filter_fn=lambda name, b: False, strict=True)


# --- unfuse


def test_unfuse_gives_the_instances_back():
    model = two_blocks()
    blocks = list(model)
    fused = fuse(model, inplace=True)
    assert unfuse(fused, inplace=True) is model
    assert list(model) == blocks
    again = unfuse(fuse(model))
    assert kinds(again) == (0, 2)
    assert all(a is not b for a, b in zip(again, blocks, strict=True))


def test_unfuse_after_training_has_the_trained_weights():
    eager = two_blocks()
    fused = fuse(eager).train()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(torch.randn(4, 8, 8, 8)).square().mean().backward()
    optimizer.step()
    fused.eval()
    plain = unfuse(fused)
    assert not any(m.training for m in plain.modules())
    assert_same_state(plain, fused)
    assert not torch.equal(plain[0].conv[0][0].weight, eager[0].conv[0][0].weight)
    assert plain[0].conv[0][1].num_batches_tracked == 1
    assert_agrees(fused, plain, (1, 8, 8, 8))


def test_unfuse_follows_a_replaced_conv_and_later_hooks():
    fused = fuse(block())
    replacement = block().conv
    fused.conv = replacement
    calls = []
    handle = fused.register_forward_hook(lambda *_: calls.append(1))
    plain = unfuse(fused, inplace=True)
    assert plain.conv is replacement
    plain(torch.randn(1, 8, 4, 4))
    handle.remove()
    plain(torch.randn(1, 8, 4, 4))
    assert calls == [1]


def test_the_kept_instance_is_no_submodule():
    fused = fuse(two_blocks())
    assert kinds(fused) == (2, 0)
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in two_blocks().parameters())


def test_constructed_blocks_unfuse_to_torchvision():
    torch.manual_seed(0)
    model = perturb_batch_norm(mobilenet_v2(block=FusedInvertedResidual, width_mult=0.35, num_classes=10)).eval()
    plain = unfuse(model)
    assert kinds(model) == (17, 0)
    assert kinds(plain) == (0, 17)
    assert_same_state(plain, model)
    assert_agrees(model, plain, (1, 3, 32, 32))
    assert [b.use_res_connect for b in plain.features[1:4]] == [False, False, True]
    assert kinds(fuse(plain)) == (17, 0)


def test_constructed_blocks_need_torchvision_to_unfuse(monkeypatch):
    model = nn.Sequential(fuse(block()), FusedInvertedResidual(8, 8, 1, 2))
    real = builtins.__import__

    def without_torchvision(name, *args):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_torchvision)
    with pytest.raises(ImportError, match="install torchvision"):
        unfuse(model, inplace=True)
    assert kinds(model) == (2, 0)
    assert kinds(unfuse(model[:1])) == (0, 1)


# --- report


class Twice(nn.Module):
    """A stem that halves the image, then one block called twice and one of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body, self.down = block(), block(8, 16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.body(self.body(self.stem(x))))


def test_report_counts_the_bytes_by_hand():
    fused = fuse(Twice().eval())
    body, down = report(fused, (5, 3, 20, 12)).blocks
    # 10 x 6 after the stem; expansion and depthwise output of 16 channels, two calls, float32
    assert body.bytes_never_written == 2 * (16 * 60 + 16 * 60) * 4
    # no expansion: only the depthwise output of 8 channels at 5 x 3
    assert down.bytes_never_written == 8 * 15 * 4
    assert report(fused, (5, 3, 20, 12)).bytes_never_written == 15360 + 480
    assert report(fused.half(), (1, 3, 20, 12)).bytes_never_written == (15360 + 480) // 2


def test_report_rows_and_table():
    fused = fuse(Twice().eval())
    fused.stem.weight.requires_grad_(False)
    result = report(fused, (1, 3, 20, 12))
    assert [(b.name, b.fused, b.backend, b.reason) for b in result.blocks] == [
        ("body", True, "cpu", None),
        ("down", True, "cpu", None),
    ]
    assert str(result.blocks[0].spec) == "8 -> 16 -> 8, stride 1, residual"
    lines = str(result).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["block", "spec", "backend", "never", "written", "reason"]
    assert lines[1].index("cpu") == lines[2].index("cpu") == lines[0].index("backend")
    assert lines[-1] == "2 fused, 0 not fused, 0.02 MiB never written per image"
    with pytest.raises(AttributeError):
        result.training = True


def test_report_tells_what_runs_beside_the_blocks(monkeypatch):
    model = fuse(mobilenet_v2().eval())
    found = report(model, (1, 3, 64, 96))
    assert [(layer.name, layer.what) for layer in found.layers] == [
        ("features.0", "3x3 stem, inside the block behind it"),
        ("features.18", "1x1 convolution and pooling"),
        ("classifier.1", "classifier"),
    ]
    stem, head, classifier = (layer.bytes_never_written for layer in found.layers)
    assert stem == model.features[0][0].out_channels * 32 * 48 * 4
    assert head == 1280 * 2 * 3 * 4
    assert classifier is None
    assert found.bytes_never_written == sum(b.bytes_never_written for b in found.blocks) + stem + head
    assert str(found).count("stem, inside") == 1
    assert [layer.bytes_never_written for layer in report(model).layers] == [None] * 3
    # A part of it by itself has no pooling behind its last convolution.
    assert [layer.what for layer in report(model.features).layers] == [found.layers[0].what, "1x1 convolution"]

    hook = model.features[18].register_forward_hook(lambda *_: None)
    assert [layer.name for layer in report(model).layers] == ["features.0"]
    hook.remove()
    assert len(report(model).layers) == 3
    assert report(model.train()).layers == ()
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert report(model.eval()).layers == ()
    assert report(unfuse(model)).layers == ()


def test_report_before_fusing_and_without_a_shape():
    model = two_blocks()
    model[1].conv[1][2] = nn.ELU()
    result = report(model, (1, 8, 8, 8))
    assert [b.reason for b in result.blocks] == [
        "not fused: call fuse(model)",
        f"its activation is torch.nn.modules.activation.ELU, the fused op computes {', '.join(ACTIVATIONS)}",
    ]
    assert result.blocks[0].spec is not None
    assert result.blocks[1].spec is None
    assert result.fused == ()
    assert result.skipped == result.blocks
    assert result.bytes_never_written is None
    assert str(result).splitlines()[-1] == "0 fused, 2 not fused"
    assert report(fuse(model)).blocks[0].bytes_never_written is None


def test_report_says_why_a_fused_block_runs_no_kernel(monkeypatch):
    fused = fuse(two_blocks(), backend="eager")
    fused[1].backend = "auto"
    fused[1].conv[0][2].register_forward_hook(lambda *_: None)
    result = report(fused, (1, 8, 8, 8))
    assert [b.backend for b in result.fused] == ["eager", "eager"]
    assert result.blocks[0].reason is None
    assert "a hook on a ReLU6 inside" in result.blocks[1].reason
    assert result.bytes_never_written is None
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "nonsense")
    row = report(fused).blocks[0]
    assert row.backend is None
    assert "MNV2_FUSED_BACKEND must be one of" in row.reason


def test_report_says_what_trains_fused():
    fused = fuse(two_blocks())
    assert not report(fused).training
    assert "train()" not in str(report(fused))
    assert str(report(fused.train())).endswith("now in train(), where 2 run fused, too")
    assert [row.not_trained for row in report(fused).blocks] == [None, None]
    fused[0].backend = "eager"
    assert str(report(fused)).endswith(
        "where 1 run fused, too; 1 as ordinary modules: the training kernels are the CPU's"
    )


def test_report_leaves_no_trace():
    calls = []
    fused = fuse(Twice()).train()
    fused.stem.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(fused)
    attributes = [sorted(vars(m)) for m in fused.modules()]
    report(fused, (2, 3, 16, 16))
    assert calls == []
    assert_same_state(fused, before)
    assert [m.training for m in fused.modules()] == [m.training for m in before.modules()]
    assert [sorted(vars(m)) for m in fused.modules()] == attributes
    assert not any(t.is_meta for t in fused.state_dict().values())
    assert_agrees(fused.eval(), unfuse(before).eval(), (1, 3, 16, 16))


def test_report_of_a_real_model_needs_a_fitting_shape():
    fused = fuse(mobilenet_v2(width_mult=0.35))
    result = report(fused, (1, 3, 32, 32))  # in train(), where one pixel is too few for a batch norm
    assert len(result.fused) == 17
    assert [b.name for b in result.blocks] == [f"features.{i}" for i in range(1, 18)]
    assert all(b.bytes_never_written > 0 for b in result.blocks)
    with pytest.raises(ValueError, match=r"one input of shape \[1, 4, 64, 64\].*without input_shape"):
        report(fused, (1, 4, 64, 64))


def test_hooks_with_kwargs_survive_unfusing():
    block = InvertedResidual(8, 8, 1, 6).eval()
    fused = fuse(block)
    seen = []
    fused.register_forward_hook(lambda m, args, kwargs, y: seen.append(kwargs), with_kwargs=True)
    unfuse(fused)(torch.randn(1, 8, 5, 5))
    assert seen == [{}]


def test_report_of_unrecognisable_layers():
    fused = fuse(InvertedResidual(8, 8, 1, 6).eval())
    fused.conv[0] = nn.Linear(8, 48)
    (found,) = report(fused).blocks
    assert found.spec is None and found.backend == "eager" and "torch.nn.modules.linear.Linear where" in found.reason
    assert "torch.nn.modules.linear.Linear where" in str(report(fused))


def test_warnings_come_once_a_model_with_a_name_at_the_callers_line():
    model = fuse(nn.Sequential(block(), nn.Sequential(block(), block())))
    for of in (model[0], model[1][1]):
        of.conv[1].register_forward_hook(lambda *given: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(1, 8, 9, 7))
        copy.deepcopy(model)(torch.randn(1, 8, 9, 7))
    kinds = {str(w.message).split(",")[0] for w in caught}
    assert len(caught) == len(kinds) == 1 and all(w.filename == __file__ for w in caught)
    (text,) = (str(w.message) for w in caught)
    assert text.startswith("an inverted residual (0) runs unfused: a hook on") and "report(model) lists them" in text
    other = fuse(nn.Sequential(block()))
    other[0].conv[1].register_forward_hook(lambda *given: None)
    with pytest.warns(UserWarning, match=r"an inverted residual \(0\) runs unfused"):
        other(torch.randn(1, 8, 9, 7))
