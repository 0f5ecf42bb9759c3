"""The tensors that a block's weights come from, and folding them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..fold import BlockWeights, ConvNorm, PackedWeights, conv_norms, pack_block
from .guard import readable


def fold_and_pack(
    parameters: list[Tensor | None], eps: list[float], dtype: torch.dtype, backend: str = "auto"
) -> PackedWeights:
    """Packed weights of a block for activations of ``dtype``.

    ``parameters``: the block's tensors in a row, as :func:`mnv2_fused.fold.conv_norms` reads them; ``eps``: the norms',
    one number a stage, 0 without a norm. Raises RuntimeError where the memory of one of them was freed.
    """
    refuse_freed(parameters)
    stages, squeeze = conv_norms(parameters, len(eps))
    *expand, depthwise, project = [conv.folded(e) for conv, e in zip(stages, eps, strict=True)]
    w_expand, b_expand = expand[0] if expand else (None, None)
    of_squeeze = [t for conv in squeeze for t in conv.folded(0.0)]
    return pack_block(BlockWeights(w_expand, b_expand, *depthwise, *project, *of_squeeze), dtype, backend)


class Norm(Protocol):
    """What folding reads of a batch norm, of whatever class; statistics lie among the buffers."""

    eps: float
    training: bool
    _parameters: dict[str, nn.Parameter | None]
    _buffers: dict[str, Tensor | None]


def parameters_of(conv: nn.Conv2d, norm: Norm | None) -> ConvNorm:
    """The tensors of a convolution and its norm now, straight from the modules' dictionaries.

    ``nn.Module.__getattr__`` costs more than all else that a prepared call looks at.
    """
    weight = conv._parameters["weight"]
    assert weight is not None  # a convolution has one
    if norm is None:
        return ConvNorm(weight, conv._parameters["bias"])
    of_norm = norm._buffers if "weight" in norm._buffers else norm._parameters
    return ConvNorm(
        weight,
        conv._parameters["bias"],
        of_norm["weight"],
        of_norm["bias"],
        norm._buffers["running_mean"],
        norm._buffers["running_var"],
    )


def conv_norm_activation(layer: nn.Module) -> tuple[nn.Conv2d, Norm, nn.Module]:
    """What a network's stem or head consists of."""
    assert isinstance(layer, nn.Sequential)
    conv, norm, activation = layer
    assert isinstance(conv, nn.Conv2d)
    return conv, cast(Norm, norm), activation


def first_weight(parameters: Sequence[Tensor | None]) -> Tensor:
    """Of a block's tensors in a row, the one whose dtype and device are the block's."""
    weight = parameters[0]
    assert weight is not None  # a convolution has one
    return weight


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
    if t is None or type(t) not in (Tensor, nn.Parameter):
        return False
    return t.is_cpu and t.numel() > 0 and not readable(t)
