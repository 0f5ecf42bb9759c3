"""The one function that runs layers on integers."""

from __future__ import annotations

from torch import Tensor

from .layers import Int8Layer, run_reference


def run(x: Tensor, layers: list[Int8Layer]) -> Tensor:
    """A row of layers: x float32 [N, C, H, W] -> float32 [N, C_out, H', W'], behind a linear layer [N, C_out].

    ``layers`` is the same list at every call of a module, for as long as its tensors stay the same.
    """
    return run_reference(x, layers)
