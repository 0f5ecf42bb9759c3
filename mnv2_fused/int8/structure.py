"""Which layers of a fused model run on integers, and the modules without values that take their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..convert.find import blocks_of
from ..convert.unknown import unknown_blocks
from ..encoding import LayerKind
from ..module import FusedBlock, FusedFlat, reading
from ..module.in_place import become
from ..sequence import RunsFused
from ..sequence.find import Layer, layers_of
from ..sequence.frozen import hooked_as, replaced
from ..sequence.fused import ordinary_class
from ..sequence.joined import Joined
from ..sequence.seen import RunsAsSeen
from .floats import FloatLayer, behind_unfold, float_layer
from .modules import QuantizedBlock, QuantizedLayer, QuantizedModel, QuantizedRow, Unfold


@dataclass(frozen=True)
class Unit:
    """A layer that runs on integers."""

    name: str  # of its block, or of its first module
    layer: QuantizedLayer
    source: FloatLayer
    ends_row: bool  # whether its result is float32 for others than layers on integers


@dataclass(frozen=True)
class Unquantized:
    """A block or layer that stays float."""

    name: str
    what: str
    reason: str


@dataclass
class Structure:
    """A model whose layers on integers have no values yet."""

    model: nn.Module
    units: list[Unit] = field(default_factory=list)
    rows: list[QuantizedRow] = field(default_factory=list)
    unquantized: list[Unquantized] = field(default_factory=list)
    seen: RunsAsSeen | None = None  # the network in float, where ``model`` is what its forward was seen to run


_WHAT = {
    LayerKind.STEM_AND_BLOCK: "3x3 stem and block",
    LayerKind.POINTWISE: "1x1 convolution",
    LayerKind.POOLED: "1x1 convolution and pooling",
    LayerKind.LINEAR: "classifier",
}


def what_of(source: FloatLayer) -> str:
    """What a layer is, in words."""
    block = "" if source.spec is None else str(source.spec)
    named = _WHAT.get(source.kind, "")
    return f"{named}: {block}" if named and block else named or block


def build(fused: nn.Module, skip: Collection[str], rows: bool) -> Structure:
    """Puts layers on integers into ``fused`` itself, but for those in modules that ``skip`` names.

    ``rows``: whether they run in rows; else each block runs by itself, and no other layer on integers.

    Raises ValueError for a name in ``skip`` of no module.
    """
    names = {module: name for name, module in reversed(list(fused.named_modules()))}
    known = set(dict(fused.named_modules()))
    if missing := [name for name in skip if name not in known]:
        raise ValueError(f"skip names {missing[0]!r}, which is no module of the model; see model.named_modules()")
    found = _Found(Structure(fused), names, frozenset(skip), rows)
    for name, block, why in list(blocks_of(fused)):
        if isinstance(why, str):
            found.keep(name, "block", why)
        elif isinstance(block, FusedBlock) and (objection := block.fallback_reason()) is not None:
            found.keep(name, "block", objection)
        elif isinstance(block, FusedFlat) and not rows:
            found.keep(name, str(block.spec), "its layers lie among others' in one Sequential: it needs rows=True")
    for row in unknown_blocks(fused, (block for _, block, _ in blocks_of(fused))):
        for name in row.names:
            found.keep(name, row.kind, row.reason)
    if rows and isinstance(fused, RunsAsSeen) and _runs_a_row(fused):
        found.structure.seen = fused
    swaps: dict[nn.Module, nn.Module] = {}
    found.collect(fused, swaps)
    structure = dataclasses.replace(found.structure, model=replaced(fused, swaps))
    _let_go(structure.model)
    return structure


# Of images that a network is shown before there are any, so that what becomes of it depends on nothing else: two, in
# case forward asks; both leave more than one pixel at a 32nd of the size.
_SHOWN = ((64, 64), (96, 64))


def _runs_a_row(network: RunsAsSeen) -> bool:
    """Whether its forward, of whatever class, runs modules in a row; then ``network`` knows which."""
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    try:
        return all(network.runs_a_row(torch.zeros(2, channels, *size)) for size in _SHOWN)
    except Exception:  # whatever a forward that anybody wrote does with images of another size
        return False


class _Found:
    """What was found so far."""

    def __init__(self, structure: Structure, names: dict[nn.Module, str], skip: frozenset[str], rows: bool) -> None:
        self.structure, self.names, self.skip, self.rows = structure, names, skip, rows
        self.stand_ins: dict[nn.Module, nn.Conv2d] = {}  # convolutions of subclasses, by what stands for them
        self.unfolds: dict[nn.Module, Unfold] = {}  # of stems among them

    def keep(self, name: str, what: str, reason: str) -> None:
        self.structure.unquantized.append(Unquantized(name, what, reason))

    def collect(self, module: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
        """Fills ``swaps`` with what takes the place of modules inside."""
        if module in swaps:
            return
        if self.rows and isinstance(module, RunsFused) and (steps := self._steps(module, swaps)):
            if any(isinstance(step, QuantizedRow) for step in steps):
                swaps[module] = hooked_as(module, steps[0] if len(steps) == 1 else QuantizedModel(*steps))
        elif isinstance(module, FusedBlock):
            if (block := self._block(module)) is not None:
                swaps[module] = hooked_as(module, block)
        else:
            for child in module._modules.values():
                if child is not None:
                    self.collect(child, swaps)

    def _block(self, block: FusedBlock) -> nn.Module | None:
        spec = block.spec
        if block.fallback_reason() is not None or spec is None:
            return None
        layer = self._layer(Layer(LayerKind.BLOCK if spec.expand else LayerKind.BLOCK_WITHOUT_EXPAND, [block]), True)
        return None if layer is None else QuantizedBlock(layer, block)

    def _layer(self, layer: Layer, ends_row: bool) -> QuantizedLayer | None:
        """None where it stays float."""
        name, source = self._name(layer), float_layer(layer)
        if isinstance(source, FloatLayer) and self._unfold(layer) is not None:
            source = behind_unfold(source)
        if self._skips(layer):
            source = "skip names it"
        if isinstance(source, str):
            block = layer.modules[-1]
            what = str(block.spec) if isinstance(block, FusedBlock) else _WHAT[layer.kind]
            self.keep(name, what, source)
            return None
        made = QuantizedLayer(source)
        self.structure.units.append(Unit(name, made, source, ends_row))
        return made

    def _unfold(self, layer: Layer) -> Unfold | None:
        """What x of a stem goes through, where no kernel pads as it does."""
        first = layer.modules[0]
        return self.unfolds.get(first.parts[0]) if isinstance(first, Joined) else None

    def _name(self, layer: Layer) -> str:
        last = layer.modules[-1]
        if isinstance(last, FusedFlat):
            first, *_, end = (self.names[part] for part in last.parts)
            return f"{first}-{end.rpartition('.')[2]}"
        module = last if isinstance(last, FusedBlock) else layer.linear or layer.modules[0]
        return self.names.get(module.parts[0] if isinstance(module, Joined) else module, "")

    def _skips(self, layer: Layer) -> bool:
        modules = [part for m in layer.modules for part in (m.parts if isinstance(m, FusedFlat | Joined) else (m,))]
        for name in map(self.names.get, modules):
            if name is not None and any(name == s or name.startswith(f"{s}.") or s == "" for s in self.skip):
                return True
        return False

    def _steps(self, module: RunsFused, swaps: dict[nn.Module, nn.Module]) -> list[nn.Module]:
        """What ``module`` runs, in order; nothing where no row of it holds a block."""
        children, _ = module.fusable_children()
        plain = [child if child is None else self._plain(child) for child in children]
        children = list(Joined.in_row(module, plain))
        found = list(layers_of(children))
        in_layers = [m for entry in found if isinstance(entry, Layer) for m in entry.modules]
        if None in children or not any(isinstance(m, FusedBlock) for m in in_layers):
            return []
        steps: list[nn.Module] = []
        row: list[QuantizedLayer] = []
        for entry in found:
            if isinstance(entry, Layer):
                made = self._layer(entry, False)
                if made is not None:
                    if (unfold := self._unfold(entry)) is not None:
                        self._end(row, steps)
                        steps.append(unfold)
                    row.append(made)
                    continue
            self._end(row, steps)
            for m in self._apart(entry):
                if not isinstance(entry, Layer):
                    self.collect(m, swaps)
                steps.append(replaced(m, swaps))
        self._end(row, steps)
        return steps

    def _plain(self, module: nn.Module) -> nn.Module:
        """What layers are found by in the place of a convolution of a subclass: torch's own, on the same weights."""
        if not isinstance(module, nn.Conv2d) or type(module) is nn.Conv2d or module.groups != 1:
            return module
        if next(reading.inner_objections([*module.modules()]), None) is not None:
            return module
        if (found := Unfold.of(module)) is None:
            return module
        kernel = module.weight.shape[-1]
        plain = nn.Conv2d(module.in_channels, module.out_channels, kernel, kernel // 2 + 1, kernel // 2, device="meta")
        plain._parameters = module._parameters
        plain.training = module.training
        self.names[plain] = self.names.get(module, "")
        self.stand_ins[plain] = module
        if kernel > 1:
            self.unfolds[plain] = found
        return plain

    def _apart(self, entry: Layer | nn.Module | None) -> Iterator[nn.Module]:
        """The network's own modules."""
        for m in entry.modules if isinstance(entry, Layer) else [entry]:
            assert m is not None
            for part in m.parts if isinstance(m, Joined) else (m,):
                yield self.stand_ins.get(part, part)

    def _end(self, row: list[QuantizedLayer], steps: list[nn.Module]) -> None:
        if not row:
            return
        units = self.structure.units
        units[-1] = dataclasses.replace(units[-1], ends_row=True)
        made = QuantizedRow(list(row))
        steps.append(made)
        self.structure.rows.append(made)
        row.clear()


def _let_go(model: nn.Module) -> None:
    """Networks that ran in one call, and have no fused block any more, are of their own class again."""
    for module in _with_quantized(model):
        if isinstance(module, RunsFused) and not any(isinstance(m, FusedBlock) for m in module.modules()):
            for name in module.OWN:
                vars(module).pop(name, None)
            become(module, ordinary_class(module))


def _with_quantized(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if any(isinstance(m, QuantizedLayer) for m in module.modules()):
            yield module
