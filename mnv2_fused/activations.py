"""Activations, and the gates of a squeeze-and-excite: the one table of them in Python.

``csrc/activations.h`` is the twin, with the same names in the same order; they are compared on import.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEGATIVE_SLOPE = 0.01  # of "leaky_relu" where nothing else is said, as in torch


def _accepts(module: nn.Module) -> str | None:
    return None


def _clips_to_6(relu6: nn.Module) -> str | None:
    bounds = relu6.min_val, relu6.max_val
    return None if bounds == (0.0, 6.0) else f"its ReLU6 clips to {bounds[0]} ... {bounds[1]}"


def _slope_0(leaky: nn.Module) -> str | None:
    return None if leaky.negative_slope == 0 else "its LeakyReLU has another slope than 0"


def _slope_is_finite(leaky: nn.Module) -> str | None:
    finite = isinstance(leaky.negative_slope, (int, float)) and math.isfinite(leaky.negative_slope)
    return None if finite else f"its LeakyReLU has the slope {leaky.negative_slope!r}"


def _approximates(how: str) -> Callable[[nn.Module], str | None]:
    def objection(gelu: nn.Module) -> str | None:
        return None if gelu.approximate == how else f"its GELU approximates by {gelu.approximate!r}"

    return objection


class Function(NamedTuple):
    """An activation or a gate."""

    torch: Callable[..., Tensor]  # what the reference computes; of "leaky_relu" with its slope as second argument
    # Full names of the classes that compute it, and for each why a module of that class does not; None where it does.
    modules: dict[str, Callable[[nn.Module], str | None]]
    # Triton: instructions per element; min and max take two, exponential and quotient eight each, by a quarter of the
    # lanes. Only the choice of a plan rests on them.
    triton_slots: int = 0


# Numbers of activations are places in this table, and exported programs hold them: append, never reorder.
ACTIVATION_TABLE: dict[str, Function] = {
    "relu6": Function(F.relu6, {"torch.nn.modules.activation.ReLU6": _clips_to_6}, 4),
    "relu": Function(
        F.relu,
        {"torch.nn.modules.activation.ReLU": _accepts, "torch.nn.modules.activation.LeakyReLU": _slope_0},
        3,
    ),
    "identity": Function(lambda t: t, {"torch.nn.modules.linear.Identity": _accepts}, 1),
    "hardswish": Function(
        F.hardswish,
        {"torch.nn.modules.activation.Hardswish": _accepts, "timm.layers.activations.HardSwish": _accepts},
        7,
    ),
    "silu": Function(
        F.silu,
        {
            "torch.nn.modules.activation.SiLU": _accepts,
            "timm.layers.activations.Swish": _accepts,
            "transformers.activations.SiLUActivation": _accepts,
        },
        20,
    ),
    "leaky_relu": Function(F.leaky_relu, {"torch.nn.modules.activation.LeakyReLU": _slope_is_finite}, 6),
    "gelu": Function(
        F.gelu,
        {
            "torch.nn.modules.activation.GELU": _approximates("none"),
            "timm.layers.activations.GELU": _accepts,
            "transformers.activations.GELUActivation": _accepts,
        },
        28,
    ),
    "gelu_tanh": Function(
        functools.partial(F.gelu, approximate="tanh"),
        {
            "torch.nn.modules.activation.GELU": _approximates("tanh"),
            "timm.layers.activations.GELUTanh": _accepts,
            "transformers.activations.GELUTanh": _accepts,
            "transformers.activations.NewGELUActivation": _accepts,
        },
        26,
    ),
}
GATE_TABLE: dict[str, Function] = {
    "hardsigmoid": Function(
        F.hardsigmoid,
        {"torch.nn.modules.activation.Hardsigmoid": _accepts, "timm.layers.activations.HardSigmoid": _accepts},
    ),
    "sigmoid": Function(
        torch.sigmoid, {"torch.nn.modules.activation.Sigmoid": _accepts, "timm.layers.activations.Sigmoid": _accepts}
    ),
    # Keras's and PaddlePaddle's: of slope 1/5, where torch's has 1/6.
    "hardsigmoid_fifth": Function(lambda t: (0.2 * t + 0.5).clamp(0, 1), {}),
}
ACTIVATIONS, GATES = tuple(ACTIVATION_TABLE), tuple(GATE_TABLE)
LEAKY_RELU = "leaky_relu"


def function_of(name: str, negative_slope: float = NEGATIVE_SLOPE) -> Callable[[Tensor], Tensor]:
    """torch's function of the activation or gate ``name``. Raises KeyError for any other name."""
    function = (ACTIVATION_TABLE.get(name) or GATE_TABLE[name]).torch
    return functools.partial(function, negative_slope=negative_slope) if name == LEAKY_RELU else function


def slope_bits(negative_slope: float) -> int:
    """A slope among the integers of an op: the bits of the double."""
    return struct.unpack("<q", struct.pack("<d", negative_slope))[0]


def slope_of_bits(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
