"""Kernels on 8-bit integers against the reference: equal to the bit, whatever the plan, threads and layout."""

import pytest
import torch
from support.devices import by_isa
from support.random_int8 import random_block, random_head

from mnv2_fused import BlockSpec
from mnv2_fused.encoding import LayerKind
from mnv2_fused.int8.layers import run_reference
from mnv2_fused.int8.packing import geometry_of, pack
from mnv2_fused.testing import instruction_set, threads

pytestmark = pytest.mark.usefixtures("poison")


def image(*shape, seed=1):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


def run(x, layers):
    weights = pack(layers)
    y = torch.ops.mnv2_fused.int8_sequence(x, weights, geometry_of(layers))
    return y.flatten(1) if layers[-1].kind is LayerKind.LINEAR else y


def check(x, layers):
    y = run(x, layers)
    expected = run_reference(x, layers)
    assert y.shape == expected.shape
    assert torch.equal(y, expected), f"{(y != expected).sum()} of {y.numel()} differ"
    return y


SPECS = [
    BlockSpec(16, 96, 24, stride=2),
    BlockSpec(24, 144, 24, residual=True),
    BlockSpec(32, 32, 16, expand=False),
    BlockSpec(32, 32, 32, expand=False, residual=True),
    BlockSpec(13, 37, 19, kernel=5),
    BlockSpec(13, 50, 13, kernel=7, residual=True),
    BlockSpec(1, 6, 5, stride=2, kernel=5),
    BlockSpec(7, 7, 3, expand=False, stride=2, kernel=7),
    BlockSpec(24, 72, 40, stride=2, padding="same"),
    BlockSpec(24, 72, 40, stride=(2, 1), kernel=5),
    BlockSpec(24, 72, 40, stride=(1, 2)),
    BlockSpec(16, 48, 16, padding=(2, 0, 1, 2)),
    BlockSpec(48, 200, 72, stride=2),
    BlockSpec(24, 72, 40, dilation=2),
    BlockSpec(16, 40, 16, dilation=3, kernel=5),
    BlockSpec(13, 13, 13, dilation=5, expand=False, residual=True),
    BlockSpec(16, 48, 16, residual=True, activates_sum=True, out_activation="relu"),
]
SIZES = [(1, 14, 14), (3, 9, 17), (2, 1, 1), (1, 33, 2)]


@by_isa
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_blocks_equal_the_reference(spec, isa):
    with instruction_set(isa):
        for i, (n, h, w) in enumerate(SIZES):
            check(image(n, spec.in_channels, h, w), [random_block(spec, seed=i)])


@by_isa
@pytest.mark.parametrize("activation", ["hardswish", "silu"])
def test_functions_equal_the_reference(activation, isa):
    with instruction_set(isa):
        for spec in SPECS[:5]:
            check(image(2, spec.in_channels, 9, 8), [random_block(spec, activation=activation)])


@by_isa
@pytest.mark.parametrize("gate", ["hardsigmoid", "sigmoid"])
def test_squeeze_and_excite_equals_the_reference(gate, isa):
    with instruction_set(isa):
        for spec in SPECS[:6]:
            squeezed = BlockSpec(**{**spec.__dict__, "squeeze_channels": 9, "gate": gate})
            for n, h, w in ((1, 7, 7), (3, 20, 11)):
                check(image(n, spec.in_channels, h, w), [random_block(squeezed, squeeze=9, gate=gate)])


@by_isa
def test_values_at_the_ends_of_their_ranges(isa):
    with instruction_set(isa):
        for seed in range(20):
            layer = random_block(SPECS[seed % len(SPECS)], seed=seed, wide=True)
            check(100 * image(1, layer.spec.in_channels, 6, 7, seed=seed), [layer])


@by_isa
@pytest.mark.parametrize("squeeze", [0, 9])
def test_bounds_that_are_those_of_a_uint8(squeeze, isa):
    with instruction_set(isa):
        for i, spec in enumerate(SPECS):
            squeezed = BlockSpec(**{**spec.__dict__, "squeeze_channels": squeeze})
            layer = random_block(squeezed, seed=i, full=True, squeeze=squeeze)
            for name in ("expand", "depthwise", "project"):  # many values are beyond the bounds
                stage = getattr(layer, name)
                if stage is not None:
                    louder = stage._replace(multiplier=stage.multiplier * 4)
                    layer = type(layer)(**{**layer.__dict__, name: louder})
            check(image(2, spec.in_channels, 9, 17), [layer])


@by_isa
@pytest.mark.parametrize("size", [(32, 32), (33, 31), (1, 2), (7, 64)])
@pytest.mark.parametrize("channels", [3, 1, 5])
def test_a_stem_and_its_block_equal_the_reference(size, channels, isa):
    spec = BlockSpec(32, 32, 16, expand=False)
    with instruction_set(isa):
        check(image(2, channels, *size), [random_block(spec, stem=channels)])


@by_isa
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_network_equals_the_reference(batch, isa):
    first = random_block(BlockSpec(32, 32, 16, expand=False), stem=3)
    second = random_block(BlockSpec(16, 96, 24, stride=2), seed=1)
    third = random_block(BlockSpec(24, 144, 24, residual=True), seed=2)
    layers = [first]
    for layer in (second, third):
        layers.append(type(layer)(**{**layer.__dict__, "x": layers[-1].y}))
    layers.append(random_head(24, 72, layers[-1].y, pool=True))
    layers.append(random_head(72, 50, layers[-1].y, linear=True))
    with instruction_set(isa):
        y = check(image(batch, 3, 37, 30), layers)
        assert y.shape == (batch, 50)
        check(image(batch, 3, 37, 30), layers[:-1])
        check(image(batch, 3, 37, 30), [*layers[:3], random_head(24, 72, layers[2].y)])


@by_isa
def test_threads_strides_and_batches_change_no_bit(isa):
    spec = BlockSpec(24, 144, 24, residual=True)
    layers = [random_block(spec)]
    x = image(5, 24, 31, 29)
    with instruction_set(isa):
        y = check(x, layers)
        for count in (1, 2):
            with threads(count):
                assert torch.equal(run(x, layers), y)
                assert torch.equal(run(x.contiguous(), layers), y)
                assert torch.equal(run(x[1:2], layers), y[1:2])
                wide = torch.zeros(5, 30, 31, 58)[:, 3:27, :, ::2]
                wide.copy_(x)
                assert torch.equal(run(wide, layers), y)
        assert run(x[:0], layers).shape == (0, 24, 31, 29)


def test_opcheck():
    layers = [random_block(BlockSpec(24, 144, 24, residual=True))]
    weights = pack(layers)
    for x in (image(2, 24, 6, 5), image(2, 24, 6, 5).contiguous()):
        torch.library.opcheck(torch.ops.mnv2_fused.int8_sequence.default, (x, weights, geometry_of(layers)))


def test_bad_weights_are_named():
    layers = [random_block(BlockSpec(24, 144, 24, residual=True))]
    weights, geometry = pack(layers), geometry_of(layers)
    op, x = torch.ops.mnv2_fused.int8_sequence, image(1, 24, 6, 5)
    for bad, message in (
        ((x, weights[:-64], geometry), "ends early"),
        ((x, torch.cat([weights, weights[:64]]), geometry), "64 bytes too many"),
        ((x, weights.float(), geometry), "row of bytes"),
        ((x.double(), weights, geometry), "x must be float32"),
        ((x[:, :23], weights, geometry), "x must have 24 channels, got 23"),
        ((x[0], weights, geometry), "x must be"),
        ((x, weights, geometry[:-1]), "they end within layer 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*bad)


@by_isa
def test_nan_and_infinity_are_the_ends(isa):
    x = image(1, 24, 5, 5)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf"), float("-inf")
    with instruction_set(isa):
        check(x, [random_block(BlockSpec(24, 144, 24, residual=True))])
