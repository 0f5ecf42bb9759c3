"""Tensors as the kernels of training take them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fold import PANEL


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.autocast decorates, but with a context of each call: threads would share its state."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return call


def dtype_of(x: Tensor) -> torch.dtype:
    """What kernels compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> Tensor:
    """In the dtype that kernels compute in."""
    return x.to(dtype_of(x)).contiguous(memory_format=torch.channels_last)


def pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last order -> [N H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def count_of(x: Tensor) -> int:
    """Values in each channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def panels(weight: Tensor) -> Tensor:
    """[C, K] -> [C/16, K, 16], zeros past the last channel."""
    return padded_rows(weight).reshape(-1, PANEL, weight.shape[1]).mT.contiguous()


def padded(t: Tensor) -> Tensor:
    more = -t.shape[-1] % PANEL
    return F.pad(t, (0, more)) if more else t.contiguous()


def padded_rows(t: Tensor) -> Tensor:
    more = -t.shape[0] % PANEL
    return F.pad(t, (0, 0, 0, more)) if more else t


def matrix(weight: Tensor) -> Tensor:
    """[E, C, k, k] -> [E, k k C], in the order of a patch."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def of_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """The other way round, in the shape of ``weight``."""
    e, c, *size = weight.shape
    return matrix.view(e, *size, c).permute(0, 3, 1, 2)


def scaled(scale: Tensor, rows: Tensor) -> Tensor:
    """Each row times its value, in the rows' dtype."""
    return scale.to(rows.dtype)[:, None] * rows
