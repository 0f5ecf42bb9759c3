"""The inverted residual in Triton: expand, depthwise and project in one kernel, by groups of expanded channels.

    e = act(x W_e + b_e), 0 outside the image     d = act(depthwise(e) + b_d)     y = d W_p + b_p (+ x)

**How depthwise taps reach their neighbours.** Triton cannot shift inside a register tile. Each row of the products is
therefore a *patch* of ``ROWS x COLS`` neighbouring outputs: the expansion is computed at each position of the patch
and its rim, one small product a position, and goes straight into the outputs it belongs to. Which those
are is known at compile time, so that both ``e`` and ``d`` stay in registers: nothing is shifted, written or waited
for. What that costs is the rim: ``(ROWS + 2)(COLS + 2) / (ROWS COLS)`` expansions an output at stride 1 under 3x3
taps. The outputs of a patch lie ``DILATION`` apart, so that a dilated convolution, which is several ordinary ones
between each other, has no larger rim.

SASS of prototypes for sm_90, block 64 -> 384 -> 64, float16, counted by hand: instructions of one group's loop per
thread and depthwise result:

| taps by                                      | expansions | instructions | beside them                          |
|----------------------------------------------|------------|--------------|--------------------------------------|
| one product a tap (a patch of 1x1)           | 9          | 87           | nine times the expansion's products  |
| patch 2x2                                    | 4          | 37           |                                      |
| scratch in global memory, tile 8x16, 9 loads | 1.4        | 55 to 60     | 2.8 B to L2, 18 B from L1, barriers  |

(The scratch's loads were real: ``ld.global`` behind ``bar.sync``, none through the non-coherent path. Half of its
instructions widen float16 to float32, nine times each element.) Gluon's shared memory would spare the rim, but does
not run in the interpreter, where every machine can check a kernel, and needs a product of its own per architecture.
A patch of 2x2 is fewest instructions *and* the simplest; larger patches run out of registers (4x4: 128 bytes spilled).

**Outside the image** a position reads the nearest pixel inside, and its expansion is cut off at 0 instead of 6: one
``min`` is both ReLU6's and the padding's. That pixel lies under the same window, so that a NaN in it reaches
exactly the outputs that it reaches in eager. Under dilated taps it need not, and other activations have no ``min``:
there the expansion is replaced by 0.

**Squeeze-and-excite** takes two passes: :func:`pool_kernel` computes ``d`` and keeps its sums alone, of one image and
in a fixed order; what the gates are made of is small. The second pass computes ``d`` again and multiplies it by them.

Products have 16 rows, ``mma.sync``'s least; 64 rows would make ``wgmma`` of them, whose accumulators then spill.
"""

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
def _activate(v, NAME: tl.constexpr):
    """One of ``mnv2_fused.spec.ACTIVATIONS``, as torch computes it."""
    if NAME == "relu6":
        return _relu6(v, 6.0)
    elif NAME == "relu":
        return tl.maximum(v, 0.0, propagate_nan=_ALL)
    elif NAME == "hardswish":
        return v * (_relu6(v + 3.0, 6.0) * (1.0 / 6.0))
    elif NAME == "silu":
        return v / (1.0 + tl.exp(-v))
    else:
        tl.static_assert(NAME == "identity")
        return v


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
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
    x_k = _load(x[:, None] + k[None, :], (k < C_IN)[None, :], ragged)
    columns = hidden // _PANEL * (C_IN * _PANEL) + hidden % _PANEL
    inside = (k < C_IN)[:, None] & (hidden < HIDDEN)[None, :]
    w_k = _load(w_expand + k[:, None] * _PANEL + columns[None, :], inside, ragged or RAGGED)
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
        return tl.where((cap > 0.0)[:, None], _activate(e, ACTIVATION), 0.0)


@triton.constexpr_function
def _tap(position: int, output: int, rim_cols: int, cols: int, stride: int, kernel: int) -> int:
    """Which tap joins a position of the rim to an output of the patch; -1 for none."""
    row = position // rim_cols - output // cols * stride
    col = position % rim_cols - output % cols * stride
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
    KERNEL: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """What the expansion at one position adds to every output of the patch."""
    added = ()
    for o in tl.static_range(OUTPUTS):
        if _tap(position, o, RIM_COLS, COLS, STRIDE, KERNEL) >= 0:
            added = added + (d[o] + e * taps[_tap(position, o, RIM_COLS, COLS, STRIDE, KERNEL)][None, :],)
        else:
            added = added + (d[o],)
    return added


@triton.jit
def _depthwise_of_group(
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
    DILATION: tl.constexpr,
    EXPAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    RIM_COLS: tl.constexpr = (COLS - 1) * STRIDE + KERNEL
    panel = hidden // _PANEL * (KERNEL * KERNEL * _PANEL) + hidden % _PANEL
    taps = ()
    for t in tl.static_range(KERNEL * KERNEL):
        taps = taps + (_load(w_depthwise + panel + t * _PANEL, exists, RAGGED),)
    bias = _load(b_depthwise + hidden, exists, RAGGED)
    sums = ()
    for _ in tl.static_range(OUTPUTS):
        sums = sums + (tl.full((M, GROUP), 0.0, tl.float32) + bias[None, :],)
    for position in tl.static_range(RIM_ROWS * RIM_COLS):
        if EXPAND:
            b = _load(b_expand + hidden, exists, RAGGED)
            e = _expand(
                *(pixels[position], caps[position], w_expand, b, hidden),
                *(M, C_IN, CHUNK, KEEP_X, PRECISION, HIDDEN, RAGGED, ACTIVATION, DILATION),
            )
        else:
            there = (caps[position] > 0.0)[:, None] & exists[None, :]
            e = tl.load(pixels[position][:, None] + hidden[None, :], mask=there, other=0.0).to(tl.float32)
        sums = _depthwise(sums, e, taps, position, RIM_COLS, COLS, STRIDE, KERNEL, OUTPUTS)
    d = ()
    for o in tl.static_range(OUTPUTS):
        result = _activate(sums[o], ACTIVATION)
        if RAGGED:  # a channel of the padding is 0 * Inf where x is infinite
            result = tl.where(exists[None, :], result, 0.0)
        d = d + (result,)
    return d


@triton.jit
def _project(
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
        w = _load(w_project + hidden[:, None] * _PANEL + columns[None, :], inside, ragged)
        for o in tl.static_range(OUTPUTS):
            added = added + (_dot(d[o], w, y[t * OUTPUTS + o], PRECISION),)
    return added


@triton.jit
def _patches_along(out_size, PATCH: tl.constexpr, DILATION: tl.constexpr):
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
def _corner(patch, out_height, out_width, ROWS: tl.constexpr, COLS: tl.constexpr, DILATION: tl.constexpr):
    """Image, row and column of the first output of each patch, patches of all images being numbered in one row."""
    patch_cols = _patches_along(out_width, COLS, DILATION)
    patch_rows = _patches_along(out_height, ROWS, DILATION)
    col = _first_output(patch % patch_cols, COLS, DILATION)
    row = _first_output(patch // patch_cols % patch_rows, ROWS, DILATION)
    image = (patch // (patch_cols * patch_rows)).to(tl.int64)
    return image, row, col


@triton.jit
def _rim(
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
    DILATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Of each position of the patches' rim: pointers to the pixels it reads, and 6, or 0 outside the image."""
    RIM_ROWS: tl.constexpr = (ROWS - 1) * STRIDE + KERNEL
    RIM_COLS: tl.constexpr = (COLS - 1) * STRIDE + KERNEL
    pixels, caps = (), ()
    for position in tl.static_range(RIM_ROWS * RIM_COLS):
        h = row * STRIDE + position // RIM_COLS * DILATION - top
        w = col * STRIDE + position % RIM_COLS * DILATION - left
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        h = tl.minimum(tl.maximum(h, 0), height - 1).to(tl.int64)
        w = tl.minimum(tl.maximum(w, 0), width - 1).to(tl.int64)
        pixels = pixels + (x + image * x_image + h * x_row + w * x_col,)
        caps = caps + (tl.where(inside, 6.0, 0.0),)
    return pixels, caps


@triton.jit
def inverted_residual_kernel(
    x,  # [N, H, W, C_IN] by the strides below, channels together
    w_expand,
    b_expand,
    w_depthwise,
    b_depthwise,
    w_project,
    b_project,
    gate,  # [N, HIDDEN], of a squeeze-and-excite, where GATED
    y,  # [N, H', W', C_OUT] by the strides below; float32 [splits, N, H', W', C_OUT] when PARTIAL
    patches,  # of all images
    height,
    width,
    out_height,
    out_width,
    x_image,
    x_row,
    x_col,
    y_split,
    y_image,
    y_row,
    y_col,
    y_channel,
    top,  # rows of zeros above the expanded tensor
    left,
    C_IN: tl.constexpr,
    HIDDEN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    EXPAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    M: tl.constexpr,  # patches of one program
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # of one program
    RAGGED: tl.constexpr,  # whether the last group has fewer channels than GROUP
    CHUNK: tl.constexpr,
    KEEP_X: tl.constexpr,
    OUT_TILE: tl.constexpr,
    OUT_TILES: tl.constexpr,
):
    OUTPUTS: tl.constexpr = ROWS * COLS
    dtype: tl.constexpr = x.dtype.element_ty

    # Patches of all images in one row, so that small images share a program. Past the last one, that one again.
    patch = tl.minimum(tl.program_id(0) * M + tl.arange(0, M), patches - 1)
    image, row, col = _corner(patch, out_height, out_width, ROWS, COLS, DILATION)
    pixels, caps = _rim(
        *(x, image, row, col, height, width, top, left, x_image, x_row, x_col),
        *(KERNEL, STRIDE, DILATION, ROWS, COLS),
    )
    sums = ()
    for _ in tl.static_range(OUTPUTS * OUT_TILES):
        sums = sums + (tl.full((M, OUT_TILE), 0.0, tl.float32),)
    first_out = tl.program_id(2) * (OUT_TILE * OUT_TILES)

    for group in range(GROUPS):
        hidden = (tl.program_id(1) * GROUPS + group) * GROUP + tl.arange(0, GROUP)
        exists = hidden < HIDDEN
        d = _depthwise_of_group(
            *(pixels, caps, w_expand, b_expand, w_depthwise, b_depthwise, hidden, exists),
            *(C_IN, HIDDEN, KERNEL, STRIDE, DILATION, EXPAND, ACTIVATION, PRECISION),
            *(ROWS, COLS, M, GROUP, RAGGED, CHUNK, KEEP_X),
        )
        stored = ()
        if GATED:
            gates = _load(gate + image[:, None] * HIDDEN + hidden[None, :], exists[None, :], RAGGED)
            for o in tl.static_range(OUTPUTS):
                stored = stored + ((d[o] * gates).to(dtype),)
        else:
            for o in tl.static_range(OUTPUTS):
                stored = stored + (d[o].to(dtype),)
        sums = _project(
            *(sums, stored, w_project, hidden, first_out),
            *(HIDDEN, RAGGED, C_OUT, OUT_TILE, OUT_TILES, OUTPUTS, PRECISION),
        )

    given = tl.program_id(0) * M + tl.arange(0, M) < patches
    y += tl.program_id(1).to(tl.int64) * y_split + image[:, None] * y_image
    for t in tl.static_range(OUT_TILES):
        out = first_out + t * OUT_TILE + tl.arange(0, OUT_TILE)
        for o in tl.static_range(OUTPUTS):
            r = row + o // COLS * DILATION
            c = col + o % COLS * DILATION
            stored_at = (given & (r < out_height) & (c < out_width))[:, None] & (out < C_OUT)[None, :]
            r, c = r.to(tl.int64)[:, None], c.to(tl.int64)[:, None]
            result = sums[t * OUTPUTS + o]
            if not PARTIAL:
                result += tl.load(b_project + out, mask=out < C_OUT, other=0.0)[None, :]
                result = _activate(result, OUT_ACTIVATION)
                if RESIDUAL:
                    x_at = x + image[:, None] * x_image + r * x_row + c * x_col + out[None, :]
                    result += tl.load(x_at, mask=stored_at, other=0.0).to(tl.float32)
            y_at = y + r * y_row + c * y_col + out.to(tl.int64)[None, :] * y_channel
            tl.store(y_at, result.to(y.dtype.element_ty), mask=stored_at)


@triton.jit
def pool_kernel(
    x,  # and so on as inverted_residual_kernel has them
    w_expand,
    b_expand,
    w_depthwise,
    b_depthwise,
    sums,  # [N, programs of an image, HIDDEN], float32
    height,
    width,
    out_height,
    out_width,
    x_image,
    x_row,
    x_col,
    top,
    left,
    C_IN: tl.constexpr,
    HIDDEN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    EXPAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    RAGGED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """The first pass of a squeeze-and-excite: ``d`` summed over the patches of a program, which are of one image."""
    patches = _patches_along(out_width, COLS, DILATION) * _patches_along(out_height, ROWS, DILATION)
    programs = tl.cdiv(patches, M)
    patch = tl.program_id(0) % programs * M + tl.arange(0, M)
    given = patch < patches
    patch = tl.program_id(0) // programs * patches + tl.minimum(patch, patches - 1)
    image, row, col = _corner(patch, out_height, out_width, ROWS, COLS, DILATION)
    pixels, caps = _rim(
        *(x, image, row, col, height, width, top, left, x_image, x_row, x_col),
        *(KERNEL, STRIDE, DILATION, ROWS, COLS),
    )
    sums += tl.program_id(0).to(tl.int64) * HIDDEN
    for group in range(GROUPS):
        hidden = (tl.program_id(1) * GROUPS + group) * GROUP + tl.arange(0, GROUP)
        exists = hidden < HIDDEN
        d = _depthwise_of_group(
            *(pixels, caps, w_expand, b_expand, w_depthwise, b_depthwise, hidden, exists),
            *(C_IN, HIDDEN, KERNEL, STRIDE, DILATION, EXPAND, ACTIVATION, PRECISION),
            *(ROWS, COLS, M, GROUP, RAGGED, CHUNK, KEEP_X),
        )
        total = tl.full((M, GROUP), 0.0, tl.float32)
        for o in tl.static_range(ROWS * COLS):
            r = row + o // COLS * DILATION
            c = col + o % COLS * DILATION
            there = given & (r < out_height) & (c < out_width)
            total += tl.where(there[:, None], d[o], 0.0)
        tl.store(sums + hidden, tl.sum(total, 0), mask=exists)


@triton.jit
def add_splits_kernel(
    partial,  # [splits, N, H', W', C_OUT]
    b_project,
    x,
    y,
    pixels,  # N H' W'
    out_height,
    out_width,
    x_image,
    x_row,
    x_col,
    y_image,
    y_row,
    y_col,
    y_channel,
    SPLITS: tl.constexpr,
    C_OUT: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    M: tl.constexpr,
    OUT_TILE: tl.constexpr,
):
    """The splits' sums in their order, so that every run gives the same bits; then bias and residual."""
    pixel = tl.program_id(0) * M + tl.arange(0, M)
    out = tl.program_id(1) * OUT_TILE + tl.arange(0, OUT_TILE)
    inside = (pixel < pixels)[:, None] & (out < C_OUT)[None, :]
    image = (pixel // (out_width * out_height)).to(tl.int64)[:, None]
    row = (pixel // out_width % out_height).to(tl.int64)[:, None]
    col = (pixel % out_width).to(tl.int64)[:, None]
    at = partial + pixel.to(tl.int64)[:, None] * C_OUT + out[None, :]
    total = tl.full((M, OUT_TILE), 0.0, tl.float32)
    for _ in range(SPLITS):
        total += tl.load(at, mask=inside, other=0.0)
        at += tl.cast(pixels, tl.int64) * C_OUT
    total += tl.load(b_project + out, mask=out < C_OUT, other=0.0)[None, :]
    total = _activate(total, OUT_ACTIVATION)
    if RESIDUAL:
        x_at = x + image * x_image + row * x_row + col * x_col + out[None, :]
        total += tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    y_at = y + image * y_image + row * y_row + col * y_col + out.to(tl.int64)[None, :] * y_channel
    tl.store(y_at, total.to(y.dtype.element_ty), mask=inside)
