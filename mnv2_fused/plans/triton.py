"""The Triton kernel's planner: block shape + GPU -> how one call is tiled. Pure; nothing is measured here.

In Python, beside ``csrc/cpu/plan.cpp`` for the CPU: what it weighs (powers of two, warps, what Triton keeps where) is
Triton's own, its only caller is Python, and each shape is planned once and kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..activations import ACTIVATION_TABLE
from ..fold import PANEL
from ..gpus import H200, Gpu
from ..spec import BlockSpec
from ..tensors import check_dtype, check_gpu, check_shape

_L2_BYTES = 5.5e12  # a second, of an H100's L2: only the choice between configurations rests on it
_LAUNCH_SECONDS = 3e-6
_POOLING_LAUNCHES = 9  # of a squeeze-and-excite: pooling, its sum and mean, two products, activation, gate, two copies
_REGISTERS = 65536  # 32-bit ones of a processor, 255 at most for a thread
_WARPS = 64  # resident on a processor


class Tile(NamedTuple):
    """One configuration of the kernel: what is compiled, besides the block's own sizes."""

    tile_rows: int  # outputs of a patch, which one row of the products computes
    tile_cols: int
    patches: int  # rows of a product, the patches of one program
    group: int  # expanded channels computed at a time
    num_warps: int
    num_stages: int


# Warps share a product's columns, at least 8 each; products have 16 rows (see triton_backend/kernels.py). Patches of
# 2x2 are fewest instructions; of 1x1 and 1x2 give more programs, or fit where shared memory or registers are short;
# of 2x4 expand least. Two stages: weights of the next group arrive while this one computes.
TILES = (
    Tile(2, 2, 16, 64, 4, 2),
    Tile(2, 2, 16, 64, 8, 2),
    Tile(2, 2, 16, 32, 2, 2),
    Tile(2, 2, 32, 64, 8, 2),
    Tile(2, 4, 16, 64, 8, 2),
    Tile(1, 2, 16, 64, 4, 2),
    Tile(1, 1, 16, 64, 4, 2),
    Tile(1, 1, 16, 32, 4, 2),
)


@dataclass(frozen=True)
class TritonPlan:
    """How one call of a block is tiled on a GPU. ``print`` it; pass it as ``plan=`` to force it."""

    tile_rows: int  # outputs of a patch, computed by one row of the products
    tile_cols: int
    patches: int  # of one program
    group: int  # expanded channels computed at a time
    splits: int  # programs that share a tile's groups; a second kernel adds their float32 sums in order
    num_warps: int
    num_stages: int
    chunk: int  # input channels of one product
    keep_x: bool  # whether x stays in shared memory for all groups, which takes every chunk at once
    out_tile: int  # output channels of one product
    out_tiles: int  # of one program
    programs: int  # tiles x splits x blocks of output channels, of the pass that projects
    shared_bytes: int  # of one program, estimated
    registers: int  # of one thread, estimated
    occupancy: float  # resident warps of a processor's 64, estimated
    recompute: float  # expansions computed / pixels expanded; both passes of a squeeze-and-excite
    bytes: int  # to and from memory: x, y, weights, partial sums
    matrix_flops: int  # of the 1x1 products, with recompute and padding
    flops: int  # of bias, activation and depthwise in float32, with recompute
    bytes_never_written: int  # the expanded tensors that an unfused block writes
    seconds: float  # what the estimate says; good for comparing plans

    @property
    def tile(self) -> Tile:
        return Tile(*(getattr(self, name) for name in Tile._fields))

    def forced(self) -> list[int]:
        """What the op takes as its ``plan`` argument."""
        return [*self.tile[:4], self.splits, *self.tile[4:]]

    def __str__(self) -> str:
        return (
            f"patch {self.tile_rows}x{self.tile_cols}, {self.patches} a program, group {self.group}, "
            f"splits {self.splits}, {self.programs} programs of {self.num_warps} warps, {self.num_stages} stages, "
            f"shared {self.shared_bytes / 1024:.0f} KiB, {self.registers} registers, occupancy {self.occupancy:.2f}, "
            f"recompute {self.recompute:.2f}, {self.bytes / 2**20:.2f} MiB, "
            f"{self.matrix_flops / 1e9:.2f} GFLOP in products, {self.flops / 1e9:.2f} beside, "
            f"never written {self.bytes_never_written / 2**20:.2f} MiB, about {self.seconds * 1e6:.0f} us"
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _chunk(channels: int, itemsize: int) -> int:
    """Input channels of one product: what pads them least, of that the largest; of float32, more than 16 spill."""
    return min((64, 32, 16), key=lambda s: _ceil_div(channels, s) * s) if itemsize == 2 else 16


def _out_tile(channels: int, num_warps: int) -> int:
    """The same for output channels, 8 or more for each warp."""
    sizes = [s for s in (64, 32, 16) if s >= 8 * num_warps] or [8 * num_warps]
    return min(sizes, key=lambda s: _ceil_div(channels, s) * s)


class _Estimate(NamedTuple):
    registers: float
    shared_bytes: int
    slots: float  # instructions issued per warp and group; min and max take two
    expand_flops: float  # in products, per program and group
    project_flops: float


def _estimate(
    spec: BlockSpec, itemsize: int, matrix: bool, tile: Tile, chunk: int, keep_x: bool, out: int
) -> _Estimate:
    """What one program needs; counted in compiled kernels, see benchmarks/results/triton-configurations.md.

    ``out``: output channels of the program, with padding. ``matrix``: whether products run on tensor cores.
    """
    warps, m, outputs = tile.num_warps, tile.patches, tile.tile_rows * tile.tile_cols
    positions = _positions(tile, spec)
    k = _ceil_div(spec.in_channels, chunk) * chunk if spec.expand else 0
    threads = 32 * warps
    columns = max(tile.group / (8 * warps), 1)  # tiles of 8 that a warp has of the group
    e = m * 8 * columns / 32  # elements of a thread
    y = outputs * m * out / threads
    # 5x5 taps keep no more of themselves in registers than 3x3, and of their many positions' addresses half as much,
    # unless x is read again for every group.
    of_positions = (2 if spec.kernel == 3 else 1 if keep_x or not spec.expand else 3) * m / 16 * positions
    registers = y + outputs * e + 2 * e + 18 * columns + of_positions + (40 if itemsize == 2 else 66)
    if spec.squeeze_channels and spec.kernel == 5:  # the pass that pools was counted to take more
        registers += outputs * e
    if not spec.expand:  # where x is read for every group, its addresses stay
        registers += 2 * positions
    if not matrix and m * outputs * out * tile.group / threads > _MOST_UNROLLED:
        registers = float("inf")

    x, expand, project = positions * m * k, k * tile.group, out * tile.group
    if not keep_x:
        x, expand = m * chunk, chunk * tile.group
    weights, stages = itemsize * (expand + project) + _others(spec) * tile.group, tile.num_stages - 1
    if spec.squeeze_channels:
        weights += 4 * m * tile.group  # each patch's gates
    d = outputs * m * tile.group
    shared = itemsize * (x + d) + (stages * weights if stages else itemsize * (expand + project))

    expand_flops, project_flops = 2 * m * positions * k * tile.group, 2 * m * outputs * tile.group * out
    flops = expand_flops + project_flops
    loads = tile.group * (k + out) * itemsize / 16 / threads  # of 16 bytes
    expanded = 1 + ACTIVATION_TABLE[spec.expanded_by].triton_slots
    activation = 1 + ACTIVATION_TABLE[spec.activation].triton_slots
    taps = spec.kernel**2
    slots = positions * expanded * e + taps * outputs * e + outputs * activation * e
    slots += 5 * loads + 2 * taps * columns + 100
    if matrix:
        products = 16 * 8 * (32 // itemsize)  # multiply-adds of one instruction
        slots += flops / 2 / products / warps * 1.5 + m / 16 * positions * k / 16  # with reads from shared memory
    else:
        slots += flops / 2 / threads * 1.5
    return _Estimate(registers, int(shared), slots, expand_flops, project_flops)


def _others(spec: BlockSpec) -> int:
    """Bytes of taps and biases per expanded channel, in float32."""
    return 4 * (spec.kernel**2 + 2)


def _positions(tile: Tile, spec: BlockSpec) -> int:
    """Expanded pixels under a patch's outputs, which lie a dilation apart."""
    rows, cols = spec.strides
    return ((tile.tile_rows - 1) * rows + spec.kernel) * ((tile.tile_cols - 1) * cols + spec.kernel)


def patches_of_image(spec: BlockSpec, out_size: tuple[int, int], tile: Tile) -> int:
    """How many patches cover one image. The outputs of a patch lie a dilation D apart, so that D of them interlock."""
    patches = 1
    for size, outputs in zip(out_size, tile[:2], strict=True):
        covered = outputs * spec.dilation
        patches *= size // covered * spec.dilation + min(size % covered, spec.dilation)
    return patches


_SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 30, 60)
# Above this the compiler spills; the estimate runs below what is used.
_MOST_ESTIMATED = 205
_MOST_UNROLLED = 1280  # multiply-adds of a thread, projecting one group in float32 without tensor cores


def _plan_of(
    spec: BlockSpec,
    shape: tuple[int, int, int, int],
    itemsize: int,
    matrix: bool,
    gpu: Gpu,
    tile: Tile,
    splits: int,
    forced: bool = False,
) -> TritonPlan | None:
    """The plan with this configuration, or None if it asks for more registers or shared memory than there are."""
    n, _, height, width = shape
    out_height, out_width = spec.out_size(height, width)
    chunk, out_tile = _chunk(spec.in_channels, itemsize), _out_tile(spec.out_channels, tile.num_warps)
    out_tiles = _ceil_div(spec.out_channels, out_tile)
    chunks = _ceil_div(spec.in_channels, chunk)
    most_registers = float("inf") if forced else _MOST_ESTIMATED  # who forces a plan may spill
    while True:
        for keep_x in (True, False) if matrix and chunks > 1 else (chunks == 1,):
            found = _estimate(spec, itemsize, matrix, tile, chunk, keep_x, out_tile * out_tiles)
            if found.registers <= most_registers and found.shared_bytes <= gpu.shared_per_block:
                break
        else:
            if out_tiles == 1:
                return None
            out_tiles = _ceil_div(out_tiles, 2)
            continue
        break

    outputs = tile.tile_rows * tile.tile_cols
    positions = _positions(tile, spec)
    patches = n * patches_of_image(spec, (out_height, out_width), tile)
    out_blocks = _ceil_div(_ceil_div(spec.out_channels, out_tile), out_tiles)
    groups = _ceil_div(spec.hidden_channels, tile.group)
    groups_each = _ceil_div(groups, splits)
    splits = _ceil_div(groups, groups_each)
    tiles = _ceil_div(patches, tile.patches)
    programs = tiles * splits * out_blocks
    # The pass that pools for a squeeze-and-excite: its programs are each of one image.
    pooling = n * _ceil_div(patches // max(n, 1), tile.patches) if spec.squeeze_channels else 0

    pixels_out = n * out_height * out_width
    expand_weights = spec.in_channels * spec.hidden_channels if spec.expand else 0
    weights = itemsize * (expand_weights + spec.hidden_channels * spec.out_channels)
    weights += _others(spec) * spec.hidden_channels
    traffic = itemsize * (n * height * width * spec.in_channels + pixels_out * spec.out_channels) + weights
    partial = 4 * splits * pixels_out * spec.out_channels if splits > 1 else 0
    traffic += 2 * partial + itemsize * n * height * width * spec.in_channels * (spec.residual and splits > 1)
    if spec.squeeze_channels:
        traffic += itemsize * n * height * width * spec.in_channels + weights
        traffic += 8 * (pooling + n) * spec.hidden_channels  # partial sums and gates, written and read
        traffic += 8 * spec.squeeze_channels * spec.hidden_channels

    registers = int(min(1.35 * found.registers, 255))
    resident = min(
        _REGISTERS // (32 * tile.num_warps * registers),
        gpu.shared_per_processor // (found.shared_bytes + 1024),
        _WARPS // tile.num_warps,
    )
    resident = max(resident, 1)
    at_once = min(resident, max(_ceil_div(programs, gpu.processors), 1)) * tile.num_warps
    issued = found.slots * groups_each * tile.num_warps + 600 * tile.num_warps
    waves = _ceil_div(programs, gpu.processors) + _ceil_div(pooling * splits, gpu.processors)
    busy = waves * issued / 4 * 132 * 2 * 128 / 67e12  # an H200's clock
    efficiency = 0.8 * min(at_once / 8, 1)  # below two warps a scheduler, latencies show
    x_read = itemsize * tile.patches * positions * spec.in_channels
    from_l2 = (tiles + pooling) * weights + (out_blocks * tiles + pooling) * splits * x_read
    rates = gpu.matrix_flops / {2: 1, 4: 2}[itemsize] if matrix else gpu.fp32_flops
    in_products = (found.expand_flops + found.project_flops) * groups_each * programs
    in_products += found.expand_flops * groups_each * splits * pooling
    seconds = max(
        traffic / gpu.copy_bytes,
        from_l2 / _L2_BYTES * 132 / gpu.processors,
        busy / efficiency,
        in_products / rates,
    )
    seconds += _LAUNCH_SECONDS * (1 + (splits > 1) + (_POOLING_LAUNCHES if pooling else 0))

    expanded = height * width if spec.expand else 0
    elements = (tiles * out_blocks + pooling) * tile.patches * groups * tile.group
    depthwise = 2 if spec.squeeze_channels else 1  # before the gate and behind it
    return TritonPlan(
        *tile[:4],
        splits,
        *tile[4:],
        chunk=chunk,
        keep_x=keep_x,
        out_tile=out_tile,
        out_tiles=out_tiles,
        programs=programs,
        shared_bytes=found.shared_bytes,
        registers=registers,
        occupancy=resident * tile.num_warps / _WARPS,
        recompute=(patches * out_blocks + (patches if pooling else 0)) * positions / max(n * height * width, 1),
        bytes=traffic,
        matrix_flops=int(in_products),
        flops=elements * (positions * 3 * spec.expand + outputs * (2 * spec.kernel**2 + 2)),
        bytes_never_written=n * spec.hidden_channels * (expanded + depthwise * out_height * out_width) * itemsize,
        seconds=seconds,
    )


_MOST_CHANNELS, _MOST_EXTENT, _MOST_PIXELS = 2**15, 2**20, 2**30  # 32-bit numbers in the kernel, and their products


def unsupported(dtype: torch.dtype, spec: BlockSpec | None = None) -> str | None:
    """Why the kernel takes no activations of ``dtype``, or not this block, whatever the image's size; or None."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return (
            f"x must be float16, bfloat16 or float32 for backend 'triton', got {dtype}; use backend='eager' for others"
        )
    if spec is None:
        return None
    channels = max(spec.in_channels, spec.hidden_channels, spec.out_channels)
    if channels > _MOST_CHANNELS:
        return f"the Triton kernel takes at most {_MOST_CHANNELS} channels, got {channels}; use backend='eager'"
    if spec.extent > _MOST_EXTENT:
        return (
            f"the Triton kernel takes a depthwise kernel that spans at most {_MOST_EXTENT} pixels, got {spec.extent} "
            f"by a dilation of {spec.dilation}; use backend='eager'"
        )
    return None


@functools.lru_cache(maxsize=1024)
def does_not_fit(spec: BlockSpec) -> str | None:
    """Why no configuration takes such a block in every dtype; None where one does, as for all kernels up to 5x5."""
    if spec.kernel <= 5:
        return None
    plain, shape = dataclasses.replace(spec, dilation=1, padding=None), (1, spec.in_channels, 32, 32)
    try:
        for dtype in (torch.float16, torch.float32):
            best_plans(plain, shape, dtype, False, H200)
    except ValueError as why:
        return str(why).removesuffix("; use backend='eager'")
    return None


@functools.lru_cache(maxsize=4096)
def best_plans(
    spec: BlockSpec, shape: tuple[int, int, int, int], dtype: torch.dtype, tf32: bool, gpu: Gpu
) -> tuple[TritonPlan, ...]:
    """One plan for each configuration that fits, best first: all that is ever tried for this call."""
    matrix = dtype != torch.float32 or tf32
    best: dict[Tile, TritonPlan] = {}
    for tile in TILES if matrix else [tile._replace(num_stages=1) for tile in TILES]:
        groups = _ceil_div(spec.hidden_channels, tile.group)
        if not matrix:  # a loop of one group becomes straight code, which ptxas was seen to spill by kilobytes
            groups = _ceil_div(groups, 2)
        found = [
            _plan_of(spec, shape, dtype.itemsize, matrix, gpu, tile, splits) for splits in _SPLITS if splits <= groups
        ]
        if found[0] is not None:
            best[tile] = min((p for p in found if p is not None), key=lambda p: p.seconds)
    if not best:
        raise ValueError(
            f"no configuration of the Triton kernel fits {spec} into {gpu.shared_per_block} bytes of shared memory "
            f"of {gpu.name}; use backend='eager'"
        )
    return tuple(sorted(best.values(), key=lambda p: p.seconds))


def triton_plan(
    spec: BlockSpec,
    input_shape: Sequence[int],  # [N, C_in, H, W]
    *,
    dtype: torch.dtype = torch.float16,
    gpu: Gpu = H200,
    tf32: bool = False,
    forced: Sequence[int] | None = None,
    **values: int,
) -> TritonPlan:
    """The plan the Triton kernel uses for this block and input on ``gpu``, or the one forced.

    ``forced`` is what :meth:`TritonPlan.forced` returns; ``values`` force single ones of ``tile_rows``,
    ``tile_cols``, ``patches``, ``group``, ``splits``, ``num_warps`` and ``num_stages``, and need not be among
    ``TILES``. ``tf32``: whether float32 products may round to TF32. Raises ValueError, naming the value and its
    limit, for what no kernel takes.
    """
    shape = n, channels, height, width = check_shape(input_shape)
    check_gpu(gpu)
    check_dtype(dtype)
    if channels != spec.in_channels:
        raise ValueError(f"input_shape has {channels} channels, the block takes {spec.in_channels}")
    if n < 0 or height < 1 or width < 1:
        raise ValueError(f"batch must be at least 0, height and width at least 1, got {shape}")
    if (why := unsupported(dtype, spec)) is not None:
        raise ValueError(why)
    out_size = spec.out_size(height, width)
    if min(out_size) < 1:
        raise ValueError(f"{spec} leaves nothing of {height} x {width} pixels; use larger images or more padding")
    out_pixels = n * out_size[0] * out_size[1]
    if max(out_pixels, height, width) > _MOST_PIXELS:
        raise ValueError(
            f"the Triton kernel takes at most 2^30 output pixels, rows and columns, got {out_pixels}, {height} and "
            f"{width}; split the batch, or use backend='eager'"
        )
    automatic = best_plans(spec, shape, dtype, tf32, gpu)[0]
    if forced is None and not values:
        return automatic
    names = [*Tile._fields[:4], "splits", *Tile._fields[4:]]
    if forced is not None and len(forced) != len(names):
        raise ValueError(f"plan must be [{', '.join(names)}], got {len(forced)} values")
    if unknown := set(values) - set(names):
        raise TypeError(f"what can be forced is {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = dict(zip(names, forced if forced is not None else automatic.forced(), strict=True)) | values
    if "splits" not in values and values.get("group", 0) > 0:  # the automatic number belongs to the automatic group
        chosen["splits"] = min(chosen["splits"], _ceil_div(spec.hidden_channels, values["group"]))
    _check(chosen, spec)
    splits = chosen.pop("splits")
    matrix = dtype != torch.float32 or tf32
    found = _plan_of(spec, shape, dtype.itemsize, matrix, gpu, Tile(**chosen), splits, forced=True)
    if found is None:
        raise ValueError(
            f"plan: {Tile(**chosen)} needs more than the {gpu.shared_per_block} bytes of shared memory that {gpu.name} "
            f"has, for {spec}; choose a smaller patch or group"
        )
    return found


def _check(chosen: dict[str, int], spec: BlockSpec) -> None:
    powers = {"patches": (16, 128), "group": (PANEL, 256), "num_warps": (1, 16)}
    for name, (least, most) in powers.items():
        value = chosen[name]
        if not least <= value <= most or value & (value - 1):
            raise ValueError(f"plan: {name} must be a power of two, {least} to {most}, got {value}")
    groups = _ceil_div(spec.hidden_channels, chosen["group"])
    for name, limit in {"tile_rows": 8, "tile_cols": 8, "splits": groups, "num_stages": 8}.items():
        if not 1 <= chosen[name] <= limit:
            raise ValueError(f"plan: {name} must be 1 to {limit}, got {chosen[name]}")
