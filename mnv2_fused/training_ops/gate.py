"""The gate of a squeeze-and-excite, with its gradient: [N, C], by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import function_of
from ..spec import BlockSpec
from .weights import Weights


def gate_of(pooled: Tensor, squeeze: Sequence[Tensor | None], spec: BlockSpec) -> Tensor:  # [N, E] both
    """The factors of a squeeze-and-excite. ``squeeze``: weight and bias of its two convolutions.

    In float64: how many threads torch's products are shared out among is lost when the result is rounded.
    """
    reduce, reduce_bias, excite, excite_bias = (None if t is None else t.double() for t in squeeze)
    assert reduce is not None and excite is not None
    s = F.linear(pooled, reduce.flatten(1), reduce_bias)
    s = function_of(spec.squeeze_activation, spec.negative_slope)(s)
    return function_of(spec.gate)(F.linear(s, excite.flatten(1), excite_bias))


def differentiable_gate(
    pooled: Tensor, weights: Weights, spec: BlockSpec
) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
    """The gate [N, E] in float64, and what turns its gradient into those of ``pooled`` [N, E] and of its weights."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (pooled, *weights[6:10])]
    with torch.enable_grad():
        first = leaves[0]
        assert first is not None
        gate = gate_of(first, leaves[1:], spec)

    def differentiate(g: Tensor) -> list[Any]:
        found = iter(torch.autograd.grad(gate, [t for t in leaves if t is not None], g))
        return [None if t is None else next(found) for t in leaves]

    return gate.detach(), differentiate
