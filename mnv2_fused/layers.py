"""The layers inside a block: whether they are what the fused op computes, and why not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from .fold import unfoldable


def stages_of(conv: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module | None]] | None:
    """(convolution, norm, activation) of [expand,] depthwise, project; None for any other layout."""

    def plain(m: nn.Module | None) -> bool:  # ConvBNReLU and its successors are Sequential with a name
        return isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward

    if not plain(conv) or len(conv) not in (3, 4):
        return None
    *stages, project, norm = conv._modules.values()
    if any(not plain(s) or list(s._modules) != ["0", "1", "2"] for s in stages):
        return None
    return [*(tuple(s._modules.values()) for s in stages), (project, norm, None)]


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def objections(conv: nn.Module) -> Iterator[str]:
    """Why ``conv``, the layers of a block, cannot run as one kernel that looks at its weights only."""
    for module in conv.modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule) or is_compiled(module):
            yield f"a {kind} inside is compiled or scripted: fuse first, then compile"
        if "parametrizations" in module._modules:
            yield "a weight is parametrized: remove_parametrizations first"
    stages = stages_of(conv)
    if stages is None:
        yield "its layers are not [1x1, norm, activation], [3x3, norm, activation], 1x1, norm"
        return
    for conv2d, norm, activation in stages:
        if type(conv2d) is not nn.Conv2d:
            yield f"it has a {_full_name(conv2d)} where a torch.nn.Conv2d is needed"
        if "weight" not in conv2d._parameters:
            yield "a weight is computed from others (pruning, weight norm): make it permanent first"
        if activation is not None and type(activation) is not nn.ReLU6:
            yield f"its activation is {_full_name(activation)}, the fused op computes ReLU6"
        elif activation is not None and (activation.min_val, activation.max_val) != (0.0, 6.0):
            yield f"its ReLU6 clips to {activation.min_val} ... {activation.max_val}"
        if (reason := unfoldable(norm)) is not None:
            yield reason
    yield from _geometry_objections([conv2d for conv2d, _, _ in stages])
    for module in conv.modules():
        if "forward" in vars(module) or has_hooks(module):
            kind = type(module).__name__
            yield f"a hook on a {kind} inside, or a forward of its own, would not be called: remove it first"


def _geometry_objections(convs: list[nn.Conv2d]) -> Iterator[str]:
    for name, conv in zip(("expand", "depthwise", "project")[-len(convs) :], convs, strict=True):
        kernel, strides, groups = (3, (1, 2), conv.in_channels) if name == "depthwise" else (1, (1,), 1)
        taken = {"stride": strides, "padding": (kernel // 2,), "padding_mode": ("zeros",), "groups": (groups,)}
        if name == "depthwise":  # the dilation of a 1x1 changes nothing
            taken |= {"dilation": (1,), "out_channels": (groups,)}
        for attribute, values in taken.items():
            value = getattr(conv, attribute)
            if value not in values and value not in [(v, v) for v in values]:
                allowed = " or ".join(map(str, values))
                yield f"the {name} convolution has {attribute} {value!r}, the fused op takes {allowed}"
        expected = [conv.out_channels, conv.in_channels // groups, kernel, kernel]
        if list(conv.weight.shape) != expected:
            yield f"the {name} convolution's weight is {list(conv.weight.shape)}, not {expected}"
    if any(a.out_channels != b.in_channels for a, b in itertools.pairwise(convs)):
        yield "one convolution's channels do not match the next one's"


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
