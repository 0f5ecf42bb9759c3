"""Layers that are no children of one Sequential, as if they were: for kernels that compute several."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

from torch import nn

from ..module import reading
from ..module.flat import FusedFlat


class Joined(nn.Sequential):
    """A convolution, its norm and its activation, which are no children of one Sequential, as if they were.

    ``parts``: those modules, in the order in which a network runs them. timm's norms hold their activation.
    """

    parts: tuple[nn.Module, ...]

    def __init__(self, *parts: nn.Module) -> None:
        conv, norm, *activation = parts
        own = reading.timm_activation(norm) if reading.is_timm_norm(norm) else None
        super().__init__(conv, _as_batch_norm(norm) if own is not None else norm, *([own] if own else activation))
        self.parts = parts
        self.training = False

    @staticmethod
    def in_row(owner: nn.Module, row: list[nn.Module | None]) -> Iterator[nn.Module | None]:
        """``row`` with such layers joined; the same objects in every call, for as long as the modules are."""
        kept, found = _joined.setdefault(owner, {}), {}
        i = 0
        while i < len(row):
            count = _joins(row[i : i + 3])
            if count:
                parts = tuple(m for m in row[i : i + count] if m is not None)
                joined = found[parts] = kept.get(parts) or Joined(*parts)
                joined.refresh()
                yield joined
            else:
                yield row[i]
            i += count or 1
        _joined[owner] = found

    def refresh(self) -> None:
        """Takes over what its norm is told by attributes, and its activation."""
        norm, ours = self.parts[1], self._modules["1"]
        if ours is not norm and ours is not None:
            self._modules["2"] = reading.timm_activation(norm) or self._modules["2"]
            vars(ours).update({name: vars(norm)[name] for name in ("eps", "momentum", "training")})
            ours._parameters, ours._buffers = norm._parameters, norm._buffers


# Of each network, those that it has now.
_joined: weakref.WeakKeyDictionary[nn.Module, dict[tuple[nn.Module, ...], Joined]] = weakref.WeakKeyDictionary()


def _joins(ahead: list[nn.Module | None]) -> int:
    """How many of these are one convolution, its norm and its activation; 0 where they are something else."""
    if len(ahead) < 2 or type(ahead[0]) is not nn.Conv2d or getattr(ahead[1], "running_mean", None) is None:
        return 0
    norm = ahead[1]
    assert norm is not None  # it has a mean
    if reading.is_timm_norm(norm):
        try:
            activation = reading.timm_activation(norm)
        except reading.Unfusable:
            return 0
        return 2 if type(norm).__name__ == "BatchNormAct2d" and activation is not None else 0
    third = ahead[2] if len(ahead) == 3 else None
    return 3 if third is not None and not third._modules else 0


def _as_batch_norm(norm: nn.Module) -> nn.BatchNorm2d:
    """timm's norm without its activation: on the same tensors, and with that norm as a child, so that it is watched."""
    ours = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    nn.Module.__init__(ours)
    vars(ours).update({name: value for name, value in vars(norm).items() if "_hooks" not in name})
    ours._modules = {"norm": norm}
    return ours


def with_blocks(row: list[nn.Module], blocks: Iterable[FusedFlat]) -> list[nn.Module | None]:
    """``row`` with each of ``blocks`` in the place of its layers, where all of them run one after the other."""
    layers = {block: list(reading.flatten(block.parts)) for block in blocks}
    found: list[nn.Module | None] = []
    i = 0
    while i < len(row):
        block = next((b for b, inside in layers.items() if row[i : i + len(inside)] == inside), None)
        found.append(row[i] if block is None else block)
        i += 1 if block is None else len(layers[block])
    return found
