"""``report``: which blocks of a model run fused, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..encoding import LayerKind
from ..module import FusedBlock, FusedFlat
from ..module.parameters import conv_norm_activation
from ..ops import kernel_for
from ..plans.cpu import plan
from ..sequence import RunsFused
from ..sequence.find import Layer, sequence_backend
from ..sequence.frozen import is_frozen
from ..sequence.joined import Joined
from ..spec import BlockSpec
from .find import Match, blocks_of, check_model
from .shapes import Shapes, shapes_of_call, shapes_of_input
from .unknown import UnknownBlocks, unknown_blocks


@dataclass(frozen=True)
class BlockReport:
    """One block of a :class:`Report`."""

    name: str
    spec: BlockSpec | None  # None where no matcher could read one
    fused: bool
    backend: str | None  # what runs it in eval(); None when it is not fused or no backend takes it
    reason: str | None  # why it is not fused, or fused but not run by a kernel
    bytes_never_written: int | None  # expanded tensors per image, for blocks that a kernel runs
    not_trained: str | None = None  # why, in train() with statistics of the batch, its modules run; None: kernels do


@dataclass(frozen=True)
class LayerReport:
    """What runs on the kernels beside the blocks of a :class:`Report`."""

    name: str  # of its first module
    what: str
    backend: str  # "cpu" or "cuda"
    bytes_never_written: int | None  # tensors per image that only the ordinary modules write


@dataclass(frozen=True)
class Report:
    """Every inverted residual of a model, and what runs with them. ``print`` it for a table."""

    blocks: tuple[BlockReport, ...]
    training: bool  # whether a fused block is in train()
    layers: tuple[LayerReport, ...] = ()  # stem, head and classifier, where they run in one call with the blocks
    unknown: tuple[UnknownBlocks, ...] = ()  # depthwise and 1x1 convolutions in modules that are none of the blocks

    @property
    def fused(self) -> tuple[BlockReport, ...]:
        return tuple(b for b in self.blocks if b.fused)

    @property
    def skipped(self) -> tuple[BlockReport, ...]:
        return tuple(b for b in self.blocks if not b.fused)

    @property
    def bytes_never_written(self) -> int | None:
        """Bytes per image over blocks and layers, or None when the report was made without ``input_shape``."""
        found = [row.bytes_never_written for row in (*self.blocks, *self.layers)]
        known = [count for count in found if count is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        rows = [("block", "spec", "backend", "never written", "reason")]
        for b in self.blocks:
            spec = "-" if b.spec is None else str(b.spec)
            rows.append((b.name or "(model)", spec, b.backend or "-", _mib(b.bytes_never_written), b.reason or ""))
        for layer in self.layers:
            rows.append((layer.name, layer.what, layer.backend, _mib(layer.bytes_never_written), ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = f"{len(self.fused)} fused, {len(self.skipped)} not fused"
        if self.bytes_never_written is not None:
            total += f", {_mib(self.bytes_never_written)} never written per image"
        if self.training:
            reasons = Counter(b.not_trained for b in self.fused if b.not_trained is not None)
            trained = len(self.fused) - reasons.total()
            total += f"; now in train(), where {trained} run fused, too"
            total += "".join(f"; {count} as ordinary modules: {why}" for why, count in reasons.items())
        return "\n".join([*lines, *(f"not known: {row}" for row in self.unknown), total])


def report(model: nn.Module, input_shape: Sequence[int] | None = None, *, example_inputs: Any = None) -> Report:
    """Which inverted residuals of ``model`` run fused in eval, by which backend, and why the others do not.

    ``input_shape``, [N, C, H, W] of the model's only input, or ``example_inputs``, whatever it takes (a tensor, a list
    or tuple of arguments, or a mapping of named ones), adds the bytes per image that are never written: the expanded
    tensors of each fused block, at its own input shape, over all its calls. With ``input_shape`` a copy without values
    runs on the meta device, and the model itself where no such copy does; with ``example_inputs`` the model itself,
    once, in eval and without gradients. Raises TypeError for what is no module, ValueError for a frozen model, and
    where the model does not run on the input.
    """
    check_model(model)
    if any(map(is_frozen, model.modules())):
        raise ValueError("a frozen model has let its modules go; report the fused model before it is frozen")
    if input_shape is not None and example_inputs is not None:
        raise ValueError(f"give input_shape or example_inputs, not both; got {tuple(input_shape)} and some inputs")
    found = list(blocks_of(model))
    shapes: Shapes = {}
    if input_shape is not None:
        shapes = shapes_of_input(model, input_shape)
    elif example_inputs is not None:
        shapes = shapes_of_call(model, example_inputs)
    rows = tuple(_block_report(*entry, shapes.get(entry[0])) for entry in found)
    training = any(isinstance(block, FusedBlock) and _in_training(block) for _, block, _ in found)
    unknown = unknown_blocks(model, (block for _, block, _ in found))
    names = {block: name for name, block, _ in found}
    return Report(rows, training, tuple(_layer_reports(model, shapes, names)), unknown)


_LAYERS = {
    LayerKind.STEM_AND_BLOCK: "3x3 stem, inside the block behind it",
    LayerKind.POINTWISE: "1x1 convolution",
    LayerKind.POOLED: "1x1 convolution and pooling",
    LayerKind.LINEAR: "classifier",
}


def _layer_reports(model: nn.Module, shapes: Shapes, blocks: Mapping[nn.Module, str]) -> Iterator[LayerReport]:
    """What runs in one call with fused ``blocks`` now: nothing in train(), or where something is hooked."""
    parameter = next(model.parameters(), None)
    backend = None if parameter is None else sequence_backend(parameter.device)
    if backend is None:
        return  # every block's row says why
    names = {module: name for name, module in model.named_modules()}
    seen: set[nn.Module] = set()
    # A whole model before its parts: it runs more in one call than they do.
    for sequence in [m for m in model.modules() if isinstance(m, RunsFused)]:
        for layer in sequence.layers_now(backend):
            first, last = layer.modules[0], layer.modules[-1]
            module = layer.linear or first
            module = module.parts[0] if isinstance(module, Joined) else module
            if layer.kind not in _LAYERS or module in seen:
                continue
            seen.add(module)
            block = last if layer.kind is LayerKind.STEM_AND_BLOCK else layer.before
            count = None
            if isinstance(block, FusedBlock) and (spec := block.spec) and (found := shapes.get(blocks.get(block, ""))):
                count = _never_written(layer, spec, found[0])
            yield LayerReport(names[module], _LAYERS[layer.kind], backend, count)


def _never_written(layer: Layer, spec: BlockSpec, shape: torch.Size) -> int:
    """Bytes per image; ``shape`` is what the nearest block takes."""
    height, width = shape[2:]
    if layer.kind is LayerKind.POOLED:
        height, width = spec.out_size(height, width)
    if not isinstance(layer.modules[0], nn.Sequential) or layer.kind is LayerKind.POINTWISE:
        return 0
    conv, _, _ = conv_norm_activation(layer.modules[0])
    return conv.out_channels * height * width * conv.weight.dtype.itemsize


def _in_training(block: FusedBlock) -> bool:
    return any(part.training for part in block.parts) if isinstance(block, FusedFlat) else block.training


def _block_report(
    name: str, block: nn.Module, found: Match | str | None, inputs: list[torch.Size] | None
) -> BlockReport:
    if isinstance(found, str):
        return BlockReport(name, None, False, None, found, None)
    if isinstance(found, Match):
        return BlockReport(name, found.spec, False, None, "not fused: call fuse(model)", None)
    assert isinstance(block, FusedBlock)  # all others have a match or a reason
    reason = block.fallback_reason()
    if block.spec is None:  # its layers were changed beyond recognition
        return BlockReport(name, None, True, "eager", reason, None)
    weight = block._pairs[-1][0].weight
    backend: str | None = "eager"
    if reason is None:
        try:
            backend, reason = kernel_for(block.spec, block.backend, weight.device)
        except (RuntimeError, ValueError) as error:  # no backend here, or an override that names none
            backend, reason = None, str(error)
    if isinstance(block, FusedFlat) and backend == "triton":
        backend, reason = "eager", _IN_ROWS_ALONE
    never_written = None
    if inputs is not None and backend not in (None, "eager"):
        never_written = sum(
            plan(block.spec, (1, *shape[1:]), dtype=weight.dtype).bytes_never_written for shape in inputs
        )
    not_trained = reason if backend is None else block.not_trained()
    return BlockReport(name, block.spec, True, backend, reason, never_written, not_trained)


_IN_ROWS_ALONE = "layers that lie among others' in one Sequential run fused by the CPU's and CUDA C++'s kernels alone"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f} MiB"
