"""What MobileNetV2's block does not have: other kernels, strides, padding, activations, a squeeze-and-excite."""

import itertools

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.checks import check
from support.devices import ISAS, by_isa
from support.inputs import by_cpu_dtype, random_input
from torch import nn

from mnv2_fused import BlockSpec, BlockWeights, inverted_residual, inverted_residual_reference, pack, plan
from mnv2_fused.activations import ACTIVATIONS, GATES
from mnv2_fused.fold import packed_dtypes, unpack
from mnv2_fused.testing import (
    agreement,
    block_agreement,
    instruction_set,
    peak_activation_bytes,
    random_weights,
    threads,
)

pytestmark = pytest.mark.usefixtures("poison")

op = torch.ops.mnv2_fused.inverted_residual


SPECS = [
    BlockSpec(16, 64, 16, residual=True, activation="relu"),
    BlockSpec(24, 72, 40, stride=2, kernel=5, activation="relu", squeeze_channels=24),
    BlockSpec(40, 240, 80, stride=2, activation="hardswish"),
    BlockSpec(40, 120, 40, residual=True, kernel=5, activation="hardswish", squeeze_channels=32),
    BlockSpec(
        32, 32, 16, expand=False, activation="silu", squeeze_channels=8, squeeze_activation="silu", gate="sigmoid"
    ),
    BlockSpec(24, 144, 40, stride=2, kernel=5, padding="same", activation="silu", squeeze_channels=6, gate="sigmoid"),
    BlockSpec(32, 32, 64, expand=False, out_activation="relu6"),
    BlockSpec(19, 50, 19, residual=True, dilation=2, out_activation="hardswish"),
    BlockSpec(13, 37, 24, kernel=5, dilation=3, activation="identity", out_activation="silu"),
    BlockSpec(24, 24, 16, expand=False, dilation=36, out_activation="relu"),
    BlockSpec(16, 48, 16, residual=True, kernel=5, dilation=7, squeeze_channels=4),
    BlockSpec(16, 48, 16, dilation=6, padding=(12, 3, 0, 10)),
    BlockSpec(16, 96, 24, stride=2, padding=(0, 1, 0, 1)),
    BlockSpec(16, 96, 24, kernel=5, padding=(4, 0, 1, 2), activation="relu", out_activation="relu"),
    BlockSpec(16, 64, 16, residual=True, activation="leaky_relu", out_activation="leaky_relu", negative_slope=0.2),
    BlockSpec(24, 72, 40, stride=2, kernel=5, activation="gelu", squeeze_channels=9, squeeze_activation="gelu_tanh"),
    BlockSpec(24, 72, 24, residual=True, activation="gelu_tanh", out_activation="gelu"),
    BlockSpec(32, 32, 24, expand=False, activation="leaky_relu", squeeze_channels=8, squeeze_activation="leaky_relu"),
    BlockSpec(16, 64, 16, residual=True, kernel=7, activation="hardswish", squeeze_channels=8),
    BlockSpec(24, 72, 40, stride=2, kernel=7, padding="same", activation="relu"),
    BlockSpec(24, 72, 40, stride=(2, 1), activation="hardswish", squeeze_channels=9, gate="hardsigmoid_fifth"),
    BlockSpec(24, 72, 40, stride=(1, 2), kernel=5, padding="same"),
    BlockSpec(24, 48, 24, activation="identity", expand_activation="relu", out_activation="relu"),
    BlockSpec(16, 64, 16, residual=True, activation="gelu", out_activation="gelu", activates_sum=True),
    BlockSpec(16, 300, 16, residual=True, expand_activation="silu", out_activation="relu", activates_sum=True),
]


@by_isa
@by_cpu_dtype
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_kind_of_block(spec, isa, dtype):
    with instruction_set(isa):
        for batch, size in ((1, (14, 14)), (3, (9, 17)), (2, (5, 6))):
            check(random_input(spec, batch, size, dtype=dtype), random_weights(spec), spec)


@by_isa
@by_cpu_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_large_values(activation, isa, dtype):
    """A channel of x alone, from far below the least exponent to far above the greatest."""
    least, most = (-800, 800) if dtype == torch.float64 else (-100, 100)
    x = torch.linspace(least, most, 16 * 64, dtype=torch.float64).to(dtype).view(1, 1, 16, 64)
    delta = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    delta[..., 1, 1] = 1
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for geometry in ({"activation": activation}, {"activation": "identity", "out_activation": activation}):
        weights = BlockWeights(None, None, delta, zero, one, zero)
        with instruction_set(isa):
            y = inverted_residual(x, weights, **geometry)
        eager = inverted_residual_reference(x, weights, **geometry)
        found = agreement(y, eager, inverted_residual_reference(x.double(), weights, **geometry))
        assert found.ok, found
        # And element by element, where the rule above is set by the largest.
        close = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(y, eager, rtol=close, atol=close)


@by_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("squeeze", [0, 8])
def test_nan_and_infinity_spread_as_in_eager(activation, squeeze, isa):
    spec = BlockSpec(4, 4, 12, expand=False, activation=activation, squeeze_channels=squeeze)
    weights = random_weights(spec, dtype=torch.float32)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = random_input(spec, 2, (7, 9))
        x[0, 2, 3, 4] = value
        with instruction_set(isa):
            y = inverted_residual(x, weights, **spec.geometry)
        expected = inverted_residual_reference(x, weights, **spec.geometry)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@st.composite
def cases(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    expand, residual = draw(st.booleans()), draw(st.booleans())
    c_in, kernel = draw(st.integers(1, 40)), one_of(3, 5, 7)
    stride = 1 if residual else one_of(1, 2, (1, 2), (2, 1))
    dilation = one_of(1, 1, 2, 3) if stride == 1 else 1
    extent = dilation * (kernel - 1) + 1
    padding = (
        one_of(None, "same")
        if residual or draw(st.booleans())
        else tuple(draw(st.integers(0, extent - 1)) for _ in range(4))
    )
    spec = BlockSpec(
        *(c_in, draw(st.integers(1, 100)) if expand else c_in, c_in if residual else draw(st.integers(1, 40))),
        *(stride, expand, residual, kernel, dilation, padding, one_of(*ACTIVATIONS), one_of(*ACTIVATIONS)),
        *(one_of(0, 0, 1, 9), one_of(*ACTIVATIONS), one_of(*GATES), one_of(0.01, 0.2, 0.0, -1.0, 3.0)),
        *(one_of(None, None, *ACTIVATIONS), draw(st.booleans())),
    )
    around = padding if isinstance(padding, tuple) else (extent, extent, extent, extent)
    height = draw(st.integers(max(1, extent - around[2] - around[3]), 24))
    width = draw(st.integers(max(1, extent - around[0] - around[1]), 24))
    forced = None
    if draw(st.booleans()):
        out_height, out_width = spec.out_size(height, width)
        panels = -(-spec.hidden_channels // 16)
        group = draw(st.integers(1, panels))
        forced = {
            "tile_rows": draw(st.integers(1, out_height)),
            "tile_cols": draw(st.integers(1, out_width)),
            "group": 16 * group,
            "splits": draw(st.integers(1, -(-panels // group))),
        }
    return spec, (draw(st.integers(0, 3)), height, width), forced, one_of(torch.float32, torch.float64), one_of(*ISAS)


@given(cases(), st.integers(0, 2**31))
def test_any_block_and_plan(case, seed):
    spec, (batch, height, width), forced, dtype, isa = case
    weights, x = random_weights(spec, seed=seed), random_input(spec, batch, (height, width), dtype=dtype, seed=seed)
    with instruction_set(isa):
        chosen = forced and plan(spec, x.shape, dtype=dtype, **forced)
        y = inverted_residual(x, weights, **spec.geometry, plan=chosen)
    if batch == 0:
        assert y.shape == inverted_residual(x, weights, **spec.geometry, backend="eager").shape
        return
    found = block_agreement(y, x, weights, spec)
    assert found.ok, f"{spec} on {list(x.shape)}: {found}"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_results_are_the_same_alone_in_a_batch_and_on_more_threads(spec):
    weights, x = pack(random_weights(spec)), random_input(spec, 5, (23, 18))
    with threads(1):
        whole = inverted_residual(x, weights, **spec.geometry)
        for i in range(5):
            assert torch.equal(inverted_residual(x[i : i + 1], weights, **spec.geometry), whole[i : i + 1])
    with threads(2):
        assert torch.equal(inverted_residual(x, weights, **spec.geometry), whole)


@pytest.mark.slow
@by_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squeeze_and_excite_keeps_or_computes_again(isa, dtype):
    spec = BlockSpec(8, 64, 8, residual=True, kernel=5, activation="hardswish", squeeze_channels=16)
    with instruction_set(isa):
        small, large = (plan(spec, (1, 8, n, n), dtype=dtype) for n in (28, 192))
        assert small.keeps and not large.keeps
        check(random_input(spec, 3, (28, 28), dtype=dtype), random_weights(spec), spec)
        check(random_input(spec, 2, (192, 192), dtype=dtype), random_weights(spec), spec)
    # Eager writes e, d and their product with the gate.
    assert large.bytes_never_written == 3 * 64 * 192 * 192 * dtype.itemsize
    assert small.bytes_never_written == 2 * 64 * 28 * 28 * dtype.itemsize


@by_cpu_dtype
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_call_takes_the_memory_that_the_plan_names(spec, dtype):
    weights = pack(random_weights(spec), dtype)
    for batch, size in ((1, (14, 14)), (19, (40, 33))):
        x = random_input(spec, batch, size, dtype=dtype)
        copies = x.numel() * 4 if packed_dtypes(dtype, x.device, spec.hidden_channels)[0] != dtype else 0
        y = inverted_residual(x, weights, **spec.geometry)
        copies += y.numel() * 4 * (copies > 0)
        with torch.inference_mode():
            peak = peak_activation_bytes(lambda x=x: inverted_residual(x, weights, **spec.geometry))
        # Rounded up to the allocator's alignment.
        call = plan(spec, x.shape, dtype=dtype).call_bytes
        assert 0 <= peak - (call + y.nbytes + copies) <= 4096, (peak, call, y.nbytes, copies)


def test_many_images_are_squeezed_a_few_at_a_time():
    """Neither the last few nor the first see another image's gate."""
    spec = BlockSpec(8, 144, 16, activation="silu", squeeze_channels=6, gate="sigmoid")
    weights, x = pack(random_weights(spec)), random_input(spec, 19, (56, 56))
    y = inverted_residual(x, weights, **spec.geometry)
    for i in (0, 1, 7, 17, 18):
        assert torch.equal(inverted_residual(x[i : i + 1], weights, **spec.geometry), y[i : i + 1])


def test_the_reference_is_what_modules_compute():
    """As a network's author writes it: conv, activation, squeeze-and-excite as modules."""
    torch.manual_seed(0)
    spec = BlockSpec(
        6, 12, 6, residual=True, kernel=5, dilation=2, activation="hardswish", out_activation="relu", squeeze_channels=3
    )
    layers = nn.Sequential(nn.Conv2d(6, 12, 1), nn.Hardswish())
    depthwise = nn.Sequential(nn.Conv2d(12, 12, 5, padding=4, dilation=2, groups=12), nn.Hardswish())
    squeeze = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 3, 1), nn.ReLU(), nn.Conv2d(3, 12, 1), nn.Hardsigmoid()
    )
    project = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU())
    x = torch.randn(2, 6, 9, 11)
    with torch.no_grad():
        d = depthwise(layers(x))
        expected = project(d * squeeze(d)) + x
    convs = layers[0], depthwise[0], project[0], squeeze[1], squeeze[3]
    weights = BlockWeights(*itertools.chain.from_iterable((c.weight.detach(), c.bias.detach()) for c in convs))
    torch.testing.assert_close(inverted_residual_reference(x, weights, **spec.geometry), expected)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 7), (1, 1), (2, 5)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_is_tensorflows(size, kernel):
    """Output size ceil(size / stride), the odd row behind: Keras pads (0, 1) where 3x3 halves an even size."""
    spec = BlockSpec(3, 3, 3, stride=2, expand=False, kernel=kernel, padding="same", activation="identity")
    weights, x = random_weights(spec), random_input(spec, 1, size, dtype=torch.float64)
    left, right, top, bottom = spec.padding_of(*size)
    assert (left <= right <= left + 1) and (top <= bottom <= top + 1)
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(padded, weights.w_depthwise, weights.b_depthwise, stride=2, groups=3)
    assert expected.shape[2:] == tuple(-(-n // 2) for n in size)
    y = inverted_residual(x, weights, **spec.geometry)
    torch.testing.assert_close(y, F.conv2d(expected, weights.w_project, weights.b_project))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packing_loses_nothing(spec, dtype):
    weights = random_weights(spec)
    back = unpack(pack(weights, dtype), spec.in_channels)
    packed = BlockSpec.of(pack(weights, dtype), spec.in_channels, **spec.geometry)
    assert packed == spec
    for name, a, b in zip(weights._fields, weights, back, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.to(b.dtype), b), name


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_opcheck(spec):
    x, packed = random_input(spec, 2, (7, 6)), pack(random_weights(spec))
    torch.library.opcheck(op.default, (x, *packed, spec.strides[0], spec.residual, [], *spec.options(7, 6)))


@pytest.mark.parametrize("spec", [SPECS[3], SPECS[5], SPECS[7]], ids=str)
def test_gradients(spec):
    """Of everything, against float64: recomputed through torch's own derivatives."""
    wide = [t for t in random_weights(spec) if t is not None]

    def gradients(function, dtype):
        x = random_input(spec, 2, (7, 6), dtype=dtype).requires_grad_()
        given = [t.to(dtype).requires_grad_() for t in wide]
        filled = iter(given)
        weights = BlockWeights(*(None if t is None else next(filled) for t in random_weights(spec)))
        y = function(x, weights, **spec.geometry)
        return torch.autograd.grad(y.square().sum(), [x, *given])

    truth = gradients(inverted_residual_reference, torch.float64)
    eager = gradients(inverted_residual_reference, torch.float32)
    fused = gradients(inverted_residual, torch.float32)
    for f, e, r in zip(fused, eager, truth, strict=True):
        found = agreement(f, e, r)
        assert found.ok, found


@pytest.mark.slow
def test_dynamic_shapes_compile(fresh_graphs):
    spec = SPECS[5]
    weights = pack(random_weights(spec))
    compiled = torch.compile(lambda x: inverted_residual(x, weights, **spec.geometry), fullgraph=True, dynamic=True)
    for size in ((14, 14), (15, 13), (9, 20)):
        x = random_input(spec, 1, size)
        assert torch.equal(compiled(x), inverted_residual(x, weights, **spec.geometry))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kernel": 9}, "kernel must be 3, 5 or 7, got 9"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"dilation": 2, "stride": 2}, "dilation must be 1 where stride is 2, got 2"),
        ({"activation": "elu"}, f"activation must be one of {', '.join(ACTIVATIONS)}, got 'elu'"),
        ({"negative_slope": float("inf")}, "negative_slope must be a finite number, got inf"),
        ({"negative_slope": "0.2"}, "negative_slope must be a finite number, got '0.2'"),
        ({"out_activation": "tanh"}, "out_activation must be one of"),
        ({"gate": "relu"}, "gate must be one of hardsigmoid, sigmoid, hardsigmoid_fifth, got 'relu'"),
        ({"padding": "valid"}, "padding must be None, 'same' or"),
        ({"padding": (0, 0, 3, 0)}, r"padding must be 0 to 2 on each side, got \(0, 0, 3, 0\)"),
        ({"padding": (1, 1, 0, 1), "residual": True}, "a residual needs padding that adds 2 rows and columns"),
        ({"squeeze_channels": -1}, "squeeze_channels must be at least 0, got -1"),
    ],
    ids=str,
)
def test_specs_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        BlockSpec(8, 48, 8, **values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0,), "dilation must be 1 to 2"),
        ((1, [1, 1, 1]), r"padding must be \[left, right, top, bottom\] or empty, got 3 values"),
        ((1, [3, 1, 1, 1]), "padding must be 0 to 2, got 3"),
        ((1, [0, 0, 0, 0]), "with its padding the image must reach the kernel's 3 rows and columns, got 2 and 2"),
        ((1, [], len(ACTIVATIONS)), f"activation must be 0 to {len(ACTIVATIONS) - 1}"),
        ((1, [], 0, -1), f"out_activation must be 0 to {len(ACTIVATIONS) - 1}"),
        ((1, [], 0, 2, 99), f"squeeze_activation must be 0 to {len(ACTIVATIONS) - 1}"),
        ((1, [], 0, 2, 1, 3), "gate must be 0 to 2"),
        ((1, [], 5, 2, 1, 0, float("nan")), "negative_slope must be finite, got nan"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(RuntimeError, match=message):
        op(torch.ones(1, 8, 2, 2), *pack(random_weights(BlockSpec(8, 48, 9))), 1, False, [], *options)


def test_images_smaller_than_the_kernel():
    spec = BlockSpec(8, 48, 8, kernel=5, padding=(0, 0, 0, 0))
    with pytest.raises(ValueError, match="height and width must reach 5"):
        inverted_residual(torch.ones(1, 8, 4, 9), random_weights(spec), **spec.geometry)


@pytest.mark.parametrize("missing", ["w_squeeze", "b_squeeze", "w_excite", "b_excite"])
def test_half_a_squeeze(missing):
    weights = random_weights(BlockSpec(8, 48, 8, squeeze_channels=4))
    message = "w_squeeze, b_squeeze, w_excite and b_excite must all"
    with pytest.raises(ValueError, match=message):
        inverted_residual(torch.ones(1, 8, 9, 9), weights._replace(**{missing: None}))
    with pytest.raises(RuntimeError, match=message):
        op(torch.ones(1, 8, 9, 9), *pack(weights)._replace(**{missing: None}), 1, False)


@pytest.mark.parametrize("name", ["w_squeeze", "b_squeeze", "w_excite", "b_excite"])
def test_squeeze_weights_of_the_wrong_shape(name):
    weights = random_weights(BlockSpec(8, 48, 8, squeeze_channels=4))
    cut = weights._replace(**{name: getattr(weights, name)[:-1]})
    with pytest.raises(ValueError, match=f"{name} must be|w_squeeze must be"):
        inverted_residual(torch.ones(1, 8, 9, 9), cut)
    packed = pack(weights)
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        op(torch.ones(1, 8, 9, 9), *packed._replace(**{name: getattr(packed, name)[:-1]}), 1, False)


@by_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_is_as_exact_as_torchs(activation, dtype, isa):
    """Of a channel alone, value by value, against 50 digits: float64's own error hides that of a float64 kernel."""
    x = torch.linspace(-9, 9, 16 * 256, dtype=torch.float64).to(dtype).view(1, 1, 16, 256)
    delta, one, zero = (torch.zeros(s, dtype=torch.float64) for s in ((1, 1, 3, 3), (1, 1, 1, 1), (1,)))
    delta[..., 1, 1], one[:] = 1, 1
    with instruction_set(isa):
        y = inverted_residual(x, BlockWeights(None, None, delta, zero, one, zero), activation=activation)
    with mpmath.workdps(50):

        def exact(v):
            if activation == "gelu":
                return v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2
            return v / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (v + mpmath.mpf("0.044715") * v**3)))

        truth = [exact(mpmath.mpf(v)) for v in x.double().flatten().tolist()]
        errors = [abs(mpmath.mpf(v) - t) for v, t in zip(y.double().flatten().tolist(), truth, strict=True)]
        # Of a value of one place, more than which two roundings and an exponential's two units may not cost.
        eps = torch.finfo(dtype).eps
        over = max(float(e / (eps * max(abs(t), mpmath.mpf(1) / 4))) for e, t in zip(errors, truth, strict=True))
    assert over <= 4, over


def test_a_slope_of_0_is_a_relu():
    spec = BlockSpec(16, 64, 16, residual=True, activation="leaky_relu", negative_slope=0.0)
    weights, x = random_weights(spec), random_input(spec, 2, (9, 11))
    relu = inverted_residual(x, weights, residual=True, activation="relu")
    assert torch.equal(inverted_residual(x, weights, **spec.geometry), relu)


def test_a_slope_without_a_leaky_relu_changes_nothing():
    assert BlockSpec(8, 48, 8, negative_slope=0.7) == BlockSpec(8, 48, 8)
    assert BlockSpec(8, 48, 8, squeeze_activation="leaky_relu", negative_slope=0.7) == BlockSpec(
        8, 48, 8, squeeze_activation="leaky_relu"
    )
    leaky = BlockSpec(8, 48, 8, activation="leaky_relu", negative_slope=0.7)
    assert str(leaky) == "8 -> 48 -> 8, stride 1, leaky_relu(0.7)"
    assert leaky != BlockSpec(8, 48, 8, activation="leaky_relu")
