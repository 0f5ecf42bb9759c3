"""What the guard learns from CPython's own structures, of which every Python has others."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mnv2_fused.module.guard import Guard


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "stride", (2, 2)),
        lambda conv: setattr(conv, "training", not conv.training),
        lambda conv: setattr(conv, "forward", torch.relu),
        lambda conv: setattr(conv, "_parameters", dict(conv._parameters)),
        lambda conv: delattr(conv, "padding_mode"),
        lambda conv: vars(conv).update(stride=(2, 2)),
    ],
    ids=["another value", "the mode", "one more", "another dictionary", "one less", "through the dictionary"],
)
def test_an_attribute_of_a_module_counts(change):
    """However it is set: where objects keep attributes, and what counts their changes, differs between Pythons."""
    conv = nn.Conv2d(4, 4, 3)
    guard = Guard.of_modules([conv], RemovableHandle.next_id)
    assert guard.is_valid() and guard.is_valid()
    change(conv)
    assert not guard.is_valid()


@pytest.mark.parametrize(
    "make", [torch.rand, lambda *shape: nn.Parameter(torch.rand(*shape))], ids=["tensor", "parameter"]
)
def test_tensors_are_read_by_their_handle(make):
    """Without it a guard serves nothing, and every call takes the long way."""
    guard = Guard([make(4, 4, 3, 3)])
    with torch.inference_mode():
        assert guard.serves(torch.rand(1, 4, 8, 8))
        assert not guard.serves(torch.rand(1, 4, 8, 8).double())
    assert not guard.serves(torch.rand(1, 4, 8, 8))  # gradients may be recorded


def test_handles_hold_nothing():
    weight = torch.rand(4, 4)
    guard, count = Guard([weight]), sys.getrefcount(weight)
    assert guard.is_valid() and sys.getrefcount(weight) == count
    weight.data = weight.data.t()
    assert not guard.is_valid()
