"""What ``x`` must be, and how a result lies in memory; ``csrc/tensors.h`` is the twin."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import BlockSpec


def channels_of(x: Tensor) -> int | None:
    return x.shape[1] if x.dim() == 4 else None


def check_input(x: Tensor, in_channels: int, spec: BlockSpec | None = None) -> None:
    """Raises ValueError or TypeError, saying what to do, for an ``x`` that no backend takes."""
    if x.layout != torch.strided:
        raise TypeError(f"x must be dense, got layout {x.layout}; convert it with x.to_dense()")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C_in, H, W], got {list(x.shape)}; add a batch with x[None]")
    if x.shape[1] != in_channels:
        raise ValueError(f"x must have {in_channels} channels, got {x.shape[1]} in {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; convert it with x.float()")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"height and width must be at least 1, got {list(x.shape)}")
    if spec is not None and isinstance(spec.padding, tuple):
        left, right, top, bottom = spec.padding
        if x.shape[2] + top + bottom < spec.extent or x.shape[3] + left + right < spec.extent:
            raise ValueError(
                f"with padding {spec.padding} height and width must reach {spec.extent}, got {list(x.shape)}"
            )


def is_channels_last(x: Tensor) -> bool:
    """Torch's own strides test: ambiguous shapes count as contiguous."""
    if x.stride(1) == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = x.size(dim), x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def empty_output(x: Tensor, out_channels: int, out_size: tuple[int, int]) -> Tensor:
    """An uninitialised result with the strides the kernel gives it."""
    return torch.empty(
        (x.shape[0], out_channels, *out_size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format,
    )
