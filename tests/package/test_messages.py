"""What a wrong argument is told: the value, the limit and the way out. No row may end in an error of other code."""

import pytest
import torch
from torch import nn

import mnv2_fused
from mnv2_fused import BlockSpec, BlockWeights, FusedInvertedResidual, cuda_plan, inverted_residual, pack, plan
from mnv2_fused.testing import random_weights

SPEC = BlockSpec(8, 48, 8)
WEIGHTS = random_weights(SPEC)
PACKED = pack(WEIGHTS)
SHAPE = 1, 8, 9, 9


def x():
    return torch.randn(SHAPE)


def block():
    return FusedInvertedResidual(8, 8, 1, 6).eval()


CASES = {
    "a padding of one number": (lambda: BlockSpec(8, 48, 8, padding=1), ValueError, "left, right, top, bottom.*got 1"),
    "padding of no whole number": (lambda: BlockSpec(8, 48, 8, padding=(1.0, 1, 1, 1)), TypeError, "integer, got 1.0"),
    "channels of no whole number": (
        lambda: BlockSpec(8.5, 48, 8),
        TypeError,
        "in_channels must be an integer, got 8.5",
    ),
    "channels as text": (lambda: BlockSpec("8", 48, 8), TypeError, "in_channels must be an integer, got '8'"),
    "a boolean stride": (lambda: BlockSpec(8, 48, 8, stride=True), TypeError, "stride must be an integer, got True"),
    "a number for a boolean": (lambda: BlockSpec(8, 48, 8, expand=2), TypeError, "expand must be True or False, got 2"),
    "padding in a call": (lambda: inverted_residual(x(), WEIGHTS, padding=1), ValueError, "padding must be None"),
    "a plan as a list": (
        lambda: inverted_residual(x(), WEIGHTS, plan=[1, 1, 16, 1]),
        ValueError,
        "takes one of mnv2_fused.plan, got a list",
    ),
    "weights as a tuple": (lambda: inverted_residual(x(), tuple(WEIGHTS)), TypeError, "BlockWeights.*got a tuple"),
    "x of NumPy": (lambda: inverted_residual(x().numpy(), WEIGHTS), TypeError, r"got a ndarray.*torch.from_numpy\(\)"),
    "x of NumPy to a module": (lambda: block()(x().numpy()), TypeError, r"got a ndarray.*torch.from_numpy\(\)"),
    "no x": (lambda: inverted_residual(None, WEIGHTS), TypeError, "x must be a torch.Tensor, got None"),
    "no x to a module": (lambda: block()(None), TypeError, "x must be a torch.Tensor, got None"),
    "a dtype as text": (
        lambda: plan(SPEC, SHAPE, dtype="float32"),
        TypeError,
        "torch.float32, got 'float32'",
    ),
    "a dtype of no kernel": (lambda: plan(SPEC, SHAPE, dtype=torch.int8), ValueError, "one of .*got torch.int8"),
    "a tensor for its shape": (lambda: plan(SPEC, x()), ValueError, r"\(N, C_in, H, W\), got a Tensor"),
    "a GPU by its name": (lambda: cuda_plan(SPEC, SHAPE, gpu="a100"), TypeError, "gpus.H200.*got 'a100'"),
    "a GPU by its name, Triton": (
        lambda: mnv2_fused.triton_plan(SPEC, SHAPE, gpu="a100"),
        TypeError,
        "gpus.H200.*got 'a100'",
    ),
    "no model": (lambda: mnv2_fused.fuse(None), TypeError, "model must be an nn.Module, got a NoneType"),
    "a list of models": (lambda: mnv2_fused.unfuse([block()]), TypeError, "model must be an nn.Module, got a list"),
    "a class": (lambda: mnv2_fused.report(nn.ReLU), TypeError, "got the class ReLU: call it first"),
    "a shape of one number": (lambda: mnv2_fused.report(block(), 224), ValueError, r"\(N, C_in, H, W\), got 224"),
    "two inputs": (
        lambda: mnv2_fused.report(block(), SHAPE, example_inputs=x()),
        ValueError,
        r"not both; got \(1, 8, 9, 9\)",
    ),
    "a tensor that is missing": (
        lambda: torch.ops.mnv2_fused.inverted_residual(x(), *PACKED[:2], None, *PACKED[3:], 1, False),
        RuntimeError,
        "w_depthwise must be a tensor, got None",
    ),
    "an x that is missing": (
        lambda: torch.ops.mnv2_fused.inverted_residual(None, *PACKED, 1, False),
        RuntimeError,
        "x must be a tensor, got None",
    ),
    "weights that are missing": (
        lambda: torch.ops.mnv2_fused.sequence(x(), None, [0]),
        RuntimeError,
        "weights must be a tensor, got None",
    ),
    "Triton on a CPU": (lambda: inverted_residual(x(), WEIGHTS, backend="triton"), RuntimeError, r"cuda\(\).*'auto'"),
    "packing for integers": (lambda: pack(WEIGHTS, torch.int8), ValueError, "got torch.int8"),
    "packing for nobody": (lambda: pack(WEIGHTS, backend="nonsense"), ValueError, "auto, cpu, .*got 'nonsense'"),
    "packing twice": (lambda: pack(PACKED), TypeError, "packed already"),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_message(call, error, message, capfd):
    with pytest.raises(error, match=message):
        call()
    assert capfd.readouterr().err == ""  # no stack of C++


# Weights of other shapes with as many elements, or that fill the same panels.
WRONG = {
    "a shorter bias": {"b_expand": WEIGHTS.b_expand[:33]},
    "a longer bias": {"b_depthwise": torch.zeros(49)},
    "a flat kernel": {"w_depthwise": WEIGHTS.w_depthwise.reshape(48, 1, 1, 9)},
    "a kernel of three": {"w_expand": torch.zeros(48, 8, 3, 3)},
    "axes swapped": {"w_project": WEIGHTS.w_project.transpose(0, 1)},
    "rows for columns": {"w_expand": WEIGHTS.w_expand.reshape(8, 48, 1, 1)},
    "a bias left out": {"b_expand": None},
    "a squeeze alone": {"w_squeeze": torch.zeros(4, 48, 1, 1)},
}


@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_packing_checks_shapes_as_a_call_does(changed):
    weights = WEIGHTS._replace(**changed)
    assert isinstance(weights, BlockWeights)
    with pytest.raises(ValueError) as of_call:
        inverted_residual(x(), weights)
    with pytest.raises(ValueError) as of_pack:
        pack(weights)
    assert str(of_pack.value) == str(of_call.value)
