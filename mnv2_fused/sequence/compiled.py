"""Rows of layers in compiled graphs: each run of them is one op, on weights that follow its modules."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import ops
from ..encoding import LayerKind
from ..flops import count_flops, row_multiply_adds
from ..module import reading
from ..module.compiled import tracing_export, tracing_transform
from ..module.flat import FusedFlat
from ..module.fused_block import FusedBlock
from ..module.packed_cache import PackedCache, fold_ahead
from ..module.parameters import conv_norm_activation
from .find import FLATTEN, POOL, geometry_of, grouped, layers_of, one_kind, sequence_backend
from .joined import Joined
from .weights import fold_layers, layer_parameters

# Of each sequence the weights of its runs.
_weights: weakref.WeakKeyDictionary[nn.Module, dict[Any, PackedCache]] = weakref.WeakKeyDictionary()
# As a graph knows modules that are nobody's children; no child's name has a dot in front.
_NAMELESS: dict[str, nn.Module] = {".pool": POOL, ".flatten": FLATTEN}


@torch.compiler.disable
def forget(sequence: nn.Module) -> None:
    """Drops the weights that its graphs keep; they fold them again."""
    for cache in list(_weights.get(sequence, {}).values()):
        cache.clear()


def _called(sequence: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [_NAMELESS[name] if name in _NAMELESS else _named(sequence, name) for name in names]


_FLAT = ".."  # between the name of a sequence and the number of a block among its layers; no child's name has a dot


def _named(sequence: nn.Module, name: str) -> nn.Module:
    owner, flat, number = name.partition(_FLAT)
    if not flat:
        return sequence.get_submodule(name)
    parent: Any = sequence.get_submodule(owner)
    block: FusedFlat = parent._flat[int(number)]
    _ = [id(parent._modules[layer]) for layer in block._modules]  # a graph is of these layers
    return block


def _runs_now(module: nn.Module, backend: str) -> bool:
    """Whether a module may be part of a run. Traced: what this reads is what the graph is guarded by."""
    if isinstance(module, FusedBlock):
        if module._token < 0 or module.backend not in ("auto", backend):  # another block has another token
            return False
        return not (module.training or module._trains() or reading.drops_now(module._drop_path))
    if isinstance(module, nn.Sequential):  # convolution, norm and activation
        conv, norm, activation = conv_norm_activation(module)
        _ = id(conv), id(norm), id(activation), *conv.stride, *conv.padding, *conv.dilation, conv.groups
        return not norm.training
    _ = id(module)
    return not (isinstance(module, nn.Dropout) and module.training)


class RunsTraced(nn.Module):
    """What :class:`mnv2_fused.sequence.fused.RunsFused`, which has the ``fusable_children``, does in a graph."""

    fusable_children: Callable[[], tuple[list[nn.Module | None], list[nn.Module]]]

    def run_traced(self, x: Tensor) -> Tensor | None:
        """The result, while a graph is traced; None where the ordinary forward has to run."""
        if self.training or type(x) is not Tensor or tracing_export() or tracing_transform():
            return None
        if torch.is_autocast_enabled(x.device.type) or (backend := sequence_backend(x.device)) is None:
            return None
        # Only read, so that the graph is guarded by it: which sequence it is, and whose children in which order.
        _ = id(self)
        dtype = x.dtype
        parents, steps = self._steps_when_traced(dtype, x.device, backend)
        _ = [tuple(self.get_submodule(name)._modules) for name in parents]
        for names, geometry, token, flat in steps:
            modules = _called(self, names)
            runs = geometry and type(x) is Tensor and all(_runs_now(module, backend) for module in modules)
            if runs:
                parameters, eps = layer_parameters(modules)
                recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
                runs = not recording and x.dtype == dtype
            if not runs:
                for module in modules:
                    x = module(x)
                continue
            site = fold_ahead(token, dtype, backend)
            x = torch.ops.mnv2_fused.cached_sequence(x, parameters, eps, geometry, token, backend, site)
            x = x.flatten(1) if flat else x
        return x if steps else None

    @torch.compiler.assume_constant_result
    def _steps_when_traced(
        self, dtype: torch.dtype, device: torch.device, backend: str
    ) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
        """The names of those whose children run. Of each step its modules' names, and of a run geometry, token of its
        weights, and whether it ends in a classifier. No steps where the ordinary forward has to run.
        """
        children, parents = self.fusable_children()
        name_of = {module: name for name, module in (*self.named_modules(), *_NAMELESS.items())}
        whose = tuple(name_of[parent] for parent in parents)
        for owner, parent in zip(whose, parents, strict=True):
            name_of |= {block: f"{owner}{_FLAT}{i}" for i, block in enumerate(getattr(parent, "_flat", ()))}
        # Layers joined for a kernel's sake have no name: the compiler joins them itself.
        apart = ([*child.parts] if isinstance(child, Joined) else [child] for child in children)
        children = list(itertools.chain.from_iterable(apart))
        found = list(layers_of(children, backend))
        if torch_module._has_any_global_hook() or None in found:
            return whose, ()
        if not any(isinstance(module, FusedBlock) for module in children):
            return whose, ()
        steps: list[tuple[Any, ...]] = []
        for is_run, entries in grouped(found):
            if not is_run:
                steps += [((name_of[module],), (), 0, False) for module in entries]
                continue
            modules = [module for layer in entries for module in layer.modules]
            parameters, _ = layer_parameters(modules)
            kinds = {(t.dtype, t.device) for t in parameters if t is not None and t.is_floating_point()}
            if kinds != {(dtype, device)} or not one_kind(kinds, backend):
                return whose, ()
            names, geometry = tuple(name_of[module] for module in modules), tuple(geometry_of(entries))
            cache = self._cache_of_run(names, geometry, backend)
            steps.append((names, geometry, cache.token, entries[-1].kind is LayerKind.LINEAR))
        return whose, tuple(steps)

    def _cache_of_run(self, names: tuple[str, ...], geometry: tuple[int, ...], backend: str) -> PackedCache:
        caches, found = _weights.setdefault(self, {}), weakref.ref(self)

        def modules() -> list[nn.Module]:
            sequence = found()
            assert sequence is not None  # who asks has it
            return _called(sequence, names)

        key = names, geometry, backend
        if key not in caches:
            caches[key] = PackedCache(
                lambda: layer_parameters(modules()),
                _folding(geometry),
                # By train() and eval() of each of its blocks, whichever they are now.
                lambda: [m._forgotten for m in modules() if isinstance(m, FusedBlock)],
            )
        return caches[key]


def _folding(geometry: Sequence[int]) -> Any:
    return lambda *arguments: (fold_layers(geometry, *arguments),)


# What a graph calls; see cached_inverted_residual. No autograd: gradients are the blocks' own.
_library = torch.library.Library("mnv2_fused", "FRAGMENT")
_library.define(
    "cached_sequence(Tensor x, Tensor?[] sources, float[] eps, int[] layers, int cache, str backend, int site)"
    " -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


def _cached_sequence(x, sources, eps, layers, cache, backend, site):  # by the schema's names
    found = PackedCache.of(cache) or PackedCache(fold=_folding(layers))
    (weights,) = found.get(sources, eps, x.dtype, backend, site)
    assert weights is not None
    return ops.sequence(x, weights, layers, backend)


_library.impl("cached_sequence", _cached_sequence, "CompositeExplicitAutograd")


@torch.library.register_fake("mnv2_fused::cached_sequence")
def _fake(x, sources, eps, layers, cache, backend, site):
    return ops.sequence_fake(x, sources[0], layers)


def _multiply_adds(x, sources, eps, layers, cache, backend, site):
    return row_multiply_adds(x.shape, layers)


count_flops(torch.ops.mnv2_fused.cached_sequence, _multiply_adds)
