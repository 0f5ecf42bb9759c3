"""A block's result held to the tolerance rule and to the promises of ``inverted_residual``'s docstring."""

import torch

from mnv2_fused import inverted_residual
from mnv2_fused.testing import block_agreement


def run(x, weights, spec, **options):
    """The block ``spec``; ``options``: ``backend`` and ``plan``."""
    return inverted_residual(x, weights, **spec.geometry, **options)


def within(y, x, weights, spec):
    """The tolerance rule, that of ``mnv2_fused.testing.agreement``."""
    found = block_agreement(y, x, weights, spec)
    assert found.ok, f"{spec} on {list(x.shape)}, {x.dtype}: {found}"


def check(x, weights, spec, **options):
    """Runs the block where its weights lie, holds the result to the rule and the promises; returns the result."""
    x = x.to(weights.w_depthwise.device)
    before = x.clone()
    y = run(x, weights, spec, **options)
    within(y, x, weights, spec)
    assert y.dtype == x.dtype
    assert torch.equal(x, before), "x was written"
    return y
