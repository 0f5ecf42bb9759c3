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

from .parts import activate, corner, depthwise_of_group, load, patches_along, project, rim


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
    COLUMN_STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    EXPAND: tl.constexpr,
    EXPAND_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATES_SUM: tl.constexpr,
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
    image, row, col = corner(patch, out_height, out_width, ROWS, COLS, DILATION)
    pixels, caps = rim(
        *(x, image, row, col, height, width, top, left, x_image, x_row, x_col),
        *(KERNEL, STRIDE, COLUMN_STRIDE, DILATION, ROWS, COLS),
    )
    sums = ()
    for _ in tl.static_range(OUTPUTS * OUT_TILES):
        sums = sums + (tl.full((M, OUT_TILE), 0.0, tl.float32),)
    first_out = tl.program_id(2) * (OUT_TILE * OUT_TILES)

    for group in range(GROUPS):
        hidden = (tl.program_id(1) * GROUPS + group) * GROUP + tl.arange(0, GROUP)
        exists = hidden < HIDDEN
        d = depthwise_of_group(
            *(pixels, caps, w_expand, b_expand, w_depthwise, b_depthwise, hidden, exists),
            *(C_IN, HIDDEN, KERNEL, STRIDE, COLUMN_STRIDE, DILATION, EXPAND, EXPAND_ACTIVATION, ACTIVATION),
            *(NEGATIVE_SLOPE, PRECISION),
            *(ROWS, COLS, M, GROUP, RAGGED, CHUNK, KEEP_X),
        )
        stored = ()
        if GATED:
            gates = load(gate + image[:, None] * HIDDEN + hidden[None, :], exists[None, :], RAGGED)
            for o in tl.static_range(OUTPUTS):
                stored = stored + ((d[o] * gates).to(dtype),)
        else:
            for o in tl.static_range(OUTPUTS):
                stored = stored + (d[o].to(dtype),)
        sums = project(
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
                if not ACTIVATES_SUM:
                    result = activate(result, OUT_ACTIVATION, NEGATIVE_SLOPE)
                if RESIDUAL:
                    x_at = x + image[:, None] * x_image + r * x_row + c * x_col + out[None, :]
                    result += tl.load(x_at, mask=stored_at, other=0.0).to(tl.float32)
                if ACTIVATES_SUM:
                    result = activate(result, OUT_ACTIVATION, NEGATIVE_SLOPE)
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
    GROUPS: tl.constexpr,
    RAGGED: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """The first pass of a squeeze-and-excite: ``d`` summed over the patches of a program, which are of one image."""
    patches = patches_along(out_width, COLS, DILATION) * patches_along(out_height, ROWS, DILATION)
    programs = tl.cdiv(patches, M)
    patch = tl.program_id(0) % programs * M + tl.arange(0, M)
    given = patch < patches
    patch = tl.program_id(0) // programs * patches + tl.minimum(patch, patches - 1)
    image, row, col = corner(patch, out_height, out_width, ROWS, COLS, DILATION)
    pixels, caps = rim(
        *(x, image, row, col, height, width, top, left, x_image, x_row, x_col),
        *(KERNEL, STRIDE, COLUMN_STRIDE, DILATION, ROWS, COLS),
    )
    sums += tl.program_id(0).to(tl.int64) * HIDDEN
    for group in range(GROUPS):
        hidden = (tl.program_id(1) * GROUPS + group) * GROUP + tl.arange(0, GROUP)
        exists = hidden < HIDDEN
        d = depthwise_of_group(
            *(pixels, caps, w_expand, b_expand, w_depthwise, b_depthwise, hidden, exists),
            *(C_IN, HIDDEN, KERNEL, STRIDE, COLUMN_STRIDE, DILATION, EXPAND, EXPAND_ACTIVATION, ACTIVATION),
            *(NEGATIVE_SLOPE, PRECISION),
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
    NEGATIVE_SLOPE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATES_SUM: tl.constexpr,
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
    if not ACTIVATES_SUM:
        total = activate(total, OUT_ACTIVATION, NEGATIVE_SLOPE)
    if RESIDUAL:
        x_at = x + image * x_image + row * x_row + col * x_col + out[None, :]
        total += tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATES_SUM:
        total = activate(total, OUT_ACTIVATION, NEGATIVE_SLOPE)
    y_at = y + image * y_image + row * y_row + col * y_col + out.to(tl.int64)[None, :] * y_channel
    tl.store(y_at, total.to(y.dtype.element_ty), mask=inside)
