"""Images of one pixel, which run as the pixels of one image where the middle tap alone reaches them."""

import pytest
import torch
from support.checks import check
from support.devices import by_isa
from support.inputs import by_cpu_dtype, random_input

from mnv2_fused import BlockSpec, inverted_residual, pack, plan
from mnv2_fused.testing import instruction_set, random_weights, threads

pytestmark = pytest.mark.usefixtures("poison")

TOGETHER = [
    BlockSpec(24, 144, 24, residual=True),
    BlockSpec(20, 70, 40, stride=2, kernel=5, activation="hardswish"),
    BlockSpec(40, 40, 17, expand=False, kernel=7),
    BlockSpec(16, 300, 16, dilation=3, activation="silu", out_activation="relu"),
    BlockSpec(16, 64, 24, stride=(2, 1), activation="leaky_relu", padding="same"),
    BlockSpec(16, 64, 16, residual=True, out_activation="gelu", activates_sum=True),
]
ALONE = [
    BlockSpec(16, 48, 16, padding=(0, 2, 1, 1)),
    BlockSpec(16, 48, 16, padding=(2, 0, 1, 1)),
    BlockSpec(16, 48, 16, kernel=5, padding=(3, 3, 2, 2)),
    BlockSpec(40, 120, 40, residual=True, squeeze_channels=32),
]


@by_isa
@by_cpu_dtype
@pytest.mark.parametrize("spec", TOGETHER + ALONE, ids=str)
def test_images_of_one_pixel_are_what_each_is_alone(spec, dtype, isa):
    weights = random_weights(spec, dtype=torch.float64)
    x = random_input(spec, 70, (1, 1), dtype=dtype)
    with instruction_set(isa):
        packed = pack(weights, dtype)
        check(x, weights, spec)
        y = inverted_residual(x, packed, **spec.geometry)
        for count in (1, 2):
            with threads(count):
                assert torch.equal(inverted_residual(x, packed, **spec.geometry), y)
        for i in (0, 1, 69):
            assert torch.equal(inverted_residual(x[i : i + 1], packed, **spec.geometry), y[i : i + 1])
        assert torch.equal(inverted_residual(x[3:40], packed, **spec.geometry), y[3:40])
        assert torch.equal(inverted_residual(x[::7], packed, **spec.geometry), y[::7])


@pytest.mark.parametrize("spec", TOGETHER, ids=str)
def test_one_pixel_images_are_one_task(spec):
    assert plan(spec, [4000, spec.in_channels, 1, 1], threads=1).tasks < 400


@pytest.mark.parametrize("spec", ALONE, ids=str)
def test_images_whose_pixel_another_tap_meets_are_tasks_of_their_own(spec):
    assert plan(spec, [4000, spec.in_channels, 1, 1], threads=1).tasks >= 4000
