"""Calibration: float passes that note ranges, then one on integers, layer after layer, that corrects biases."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .layers import Quantizer
from .observers import best_quantizer
from .reports import LayerError
from .scales import Scales, Seen, scales_of
from .simulate import Simulation
from .structure import Structure, Unit

_CHUNK = 16 * 224 * 224  # pixels of images in one float pass: what is in memory at a time
_KEPT = 32 * 224 * 224  # pixels of the images that biases are corrected on
_MOST_KEPT = 64


@dataclass
class _Producers:
    """Whose results layers were given, by the tensors themselves."""

    made: dict[int, tuple[Tensor, Unit]] = field(default_factory=dict)  # tensors are held, so that no id comes twice
    of: dict[str, set[str | None]] = field(default_factory=dict)

    def note(self, unit: Unit, x: Tensor) -> bool:
        """Whether ``x`` is always the result of one layer, up to now."""
        found = self.made.get(id(x))
        seen = self.of.setdefault(unit.name, set())
        seen.add(None if found is None else found[1].name)
        return found is not None and len(seen) == 1


class Kept:
    """A few images of those that stream by, drawn so that each has the same chance."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.images: list[Tensor] = []
        self.count = 0
        self.most = 0

    def add(self, images: Tensor) -> None:
        """Images of one shape; others than the first ones' are not kept."""
        if not self.images:
            self.most = max(1, min(_MOST_KEPT, _KEPT // math.prod(images.shape[2:])))
        for image in images:
            if self.images and image.shape != self.images[0].shape:
                continue
            self.count += 1
            place = len(self.images)
            if place == self.most:
                place = int(torch.randint(self.count, (), generator=self.generator))
            if place < self.most:
                self.images[place : place + 1] = [image.clone()]


class Calibration:
    """Fills the layers of a :class:`Structure`."""

    def __init__(self, structure: Structure, seed: int) -> None:
        self.structure = structure
        self.seen = {unit.name: Seen(unit.source) for unit in structure.units}
        self.producers = _Producers()
        self.kept = Kept(seed)

    def observe(self, images: Tensor) -> None:
        """A float pass over [N, C, H, W]."""
        for chunk in images.split(max(1, _CHUNK // math.prod(images.shape[2:]))):
            self._float_pass(chunk, self._observed)
        self.kept.add(images)

    def _observed(self, unit: Unit, x: Tensor) -> Tensor:
        seen = self.seen[unit.name]
        if not self.producers.note(unit, x):
            seen.x.add(x)
        return unit.source.run(x, seen.see)

    def _float_pass(self, images: Tensor, call: Callable[[Unit, Tensor], Tensor]) -> Any:
        def noted(unit: Unit, x: Tensor) -> Tensor:
            y = call(unit, x)
            self.producers.made[id(y)] = y, unit
            return y

        with self._standing_in(noted):
            result = self.structure.model(images.contiguous(memory_format=torch.channels_last))
        self.producers.made.clear()
        return result

    @contextlib.contextmanager
    def _standing_in(self, call: Callable[[Unit, Tensor], Tensor]) -> Iterator[None]:
        """``call`` runs for each layer, also inside rows."""
        replaced: list[Any] = []

        def put(module: Any, forward: Callable[[Tensor], Tensor]) -> None:
            vars(module)["forward"] = forward
            replaced.append(module)

        def bound(unit: Unit) -> Callable[[Tensor], Tensor]:
            return lambda x: call(unit, x)

        def one_by_one(layers: Any) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                for layer in layers:
                    x = layer(x)
                return x

            return forward

        try:
            for unit in self.structure.units:
                put(unit.layer, bound(unit))
            for row in self.structure.rows:
                put(row, one_by_one(row.layers))
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)

    def finish(self) -> tuple[list[LayerError], Any, Any]:
        """Gives every layer its values; errors on the kept images, and the model's float and int8 results on them.

        Raises ValueError where a layer did not run.
        """
        scales = self._scales()
        images = torch.stack(self.kept.images)
        floats, means = {}, {}
        expected = self._float_pass(images, lambda unit, x: self._kept_float(unit, x, floats, means))
        errors: list[LayerError] = []

        def corrected(unit: Unit, x: Tensor) -> Tensor:
            if unit.name in done:  # called a second time
                return done[unit.name](x)
            ends = unit.ends_row and unit.source.ends_in_float
            simulation = Simulation(unit.source, scales[unit.name], means[unit.name], ends)
            layer, y = simulation.run(x[:, :, None, None] if x.dim() == 2 else x)
            unit.layer.fill(layer)
            errors.append(LayerError.of(unit.name, floats[unit.name], y))
            done[unit.name] = lambda x: Simulation(unit.source, scales[unit.name], {}, ends).run(x)[1]
            return y

        done: dict[str, Callable[[Tensor], Tensor]] = {}
        given = self._float_pass(images, corrected)
        return errors, expected, given

    def _kept_float(self, unit: Unit, x: Tensor, floats: dict[str, Tensor], means: dict[str, Any]) -> Tensor:
        of_unit: dict[str, Tensor] = {}

        def see(name: str, value: Tensor) -> None:
            if name in _CORRECTED:
                of_unit[name] = value.mean((0, 2, 3), dtype=torch.float64)

        y = unit.source.run(x, see)
        if unit.source.spec is not None and unit.source.spec.residual:
            of_unit["project"] += of_unit["x"]
        if unit.name not in floats:
            floats[unit.name], means[unit.name] = y, of_unit
        return y

    def _scales(self) -> dict[str, Scales]:
        scales: dict[str, Scales] = {}
        units = {unit.name: unit for unit in self.structure.units}

        def of(name: str) -> Scales:
            if name in scales:
                return scales[name]
            producers = self.producers.of.get(name)
            if producers is None:
                raise ValueError(
                    f"the calibration images did not reach {name or 'the model'}: calibrate on what runs it, or "
                    f"leave it float with skip=({name!r},)"
                )
            producer = next(iter(producers)) if len(producers) == 1 else None
            x: Quantizer = best_quantizer(self.seen[name].x) if producer is None else of(producer).y
            scales[name] = scales_of(self.seen[name], x)
            return scales[name]

        for name in units:
            of(name)
        return scales


_CORRECTED = ("x", "expand", "depthwise", "reduce", "excite", "project")
