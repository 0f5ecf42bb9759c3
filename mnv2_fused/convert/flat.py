"""Blocks whose layers lie among others' in one Sequential."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from ..families import FLAT, family_of, filters_each_channel, parts_of
from ..module import FusedBlock, FusedFlat, reading
from ..module.flat import label_of
from ..module.reading import Parts
from ..sequence import FusedSequential

_Child = tuple[str, nn.Module]


class FlatBlock(NamedTuple):
    """One of them."""

    names: tuple[str, ...]  # of the children that it is
    block: nn.Module  # fused, or a Sequential of these children, or the depthwise convolution of one that is unfit
    found: Parts | str | None  # None of a fused one

    @property
    def name(self) -> str:
        """Of its layers in their Sequential; of an unfit one that of its depthwise convolution."""
        return self.names[0] if isinstance(self.found, str) else label_of(self.names)


# Convolution, norm and activation of expand, depthwise and project, and a squeeze-and-excite.
_MOST_LAYERS = 10


def flat_blocks(sequence: nn.Module) -> Iterator[FlatBlock]:
    """Those among the children of ``sequence``, in order; of several that begin with one child the longest."""
    if not (reading.is_plain(sequence) or type(sequence) is FusedSequential):
        return
    fused = sequence.flat_now() if isinstance(sequence, FusedSequential) else []
    first_of = {next(iter(block._modules)): block for block in fused}
    unfit, shared = _why_unfit(sequence), _shared(sequence)
    names = list(sequence._modules)
    i = 0
    while i < len(names):
        if (block := first_of.get(names[i])) is not None:
            found = FlatBlock(tuple(block._modules), block, None)
        else:
            ahead: list[_Child] = []
            for name in names[i : i + _MOST_LAYERS]:
                child = sequence._modules[name]
                if child is None or name in first_of:
                    break
                ahead.append((name, child))
            found = _longest(ahead, shared) if unfit is None else None
            if found is None and (depthwise := _depthwise_at(ahead)) is not None:
                found = FlatBlock((names[i],), depthwise, unfit or _reason(ahead[:4], shared))
        if found is not None:
            yield found
        i += 1 if found is None else len(found.names)


def _longest(children: Sequence[_Child], shared: set[nn.Module]) -> FlatBlock | None:
    """The block that the first of these, and as many more as can be, compute; None where they begin none."""
    most = next((i for i, (_, child) in enumerate(children) if not _belongs(child, shared)), len(children))
    if most < 2 or not isinstance(next(reading.flatten([children[0][1]]), None), nn.Conv2d):
        return None
    for count in range(most, 1, -1):
        layers = nn.Sequential(OrderedDict(children[:count]))
        parts = parts_of(layers, FLAT.read) if family_of(layers) is not None else None
        if isinstance(parts, Parts):
            return FlatBlock(tuple(layers._modules), layers, parts)
    return None


def _belongs(child: nn.Module, shared: set[nn.Module]) -> bool:
    """Whether ``child`` may be one of a block's layers, or some of them; what does nothing in eval is none."""
    if isinstance(child, FusedBlock | nn.Identity | nn.Dropout | nn.Dropout2d):
        return False
    return family_of(child) is None and shared.isdisjoint(reading.flatten([child]))


def _shared(sequence: nn.Module) -> set[nn.Module]:
    """Modules with tensors that run more than once, which no kernel is to read as two."""
    counts = Counter(reading.flatten(sequence._modules.values()))
    return {m for m, count in counts.items() if count > 1 and (m._parameters or m._buffers)}


def _why_unfit(sequence: nn.Module) -> str | None:
    """Why none of its children are fused together."""
    if type(sequence) not in (nn.Sequential, FusedSequential):
        return f"its layers lie among others' in a {type(sequence).__name__}: put them into an nn.Sequential"
    if "forward" in vars(sequence):
        return "its Sequential has a forward of its own: remove it first"
    if (name := next((name for name in sequence._modules if name in _RESERVED), None)) is not None:
        return f"its Sequential's child {name} has a name that fused blocks use for something of their own"
    return None


_RESERVED = {name for cls in (FusedFlat, FusedSequential) for name in (*dir(cls), *cls.OWN)}


def _depthwise_at(children: Sequence[_Child]) -> nn.Module | None:
    """The depthwise convolution that these begin with, if a norm, an activation and a 1x1 convolution follow it."""
    if len(children) < 4:
        return None
    conv, norm, act, project = (child for _, child in children[:4])
    if not (isinstance(conv, nn.Conv2d) and isinstance(project, nn.Conv2d)):
        return None
    stage = "running_mean" in norm._buffers and not act._modules
    return conv if stage and filters_each_channel(conv) and project.weight.shape[-1] == 1 else None


def _reason(children: Sequence[_Child], shared: set[nn.Module]) -> str:
    """Of a depthwise convolution, its norm, its activation and a 1x1 convolution."""
    if not shared.isdisjoint(child for _, child in children):
        return "its Sequential runs one of its layers twice"
    found = parts_of(nn.Sequential(OrderedDict(children)), FLAT.read)
    idle = "a layer that does nothing in eval lies between its others: remove it"
    return found if isinstance(found, str) else idle
