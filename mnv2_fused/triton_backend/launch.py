"""``mnv2_fused::inverted_residual_triton``: checks, planning, allocation and launch of the Triton kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..activations import NEGATIVE_SLOPE, function_of
from ..backends import tf32_allowed
from ..fold import PANEL, PackedWeights
from ..gpus import H200, Gpu
from ..plans.triton import TritonPlan, best_plans, patches_of_image, triton_plan, unsupported
from ..spec import BlockSpec
from ..tensors import check_input, empty_output
from . import tune
from .kernels import add_splits_kernel, inverted_residual_kernel, pool_kernel


def gpu_of(device: torch.device) -> Gpu:
    """The GPU at ``device``; what the interpreter runs on the CPU is planned for an H200."""
    return Gpu.of(device) if device.type == "cuda" else H200


def _check_weights(x_dtype: torch.dtype, device: torch.device, packed: PackedWeights) -> None:
    for name, t in zip(packed._fields, packed, strict=True):
        if t is None:
            continue
        expected = x_dtype if name in ("w_expand", "w_project") else torch.float32
        if t.dtype != expected:
            raise RuntimeError(
                f"mnv2_fused::inverted_residual_triton: {name} must be {expected} for x of {x_dtype}, got {t.dtype}; "
                "pack the weights with mnv2_fused.pack(weights, x.dtype, 'triton')"
            )
        if t.device != device:
            raise RuntimeError(f"x is on {device} but {name} is on {t.device}; move one with .to()")
        if not t.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous {list(t.shape)}, as mnv2_fused.pack makes it")


@functools.lru_cache(maxsize=4096)
def _spec_of(shapes: tuple[torch.Size | None, ...], x_shape: torch.Size, *options: Any) -> BlockSpec:
    """The block that weights of these shapes are of; kept, since it takes longer than a launch."""
    meta = PackedWeights(*(None if s is None else torch.empty(s, device="meta") for s in shapes))
    meta.check_layout("triton")
    spec = BlockSpec.of_op(meta, x_shape[1], *options)
    check_input(torch.empty(x_shape, device="meta"), spec.in_channels, spec)
    return spec


def inverted_residual_triton(
    x: Tensor,  # [N, C_in, H, W]
    w_expand: Tensor | None,  # [E/16, C_in, 16]
    b_expand: Tensor | None,  # [E/16 * 16]
    w_depthwise: Tensor,  # [E/16, 9 or 25, 16]
    b_depthwise: Tensor,  # [E/16 * 16]
    w_project: Tensor,  # [C_out/16, E, 16]
    b_project: Tensor,  # [C_out]
    w_squeeze: Tensor | None,  # [S/16, E, 16]
    b_squeeze: Tensor | None,  # [S/16 * 16]
    w_excite: Tensor | None,  # [E/16, S, 16]
    b_excite: Tensor | None,  # [E/16 * 16]
    stride: int,
    residual: bool,
    plan: Sequence[int] = (),
    dilation: int = 1,
    padding: Sequence[int] = (),
    activation: int = 0,
    out_activation: int = 2,
    squeeze_activation: int = 1,
    gate: int = 0,
    negative_slope: float = NEGATIVE_SLOPE,
    expand_activation: int = -1,
    column_stride: int = 0,
    activates_sum: bool = False,
) -> Tensor:  # [N, C_out, H', W'], in x's memory format
    """The op. Raises ValueError or RuntimeError, naming value, limit and way out, for what the kernel cannot take."""
    products = w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project
    packed = PackedWeights(*products, w_squeeze, b_squeeze, w_excite, b_excite)
    if x.dim() != 4:
        check_input(x, -1)
    if (why := unsupported(x.dtype)) is not None:
        raise TypeError(why)
    if (w_expand is None) != (b_expand is None):
        raise RuntimeError("w_expand and b_expand must both be given or both be None")
    _check_weights(x.dtype, x.device, packed)
    options = dilation, tuple(padding), activation, out_activation, squeeze_activation, gate, negative_slope
    last = expand_activation, column_stride, activates_sum
    spec = _spec_of(tuple(None if t is None else t.shape for t in packed), x.shape, stride, residual, *options, *last)
    y = empty_output(x, spec.out_channels, spec.out_size(*x.shape[2:]))
    if x.stride(1) != 1 and spec.in_channels > 1:  # a pixel's channels have to lie together
        x = x.contiguous(memory_format=torch.channels_last)
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    gpu = gpu_of(x.device)

    def run(chosen: TritonPlan) -> Tensor:
        launch(chosen, spec, x, packed, y, tf32)
        return y

    if any(plan):
        chosen = triton_plan(spec, x.shape, dtype=x.dtype, gpu=gpu, tf32=tf32, forced=plan)
    elif tune.wanted() and x.is_cuda and y.numel() and not torch.cuda.is_current_stream_capturing():
        plans = best_plans(spec, tuple(x.shape), x.dtype, tf32, gpu)
        chosen = tune.fastest(plans, run, (gpu.name, spec, tuple(x.shape), x.dtype, tf32))
    else:
        chosen = triton_plan(spec, x.shape, dtype=x.dtype, gpu=gpu, tf32=tf32)
    return run(chosen) if y.numel() else y


def constants(plan: TritonPlan, spec: BlockSpec, tf32: bool) -> dict[str, object]:
    """What the kernel is compiled for."""
    groups = triton.cdiv(triton.cdiv(spec.hidden_channels, plan.group), plan.splits)
    return {
        "C_IN": spec.in_channels,
        "HIDDEN": spec.hidden_channels,
        "C_OUT": spec.out_channels,
        "KERNEL": spec.kernel,
        "STRIDE": spec.strides[0],
        "COLUMN_STRIDE": spec.strides[1],
        "DILATION": spec.dilation,
        "EXPAND": spec.expand,
        "EXPAND_ACTIVATION": spec.expanded_by,
        "ACTIVATION": spec.activation,
        "OUT_ACTIVATION": spec.out_activation,
        "NEGATIVE_SLOPE": spec.negative_slope,
        "RESIDUAL": spec.residual,
        "ACTIVATES_SUM": spec.activates_sum,
        "GATED": spec.squeeze_channels > 0,
        "PARTIAL": plan.splits > 1,
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROWS": plan.tile_rows,
        "COLS": plan.tile_cols,
        "M": plan.patches,
        "GROUP": plan.group,
        "GROUPS": groups,
        "RAGGED": spec.hidden_channels != groups * plan.splits * plan.group,
        "CHUNK": plan.chunk,
        "KEEP_X": plan.keep_x,
        "OUT_TILE": plan.out_tile,
        "OUT_TILES": plan.out_tiles,
    }


_ADDED_PIXELS, _ADDED_CHANNELS = 16, 64  # 1024 sums a program: eight for each of 128 threads


def constants_of_adding(splits: int, spec: BlockSpec) -> dict[str, object]:
    """The same of the kernel that adds the splits' sums."""
    return {
        "SPLITS": splits,
        "C_OUT": spec.out_channels,
        "OUT_ACTIVATION": spec.out_activation,
        "NEGATIVE_SLOPE": spec.negative_slope,
        "RESIDUAL": spec.residual,
        "ACTIVATES_SUM": spec.activates_sum,
        "M": _ADDED_PIXELS,
        "OUT_TILE": _ADDED_CHANNELS,
    }


def constants_of_pooling(plan: TritonPlan, spec: BlockSpec, tf32: bool) -> dict[str, object]:
    """The same of the kernel that pools the depthwise results for a squeeze-and-excite."""
    kept = constants(plan, spec, tf32)
    return {name: kept[name] for name in pool_kernel.arg_names if name in kept}


def _gate(
    plan: TritonPlan, spec: BlockSpec, x: Tensor, packed: PackedWeights, out_size: tuple[int, int], tf32: bool
) -> Tensor:  # [N, E], float32
    """What a squeeze-and-excite multiplies the depthwise results by."""
    n, _, height, width = x.shape
    left, _, top, _ = spec.padding_of(height, width)
    programs = triton.cdiv(patches_of_image(spec, out_size, plan.tile), plan.patches)
    sums = torch.empty((n, programs, spec.hidden_channels), dtype=torch.float32, device=x.device)
    pool_kernel[(n * programs, plan.splits)](
        x,
        *(x if t is None else t for t in packed[:4]),
        sums,
        *(height, width, *out_size),
        *(x.stride(0), x.stride(2), x.stride(3)),
        *(top, left),
        **constants_of_pooling(plan, spec, tf32),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )

    def product(values: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
        panels = torch.baddbmm(bias.view(-1, 1, PANEL), values.expand(len(weight), -1, -1), weight)
        return panels.transpose(0, 1).flatten(1)[:, :channels]

    pooled = sums.sum(1) / (out_size[0] * out_size[1])
    squeezed = product(pooled, packed.w_squeeze, packed.b_squeeze, spec.squeeze_channels)
    squeezed = function_of(spec.squeeze_activation, spec.negative_slope)(squeezed)
    excited = product(squeezed, packed.w_excite, packed.b_excite, spec.hidden_channels)
    return function_of(spec.gate)(excited).contiguous()


def launch(plan: TritonPlan, spec: BlockSpec, x: Tensor, packed: PackedWeights, y: Tensor, tf32: bool) -> None:
    """Runs ``plan`` on the current stream of ``x``'s device. ``x``: channels together; ``y``: any strides."""
    n, _, height, width = x.shape
    out_height, out_width = y.shape[2:]
    left, _, top, _ = spec.padding_of(height, width)
    patches = n * patches_of_image(spec, (out_height, out_width), plan.tile)
    out_blocks = triton.cdiv(spec.out_channels, plan.out_tile * plan.out_tiles)
    x_strides = x.stride(0), x.stride(2), x.stride(3)
    y_strides = y.stride(0), y.stride(2), y.stride(3), y.stride(1)
    partial, strides = y, (0, *y_strides)
    if plan.splits > 1:
        partial = torch.empty(
            (plan.splits, n, out_height, out_width, spec.out_channels), dtype=torch.float32, device=x.device
        )
        strides = partial.stride()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        gate = _gate(plan, spec, x, packed, (out_height, out_width), tf32) if spec.squeeze_channels else x
        inverted_residual_kernel[(triton.cdiv(patches, plan.patches), plan.splits, out_blocks)](
            x,
            *(x if t is None else t for t in packed[:6]),  # without an expansion the kernel reads none
            *(gate, partial),
            *(patches, height, width, out_height, out_width),
            *x_strides,
            *strides,
            *(top, left),  # compiled for, where 1
            **constants(plan, spec, tf32),
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )
        if plan.splits == 1:
            return
        pixels = n * out_height * out_width
        grid = triton.cdiv(pixels, _ADDED_PIXELS), triton.cdiv(spec.out_channels, _ADDED_CHANNELS)
        add_splits_kernel[grid](
            *(partial, packed.b_project, x, y),
            *(pixels, out_height, out_width),
            *x_strides,
            *y_strides,
            **constants_of_adding(plan.splits, spec),
        )
