"""A fused model on weights that are kept for good: nothing is asked at a call, the modules inside are let go."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import backends, ops
from ..fold import PackedWeights
from ..module.compiled import op_choices
from ..module.extra_arguments import ExtraArguments
from ..module.fused_block import FusedBlock
from ..module.guard import has_hooks
from ..module.parameters import first_weight, fold_and_pack
from ..tensors import check_input
from .find import sequence_backend
from .fused import PreparedRun, Run, RunsFused
from .weights import join

_AGAIN = "call mnv2_fused.fuse(model, frozen=True) again, on the original model"  # as the end of a sentence


class _Frozen(nn.Module):
    """What runs in one dtype, on one device, in eval alone."""

    dtype: torch.dtype
    is_cpu: bool

    def _check(self, x: Tensor) -> None:
        if x.dtype is not self.dtype:
            raise TypeError(f"the model is frozen for {self.dtype}, got x of {x.dtype}; convert x, or {_AGAIN}")
        if x.is_cpu is not self.is_cpu:
            there = "the CPU" if self.is_cpu else "a GPU"
            raise RuntimeError(f"the model is frozen for {there}, got x on {x.device}; move x, or {_AGAIN}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a frozen model has no derivative; use torch.no_grad(), or mnv2_fused.fuse(model) without frozen=True"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Frozen:
        """Refuses a change of dtype or device: packed weights are laid out for one kernel and one dtype."""
        device = next(self.buffers()).device
        moved = fn(torch.empty(0, dtype=self.dtype, device=device))
        if (moved.dtype, moved.device) != (self.dtype, device):
            raise RuntimeError(
                f"a frozen model stays in {self.dtype} on {device}, it cannot become {moved.dtype} on {moved.device}; "
                f"convert the original model, then {_AGAIN}"
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> _Frozen:
        if mode:
            raise RuntimeError("a frozen model cannot train: its weights are packed; train the original model")
        return super().train(False)


class Whole(nn.Module):
    """What stands for a Sequential whose children it no longer has."""

    def __getitem__(self, index: Any) -> nn.Module:
        raise TypeError(
            f"a frozen or quantised row of layers runs as a whole and has no child {index!r}: a model that calls its "
            "layers one by one runs fused without frozen=True, or quantised with rows=False"
        )

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self[0]])


class FrozenRow(_Frozen, Whole):
    """Layers in a row as one call of the op; ``weights``: their packed weights, joined, [bytes]."""

    weights: Tensor

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.dtype, self.is_cpu, self.backend = run.dtype, run.is_cpu, run.backend
        self.geometry, self.layers, self.flat = run.geometry, run.row[1], run.flat
        self.register_buffer("weights", run.weights)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C_out, H', W'], or [N, C_out] behind a classifier
        self._check(x)
        if self.backend == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling():
            return ops.sequence_row(x, self.weights, self.layers, self.flat)
        y = ops.sequence(x, self.weights, self.geometry, self.backend)
        return y.flatten(1) if self.flat else y

    def __getstate__(self) -> dict[str, Any]:
        # A copy: the buffer is a part of memory that is aligned to pages, all of which would be written.
        return self.__dict__ | {"_buffers": {"weights": self.weights.clone()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers["weights"] = join([self.weights])

    def extra_repr(self) -> str:
        return f"{self.weights.numel()} bytes of packed weights, {self.dtype}, backend={self.backend}"


class FrozenBlock(_Frozen):
    """One block on its packed weights."""

    def __init__(self, block: FusedBlock, backend: str) -> None:
        super().__init__()
        parameters, eps = block._fold_parameters()
        weight, spec = first_weight(parameters), block.spec
        assert spec is not None  # who freezes a block asked for its fallback_reason
        self.dtype, self.is_cpu, self.backend = weight.dtype, weight.is_cpu, backend
        self.spec = spec
        with torch.no_grad():
            packed = fold_and_pack(parameters, eps, self.dtype, backend)
        for name, t in zip(PackedWeights._fields, packed, strict=True):
            self.register_buffer(name, t)
        self.leading = block.leading_child
        around = block._around
        self.tail = nn.Sequential(*(block.get_submodule(name) for name in around.tail)) if around else None
        self.shortcut = around is not None and around.shortcut
        self.extra = ExtraArguments(block)
        self.training = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [N, C_in, H, W] -> [N, C_out, H', W']
        if args or kwargs:
            self.extra.check(args, kwargs, "use the model without frozen=True")
        self._check(x)
        outer = x
        if self.leading is not None:
            with torch.no_grad():  # its parameters may need gradients, which nothing here has
                x = self.leading(x)
        spec, packed = self.spec, PackedWeights._make(self._buffers[name] for name in PackedWeights._fields)
        check_input(x, spec.in_channels, spec)
        plan, op_options = op_choices(spec, x)
        x = x.contiguous(memory_format=torch.channels_last)
        y = ops.packed_inverted_residual(x, packed, spec.strides[0], spec.residual, plan, self.backend, op_options)
        if self.tail is not None:
            with torch.no_grad():
                y = self.tail(y)
        return y + outer if self.shortcut else y

    def extra_repr(self) -> str:
        return f"{self.spec}, {self.dtype}, backend={self.backend}"


class FrozenModel(Whole):
    """Frozen rows, and what lies between them, one after the other."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        for i, step in enumerate(steps):
            self.add_module(str(i), step)
        self.training = False

    def forward(self, input: Tensor) -> Tensor:
        for step in self._modules.values():
            assert step is not None
            input = step.forward(input) if type(step) is FrozenRow else step(input)
        return input


def is_frozen(module: nn.Module) -> bool:
    return isinstance(module, _Frozen)


def freeze(model: nn.Module) -> nn.Module:
    """Replaces, in ``model`` itself, fused blocks and rows of layers by their packed weights; returns the model.

    ``model`` itself is replaced where it is a row or a block: use what is returned. A block that no kernel runs here
    stays as it is, with a warning.
    """
    model.eval()
    swaps: dict[nn.Module, nn.Module] = {}
    with torch.inference_mode(False), torch.no_grad():
        _collect(model, swaps)
    return replaced(model, swaps)


def replaced(module: nn.Module, swaps: Mapping[Any, nn.Module]) -> nn.Module:
    """``module``, or what stands for it, with each of ``swaps`` inside replaced, wherever it hangs."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]
    return swaps.get(module, module)


def _collect(module: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    if module in swaps:
        return
    if isinstance(module, RunsFused) and (steps := _frozen_steps(module, swaps)):
        # A step by itself has no place for other hooks than its own, and a row among others is called without any.
        alone = len(steps) == 1 and not has_hooks(module)
        swaps[module] = steps[0] if alone else hooked_as(module, FrozenModel(*steps))
    elif isinstance(module, FusedBlock):
        why, backend = module.fallback_reason(), "eager"
        if why is None:
            device = first_weight(module._fold_parameters()[0]).device
            backend, why = ops.kernel_for(module._read_spec, module.backend, device)
            if backend == "eager":
                why = why or "backend='eager'"
        if why is None:
            swaps[module] = hooked_as(module, FrozenBlock(module, backend))
        else:
            warnings.warn(f"an inverted residual is not frozen: {why}", stacklevel=5)
    else:
        for child in module._modules.values():
            if child is not None:
                _collect(child, swaps)


def hooked_as(module: nn.Module, frozen: nn.Module) -> nn.Module:
    """``frozen`` with the very dictionaries of what ``module`` calls around its forward: handles still work."""
    vars(frozen).update({name: hooks for name, hooks in vars(module).items() if name.startswith("_forward_")})
    return frozen


def _frozen_steps(module: RunsFused, swaps: dict[nn.Module, nn.Module]) -> list[nn.Module]:
    """What ``module`` runs, in order; nothing where no row of it runs as one call."""
    children, parents = module.fusable_children()
    parameter = next(itertools.chain.from_iterable(m.parameters() for m in _present(children)), None)
    if parameter is None or backends._C is None or (backend := sequence_backend(parameter.device)) is None:
        return []
    prepared = PreparedRun(children, parents, RemovableHandle.next_id, backend, parameter.is_cpu)
    if not prepared.runs or None in children:
        return []
    steps: list[nn.Module] = []
    for step in prepared.steps:
        if isinstance(step, Run):
            steps.append(FrozenRow(step))
        else:
            _collect(step, swaps)
            steps.append(replaced(step, swaps))
    return steps


def _present(modules: Iterable[nn.Module | None]) -> list[nn.Module]:
    return [m for m in modules if m is not None]
