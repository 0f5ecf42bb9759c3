"""Drop-in modules: folded weights that follow their sources, autograd, and what a compiled graph calls."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from . import layers, ops, triton_plan
from .block import ACTIVATIONS, GATES, BlockSpec, check_input
from .fold import PackedWeights, packed_dtypes
from .layers import Parts, Unfusable
from .training import Recomputed, unfolded
from .watch import PackedCache, Watch, fold_ahead, fold_and_pack, lasting, parameters_of

Reader = Callable[[nn.Module], Parts]  # raises Unfusable


def missing_kernel(backend: str, spec: BlockSpec) -> str | None:
    """What of such a block ``backend`` has no kernel for, in words; None where it takes the block."""
    if backend == "triton":
        why = triton_plan.unsupported(torch.float16, spec)  # dtypes are the op's to refuse
        return None if why is None else why.removesuffix("; use backend='eager'")
    return None


def kernel_for(spec: BlockSpec, backend: str, device: torch.device) -> tuple[str, str | None]:
    """The backend that runs such a block on ``device``, and, where "auto" finds no kernel for it, why.

    Raises as :func:`mnv2_fused.ops.resolve_backend`, and RuntimeError where a named backend does not take the block.
    """
    found = ops.resolve_backend(backend, device)
    why = missing_kernel(found, spec)
    if why is None:
        return found, None
    if (os.environ.get("MNV2_FUSED_BACKEND") or backend) != "auto":
        raise RuntimeError(f"{why} (backend={found!r}); use backend='auto' or 'eager', or unfuse the model")
    return "eager", why


def _rest(spec: BlockSpec) -> list[int]:
    """What neither weights nor MobileNetV2's block tell of ``spec``; :func:`_spec_of` reads it."""
    if spec.options(8, 8) == ():
        return []
    padding = [-1] if spec.padding == "same" else list(spec.padding or ())
    names = spec.activation, spec.out_activation, spec.squeeze_activation
    return [spec.dilation, *map(ACTIVATIONS.index, names), GATES.index(spec.gate), *padding]


def _make_spec(
    in_channels: int,
    hidden: int,
    out_channels: int,
    kernel: int,
    squeezed: int,
    stages: int,
    stride: int,
    residual: bool,
    rest: tuple[int, ...],
) -> BlockSpec:
    dilation, activation, out_activation, squeeze_activation, gate, *padding = rest or (1, 0, 2, 1, 0)
    return BlockSpec(
        *(in_channels, hidden, out_channels, stride, stages == 3, residual, kernel, dilation),
        padding="same" if padding == [-1] else tuple(padding) or None,
        activation=ACTIVATIONS[activation],
        out_activation=ACTIVATIONS[out_activation],
        squeeze_channels=squeezed,
        squeeze_activation=ACTIVATIONS[squeeze_activation],
        gate=GATES[gate],
    )


_made_spec = functools.lru_cache(maxsize=1024)(_make_spec)


def _spec_of(
    sources: list[Tensor | None],
    stages: int,
    stride: int,
    residual: bool,
    rest: Sequence[int],
    make: Callable[..., BlockSpec] = _made_spec,
) -> BlockSpec:
    shapes = [sources[6 * i].shape for i in range(stages)]
    squeeze = sources[6 * stages :]
    return make(
        shapes[0][1] if stages == 3 else shapes[0][0],
        *(shapes[-1][1], shapes[-1][0], shapes[-2][-1]),
        squeeze[0].shape[0] if squeeze else 0,
        *(stages, stride, residual, tuple(rest)),
    )


class _Ready:
    """A block found fit to run fused on ``packed``, while its ``watch`` holds."""

    def __init__(self, block: FusedBlock, sources: list[Tensor | None], next_hook: int, backend: str) -> None:
        self.backend = backend
        self.is_cpu = sources[0].is_cpu
        self.sources = sources
        self.tensors = [t for t in sources if t is not None]
        self.eps = block._eps()
        self.dtype = sources[0].dtype
        # What stochastic depth comes before the sum with x is not the kernel's now.
        self.beside = block._beside if layers.drops_now(block._beside) else ()
        self.spec = spec = dataclasses.replace(block.spec, residual=False) if self.beside else block.spec
        self.stride, self.residual = spec.stride, spec.residual
        # The op's, where they do not rest on the image's size.
        self.options = None if spec.padding == "same" and spec.stride > 1 else spec.options(8, 8)
        self.lasting = lasting(self.tensors)
        self.watch = Watch([block], next_hook) if self.lasting else None
        self.packed: PackedWeights | None = None


# By the tokens of their caches, for what is asked while a graph is traced.
_blocks: weakref.WeakValueDictionary[int, FusedBlock] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result
def _within_functorch() -> bool:
    """Dynamo guards a graph by it."""
    return ops.within_functorch()


def tracing_transform() -> bool:
    """:func:`mnv2_fused.ops.transformed` of what is being traced."""
    return _within_functorch() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def tracing_export() -> bool:
    """Of the trace that is going on; dynamo itself takes ``is_exporting()`` for True in every trace."""
    return torch.compiler.is_exporting()


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
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {backend!r}")
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
        objection = next(layers.inner_objections(self._inside()), None)
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
        self._rest = _rest(parts.spec) if parts else []

    def why_modules(self) -> str | None:
        """Why the inner modules run one by one even in eval, because of how they were changed; None if they don't."""
        self._look_inside()
        return self._objection

    def _reset_cache(self) -> None:
        self._ready: _Ready | None = None
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
        if ops.transformed():
            return self._forward_modules(x)
        if ready is None or x.dtype is not ready.dtype or x.is_cpu is not ready.is_cpu or not ready.watch.holds():
            # Mode and backend are looked at here only: while the watch holds, they are what they were.
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
        if why is None and layers.drops_now(self._dropouts):
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
        for i, of_batch in enumerate(batch):
            if of_batch:
                sources[6 * i + 4 : 6 * i + 6] = None, None
        beside = self._beside if layers.drops_now(self._beside) else ()
        spec = dataclasses.replace(self._spec, residual=False) if beside else self._spec
        check_input(x, spec.in_channels, spec)
        run = functools.partial(unfolded, sources=sources, eps=eps, spec=spec, batch=batch, norms=norms)
        y = Recomputed.apply(x, run, eps, spec, batch, *sources)
        return self._sum(x, y, beside) if beside else y

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=4)

    def _prepare(self, x: Tensor) -> _Ready | None:
        """Looks at everything and folds what changed; None when the inner modules must run."""
        backend = ops.resolve_backend(self.backend, x.device)
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
        sources, eps = self._sources()
        ready = _Ready(self, sources, next_hook, backend)
        dtype = self._compute_dtype(x, sources, backend)
        ready.packed = self._cache.get(sources, eps, dtype, backend)
        # Else autocast allows it, for now; or a CUDA graph is being captured.
        if ready.lasting and x.dtype == ready.dtype == dtype and self._cache.keeps(ready.packed):
            self._ready = ready
        return ready

    def fits_sequence(self) -> bool:
        """Whether a sequence may run this block in eval, as long as it watches it."""
        if self.training or self.why_modules() is not None or self._trains() or self.in_front is not None:
            return False
        if layers.drops_now(self._beside):
            return False
        sources, _ = self._sources()
        dtype, device = sources[0].dtype, sources[0].device
        # In one run, every product's weights are packed alike.
        alike = packed_dtypes(dtype, device, self.spec.hidden_channels) == packed_dtypes(dtype, device)
        return alike and lasting(t for t in sources if t is not None)

    def _trains(self) -> bool:
        """Whether something inside needs the whole tensor now: statistics of the batch, or dropout."""
        if any(norm is not None and norm.training and norm._parameters for _, norm in self._pairs):
            return True  # FrozenBatchNorm2d has no parameters
        return bool(self._dropouts) and layers.drops_now(self._dropouts)

    def _eps(self) -> list[float]:
        return [0.0 if norm is None else norm.eps for _, norm in self._pairs]

    def _sources(self) -> tuple[list[Tensor | None], list[float]]:
        sources: list[Tensor | None] = []
        for pair in self._pairs:
            sources += parameters_of(*pair)
        for conv in self._squeeze:
            sources += parameters_of(conv, None)[:2]
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
        if ops.resolve_backend(self.backend, x.device) == "eager" or tracing_transform():
            return self._forward_modules(x)
        # First, since it looks inside again.
        if _why_modules(self._token) is not None or self._trains() or layers.drops_now(self._beside):
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


class FusedInPlace(FusedBlock):
    """A block of any class that stays the instance it was: attributes, children, names in the state_dict.

    :func:`fuse_in_place` makes an instance of a subclass of both, ``Fused<Name>``, of it.
    """

    original: type[nn.Module]  # what the block was
    reader: Reader

    def __new__(cls, *args: Any, **options: Any) -> nn.Module:
        if not args and not options:  # nn.DataParallel makes replicas so
            return super().__new__(cls)
        # Sequential's slices make more of their own class: these are ordinary modules.
        return cls.original(*args, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _restored, (cls.original, cls.reader, cls.__mro__[1]), self.__getstate__()

    def _read(self) -> Parts:
        return type(self).reader(self)

    def _forward_modules(self, x: Tensor) -> Tensor:
        return super(FusedBlock, self).forward(x)

    def unfused(self) -> nn.Module:
        """Itself, as it was."""
        for name in self.OWN:
            vars(self).pop(name, None)
        self.__class__ = type(self).original
        return self


def _restored(original: type[nn.Module], reader: Reader, base: type[FusedInPlace]) -> FusedInPlace:
    block = original.__new__(original)
    block.__class__ = _fused_class(original, reader, base)
    return block


@functools.cache
def _fused_class(original: type[nn.Module], reader: Reader, base: type[FusedInPlace]) -> type[FusedInPlace]:
    members = {"original": original, "reader": staticmethod(reader), "__module__": __name__, "__doc__": base.__doc__}
    return type(f"Fused{original.__name__}", (base, original), members)


def fuse_in_place(
    block: nn.Module,
    reader: Reader,
    *,
    backend: str = "auto",
    recompute: bool = False,
    base: type[FusedInPlace] = FusedInPlace,
) -> FusedInPlace:
    """Makes ``block`` run fused: it becomes an instance of a subclass of its class, and is returned.

    Raises ValueError, leaving it as it was, where ``reader`` finds it unfit, or for an unknown ``backend``.
    """
    block.__class__ = _fused_class(type(block), reader, base)
    try:
        block._start(backend, recompute)
    except ValueError:
        block.unfused()
        raise
    return block


class FusedInvertedResidual(FusedBlock):
    """Drop-in for torchvision's ``InvertedResidual``: same constructor, same state_dict, fused in eval.

    ``torchvision.models.mobilenet_v2(block=FusedInvertedResidual)`` loads published weights and trains. In
    ``train()`` the ordinary modules run, since batch statistics need the whole expanded tensor; with ``recompute``
    they are run once more in backward, so that of a block only its input is kept (a compiled graph decides itself
    what to keep). In ``eval()``, and in ``train()`` with every norm in ``eval()`` or frozen, the block is one kernel on
    weights folded in float64; they are folded again whenever a parameter or statistic changes, in place or not (the
    exception: writes through ``tensor.data``, which torch does not count; call ``train()`` and ``eval()`` after those).
    With gradients on, backward recomputes the expanded tensor instead of saving it; a second derivative is refused.
    Under ``torch.func`` transforms and forward-mode differentiation the ordinary modules run.

    ``x``: [N, inp, H, W], floating point, of the parameters' dtype unless under autocast -> [N, oup, H', W'].
    Raises ValueError for a stride other than 1 or 2 and for a ``norm_layer`` that cannot be folded.
    """

    conv: nn.Sequential

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        norm = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)

        def with_relu6(channels: int, **conv: Any) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, hidden, bias=False, **conv), norm(hidden), nn.ReLU6(inplace=True))

        layers = [] if expand_ratio == 1 else [with_relu6(inp, kernel_size=1)]
        layers.append(with_relu6(hidden, kernel_size=3, stride=stride, padding=1, groups=hidden))
        layers += [nn.Conv2d(hidden, oup, 1, bias=False), norm(oup)]
        self._adopt(nn.Sequential(*layers), stride, stride == 1 and inp == oup, backend, recompute)

    @classmethod
    def adopt(
        cls,
        conv: nn.Sequential,
        *,
        stride: int,
        residual: bool,
        backend: str = "auto",
        recompute: bool = False,
    ) -> FusedInvertedResidual:
        """A block around existing modules, laid out as torchvision's ``InvertedResidual.conv``, sharing them."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.training = conv.training
        block._adopt(conv, stride, residual, backend, recompute)
        return block

    def _adopt(self, conv: nn.Sequential, stride: int, residual: bool, backend: str, recompute: bool) -> None:
        self.conv = conv
        self.stride = stride
        self.use_res_connect = residual
        self._is_cn = stride > 1
        self._original: tuple[nn.Module, ...] = ()  # the block that fuse() replaced; a tuple, so no submodule
        self._start(backend, recompute)
        self.out_channels = self._pairs[-1][0].out_channels

    def _read(self) -> Parts:
        return layers.read_chain([self.conv], residual=self.use_res_connect)

    def _forward_modules(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y


# What a compiled graph calls in inference: it sees the parameters themselves, so a change in place is noticed
# there too, and folding stays out of the graph. No autograd: FusedInvertedResidual folds in the graph for that.
_library = torch.library.Library("mnv2_fused", "FRAGMENT")
_library.define(
    "cached_inverted_residual(Tensor x, Tensor?[] sources, float[] eps, int stride, bool residual, int cache, "
    'str backend="cpu", int[] rest=[], int site=-1) -> Tensor'
)


def _cached_inverted_residual(x, sources, eps, stride, residual, cache, backend="cpu", rest=(), site=-1):
    found = PackedCache.of(cache) or PackedCache()
    packed = found.get(sources, eps, x.dtype, backend, site)
    options = _spec_of(sources, len(eps), stride, residual, rest).options(*x.shape[2:]) if rest else ()
    return ops.packed_inverted_residual(x, packed, stride, residual, backend=backend, options=options)


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
def _(x, sources, eps, stride, residual, cache, backend="cpu", rest=(), site=-1):
    spec = _spec_of(sources, len(eps), stride, residual, rest, _make_spec)  # sizes may be symbols, which have no hash
    return ops.empty_output(x, spec.out_channels, spec.out_size(*x.shape[2:]))
