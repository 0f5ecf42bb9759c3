"""Layers in a row on the kernels, or by the reference where there are none."""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from .. import backends
from ..encoding import LayerKind
from .layers import Int8Layer, run_reference
from .packing import geometry_of, pack


class Row:
    """Layers in a row, packed once.

    x float32 [N, C, H, W] -> float32 [N, C_out, H', W'] in channels_last, behind a linear layer [N, C_out].
    """

    def __init__(self, layers: list[Int8Layer]) -> None:
        self.layers = layers
        self.flat = layers[-1].kind is LayerKind.LINEAR
        self._packed: tuple[Tensor, list[int]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        asked = os.environ.get("MNV2_FUSED_BACKEND") == "eager"
        if asked or backends._C is None:
            if not asked:
                _warn_of_reference()
            return run_reference(x, self.layers)
        weights, geometry = self._weights()
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.mnv2_fused.int8_sequence(x, weights, geometry)
        return y.flatten(1) if self.flat else y

    def _weights(self) -> tuple[Tensor, list[int]]:
        if self._packed is None:
            self._packed = pack(self.layers), geometry_of(self.layers)
        return self._packed


@functools.cache
def _warn_of_reference() -> None:
    why = backends.backend_reasons()["cpu"]
    warnings.warn(
        f"quantised layers run on a slow reference in torch, since the kernels are missing: {why}", stacklevel=5
    )
