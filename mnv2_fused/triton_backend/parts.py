"""What the kernels of :mod:`mnv2_fused.triton_backend.kernels` are made of: activations, expand, depthwise, project,
and where the patches of an image lie."""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends import triton_interpreted
from ..fold import PANEL

_PANEL = tl.constexpr(PANEL)
_INTERPRETED = tl.constexpr(triton_interpreted())
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _relu6(v, cap):
    """A NaN stays one, as in torch; plain ``max(min())`` would make a number of it."""
    return tl.minimum(tl.maximum(v, 0.0, propagate_nan=_ALL), cap, propagate_nan=_ALL)


@triton.jit
def activate(v, NAME: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """One of ``mnv2_fused.activations.ACTIVATIONS``, as torch computes it."""
    if NAME == "relu6":
        return _relu6(v, 6.0)
    elif NAME == "relu":
        return tl.maximum(v, 0.0, propagate_nan=_ALL)
    elif NAME == "hardswish":
        return v * (_relu6(v + 3.0, 6.0) * (1.0 / 6.0))
    elif NAME == "silu":
        return v / (1.0 + tl.exp(-v))
    elif NAME == "leaky_relu":
        return tl.where(v > 0.0, v, v * NEGATIVE_SLOPE)
    elif NAME == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))  # 1 / sqrt(2)
    elif NAME == "gelu_tanh":
        # v / 2 (1 + tanh(u)) = v / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3).
        return v / (1.0 + tl.exp(-1.5957691216057308 * v * (1.0 + 0.044715 * v * v)))
    else:
        tl.static_assert(NAME == "identity")
        return v


@triton.jit
def load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if _INTERPRETED:  # the interpreter's own product would take bfloat16's bits for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _chunk(
    x,  # [M] pointers to pixels
    w_expand,  # packed, [E/16, C_IN, 16]
    hidden,  # [G]
    first,  # input channel
    e,  # [M, G]
    C_IN: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    HIDDEN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """``e`` and the products of ``CHUNK`` input channels."""
    k = first + tl.arange(0, CHUNK)
    ragged: tl.constexpr = C_IN % CHUNK != 0
    x_k = load(x[:, None] + k[None, :], (k < C_IN)[None, :], ragged)
    columns = hidden // _PANEL * (C_IN * _PANEL) + hidden % _PANEL
    inside = (k < C_IN)[:, None] & (hidden < HIDDEN)[None, :]
    w_k = load(w_expand + k[:, None] * _PANEL + columns[None, :], inside, ragged or RAGGED)
    return _dot(x_k, w_k, e, PRECISION)


@triton.jit
def _expand(
    x,  # [M] pointers to pixels
    cap,  # [M] 6, or 0 outside the image
    w_expand,
    bias,  # [G]
    hidden,  # [G]
    M: tl.constexpr,
    C_IN: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP_X: tl.constexpr,
    PRECISION: tl.constexpr,
    HIDDEN: tl.constexpr,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    DILATION: tl.constexpr,
):  # [M, G]
    e = tl.full((M, hidden.shape[0]), 0.0, tl.float32) + bias[None, :]
    if KEEP_X:  # which does not depend on the group, so that the compiler keeps it in shared memory
        for first in tl.static_range(0, C_IN, CHUNK):
            e = _chunk(x, w_expand, hidden, first, e, C_IN, CHUNK, PRECISION, HIDDEN, RAGGED)
    else:
        for first in range(0, C_IN, CHUNK):
            e = _chunk(x, w_expand, hidden, first, e, C_IN, CHUNK, PRECISION, HIDDEN, RAGGED)
    if ACTIVATION == "relu6" and DILATION == 1:
        return _relu6(e, cap[:, None])
    else:
        return tl.where((cap > 0.0)[:, None], activate(e, ACTIVATION, NEGATIVE_SLOPE), 0.0)


@triton.constexpr_function
def _tap(position: int, output: int, rim_cols: int, cols: int, stride: int, across: int, kernel: int) -> int:
    """Which tap joins a position of the rim to an output of the patch; -1 for none."""
    row = position // rim_cols - output // cols * stride
    col = position % rim_cols - output % cols * across
    return kernel * row + col if 0 <= row < kernel and 0 <= col < kernel else -1


@triton.jit
def _depthwise(
    d,  # outputs of the patch, each [M, G]
    e,  # [M, G]
    taps,  # KERNEL * KERNEL of [G]
    position: tl.constexpr,
    RIM_COLS: tl.constexpr,
    COLS: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """What the expansion at one position adds to every output of the patch."""
    added = ()
    for o in tl.static_range(OUTPUTS):
        if _tap(position, o, RIM_COLS, COLS, STRIDE, COLUMN_STRIDE, KERNEL) >= 0:
            added = added + (
                d[o] + e * taps[_tap(position, o, RIM_COLS, COLS, STRIDE, COLUMN_STRIDE, KERNEL)][None, :],
            )
        else:
            added = added + (d[o],)
    return added


@triton.jit
def depthwise_of_group(
    pixels,  # of each position of the rim, [M] pointers
    caps,  # the same, [M] 6, or 0 outside the image
    w_expand,
    b_expand,
    w_depthwise,  # packed, [E/16, KERNEL * KERNEL, 16]
    b_depthwise,
    hidden,  # [G]
    exists,  # [G], whether there is such a channel
    C_IN: tl.constexpr,
    HIDDEN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    EXPAND: tl.constexpr,
    EXPAND_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """``d`` of one group of channels: of each output of the patch [M, G], in float32."""
    OUTPUTS: tl.constexpr = ROWS * COLS
    RIM_ROWS: tl.constexpr = (ROWS - 1) * STRIDE + KERNEL
    RIM_COLS: tl.constexpr = (COLS - 1) * COLUMN_STRIDE + KERNEL
    panel = hidden // _PANEL * (KERNEL * KERNEL * _PANEL) + hidden % _PANEL
    taps = ()
    for t in tl.static_range(KERNEL * KERNEL):
        taps = taps + (load(w_depthwise + panel + t * _PANEL, exists, RAGGED),)
    bias = load(b_depthwise + hidden, exists, RAGGED)
    sums = ()
    for _ in tl.static_range(OUTPUTS):
        sums = sums + (tl.full((M, GROUP), 0.0, tl.float32) + bias[None, :],)
    for position in tl.static_range(RIM_ROWS * RIM_COLS):
        if EXPAND:
            b = load(b_expand + hidden, exists, RAGGED)
            e = _expand(
                *(pixels[position], caps[position], w_expand, b, hidden),
                *(M, C_IN, CHUNK, KEEP_X, PRECISION, HIDDEN, RAGGED, EXPAND_ACTIVATION, NEGATIVE_SLOPE, DILATION),
            )
        else:
            there = (caps[position] > 0.0)[:, None] & exists[None, :]
            e = tl.load(pixels[position][:, None] + hidden[None, :], mask=there, other=0.0).to(tl.float32)
        sums = _depthwise(sums, e, taps, position, RIM_COLS, COLS, STRIDE, COLUMN_STRIDE, KERNEL, OUTPUTS)
    d = ()
    for o in tl.static_range(OUTPUTS):
        result = activate(sums[o], ACTIVATION, NEGATIVE_SLOPE)
        if RAGGED:  # a channel of the padding is 0 * Inf where x is infinite
            result = tl.where(exists[None, :], result, 0.0)
        d = d + (result,)
    return d


@triton.jit
def project(
    y,  # OUTPUTS x OUT_TILES sums, each [M, OUT_TILE]
    d,  # OUTPUTS, each [M, G], in x's dtype
    w_project,  # packed, [C_OUT/16, HIDDEN, 16]
    hidden,  # [G]
    first_out,
    HIDDEN: tl.constexpr,
    RAGGED: tl.constexpr,
    C_OUT: tl.constexpr,
    OUT_TILE: tl.constexpr,
    OUT_TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    added = ()
    ragged: tl.constexpr = RAGGED or C_OUT % (OUT_TILE * OUT_TILES) != 0
    for t in tl.static_range(OUT_TILES):
        out = first_out + t * OUT_TILE + tl.arange(0, OUT_TILE)
        columns = out // _PANEL * (HIDDEN * _PANEL) + out % _PANEL
        inside = (hidden < HIDDEN)[:, None] & (out < C_OUT)[None, :]
        w = load(w_project + hidden[:, None] * _PANEL + columns[None, :], inside, ragged)
        for o in tl.static_range(OUTPUTS):
            added = added + (_dot(d[o], w, y[t * OUTPUTS + o], PRECISION),)
    return added


@triton.jit
def patches_along(out_size, PATCH: tl.constexpr, DILATION: tl.constexpr):
    """How many patches one side of the image takes, as in :func:`mnv2_fused.plans.triton.patches_of_image`."""
    if DILATION == 1:
        return tl.cdiv(out_size, PATCH)
    else:
        covered: tl.constexpr = PATCH * DILATION
        return out_size // covered * DILATION + tl.minimum(out_size % covered, DILATION)


@triton.jit
def _first_output(index, PATCH: tl.constexpr, DILATION: tl.constexpr):
    """The row (or column) of a patch's first output; the next ones follow at distances of ``DILATION``."""
    if DILATION == 1:
        return index * PATCH
    else:
        return index // DILATION * (PATCH * DILATION) + index % DILATION


@triton.jit
def corner(patch, out_height, out_width, ROWS: tl.constexpr, COLS: tl.constexpr, DILATION: tl.constexpr):
    """Image, row and column of the first output of each patch, patches of all images being numbered in one row."""
    patch_cols = patches_along(out_width, COLS, DILATION)
    patch_rows = patches_along(out_height, ROWS, DILATION)
    col = _first_output(patch % patch_cols, COLS, DILATION)
    row = _first_output(patch // patch_cols % patch_rows, ROWS, DILATION)
    image = (patch // (patch_cols * patch_rows)).to(tl.int64)
    return image, row, col


@triton.jit
def rim(
    x,
    image,  # [M], of each patch
    row,
    col,
    height,
    width,
    top,
    left,
    x_image,
    x_row,
    x_col,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Of each position of the patches' rim: pointers to the pixels it reads, and 6, or 0 outside the image."""
    RIM_ROWS: tl.constexpr = (ROWS - 1) * STRIDE + KERNEL
    RIM_COLS: tl.constexpr = (COLS - 1) * COLUMN_STRIDE + KERNEL
    pixels, caps = (), ()
    for position in tl.static_range(RIM_ROWS * RIM_COLS):
        h = row * STRIDE + position // RIM_COLS * DILATION - top
        w = col * COLUMN_STRIDE + position % RIM_COLS * DILATION - left
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        h = tl.minimum(tl.maximum(h, 0), height - 1).to(tl.int64)
        w = tl.minimum(tl.maximum(w, 0), width - 1).to(tl.int64)
        pixels = pixels + (x + image * x_image + h * x_row + w * x_col,)
        caps = caps + (tl.where(inside, 6.0, 0.0),)
    return pixels, caps
