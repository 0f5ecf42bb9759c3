"""Calibration: float passes that note ranges, then one on integers, layer after layer, that corrects biases."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .modules import QuantizedLayer
from .observers import best_quantizer
from .reports import LayerError
from .scales import Scales, Seen, scales_of
from .simulate import Means, Simulation
from .structure import Structure, Unit

_CHUNK = 16 * 224 * 224  # pixels of images in one float pass: what is in memory at a time
_KEPT = 32 * 224 * 224  # pixels of the images that biases are corrected on
_MOST_KEPT = 64
_MOST_SIZES = 16  # of images: each is one float pass more


class _Producers:
    """Whose results layers were given, by the tensors themselves."""

    def __init__(self) -> None:
        # Of this pass: tensors are held, so that no id comes twice.
        self.made: dict[int, tuple[Tensor, int, QuantizedLayer]] = {}
        self.of: dict[QuantizedLayer, set[QuantizedLayer | None]] = {}

    def add(self, layer: QuantizedLayer, y: Tensor) -> None:
        self.made[id(y)] = y, _version(y), layer

    def note(self, layer: QuantizedLayer, x: Tensor) -> bool:
        """Whether ``x`` is always the result of one other layer, up to now, and was not written to since."""
        found = self.made.get(id(x))
        producer = found[2] if found is not None and found[1] == _version(x) else None
        seen = self.of.setdefault(layer, set())
        seen.add(producer)
        return producer is not None and len(seen) == 1


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


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
        self.seen = {unit.layer: Seen(unit.source) for unit in structure.units}
        self.producers = _Producers()
        self.kept = Kept(seed)
        self.sizes: set[torch.Size] = set()  # of images whose way through a network that was seen was looked at

    def observe(self, images: Tensor) -> None:
        """A float pass over [N, C, H, W]."""
        if len(images) == 0:
            return
        self._check_seen(images[:1])
        for chunk in images.split(max(1, _CHUNK // math.prod(images.shape[2:]))):
            self._float_pass(chunk, self._observed)
        self.kept.add(images)

    def _check_seen(self, image: Tensor) -> None:
        network = self.structure.seen
        if network is None or image.shape in self.sizes or len(self.sizes) == _MOST_SIZES:
            return
        self.sizes.add(image.shape)
        with self._standing_in(lambda unit, x: unit.source.run(x, lambda *_: None)):
            if not network.runs_a_row(image):
                raise ValueError(
                    "what the model's forward runs depends on the size of images, and a row of layers does not: give "
                    "rows=False"
                )

    def _observed(self, unit: Unit, x: Tensor) -> Tensor:
        seen = self.seen[unit.layer]
        if not self.producers.note(unit.layer, x):
            seen.x.add(x)
        return unit.source.run(x, seen.see)

    def _float_pass(self, images: Tensor, call: Callable[[Unit, Tensor], Tensor]) -> Any:
        def noted(unit: Unit, x: Tensor) -> Tensor:
            y = call(unit, x)
            self.producers.add(unit.layer, y)
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
        """Gives every layer its values; its errors on the kept images, and the model's float and int8 results on them.

        Raises ValueError where a layer did not run.
        """
        scales = self._scales()
        images = torch.stack(self.kept.images)
        floats: dict[QuantizedLayer, tuple[Tensor, Means]] = {}
        expected = self._float_pass(images, lambda unit, x: _kept_float(unit, x, floats))
        errors: dict[QuantizedLayer, LayerError] = {}

        def corrected(unit: Unit, x: Tensor) -> Tensor:
            y, means = floats[unit.layer]
            again = unit.layer in errors
            ends = unit.ends_row and unit.source.ends_in_float
            simulation = Simulation(unit.source, scales[unit.layer], {} if again else means, ends)
            layer, given = simulation.run(x[:, :, None, None] if x.dim() == 2 else x)
            if not again:
                unit.layer.fill(layer)
                errors[unit.layer] = LayerError.of(y, given)
            return given

        given = self._float_pass(images, corrected)
        for module in (*self.structure.rows, *errors):
            module.pack()
        return [errors[unit.layer] for unit in self.structure.units], expected, given

    def _scales(self) -> dict[QuantizedLayer, Scales]:
        for unit in self.structure.units:
            if unit.layer not in self.producers.of:
                raise ValueError(
                    f"the calibration images did not reach {unit.name or 'the model'}: calibrate on what runs it, or "
                    f"leave it float with skip=({unit.name!r},)"
                )
        scales: dict[QuantizedLayer, Scales] = {}

        def of(layer: QuantizedLayer) -> Scales:
            if layer not in scales:
                seen, producers = self.seen[layer], self.producers.of[layer]
                producer = next(iter(producers)) if len(producers) == 1 else None
                x = best_quantizer(seen.x) if producer is None else of(producer).y
                scales[layer] = scales_of(seen, x)
            return scales[layer]

        return {layer: of(layer) for layer in self.seen}


def _kept_float(unit: Unit, x: Tensor, floats: dict[QuantizedLayer, tuple[Tensor, Means]]) -> Tensor:
    """Float's result, kept with its means at the first call."""
    means: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> None:
        if name in _CORRECTED:
            means[name] = value.mean((0, 2, 3), dtype=torch.float64)

    y = unit.source.run(x, see)
    if unit.source.spec is not None and unit.source.spec.residual:
        means["project"] += means["x"]
    floats.setdefault(unit.layer, (y, means))
    return y


_CORRECTED = ("x", "expand", "depthwise", "reduce", "excite", "project")
