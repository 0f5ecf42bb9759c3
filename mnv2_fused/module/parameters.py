"""The tensors that a block's weights come from, and folding them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..fold import BlockWeights, PackedWeights, fold_conv_bn, pack


def fold_and_pack(
    sources: list[Tensor | None], eps: list[float], dtype: torch.dtype, backend: str = "auto"
) -> PackedWeights:
    """``sources`` are six per convolution: weight, bias, and the norm's weight, bias, mean, variance, all four None
    without a norm. Behind them weight and bias of both products of a squeeze-and-excite, if there is one.
    """
    folded: list[Tensor | None] = [] if len(eps) == 3 else [None, None]
    for i, e in enumerate(eps):
        stage = sources[6 * i : 6 * i + 6]
        folded += _plain_weights(*stage[:2]) if stage[4] is None else fold_conv_bn(*stage, e)
    squeeze = sources[6 * len(eps) :]
    for i in range(0, len(squeeze), 2):
        folded += _plain_weights(*squeeze[i : i + 2])
    return pack(BlockWeights(*folded), dtype, backend)


def _plain_weights(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, zeros for a missing bias."""
    return weight.double(), weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()


def parameters_of(conv: nn.Conv2d, norm: nn.Module | None) -> list[Tensor | None]:
    # Straight from the dictionaries: nn.Module.__getattr__ costs more than the rest of the check.
    if norm is None:
        return [conv._parameters["weight"], conv._parameters["bias"], None, None, None, None]
    of_norm = norm._buffers if "weight" in norm._buffers else norm._parameters
    return [
        conv._parameters["weight"],
        conv._parameters["bias"],
        of_norm["weight"],
        of_norm["bias"],
        norm._buffers["running_mean"],
        norm._buffers["running_var"],
    ]


def lasting(tensors: Iterable[Tensor]) -> bool:
    """Whether changes of these tensors can be seen at all.

    Inference tensors count no versions; other processes change shared ones without counting here. (Of every CUDA tensor
    ``is_shared`` is True.)
    """
    return not any(t.is_inference() or (t.device.type == "cpu" and t.is_shared()) for t in tensors)
