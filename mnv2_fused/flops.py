"""Multiply-adds of blocks and rows of layers, as torch's FLOP counter takes those of its own operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from .encoding import COLUMN_STRIDE, SQUEEZE_CHANNELS, LayerKind, split_layers
from .spec import BlockSpec, stem_size


def multiply_adds(spec: BlockSpec, input_shape: Sequence[int]) -> int:
    """Multiply-adds of one block on [N, C_in, H, W], as the papers count them: no biases, no halo recompute.

    Products with zeros of the padding count, as they do for torch's own convolutions.
    """
    n, _, height, width = input_shape
    out_height, out_width = spec.out_size(height, width)
    expand = spec.in_channels * height * width if spec.expand else 0
    squeeze = 2 * spec.squeeze_channels  # two 1x1 products on one pixel
    after = (spec.kernel**2 + spec.out_channels) * out_height * out_width
    return n * spec.hidden_channels * (expand + after + squeeze)


def sizes_of_layers(
    size: Sequence[Any], layers: Sequence[int]
) -> Iterator[tuple[Sequence[int], Sequence[int], tuple[Any, Any], tuple[Any, Any]]]:
    """(first values, further ones, height and width of what it takes, of what it gives) of each layer in a row.

    ``layers`` as in :class:`mnv2_fused.encoding.LayerKind`; sizes may be symbols. A stem's are those of its block.
    """
    height, width = size
    for values, further in split_layers(layers):
        kind, stride = values[0], values[4]
        across = further[COLUMN_STRIDE] or stride if len(further) > COLUMN_STRIDE else stride
        if kind == LayerKind.STEM_AND_BLOCK:
            height, width = stem_size(height), stem_size(width)
        before = height, width
        if kind <= LayerKind.STEM_AND_BLOCK:
            kernel, dilation, left, right, top, bottom = further[:6] or (3, 1, 1, 1, 1, 1)
            # SAME: as many outputs as the stride allows, whatever the kernel.
            around = 1 if left == -1 else dilation * (kernel - 1) + 1
            rows, columns = (0, 0) if left == -1 else (top + bottom, left + right)
            height, width = (height + rows - around) // stride + 1, (width + columns - around) // across + 1
        if kind == LayerKind.POOLED:
            height = width = 1
        yield values, further, before, (height, width)


def row_multiply_adds(input_shape: Sequence[int], layers: Sequence[int]) -> int:
    """The same of layers in a row on [N, C, H, W]."""
    total = 0
    for values, further, before, after in sizes_of_layers(input_shape[2:], layers):
        kind, inside, hidden, outside = values[:4]
        taken, given = before[0] * before[1], after[0] * after[1]
        if kind > LayerKind.STEM_AND_BLOCK:
            total += inside * outside * taken
            continue
        kernel = further[0] if further else 3
        squeezed = further[SQUEEZE_CHANNELS] if further else 0
        expand = {LayerKind.BLOCK: inside, LayerKind.STEM_AND_BLOCK: 9 * inside}.get(LayerKind(kind), 0)
        total += hidden * (expand * taken + (kernel**2 + outside) * given + 2 * squeezed)
    return input_shape[0] * total


def count_flops(op: Any, multiply_adds: Callable[..., int]) -> None:
    """Has torch's FLOP counter take ``multiply_adds`` of the op's arguments for it."""

    def formula(*arguments: Any, out_val: Any = None, **others: Any) -> int:
        return 2 * multiply_adds(*arguments, **others)

    register_flop_formula(op, get_raw=True)(formula)
