"""What every fused block is: folded weights that follow its modules, and which way a call takes."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import backends, ops
from ..encoding import op_rest
from ..fold import PackedWeights, conv_norms, packed_dtypes
from ..ops import kernel_for
from ..spec import BlockSpec
from ..tensors import check_input
from . import reading
from .compiled import tracing_export, tracing_transform
from .guard import Guard, watch_optimizers
from .packed_cache import PackedCache, fold_ahead
from .parameters import fold_and_pack, freed, parameters_of, trackable
from .reading import Parts, Unfusable
from .training import Recomputed, unfolded

Reader = Callable[[nn.Module], Parts]  # raises Unfusable


class PreparedCall:
    """A block found fit to run fused on ``packed``, while its ``guard`` is valid."""

    def __init__(self, block: FusedBlock, sources: list[Tensor | None], guard: Guard | None, backend: str) -> None:
        self.backend = backend
        self.is_cpu = sources[0].is_cpu
        self.sources = sources
        self.tensors = [t for t in sources if t is not None]
        self.eps = block._eps()
        self.dtype = sources[0].dtype
        # What stochastic depth comes before the sum with x is not the kernel's now.
        self.beside = block._beside if reading.drops_now(block._beside) else ()
        self.spec = spec = dataclasses.replace(block.spec, residual=False) if self.beside else block.spec
        self.stride, self.residual = spec.stride, spec.residual
        # The op's, where they do not rest on the image's size.
        self.options = None if spec.padding == "same" and spec.stride > 1 else spec.options(8, 8)
        self.guard = guard
        self.packed: PackedWeights | None = None


# By the tokens of their caches, for what is asked while a graph is traced.
_blocks: weakref.WeakValueDictionary[int, FusedBlock] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result
def _why_modules(token: int) -> str | None:
    """Asked once per graph: dynamo cannot trace the look at hooks and types."""
    return _blocks[token].why_modules()


class FusedBlock(nn.Module):
    """What every fused block is, whatever family it comes from: in eval one kernel on weights that follow its modules.

    A subclass says what is inside (``_read``, which may raise Unfusable) and how the ordinary modules run
    (``_forward_modules``).
    """

    _read: Callable[[], Parts]
    _forward_modules: Callable[[Tensor], Tensor]

    def _start(self, backend: str, recompute: bool) -> None:
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {backend!r}")
        watch_optimizers()
        self.backend = backend
        self.recompute = recompute
        self._warned = False
        self._forgotten = 0
        self._look_inside()
        if self._objection is not None:
            raise ValueError(f"{self._objection}; leave this block unfused")
        self._reset_cache()

    def _inside(self) -> list[nn.Module]:
        """The modules that a kernel stands in for."""
        inside = list(self.modules())[1:]
        if self.in_front is None:
            return inside
        others = set(self.in_front.modules())
        return [m for m in inside if m not in others]

    @property
    def in_front(self) -> nn.Module | None:
        """A child that forward runs first, as it is."""
        return None

    def _look_inside(self) -> None:
        """Notes what the inner modules are, and why the fused op could not stand in for them."""
        objection = next(reading.inner_objections(self._inside()), None)
        parts = None
        try:
            parts = self._read()
        except Unfusable as why:
            objection = objection or str(why)
        # Only now, and never to nothing in between: another thread may run this block.
        self._objection = objection
        # (convolution, norm) of each stage: [expand,] depthwise, project.
        self._pairs: tuple[tuple[nn.Conv2d, nn.Module | None], ...] = parts.stages if parts else ()
        self._squeeze: tuple[nn.Conv2d, ...] = (parts.squeeze or ()) if parts else ()
        self._dropouts: tuple[nn.Module, ...] = parts.dropouts if parts else ()
        self._beside: tuple[nn.Module, ...] = parts.beside if parts else ()
        self._spec: BlockSpec | None = parts.spec if parts else None
        self._rest = op_rest(parts.spec) if parts else []

    def why_modules(self) -> str | None:
        """Why the inner modules run one by one even in eval, because of how they were changed; None if they don't."""
        self._look_inside()
        return self._objection

    def _reset_cache(self) -> None:
        self._ready: PreparedCall | None = None
        sources = weakref.WeakMethod(self._sources)
        self._cache = PackedCache(lambda: sources()())  # who asks has the block
        self._token = self._cache.token
        _blocks[self._token] = self

    # What it knows of its modules, and all that a fused block has beside what its original had.
    _FOUND = (
        *("_ready", "_cache", "_token", "_objection", "_pairs"),
        *("_squeeze", "_dropouts", "_beside", "_spec", "_rest"),
    )
    OWN = (*_FOUND, "backend", "recompute", "_warned", "_forgotten", "_original")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in self._FOUND:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_inside()
        self._reset_cache()

    def _replicate_for_data_parallel(self) -> FusedBlock:
        self._warn("nn.DataParallel's replicas run inverted residuals unfused: use DistributedDataParallel")
        replica = super()._replicate_for_data_parallel()
        # Its weights are others in every call, and what is known is of these.
        replica.backend, replica.recompute, replica._ready = "eager", False, None
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedBlock:
        self._forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FusedBlock:
        self._forget()
        return super().train(mode)

    @property
    def spec(self) -> BlockSpec | None:
        """None where the layers were changed beyond recognition."""
        return self._spec

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}{self._objection or self.spec}, backend={self.backend}"

    def _forget(self) -> None:
        self._forgotten += 1  # seen by a sequence that runs this block
        self._ready = None
        self._cache.clear()

    def forward(self, x: Tensor) -> Tensor:  # [N, C_in, H, W] -> [N, C_out, H', W']
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
        ready = self._ready
        if backends.transformed():
            return self._forward_modules(x)
        if ready is None or x.dtype is not ready.dtype or x.is_cpu is not ready.is_cpu or not ready.guard.is_valid():
            if ready is not None and ready.guard is not None:
                ready.guard.warn_if_late()
            # Mode and backend are looked at here only: while the guard is valid, they are what they were.
            if self._trains():
                return self._forward_training(x)
            ready = self._prepare(x)
            if ready is None:
                return self._forward_modules(x)
        if not ready.is_cpu:
            self._cache.hold_if_captured(ready.packed)
        options = ready.options
        try:
            if options is None:
                options = ready.spec.options(*x.shape[2:])
            if torch.is_grad_enabled() and any(t.requires_grad for t in ready.tensors):
                run = functools.partial(
                    ops.packed_inverted_residual,
                    **{"packed": ready.packed, "stride": ready.stride, "residual": ready.residual},
                    **{"backend": ready.backend, "options": options},
                )
                y = Recomputed.apply(x, run, ready.eps, ready.spec, (False,) * 3, *ready.sources)
            else:
                y = ops.packed_inverted_residual(
                    x, ready.packed, ready.stride, ready.residual, backend=ready.backend, options=options
                )
        except (RuntimeError, TypeError):
            check_input(x, ready.spec.in_channels, ready.spec)  # says it better, if x is what is wrong
            raise
        return self._sum(x, y, ready.beside) if ready.beside else y

    @staticmethod
    def _sum(x: Tensor, y: Tensor, beside: tuple[nn.Module, ...]) -> Tensor:
        for module in beside:
            y = module(y)
        return y + x

    def _forward_training(self, x: Tensor) -> Tensor:
        """With statistics of the batch, or dropouts: by the modules, or, with ``recompute``, keeping x alone."""
        if not self.recompute or not torch.is_grad_enabled():
            return self._forward_modules(x)
        why = self.why_modules()
        if why is None and reading.drops_now(self._dropouts):
            why = "it has dropouts between its layers, which would drop others the second time"
        synced = any(isinstance(norm, nn.SyncBatchNorm) and norm.training for _, norm in self._pairs)
        if why is None and synced and torch.distributed.is_initialized():
            why = "a SyncBatchNorm would exchange its statistics a second time"
        if why is not None:
            self._warn(f"an inverted residual keeps what recompute=True would not: {why}")
            return self._forward_modules(x)
        sources, eps = self._sources()
        if not (x.requires_grad or any(t is not None and t.requires_grad for t in sources)):
            return self._forward_modules(x)
        norms = [norm for _, norm in self._pairs]
        batch = tuple(norm is not None and norm.training and bool(norm._parameters) for norm in norms)
        stages, squeeze = conv_norms(sources, len(batch))
        stages = [s._replace(mean=None, variance=None) if b else s for s, b in zip(stages, batch, strict=True)]
        sources = [t for stage in stages for t in stage] + [t for conv in squeeze for t in conv[:2]]
        beside = self._beside if reading.drops_now(self._beside) else ()
        spec = dataclasses.replace(self._spec, residual=False) if beside else self._spec
        check_input(x, spec.in_channels, spec)
        run = functools.partial(unfolded, sources=sources, eps=eps, spec=spec, batch=batch, norms=norms)
        y = Recomputed.apply(x, run, eps, spec, batch, *sources)
        return self._sum(x, y, beside) if beside else y

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=4)

    def _prepare(self, x: Tensor) -> PreparedCall | None:
        """Looks at everything and folds what changed; None when the inner modules must run."""
        backend = backends.resolve_backend(self.backend, x.device)
        if backend == "eager":
            return None
        next_hook = RemovableHandle.next_id  # before looking, so that what changes meanwhile is noticed next time
        why = self.why_modules()
        if why is None:
            backend, why = kernel_for(self._spec, self.backend, x.device)
        if why is not None:
            self._warn(f"an inverted residual runs unfused: {why}")
            return None
        if self._trains():  # only now seen, if its layers were replaced
            return None
        sources, _ = self._sources()
        if any(map(freed, sources)):  # the modules' own kernels say so
            return None
        guard = Guard.of_modules([self], next_hook) if trackable(t for t in sources if t is not None) else None
        # Again: a guard takes for unchanged what another thread changed before it was there.
        if self.why_modules() is not None or self._trains():
            return None
        sources, eps = self._sources()
        ready = PreparedCall(self, sources, guard, backend)
        dtype = self._compute_dtype(x, sources, backend)
        ready.packed = self._cache.get(sources, eps, dtype, backend)
        # Else autocast allows it, for now; or a CUDA graph is being captured.
        if guard is not None and x.dtype == ready.dtype == dtype and self._cache.keeps(ready.packed):
            self._ready = ready
        return ready

    def fits_sequence(self) -> bool:
        """Whether a sequence may run this block in eval, as long as it guards it."""
        if self.training or self.why_modules() is not None or self._trains() or self.in_front is not None:
            return False
        if reading.drops_now(self._beside):
            return False
        sources, _ = self._sources()
        dtype, device = sources[0].dtype, sources[0].device
        # In one run, every product's weights are packed alike.
        alike = packed_dtypes(dtype, device, self.spec.hidden_channels) == packed_dtypes(dtype, device)
        return alike and trackable(t for t in sources if t is not None)

    def _trains(self) -> bool:
        """Whether something inside needs the whole tensor now: statistics of the batch, or dropout."""
        if any(norm is not None and norm.training and norm._parameters for _, norm in self._pairs):
            return True  # FrozenBatchNorm2d has no parameters
        return bool(self._dropouts) and reading.drops_now(self._dropouts)

    def _eps(self) -> list[float]:
        return [0.0 if norm is None else norm.eps for _, norm in self._pairs]

    def _sources(self) -> tuple[list[Tensor | None], list[float]]:
        sources: list[Tensor | None] = []
        for pair in self._pairs:
            sources.extend(parameters_of(*pair))
        for conv in self._squeeze:
            sources.extend(parameters_of(conv, None)[:2])
        return sources, self._eps()

    def _compute_dtype(self, x: Tensor, sources: list[Tensor | None], backend: str) -> torch.dtype:
        dtype, device = sources[0].dtype, x.device.type
        autocast = torch.is_autocast_enabled(device)
        if x.dtype != dtype and not autocast:
            raise TypeError(
                f"x is {x.dtype} but the block's parameters are {dtype}; convert one of them or use autocast"
            )
        if x.dtype == torch.float64:
            return x.dtype
        return torch.get_autocast_dtype(device) if autocast and backend in ("cuda", "triton") else dtype

    def _forward_compiled(self, x: Tensor) -> Tensor:
        if backends.resolve_backend(self.backend, x.device) == "eager" or tracing_transform():
            return self._forward_modules(x)
        # First, since it looks inside again.
        if _why_modules(self._token) is not None or self._trains() or reading.drops_now(self._beside):
            return self._forward_modules(x)
        spec = self._spec
        backend, _ = kernel_for(spec, self.backend, x.device)
        if backend == "eager":
            return self._forward_modules(x)
        sources, eps = self._sources()
        dtype = self._compute_dtype(x, sources, backend)
        check_input(x, spec.in_channels, spec)
        recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *sources))
        if recording or tracing_export():
            # Folding goes into the graph: differentiable, and an exported program owns its weights.
            packed = fold_and_pack(sources, eps, dtype, backend)
            options = spec.options(*x.shape[2:]) if self._rest else ()
            return ops.packed_inverted_residual(x, packed, spec.stride, spec.residual, backend=backend, options=options)
        site = fold_ahead(self._token, dtype, backend)
        return torch.ops.mnv2_fused.cached_inverted_residual(
            x, sources, eps, spec.stride, spec.residual, self._token, backend, self._rest, site
        )
