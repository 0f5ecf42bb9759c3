"""The scales of one layer: what was seen of its tensors, and what follows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .floats import Affine, FloatLayer
from .layers import Quantizer
from .observers import ChannelRange, ChannelScales, Histogram, best_quantizer
from .weights import least_scales, reach_of


@dataclass
class Seen:
    """What calibration saw of one layer's tensors."""

    source: FloatLayer
    x: Histogram = field(default_factory=Histogram)  # empty where x always is the y of one other layer
    y: Histogram = field(default_factory=Histogram)
    ranges: dict[str, ChannelRange] = field(default_factory=dict)

    def see(self, name: str, value: Tensor) -> None:
        """Takes note of a tensor that :meth:`FloatLayer.run` shows, but for x."""
        if name == "y":
            self.y.add(value)
        elif (activation := self._activation(name)) is not None:
            self.ranges.setdefault(name, ChannelRange(activation)).add(value)

    def _activation(self, name: str) -> str | None:
        """Of a tensor with a scale for each channel."""
        f = self.source
        if f.spec is None:
            return f.activation if name == "pixels" else None
        of_d = f.spec.activation
        found = {"e": f.expanded_by, "d": of_d, "mean": of_d, "gated": of_d, "m": f.spec.squeeze_activation}
        return found.get(name)


@dataclass(frozen=True)
class Scales:
    """Of the tensors of one layer; None where there is no such tensor."""

    x: Quantizer
    y: Quantizer
    e: ChannelScales | None = None
    d: ChannelScales | None = None
    gated: ChannelScales | None = None
    mean: ChannelScales | None = None
    m: ChannelScales | None = None
    pixels: ChannelScales | None = None


def of_tensor(q: Quantizer) -> ChannelScales:
    """One scale of all channels."""
    return ChannelScales(torch.tensor(q.scale, dtype=torch.float64), q.zero)


def scales_of(seen: Seen, x: Quantizer) -> Scales:
    """The scales of a layer whose x has the quantiser ``x``."""
    f, found = seen.source, {}

    def channels(name: str, affine: Affine, given: ChannelScales) -> ChannelScales:
        found[name] = seen.ranges[name].scales(least_scales(affine, reach_of(given)))
        return found[name]

    given = of_tensor(x)
    if f.expand is not None:
        given = channels("e", f.expand, given)
    if f.depthwise is not None:
        given = channels("d", f.depthwise, given)
    if f.reduce is not None and f.excite is not None:
        d = found["d"]
        none = torch.full_like(d.scale, _TINY)
        found["mean"] = seen.ranges["mean"].scales(none)
        channels("m", f.reduce, found["mean"])
        # One zero point for d and what takes its place.
        given = found["gated"] = seen.ranges["gated"].scales_at(d.zero, none)
    if f.spec is None and "pixels" in seen.ranges:
        given = channels("pixels", f.project, given)
        floor = 0.0
    else:
        floor = float(least_scales(f.project, reach_of(given)).max())
    return Scales(x, best_quantizer(seen.y, floor), **found)


_TINY = 2.0**-100
