"""Packed weights that follow the tensors they came from."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .guard import Guard
from .parameters import fold_and_pack, trackable


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is made now, is there once that is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _in_a_graphs_pool(tensor: Tensor) -> bool:
    """Whether the memory of a tensor on a GPU belongs to a pool, as what CUDA graphs of torch.compile use, on trial
    runs too: all in there has to be known to them.
    """
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment["segment_pool_id"]) != (0, 0)
    return False


def cacheable(made: Tensor, in_graph: bool = False) -> bool:
    """Whether folded weights may be kept for later calls: not what a CUDA graph makes, under capture or on trial.

    Waits until they are there, since a call on another stream would not.
    """
    if capturing(made.device):
        return False
    if made.device.type == "cuda":
        if in_graph and _in_a_graphs_pool(made):
            return False
        torch.cuda.current_stream(made.device).synchronize()
    return True


_Packed = Sequence[Tensor | None]


class _Kept(NamedTuple):
    """Packed weights, and of what and how they were made."""

    key: list[Any]
    guard: Guard  # of the tensors they were made of
    packed: _Packed
    sites: frozenset[int] | None  # of graphs that saw this state once; None: it is sure to last

    def serves(self, site: int | None) -> bool:
        """Whether an op at this site of a graph, or a call outside of graphs (None), may use them as they are."""
        return self.sites is None or site in self.sites


class PackedCache:
    """Packed weights of one module, valid while the tensors they came from stay what they were.

    By its ``token`` an op of a compiled graph finds it, since a graph can hold a number but not an object. Each such op
    has a number, too, its site. For a graph that changes weights in place counts that once, before it runs, and writes
    without counting: what an op folds then may be old before anything tells. Only an op that finds a state a second
    time, in another run of its graph that is, knows that its graph changes nothing.
    """

    _by_token: ClassVar[weakref.WeakValueDictionary[int, PackedCache]] = weakref.WeakValueDictionary()
    _tokens: ClassVar[Iterator[int]] = itertools.count()
    _sites: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        own: Callable[[], tuple[list[Tensor | None], list[float]]] | None = None,
        fold: Callable[..., _Packed] | None = None,
        forgotten: Callable[[], list[int]] | None = None,
    ) -> None:
        """``own``: the module's parameters and eps as they are now, for graphs; ``fold``: a function of the same
        arguments that makes the weights instead of :func:`fold_and_pack`; ``forgotten``: counts, any of which ends what
        was kept.
        """
        self._own = own
        self._fold = fold
        self._forgotten = forgotten
        self._kept: _Kept | None = None  # one value, so that threads see it whole
        self._cleared = 0  # what another thread folded meanwhile was made before
        self._captured: list[_Packed] = []
        self.token: int = next(self._tokens)
        self._by_token[self.token] = self

    @classmethod
    def of(cls, token: int) -> PackedCache | None:
        """That of this token; None once its module is gone."""
        return cls._by_token.get(token)

    def clear(self) -> None:
        self._cleared += 1
        self._kept = None

    def hold_if_captured(self, packed: _Packed) -> _Packed:
        """Keeps weights on a GPU alive for good that a CUDA graph is now being captured with: it reads them there."""
        if capturing(_one_of(packed).device) and not any(held is packed for held in self._captured):
            self._captured.append(packed)
        return packed

    def get(
        self,
        parameters: list[Tensor | None],
        eps: list[float],
        dtype: torch.dtype,
        backend: str = "auto",
        site: int | None = None,
    ) -> _Packed:
        """Arguments as those of :func:`fold_and_pack`, which runs when any of them changed.

        ``site``: of the op that calls, in a compiled graph. The graph's memory may be its own, and what it computes is
        written without torch's counting: only of what is the module's own is anything kept.
        """
        tensors = [t for t in parameters if t is not None]
        fold = self._fold or fold_and_pack
        key = [dtype, backend, *eps, self._cleared, *(self._forgotten() if self._forgotten else ())]
        kept = self._kept
        if kept is not None and kept.serves(site) and _is_current(kept, key, tensors):
            return self._used(kept)
        if site is not None:
            own = [] if self._own is None else [t for t in self._own()[0] if t is not None]
            if len(own) != len(tensors) or not all(map(_same_place, own, tensors)):
                return fold(parameters, eps, dtype, backend)
            tensors = own  # which count their versions
        if not trackable(tensors):
            return fold(parameters, eps, dtype, backend)
        current = kept if kept is not None and _is_current(kept, key, tensors) else None
        if current is not None and current.serves(site):
            return self._used(current)
        guard = Guard(tensors)  # before folding, so that what is written meanwhile is noticed
        # Ordinary tensors, that a later call's derivative may keep.
        with torch.inference_mode(False), torch.no_grad():
            packed = fold(parameters, eps, dtype, backend)
        if not cacheable(_one_of(packed), site is not None):
            return packed
        seen = frozenset() if current is None or current.sites is None else current.sites
        sites = None if site is None else seen | {site}
        self._kept = _Kept(key, guard, packed, sites)
        return self.hold_if_captured(packed)

    def _used(self, kept: _Kept) -> _Packed:
        if kept.sites is not None:
            self._kept = kept._replace(sites=None)
        return self.hold_if_captured(kept.packed)

    def fold_ahead(self, dtype: torch.dtype, backend: str) -> int:
        """Of the module's own, if they are tensors that a graph could be given. Returns a new site."""
        assert self._own is not None  # every module's cache that a graph finds has it
        parameters, eps = self._own()
        if all(t is None or type(t) in (Tensor, nn.Parameter) for t in parameters):
            self.get(parameters, eps, dtype, backend)
        return next(self._sites)

    def keeps(self, packed: _Packed) -> bool:
        """Whether they are what it keeps now."""
        kept = self._kept
        return kept is not None and kept.packed is packed


@torch.compiler.assume_constant_result
def fold_ahead(token: int, dtype: torch.dtype, backend: str) -> int:
    """Folds while a graph is traced. Its first run may own the memory of all that it makes, and may be a capture.

    Returns the site of an op that is to be put into that graph.
    """
    cache = PackedCache.of(token)
    assert cache is not None  # its module is being traced
    return cache.fold_ahead(dtype, backend)


def _is_current(kept: _Kept, key: list[Any], tensors: list[Tensor]) -> bool:
    """Whether what is kept was made so, of these very tensors, and none of them has changed."""
    of = kept.guard.tensors
    if key != kept.key or len(tensors) != len(of) or not all(map(operator.is_, tensors, of)):
        return False
    if kept.guard.is_valid():
        return True
    kept.guard.warn_if_late()
    return False


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _one_of(packed: _Packed) -> Tensor:
    """They were made together, on one device."""
    return next(t for t in packed if t is not None)
