"""Layers in a row as one call: stem, inverted residuals, head, pooling and classifier of a network."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .. import backends, ops
from ..encoding import LayerKind
from ..module.flat import FusedFlat
from ..module.fused_block import SCRIPTED, FusedBlock
from ..module.guard import Guard, has_hooks, is_compiled
from ..module.in_place import around_the_same
from ..module.packed_cache import cacheable, capturing
from .compiled import RunsTraced, forget
from .find import FLATTEN, POOL, Layer, geometry_of, grouped, layers_of, one_kind, sequence_backend
from .joined import Joined
from .training import train_row
from .weights import fold_layers, layer_parameters


class _ChangedMeanwhile(Exception):
    """Another thread changed a layer while it was being prepared."""


class Run:
    """Layers that one call of the op computes."""

    def __init__(self, found: list[Layer], dtype: torch.dtype, backend: str) -> None:
        self.dtype = dtype
        self.backend = backend
        self.modules = [module for layer in found for module in layer.modules]
        self.geometry = geometry_of(found)
        parameters, eps = layer_parameters(self.modules)
        self.weights = fold_layers(self.geometry, parameters, eps, dtype, backend)
        self.is_cpu = self.weights.is_cpu
        self.flat = found[-1].kind is LayerKind.LINEAR
        first = self.modules[0]
        self.adds_input = isinstance(first, FusedBlock) and first.spec is not None and first.spec.residual
        self.row = self.weights, torch.tensor(self.geometry), self.flat  # what ops.sequence_row takes behind x

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is what the op takes, not recording gradients."""
        ordinary = type(x) is Tensor and x.is_cpu is self.is_cpu and x.dtype is self.dtype
        return ordinary and not (x.requires_grad and torch.is_grad_enabled())

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x) if self.takes(x) else self.by_modules(x)  # made by a module between two runs

    def by_modules(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x

    def under_autocast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The result in autocast's ``dtype``, as convolutions give it, of float32 inside."""
        wider = self.adds_input and x.dtype is not dtype  # whose sum with a convolution's result is as wide
        if type(x) is not Tensor or x.dtype not in (torch.float32, dtype) or wider:
            return self.by_modules(x)
        return self.call(x.float()).to(dtype)

    def call(self, x: Tensor) -> Tensor:
        """Of what it takes."""
        if self.backend == "cpu":
            return ops.sequence_row(x, *self.row)
        y = ops.sequence(x, self.weights, self.geometry, self.backend)
        return y.flatten(1) if self.flat else y


class PreparedRun:
    """Children cut into runs of ``backend`` and single modules, valid while ``guard`` is."""

    def __init__(
        self,
        children: list[nn.Module | None],
        parents: list[nn.Module],
        next_hook: int,
        backend: str,
        is_cpu: bool,
        watched: Iterable[nn.Module] = (),
    ) -> None:
        self.is_cpu, self.backend = is_cpu, backend
        found = list(layers_of(children, backend))
        in_runs = [m for layer in found if isinstance(layer, Layer) for m in layer.modules]
        others = [entry for entry in found if isinstance(entry, nn.Module)]
        hooked = [*parents, *itertools.chain.from_iterable(m.modules() for m in others)]
        self.guard = Guard.of_modules(in_runs, next_hook, parents, hooked, watched)
        # Again: a guard takes for unchanged what another thread changed before it was there.
        if list(layers_of(children, backend)) != found:
            raise _ChangedMeanwhile
        kinds = {(t.dtype, t.device) for t in self.guard.tensors}
        self.dtype, device = next(iter(kinds), (None, None))
        has_blocks = any(isinstance(m, FusedBlock) for m in in_runs)
        self.runs = has_blocks and (device and device.type == "cpu") is is_cpu and one_kind(kinds, backend)
        self.steps: list[Run | nn.Module] = []
        self.only: tuple[Tensor, Tensor, bool] | None = None  # the row of a run on the CPU, where that is all
        self.of_call: tuple[Tensor, Tensor, bool] | None = None  # the same where a call of the module does no more
        if not self.runs or self.dtype is None:
            return
        for is_run, entries in grouped(found):
            self.steps += [Run(entries, self.dtype, backend)] if is_run else entries
        self.cacheable = all(cacheable(run.weights) for run in self.runs_of())
        first = self.steps[0]
        self.only = first.row if isinstance(first, Run) and len(self.steps) == 1 and backend == "cpu" else None

    def runs_of(self) -> Iterator[Run]:
        """Those among the steps."""
        return (step for step in self.steps if isinstance(step, Run))

    def under_autocast(self, x: Tensor) -> Tensor | None:
        """The CPU kernels' result where autocast is enabled; None where the modules have to run."""
        dtype = torch.get_autocast_dtype("cpu")
        if self.backend != "cpu" or self.dtype is not torch.float32 or x.dtype not in (torch.float32, dtype):
            return None
        for step in self.steps:
            x = step.under_autocast(x, dtype) if isinstance(step, Run) else step(x)
        return x


# Of each sequence what CUDA graphs were captured with, which read its weights where they are.
_captured: weakref.WeakKeyDictionary[nn.Module, list[PreparedRun]] = weakref.WeakKeyDictionary()


class RunsFused(RunsTraced):
    """What a module that calls its children one after the other inherits from to run them fused where it can.

    In eval, where nothing records gradients, neighbouring fused blocks and what lies beside them are one call, on the
    CPU and by the CUDA kernel: the blocks' outputs share one buffer; a stem (3x3, stride 2, norm, activation) runs in
    the kernel of the block behind it, if that has neither expansion nor residual, so that its output is never written.
    On the CPU a head (1x1, norm, activation) runs on the blocks' kernel, and the tensor before an
    ``AdaptiveAvgPool2d(1)`` is never written; each ``Linear`` behind that joins in. A ``FusedSequential`` among the
    children counts as its own. Anything else, and everything in any other mode, runs module by module.
    """

    OWN: tuple[str, ...] = ("_prepared",)  # all that it has beside what its original had
    outermost = False  # whether it is nobody's child
    _prepared: PreparedRun | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_dynamo_compiling():
            prepared = self._prepared
            if prepared is not None and prepared.of_call is not None and prepared.guard.serves(args[0]):
                return ops.sequence_row(args[0], *prepared.of_call)
        return super().__call__(*args, **kwargs)

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        """The modules that forward calls in a row, and those whose lists of children they come from."""
        children: list[nn.Module | None] = []
        parents: list[nn.Module] = [self]
        for child in self._in_turn():
            if type(child) is FusedSequential and "forward" not in vars(child) and not has_hooks(child):
                inner, more = child.fusable_children()
                children += inner
                parents += more
            else:
                children.append(child)
        return list(Joined.in_row(self, children)), parents

    def _in_turn(self) -> Iterator[nn.Module | None]:
        """What forward calls, a block whose layers are some of the children in the place of those."""
        yield from self._modules.values()

    def run_fused(self, x: Tensor) -> Tensor | None:
        """The result, in channels_last where it has pixels; None where the ordinary forward has to run."""
        # Every call runs this with cold caches, so what the guard would notice is looked at in _prepare alone.
        if torch.compiler.is_dynamo_compiling():  # other tracers bring tensors of other types
            return self.run_traced(x)
        if self.training or type(x) is not Tensor:
            return None
        prepared = self._prepared
        # First in one look, which also says no where the following lines say yes.
        if prepared is not None and prepared.only is not None and prepared.guard.serves(x):
            return ops.sequence_row(x, *prepared.only)
        if prepared is None or prepared.is_cpu is not x.is_cpu or not prepared.guard.is_valid():
            if prepared is not None:
                prepared.guard.warn_if_late()
            if self._blocks_record():
                return None  # fine-tuning changes the weights every step: nothing is folded for a run that may not be
            prepared = self._prepare(x)
        if prepared is None or not prepared.runs or backends.transformed():
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in prepared.guard.tensors)):
            return None
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return self._under_autocast(prepared, x)
        if x.dtype is not prepared.dtype:
            return None
        if not prepared.is_cpu and capturing(x.device):
            held = _captured.setdefault(self, [])
            if prepared not in held:
                held.append(prepared)
        for step in prepared.steps:
            x = step(x)
        return x

    def _under_autocast(self, prepared: PreparedRun, x: Tensor) -> Tensor | None:
        return prepared.under_autocast(x)

    def _watched(self, parents: list[nn.Module]) -> list[nn.Module]:
        """Those of ``parents`` whose attributes decide what runs."""
        return []

    def _blocks_record(self) -> bool:
        children, _ = self.fusable_children()
        blocks = (m for m in children if isinstance(m, FusedBlock))
        return torch.is_grad_enabled() and any(t.requires_grad for block in blocks for t in block.parameters())

    def layers_now(self, backend: str = "cpu") -> list[Layer]:
        """What a call in this state runs on the kernels of ``backend``, beside modules that run by themselves; none in
        train().
        """
        if backends._C is None or self.training:
            return []
        children, _ = self.fusable_children()
        on_kernels = [layer for layer in layers_of(children, backend) if isinstance(layer, Layer)]
        blocks = [m for layer in on_kernels for m in layer.modules if isinstance(m, FusedBlock)]
        kinds = {(t.dtype, t.device) for block in blocks for t in block.parameters()}
        runs = one_kind(kinds, backend) and all(sequence_backend(device) == backend for _, device in kinds)
        return on_kernels if runs else []

    def _prepare(self, x: Tensor) -> PreparedRun | None:
        self._prepared = None  # the guard counts attributes, this one too
        next_hook = RemovableHandle.next_id  # before looking, so that what changes meanwhile is noticed next time
        if backends._C is None or backends.transformed():
            return None
        if torch_module._has_any_global_hook():  # which would miss the modules inside
            return None
        if (backend := sequence_backend(x.device)) is None:
            return None
        try:
            found = self.fusable_children()
            prepared = PreparedRun(*found, next_hook, backend, x.is_cpu, self._watched(found[1]))
        except _ChangedMeanwhile:
            return None
        if self.fusable_children() != found:
            return None
        for block in (b for parent in found[1] if isinstance(parent, FusedSequential) for b in parent._flat):
            if (why := block.fallback_reason()) is not None:
                block._warn(f"runs unfused: {why}")
        if not prepared.runs or prepared.cacheable:
            # The guard, which is there by now, notices what would change this.
            if not (has_hooks(self) or is_compiled(self) or "forward" in vars(self)):
                prepared.of_call = prepared.only
            self._prepared = prepared
        return prepared  # another thread may have dropped it from self again

    def train(self, mode: bool = True) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        forget(self)
        return super().train(mode)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles."""
        if not self.outermost:
            warnings.warn(SCRIPTED, stacklevel=2)
        return self._ordinary()

    def _ordinary(self) -> nn.Module:
        other = around_the_same(self, ordinary_class(self), self.OWN)
        for name, child in self._modules.items():
            if isinstance(child, FusedBlock | RunsFused):
                other._modules[name] = child._ordinary()
        return other

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        for name in self.OWN:
            replica.__dict__.pop(name, None)  # of the original's weights
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        forget(self)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_prepared", None)
        return state


def ordinary_class(module: RunsFused) -> type[nn.Module]:
    """What :func:`mnv2_fused.fuse` found ``module`` to be."""
    return next(c for c in type(module).__mro__ if not issubclass(c, RunsTraced))


class FusedSequential(RunsFused, nn.Sequential):
    """What :func:`mnv2_fused.fuse` makes of each ``nn.Sequential`` that holds fused blocks, or others of its kind.

    ``_flat``: blocks whose layers are some of its children. They are no children themselves, so that names, slices and
    whatever goes through the children find the layers.
    """

    OWN = (*RunsFused.OWN, "_flat")
    _flat: tuple[FusedFlat, ...] = ()

    def _in_turn(self) -> Iterator[nn.Module | None]:
        inside = {name: block for block in self.flat_now() for name in block._modules}
        ahead = None
        for name, child in self._modules.items():
            block = inside.get(name)
            if block is None:
                yield child
            elif block is not ahead:
                yield block
            ahead = block

    def hold(self, block: FusedFlat) -> None:
        """From now on its layers, some of the children, run as ``block``."""
        block.training = False  # in which mode its layers are, they know themselves
        self._flat = (*self.flat_now(), block)

    def flat_now(self) -> list[FusedFlat]:
        """The blocks among the children as they are now."""
        found: dict[FusedFlat, set[str]] = {}
        for changed in (False, True):  # first those whose layers are the same, wherever they are now
            for block in self._flat:
                taken = set().union(*found.values())
                if block not in found and block.follow(self, changed, taken):
                    found[block] = set(block._modules)
        for block in self._flat:
            if block._apart is (block in found):
                block._apart = block not in found
        return list(found)

    def forward(self, input: Tensor) -> Tensor:
        y = self.run_fused(input)
        if y is not None:
            return y
        if self.training and type(input) is Tensor and not torch.compiler.is_compiling():
            return train_row(input, list(self._row_in_training()))
        return super().forward(input)

    def _row_in_training(self) -> Iterator[nn.Module]:
        """Its children, blocks in the place of their layers, and what others of its kind hold in theirs, so that a stem
        finds the block behind it."""
        for child in self._in_turn():
            if isinstance(child, FusedSequential) and child.training and child._is_its_children():
                yield from child._row_in_training()
            elif child is not None:
                yield child

    def _is_its_children(self) -> bool:
        """Whether a call of it is nothing but calls of its children."""
        if type(self).forward is not FusedSequential.forward or "forward" in vars(self):
            return False
        return not (has_hooks(self) or is_compiled(self) or torch_module._has_any_global_hook())

    def train(self, mode: bool = True) -> nn.Module:
        self._forget_flat()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._forget_flat()
        return super()._apply(*args, **kwargs)

    def _forget_flat(self) -> None:
        for block in self._flat:
            block._forget()


class RunsWhole(RunsFused):
    """A network's: ``features``, the mean over their pixels (``avgpool``, if there is one), and ``classifier``.

    Called directly, they still give what they always gave.
    """

    outermost = True
    features: nn.Sequential
    classifier: nn.Sequential

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        parents = [self, self.features, self.classifier]
        if any(type(m).forward not in (nn.Sequential.forward, FusedSequential.forward) for m in parents[1:]):
            return [], parents
        if any("forward" in vars(m) or has_hooks(m) for m in parents[1:]):
            return [], parents
        features, inner = [*self.features._modules.values()], []
        if isinstance(self.features, FusedSequential):
            features, (_, *inner) = self.features.fusable_children()
        pool = self._modules.get("avgpool", POOL)
        return [*features, pool, FLATTEN, *self.classifier._modules.values()], [*parents, *inner]
