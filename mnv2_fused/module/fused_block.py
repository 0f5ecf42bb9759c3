"""What every fused block is: folded weights that follow its modules, and which way a call takes."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import backends, ops, training_ops
from ..activations import function_of
from ..encoding import op_rest
from ..fold import PackedWeights, conv_norms, eps_of, packed_dtypes
from ..spec import BlockSpec
from ..tensors import check_input, check_tensor
from . import reading
from .compiled import note_export, op_choices, tracing_export, tracing_onnx, tracing_transform
from .guard import Guard, watch_optimizers
from .packed_cache import PackedCache, fold_ahead
from .parameters import Norm, first_weight, fold_and_pack, freed, parameters_of, trackable
from .prepared import PreparedCall, without_sum
from .reading import Parts, Unfusable
from .training import (
    TRAINED_DTYPES,
    BatchNorm,
    Recomputed,
    input_objection,
    is_live,
    train_fused,
    unfolded,
)

SCRIPTED = (
    "torch.jit.script puts ordinary modules into the model itself where fused ones were: call fuse() again to go on "
    "with it, or script unfuse(model)"
)
Reader = Callable[[nn.Module], Parts]  # raises Unfusable


def _frames_inside() -> int:
    """How many frames there are from the caller of this up to the first that is neither torch's nor this package's."""
    frame, count = sys._getframe(1), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", __name__.split(".")[0]):
        frame, count = frame.f_back, count + 1
    return count


def _is_proxy(x: Any) -> bool:
    """Whether torch.fx traces. Raises TypeError for an ``x`` that is neither that nor a tensor."""
    if isinstance(x, torch.fx.Proxy):
        return True
    check_tensor(x)
    return False


# By the tokens of their caches, for what is asked while a graph is traced.
_blocks: weakref.WeakValueDictionary[int, FusedBlock] = weakref.WeakValueDictionary()


def block_of(token: int) -> FusedBlock:
    return _blocks[token]


@torch.compiler.assume_constant_result
def fallback_reason_of(token: int) -> str | None:
    """Asked once per graph: dynamo cannot trace the look at hooks and types."""
    return _blocks[token].fallback_reason()


class FusedBlock(nn.Module):
    """What every fused block is, whatever family it comes from: in eval one kernel on weights that follow its modules.

    A subclass says what is inside (``_read``, which may raise Unfusable), how the ordinary modules run
    (``_forward_modules``), and which ordinary module is the same (``_ordinary``, another one around its children).
    """

    _read: Callable[[], Parts]
    _forward_modules: Callable[[Tensor], Tensor]
    _ordinary: Callable[[], nn.Module]
    _name = ""  # in the model that was given to fuse
    _channels_last = False  # whether its fused results are, whatever x is
    _around: reading.Around | None = None  # what runs beside the block itself

    def _start(self, backend: str, recompute: bool) -> None:
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {backend!r}")
        watch_optimizers()
        self.backend = backend
        self.recompute = recompute
        self._said: set[str] = set()
        self._forgotten = 0
        self._inspect()
        if self._objection is not None:
            raise ValueError(f"{self._objection}; leave this block unfused")
        self._reset_cache()

    def _inside(self) -> list[nn.Module]:
        """The modules that a kernel stands in for."""
        inside = list(self.modules())[1:]
        if self.leading_child is None:
            return inside
        others = set(self.leading_child.modules())
        return [m for m in inside if m not in others]

    @property
    def leading_child(self) -> nn.Module | None:
        """A child that forward runs first, as it is."""
        return None

    def _inspect(self) -> None:
        """Notes what the inner modules are, and why the fused op could not stand in for them."""
        objection = next(reading.inner_objections(self._inside()), None)
        parts = None
        try:
            parts = self._read()
        except Unfusable as why:
            objection = objection or str(why)
        # Attributes go from one finding to the next with no gap: another thread may run this block.
        self._objection = objection
        # (convolution, norm) of each stage: [expand,] depthwise, project.
        self._pairs = cast(tuple[tuple[nn.Conv2d, Norm | None], ...], parts.stages if parts else ())
        self._squeeze: tuple[nn.Conv2d, ...] = (parts.squeeze or ()) if parts else ()
        self._dropouts: tuple[nn.Module, ...] = parts.dropouts if parts else ()
        self._drop_path: tuple[nn.Module, ...] = parts.drop_path if parts else ()
        self._spec: BlockSpec | None = parts.spec if parts else None
        self._op_options = op_rest(parts.spec) if parts else []
        self._around: reading.Around | None = parts.around if parts else None

    def fallback_reason(self) -> str | None:
        """Why the inner modules run one by one even in eval, because of how they were changed; None if they don't."""
        self._inspect()
        return self._objection

    def _reset_cache(self) -> None:
        self._ready: PreparedCall | None = None
        parameters = weakref.WeakMethod(self._fold_parameters)

        def own() -> tuple[list[Tensor | None], list[float]]:
            found = parameters()
            assert found is not None  # who asks has the block
            return found()

        self._cache = PackedCache(own)
        self._token = self._cache.token
        _blocks[self._token] = self

    # What it knows of its modules, and all that a fused block has beside what its original had.
    _FOUND = (
        *("_ready", "_cache", "_token", "_objection", "_pairs"),
        *("_squeeze", "_dropouts", "_drop_path", "_spec", "_op_options", "_around"),
    )
    OWN = (
        *(*_FOUND, "backend", "recompute", "_said", "_name", "_forgotten", "_original", "_channels_last"),
        "_warned",  # in pickles of 0.1.0
    )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in self._FOUND:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._inspect()
        self._reset_cache()

    def _replicate_for_data_parallel(self) -> FusedBlock:
        self._warn("runs unfused in nn.DataParallel's replicas: use DistributedDataParallel")
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

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, and leaves in this block's place in the model that it was given."""
        warnings.warn(SCRIPTED, stacklevel=2)
        return self._ordinary()

    @property
    def spec(self) -> BlockSpec | None:
        """None where the layers were changed beyond recognition."""
        return self._spec

    @property
    def _read_spec(self) -> BlockSpec:
        """The same of a block whose inspection found no objection."""
        assert self._spec is not None
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
        if backends.transformed() or (type(x) is not Tensor and _is_proxy(x)):
            return self._forward_modules(x)
        if ready is None or not ready.takes(x) or not ready.is_valid():
            if ready is not None and ready.guard is not None:
                ready.guard.warn_if_late()
            # Mode and backend are decided here alone: they stay the same while the guard is valid.
            if self._trains():
                return self._forward_training(x)
            ready = self._prepare(x)
            if ready is None:
                return self._forward_modules(x)
        if not ready.is_cpu:
            self._cache.hold_if_captured(ready.packed)
        op_options = ready.op_options
        try:
            if op_options is None:
                op_options = ready.spec.options(*x.shape[2:])
            if self._channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            if torch.is_grad_enabled() and any(t.requires_grad for t in ready.tensors):
                run = functools.partial(
                    ops.packed_inverted_residual,
                    **{"packed": ready.packed, "stride": ready.stride, "residual": ready.residual},
                    **{"backend": ready.backend, "op_options": op_options},
                )
                y = Recomputed.apply(x, run, ready.eps, ready.spec, (False,) * 3, *ready.parameters)
            else:
                y = ops.packed_inverted_residual(
                    x, ready.packed, ready.stride, ready.residual, backend=ready.backend, op_options=op_options
                )
        except (RuntimeError, TypeError):
            check_input(x, ready.spec.in_channels, ready.spec)  # says it better, if x is what is wrong
            raise
        return self._sum(x, y, ready.drop_path, ready.whole) if ready.drop_path else y

    @staticmethod
    def _sum(x: Tensor, y: Tensor, drop_path: tuple[nn.Module, ...], spec: BlockSpec) -> Tensor:
        for module in drop_path:
            y = module(y)
        return function_of(spec.out_activation, spec.negative_slope)(y + x) if spec.activates_sum else y + x

    def _forward_training(self, x: Tensor) -> Tensor:
        """With statistics of the batch, or dropouts: by the training kernels where they do, by the modules elsewhere,
        or, with ``recompute``, keeping x alone."""
        if self.training_objection(x) is None:
            return self._train_fused(x)
        if not self.recompute or not torch.is_grad_enabled():
            return self._forward_modules(x)
        why = self.fallback_reason()
        if why is None and reading.drops_now(self._dropouts):
            why = "it has dropouts between its layers, which would drop others the second time"
        synced = any(isinstance(norm, nn.SyncBatchNorm) and norm.training for _, norm in self._pairs)
        if why is None and synced and torch.distributed.is_initialized():
            why = "a SyncBatchNorm would exchange its statistics a second time"
        if why is not None:
            self._warn(f"keeps what recompute=True would not: {why}")
            return self._forward_modules(x)
        parameters, eps = self._fold_parameters()
        if not (x.requires_grad or any(t is not None and t.requires_grad for t in parameters)):
            return self._forward_modules(x)
        batch = tuple(is_live(norm) for _, norm in self._pairs)
        norms = [norm if isinstance(norm, BatchNorm) else None for _, norm in self._pairs]
        stages, squeeze = conv_norms(parameters, len(batch))
        stages = [s._replace(mean=None, variance=None) if b else s for s, b in zip(stages, batch, strict=True)]
        parameters = [t for stage in stages for t in stage] + [t for conv in squeeze for t in conv[:2]]
        drop_path = self._drop_path if reading.drops_now(self._drop_path) else ()
        spec = without_sum(self._read_spec) if drop_path else self._read_spec
        check_input(x, spec.in_channels, spec)
        run = functools.partial(unfolded, parameters=parameters, eps=eps, spec=spec, batch=batch, norms=norms)
        y = Recomputed.apply(x, run, eps, spec, batch, *parameters)
        return self._sum(x, y, drop_path, self._read_spec) if drop_path else y

    def not_trained(self) -> str | None:
        """Why its norms' statistics of a batch take the ordinary modules; None where the training kernels have them."""
        if (why := self.fallback_reason()) is not None:
            return why
        if (why := training_ops.objection(self._read_spec)) is not None:
            return why
        parameters, _ = self._fold_parameters()
        weight = first_weight(parameters)
        if weight.dtype not in TRAINED_DTYPES:
            return f"its parameters are {weight.dtype}"
        if not weight.is_cpu or backends.resolve_backend(self.backend, weight.device) != "cpu":
            return "the training kernels are the CPU's"
        if any(t is not None and (t.dtype != weight.dtype or freed(t)) for t in parameters):
            return "its parameters are of several dtypes"
        return None

    def training_objection(self, x: Tensor | None = None) -> str | None:
        """Why its modules run in this state, given ``x``; None where the training kernels do."""
        if (why := self.not_trained()) is not None:
            return why
        if not any(is_live(norm) for _, norm in self._pairs[:-1]):
            return "no norm inside takes its statistics from the batch"
        if reading.drops_now(self._dropouts):
            return "it has dropouts between its layers"
        norms = [norm for _, norm in self._pairs]
        return None if x is None else input_objection(x, self._pairs[0][0].weight.dtype, norms, self._read_spec)

    def _train_fused(self, x: Tensor) -> Tensor:
        norms = [norm for _, norm in self._pairs]
        drops = nn.Sequential(*self._drop_path) if reading.drops_now(self._drop_path) else None
        return train_fused(x, *self._fold_parameters(), self._read_spec, norms, drops)

    def _warn(self, what: str) -> None:
        """Once for a model and a reason: the blocks that one call of fuse made remember together what was said."""
        said = vars(self).setdefault("_said", set())
        if what in said:
            return
        said.add(what)
        named = f" ({self._name})" if self._name else ""
        more = ", and maybe others: report(model) lists them" if self._name else ""
        warnings.warn(f"an inverted residual{named} {what}{more}", stacklevel=_frames_inside() + 1)

    def _decide(self, device: torch.device) -> tuple[str, str | None]:
        """The backend of calls on ``device``, "eager" for the inner modules, and why nobody's choice was taken.

        The one place that chooses, in eager mode and while a graph is traced. Raises as
        :func:`mnv2_fused.ops.kernel_for`.
        """
        # On the meta device the modules give shapes, and nothing else is there to be computed.
        shapes_only = device.type == "meta" and all(t.is_meta for t in self.parameters())
        backend = "eager" if shapes_only else backends.resolve_backend(self.backend, device)
        if backend == "eager":
            return backend, None
        reason = fallback_reason_of(self._token) if torch.compiler.is_compiling() else self.fallback_reason()
        if reason is None and self._trains():  # asked again: inspection may have found other layers
            return "eager", None
        return (
            ops.kernel_instead(backend, self._read_spec, self.backend, device) if reason is None else ("eager", reason)
        )

    def _prepare(self, x: Tensor) -> PreparedCall | None:
        """Looks at everything and folds what changed; None when the inner modules must run."""
        next_hook = RemovableHandle.next_id  # before looking, so that what changes meanwhile is noticed next time
        backend, why = self._decide(x.device)
        if why is not None:
            self._warn(f"runs unfused: {why}")
        if backend == "eager":
            return None
        parameters, _ = self._fold_parameters()
        if any(map(freed, parameters)):  # the modules' own kernels say so
            return None
        watched = trackable(t for t in parameters if t is not None)
        guard = Guard.of_modules([self], next_hook) if watched else None
        if not watched:
            self._warn("folds its weights at every call: none tells of a write; make them outside inference_mode()")
        # Again: a guard takes for unchanged what another thread changed before it was there.
        if self.fallback_reason() is not None or self._trains():
            return None
        spec, (parameters, eps) = self._read_spec, self._fold_parameters()
        dtype = self._compute_dtype(x, parameters, backend)
        packed = self._cache.get(parameters, eps, dtype, backend)
        assert isinstance(packed, PackedWeights)
        drop_path = self._drop_path if reading.drops_now(self._drop_path) else ()
        ready = PreparedCall(spec, parameters, eps, drop_path, guard, backend, packed)
        # Else they are of autocast's dtype, for now; or a CUDA graph is being captured.
        if guard is not None and ready.dtype == dtype and self._cache.keeps(packed):
            self._ready = ready
        return ready

    def fits_sequence(self) -> bool:
        """Whether a sequence may run this block in eval, as long as it guards it."""
        if self.training or self.fallback_reason() is not None or self._trains() or self.leading_child is not None:
            return False
        if reading.drops_now(self._drop_path):
            return False
        parameters, _ = self._fold_parameters()
        weight = first_weight(parameters)
        dtype, device = weight.dtype, weight.device
        # In one run, every product's weights are packed alike.
        alike = packed_dtypes(dtype, device, self._read_spec.hidden_channels) == packed_dtypes(dtype, device)
        return alike and trackable(t for t in parameters if t is not None)

    def _trains(self) -> bool:
        """Whether something inside needs the whole tensor now: statistics of the batch, or dropout."""
        if any(is_live(norm) for _, norm in self._pairs):
            return True
        return bool(self._dropouts) and reading.drops_now(self._dropouts)

    def _eps(self) -> list[float]:
        return [0.0 if norm is None else eps_of(norm) for _, norm in self._pairs]

    def _fold_parameters(self) -> tuple[list[Tensor | None], list[float]]:
        """Parameters and statistics in the order of :func:`mnv2_fused.fold.conv_norms`, and the eps of each norm."""
        parameters: list[Tensor | None] = []
        for pair in self._pairs:
            parameters.extend(parameters_of(*pair))
        for conv in self._squeeze:
            parameters.extend(parameters_of(conv, None)[:2])
        return parameters, self._eps()

    def _compute_dtype(self, x: Tensor, parameters: list[Tensor | None], backend: str) -> torch.dtype:
        dtype, device = first_weight(parameters).dtype, x.device.type
        autocast = torch.is_autocast_enabled(device)
        if x.dtype != dtype and not autocast:
            raise TypeError(
                f"x is {x.dtype} but the block's parameters are {dtype}; convert one of them or use autocast"
            )
        if x.dtype == torch.float64:
            return x.dtype
        return torch.get_autocast_dtype(device) if autocast and backend in ("cuda", "triton") else dtype

    def _forward_compiled(self, x: Tensor) -> Tensor:
        if tracing_transform() or tracing_onnx():
            return self._forward_modules(x)
        backend, _ = self._decide(x.device)
        if backend == "eager" or reading.drops_now(self._drop_path):
            return self._forward_modules(x)
        spec, (parameters, eps) = self._read_spec, self._fold_parameters()
        dtype = self._compute_dtype(x, parameters, backend)
        check_input(x, spec.in_channels, spec)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
        if recording or tracing_export():
            # Folding goes into the graph: differentiable, and an exported program owns its weights.
            packed = fold_and_pack(parameters, eps, dtype, backend)
            if tracing_export():
                note_export()
            plan, op_options = op_choices(spec, x)
            return ops.packed_inverted_residual(x, packed, spec.strides[0], spec.residual, plan, backend, op_options)
        site = fold_ahead(self._token, dtype, backend)
        return torch.ops.mnv2_fused.cached_inverted_residual(
            x, parameters, eps, spec.strides[0], spec.residual, self._token, backend, self._op_options, site
        )
