"""The layout that packed weights are in, and what a backend says that reads another one."""

import importlib.util

import pytest
import torch

from mnv2_fused import BlockSpec, PackedWeights, backends, inverted_residual, pack
from mnv2_fused.fold import Layout
from mnv2_fused.testing import random_weights

SPECS = [
    BlockSpec(8, 48, 8, residual=True),
    BlockSpec(5, 38, 7, stride=2),
    BlockSpec(16, 16, 33, expand=False),
    BlockSpec(2, 2, 2),
    BlockSpec(16, 256, 16, kernel=5, squeeze_channels=256),
]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
# Layouts by the backend and the dtype that weights are packed for.
KINDS = {
    ("cpu", torch.float32): Layout.PANELS,
    ("cpu", torch.float64): Layout.PANELS,
    ("cpu", torch.float16): Layout.PANELS,
    ("cpu", torch.bfloat16): Layout.PAIRS,
    ("triton", torch.float32): Layout.PANELS,
    ("triton", torch.float16): Layout.PANELS,
    ("triton", torch.bfloat16): Layout.PANELS,
    ("cuda", torch.float32): Layout.FRAGMENTS,
    ("cuda", torch.float16): Layout.FRAGMENTS,
    ("cuda", torch.bfloat16): Layout.FRAGMENTS,
}
# Every backend, with every kind of weights that it reads in another layout.
WRONG = [
    *(("cpu", *kind) for kind in KINDS if kind[0] == "cuda" or kind == ("triton", torch.bfloat16)),
    *(("triton", *kind) for kind in KINDS if KINDS[kind] is not Layout.PANELS),
    *(("cuda", *kind) for kind in KINDS if kind[0] != "cuda"),
]


def packed_weights(spec, kind):
    backend, dtype = kind
    return pack(random_weights(spec, dtype=torch.float64), dtype, backend)


@by_spec
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layout_is_that_of_backend_and_dtype(spec, kind):
    packed = packed_weights(spec, kind)
    assert packed.layout is KINDS[kind]
    products = [t for t in (packed.w_expand, packed.w_project) if t is not None]
    assert {Layout.of(t) for t in products} == {KINDS[kind]}
    others = [t for t in (packed.w_depthwise, packed.w_squeeze, packed.w_excite) if t is not None]
    assert {Layout.of(t) for t in others} == {Layout.PANELS}
    assert Layout.needed(kind[0], packed.w_project.dtype) is KINDS[kind]
    packed.check_layout(kind[0])


def test_layout_is_no_field():
    assert len(PackedWeights._fields) == 10 and "layout" not in PackedWeights._fields


def test_an_odd_number_of_channels_is_in_panels():
    packed = packed_weights(BlockSpec(8, 37, 8), ("cpu", torch.bfloat16))
    assert packed.layout is Layout.PANELS
    packed.check_layout("cpu")


@pytest.mark.parametrize(("backend", "packed_for", "dtype"), WRONG, ids=str)
def test_function_names_both_layouts(backend, packed_for, dtype, monkeypatch):
    """Each backend as if it ran here: the layout is looked at before any kernel."""
    monkeypatch.setattr(backends, "resolve_backend", lambda *arguments: backend)
    spec = SPECS[0]
    packed = packed_weights(spec, (packed_for, dtype))
    needed = KINDS[backend, dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32].value
    found = KINDS[packed_for, dtype].value
    message = rf"they are in {found}, it reads {needed};.*mnv2_fused.pack\(weights, x.dtype, '{backend}'\)"
    with pytest.raises(ValueError, match=message):
        inverted_residual(torch.randn(1, 8, 5, 4).to(dtype), packed, residual=True)


@by_spec
@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] != "cpu"], ids=str)
def test_cpu_op_refuses_other_layouts(spec, kind):
    packed = packed_weights(spec, kind)
    if packed.layout is Layout.PANELS and packed.w_project.dtype == torch.float32:
        return  # the CPU's own
    x = torch.randn(1, spec.in_channels, 5, 4).to(kind[1])
    with pytest.raises(RuntimeError, match=r"must (be|have)"):
        torch.ops.mnv2_fused.inverted_residual(x, *packed, spec.stride, spec.residual)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k] is not Layout.PANELS], ids=str)
def test_triton_op_names_both_layouts(kind):
    """Weights of the right dtype in the wrong layout: the kernel would read them as another block's."""
    from mnv2_fused.triton_backend import launch

    packed = packed_weights(SPECS[0], kind)
    x = torch.randn(1, 8, 5, 4).to(kind[1])
    with pytest.raises(ValueError, match=rf"'triton'.*in {packed.layout.value}, it reads panels; pack"):
        launch.inverted_residual_triton(x, *packed, 1, True)


@by_spec
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_eager_takes_any_layout(spec, kind):
    packed = packed_weights(spec, kind)
    x = torch.randn(1, spec.in_channels, 5, 4, dtype=torch.float64)
    weights = random_weights(spec, dtype=torch.float64)
    y = inverted_residual(x, packed, backend="eager", **spec.geometry)
    expected = inverted_residual(x, weights, backend="eager", **spec.geometry)
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
