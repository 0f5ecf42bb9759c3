"""The layers inside a block: whether they are what the fused op computes, and why not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from .fold import unfoldable


def _is_plain(module: nn.Module | None) -> bool:
    # ConvBNReLU and its successors are Sequential with a name.
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def stages_of(conv: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module | None]] | None:
    """(convolution, norm, activation) of [expand,] depthwise, project; None for any other layout."""
    if not _is_plain(conv) or len(conv) not in (3, 4):
        return None
    *stages, project, norm = conv._modules.values()
    if any(not _is_plain(s) or list(s._modules) != ["0", "1", "2"] for s in stages):
        return None
    return [*(tuple(s._modules.values()) for s in stages), (project, norm, None)]


def watched_attributes(module: nn.Module) -> tuple[str, ...]:
    """The attributes that decide what ``module`` computes, besides its tensors and submodules."""
    if isinstance(module, nn.Conv2d):
        return "stride", "padding", "dilation", "groups", "padding_mode"
    if isinstance(module, nn.ReLU6):
        return "min_val", "max_val"
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return ("output_size",)
    if isinstance(module, nn.Flatten):
        return "start_dim", "end_dim"
    if isinstance(module, nn.Dropout):
        return ("training",)
    if "eps" in vars(module):  # a norm
        return "training", "eps"
    if "use_res_connect" in vars(module):  # a fused block
        return "training", "backend", "use_res_connect", "_forgotten"
    return ()


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def objections(conv: nn.Module) -> Iterator[str]:
    """Why ``conv``, the layers of a block, cannot run as one kernel that looks at its weights only."""
    yield from _module_objections(conv)
    stages = stages_of(conv)
    if stages is None:
        yield "its layers are not [1x1, norm, activation], [3x3, norm, activation], 1x1, norm"
        return
    for stage in stages:
        yield from _stage_objections(*stage)
    convs = [conv2d for conv2d, _, _ in stages]
    for name, conv2d in zip(("expand", "depthwise", "project")[-len(convs) :], convs, strict=True):
        yield from _geometry_objections(name, conv2d)
    if any(a.out_channels != b.in_channels for a, b in itertools.pairwise(convs)):
        yield "one convolution's channels do not match the next one's"
    yield from _hook_objections(conv)


def conv_objections(layer: nn.Module, name: str) -> Iterator[str]:
    """Why ``layer``, [convolution, norm, activation], is not the network's ``"stem"`` or ``"head"``."""
    yield from _module_objections(layer)
    if not _is_plain(layer) or list(layer._modules) != ["0", "1", "2"]:
        yield "its layers are not convolution, norm, activation"
        return
    yield from _stage_objections(*layer._modules.values())
    yield from _geometry_objections(name, layer[0])
    yield from _hook_objections(layer)


def _module_objections(root: nn.Module) -> Iterator[str]:
    for module in root.modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule) or is_compiled(module):
            yield f"a {kind} inside is compiled or scripted: fuse first, then compile"
        if "parametrizations" in module._modules:
            yield "a weight is parametrized: remove_parametrizations first"


def _stage_objections(conv: nn.Module, norm: nn.Module, activation: nn.Module | None) -> Iterator[str]:
    if type(conv) is not nn.Conv2d:
        yield f"it has a {_full_name(conv)} where a torch.nn.Conv2d is needed"
    if "weight" not in conv._parameters:
        yield "a weight is computed from others (pruning, weight norm): make it permanent first"
    if activation is not None and type(activation) is not nn.ReLU6:
        yield f"its activation is {_full_name(activation)}, the fused op computes ReLU6"
    elif activation is not None and (activation.min_val, activation.max_val) != (0.0, 6.0):
        yield f"its ReLU6 clips to {activation.min_val} ... {activation.max_val}"
    if (reason := unfoldable(norm)) is not None:
        yield reason


# (kernel, strides) by what a convolution is for
_GEOMETRY = {"expand": (1, (1,)), "depthwise": (3, (1, 2)), "project": (1, (1,)), "stem": (3, (2,)), "head": (1, (1,))}


def _geometry_objections(name: str, conv: nn.Conv2d) -> Iterator[str]:
    kernel, strides = _GEOMETRY[name]
    groups = conv.in_channels if name == "depthwise" else 1
    taken = {"stride": strides, "padding": (kernel // 2,), "padding_mode": ("zeros",), "groups": (groups,)}
    if kernel > 1:  # the dilation of a 1x1 changes nothing
        taken["dilation"] = (1,)
    if name == "depthwise":
        taken["out_channels"] = (groups,)
    for attribute, values in taken.items():
        value = getattr(conv, attribute)
        if value not in values and value not in [(v, v) for v in values]:
            allowed = " or ".join(map(str, values))
            yield f"the {name} convolution has {attribute} {value!r}, the fused op takes {allowed}"
    expected = [conv.out_channels, conv.in_channels // groups, kernel, kernel]
    if list(conv.weight.shape) != expected:
        yield f"the {name} convolution's weight is {list(conv.weight.shape)}, not {expected}"


def _hook_objections(root: nn.Module) -> Iterator[str]:
    for module in root.modules():
        if "forward" in vars(module) or has_hooks(module):
            kind = type(module).__name__
            yield f"a hook on a {kind} inside, or a forward of its own, would not be called: remove it first"


def hooks_of(module: nn.Module) -> list[dict]:
    """The dictionaries that hold a module's hooks."""
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


def stride_of(conv: nn.Conv2d) -> int:
    """A convolution's stride where both directions share it; users may have assigned a plain int."""
    return conv.stride if isinstance(conv.stride, int) else conv.stride[0]
