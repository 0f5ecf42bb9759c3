"""The layers inside a block: whether they are what the fused op computes, and why not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..activations import ACTIVATION_TABLE, GATE_TABLE, LEAKY_RELU, Function
from ..fold import unfoldable
from ..spec import KERNELS, BlockSpec
from .guard import has_hooks, is_compiled


class Unfusable(Exception):
    """Why a block cannot run as one kernel."""


class Around(NamedTuple):
    """What a module runs around its block, by the names of children that run in a row."""

    lead: str  # runs first, as it is
    core: tuple[str, ...]  # compute the block
    tail: tuple[str, ...]  # run behind it, as they are
    shortcut: bool  # whether the module's input is added to the result of all


class Parts(NamedTuple):
    """What a block's reader finds in it."""

    stages: tuple[tuple[nn.Conv2d, nn.Module | None], ...]  # (convolution, norm) of [expand,] depthwise, project
    squeeze: tuple[nn.Conv2d, nn.Conv2d] | None  # both products of a squeeze-and-excite
    spec: BlockSpec
    dropouts: tuple[nn.Module, ...]  # between them, which change a result in train() alone
    drop_path: tuple[nn.Module, ...]  # between them and the sum with the block's input, the same: stochastic depth
    around: Around | None = None  # where the block is a part of the module


def full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def is_plain(module: nn.Module | None) -> bool:
    """Whether it is a Sequential, by whatever name: ConvBNReLU and its successors are."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def flatten(modules: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    """What runs one after the other, Sequentials within Sequentials opened, without what does nothing."""
    for module in modules:
        if is_plain(module):
            yield from flatten(module._modules.values())
        elif module is not None and type(module) is not nn.Identity:
            yield module


# The two products, what is between them and the gate, by a squeeze-and-excite's type.
_SQUEEZES = {
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "fc2", "activation", "scale_activation"),
    "mnv2_fused.models.SqueezeExcitation": ("fc1", "fc2", "activation", "scale_activation"),
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "conv_expand", "act1", "gate"),
}
_TIMM_NORMS = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
_SAME_CONV = "timm.layers.conv2d_same.Conv2dSame"  # reports padding 0 and pads as TensorFlow does
_TRAINING_ONLY = {  # and the attribute that says how often
    "torchvision.ops.stochastic_depth.StochasticDepth": "p",
    "timm.layers.drop.DropPath": "drop_prob",
    "torch.nn.modules.dropout.Dropout": "p",
    "torch.nn.modules.dropout.Dropout2d": "p",
}


def read_chain(
    modules: Iterable[nn.Module | None],
    *,
    residual: bool,
    same: bool = False,
    drop_path: Iterable[nn.Module] = (),
) -> Parts:
    """The block that ``modules``, run one after the other, compute. Raises :class:`Unfusable` with the reason.

    ``same``: whether every convolution pads as TensorFlow does, whatever it says of its padding. ``drop_path``: modules
    between the last of ``modules`` and the sum with the block's input.
    """
    stages: list[tuple[nn.Module, nn.Module | None]] = []
    activations: list[str] = []
    slopes: set[float] = set()
    squeeze, dropouts = None, []
    for module in flatten(modules):
        name = full_name(module)
        if name in _TRAINING_ONLY:
            dropouts.append(module)
        elif isinstance(module, nn.modules.conv._ConvNd) or not stages:
            stages.append((module, None))
            activations.append("")
        elif name in _SQUEEZES and squeeze is None:
            squeeze = len(stages), module
            activations[-1] = activations[-1] or "identity"
        elif activations[-1]:
            raise Unfusable(f"its layers are not {_LAYOUT}: there is a {name} where none belongs")
        elif _computes_one(name) or stages[-1][1] is not None:
            activations[-1] = activation_of(module)
            slopes |= slope_of(module)
        else:
            stages[-1] = stages[-1][0], module
            act = timm_activation(module) if is_timm_norm(module) else None
            activations[-1] = "" if act is None else activation_of(act)
            slopes |= slope_of(act)
    if len(stages) not in (2, 3):
        raise Unfusable(f"its layers are not {_LAYOUT}")
    drop_path = tuple(module for module in drop_path if residual and type(module) is not nn.Identity)
    for module in drop_path:
        if full_name(module) not in _TRAINING_ONLY:
            raise Unfusable(f"it has a {full_name(module)} before the sum with its input")
    for i, (conv, norm) in enumerate(stages):
        role = ("expand", "depthwise", "project")[i - len(stages)]
        _first(_conv_objections(conv, role))
        if norm is not None:
            _first(_norm_objections(norm))
        _first(_geometry_objections(role, conv))
    convs = [conv for conv, _ in stages]
    if any(a.out_channels != b.in_channels for a, b in itertools.pairwise(convs)):
        raise Unfusable("one convolution's channels do not match the next one's")
    *before, activation, out_activation = (a or "identity" for a in activations)
    *_, depthwise, project = convs
    if squeeze is not None and squeeze[0] != len(stages) - 1:
        raise Unfusable("its squeeze-and-excite does not follow the depthwise convolution")
    products, options = (None, {}) if squeeze is None else _read_squeeze(squeeze[1], depthwise.out_channels)
    slopes |= options.pop("slopes", set())
    if len(slopes) > 1:
        raise Unfusable(f"its LeakyReLUs have slopes of {sorted(slopes)}, the fused op has one for a block")
    try:
        spec = BlockSpec(
            convs[0].in_channels,
            project.in_channels,
            project.out_channels,
            _both(depthwise.stride),
            expand=len(convs) == 3,
            residual=residual,
            kernel=depthwise.weight.shape[-1],
            dilation=_both(depthwise.dilation)[0],
            padding=_padding(depthwise, same),
            activation=activation,
            out_activation=out_activation,
            expand_activation=before[0] if before else None,
            **({"negative_slope": slopes.pop()} if slopes else {}),
            **options,
        )
    except ValueError as error:  # a residual that the convolutions' shapes contradict, a padding too large
        raise Unfusable(str(error)) from None
    return Parts(tuple(stages), products, spec, tuple(dropouts), drop_path)


_LAYOUT = "[1x1, norm, activation], [depthwise, norm, activation], 1x1, norm"


def _first(objections: Iterator[str]) -> None:
    for reason in objections:  # later checks rely on earlier ones
        raise Unfusable(reason)


def _computes_one(name: str) -> bool:
    return any(name in function.modules for function in ACTIVATION_TABLE.values())


def activation_of(module: nn.Module, table: dict[str, Function] = ACTIVATION_TABLE) -> str:
    """What the fused ops call it. Raises :class:`Unfusable` for one that they do not compute."""
    kind = full_name(module)
    why = None
    for name, function in table.items():
        if kind in function.modules and (why := function.modules[kind](module)) is None:
            return name
    raise Unfusable(why or f"its activation is {kind}, the fused op computes {', '.join(table)}")


def slope_of(module: nn.Module | None) -> set[float]:
    """The slope of a leaky_relu; nothing of any other activation."""
    return {float(module.negative_slope)} if module is not None and activation_of(module) == LEAKY_RELU else set()


def is_timm_norm(module: nn.Module) -> bool:
    return full_name(module) in [f"timm.layers.norm_act.{name}" for name in _TIMM_NORMS]


def timm_activation(norm: nn.Module) -> nn.Module | None:
    if type(norm._modules.get("drop", nn.Identity())) not in (nn.Identity, type(None)):
        raise Unfusable(f"its {type(norm).__name__} has a {full_name(norm.drop)} before the activation")
    return norm._modules.get("act")


def _norm_objections(norm: nn.Module) -> Iterator[str]:
    if not is_timm_norm(norm):
        reason = unfoldable(norm)
    elif norm.running_mean is None or norm.running_var is None:
        reason = f"{type(norm).__name__} has no running statistics, so it normalises by the batch even in eval"
    else:
        reason = None
    if reason is not None:
        yield reason


def _both(value: Any) -> tuple[Any, Any]:
    """A convolution's value along rows and columns; users may have assigned a plain int."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _padding(conv: nn.Conv2d, same: bool) -> str | tuple[int, int, int, int] | None:
    rows, columns = _both(conv.padding)
    if same or full_name(conv) == _SAME_CONV:
        if (rows, columns) != (0, 0):
            raise Unfusable(f"the depthwise convolution pads twice, as TensorFlow does and by {conv.padding!r}")
        return "same"
    around = _both(conv.dilation)[0] * (conv.weight.shape[-1] - 1) // 2
    return None if rows == columns == around else (columns, columns, rows, rows)


def _read_squeeze(module: nn.Module, hidden: int) -> tuple[tuple[nn.Conv2d, nn.Conv2d], dict[str, Any]]:
    """Both products, and what of them belongs to the spec."""
    *names, between, gate = _SQUEEZES[full_name(module)]
    reduce, expand = products = tuple(module._modules[name] for name in names)
    for conv in products:
        _first(_conv_objections(conv, "squeeze-and-excite"))
        _first(_geometry_objections("squeeze-and-excite", conv))
    channels = reduce.out_channels
    if (reduce.in_channels, expand.in_channels, expand.out_channels) != (hidden, channels, hidden):
        raise Unfusable("its squeeze-and-excite's channels do not match the depthwise convolution's")
    if (pool := module._modules.get("avgpool")) is not None and getattr(pool, "output_size", None) not in (1, (1, 1)):
        raise Unfusable(f"its squeeze-and-excite pools by {pool}, the fused op takes the mean")
    return products, {
        "squeeze_channels": channels,
        "squeeze_activation": activation_of(module._modules[between]),
        "gate": activation_of(module._modules[gate], GATE_TABLE),
        "slopes": slope_of(module._modules[between]),
    }


def drops_now(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these, dropouts or stochastic depth, changes a result now."""
    return any(m.training and getattr(m, _TRAINING_ONLY[full_name(m)]) for m in modules)


def conv_objections(layer: nn.Module, name: str) -> Iterator[str]:
    """Why ``layer``, [convolution, norm, activation], is not the network's ``"stem"`` or ``"head"``."""
    yield from _module_objections(layer.modules())
    if not is_plain(layer) or list(layer._modules) != ["0", "1", "2"]:
        yield "its layers are not convolution, norm, activation"
        return
    conv, norm, activation = layer._modules.values()
    yield from _conv_objections(conv, name)
    try:
        activation_of(activation)
    except Unfusable as why:
        yield str(why)
    if (reason := unfoldable(norm)) is not None:
        yield reason
    yield from _geometry_objections(name, conv)
    yield from hook_objections(layer.modules())


def inner_objections(modules: Sequence[nn.Module]) -> Iterator[str]:
    """Why a kernel that looks at a block's weights only cannot stand in for these modules inside it."""
    yield from _module_objections(modules)
    yield from hook_objections(modules)


def _module_objections(modules: Iterable[nn.Module]) -> Iterator[str]:
    for module in modules:
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule) or is_compiled(module):
            yield f"a {kind} inside is compiled or scripted: fuse first, then compile"
        if "parametrizations" in module._modules:
            yield "a weight is parametrized: remove_parametrizations first"
        elif isinstance(module, nn.modules.conv._ConvNd) and "weight" not in module._parameters:
            yield "a weight is computed from others (pruning, weight norm): make it permanent first"


def _conv_objections(conv: nn.Module, role: str) -> Iterator[str]:
    if type(conv) is not nn.Conv2d and not (full_name(conv) == _SAME_CONV and role != "squeeze-and-excite"):
        yield f"it has a {full_name(conv)} where a torch.nn.Conv2d is needed"


# (kernels, strides) by what a convolution is for
_GEOMETRY = {
    "expand": ((1,), (1,)),
    "depthwise": (KERNELS, (1, 2)),
    "project": ((1,), (1,)),
    "squeeze-and-excite": ((1,), (1,)),
    "stem": ((3,), (2,)),
    "head": ((1,), (1,)),
}


def _geometry_objections(name: str, conv: nn.Conv2d) -> Iterator[str]:
    kernels, strides = _GEOMETRY[name]
    groups = conv.in_channels if name == "depthwise" else 1
    taken: dict[str, tuple] = {"stride": strides, "padding_mode": ("zeros",), "groups": (groups,)}
    if name == "depthwise":
        taken["out_channels"] = (groups,)
        for attribute in ("padding", "dilation"):
            value = _both(getattr(conv, attribute))
            if not all(isinstance(v, int) for v in value) or (attribute == "dilation" and value[0] != value[1]):
                yield f"the depthwise convolution has {attribute} {getattr(conv, attribute)!r}, the fused op takes int"
    else:
        taken["padding"] = (kernels[0] // 2,)
        if kernels[0] > 1:  # the dilation of a 1x1 changes nothing
            taken["dilation"] = (1,)
    for attribute, values in taken.items():
        value = getattr(conv, attribute)
        if not all(v in values for v in _both(value)):
            allowed = " or ".join(map(str, values))
            yield f"the {name} convolution has {attribute} {value!r}, the fused op takes {allowed}"
    expected = [[conv.out_channels, conv.in_channels // groups, k, k] for k in kernels]
    if list(conv.weight.shape) not in expected:
        yield f"the {name} convolution's weight is {list(conv.weight.shape)}, not {' or '.join(map(str, expected))}"


def hook_objections(modules: Iterable[nn.Module]) -> Iterator[str]:
    """Which of a block's modules do more when they are called than a kernel in their place would."""
    for module in modules:
        if "forward" in vars(module) or has_hooks(module):
            kind = type(module).__name__
            yield f"a hook on a {kind} inside, or a forward of its own, would not be called: remove it first"
