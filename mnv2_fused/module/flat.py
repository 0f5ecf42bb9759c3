"""Blocks whose layers lie among others' in one Sequential."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from torch import nn

from .in_place import FusedInPlace


class FusedFlat(FusedInPlace):
    """A block whose layers lie among others' in one Sequential, and stay there.

    Its children are that Sequential's own, by the names that they have there. It is nobody's child itself, so that
    nothing but a row of layers knows of it.
    """

    OWN = (*FusedInPlace.OWN, "_apart")
    _apart = False  # whether its layers were not found in the Sequential

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Its layers, as the Sequential has them."""
        return tuple(m for m in self._modules.values() if m is not None)

    @property
    def label(self) -> str:
        """The names of its first and last layer, as reports have them."""
        return label_of(list(self._modules))

    def follow(self, sequence: nn.Module, changed: bool, taken: AbstractSet[str]) -> bool:
        """Whether its layers follow each other in ``sequence``, under whatever names that are not ``taken``.

        ``changed``: else others that lie under its names, which it takes over.
        """
        theirs, count = list(sequence._modules.items()), len(self._modules)
        what = list(self._modules) if changed else list(self._modules.values())
        for i in range(len(theirs) - count + 1):
            run = theirs[i : i + count]
            if [entry[not changed] for entry in run] == what and not any(m is None or name in taken for name, m in run):
                if run != list(self._modules.items()):
                    self._modules = dict(run)
                return True
        return False

    def _inspect(self) -> None:
        super()._inspect()
        if self._apart:
            self._objection = "its layers no longer follow each other in their Sequential: unfuse, and fuse again"


def label_of(names: Sequence[str]) -> str:
    """Of layers of these names."""
    return f"{names[0]}-{names[-1]}"
