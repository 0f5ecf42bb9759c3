"""What ``x`` must be, and how a result lies in memory; ``csrc/tensors.h`` is the twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gpus import Gpu
from .spec import BlockSpec, integer


def check_tensor(x: Any, name: str = "x") -> None:
    """Raises TypeError for what is no tensor."""
    if not isinstance(x, Tensor):
        way_out = "; convert it with torch.from_numpy()" if type(x).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {_described(x)}{way_out}")


def check_dtype(dtype: Any, allowed: Sequence[torch.dtype] | None = None) -> None:
    """Raises TypeError for what is no dtype of torch, ValueError for one that is not ``allowed``."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be one of torch's, such as torch.float32, got {_described(dtype)}")
    if allowed is not None and dtype not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(map(str, allowed))}, got {dtype}")


def check_shape(shape: Any) -> tuple[int, int, int, int]:
    """An input's four sizes. Raises ValueError for anything else."""
    if not isinstance(shape, Sequence) or len(shape) != 4:
        found = tuple(shape) if isinstance(shape, Sequence) else _described(shape)
        raise ValueError(f"input_shape must be (N, C_in, H, W), got {found}")
    n, channels, height, width = (integer("input_shape", size) for size in shape)
    return n, channels, height, width


def check_gpu(gpu: Any) -> None:
    """Raises TypeError for what is no description of a GPU."""
    if not isinstance(gpu, Gpu):
        raise TypeError(
            f"gpu must be a mnv2_fused.gpus.Gpu, such as mnv2_fused.gpus.H200 or Gpu.of(device), got {_described(gpu)}"
        )


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


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
