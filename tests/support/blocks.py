"""Blocks that the tests of several kernels run: MobileNetV2's, others, and every pair of options."""

import itertools
import random

import pytest
from hypothesis import strategies as st

from mnv2_fused import BlockSpec
from mnv2_fused.activations import ACTIVATIONS, GATES
from mnv2_fused.testing import mobilenet_v2_blocks

from .inputs import GPU_DTYPES, MEMORY_FORMATS

# Small enough for kernels in an interpreter: (number, (block, size)) of MobileNetV2's, and one block of each kind.
NUMBERED_BLOCKS = list(enumerate(mobilenet_v2_blocks(48)))
SMALL_SPECS = [BlockSpec(8, 48, 8, residual=True), BlockSpec(8, 50, 20, stride=2), BlockSpec(8, 8, 5, expand=False)]
by_small_spec = pytest.mark.parametrize("spec", SMALL_SPECS, ids=str)

PADDING_SPECS = [
    BlockSpec(8, 48, 12),
    BlockSpec(8, 48, 8, residual=True),
    BlockSpec(8, 48, 12, stride=2),
]

DETERMINISM_SPECS = [
    BlockSpec(24, 144, 24, residual=True),
    BlockSpec(13, 50, 37, stride=2),
    BlockSpec(40, 40, 21, expand=False),
]

# MobileNetV3's and EfficientNet's own, of smaller channels; and padding as TensorFlow does it.
GENERAL_SPECS = [
    BlockSpec(8, 24, 8, residual=True, kernel=5, activation="hardswish", squeeze_channels=8),
    BlockSpec(
        *(8, 40, 12),
        stride=2,
        kernel=5,
        padding="same",
        activation="silu",
        squeeze_channels=3,
        squeeze_activation="silu",
        gate="sigmoid",
    ),
    BlockSpec(8, 8, 12, expand=False, activation="relu", out_activation="relu"),
    BlockSpec(8, 33, 8, residual=True, kernel=3, dilation=2),
    BlockSpec(8, 20, 12, activation="identity", padding=(2, 0, 1, 0)),
    BlockSpec(
        8,
        24,
        8,
        residual=True,
        activation="leaky_relu",
        squeeze_channels=3,
        squeeze_activation="gelu",
        negative_slope=0.2,
    ),
    BlockSpec(8, 40, 12, stride=2, kernel=5, activation="gelu", out_activation="leaky_relu", negative_slope=-1.5),
    BlockSpec(8, 8, 12, expand=False, activation="gelu_tanh", out_activation="gelu_tanh"),
    BlockSpec(8, 40, 8, residual=True, activation="gelu", out_activation="relu", activates_sum=True),
    BlockSpec(8, 24, 12, activation="identity", expand_activation="relu", out_activation="relu"),
]

# Values of every option of a block; those of "squeeze" are (squeeze_activation, gate).
OPTIONS = {
    "kernel": (3, 5, 7),
    "stride": (1, 2, (1, 2)),
    "dilation": (1, 2, 3),
    "padding": (None, "same", "uneven"),
    "activation": ACTIVATIONS,
    "out_activation": ACTIVATIONS,
    "squeeze": (None, *zip(("relu", "silu", "relu6"), GATES, strict=True)),
    "residual": (False, True),
    "expand": (False, True),
    "expand_activation": (None, "identity"),
    "activates_sum": (False, True),
    "dtype": GPU_DTYPES,
}


# What the CUDA kernel is compiled for.
CUDA_OPTIONS = OPTIONS | {"kernel": (3, 5), "stride": (1, 2)}


def spec_of(kernel, stride, dilation, padding, squeeze, residual, expand, **options):
    """A block with these options, of channels that fill no panel; None where they exclude each other."""
    if stride != 1 and (dilation > 1 or residual):
        return None
    if padding == "uneven":  # what a residual needs, or any
        most = dilation * (kernel - 1)
        padding = (0, most, most - 1, 1) if residual else (1, most, 0, most - 1)
    squeeze_activation, gate = squeeze or ("relu", "hardsigmoid")
    return BlockSpec(
        *(9, 41 if expand else 9, 9 if residual else 21),
        stride=stride,
        expand=expand,
        residual=residual,
        kernel=kernel,
        dilation=dilation,
        padding=padding,
        squeeze_channels=5 if squeeze else 0,
        squeeze_activation=squeeze_activation,
        gate=gate,
        negative_slope=0.3,
        **{name: value for name, value in options.items() if name != "dtype"},
    )


def every_pair(options=OPTIONS):
    """Few combinations in which any two values of two options meet that can."""
    dice = random.Random(0)
    names = list(options)

    def pairs(case):
        return set(itertools.combinations(((name, str(case[name])) for name in names), 2))

    def drawn(**fixed):
        return {name: dice.choice(values) for name, values in options.items()} | fixed

    left = set()
    for a, b in itertools.combinations(names, 2):
        for first, second in itertools.product(options[a], options[b]):
            while True:
                case = drawn(**{a: first, b: second})
                if spec_of(**case) is not None:
                    left.add(((a, str(first)), (b, str(second))))
                    break
                if {a, b} <= {"stride", "dilation", "residual"}:
                    break
    found = []
    while left:
        candidates = [case for case in (drawn() for _ in range(60)) if spec_of(**case) is not None]
        best = max(candidates, key=lambda case: len(pairs(case) & left))
        if gained := pairs(best) & left:
            found.append(best)
            left -= gained
    return found


@st.composite
def gpu_cases(draw):
    """A block, x's shape, values to force in a plan, (memory format, whether cropped), dtype and seed."""
    expand, residual = draw(st.booleans()), draw(st.booleans())
    c_in = draw(st.integers(1, 40))
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 80)) if expand else c_in,
        c_in if residual else draw(st.integers(1, 70)),
        1 if residual else draw(st.sampled_from([1, 2])),
        expand=expand,
        residual=residual,
    )
    group = draw(st.sampled_from([16, 32, 64]))
    values = {
        "tile_rows": draw(st.integers(1, 3)),
        "tile_cols": draw(st.integers(1, 3)),
        "group": group,
        "splits": draw(st.integers(1, min(-(-spec.hidden_channels // group), 3))),
    }
    shape = draw(st.integers(0, 2)), c_in, draw(st.integers(1, 7)), draw(st.integers(1, 7))
    memory = draw(st.sampled_from(MEMORY_FORMATS)), draw(st.booleans())
    return spec, shape, values, memory, draw(st.sampled_from(GPU_DTYPES)), draw(st.integers(0, 2**31))
