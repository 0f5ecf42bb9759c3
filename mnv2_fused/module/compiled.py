"""A block in a compiled graph: what the trace asks, and the op that the graph calls."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..backends import within_functorch
from ..encoding import make_spec, spec_of_rest
from ..flops import count_flops, multiply_adds
from ..fold import PackedWeights
from ..spec import BlockSpec
from ..tensors import empty_output
from .packed_cache import PackedCache


@torch.compiler.assume_constant_result
def _within_functorch() -> bool:
    """Dynamo guards a graph by it."""
    return within_functorch()


def tracing_transform() -> bool:
    """:func:`mnv2_fused.backends.transformed` of what is being traced."""
    return _within_functorch() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def tracing_export() -> bool:
    """Of the trace that is going on; dynamo itself takes ``is_exporting()`` for True in every trace."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def tracing_onnx() -> bool:
    """Of an export for other runtimes, which know torch's own operators alone."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def op_choices(spec: BlockSpec, x: Tensor) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Plan and options of a block's op. Written out in exported programs: AOTInductor (torch 2.11 to 2.13) hands an
    empty list over as None.
    """
    exported = torch.compiler.is_compiling() and tracing_export()
    return ((0,) if exported else ()), spec.options(*x.shape[2:], written_out=exported)


@torch.compiler.assume_constant_result
def note_export() -> bool:
    """Says, once a process, what exporting a model whose weights may change costs."""
    _warn_of_folding()
    return True


@functools.cache
def _warn_of_folding() -> None:
    warnings.warn(
        "an exported program of fused blocks folds their weights at every call; export fuse(model, frozen=True) for "
        "one that keeps them folded, and runs neighbouring layers as one operation; quantisers find no convolutions in "
        "either: unfuse(model) first",
        stacklevel=2,
    )


# What a compiled graph calls in inference: it sees the parameters themselves, so a change in place is noticed
# there too, and folding stays out of the graph. No autograd: FusedInvertedResidual folds in the graph for that.
_library = torch.library.Library("mnv2_fused", "FRAGMENT")
_library.define(
    "cached_inverted_residual(Tensor x, Tensor?[] sources, float[] eps, int stride, bool residual, int cache, "
    'str backend="cpu", int[] rest=[], int site=-1) -> Tensor'
)


def _cached_inverted_residual(  # by the schema's names
    x, sources, eps, stride, residual, cache, backend="cpu", rest=(), site=-1
):
    found = PackedCache.of(cache) or PackedCache()
    packed = found.get(sources, eps, x.dtype, backend, site)
    assert isinstance(packed, PackedWeights)
    op_options = spec_of_rest(sources, len(eps), stride, residual, rest).options(*x.shape[2:]) if rest else ()
    return ops.packed_inverted_residual(x, packed, stride, residual, backend=backend, op_options=op_options)


_library.impl("cached_inverted_residual", _cached_inverted_residual, "CompositeExplicitAutograd")
_library.impl(
    "cached_inverted_residual",
    ops.autocast_rule(torch.ops.mnv2_fused.cached_inverted_residual.default),
    "AutocastCPU",
)
_library.impl(
    "cached_inverted_residual",
    ops.half_autocast_rule(torch.ops.mnv2_fused.cached_inverted_residual.default, "CUDA"),
    "AutocastCUDA",
)


@torch.library.register_fake("mnv2_fused::cached_inverted_residual")
def _fake(x, sources, eps, stride, residual, cache, backend="cpu", rest=(), site=-1):
    spec = spec_of_rest(
        sources, len(eps), stride, residual, rest, make_spec
    )  # sizes may be symbols, which have no hash
    return empty_output(x, spec.out_channels, spec.out_size(*x.shape[2:]))


def _multiply_adds(x, sources, eps, stride, residual, cache, backend="cpu", rest=(), site=-1):
    return multiply_adds(spec_of_rest(sources, len(eps), stride, residual, rest), x.shape)


count_flops(torch.ops.mnv2_fused.cached_inverted_residual, _multiply_adds)
