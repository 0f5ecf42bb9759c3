"""Layers in a row on the kernels, or by the reference where there are none."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

from torch import Tensor

from .. import backends
from ..encoding import LayerKind
from ..ops import int8_row
from .layers import Int8Layer, run_reference
from .packing import geometry_of, pack


class Packed(NamedTuple):
    """Layers in a row as :func:`mnv2_fused.ops.int8_row` takes them."""

    weights: Tensor  # [bytes]
    geometry: tuple[int, ...]

    @staticmethod
    def of(layers: list[Int8Layer]) -> Packed | None:
        """None where the reference has to run."""
        if _asked_for_reference() or backends._C is None:
            return None
        return Packed(pack(layers), tuple(geometry_of(layers)))


def run_unpacked(x: Tensor, layers: list[Int8Layer]) -> Tensor:
    """x float32 [N, C, H, W] -> float32 [N, C_out, H', W'], behind a linear layer [N, C_out].

    By the kernels, packed for this call, or by the reference.
    """
    packed = Packed.of(layers)
    if packed is None:
        if not _asked_for_reference():
            _warn_of_reference()
        return run_reference(x, layers)
    y = int8_row(x, *packed)
    return y.flatten(1) if layers[-1].kind is LayerKind.LINEAR else y


def _asked_for_reference() -> bool:
    return os.environ.get("MNV2_FUSED_BACKEND") == "eager"


@functools.cache
def _warn_of_reference() -> None:
    why = backends.backend_reasons()["cpu"]
    warnings.warn(
        f"quantised layers run on a slow reference in torch, since the kernels are missing: {why}", stacklevel=5
    )
