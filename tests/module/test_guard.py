"""What the guard learns from CPython's own structures, of which every Python has others."""

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
