"""The weights of layers in a row, folded and joined as one call takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..encoding import SQUEEZE_CHANNELS, LayerKind, split_layers
from ..fold import ConvNorm, eps_of, pack_conv, pack_stem
from ..module.fused_block import FusedBlock
from ..module.parameters import conv_norm_activation, fold_and_pack, parameters_of, refuse_freed


def layer_parameters(modules: Iterable[nn.Module]) -> tuple[list[Tensor | None], list[float]]:
    """What the weights of layers in a row are made of, as :func:`fold_layers` takes them, and the norms' eps.

    Pooling, dropout and the like have none.
    """
    tensors: list[Tensor | None] = []
    eps: list[float] = []
    for module in modules:
        if isinstance(module, FusedBlock):
            of_block, of_norms = module._fold_parameters()
            tensors += of_block
            eps += of_norms
        elif isinstance(module, nn.Linear):
            tensors += [module.weight, module.bias]
        elif isinstance(module, nn.Sequential):
            conv, norm, _ = conv_norm_activation(module)
            tensors.extend(parameters_of(conv, norm))
            eps.append(eps_of(norm))
    return tensors, eps


def fold_layers(
    geometry: Sequence[int], parameters: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, backend: str
) -> Tensor:
    """The weights of ``geometry``, the op's ``layers``, for the kernels of ``backend``, "cpu" or "cuda": [bytes]."""
    refuse_freed(parameters)
    tensors, epsilons = iter(parameters), iter(eps)
    packed: list[Tensor | None] = []

    def conv_and_norm() -> tuple[Tensor, Tensor]:
        return ConvNorm._make(itertools.islice(tensors, len(ConvNorm._fields))).folded(next(epsilons))

    with torch.no_grad():
        for (kind, *_), op_options in split_layers(geometry):
            if kind == LayerKind.STEM_AND_BLOCK:
                packed += (pack_stem if backend == "cuda" else pack_conv)(*conv_and_norm(), dtype)
            if kind <= LayerKind.STEM_AND_BLOCK:
                stages = 3 if kind == LayerKind.BLOCK else 2
                squeezed = 4 if op_options and op_options[SQUEEZE_CHANNELS] else 0
                of_block = list(itertools.islice(tensors, len(ConvNorm._fields) * stages + squeezed))
                packed += fold_and_pack(of_block, list(itertools.islice(epsilons, stages)), dtype, backend)
            elif kind == LayerKind.LINEAR:
                weight, bias = itertools.islice(tensors, 2)
                assert weight is not None  # a linear layer has one
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                packed += pack_conv(weight[:, :, None, None], bias, dtype)
            else:
                packed += pack_conv(*conv_and_norm(), dtype)
        return join([t for t in packed if t is not None])


def join(packed: Sequence[Tensor]) -> Tensor:
    """Packed tensors of several layers one after the other, as ``mnv2_fused::sequence`` takes them: [bytes].

    One tensor where a network has a hundred, so that a call has one to look at, on the CPU in huge pages where the
    system has them: weights are read once a call, and more pages than the processor's address caches hold would be
    looked up anew each time.
    """
    rows = [t.detach().contiguous().flatten().view(torch.uint8) for t in packed]
    ends = list(itertools.accumulate(-(-row.numel() // _ALIGNMENT) * _ALIGNMENT for row in rows))
    if not rows[0].is_cpu:
        return torch.cat([F.pad(row, (0, -row.numel() % _ALIGNMENT)) for row in rows])
    room = torch.empty(ends[-1] + _HUGE_PAGE, dtype=torch.uint8)
    joined = room[-room.data_ptr() % _HUGE_PAGE :][: ends[-1]]
    if backends._C is not None:
        backends._C.advise_huge_pages(joined.data_ptr(), joined.numel())
    for row, begin, end in zip(rows, [0, *ends[:-1]], ends, strict=True):
        joined[begin : begin + row.numel()] = row
        joined[begin + row.numel() : end] = 0
    return joined


_ALIGNMENT = 64  # bytes, of every tensor among those joined: a cache line


_HUGE_PAGE = 2**21
