"""What a block's forward is given beside x, where weights alone are left of the block."""

from __future__ import annotations

import copy
from typing import Any

from .fused_block import FusedBlock
from .observed import FusedObserved


class ExtraArguments:
    """Which of them change nothing in eval: asked of a copy of the block without weights."""

    def __init__(self, block: FusedBlock) -> None:
        self._asked = _without_values(block) if isinstance(block, FusedObserved) else None
        self._allowed: set[Any] = set()

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], way_out: str) -> None:
        """Raises TypeError where these arguments may change a result. ``way_out``: how the message ends."""
        call = args, tuple(sorted(kwargs.items()))
        try:
            if call in self._allowed:
                return
        except TypeError:  # of what has no hash
            pass
        if self._asked is None or not self._asked.allows(args, kwargs):
            given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
            raise TypeError(f"this block takes x, and what changes nothing in eval, got {given}; {way_out}")
        self._allowed.add(call)


def _without_values(block: FusedObserved) -> FusedObserved:
    """A copy on the meta device, without hooks."""
    tensors = [*block.parameters(), *block.buffers()]
    other = copy.deepcopy(block, {id(t): t.detach().to("meta") for t in tensors})
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return other
