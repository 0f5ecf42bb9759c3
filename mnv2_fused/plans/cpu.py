"""The CPU kernel's planner, ``csrc/cpu/plan.cpp``, as Python sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import backends
from ..encoding import shape_of
from ..fold import packed_dtypes
from ..spec import BlockSpec
from ..tensors import check_dtype, check_shape


@dataclass(frozen=True)
class Plan:
    """How one call of a block is tiled on this machine. ``print`` it; pass it as ``plan=`` to force it."""

    tile_rows: int  # output rows of one task
    tile_cols: int  # output columns of one task
    group: int  # expanded channels computed at a time, a multiple of 16
    band_rows: int  # output rows that a task works through at a time
    splits: int  # tasks that share a tile's groups, whose sums are then added up in order
    tasks: int  # images x tiles x splits
    workers: int  # tasks that run at once, each with its own scratch
    scratch_bytes: int  # per worker
    partial_bytes: int  # the sums of every group, shared by all workers, when splits > 1
    keeps: bool  # before a squeeze-and-excite: the depthwise results, instead of computing them twice
    recompute: float  # expanded pixels computed / expanded pixels needed (tiles overlap by their halo)
    bytes_never_written: int  # the expanded tensors that an unfused block writes
    cost: float  # of the slowest worker, estimated in vector instructions: it ranks plans and is not a time
    call_bytes: int  # all that a call works in: of every worker, of every group, of a squeeze-and-excite

    def __str__(self) -> str:
        return (
            f"tile {self.tile_rows}x{self.tile_cols}, group {self.group}, splits {self.splits}, {self.tasks} tasks on "
            f"{self.workers} workers, scratch {self.scratch_bytes / 1024:.0f} KiB each, "
            f"recompute {self.recompute:.3f}, "
            + "keeps d, " * self.keeps
            + f"never written {self.bytes_never_written / 2**20:.2f} MiB"
        )

    def forced(self) -> list[int]:
        """What the op takes as its ``plan`` argument."""
        return [self.tile_rows, self.tile_cols, self.group, self.splits]


def plan(
    spec: BlockSpec,
    input_shape: Sequence[int],  # [N, C_in, H, W]
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    tile_rows: int | None = None,
    tile_cols: int | None = None,
    group: int | None = None,
    splits: int | None = None,
) -> Plan:
    """The plan the CPU kernel uses for this block and input, or the one forced by tile and group.

    ``threads`` defaults to ``torch.get_num_threads()``. Values not forced are taken from the automatic plan.
    Raises ValueError, naming the value and its limit, for a shape or plan that no kernel takes, and RuntimeError
    when the compiled library is missing.
    """
    if backends._C is None:
        raise RuntimeError(f"the planner needs the compiled library: {backends.backend_reasons()['cpu']}")
    n, channels, height, width = check_shape(input_shape)
    check_dtype(dtype, (torch.float32, torch.float64, torch.float16, torch.bfloat16))
    if channels != spec.in_channels:
        raise ValueError(f"input_shape has {channels} channels, the block takes {spec.in_channels}")
    if any(abs(size) >= 2**63 for size in input_shape):
        raise ValueError(f"sizes must be less than 2^63, got {tuple(input_shape)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")

    stored, _ = packed_dtypes(dtype, torch.device("cpu"), spec.hidden_channels)

    def make(forced: list[int] | None) -> Plan:
        values = backends._C.plan(
            shape_of(spec, n, height, width),
            threads=threads or torch.get_num_threads(),
            dtype=str(stored).removeprefix("torch."),
            forced=forced,
        )
        # An unfused block writes them in x's dtype, however wide the kernel computes.
        never_written = values.pop("bytes_never_written") // stored.itemsize * dtype.itemsize
        return Plan(**values, bytes_never_written=never_written)

    automatic = make(None)
    given = [tile_rows, tile_cols, group, splits]
    if given == [None] * 4:
        return automatic
    if splits is None and group not in (None, automatic.group):
        given[3] = 1  # the automatic number belongs to the automatic group
    return make([a if g is None else g for g, a in zip(given, automatic.forced(), strict=True)])
