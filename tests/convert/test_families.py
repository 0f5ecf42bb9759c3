"""Every model family's block, alone and small: read rightly, the same result, the same instance; and each trap."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import warnings

import pytest
import torch
import torchvision
from support.models import scripted
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual as MobileNetV2Block
from torchvision.models.mobilenetv3 import InvertedResidual as MobileNetV3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from mnv2_fused import backends, fuse, report, unfuse
from mnv2_fused.families import family_of, parts_of
from mnv2_fused.module import FusedBlock, FusedInPlace, FusedObserved
from mnv2_fused.ops import missing_kernel
from mnv2_fused.testing import agreement, perturb_batch_norm, threads


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    with threads(1):
        yield


def prepared(block: nn.Module) -> nn.Module:
    return perturb_batch_norm(block).eval()


def v3(**changes) -> MobileNetV3Block:
    config = {"input_channels": 8, "kernel": 5, "expanded_channels": 24, "out_channels": 8, "use_se": True}
    config |= {"activation": "HS", "stride": 1, "dilation": 1, "width_mult": 1.0} | changes
    return MobileNetV3Block(InvertedResidualConfig(**config), lambda c: nn.BatchNorm2d(c, eps=1e-3))


def mbconv(drop: float = 0.2, ratio: float = 4, out_channels: int = 8, stride: int = 1) -> MBConv:
    return MBConv(MBConvConfig(ratio, 3, stride, 8, out_channels, 1), drop, nn.BatchNorm2d)


def mnasnet(**changes) -> nn.Module:
    options = {"in_ch": 8, "out_ch": 8, "kernel_size": 5, "stride": 1, "expansion_factor": 3} | changes
    return torchvision.models.mnasnet._InvertedResidual(**options)


def timm_block(name: str = "InvertedResidual", in_chs: int = 8, out_chs: int = 8, **options) -> nn.Module:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    return getattr(blocks, name)(in_chs, out_chs, **options)


def timm_squeeze(**options):
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    return lambda channels, **layer: blocks.SqueezeExcite(channels, **layer, **options)


def timm_frozen(channels: int, act_layer: type[nn.Module] | None = None, **options) -> nn.Module:
    norms = pytest.importorskip("timm.layers.norm_act")
    return norms.FrozenBatchNormAct2d(channels, act_layer=act_layer, **options)


def transformers_layers(
    name: str = "MobileNetV2InvertedResidual", *sizes: int, tf_padding: bool = True, act: str = "relu6", **options
):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mobilenet_v2.modeling_mobilenet_v2")
    config = transformers.MobileNetV2Config(tf_padding=tf_padding, hidden_act=act)
    return getattr(modeling, name)(config, *sizes, **options)


class InvertedResidual(nn.Module):
    """tonylins' and, with ``identity``, d-li14's: eight layers in a row, or five."""

    def __init__(self, channels: int = 8, ratio: int = 6, stride: int = 1) -> None:
        super().__init__()
        hidden = channels * ratio
        pointwise = [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(
            *(pointwise if ratio > 1 else []),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.use_res_connect = self.identity = stride == 1

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


def _identity_forward(self, x):
    if self.identity:
        return x + self.conv(x)
    else:
        return self.conv(x)


def d_li14(**sizes) -> nn.Module:
    block = InvertedResidual(**sizes)
    block.__class__ = type("InvertedResidual", (nn.Module,), {"forward": _identity_forward})
    return block


class ConvModule(nn.Module):
    """mmcv's, its default order."""

    order = ("conv", "norm", "act")
    with_norm = True

    def __init__(self, *sizes: int, act: bool = True, **options) -> None:
        super().__init__()
        self.with_activation, self.norm_name = act, "bn"
        self.conv = nn.Conv2d(*sizes, bias=False, **options)
        self.bn = nn.BatchNorm2d(sizes[1])
        if act:
            self.activate = nn.ReLU6(inplace=True)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.activate(x) if self.with_activation else x


ConvModule.__module__ = "mmcv.cnn.bricks.conv_module"


def _open_mmlab_forward(self, x):
    return x + self.conv(x) if self.use_res_connect else self.conv(x)


def open_mmlab(stride: int = 1) -> nn.Module:
    members = {"forward": _open_mmlab_forward, "__module__": "mmpretrain.models.backbones.mobilenet_v2"}
    members["use_res_connect"] = property(lambda self: self.stride == 1)
    block = type("InvertedResidual", (nn.Module,), members)()
    block.stride, block.with_cp = stride, False
    depthwise = ConvModule(24, 24, 3, stride=stride, padding=1, groups=24)
    block.conv = nn.Sequential(ConvModule(8, 24, 1), depthwise, ConvModule(24, 8, 1, act=False))
    return block


def ssdlite_head() -> nn.Module:
    return torchvision.models.detection.ssdlite._prediction_block(8, 12, 3, nn.BatchNorm2d)


def ssdlite_extra() -> nn.Module:
    return torchvision.models.detection.ssdlite._extra_block(8, 16, nn.BatchNorm2d)


def mobilenet_v1(channels: int = 8) -> nn.Sequential:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(12)
    return nn.Sequential(depthwise, norms[0], nn.ReLU(), nn.Conv2d(channels, 12, 1, bias=False), norms[1], nn.ReLU())


def dilated_v2() -> MobileNetV2Block:
    """As segmentation encoders leave a block of stride 2: dilated in place, its own attributes telling of before."""
    block = MobileNetV2Block(8, 12, 2, 3)
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        conv.stride, conv.dilation = (1, 1), (2, 2)
        conv.padding = (conv.kernel_size[0] // 2 * 2,) * 2
    return block


# block, and words of its spec
BLOCKS = {
    "torchvision v2, dilated in place": (dilated_v2, ["stride 1", "dilation 2"]),
    "torchvision v2, uneven padding": (
        lambda: _with(MobileNetV2Block(8, 12, 1, 3), lambda b: setattr(b.conv[1][0], "padding", (1, 0))),
        ["padding (0, 0, 1, 1)"],
    ),
    "torchvision v3": (v3, ["kernel 5", "hardswish", "squeeze 8 (relu, hardsigmoid)", "residual"]),
    "torchvision v3, t = 1": (lambda: v3(expanded_channels=8, activation="RE", kernel=3), ["8 -> 8", "relu,"]),
    "torchvision v3, stride": (lambda: v3(stride=2, use_se=False, out_channels=12), ["stride 2"]),
    "torchvision v3, dilated": (lambda: v3(stride=2, dilation=2, out_channels=12), ["stride 1", "dilation 2"]),
    "torchvision v3, frozen": (
        lambda: MobileNetV3Block(InvertedResidualConfig(8, 3, 24, 8, True, "HS", 1, 1, 1.0), FrozenBatchNorm2d),
        ["24"],
    ),
    "mnasnet": (mnasnet, ["kernel 5", "relu,", "residual"]),
    "mnasnet, stride": (lambda: mnasnet(stride=2, kernel_size=3), ["stride 2", "relu"]),
    "efficientnet": (mbconv, ["silu", "squeeze 2 (silu, sigmoid)", "residual"]),
    "efficientnet, t = 1": (lambda: mbconv(ratio=1, out_channels=16), ["8 -> 16", "silu"]),
    "ssdlite head": (ssdlite_head, ["8 -> 12"]),
    "ssdlite extra": (ssdlite_extra, ["stride 2", "output relu6"]),
    "ssdlite, after the tap": (lambda: v3(stride=2, out_channels=16).block[1:], ["24 -> 16", "stride 2", "squeeze"]),
    "mobilenet v1": (mobilenet_v1, ["relu", "output relu"]),
    "timm": (lambda: timm_block(act_layer=nn.ReLU6), ["8 -> 8", "residual"]),
    "timm, squeeze": (
        lambda: timm_block(exp_ratio=3, act_layer=nn.SiLU, se_layer=timm_squeeze(rd_ratio=0.25), drop_path_rate=0.1),
        ["silu", "squeeze 6 (silu, sigmoid)"],
    ),
    "timm, hard gate": (
        lambda: timm_block(exp_ratio=3, act_layer=nn.Hardswish, se_layer=timm_squeeze(gate_layer=nn.Hardsigmoid)),
        ["hardswish", "hardsigmoid"],
    ),
    "timm, same padding": (
        lambda: timm_block(exp_ratio=3, stride=2, dw_kernel_size=5, pad_type="same"),
        ["kernel 5", "stride 2", "padding same"],
    ),
    "timm, separable": (lambda: timm_block("DepthwiseSeparableConv", out_chs=12, act_layer=nn.ReLU6), ["8 -> 12"]),
    "timm, separable, activated": (
        lambda: timm_block("DepthwiseSeparableConv", pw_act=True, act_layer=nn.SiLU),
        ["output silu", "residual"],
    ),
    "timm, frozen": (
        lambda: timm_block(act_layer=nn.ReLU6, norm_layer=timm_frozen),
        ["8 -> 8", "residual"],
    ),
    "transformers": (lambda: transformers_layers(*_HF, 8, 8, 1), ["padding same", "residual"]),
    "transformers, silu": (lambda: transformers_layers(*_HF, 8, 8, 1, act="silu"), ["silu", "residual"]),
    "transformers, stride": (lambda: transformers_layers(*_HF, 8, 12, 2), ["padding same", "stride 2"]),
    "transformers, dilated": (lambda: transformers_layers(*_HF, 8, 8, 1, dilation=2), ["dilation 2", "padding same"]),
    "transformers, even padding": (lambda: transformers_layers(*_HF, 8, 12, 2, tf_padding=False), ["stride 2"]),
    "transformers, stem": (lambda: transformers_layers("MobileNetV2Stem", 3, 8, 12), ["8 -> 12"]),
    "tonylins": (InvertedResidual, ["48", "residual"]),
    "tonylins, t = 1": (lambda: InvertedResidual(ratio=1), ["8 -> 8", "residual"]),
    "d-li14": (d_li14, ["48", "residual"]),
    "d-li14, stride": (lambda: d_li14(stride=2), ["stride 2"]),
    "OpenMMLab": (open_mmlab, ["24", "residual"]),
    "OpenMMLab, stride": (lambda: open_mmlab(stride=2), ["stride 2"]),
}
_HF = ("MobileNetV2InvertedResidual",)
by_block = pytest.mark.parametrize("make, words", BLOCKS.values(), ids=BLOCKS.keys())


def input_of(block: nn.Module, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (11, 10)) -> torch.Tensor:
    first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(2, first.in_channels, *size, dtype=dtype)


def in_channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


@by_block
def test_a_block_alone_is_fused_with_the_same_result(make, words):
    eager = prepared(make())
    fused = fuse(eager, strict=True)
    (row,) = report(fused).blocks
    assert row.fused and row.reason is None and row.backend == "cpu"
    assert all(word in str(row.spec) for word in words), row.spec
    assert list(fused.state_dict()) == list(eager.state_dict())
    for size in ((11, 10), (8, 9), (1, 3)):
        x = input_of(eager, size=size)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            found = agreement(fused(x), eager(x), copy.deepcopy(eager).double()(x.double()))
        assert found.ok, f"{size}: {found}"


@by_block
def test_the_kernel_runs_not_the_modules(make, words, monkeypatch):
    fused = fuse(prepared(make()))
    block = next(m for m in fused.modules() if isinstance(m, FusedBlock))
    monkeypatch.setattr(block, "_forward_modules", lambda x: pytest.fail("the ordinary modules ran"))
    with torch.no_grad():
        fused(input_of(fused))


@by_block
def test_gradients_in_eval(make, words):
    eager = in_channels_last(prepared(make()))  # as fuse leaves it: torch rounds weights' gradients by their layout
    fused, truth = fuse(eager), copy.deepcopy(eager).double()
    x = input_of(eager)
    grads = []
    for model in (fused, eager, truth):
        leaf = x.clone().to(next(model.parameters()).dtype).requires_grad_()
        model(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in model.parameters())])
    for ours, theirs, reference in zip(*grads, strict=True):
        found = agreement(ours, theirs, reference)
        assert found.ok, found


@by_block
def test_training_is_the_originals(make, words):
    """By the training kernels to rounding, by the modules, where these have to run, to the bit."""
    eager = in_channels_last(perturb_batch_norm(make())).train()
    fused, truth = fuse(eager).train(), copy.deepcopy(eager).double()
    x = input_of(eager)
    if any("Frozen" in type(m).__name__ for m in eager.modules()):  # fused in train(), too
        found = agreement(fused(x), eager(x), truth(x.double()))
        assert found.ok and not torch.equal(fused(x), eager(x)), found
        return
    kernels = [block.training_objection() is None for block in fused.modules() if isinstance(block, FusedBlock)]
    results = []
    for model in (fused, eager, truth):
        torch.manual_seed(3)  # of stochastic depth
        results.append(model(x.double() if model is truth else x))
    tensors = [[y, *model.buffers()] for y, model in zip(results, (fused, eager, truth), strict=True)]
    for ours, theirs, exact in zip(*tensors, strict=True):
        if any(kernels) and ours.is_floating_point():
            assert agreement(ours, theirs, exact).ok
        else:
            assert torch.equal(ours, theirs)


@by_block
def test_replicas_compute_with_their_own_weights(make, words, monkeypatch):
    """As nn.DataParallel makes them for several GPUs: the second one's weights are half as large here."""
    eager = prepared(make())
    fused = fuse(eager)
    half = fuse(eager)
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(0.5)
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],  # torch.nn.parallel has a function of that name
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t * (1 if detach else s) for t in tensors] for s in (1, 0.5)],
    )
    x = input_of(eager)
    with torch.no_grad():
        fused(x)  # which keeps what it folds
        with pytest.warns(UserWarning, match="runs unfused in nn.DataParallel"):
            replicas = torch.nn.parallel.replicate(fused, [0, 1])
        for replica, expected in zip(replicas, (fused, half), strict=True):
            torch.testing.assert_close(replica(x), expected(x), rtol=1e-4, atol=1e-5)


@by_block
def test_unfuse_gives_the_very_block_back(make, words):
    block = prepared(make())
    cls, attributes = type(block), sorted(vars(block))
    fused = fuse(block, inplace=True)
    assert isinstance(fused, FusedBlock)
    back = unfuse(fused, inplace=True)
    assert back is block and type(back) is cls and sorted(vars(back)) == attributes


@by_block
def test_what_stays_of_the_instance(make, words):
    block = prepared(make())
    cls, children = type(block), list(block._modules.items())
    block.tag = "of others"
    attributes = {k: v for k, v in vars(block).items() if k[0] != "_" or k == "_is_cn"}
    fused = fuse(block, inplace=True)
    assert list(fused._modules.items()) == children and not hasattr(fused, "fuse")
    assert all(vars(fused)[name] == value for name, value in attributes.items())
    fused.tag = "changed"
    assert unfuse(fused).tag == "changed"
    if cls is not MobileNetV2Block:
        assert fused is block and isinstance(fused, cls)
    assert fuse(fused) is not fused and type(fuse(fused)) is type(fused)
    assert fuse(fused, inplace=True) is fused


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [v3, mbconv, mnasnet, InvertedResidual, mobilenet_v1], ids=lambda m: m.__name__)
def test_copies_run_fused_and_follow_their_own_weights(copied, make):
    fused = fuse(prepared(make()))
    x = input_of(fused)
    with torch.no_grad():
        before = fused(x)
        other = copied(fused)
        assert type(other) is type(fused) and torch.equal(other(x), before)
        next(other.parameters()).mul_(2)
        assert not torch.equal(other(x), before) and torch.equal(fused(x), before)
    assert type(unfuse(other)) is type(fused).original


def test_slices_of_a_fused_sequential_are_ordinary():
    fused = fuse(prepared(mobilenet_v1()))
    part = fused[:3]
    assert type(part) is nn.Sequential and part[0] is fused[0]
    x = input_of(fused)
    assert torch.equal(part(x), fused[2](fused[1](fused[0](x))))


# --- changes after fusing


def _zeroed_drop(block):
    block.stochastic_depth.p = 0.0


CHANGED = {
    "convolution": (v3, lambda b: b.block[0][0].weight.mul_(2)),
    "statistics": (v3, lambda b: b.block[1][1].running_var.mul_(3)),
    "eps": (v3, lambda b: setattr(b.block[1][1], "eps", 0.5)),
    "squeeze weight": (v3, lambda b: b.block[2].fc1.weight.mul_(-3)),
    "excite bias": (v3, lambda b: b.block[2].fc2.bias.add_(2)),
    "squeeze activation": (v3, lambda b: setattr(b.block[2], "activation", nn.SiLU())),
    "gate": (v3, lambda b: setattr(b.block[2], "scale_activation", nn.Sigmoid())),
    "residual": (v3, lambda b: setattr(b, "use_res_connect", False)),
    "dilation": (lambda: v3(out_channels=12), lambda b: setattr(b.block[1][0], "dilation", (2, 2))),
    "activations": (mnasnet, lambda b: [b.layers.__setitem__(i, nn.SiLU()) for i in (2, 5)]),
    "apply_residual": (mnasnet, lambda b: setattr(b, "apply_residual", False)),
    "identity": (d_li14, lambda b: setattr(b, "identity", False)),
    "has_skip": (lambda: timm_block(act_layer=nn.ReLU), lambda b: setattr(b, "has_skip", False)),
    "norm's activation": (
        lambda: timm_block("DepthwiseSeparableConv", act_layer=nn.ReLU),
        lambda b: setattr(b.bn1, "act", nn.SiLU()),
    ),
    "tf_padding": (
        lambda: transformers_layers(*_HF, 8, 12, 2),
        lambda b: setattr(b.expand_1x1.config, "tf_padding", False),
    ),
}


@pytest.mark.parametrize("make, change", CHANGED.values(), ids=CHANGED.keys())
def test_changes_are_noticed(make, change):
    eager = prepared(make())
    fused = fuse(eager)
    x = input_of(eager, size=(8, 8))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # it stays fused
        before = fused(x)
        fused(x)
        change(fused), change(eager)
        found = agreement(fused(x), eager(x), copy.deepcopy(eager).double()(x.double()))
        assert found.ok, found
        assert fused(x).shape != before.shape or not torch.allclose(fused(x), before)


# --- traps: what a reader must not take


def _subclass(cls: type, **members) -> type:
    return type(f"Other{cls.__name__}", (cls,), members)


def _retyped(block: nn.Module) -> nn.Module:
    block.__class__ = _subclass(type(block), forward=lambda self, x: 2 * type(self).__mro__[1].forward(self, x))
    return block


def _with(block: nn.Module, change) -> nn.Module:
    change(block)
    return block


def _hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, i, o: None)


class _OtherSqueeze(SqueezeExcitation):
    def forward(self, x):
        return x + super().forward(x)


TRAPS = {
    "v3 subclass": (lambda: _retyped(v3()), "may compute something else"),
    "mnasnet subclass": (lambda: _retyped(mnasnet()), "may compute something else"),
    "efficientnet subclass": (lambda: _retyped(mbconv()), "may compute something else"),
    "timm subclass": (lambda: timm_block("CondConvResidual", num_experts=2), "may compute something else"),
    "transformers subclass": (lambda: _retyped(transformers_layers(*_HF, 8, 8, 1)), "may compute something else"),
    "squeeze subclass": (
        lambda: _with(v3(), lambda b: b.block.__setitem__(2, _OtherSqueeze(24, 8))),
        "there is a .*_OtherSqueeze where none belongs",
    ),
    "squeeze activation": (
        lambda: _with(v3(), lambda b: setattr(b.block[2], "activation", nn.ELU())),
        "activation is torch.nn.modules.activation.ELU",
    ),
    "squeeze gate": (
        lambda: _with(v3(), lambda b: setattr(b.block[2], "scale_activation", nn.Tanh())),
        "activation is torch.nn.modules.activation.Tanh",
    ),
    "squeeze pooling": (
        lambda: _with(v3(), lambda b: setattr(b.block[2], "avgpool", nn.AdaptiveAvgPool2d(2))),
        "the fused op takes the mean",
    ),
    "squeeze before the depthwise convolution": (
        lambda: _with(v3(), lambda b: b.block.insert(1, b.block.pop(2))),
        "does not follow the depthwise convolution",
    ),
    "unlike slopes": (
        lambda: _with(
            mnasnet(),
            lambda b: (b.layers.__setitem__(2, nn.LeakyReLU(0.1)), b.layers.__setitem__(5, nn.LeakyReLU(0.2))),
        ),
        "LeakyReLUs have slopes of",
    ),
    "anti-aliasing": (lambda: _with(timm_block(), lambda b: setattr(b, "aa", nn.AvgPool2d(3, 1, 1))), "AvgPool2d"),
    "space to depth": (lambda: timm_block(s2d=1, stride=2), "conv_s2d"),
    "drop in the norm": (
        lambda: _with(timm_block(), lambda b: setattr(b.bn1, "drop", nn.Dropout(0.5))),
        "Dropout before the activation",
    ),
    "drop block": (lambda: _with(timm_block(), lambda b: setattr(b, "drop_path", nn.Tanh())), "Tanh before the sum"),
    "norm without statistics": (
        lambda: _with(mnasnet(), lambda b: b.layers.__setitem__(1, nn.BatchNorm2d(24, track_running_stats=False))),
        "no running statistics",
    ),
    "timm norm without statistics": (
        lambda: _with(
            timm_block(), lambda b: (setattr(b.bn1, "running_mean", None), setattr(b.bn1, "running_var", None))
        ),
        "no running statistics",
    ),
    "group norm": (
        lambda: _with(mnasnet(), lambda b: b.layers.__setitem__(1, nn.GroupNorm(1, 24))),
        "GroupNorm cannot be folded",
    ),
    "tf_padding and padding": (
        lambda: _with(transformers_layers(*_HF, 8, 8, 1), lambda b: setattr(b.conv_3x3.convolution, "padding", (1, 1))),
        "pads twice",
    ),
    "checkpointing": (lambda: _with(open_mmlab(), lambda b: setattr(b, "with_cp", True)), "with_cp"),
    "another order": (
        lambda: _with(open_mmlab(), lambda b: setattr(b.conv[0], "order", ("norm", "conv", "act"))),
        "ConvModule runs",
    ),
    "ConvModule of others": (
        lambda: _with(open_mmlab(), lambda b: setattr(b.conv[0], "__class__", _subclass(ConvModule))),
        "OtherConvModule where a torch.nn.Conv2d is needed",
    ),
    **{
        f"more children, {name}": (
            lambda make=make: _with(make(), lambda b: b.add_module("extra", nn.Identity())),
            "holds more than its modules? .*: extra",
        )
        for name, make in {
            "v3": v3,
            "mnasnet": mnasnet,
            "efficientnet": mbconv,
            "timm": timm_block,
            "tonylins": InvertedResidual,
            "transformers": lambda: transformers_layers(*_HF, 8, 8, 1),
            "transformers, stem": lambda: transformers_layers("MobileNetV2Stem", 3, 8, 12),
        }.items()
    },
    "transformers, another layer": (
        lambda: _with(
            transformers_layers(*_HF, 8, 8, 1), lambda b: setattr(b, "reduce_1x1", nn.Sequential(b.reduce_1x1))
        ),
        "Sequential where a MobileNetV2ConvLayer is needed",
    ),
    "transformers, some layers pad": (
        lambda: _with(
            transformers_layers(*_HF, 8, 8, 1),
            lambda b: setattr(b.conv_3x3, "config", type(b.conv_3x3.config)(tf_padding=False)),
        ),
        "some of its layers pad as TensorFlow does",
    ),
    "own forward": (lambda: _with(v3(), lambda b: setattr(b, "forward", lambda x: x)), "forward of its own"),
    "inner hook": (lambda: _with(v3(), lambda b: _hooked(b.block[0])), "a hook on a Conv2dNormActivation inside"),
    "hook in the squeeze": (lambda: _with(v3(), lambda b: _hooked(b.block[2].fc1)), "a hook on a Conv2d inside"),
    "hook in a Sequential": (lambda: _with(mobilenet_v1(), lambda b: _hooked(b[0])), "a hook on a Conv2d inside"),
    "parametrized squeeze": (
        lambda: _with(v3(), lambda b: parametrizations.weight_norm(b.block[2].fc1)),
        "remove_parametrizations",
    ),
    "pruned": (
        lambda: _with(mnasnet(), lambda b: prune.l1_unstructured(b.layers[0], "weight", 0.5)),
        "make it permanent first",
    ),
    "adapter": (
        lambda: _with(mnasnet(), lambda b: setattr(b.layers[0], "__class__", _subclass(nn.Conv2d))),
        "OtherConv2d where a torch.nn.Conv2d",
    ),
    "compiled": (lambda: _with(v3(), lambda b: b.compile()), "it is compiled"),
    "compiled inside": (lambda: _with(v3(), lambda b: b.block[0].compile()), "compiled or scripted"),
    "scripted": (lambda: scripted(mnasnet), "scripted"),
    "meta": (lambda: v3().to("meta"), "meta device"),
    "mixed": (lambda: _with(v3(), lambda b: b.block[2].half()), "its parameters are mixed"),
    "padding mode": (
        lambda: _with(mnasnet(), lambda b: setattr(b.layers[3], "padding_mode", "reflect")),
        "padding_mode 'reflect'",
    ),
    "string padding": (lambda: _with(mnasnet(), lambda b: setattr(b.layers[3], "padding", "same")), "padding 'same'"),
    "strided 1x1": (lambda: _with(mnasnet(), lambda b: setattr(b.layers[6], "stride", (2, 2))), "project convolution"),
    "dilated stride": (
        lambda: _with(v3(stride=2, out_channels=12), lambda b: setattr(b.block[1][0], "dilation", (2, 2))),
        "dilation must be 1 where stride is 2",
    ),
}


# Of those, what its own reader refuses, and is seen to compute a block all the same.
SEEN = [
    *("drop in the norm", "checkpointing", "another order", "ConvModule of others", "adapter", "string padding"),
    *(f"more children, {name}" for name in ("v3", "mnasnet", "efficientnet", "timm", "tonylins")),
]


@pytest.mark.parametrize("name", SEEN)
def test_what_its_reader_refuses_is_read_as_it_computes(name):
    make, reason = TRAPS[name]
    block = perturb_batch_norm(make().eval())
    assert re.search(reason, parts_of(block, family_of(block).read))
    fused, x = fuse(block), input_of(block)
    assert isinstance(fused, FusedObserved) and type(unfuse(fused)) is type(block)
    with torch.no_grad():
        found = agreement(fused(x), block(x), copy.deepcopy(block).double()(x.double()))
    assert found.ok, found
    assert fused.train()._trains() is any(isinstance(m, nn.BatchNorm2d) for m in block.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in TRAPS if name not in SEEN])
def test_a_trap_is_left_alone_with_its_reason(name):
    make, reason = TRAPS[name]
    block = make().eval()
    cls = type(block)
    with pytest.warns(UserWarning, match=reason):
        assert fuse(block, inplace=True) is block
    assert type(block) is cls
    (row,) = report(block).skipped
    assert row.name == "" and row.backend is None
    with pytest.raises(ValueError, match=reason):
        fuse(block, inplace=True, strict=True)


def test_what_is_not_ours_is_not_mentioned():
    edge = torchvision.models.efficientnet.FusedMBConv(
        torchvision.models.efficientnet.FusedMBConvConfig(4, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d
    )
    dense = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1))
    assert report(nn.ModuleList([edge, dense, timm_block("EdgeResidual"), nn.Sequential(nn.ReLU())])).blocks == ()


def test_layers_inside_a_longer_sequential_are_reported():
    longer = nn.Sequential(nn.Conv2d(3, 8, 3), *mobilenet_v1(), nn.Conv2d(12, 4, 3), nn.Conv2d(4, 4, 3))
    (row,) = report(longer).blocks
    assert row.name == "1-6" and "call fuse" in row.reason
    (row,) = report(fuse(longer)).blocks
    assert row.name == "1-6" and row.fused
    assert len(report(fuse(nn.Sequential(nn.Conv2d(3, 8, 3), mobilenet_v1()))).fused) == 1


def test_hooks_on_the_block_itself_go_on():
    block, seen = prepared(v3()), []
    block.register_forward_hook(lambda m, i, o: seen.append(o))
    block.register_forward_pre_hook(lambda m, i: (2 * i[0],))
    fused, x = fuse(block), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        y = fused(x)
    assert len(seen) == 1 and seen[0] is y and isinstance(fused, FusedBlock)
    torch.testing.assert_close(y, block(x))


def test_a_hook_inside_after_fusing_is_called():
    fused, seen = fuse(prepared(v3())), []
    x = torch.randn(1, 8, 6, 6)
    fused(x)
    handle = fused.block[2].register_forward_hook(lambda m, i, o: seen.append(o))
    with pytest.warns(UserWarning, match="runs unfused"):
        fused(x)
    assert len(seen) == 1
    handle.remove()
    fused(x)
    assert len(seen) == 1


def test_a_block_and_a_convolution_with_two_parents_stay_shared():
    shared, other = prepared(v3()), prepared(v3())
    other.block[0][0] = shared.block[0][0]
    fused = fuse(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": other}))
    assert fused["a"] is fused["b"][0] and isinstance(fused["a"], FusedInPlace)
    assert fused["a"].block[0][0] is fused["c"].block[0][0]
    assert len(report(fused).blocks) == 2


def test_reparameterising_a_fused_model_changes_nothing():
    utils = pytest.importorskip("timm.utils")
    model = nn.Sequential(prepared(timm_block()), prepared(v3()), prepared(InvertedResidual()))
    fused = fuse(model, strict=True)
    x = input_of(model)
    with torch.no_grad():
        assert torch.equal(utils.reparameterize_model(fused)(x), fused(x))


def test_blocks_of_several_families_in_one_sequence():
    plain = prepared(timm_block(act_layer=nn.ReLU6))
    model = nn.Sequential(plain, copy.deepcopy(plain), prepared(v3()), copy.deepcopy(plain))
    fused, x = fuse(model, strict=True), input_of(model)
    with torch.no_grad():
        found = agreement(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert found.ok, found
    assert all(m.fits_sequence() for m in fused)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["torchvision v3", "efficientnet", "timm, same padding", "transformers, stem"])
def test_compiled_in_one_graph(name, grad):
    eager = prepared(BLOCKS[name][0]())
    fused = fuse(eager)
    x = input_of(eager)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        y = compiled(x)
        found = agreement(y.detach(), eager(x).detach(), copy.deepcopy(eager).double()(x.double()).detach())
        assert found.ok, found
        if grad:
            y.square().sum().backward()
            eager(x).square().sum().backward()
            for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for p in (*fused.parameters(), *eager.parameters()):
            p.mul_(1.1)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


def test_exported(tmp_path):
    fused, x = fuse(prepared(v3())), torch.randn(2, 8, 9, 9)
    program = torch.export.export(fused, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-5, atol=1e-6)


# --- backends


@pytest.fixture
def on_gpu(monkeypatch):
    """Blocks on the CPU that are told they were on a GPU; what "auto" is there."""

    found = {"auto": "cuda"}
    monkeypatch.setattr(backends, "resolve_backend", lambda backend, device: found.get(backend, backend))
    return found


def test_auto_takes_the_cuda_kernel(on_gpu):
    for changes in ({"use_se": False}, {}):
        (row,) = report(fuse(prepared(v3(**changes)))).blocks
        assert row.fused and row.backend == "cuda"


TOO_WIDE = "Triton kernel takes a depthwise kernel that spans at most"


def test_auto_goes_from_triton_to_the_modules(on_gpu):
    on_gpu["auto"] = "triton"
    fused = fuse(prepared(v3(dilation=2**18)))
    (row,) = report(fused).blocks
    assert row.fused and row.backend == "eager" and TOO_WIDE in row.reason
    x = torch.randn(1, 8, 6, 6)
    with pytest.warns(UserWarning, match=f"runs unfused: the {TOO_WIDE}") as caught:
        y = fused(x), fused(x)
    assert len(caught) == 1
    assert torch.equal(y[0], unfuse(fused)(x)) and torch.equal(*y)


def test_a_named_backend_says_what_it_has_not(on_gpu):
    fused = fuse(prepared(v3(dilation=2**18)), backend="triton")
    with pytest.raises(RuntimeError, match=rf"{TOO_WIDE}.*; use backend='auto' or 'eager'"):
        fused(torch.randn(1, 8, 6, 6))
    (row,) = report(fused).blocks
    assert row.backend is None and TOO_WIDE in row.reason


def test_the_cpu_and_cuda_kernels_lack_nothing():
    for make, _ in BLOCKS.values():
        spec = fuse(prepared(make())).spec
        assert missing_kernel("cpu", spec) is None and missing_kernel("cuda", spec) is None


# --- training


def _frozen(block: nn.Module) -> nn.Module:
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    return block


def _results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)  # of stochastic depth
    leaf = x.clone().to(next(model.parameters()).dtype).requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("frozen", [False, True], ids=["statistics of the batch", "frozen norms"])
@pytest.mark.parametrize("name", BLOCKS)
def test_recompute_and_frozen_norms(name, frozen):
    eager = in_channels_last(perturb_batch_norm(BLOCKS[name][0]())).train()
    # By the modules: recompute=True is for blocks that the training kernels do not take.
    fused = fuse(eager, recompute=True, strict=True, backend="auto" if frozen else "eager").train()
    truth = copy.deepcopy(eager).double().train()
    for model in (eager, fused, truth) if frozen else ():
        _frozen(model)
    x = input_of(eager).to(memory_format=torch.channels_last)
    for ours, theirs, reference in zip(*(_results(m, x) for m in (fused, eager, truth)), strict=True):
        found = agreement(ours, theirs, reference)
        assert found.ok, found
    for (key, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


@pytest.mark.parametrize("frozen", [False, True])
def test_stochastic_depth_drops_whole_images(frozen):
    """What it drops is the input alone, whether the kernel or the recomputed modules made the rest."""
    fused = fuse(perturb_batch_norm(mbconv(drop=0.5)), recompute=True).train()
    fused = _frozen(fused) if frozen else fused
    x = torch.randn(16, 8, 5, 5)
    y = fused(x)
    dropped = [torch.equal(a, b) for a, b in zip(y, x, strict=True)]
    assert 0 < sum(dropped) < 16
    kept = [i for i, of_input in enumerate(dropped) if not of_input]
    if frozen:
        expected = 2 * (unfuse(fused).eval()(x) - x) + x
        torch.testing.assert_close(y[kept], expected[kept], rtol=1e-4, atol=1e-4)


def test_a_dropout_between_the_layers_counts_in_train_alone():
    block = mobilenet_v1()
    block.insert(3, nn.Dropout(0.5))
    eager = prepared(block)
    fused, x = fuse(eager, recompute=True, strict=True), torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    fused[3].train()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="dropouts between its layers"):
        y = fused(x)
    torch.manual_seed(1)
    assert torch.equal(y, nn.Sequential(*fused)(x)) and not torch.allclose(y, eager(x))
