"""Layers in a row as one call: the stem, inverted residuals and the head of a network inside one ``nn.Sequential``."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from . import layers, ops
from .fold import fold_conv_bn, pack_conv
from .module import FusedInvertedResidual
from .watch import Watch, lasting, parameters_of


class LayerKind(enum.IntEnum):
    """What one entry of the op's ``layers`` names; csrc/ops.cpp has its twin."""

    BLOCK = 0
    BLOCK_WITHOUT_EXPAND = 1
    STEM_AND_BLOCK = 2
    POINTWISE = 3
    POOLED = 4


@dataclass(frozen=True)
class Layer:
    """What runs as one kernel: one or two children of a sequence, in their order."""

    kind: LayerKind
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def geometry(self) -> list[int]:
        """Kind, stride, residual: this layer's part of the op's ``layers``."""
        block = next((m for m in self.modules if isinstance(m, FusedInvertedResidual)), None)
        if block is None:
            return [self.kind, 1, 0]
        return [self.kind, block.spec.stride, int(block.use_res_connect)]


def layers_of(sequence: nn.Sequential) -> Iterator[Layer | str]:
    """The children of ``sequence``: a :class:`Layer` where a kernel takes them, else the name of one child."""
    children = list(sequence._modules.items())
    i = 0
    while i < len(children):
        name, child = children[i]
        after = children[i + 1][1] if i + 1 < len(children) else None
        taken: tuple[LayerKind, int] | None = None
        if isinstance(child, FusedInvertedResidual):
            if _block_can_run(child):
                taken = (LayerKind.BLOCK if child.spec.expand else LayerKind.BLOCK_WITHOUT_EXPAND), 1
        elif _is_layer(child, "stem"):
            if isinstance(after, FusedInvertedResidual) and _block_can_run(after) and not after.spec.expand:
                fits = child[0].out_channels == after.spec.in_channels and not after.spec.residual
                taken = (LayerKind.STEM_AND_BLOCK, 2) if fits else None
        elif _is_layer(child, "head"):
            taken = (LayerKind.POOLED, 2) if _is_mean(after) else (LayerKind.POINTWISE, 1)
        if taken is None:
            yield name
            i += 1
        else:
            kind, count = taken
            names, modules = zip(*children[i : i + count], strict=True)
            yield Layer(kind, names, modules)
            i += count


def _is_layer(child: nn.Module | None, name: str) -> bool:
    if not isinstance(child, nn.Sequential) or next(layers.conv_objections(child, name), None) is not None:
        return False
    conv, norm, _ = child
    tensors = [t for t in parameters_of(conv, norm) if t is not None]
    if norm.training and norm._parameters:
        return False
    return lasting(tensors) and len({(t.dtype, t.device) for t in tensors}) == 1


def _is_mean(child: nn.Module | None) -> bool:
    if type(child) is not nn.AdaptiveAvgPool2d or "forward" in vars(child) or layers.has_hooks(child):
        return False
    return child.output_size in (1, (1, 1))


def _block_can_run(block: FusedInvertedResidual) -> bool:
    if block.backend == "eager" or "forward" in vars(block) or layers.has_hooks(block):
        return False
    return block.packed_for_sequence() is not None


class _Run:
    """Layers that one call of the op computes."""

    def __init__(self, found: list[Layer], dtype: torch.dtype) -> None:
        self.geometry = [value for layer in found for value in layer.geometry]
        self.weights: list[Tensor] = []
        for layer in found:
            for module in layer.modules:
                if isinstance(module, FusedInvertedResidual):
                    self.weights += [t for t in module.packed_for_sequence() if t is not None]
                elif isinstance(module, nn.Sequential):
                    self.weights += _packed_conv(module, dtype)


def _packed_conv(layer: nn.Sequential, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    conv, norm, _ = layer
    with torch.no_grad():
        return pack_conv(*fold_conv_bn(*parameters_of(conv, norm), norm.eps), dtype)


class _Prepared:
    """A sequence cut into runs and single modules, valid while its ``watch`` holds."""

    def __init__(self, sequence: nn.Sequential, next_hook: int) -> None:
        found = list(layers_of(sequence))
        fused = [m for layer in found if isinstance(layer, Layer) for m in layer.modules]
        self.watch = Watch(fused, next_hook, parent=sequence)
        kinds = {(t.dtype, t.device) for t in self.watch.tensors}
        self.dtype, device = next(iter(kinds), (None, None))
        # Global hooks would miss the modules inside.
        self.runs = len(kinds) == 1 and device.type == "cpu" and not torch_module._has_any_global_hook()
        self.steps: list[_Run | nn.Module] = []
        if not self.runs:
            return
        for is_layer, group in itertools.groupby(found, lambda layer: isinstance(layer, Layer)):
            if is_layer:
                self.steps.append(_Run(list(group), self.dtype))
            else:
                self.steps += [sequence._modules[name] for name in group]


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs neighbouring fused blocks as one call, with a stem or head beside them.

    :func:`mnv2_fused.fuse` turns each Sequential that holds fused blocks into one. In eval on the CPU, where nothing
    records gradients: the blocks' outputs share one buffer; a stem (3x3, stride 2, norm, ReLU6) runs in the kernel of
    the block behind it, if that has no expansion, so that its output is never written; a head (1x1, norm, ReLU6) runs
    on the blocks' kernel, and the tensor before an ``AdaptiveAvgPool2d(1)`` behind it is never written. Anything else
    in the sequence, and everything in any other mode, runs child by child as in ``nn.Sequential``. What comes out is
    in channels_last.
    """

    _prepared: _Prepared | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.training or type(x) is not Tensor or not x.is_cpu:
            return super().forward(x)
        if ops.resolve_backend("auto", x.device) == "eager" or torch.is_autocast_enabled("cpu") or ops.transformed():
            return super().forward(x)
        prepared = self._prepared
        if prepared is None or not prepared.watch.holds():
            self._prepared = prepared = _Prepared(self, RemovableHandle.next_id)
        if not prepared.runs or x.dtype is not prepared.dtype:
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in prepared.watch.tensors)):
            return super().forward(x)
        for step in prepared.steps:
            x = ops.sequence(x, step.weights, step.geometry) if type(step) is _Run else step(x)
        return x

    def train(self, mode: bool = True) -> FusedSequential:
        self.__dict__.pop("_prepared", None)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedSequential:
        self.__dict__.pop("_prepared", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_prepared", None)
        return state
