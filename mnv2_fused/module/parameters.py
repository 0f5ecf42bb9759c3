"""The tensors that a block's weights come from, and folding them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..fold import BlockWeights, ConvNorm, PackedWeights, conv_norms, pack
from .guard import readable


def fold_and_pack(
    sources: list[Tensor | None], eps: list[float], dtype: torch.dtype, backend: str = "auto"
) -> PackedWeights:
    """Packed weights of a block for activations of ``dtype``.

    ``sources``: the block's tensors in a row, as :func:`mnv2_fused.fold.conv_norms` reads them; ``eps``: the norms',
    one number a stage, 0 without a norm. Raises RuntimeError where the memory of one of them was freed.
    """
    refuse_freed(sources)
    stages, squeeze = conv_norms(sources, len(eps))
    folded: list[Tensor | None] = [] if len(eps) == 3 else [None, None]
    for conv, e in zip([*stages, *squeeze], [*eps, 0.0, 0.0], strict=False):
        folded += conv.folded(e)
    return pack(BlockWeights(*folded), dtype, backend)


def parameters_of(conv: nn.Conv2d, norm: nn.Module | None) -> ConvNorm:
    """The tensors of a convolution and its norm now, straight from the modules' dictionaries.

    ``nn.Module.__getattr__`` costs more than all else that a prepared call looks at.
    """
    if norm is None:
        return ConvNorm(conv._parameters["weight"], conv._parameters["bias"])
    of_norm = norm._buffers if "weight" in norm._buffers else norm._parameters
    return ConvNorm(
        conv._parameters["weight"],
        conv._parameters["bias"],
        of_norm["weight"],
        of_norm["bias"],
        norm._buffers["running_mean"],
        norm._buffers["running_var"],
    )


def trackable(tensors: Iterable[Tensor]) -> bool:
    """Whether a guard can see changes of these tensors.

    An inference tensor has no version: on a CPU its memory tells, on a GPU nothing does. A wrapper around other tensors
    has no memory, and its version does not count what is written to those.
    """
    return all(readable(t) or t.numel() == 0 if t.is_cpu else not t.is_inference() for t in tensors)


def refuse_freed(sources: Iterable[Tensor | None]) -> None:
    """Raises RuntimeError where the memory of a weight was freed: reading it would crash."""
    if not torch.compiler.is_compiling() and any(map(freed, sources)):
        raise RuntimeError(
            "a weight's data is not allocated: its storage was resized to less than it holds; load the weights again "
            "before fusing, freezing or calling the model"
        )


def freed(t: Tensor | None) -> bool:
    """Whether the storage of an ordinary CPU tensor is too small for it, as a storage's ``resize_`` leaves it."""
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.numel() > 0 and not readable(t)
