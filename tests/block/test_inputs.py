"""Odd input gets eager's answer; bad input an error that names the value and the way out."""

import pytest
import torch
from support.checks import check
from support.devices import by_isa
from support.inputs import SIZES, VIEWS, channels_last, image

from mnv2_fused import (
    BlockSpec,
    BlockWeights,
    FusedInvertedResidual,
    inverted_residual,
    inverted_residual_reference,
    pack,
    plan,
)
from mnv2_fused.testing import (
    instruction_set,
    perturb_batch_norm,
    random_weights,
)

SPEC = BlockSpec(8, 48, 8, residual=True)
SPECS = [SPEC, BlockSpec(8, 48, 20, stride=2), BlockSpec(8, 8, 5, expand=False)]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
op = torch.ops.mnv2_fused.inverted_residual


@pytest.mark.usefixtures("poison")
@by_spec
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, spec):
    check(view(), random_weights(spec), spec)


@pytest.mark.usefixtures("poison")
@by_isa
@by_spec
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, spec, isa):
    with instruction_set(isa):
        check(channels_last(2, 8, *size), random_weights(spec), spec)
        check(image(1, 8, *size), random_weights(spec), spec)


@by_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_empty_batch(spec, dtype, memory_format):
    x = torch.empty(0, 8, 9, 7, dtype=dtype).to(memory_format=memory_format)
    y = inverted_residual(x, random_weights(spec), stride=spec.stride, residual=spec.residual)
    expected = inverted_residual_reference(x, random_weights(spec), stride=spec.stride, residual=spec.residual)
    assert (y.shape, y.dtype) == (expected.shape, dtype)


def test_empty_batch_backward():
    x = torch.empty(0, 8, 9, 7, requires_grad=True)
    weights = BlockWeights(*(t.requires_grad_() for t in random_weights(SPEC, dtype=torch.float32)[:6]))
    inverted_residual(x, weights, residual=True).sum().backward()
    assert x.grad.shape == x.shape
    assert all(t.grad is not None and not t.grad.any() for t in weights[:6])


@pytest.mark.usefixtures("poison")
@by_isa
@by_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_values_spread_as_in_eager(value, spec, isa, dtype):
    weights = random_weights(spec)
    for where in ((0, 0, 0, 0), (0, 3, 4, 4), (1, 7, 8, 9)):
        x = channels_last(2, 8, 9, 10).to(dtype)
        x[where] = value
        with instruction_set(isa):
            y = inverted_residual(x, weights, stride=spec.stride, residual=spec.residual)
        expected = inverted_residual_reference(x, weights, stride=spec.stride, residual=spec.residual)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("name", BlockWeights._fields[:6])
def test_a_nan_weight_spreads_as_in_eager(name):
    x, weights = channels_last(1, 8, 6, 6), random_weights(SPEC, dtype=torch.float32)
    getattr(weights, name).view(-1)[5] = float("nan")
    y = inverted_residual(x, weights, residual=True)
    expected = inverted_residual_reference(x, weights, residual=True)
    assert expected.isnan().any()
    if name == "w_depthwise":  # the kernel multiplies the padding's zeros, eager leaves those taps out
        assert y[expected.isnan()].isnan().all()
    else:
        assert torch.equal(y.isnan(), expected.isnan())


def test_more_than_2_31_elements_of_stride_0():
    """A view of 512 floats with 2.1e9 elements: inside, all pixels are alike; the border tells sizes."""
    spec, side = BlockSpec(512, 16, 1), 2049
    weights, pixel = pack(random_weights(spec)), channels_last(1, 512, 1, 1)
    x = pixel.expand(1, 512, side, side)
    assert x.numel() > 2**31
    small = inverted_residual(pixel.expand(1, 512, 3, 3), weights)
    y = inverted_residual(x, weights)
    index = torch.ones(side, dtype=torch.long)
    index[0], index[-1] = 0, 2
    assert torch.equal(y, small[:, :, index][:, :, :, index])


def test_offsets_beyond_2_31_elements():
    """Two images 2^31 elements apart; no page between them is touched."""
    try:
        memory = torch.empty(2**31 + 8 * 81)
    except RuntimeError:
        pytest.skip("this system does not lend 8 GiB of untouched memory")
    x = memory.as_strided((2, 8, 9, 9), (2**31, 1, 72, 8))
    x.copy_(image(2, 8, 9, 9))
    for spec in SPECS:
        check(x, random_weights(spec), spec)


# What is wrong with x, the exception, and what its message must say.
BAD_X = {
    "3-D": (lambda: image(8, 9, 9), ValueError, [r"\[8, 9, 9\]", r"x\[None\]"]),
    "5-D": (lambda: image(1, 1, 8, 9, 9), ValueError, [r"\[N, C_in, H, W\]", r"\[1, 1, 8, 9, 9\]"]),
    "channels": (lambda: image(1, 3, 9, 9), ValueError, ["must have 8 channels", "got 3"]),
    "no channels": (lambda: image(1, 0, 9, 9), ValueError, ["must have 8 channels", "got 0"]),
    "integer": (lambda: torch.ones(1, 8, 9, 9, dtype=torch.int32), TypeError, ["int32", r"x\.float\(\)"]),
    "bool": (lambda: torch.ones(1, 8, 9, 9).bool(), TypeError, ["bool", r"x\.float\(\)"]),
    "complex": (lambda: image(1, 8, 9, 9) + 0j, TypeError, ["complex64", "floating point"]),
    "float8": (
        lambda: image(1, 8, 9, 9).to(torch.float8_e4m3fn),
        (TypeError, RuntimeError),
        ["float32, float64, float16 or bfloat16", r"x\.float\(\)"],
    ),
    "no rows": (lambda: image(1, 8, 0, 9), ValueError, ["height", "at least 1", r"\[1, 8, 0, 9\]"]),
    "no columns": (lambda: image(1, 8, 9, 0), ValueError, ["width", "at least 1", r"\[1, 8, 9, 0\]"]),
    "meta": (lambda: image(1, 8, 9, 9).to("meta"), RuntimeError, ["meta", r"\.cpu\(\)", "backend='eager'"]),
}
by_bad_x = pytest.mark.parametrize(("make", "error", "parts"), BAD_X.values(), ids=BAD_X)


def fails(error, parts, call, *args, **kwargs):
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    for part in parts:
        raised.match(part)


@by_bad_x
def test_bad_x(make, error, parts):
    fails(error, parts, inverted_residual, make(), random_weights(SPEC), residual=True)
    fails(error, parts, inverted_residual, make(), pack(random_weights(SPEC)), residual=True)


@by_bad_x
@pytest.mark.parametrize("grad", [False, True])
def test_bad_x_to_the_module(make, error, parts, grad):
    block = FusedInvertedResidual(8, 8, 1, 6).eval()
    with torch.set_grad_enabled(grad):
        if make().dtype != torch.float32:  # named before anything else
            error, parts = TypeError, [str(make().dtype), "torch.float32"]
        fails((ValueError, RuntimeError) if error is ValueError else error, parts, block, make())


BAD_X_TO_OP = {
    "3-D": (lambda: image(8, 9, 9), [r"\[N, C_in, H, W\]", r"\[8, 9, 9\]"]),
    "channels": (lambda: image(1, 3, 9, 9), ["8 channels|C_in|w_expand", "3"]),
    "integer": (lambda: torch.ones(1, 8, 9, 9, dtype=torch.int32), [r"x\.float\(\)"]),
    "no rows": (lambda: image(1, 8, 0, 9), ["height must be at least 1, got 0"]),
    "float64": (lambda: image(1, 8, 9, 9).double(), ["must be float64", r"mnv2_fused\.pack"]),
}


@pytest.mark.parametrize(("make", "parts"), BAD_X_TO_OP.values(), ids=BAD_X_TO_OP)
def test_bad_x_to_the_op(make, parts):
    fails((ValueError, RuntimeError, TypeError), parts, op, make(), *pack(random_weights(SPEC)), 1, False)


BAD_WEIGHTS = {
    "w_expand": (torch.ones(48, 8, 3, 3), [r"w_expand must be \[48, 8, 1, 1\], got \[48, 8, 3, 3\]"]),
    "b_expand": (torch.ones(47), [r"b_expand must be \[48\], got \[47\]"]),
    "w_depthwise": (torch.ones(48, 1, 9, 9), [r"w_depthwise must be \[48, 1, 3, 3\], got \[48, 1, 9, 9\]"]),
    "b_depthwise": (torch.ones(48, 1), [r"b_depthwise must be \[48\], got \[48, 1\]"]),
    "w_project": (torch.ones(8, 47, 1, 1), [r"w_project must be \[8, 48, 1, 1\], got \[8, 47, 1, 1\]"]),
    "b_project": (torch.ones(9), [r"b_project must be \[8\], got \[9\]"]),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
@pytest.mark.parametrize("function", [inverted_residual, inverted_residual_reference])
def test_weights_of_the_wrong_shape(name, function):
    tensor, parts = BAD_WEIGHTS[name]
    weights = random_weights(SPEC)._replace(**{name: tensor})
    fails(ValueError, parts, function, image(1, 8, 9, 9), weights)


@pytest.mark.parametrize("name", BlockWeights._fields[:6])
def test_weights_that_are_scalars(name):
    weights = random_weights(SPEC)._replace(**{name: torch.tensor(1.0)})
    fails(ValueError, [name, r"\[\]"], inverted_residual, image(1, 8, 9, 9), weights)


@pytest.mark.parametrize("missing", ["w_expand", "b_expand"])
def test_half_an_expansion(missing):
    weights = random_weights(SPEC)._replace(**{missing: None})
    fails(ValueError, ["w_expand and b_expand must both"], inverted_residual, image(1, 8, 9, 9), weights)
    packed = pack(random_weights(SPEC))._replace(**{missing: None})
    fails(RuntimeError, ["w_expand and b_expand must both"], op, image(1, 8, 9, 9), *packed, 1, False)


@pytest.mark.parametrize("name", BlockWeights._fields[:6])
@pytest.mark.parametrize("damage", [lambda t: t[:-1], lambda t: t[0], lambda t: t[None]], ids=["short", "-D", "+D"])
def test_packed_weights_of_the_wrong_shape(name, damage):
    packed = pack(random_weights(SPEC))
    packed = packed._replace(**{name: damage(getattr(packed, name))})
    x = image(1, 8, 9, 9)
    if packed.b_project.shape == (7,):  # not a mistake: the same panels hold a block of seven output channels
        assert inverted_residual(x, packed).shape == (1, 7, 9, 9)
        return
    fails((ValueError, RuntimeError), [name], inverted_residual, x, packed)
    fails(RuntimeError, ["must be"], op, x, *packed, 1, False)


def test_packed_weights_must_be_contiguous():
    packed = pack(random_weights(SPEC))
    packed = packed._replace(w_expand=packed.w_expand.mT.contiguous().mT)
    parts = [r"w_expand must be contiguous \[3, 8, 16\]", r"mnv2_fused\.pack"]
    fails(RuntimeError, parts, op, image(1, 8, 9, 9), *packed, 1, False)


def test_weights_on_another_device_are_refused():
    """Never a result from memory that no kernel wrote."""
    x, weights = image(1, 8, 9, 9), random_weights(SPEC)
    on_meta = BlockWeights(*(t.to("meta") for t in weights[:6]))
    error = (ValueError, RuntimeError)
    fails(error, ["meta"], inverted_residual, x, on_meta)
    fails(error, ["meta"], inverted_residual, x, pack(on_meta))
    fails(error, ["meta"], op, x, *pack(on_meta), 1, False)
    fails(error, ["meta"], FusedInvertedResidual(8, 8, 1, 6).eval().to("meta"), x)


def test_packed_weights_of_another_dtype():
    x, packed = image(1, 8, 9, 9), pack(random_weights(SPEC))
    fails(RuntimeError, ["must be float64", "pack"], inverted_residual, x.double(), packed)
    wide = pack(random_weights(SPEC), torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        fails(RuntimeError, ["must be float32", "pack"], inverted_residual, x.to(dtype), wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_the_module_refuses_another_dtype_as_eager_does(dtype, grad):
    block = FusedInvertedResidual(8, 8, 1, 6).eval()
    x = image(1, 8, 9, 9).to(dtype)
    with torch.set_grad_enabled(grad):
        fails(TypeError, [str(dtype), "float32", "autocast"], block, x)
        fails(RuntimeError, [], block._forward_modules, x)


@pytest.mark.parametrize("stride", [3, 0, -1])
def test_stride(stride):
    parts = [f"stride must be 1 or 2, got {stride}", "backend='eager'"]
    fails(ValueError, parts, inverted_residual, image(1, 8, 9, 9), random_weights(SPEC), stride=stride)
    packed = pack(random_weights(SPEC))
    fails(RuntimeError, parts, op, image(1, 8, 9, 9), *packed, stride, False)
    fails(ValueError, ["stride", str(stride)], FusedInvertedResidual, 8, 8, stride, 6)


def test_residual_without_equal_shapes():
    parts = ["residual needs stride 1", "got stride 2, 8 and 8"]
    x, weights = image(1, 8, 9, 9), random_weights(SPEC)
    fails(ValueError, parts, inverted_residual, x, weights, stride=2, residual=True)
    fails(RuntimeError, parts, op, x, *pack(weights), 2, True)
    wider = random_weights(BlockSpec(8, 48, 9))
    fails(ValueError, ["got stride 1, 8 and 9"], inverted_residual, x, wider, residual=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 48, 8), "in_channels must be at least 1, got 0"),
        ((8, 0, 8), "hidden_channels must be at least 1, got 0"),
        ((8, 48, -1), "out_channels must be at least 1, got -1"),
        ((8, 48, 8, 3), "stride must be 1 or 2, got 3"),
        ((8, 48, 8, 1, False), r"must equal in_channels \(8\), got 48"),
        ((8, 48, 8, 2, True, True), "residual needs stride 1"),
    ],
)
def test_bad_spec(values, message):
    with pytest.raises(ValueError, match=message):
        BlockSpec(*values)


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ([0, 1, 16, 1], "tile_rows must be 1 to 9, got 0"),
        ([10, 1, 16, 1], "tile_rows must be 1 to 9, got 10"),
        ([1, 10, 16, 1], "tile_cols must be 1 to 9, got 10"),
        ([1, 1, 17, 1], "group must be a multiple of 16, got 17"),
        ([1, 1, 64, 1], "group must be 1 to 48, got 64"),
        ([1, 1, 2**62, 1], "group must be 1 to 48"),
        ([1], "got 1 values"),
        ([1, 1, 16, 0], "splits must be 1 to 3, got 0"),
        ([1, 1, 16, 4], "splits must be 1 to 3, got 4"),
        ([1, 2, 3], "got 3 values"),
    ],
    ids=str,
)
def test_plan_out_of_range_to_the_op(forced, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        op(image(1, 8, 9, 9), *pack(random_weights(SPEC)), 1, True, forced)


def test_plan_out_of_range_to_the_function():
    large = plan(SPEC, (1, 8, 30, 30), tile_rows=1, tile_cols=30)
    with pytest.raises(ValueError, match=r"tile_cols must be 1 to 9 .*got 30"):
        inverted_residual(image(1, 8, 9, 9), random_weights(SPEC), plan=large)


def test_unknown_backend():
    parts = ["backend must be one of auto, cpu", "got 'tpu'"]
    fails(ValueError, parts, inverted_residual, image(1, 8, 9, 9), random_weights(SPEC), backend="tpu")
    fails(ValueError, parts, FusedInvertedResidual, 8, 8, 1, 6, backend="tpu")


def test_backend_from_the_environment(monkeypatch):
    x, weights = image(1, 8, 9, 9), random_weights(SPEC)
    expected = inverted_residual_reference(x, weights, residual=True)
    block = perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6)).eval()
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert torch.equal(inverted_residual(x, weights, residual=True), expected)
    assert torch.equal(inverted_residual(x, weights, residual=True, backend="cpu"), expected)
    assert torch.equal(block(x), block._forward_modules(x))
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "abacus")
    parts = ["MNV2_FUSED_BACKEND must be one of", "got 'abacus'"]
    fails(ValueError, parts, inverted_residual, x, weights)
    fails(ValueError, parts, block, x)


def test_what_the_eager_backend_takes_beyond_the_kernel():
    """The way out that messages offer exists."""
    x = torch.empty(1, 8, 9, 9, device="meta")
    on_meta = BlockWeights(*(t.to("meta") for t in random_weights(SPEC)[:6]))
    assert inverted_residual(x, on_meta, stride=2, backend="eager").shape == (1, 8, 5, 5)


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_layouts_other_than_strided(layout):
    x = image(1, 8, 9, 9)
    x = x.to_sparse() if layout == "sparse" else x.to_mkldnn()
    fails((TypeError, ValueError), [layout, "to_dense"], inverted_residual, x, random_weights(SPEC))
