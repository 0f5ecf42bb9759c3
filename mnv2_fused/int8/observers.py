"""What calibration keeps of tensors that stream by, and the scales that follow."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import HIGHEST, Quantizer

_BINS = 8192  # of a histogram: 1024 or more between least and greatest, four for each of the 256 values of a uint8


class Histogram:
    """How often values occur, by bins of equal width over [-reach, reach).

    ``reach`` is a power of two: where greater values come bins are joined in pairs, so that neither the order nor the
    sizes of batches matter.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.reach = 0.0
        self.least, self.greatest = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(values))
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        # Above the greatest magnitude, so that none lies at the open end.
        reach = 2.0 ** math.floor(math.log2(max(-low, high, 2.0**-100)) + 1)
        if self.reach == 0.0:
            self.reach = reach
        while self.reach < reach:
            joined = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([torch.zeros(_BINS // 4), joined, torch.zeros(_BINS // 4)]).to(torch.int64)
            self.reach *= 2
        per_unit = _BINS / (2 * self.reach)
        bins = ((values.flatten() + self.reach) * per_unit).to(torch.int32).clamp_(0, _BINS - 1)
        self.counts += torch.bincount(bins, minlength=_BINS)

    @property
    def centres(self) -> Tensor:
        """The middle of each bin, float64."""
        width = 2 * self.reach / _BINS
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - self.reach


_KEPT = torch.cat([torch.linspace(1, 0.3, 15), torch.tensor([0.2, 0.1])]).double()  # parts of a range


def best_quantizer(histogram: Histogram, floor: float = 0.0) -> Quantizer:
    """The scale and zero point of least squared error; ``floor``: the least scale."""
    low, high = min(histogram.least, 0.0), max(histogram.greatest, 0.0)
    values, counts = histogram.centres, histogram.counts.double()
    used = counts > 0
    values, counts = values[used], counts[used]
    lows = _KEPT * low if low < 0 else torch.zeros(1, dtype=torch.float64)
    highs = _KEPT * high if high > 0 else torch.zeros(1, dtype=torch.float64)
    best, found = math.inf, Quantizer(max(floor, 1.0), 0)
    if low == high:
        return found
    for least in lows:
        scales = ((highs - least) / HIGHEST).clamp(min=floor).float().double()  # as float32 has them
        zeros = (-least / scales).round().clamp(0, HIGHEST)
        q = (values / scales[:, None] + zeros[:, None]).round().clamp(0, HIGHEST)
        error = (((q - zeros[:, None]) * scales[:, None] - values) ** 2) @ counts
        place = int(error.argmin())
        if error[place] < best:
            best, found = float(error[place]), Quantizer(float(scales[place]), int(zeros[place]))
    return found


class ChannelScales(NamedTuple):
    """How the uint8 of one channel each stand for reals: real = (q - zero) * scale[c]."""

    scale: Tensor  # float64 [C]
    zero: int


class ChannelRange:
    """Least and greatest value of each channel behind an activation."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.least = self.greatest = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """[N, C, H, W]."""
        if self.activation not in ("relu", "relu6"):
            self.least = torch.minimum(values.amin((0, 2, 3)), self.least)
        self.greatest = torch.maximum(values.amax((0, 2, 3)), self.greatest)

    def scales(self, floor: Tensor) -> ChannelScales:
        """Ranges that hold what was seen, of the zero point that suits most channels; ``floor``: least scales."""
        least, greatest = self._reach(floor.shape)
        if not bool((least < 0).any()):
            return self.scales_at(0, floor)
        zeros = torch.arange(1, HIGHEST, dtype=torch.float64)[:, None]
        scales = (greatest / (HIGHEST - zeros)).maximum(-least / zeros)
        loss = ((scales * HIGHEST / (greatest - least)) ** 2).mean(1)
        return self.scales_at(int(loss.argmin()) + 1, floor)

    def scales_at(self, zero: int, floor: Tensor) -> ChannelScales:
        """The same of a given zero point."""
        least, greatest = self._reach(floor.shape)
        scale = greatest / (HIGHEST - zero)
        if zero > 0:
            scale = scale.maximum(-least / zero)
        return ChannelScales(scale.maximum(floor), zero)

    def _reach(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        least, greatest = self.least.double().expand(shape), self.greatest.double().expand(shape)
        widest = (greatest - least).max()
        widest = widest if widest > 0 else torch.ones_like(widest)
        # Channels that were hardly used may be on other images, so much so that EfficientNet-Lite0 quantised on nine
        # photographs lost 14 dB on others with ranges as seen. Where 6 is the limit all of it is the range.
        if self.activation == "relu6":
            return least, widest.expand(shape)
        return least, greatest.maximum(widest * _LEAST_SPAN).mul(widest).sqrt()


_LEAST_SPAN = 2.0**-10  # of a channel over the widest channel's
