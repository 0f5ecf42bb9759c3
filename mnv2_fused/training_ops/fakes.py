"""Shapes of what the ops of training give, and their multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..activations import ACTIVATIONS
from ..encoding import BLOCK_FIELDS
from ..flops import count_flops
from ..fold import PANEL
from ..spec import stem_size
from .derivatives import CLIPS


def _hidden(block: Sequence[int]) -> int:
    return block[4]  # of BLOCK_FIELDS


def _statistics_fake(x, w_expand, b_expand, w_depthwise, block):
    return x.new_empty(2, _hidden(block), dtype=torch.float64)


def _pool_fake(x, w_expand, b_expand, w_depthwise, of_d, block):
    return x.new_empty(x.shape[0], of_d.shape[1], dtype=torch.float64)


def _project_fake(x, w_expand, b_expand, w_depthwise, of_d, gate, w_output, block):
    fields = dict(zip(BLOCK_FIELDS, block, strict=True))
    size = fields["out_channels"], *_out_size(fields)
    return x.new_empty(x.shape[0], *size).contiguous(memory_format=torch.channels_last)


def _forward_fake(x, w_expand, b_expand, w_depthwise, affine, eps, w_output, block):
    statistics = x.new_empty(2, _hidden(block), dtype=torch.float64)
    if w_output is None:
        return x.new_empty(x.shape[0], w_depthwise.shape[0] * PANEL, dtype=torch.float64), statistics
    return _project_fake(x, w_expand, b_expand, w_depthwise, None, None, w_output, block), statistics


def _backward_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, count, w_input, block):
    arguments = (x, w_expand, b_expand, w_depthwise, g, w_project, of_d, None)
    return (
        *_backward_project_fake(*arguments, block),
        *_backward_expand_fake(*arguments, None, w_input, block),
    )


def _backward_project_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, gate, block):
    e = _hidden(block)
    size = (2, e) if gate is None else (x.shape[0], 5, of_d.shape[1])
    return x.new_empty(size, dtype=torch.float64), x.new_empty(g.shape[1], e)


def _backward_expand_fake(x, w_expand, b_expand, w_depthwise, g, w_project, of_d, gate, of_pooled, w_input, block):
    e, taps = _hidden(block), w_depthwise.shape[1]
    channels = 0 if w_expand is None else x.shape[1]
    g_x = x.new_empty(0) if channels and w_input is None else _like(x)
    return g_x, x.new_empty(1, e, dtype=torch.float64), x.new_empty(channels, e), x.new_empty(taps, e)


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _moments_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.float64)


def _patches_fake(x: Tensor, mean: Tensor | None) -> Tensor:
    n, c, height, width = x.shape
    return x.new_empty(n, 9 * c, stem_size(height), stem_size(width)).contiguous(memory_format=torch.channels_last)


def _centre_fake(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    return (
        x.new_empty(0) if mean is None else _like(x),
        x.new_empty(1, c, dtype=torch.float64),
        x.new_empty(c, c, dtype=torch.float64),
    )


_FAKES: dict[str, Any] = {
    "training_statistics": _statistics_fake,
    "training_pool": _pool_fake,
    "training_project": _project_fake,
    "training_backward_project": _backward_project_fake,
    "training_backward_expand": _backward_expand_fake,
    "training_forward": _forward_fake,
    "training_backward": _backward_fake,
    "training_moments": _moments_fake,
    "training_patches": _patches_fake,
    "training_centre": _centre_fake,
    "training_normalise": _like,
    "training_gradient_sums": _moments_fake,
    "training_gradient": _like,
}


def _out_size(block: dict[str, int]) -> tuple[int, int]:
    height, width = block["height"], block["width"]
    left, right, top, bottom = (block[f"pad_{side}"] for side in ("left", "right", "top", "bottom"))
    extent, stride = block["dilation"] * (block["kernel"] - 1) + 1, block["stride"]
    columns = (width + left + right - extent) // (block["column_stride"] or stride) + 1
    return (height + top + bottom - extent) // stride + 1, columns


def _counted(expand: int, depthwise: int, project: int) -> Callable[..., int]:
    """Multiply-adds of a pass that computes each product so many times; of the other arguments ``block`` is last."""

    def count(x: Tensor, w_expand: Tensor | None, b_expand: Tensor | None, w_depthwise: Tensor, *others: Any) -> int:
        block = dict(zip(BLOCK_FIELDS, others[-1], strict=True))
        height, width = block["height"], block["width"]
        rows, columns = _out_size(block)
        terms = 0 if w_expand is None else expand * x.shape[1] * height * width
        after = depthwise * block["kernel"] ** 2 + project * block["out_channels"]
        return x.shape[0] * block["hidden_channels"] * (terms + after * rows * columns)

    return count


def _forward_count(*arguments: Any) -> int:
    gated = arguments[6] is None  # w_output
    return _counted(1, 1, 0 if gated else 1)(*arguments)


def _backward_count(*arguments: Any) -> int:
    """Where act(e) does not tell the derivative, the second pass expands again."""
    block = dict(zip(BLOCK_FIELDS, arguments[-1], strict=True))
    clips = ACTIVATIONS[block["expand_activation"]] in CLIPS
    return _counted(3 if clips else 4, 3, 2)(*arguments)


def _none(*_: Any) -> int:
    return 0


_COUNTS: dict[str, Callable[..., int]] = {
    "training_statistics": _counted(1, 1, 0),
    "training_pool": _counted(1, 1, 0),
    "training_project": _counted(1, 1, 1),
    "training_forward": _forward_count,
    "training_backward": _backward_count,
    "training_backward_project": _counted(1, 1, 2),
    "training_backward_expand": _counted(3, 3, 1),
    "training_centre": lambda x, mean: x.numel() * x.shape[1],
}


if backends._C is not None:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"mnv2_fused::{_name}", _fake)
        count_flops(getattr(torch.ops.mnv2_fused, _name), _COUNTS.get(_name, _none))
