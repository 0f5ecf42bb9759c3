"""Any block on 8-bit integers, in each instruction set: equal to the reference, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.devices import by_isa
from support.random_int8 import random_block

from mnv2_fused import BlockSpec
from mnv2_fused.int8.layers import run_reference
from mnv2_fused.int8.packing import geometry_of, pack
from mnv2_fused.testing import instruction_set, threads

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poison")]


@st.composite
def cases(draw):
    """A block without or with a stem in front, the shape of its input, and what ``random_block`` takes besides."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    kind = one_of("expand", "expand", "no expansion", "stem")
    stem = draw(st.integers(1, 16)) if kind == "stem" else 0
    c_in = draw(st.integers(1, 40))
    kernel, stride = one_of(3, 5, 7), one_of(1, 1, 2, (1, 2), (2, 1))
    dilation = one_of(1, 1, draw(st.integers(2, 9))) if stride == 1 else 1
    residual = stride == 1 and not stem and draw(st.booleans())
    most = dilation * (kernel - 1)
    padding = one_of(None, None, "same", "uneven")
    if padding == "uneven":
        left, top = draw(st.integers(0, most)), draw(st.integers(0, most))
        right, bottom = (most - left, most - top) if residual else (draw(st.integers(0, most)) for _ in range(2))
        padding = (left, right, top, bottom)
    squeeze, gate = one_of(0, 0, draw(st.integers(1, 40))), one_of("hardsigmoid", "sigmoid")
    activates_sum = residual and draw(st.booleans())
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 150)) if kind == "expand" else c_in,
        c_in if residual else draw(st.integers(1, 70)),
        stride=stride,
        expand=kind == "expand",
        residual=residual,
        kernel=kernel,
        dilation=dilation,
        padding=padding,
        squeeze_channels=squeeze,
        gate=gate,
        out_activation="relu" if activates_sum else "identity",
        activates_sum=activates_sum,
    )
    around = padding if isinstance(padding, tuple) else (most, 0, most, 0)
    smallest = max(1, most + 1 - around[0] - around[1]), max(1, most + 1 - around[2] - around[3])
    width, height = (least if one_of(*[False] * 7, True) else draw(st.integers(least, 40)) for least in smallest)
    shape = [draw(st.integers(1, 2)), stem or c_in, height, width]
    if stem:
        shape[2:] = [2 * side - draw(st.integers(0, 1)) for side in shape[2:]]
    options = {
        "stem": stem,
        "wide": one_of(*[False] * 7, True),
        "activation": one_of("identity", "identity", "hardswish", "silu"),
        "squeeze": squeeze,
        "gate": gate,
    }
    return spec, shape, options


def saturating(layer, e_too, d_too):
    """With the stages of e and d bounded by the ends of a uint8 alone, as of ReLU6: those that saturation can bound."""

    def opened(stage, asked):
        if stage is None or not asked:
            return stage
        return stage._replace(high=255.0 - torch.full_like(stage.high, stage.zero))

    return type(layer)(
        **{**layer.__dict__, "expand": opened(layer.expand, e_too), "depthwise": opened(layer.depthwise, d_too)}
    )


@by_isa
@given(case=cases(), opened=st.tuples(st.booleans(), st.booleans()), memory=st.booleans(), seed=st.integers(0, 2**31))
def test_any_block_equals_the_reference(isa, case, opened, memory, seed):
    spec, shape, options = case
    layer = saturating(random_block(spec, seed=seed, **options), *opened)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x.to(memory_format=torch.channels_last) if memory else x
    with instruction_set(isa), threads(1):
        y = torch.ops.mnv2_fused.int8_sequence(x, pack([layer]), geometry_of([layer]))
    expected = run_reference(x, [layer])
    assert y.shape == expected.shape
    assert torch.equal(y, expected), f"{(y != expected).sum()} of {y.numel()} differ: {spec} on {shape}, {options}"
