"""Layers in a row as one call: stem, inverted residuals, head, pooling and classifier of a network."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from . import layers, ops
from .module import FusedBlock, tracing_export, tracing_transform
from .ops import LayerKind
from .runs import Layer, fold_layers, layers_of, sources_of
from .watch import PackedCache, Watch, capturing, may_be_kept


class _ChangedMeanwhile(Exception):
    """Another thread changed a block while it was being prepared."""


class _Run:
    """Layers that one call of the op computes."""

    def __init__(self, found: list[Layer], dtype: torch.dtype, backend: str) -> None:
        self.dtype = dtype
        self.backend = backend
        self.modules = [module for layer in found for module in layer.modules]
        self.geometry = _geometry_of(found)
        sources, eps = sources_of(self.modules)
        if any(isinstance(m, FusedBlock) and not m.fits_sequence() for m in self.modules):
            raise _ChangedMeanwhile
        self.weights = fold_layers(self.geometry, sources, eps, dtype, backend)
        self.is_cpu = self.weights.is_cpu
        self.flat = found[-1].kind is LayerKind.LINEAR

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is what the op takes, not recording gradients."""
        ordinary = type(x) is Tensor and x.is_cpu is self.is_cpu and x.dtype is self.dtype
        return ordinary and not (x.requires_grad and torch.is_grad_enabled())

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x):  # made by a module between two runs
            for module in self.modules:
                x = module(x)
            return x
        y = ops.sequence(x, self.weights, self.geometry, self.backend)
        return y.flatten(1) if self.flat else y


def _in_runs(found: Iterable[Layer | nn.Module | None]) -> Iterator[tuple[bool, list[Any]]]:
    """Neighbours of a kind together: layers, each group of which is a run, or single modules."""
    for is_run, group in itertools.groupby(found, lambda entry: isinstance(entry, Layer)):
        yield is_run, list(group)


def _geometry_of(run: list[Layer]) -> list[int]:
    return [value for layer in run for value in layer.geometry]


_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _one_kind(kinds: set[tuple[torch.dtype, torch.device]], backend: str) -> bool:
    """Whether these dtypes and devices of weights are what one call of the op takes."""
    return len(kinds) == 1 and (backend == "cpu" or next(iter(kinds))[0] in _CUDA_DTYPES)


class _Prepared:
    """Children cut into runs of ``backend`` and single modules, valid while ``watch`` holds."""

    def __init__(
        self,
        children: list[nn.Module | None],
        parents: list[nn.Module],
        next_hook: int,
        backend: str,
        is_cpu: bool,
    ) -> None:
        self.is_cpu = is_cpu
        found = list(layers_of(children, backend))
        in_runs = [m for layer in found if isinstance(layer, Layer) for m in layer.modules]
        others = [entry for entry in found if isinstance(entry, nn.Module)]
        hooked = [*parents, *itertools.chain.from_iterable(m.modules() for m in others)]
        self.watch = Watch(in_runs, next_hook, parents, hooked)
        kinds = {(t.dtype, t.device) for t in self.watch.tensors}
        self.dtype, device = next(iter(kinds), (None, None))
        has_blocks = any(isinstance(m, FusedBlock) for m in in_runs)
        self.runs = has_blocks and (device and device.type == "cpu") is is_cpu and _one_kind(kinds, backend)
        self.steps: list[_Run | nn.Module] = []
        if not self.runs:
            return
        for is_run, entries in _in_runs(found):
            self.steps += [_Run(entries, self.dtype, backend)] if is_run else entries
        self.lasts = all(may_be_kept(run.weights) for run in self.runs_of())

    def runs_of(self) -> Iterator[_Run]:
        """Those among the steps."""
        return (step for step in self.steps if isinstance(step, _Run))


def sequence_backend(device: torch.device) -> str | None:
    """Whose kernels run layers in a row on ``device``: "cpu"'s or "cuda"'s, or None."""
    try:
        backend = ops.resolve_backend("auto", device)
    except (RuntimeError, ValueError):  # which blocks say, where one is asked for a kernel
        return None
    return backend if backend in ("cpu", "cuda") else None


def _is_training(module: nn.Module) -> bool:
    """Whether a module of a run does something else than in eval."""
    if isinstance(module, FusedBlock):
        return module.training or module._trains() or layers.drops_now(module._beside)
    if isinstance(module, nn.Sequential):  # convolution, norm and activation
        return module[1].training
    return isinstance(module, nn.Dropout) and module.training


def _cache_of(geometry: Sequence[int]) -> PackedCache:
    return PackedCache(lambda *arguments: (fold_layers(geometry, *arguments),))


# Of each sequence the weights of the runs in compiled graphs.
_traced: weakref.WeakKeyDictionary[nn.Module, dict[Any, PackedCache]] = weakref.WeakKeyDictionary()

# Of each sequence what CUDA graphs were captured with, which read its weights where they are.
_captured: weakref.WeakKeyDictionary[nn.Module, list[_Prepared]] = weakref.WeakKeyDictionary()


class RunsFused:
    """What a module that calls its children one after the other inherits from to run them fused where it can.

    In eval, where nothing records gradients, neighbouring fused blocks and what lies beside them are one call, on the
    CPU and by the CUDA kernel: the blocks' outputs share one buffer; a stem (3x3, stride 2, norm, activation) runs in
    the kernel of the block behind it, if that has neither expansion nor residual, so that its output is never written.
    On the CPU a head (1x1, norm, activation) runs on the blocks' kernel, and the tensor before an
    ``AdaptiveAvgPool2d(1)`` is never written; each ``Linear`` behind that joins in. A ``FusedSequential`` among the
    children counts as its own. Anything else, and everything in any other mode, runs module by module.
    """

    _prepared: _Prepared | None = None

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        """The modules that forward calls in a row, and those whose lists of children they come from."""
        children: list[nn.Module | None] = []
        parents: list[nn.Module] = [self]
        for child in self._modules.values():
            if type(child) is FusedSequential and "forward" not in vars(child) and not layers.has_hooks(child):
                inner, more = child.fusable_children()
                children += inner
                parents += more
            else:
                children.append(child)
        return children, parents

    def run_fused(self, x: Tensor) -> Tensor | None:
        """The result, in channels_last where it has pixels; None where the ordinary forward has to run."""
        # Every call runs this with cold caches, so what the watch would notice is looked at in _prepare alone.
        if torch.compiler.is_compiling():
            return self._run_traced(x)
        if self.training or type(x) is not Tensor:
            return None
        prepared = self._prepared
        if prepared is None or prepared.is_cpu is not x.is_cpu or not prepared.watch.holds():
            if self._blocks_record():
                return None  # fine-tuning changes the weights every step: nothing is folded for a run that may not be
            prepared = self._prepare(x)
        if prepared is None or not prepared.runs or x.dtype is not prepared.dtype:
            return None
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type) or ops.transformed():
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in prepared.watch.tensors)):
            return None
        if not prepared.is_cpu and capturing(x.device):
            held = _captured.setdefault(self, [])
            if prepared not in held:
                held.append(prepared)
        for step in prepared.steps:
            x = step(x)
        return x

    def _run_traced(self, x: Tensor) -> Tensor | None:
        """What run_fused does while a graph is traced: each run becomes one op of that graph."""
        if self.training or type(x) is not Tensor or tracing_export() or tracing_transform():
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        _ = id(self)  # the graph is guarded by it: what was found here holds for no other sequence
        dtype = x.dtype
        steps = self._steps_when_traced(dtype, x.device)
        for names, geometry, token, backend, flat in steps:
            modules = [_NAMELESS[name] if name in _NAMELESS else self.get_submodule(name) for name in names]
            if not geometry:
                x = modules[0](x)
                continue
            sources, eps = sources_of(modules)
            # Asked here and not where the steps were found: the graph is guarded by what this reads.
            if any(_is_training(module) for module in modules) or x.dtype != dtype:
                return None
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *sources)):
                return None
            x = torch.ops.mnv2_fused.cached_sequence(x, sources, eps, geometry, token, backend)
            x = x.flatten(1) if flat else x
        return x if steps else None

    @torch.compiler.assume_constant_result
    def _steps_when_traced(self, dtype: torch.dtype, device: torch.device) -> tuple[tuple[Any, ...], ...]:
        """Of each step its modules' names, and of a run geometry, token of its weights, backend, and whether it ends in
        a classifier. None at all where the modules have to run.
        """
        if ops._C is None or torch_module._has_any_global_hook() or (backend := sequence_backend(device)) is None:
            return ()
        children, _ = self.fusable_children()
        found = list(layers_of(children, backend))
        if None in found or not any(isinstance(m, FusedBlock) for m in children):
            return ()
        name_of = {module: name for name, module in (*self.named_modules(), *_NAMELESS.items())}
        steps: list[tuple[Any, ...]] = []
        caches = _traced.setdefault(self, {})
        for is_run, entries in _in_runs(found):
            if not is_run:
                steps += [((name_of[module],), (), 0, backend, False) for module in entries]
                continue
            geometry = tuple(_geometry_of(entries))
            modules = [module for layer in entries for module in layer.modules]
            sources, eps = sources_of(modules)
            kinds = {(t.dtype, t.device) for t in sources if t is not None and t.is_floating_point()}
            if kinds != {(dtype, device)} or not _one_kind(kinds, backend):
                return ()
            cache = caches.setdefault((backend, len(steps), geometry), _cache_of(geometry))
            cache.get(sources, eps, dtype, backend)  # now: a graph's first run may own the memory of all that it makes
            names = tuple(name_of[module] for module in modules)
            steps.append((names, geometry, cache.token, backend, entries[-1].kind is LayerKind.LINEAR))
        return tuple(steps)

    def _blocks_record(self) -> bool:
        children, _ = self.fusable_children()
        blocks = (m for m in children if isinstance(m, FusedBlock))
        return torch.is_grad_enabled() and any(t.requires_grad for block in blocks for t in block.parameters())

    def layers_now(self, backend: str = "cpu") -> list[Layer]:
        """What a call in this state runs on the kernels of ``backend``, beside modules that run by themselves; none in
        train().
        """
        if ops._C is None or self.training:
            return []
        children, _ = self.fusable_children()
        on_kernels = [layer for layer in layers_of(children, backend) if isinstance(layer, Layer)]
        blocks = [m for layer in on_kernels for m in layer.modules if isinstance(m, FusedBlock)]
        kinds = {(t.dtype, t.device) for block in blocks for t in block.parameters()}
        runs = _one_kind(kinds, backend) and all(sequence_backend(device) == backend for _, device in kinds)
        return on_kernels if runs else []

    def _prepare(self, x: Tensor) -> _Prepared | None:
        self._prepared = None  # the watch counts attributes, this one too
        next_hook = RemovableHandle.next_id  # before looking, so that what changes meanwhile is noticed next time
        if ops._C is None or ops.transformed():
            return None
        if torch_module._has_any_global_hook():  # which would miss the modules inside
            return None
        if (backend := sequence_backend(x.device)) is None:
            return None
        try:
            prepared = _Prepared(*self.fusable_children(), next_hook, backend, x.is_cpu)
        except _ChangedMeanwhile:
            return None
        if not prepared.runs or prepared.lasts:
            self._prepared = prepared
        return prepared  # another thread may have dropped it from self again

    def train(self, mode: bool = True) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_prepared", None)  # of the original's weights
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_prepared", None)
        return state


class FusedSequential(RunsFused, nn.Sequential):
    """What :func:`mnv2_fused.fuse` makes of each ``nn.Sequential`` that holds fused blocks, or others of its kind."""

    def forward(self, input: Tensor) -> Tensor:
        y = self.run_fused(input)
        return super().forward(input) if y is None else y


# What a network may do by functions between its two modules, as modules.
_POOL, _FLATTEN = nn.AdaptiveAvgPool2d(1).eval(), nn.Flatten().eval()
_NAMELESS: dict[str, nn.Module] = {"mean over pixels": _POOL, "flatten": _FLATTEN}  # as a graph knows them


class RunsWhole(RunsFused):
    """A network's: ``features``, the mean over their pixels (``avgpool``, if there is one), and ``classifier``.

    Called directly, they still give what they always gave.
    """

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        parents = [self, self.features, self.classifier]
        if any(type(m).forward not in (nn.Sequential.forward, FusedSequential.forward) for m in parents[1:]):
            return [], parents
        if any("forward" in vars(m) or layers.has_hooks(m) for m in parents[1:]):
            return [], parents
        features, inner = [*self.features._modules.values()], []
        if isinstance(self.features, FusedSequential):
            features, (_, *inner) = self.features.fusable_children()
        pool = self._modules.get("avgpool", _POOL)
        return [*features, pool, _FLATTEN, *self.classifier._modules.values()], [*parents, *inner]


# What a compiled graph calls; see cached_inverted_residual. No autograd: gradients are the blocks' own.
_library = torch.library.Library("mnv2_fused", "FRAGMENT")
_library.define(
    "cached_sequence(Tensor x, Tensor?[] sources, float[] eps, int[] layers, int cache, str backend) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


def _cached_sequence(x, sources, eps, layers, cache, backend):
    found = PackedCache.of(cache) or _cache_of(layers)
    (weights,) = found.get(sources, eps, x.dtype, backend, in_graph=True)
    return ops.sequence(x, weights, layers, backend)


_library.impl("cached_sequence", _cached_sequence, "CompositeExplicitAutograd")


@torch.library.register_fake("mnv2_fused::cached_sequence")
def _(x, sources, eps, layers, cache, backend):
    return ops.sequence_fake(x, sources[0], layers)
