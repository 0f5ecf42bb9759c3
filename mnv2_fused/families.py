"""Model families: which modules are inverted residuals, and how each is read.

A family is one row of ``_FAMILIES`` and one reader: a function that takes a block and returns its ``Parts`` (see
:mod:`mnv2_fused.module.reading`), or raises ``Unfusable`` with the reason why the block must stay unfused. Geometry is
read from the convolutions: segmentation encoders change their strides and dilations in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .module import FusedBlock, FusedFlat, FusedInPlace, FusedObserved, Reader, observe, reading, why_no_candidate
from .module.guard import is_compiled
from .module.reading import Parts, Unfusable, read_chain


class Family(NamedTuple):
    """How one kind of block is read, and what it becomes."""

    read: Reader
    base: type[FusedInPlace] = FusedInPlace


def family_of(module: nn.Module) -> Family | None:
    """The family that ``module`` is a block of, fit to be fused or not; None for any other module."""
    if reading.is_plain(module):
        return _SEQUENTIAL if _is_chain(module) else None
    names = [c.__name__ for c in type(module).__mro__]
    if isinstance(module, torch.jit.ScriptModule):
        names = [getattr(module, "original_name", "")]
    for name, child, family in _FAMILIES:
        if name in names and child in module._modules:
            return family
    return None


def observed_family_of(module: nn.Module) -> Family | None:
    """What reads a module of a class that is not known, if it may be a block and holds none of a known one."""
    if why_no_candidate(module) is not None or isinstance(module, torch.jit.ScriptModule):
        return None
    if any(family_of(m) is not None or isinstance(m, FusedBlock) for m in module.modules()):
        return None
    return _OBSERVED


def read_as_seen(block: nn.Module) -> tuple[Family, Parts] | None:
    """What a block of a known class computes that its own reader refuses: a subclass, or another kind of padding."""
    if why_no_candidate(block) is not None:
        return None
    parts = parts_of(block, observe)
    return None if isinstance(parts, str) else (_OBSERVED, parts)


def parts_of(block: nn.Module, reader: Reader) -> Parts | str:
    """What ``reader`` finds in an ordinary block, or why it cannot be fused."""
    if isinstance(block, torch.jit.ScriptModule):
        return "it is scripted: fuse first, then script or trace"
    if is_compiled(block):
        return "it is compiled: fuse first, then compile"
    if "forward" in vars(block):
        return "a forward of its own would not be called: remove it first"
    reason = next(_tensor_objections([*block.parameters(), *block.buffers()]), None)
    reason = reason or next(reading.inner_objections(list(block.modules())[1:]), None)
    if reason is not None:
        return reason
    try:
        return reader(block)
    except Unfusable as why:
        return str(why)


def _tensor_objections(tensors: list[Tensor]) -> Iterator[str]:
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            yield f"a weight is a {type(t).__name__}, not a plain tensor"
        if t.is_meta:
            yield "its parameters are on the meta device: load the weights first"
    kinds = sorted({f"{t.dtype} on {t.device}" for t in tensors if t.is_floating_point()})
    if len(kinds) > 1:
        yield f"its parameters are mixed: {', '.join(kinds)}"


def _require_type(block: nn.Module, *names: str) -> None:
    """``names``: the classes, with their modules, whose forward is known."""
    if isinstance(block, FusedInPlace):
        return  # looked at when it was fused
    if reading.full_name(block) not in names:
        known = " or ".join(names)
        raise Unfusable(f"{reading.full_name(block)} is not {known} and may compute something else")


def _flag(block: nn.Module, name: str) -> bool:
    value = getattr(block, name, None)
    if not isinstance(value, bool):
        raise Unfusable(f"it has no attribute {name} that says whether it adds its input")
    return value


def _require_children(block: nn.Module, *names: str) -> None:
    more = [name for name in block._modules if name not in names]
    if more or block._parameters or block._buffers:
        what = ", ".join(more) or "tensors of its own"
        raise Unfusable(f"it holds more than its module{'s' if len(names) > 1 else ''} {', '.join(names)}: {what}")


def _same_code(forward: Callable, *known: Callable) -> bool:
    """Whether a copied class's forward compiles to the instructions of one of these."""
    code = getattr(forward, "__code__", None)
    return code is not None and any(
        (code.co_code, code.co_names) == (k.__code__.co_code, k.__code__.co_names) for k in known
    )


def _torchvision_forward(self, x):  # compared with, never called
    if self.use_res_connect:
        return x + self.conv(x)
    else:
        return self.conv(x)


def _identity_forward(self, x):  # compared with, never called
    if self.identity:
        return x + self.conv(x)
    else:
        return self.conv(x)


_OPENMMLAB = (
    "mmpretrain.models.backbones.mobilenet_v2",
    "mmcls.models.backbones.mobilenet_v2",
    "mmseg.models.utils.inverted_residual",
)


def read_mobilenet_v2(block: nn.Module) -> Parts:
    """Blocks with all in ``conv``: torchvision's MobileNetV2 of any release, tonylins', d-li14's, OpenMMLab's."""
    cls = block.original if isinstance(block, FusedInPlace) else type(block)
    if cls.__name__ != "InvertedResidual":
        raise Unfusable(f"{cls.__name__} is a subclass of InvertedResidual and may compute something else")
    _require_children(block, "conv")
    conv = [block._modules["conv"]]
    if cls.__module__ in _OPENMMLAB:
        if getattr(block, "with_cp", False):
            raise Unfusable("it checkpoints (with_cp): build it with with_cp=False")
        modules = [m for child in reading.flatten(conv) for m in _of_conv_module(child)]
        return read_chain(modules, residual=_flag(block, "use_res_connect"))
    of_torchvision = cls.__module__ in ("torchvision.models.mobilenetv2", "torchvision.models.mobilenet")
    if of_torchvision or _same_code(cls.forward, _torchvision_forward):
        return read_chain(conv, residual=_flag(block, "use_res_connect"))
    if _same_code(cls.forward, _identity_forward):
        return read_chain(conv, residual=_flag(block, "identity"))
    raise Unfusable(f"{cls.__module__}.InvertedResidual has a forward that is not torchvision's")


class _ConvModule(Protocol):
    """mmcv's ConvModule, as far as it is read."""

    order: tuple[str, str, str]
    norm_name: str
    with_norm: bool
    with_activation: bool
    _modules: dict[str, nn.Module | None]


def _of_conv_module(module: nn.Module) -> list[nn.Module | None]:
    """What mmcv's ConvModule runs, in order."""
    if reading.full_name(module) != "mmcv.cnn.bricks.conv_module.ConvModule":
        return [module]
    conv_module = cast(_ConvModule, module)
    if tuple(conv_module.order) != ("conv", "norm", "act") or getattr(module, "with_explicit_padding", False):
        raise Unfusable(f"its ConvModule runs {conv_module.order}, or pads by itself")
    children = conv_module._modules
    norm = children[conv_module.norm_name] if conv_module.with_norm else None
    return [children["conv"], norm, children["activate"] if conv_module.with_activation else None]


def read_mobilenet_v3(block: nn.Module) -> Parts:
    """torchvision's MobileNetV3 ``InvertedResidual``, and this project's ``InvertedResidualV3``."""
    _require_type(block, "torchvision.models.mobilenetv3.InvertedResidual", "mnv2_fused.models.InvertedResidualV3")
    _require_children(block, "block")
    return read_chain([block._modules["block"]], residual=_flag(block, "use_res_connect"))


def read_mnasnet(block: nn.Module) -> Parts:
    """torchvision's MNASNet ``_InvertedResidual``."""
    _require_type(block, "torchvision.models.mnasnet._InvertedResidual")
    _require_children(block, "layers")
    return read_chain([block._modules["layers"]], residual=_flag(block, "apply_residual"))


def read_efficientnet(block: nn.Module) -> Parts:
    """torchvision's EfficientNet ``MBConv``."""
    _require_type(block, "torchvision.models.efficientnet.MBConv")
    _require_children(block, "block", "stochastic_depth")
    drop_path = _present([block._modules["stochastic_depth"]])
    return read_chain([block._modules["block"]], residual=_flag(block, "use_res_connect"), drop_path=drop_path)


def _present(modules: list[nn.Module | None]) -> list[nn.Module]:
    return [m for m in modules if m is not None]


def read_timm(block: nn.Module) -> Parts:
    """timm's ``InvertedResidual`` and, the same without expansion, ``DepthwiseSeparableConv``."""
    names = ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3")
    if "conv_pwl" not in block._modules:
        names = ("conv_dw", "bn1", "aa", "se", "conv_pw", "bn2")
    _require_type(block, *(f"timm.models._efficientnet_blocks.{n}" for n in _TIMM_BLOCKS))
    inside = {name: child for name, child in block._modules.items() if child is not None}
    if "conv_s2d" in inside:
        raise Unfusable("it moves pixels into channels first (conv_s2d), which the fused op does not")
    _require_children(block, *names, "drop_path", "conv_s2d", "bn_s2d")
    drop_path = _present([inside.get("drop_path")])
    return read_chain([inside.get(name) for name in names], residual=_flag(block, "has_skip"), drop_path=drop_path)


_TIMM_BLOCKS = ("InvertedResidual", "DepthwiseSeparableConv")


def read_transformers(block: nn.Module) -> Parts:
    """transformers' ``MobileNetV2InvertedResidual``."""
    _require_type(block, f"{_TRANSFORMERS}.MobileNetV2InvertedResidual")
    names = ("expand_1x1", "conv_3x3", "reduce_1x1")
    _require_children(block, *names)
    return _read_transformers_layers(block, names, _flag(block, "use_residual"))


def read_transformers_stem(block: nn.Module) -> Parts:
    """What transformers' ``MobileNetV2Stem`` runs behind its first convolution: the block without an expansion."""
    _require_type(block, f"{_TRANSFORMERS}.MobileNetV2Stem")
    names = ("expand_1x1", "conv_3x3", "reduce_1x1")
    _require_children(block, "first_conv", *names)
    return _read_transformers_layers(block, names, False)


_TRANSFORMERS = "transformers.models.mobilenet_v2.modeling_mobilenet_v2"


def _read_transformers_layers(block: nn.Module, names: tuple[str, ...], residual: bool) -> Parts:
    found = [m for name in names if (m := block._modules.get(name)) is not None]
    for layer in found:
        if reading.full_name(layer) != f"{_TRANSFORMERS}.MobileNetV2ConvLayer":
            raise Unfusable(f"it has a {reading.full_name(layer)} where a MobileNetV2ConvLayer is needed")
    modules = [layer._modules.get(n) for layer in found for n in ("convolution", "normalization", "activation")]
    pads = {bool(vars(layer)["config"].tf_padding) for layer in found}
    if len(pads) > 1:
        raise Unfusable("some of its layers pad as TensorFlow does (tf_padding), others do not")
    return read_chain(modules, residual=residual, same=pads == {True})


class FusedTransformersStem(FusedInPlace):
    """transformers' stem: its first convolution as it is, the rest as one kernel."""

    first_conv: nn.Module
    expand_1x1: nn.Module | None
    conv_3x3: nn.Module
    reduce_1x1: nn.Module

    @property
    def leading_child(self) -> nn.Module:
        return self.first_conv

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.first_conv(features))

    def _forward_modules(self, x: Tensor) -> Tensor:
        if self.expand_1x1 is not None:
            x = self.expand_1x1(x)
        return self.reduce_1x1(self.conv_3x3(x))


def read_sequential(block: nn.Module) -> Parts:
    """A Sequential of one block's layers: SSDLite's heads, MobileNetV1's blocks, a block without its class."""
    return read_chain(block._modules.values(), residual=False)


def _is_chain(module: nn.Module) -> bool:
    """Whether a Sequential is just one block: a depthwise convolution and the products around it."""
    leaves = list(reading.flatten([module]))
    convs = [m for m in leaves if isinstance(m, nn.Conv2d)]
    if len(convs) not in (2, 3) or leaves[0] is not convs[0]:
        return False
    *expand, depthwise, project = convs
    others = (*expand, project)
    return filters_each_channel(depthwise) and not any(
        filters_each_channel(c) or c.weight.shape[-1] > 1 for c in others
    )


def filters_each_channel(conv: nn.Conv2d) -> bool:
    """Whether it is a depthwise convolution, if perhaps one that gives several channels for each."""
    return 1 < conv.groups == conv.in_channels and conv.weight.shape[-1] > 1


_SEQUENTIAL = Family(read_sequential)
FLAT = Family(read_sequential, FusedFlat)
_OBSERVED = Family(observe, FusedObserved)
# A class's name and, since several share one, a child of theirs.
_FAMILIES = (
    ("InvertedResidual", "conv", Family(read_mobilenet_v2)),
    ("InvertedResidual", "block", Family(read_mobilenet_v3)),
    ("InvertedResidualV3", "block", Family(read_mobilenet_v3)),
    ("InvertedResidual", "conv_pwl", Family(read_timm)),
    ("DepthwiseSeparableConv", "conv_pw", Family(read_timm)),
    ("_InvertedResidual", "layers", Family(read_mnasnet)),
    ("MBConv", "block", Family(read_efficientnet)),
    ("MobileNetV2InvertedResidual", "reduce_1x1", Family(read_transformers)),
    ("MobileNetV2Stem", "reduce_1x1", Family(read_transformers_stem, FusedTransformersStem)),
)
