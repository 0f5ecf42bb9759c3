"""A block's weights, and what every pass takes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..encoding import shape_of
from ..spec import BlockSpec
from .layout import padded, panels


def is_stem(weights: Weights) -> bool:
    return weights.expand is not None and weights.expand.shape[-1] > 1


class Kernel(NamedTuple):
    """What every pass takes of a block."""

    w_expand: Tensor | None  # [E/16, C_in, 16], norm1's scale folded in
    b_expand: Tensor | None  # [E/16 * 16]
    w_depthwise: Tensor  # [E/16, taps, 16]
    block: list[int]


def kernel_of(spec: BlockSpec, x: Tensor, w_expand: Tensor | None, b_expand: Tensor | None, w_depthwise: Tensor):
    dtype = x.dtype
    n, _, height, width = x.shape
    spec = dataclasses.replace(spec, squeeze_channels=0)  # its gate is an argument of its own
    return Kernel(
        None if w_expand is None else panels(w_expand),
        None if b_expand is None else padded(b_expand.to(dtype)),
        panels(w_depthwise.flatten(1)),
        list(shape_of(spec, n, height, width).values()),
    )


class Weights(NamedTuple):
    """The convolutions' own tensors."""

    expand: Tensor | None  # [E, C_in, 1, 1], of a stem [E, C, 3, 3]
    expand_bias: Tensor | None  # [E]
    depthwise: Tensor  # [E, 1, k, k]
    depthwise_bias: Tensor | None  # [E]
    project: Tensor  # [C_out, E, 1, 1]
    project_bias: Tensor | None  # [C_out]
    # Of a squeeze-and-excite.
    reduce: Tensor | None = None  # [S, E, 1, 1]
    reduce_bias: Tensor | None = None  # [S]
    excite: Tensor | None = None  # [E, S, 1, 1]
    excite_bias: Tensor | None = None  # [E]


WEIGHTS = len(Weights._fields)


def weights_of(tensors: Sequence[Any], dtype: torch.dtype) -> Weights:
    converted: list[Any] = [None if t is None else t.to(dtype) for t in tensors[:WEIGHTS]]
    return Weights(*converted)


def w_output(weights: Weights) -> Tensor:
    return panels(padded(weights.project.flatten(1)))
