"""What a call costs when there is nothing to compute: one block on a one-pixel image against an empty op."""

import torch

import mnv2_fused
from mnv2_fused import ops, testing

CALLS = 2000


def test_call_overhead(benchmark, table):
    """The op and the module, over ``aten::alias``, which does nothing but make its result."""
    benchmark.group = "call overhead, 1x1 image"
    block = mnv2_fused.FusedInvertedResidual(32, 32, 1, 6).eval()
    weights = testing.random_weights(block.spec)
    x = torch.randn(1, 32, 1, 1)
    packed = mnv2_fused.pack(weights)
    check = testing.block_agreement(mnv2_fused.inverted_residual(x, packed, residual=True), x, weights, block.spec)
    assert check.ok, check
    with torch.inference_mode(False):  # inference tensors carry no version for the module to check
        block = mnv2_fused.FusedInvertedResidual(32, 32, 1, 6).eval()
    candidates = {
        "empty op": lambda: torch.ops.aten.alias.default(x),
        "op": lambda: ops.packed_inverted_residual(x, packed, 1, True),
        "module": lambda: block(x),
    }
    with testing.threads(1):
        timings = testing.interleave(candidates, rounds=10, warmup=50, calls=dict.fromkeys(candidates, CALLS))
    benchmark.pedantic(candidates["module"], rounds=10, iterations=CALLS)
    empty = timings["empty op"].median
    for name in candidates:
        over = (timings[name].median - empty) * 1e6
        benchmark.extra_info[f"{name} over empty, us"] = over
        table({"call": name, "us": f"{timings[name].median * 1e6:.2f}", "over an empty op, us": f"{over:.2f}"})
