"""The op as torch sees it: opcheck, fake strides, gradients, autocast, compile, export."""

import io

import pytest
import torch
import torch.nn.functional as F
from support.inputs import layouts
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mnv2_fused import (
    BlockSpec,
    BlockWeights,
    FusedInvertedResidual,
    inverted_residual,
    inverted_residual_reference,
    pack,
)
from mnv2_fused.testing import agreement, perturb_batch_norm, random_weights

op = torch.ops.mnv2_fused.inverted_residual
cached_op = torch.ops.mnv2_fused.cached_inverted_residual

SPECS = [
    BlockSpec(4, 24, 4, residual=True),
    BlockSpec(4, 24, 7, stride=2),
    BlockSpec(5, 5, 3, expand=False),
    BlockSpec(1, 6, 1, residual=True),
    BlockSpec(1, 6, 5, stride=2),
    BlockSpec(3, 18, 1),
]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


SHAPES = [(2, 6, 5), (1, 6, 5), (2, 1, 1), (1, 1, 1), (3, 1, 4), (2, 4, 1), (0, 3, 3), (1, 2, 2)]


@by_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_strides_are_the_real_ones(spec, dtype):
    packed = pack(random_weights(spec), dtype)
    seen = 0
    for n, h, w in SHAPES:
        for name, x in layouts(n, spec.in_channels, h, w, dtype):
            real = op(x, *packed, spec.stride, spec.residual)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op(mode.from_tensor(x), *packed, spec.stride, spec.residual)
            described = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in (real, fake)]
            assert described[0] == described[1], f"{name} {list(x.shape)}"
            seen += 1
    assert seen == 12 * len(SHAPES)


def test_output_format_follows_the_input():
    spec = BlockSpec(4, 24, 7, stride=2)
    packed = pack(random_weights(spec))
    x = torch.randn(2, 4, 6, 6)
    assert op(x, *packed, 2, False).is_contiguous()
    y = op(x.to(memory_format=torch.channels_last), *packed, 2, False)
    assert y.is_contiguous(memory_format=torch.channels_last)


@by_spec
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 1, 1)], ids=str)
def test_opcheck(spec, shape):
    n, h, w = shape
    packed = pack(random_weights(spec))
    for name, x in layouts(n, spec.in_channels, h, w):
        if name in ("channels_last", "cropped nchw"):
            torch.library.opcheck(op.default, (x, *packed, spec.stride, spec.residual))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(SPECS[0], torch.bfloat16), (SPECS[1], torch.float64), (SPECS[2], torch.float32)],
    ids=str,
)
def test_opcheck_with_gradients(spec, dtype):
    packed = [t if t is None else t.requires_grad_() for t in pack(random_weights(spec), dtype)]
    x = torch.randn(2, spec.in_channels, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    tolerance = {"atol": 1e-1, "rtol": 1e-1} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(op.default, (x.requires_grad_(), *packed, spec.stride, spec.residual), **tolerance)
    torch.library.opcheck(op.default, (x.detach(), *packed, spec.stride, spec.residual, [1, 2, 16, 1]), **tolerance)


@pytest.mark.parametrize("expand_ratio", [1, 6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_of_the_cached_op(expand_ratio, memory_format):
    block = perturb_batch_norm(FusedInvertedResidual(4, 4, 1, expand_ratio)).eval().requires_grad_(False)
    x = torch.randn(2, 4, 6, 5).to(memory_format=memory_format)
    eps, sources = [], []
    for conv, norm in block._pairs:
        sources += [conv.weight, None, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        eps.append(norm.eps)
    for token in (block._token, -1):  # a cache that exists, and one that is gone
        torch.library.opcheck(cached_op.default, (x, sources, eps, 1, True, token))
        assert torch.equal(cached_op(x, sources, eps, 1, True, token), block(x))


def away_from_kinks(spec, size):
    """Input and weights in float64 whose activations all keep a distance from ReLU6's corners."""
    for seed in range(1000):
        weights = random_weights(spec, expand_bias=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        x = 2 * torch.randn(1, spec.in_channels, *size, generator=generator, dtype=torch.float64)
        before = x if weights.w_expand is None else F.conv2d(x, weights.w_expand, weights.b_expand)
        e = x if weights.w_expand is None else F.relu6(before)
        d = F.conv2d(e, weights.w_depthwise * 2, weights.b_depthwise, spec.stride, 1, groups=e.shape[1])
        weights = weights._replace(w_depthwise=weights.w_depthwise * 2)
        seen = [d] if weights.w_expand is None else [before, d]
        distance = min(min(t.abs().min(), (t - 6).abs().min()).item() for t in seen)
        active = all((t < 0).any() and (t > 0).any() for t in seen)
        if distance > 1e-3 and active:
            return x, weights
    raise AssertionError("no seed keeps away from the kinks")


GRAD_SPECS = [
    BlockSpec(2, 5, 2, residual=True),
    BlockSpec(2, 5, 3, stride=2),
    BlockSpec(3, 3, 2, expand=False),
    BlockSpec(3, 3, 3, expand=False, residual=True),
]


@pytest.mark.parametrize("spec", GRAD_SPECS, ids=str)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(spec, check):
    x, weights = away_from_kinks(spec, (3, 4))
    present = [t for t in weights if t is not None]

    def call(x, *tensors):
        tensors = tensors if spec.expand else (None, None, *tensors)
        return inverted_residual(x, BlockWeights(*tensors), stride=spec.stride, residual=spec.residual)

    assert check(call, [t.requires_grad_() for t in (x, *present)], eps=1e-6, fast_mode=True)


@by_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_lower_precision(spec, dtype):
    weights = random_weights(spec)
    if dtype != torch.float32:
        # Well between 0 and 6: near those, half precision may round to the side where ReLU6 has another derivative,
        # in eager or in the kernel. gradcheck and float32 have values beyond them.
        weights = weights._replace(
            b_expand=weights.b_expand if weights.b_expand is None else torch.full_like(weights.b_expand, 3),
            b_depthwise=torch.full_like(weights.b_depthwise, 3),
            w_expand=weights.w_expand if weights.w_expand is None else 0.1 * weights.w_expand,
            w_depthwise=0.1 * weights.w_depthwise,
        )
    x = torch.randn(2, spec.in_channels, 6, 5, dtype=torch.float64)
    geometry = {"stride": spec.stride, "residual": spec.residual}

    def gradients(function, dtype):
        present = [t.to(dtype).requires_grad_() for t in (x, *weights) if t is not None]
        tensors = present[1:] if spec.expand else [None, None, *present[1:]]
        y = function(present[0], BlockWeights(*tensors), **geometry)
        return torch.autograd.grad(y, present, torch.ones_like(y))

    wide = gradients(inverted_residual_reference, torch.float64)
    eager = gradients(inverted_residual_reference, dtype)
    fused = gradients(inverted_residual, dtype)
    for f, e, r in zip(fused, eager, wide, strict=True):
        assert f.dtype == dtype
        found = agreement(f, e, r)
        assert found.ok, found


def test_gradients_skip_what_does_not_ask():
    spec = BlockSpec(4, 24, 4, residual=True)
    weights = random_weights(spec, dtype=torch.float32)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    inverted_residual(x, weights, residual=True).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    inverted_residual_reference(x, weights, residual=True).sum().backward()
    torch.testing.assert_close(expected, x.grad)
    assert not inverted_residual(x.detach(), weights).requires_grad


AUTOCAST = [torch.bfloat16, torch.float16]


@by_spec
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(spec, dtype, x_dtype):
    weights = random_weights(spec, dtype=torch.float32)
    x = torch.randn(2, spec.in_channels, 6, 5).to(x_dtype)
    geometry = {"stride": spec.stride, "residual": spec.residual}
    with torch.autocast("cpu", dtype=dtype):
        fused = inverted_residual(x, weights, **geometry)
        eager = inverted_residual_reference(x, weights, **geometry)
    # A residual of float32 and half precision makes eager's result float32.
    assert fused.dtype == eager.dtype
    wide = inverted_residual_reference(x.double(), BlockWeights(*random_weights(spec)), **geometry)
    found = agreement(fused.to(dtype), eager.to(dtype), wide)
    assert found.ok, found


def test_autocast_backward():
    spec = BlockSpec(4, 24, 7)
    wide = random_weights(spec)
    x = torch.randn(2, 4, 6, 5)

    def gradients(function, dtype, autocast):
        present = [t.to(dtype).requires_grad_() for t in (x, *wide[:6])]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = function(present[0], BlockWeights(*present[1:]))
        return torch.autograd.grad(y, present, torch.ones_like(y))

    truth = gradients(inverted_residual_reference, torch.float64, False)
    eager = gradients(inverted_residual_reference, torch.float32, True)
    fused = gradients(inverted_residual, torch.float32, True)
    for f, e, r in zip(fused, eager, truth, strict=True):
        assert f.dtype == e.dtype
        # Gradients of half-precision products: the rule with bfloat16's rounding.
        found = agreement(f.bfloat16(), e.bfloat16(), r)
        assert found.ok, found


def test_autocast_leaves_float64_alone():
    spec = BlockSpec(4, 24, 4)
    x, weights = torch.randn(1, 4, 5, 5, dtype=torch.float64), random_weights(spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = inverted_residual(x, weights)
    assert torch.equal(y, inverted_residual(x, weights))


def make_block(inp=4, oup=4, stride=1, expand_ratio=6):
    return perturb_batch_norm(FusedInvertedResidual(inp, oup, stride, expand_ratio)).eval()


def eager(block, x):
    return block._forward_modules(x)


compiles = pytest.mark.usefixtures("fresh_graphs")


@compiles
@pytest.mark.parametrize(("grad", "expand_ratio"), [(False, 1), (True, 6)])
def test_compile_with_inductor(grad, expand_ratio):
    block = make_block(expand_ratio=expand_ratio)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), eager(block, x))
        if grad:
            check_gradients(compiled, block, x)


def check_gradients(compiled, block, x):
    leaves = [x.clone().requires_grad_(), *block.parameters()]
    found = torch.autograd.grad(compiled(leaves[0]).square().sum(), leaves)
    expected = torch.autograd.grad(eager(block, leaves[0]).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@compiles
@pytest.mark.parametrize(("oup", "stride"), [(4, 1), (7, 2)])
def test_compile_traces_without_a_break(oup, stride):
    block = make_block(4, oup, stride)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(compiled(x), eager(block, x))
    check_gradients(compiled, block, x)
    block.requires_grad_(False)
    x.requires_grad_()
    expected = torch.autograd.grad(eager(block, x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), expected)


@compiles
def test_compile_the_functional_form():
    spec = BlockSpec(4, 24, 4, residual=True)
    weights = random_weights(spec, dtype=torch.float32)
    compiled = torch.compile(inverted_residual, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    for given in (weights, pack(weights)):
        y = compiled(x, given, residual=True)
        expected = inverted_residual_reference(x, weights, residual=True)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), rtol=1e-4, atol=1e-4
        )


@compiles
@pytest.mark.parametrize(("backend", "grad"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_code_notices_changed_weights(grad, backend):
    block = make_block()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x = torch.randn(2, 4, 6, 5)
    changes = [
        lambda: block.conv[0][0].weight.mul_(1.5),
        lambda: block.conv[1][1].running_var.mul_(2),
        lambda: block.load_state_dict(perturb_batch_norm(make_block(), seed=3).state_dict()),
        lambda: setattr(block.conv[2], "weight", nn.Parameter(torch.randn(4, 24, 1, 1))),
        lambda: setattr(block.conv[3], "eps", 0.5),
    ]
    with torch.set_grad_enabled(grad):
        last = compiled(x)
        for change in changes:
            with torch.no_grad():
                change()
            y = compiled(x)
            torch.testing.assert_close(y, eager(block, x))
            assert not torch.allclose(y, last)
            last = y


@compiles
@pytest.mark.parametrize("grad", [False, True])
def test_dynamic_shapes_compile_few_times(grad):
    block = make_block(4, 7, 2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for n, h, w in [(2, 6, 5), (3, 9, 12), (5, 31, 7), (4, 8, 8), (7, 20, 33)]:
            x = torch.randn(n, 4, h, w)
            torch.testing.assert_close(compiled(x), eager(block, x))
    assert counter.frame_count <= 2


@compiles
def test_marked_dynamic_batch_compiles_once():
    block = make_block()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (2, 3, 8, 5):
            x = torch.randn(n, 4, 6, 5).to(memory_format=torch.channels_last)
            torch._dynamo.mark_dynamic(x, 0)
            y = compiled(x)
            torch.testing.assert_close(y, eager(block, x))
            assert y.is_contiguous(memory_format=torch.channels_last)
    assert counter.frame_count == 1


@compiles
def test_compiled_autocast():
    block = make_block(4, 7, 2)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, block(x))


@compiles
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("expand_ratio", [1, 6])
def test_export_round_trip(strict, expand_ratio):
    model = nn.Sequential(make_block(expand_ratio=expand_ratio), make_block(4, 7, 2)).eval()
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    assert "mnv2_fused.inverted_residual" in str(program.graph)
    assert set(program.state_dict) >= {k for k in model.state_dict() if "num_batches" not in k}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for n in (1, 2, 9):
        x = torch.randn(n, 4, 6, 5).to(memory_format=torch.channels_last)
        torch.testing.assert_close(loaded.module()(x), eager(model[1], eager(model[0], x)))
