"""The work of a block, against torch's own count of its reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mnv2_fused import BlockSpec, inverted_residual_reference
from mnv2_fused.testing import mobilenet_v2_blocks, multiply_adds, random_weights

SPECS = [
    BlockSpec(8, 48, 8, residual=True),
    BlockSpec(8, 8, 5, expand=False),
    BlockSpec(8, 48, 24, stride=2),
    BlockSpec(8, 48, 24, stride=2, kernel=5),
    BlockSpec(8, 48, 8, kernel=5, activation="hardswish", squeeze_channels=16, residual=True),
    BlockSpec(8, 48, 24, stride=2, padding="same"),
    BlockSpec(8, 48, 24, padding=(0, 1, 2, 0)),
    BlockSpec(8, 48, 24, padding=(0, 0, 0, 0), kernel=5),
    BlockSpec(8, 48, 8, dilation=2),
]


@pytest.mark.parametrize("size", [(9, 14), (8, 7)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_kind_of_block(spec, size):
    shape = 2, spec.in_channels, *size
    with FlopCounterMode(display=False) as counter:
        inverted_residual_reference(torch.zeros(shape), random_weights(spec), **spec.geometry)
    assert multiply_adds(spec, shape) == counter.get_total_flops() // 2


def test_mobilenet_v2():
    """Of the 301 M of the whole network, without stem, last convolution and classifier."""
    blocks = sum(multiply_adds(spec, (1, spec.in_channels, *size)) for spec, size in mobilenet_v2_blocks(224))
    assert blocks == 300_774_272 - 27 * 32 * 112**2 - 320 * 1280 * 7**2 - 1280 * 1000
