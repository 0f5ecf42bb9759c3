"""Depthwise convolutions with 1x1 ones beside them that no block of :func:`mnv2_fused.convert.find.blocks_of` holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ..module import is_depthwise, is_pointwise, why_no_candidate
from ..sequence import FusedSequential

_MOST = 4  # depthwise convolutions of what is still a block, and no stage of a network


class UnknownBlocks(NamedTuple):
    """Modules of one class that hold depthwise and 1x1 convolutions, and are no block that is known."""

    kind: str  # package and name of the class
    names: tuple[str, ...]  # of the modules
    reason: str

    def __str__(self) -> str:
        return f"{len(self.names)} x {self.kind} ({self.names[0] or 'model'}): {self.reason}"


def kind_of(module: nn.Module) -> str:
    """The name of its class, or of what that was before it was fused, with the module that this is from."""
    cls = nn.Sequential if type(module) is FusedSequential else getattr(type(module), "original", type(module))
    return f"{cls.__module__}.{cls.__qualname__}"


def unknown_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[UnknownBlocks, ...]:
    """Of ``model``, beside its ``blocks``. What holds a depthwise convolution and no 1x1 one is none: a gate or part of
    an attention.
    """
    known = {m for block in blocks for m in block.modules()}
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if module in known or isinstance(module, nn.Conv2d):
            continue
        inside = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m not in known]
        depthwise = [conv for conv in inside if is_depthwise(conv)]
        if not 0 < len(depthwise) <= _MOST or not any(map(is_pointwise, inside)):
            continue
        if any(_holds_all(child, depthwise) and any(map(is_pointwise, _convs(child))) for child in module.children()):
            continue  # the child is what holds them
        if len(depthwise) > 1 and any(_is_found(child, known) for child in module.children()):
            continue  # of several, each with its own
        found.setdefault((kind_of(module), why_no_candidate(module) or _IN_PARTS), []).append(name)
    return tuple(UnknownBlocks(kind, tuple(names), reason) for (kind, reason), names in found.items())


_IN_PARTS = "its layers are no block that is known"


def _convs(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def _holds_all(module: nn.Module, convs: list[nn.Conv2d]) -> bool:
    inside = set(module.modules())
    return all(conv in inside for conv in convs)


def _is_found(child: nn.Module, known: set[nn.Module]) -> bool:
    """Whether ``child`` by itself holds both kinds of convolutions."""
    inside = [conv for conv in _convs(child) if conv not in known]
    return any(map(is_depthwise, inside)) and any(map(is_pointwise, inside))
