"""The CUDA kernel's planner, ``csrc/cuda/plan.cpp``, as Python sees it. Needs neither CUDA nor a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import backends
from ..encoding import shape_of
from ..gpus import H200, Gpu
from ..spec import ACTIVATIONS, BlockSpec, stem_size
from ..tensors import check_dtype, check_gpu, check_shape

_FORCED = ("images", "tile_rows", "tile_cols", "strip_rows", "group", "splits")


@dataclass(frozen=True)
class CudaPlan:
    """How one call of a block is tiled on a GPU. ``print`` it; pass it as ``plan=`` to force it."""

    images: int  # of a thread block
    tile_rows: int  # outputs of each of its images, in a dilated block that far apart
    tile_cols: int
    strip_rows: int  # outputs of a strip, one column wide; eight strips are a warp's
    group: int  # expanded channels computed at a time, a multiple of 16
    splits: int  # thread blocks that share a tile's groups; a second kernel adds their float32 sums in order
    out_panels: int  # panels of 16 output channels that a thread's registers hold
    out_blocks: int  # thread blocks that share the output channels
    warps: int  # of a thread block
    thread_blocks: int  # in all
    shared_bytes: int  # of a thread block
    resident: int  # thread blocks that a processor runs at once
    partial_bytes: int  # of memory, the sums of each split
    squeeze_bytes: int  # of memory, the depthwise results' sums and the gate of a squeeze-and-excite
    bytes_never_written: int  # the expanded tensors that an unfused block writes
    bytes: int  # to and from memory: x, y, weights, partial sums
    recompute: float  # expanded pixels computed / expanded pixels needed
    seconds: float  # what the estimate says; good for comparing plans

    def __str__(self) -> str:
        return (
            f"tile {self.tile_rows}x{self.tile_cols} of {self.images} image(s), strips of {self.strip_rows} rows, "
            f"group {self.group}, splits {self.splits}, {self.thread_blocks} thread blocks of {self.warps} warps, "
            f"{self.resident} a processor, shared {self.shared_bytes / 1024:.0f} KiB, recompute {self.recompute:.2f}, "
            f"{self.bytes / 2**20:.2f} MiB, never written {self.bytes_never_written / 2**20:.2f} MiB, "
            f"about {self.seconds * 1e6:.0f} us"
        )

    def forced(self) -> list[int]:
        """What the op takes as its ``plan`` argument."""
        return [getattr(self, name) for name in _FORCED]


def missing_kernel(spec: BlockSpec) -> str | None:
    """What of such a block the CUDA kernel is not compiled for, in words; None where it takes the block."""
    if spec.kernel > 5:
        return f"the CUDA kernel takes kernel 3 or 5, got {spec.kernel}"
    if spec.strides[0] != spec.strides[1]:
        return f"the CUDA kernel takes one stride for rows and columns, got {spec.stride}"
    return None


def cuda_plan(
    spec: BlockSpec,
    input_shape: Sequence[int],  # [N, C_in, H, W]
    *,
    dtype: torch.dtype = torch.float16,
    gpu: Gpu = H200,
    tf32: bool = False,
    forced: Sequence[int] | None = None,
    stem: str | None = None,
) -> CudaPlan:
    """The plan the CUDA kernel uses for this block and input on ``gpu``, or the one forced.

    ``forced`` is what :meth:`CudaPlan.forced` returns. ``tf32``: whether float32 products may round to TF32, where
    ``gpu`` can. ``stem``: the activation of a network's stem (3x3, stride 2) that runs in front of the block, in the
    same kernel; ``input_shape`` is then the image's. Raises ValueError, naming the value and its limit, for what no
    kernel takes, and RuntimeError when the compiled library is missing.
    """
    if backends._C is None:
        raise RuntimeError(f"the planner needs the compiled library: {backends.backend_reasons()['cpu']}")
    n, channels, height, width = check_shape(input_shape)
    check_gpu(gpu)
    if stem is not None:
        if stem not in ACTIVATIONS:
            raise ValueError(f"stem must be one of {', '.join(ACTIVATIONS)}, got {stem!r}")
        if spec.expand:
            raise ValueError(f"a stem runs in front of a block without an expansion, got {spec}")
    elif channels != spec.in_channels:
        raise ValueError(f"input_shape has {channels} channels, the block takes {spec.in_channels}")
    if min(input_shape) < 1 or n * channels * height * width >= 2**63:
        raise ValueError(f"sizes must be at least 1, and less than 2^63 elements, got {tuple(input_shape)}")
    check_dtype(dtype)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the CUDA kernel takes float32, float16 and bfloat16, got {dtype}; use backend='eager'")
    precision = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and tf32 and gpu.capability >= 80:
        precision = "tf32"
    if stem is None:
        block = shape_of(spec, n, height, width)
    else:
        block = shape_of(spec, n, stem_size(height), stem_size(width), (stem, channels, height, width))
    values = backends._C.cuda_plan(
        block,
        precision=precision,
        gpu=gpu[1:9],
        forced=None if forced is None else list(forced),
    )
    return CudaPlan(**values)
