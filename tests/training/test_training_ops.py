"""A block with live norms, by the training kernels: results, gradients and statistics against float64 autograd."""

import copy
import dataclasses
import statistics
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.devices import by_isa
from torch import nn

from mnv2_fused import BlockSpec, backends, fuse
from mnv2_fused.activations import function_of
from mnv2_fused.testing import instruction_set, threads
from mnv2_fused.training_ops import DIFFERENTIATED, Norm, Weights, normed, objection, projected, projection

pytestmark = [
    pytest.mark.skipif(backends._C is None, reason="needs the compiled library"),
    pytest.mark.usefixtures("poison"),
]


class Block:
    """Weights of a block drawn at random, in float64, and what float64 autograd says of them."""

    def __init__(self, spec, shape, *, live=(True, True), affine=True, biases=False, seed=0, offset=0.0, spread=1.0):
        g = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=g, dtype=torch.float64)

        e, c, o, k = spec.hidden_channels, spec.in_channels, spec.out_channels, spec.kernel
        self.spec, self.live = spec, live
        self.x = offset + spread * draw(*shape)
        self.weights = Weights(
            draw(e, c, 1, 1) / c**0.5 if spec.expand else None,
            draw(e) if spec.expand and biases else None,
            draw(e, 1, k, k) / k,
            draw(e) if biases else None,
            draw(o, e, 1, 1) / e**0.5,
            draw(o) if biases else None,
        )
        if spec.squeeze_channels:
            s = spec.squeeze_channels
            squeeze = draw(s, e, 1, 1) / e**0.5, draw(s), draw(e, s, 1, 1) / s**0.5, draw(e)
            self.weights = Weights(*self.weights[:6], *(squeeze if biases else (squeeze[0], None, squeeze[2], None)))
        # Between 0 and 6, mostly, so that gates are open, shut and saturated.
        self.norms = []
        for i in range(2):
            affines = (1.5 + draw(e).abs(), 1 + draw(e)) if affine else (None, None)
            fixed = () if live[i] else (draw(e), 0.5 + draw(e).abs())
            self.norms.append(Norm(*affines, 1e-5, *fixed))
        self.g = draw(shape[0], o, *spec.out_size(*shape[2:]))

    def tensors(self, dtype):
        """x and every tensor that gets a gradient, as new leaves."""
        found = [self.x, *self.weights, *(t for norm in self.norms for t in norm[:2])]
        leaves = [None if t is None else t.detach().clone().to(dtype).requires_grad_() for t in found]
        leaves[0] = leaves[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        return leaves

    def _norms(self, leaves):
        dtype = leaves[0].dtype
        return [
            Norm(*leaves[11 + 2 * i : 13 + 2 * i], norm.eps, *(None if t is None else t.to(dtype) for t in norm[3:]))
            for i, norm in enumerate(self.norms)
        ]

    def fused(self, leaves):
        first, second = self._norms(leaves)
        p, statistics = projected(
            leaves[0], Weights(*leaves[1:11]), (first if self.spec.expand else None, second), self.spec
        )
        return p, statistics

    def eager(self, leaves):
        """torch's own operators, and the statistics that its norms saw."""
        x, weights, spec, seen = leaves[0], Weights(*leaves[1:11]), self.spec, []

        def behind(y, norm, act):
            seen.append((y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)) if norm.live else None)
            y = F.batch_norm(y, norm.mean, norm.variance, norm.weight, norm.bias, training=norm.live, eps=norm.eps)
            return function_of(act, spec.negative_slope)(y)

        first, second = self._norms(leaves)
        if weights.expand is not None:
            x = behind(F.conv2d(x, weights.expand, weights.expand_bias), first, spec.expanded_by)
        else:
            seen.append(None)
        x = F.pad(x, spec.padding_of(*x.shape[2:]))
        groups = spec.hidden_channels
        x = F.conv2d(x, weights.depthwise, weights.depthwise_bias, spec.stride, 0, spec.dilation, groups)
        x = behind(x, second, spec.activation)
        if weights.reduce is not None:
            s = F.conv2d(x.mean((2, 3), keepdim=True), weights.reduce, weights.reduce_bias)
            s = function_of(spec.squeeze_activation)(s)
            x = x * function_of(spec.gate)(F.conv2d(s, weights.excite, weights.excite_bias))
        return F.conv2d(x, weights.project, weights.project_bias), seen

    def results(self, run, dtype=torch.float64):
        """What ``run`` gives: p, statistics, and the gradients of all leaves."""
        leaves = self.tensors(dtype)
        p, statistics = run(leaves)
        wanted = [t for t in leaves if t is not None]
        if not self.spec.expand:
            wanted = [t for t in wanted if t is not leaves[11] and t is not leaves[12]]
        grads = torch.autograd.grad(p, wanted, self.g.to(dtype))
        return [p.detach(), *(t.detach() for pair in statistics if pair for t in pair[:2]), *grads]

    def check(self, allowed=1e-10):
        """In float64: errors over the largest value. A product too few or too many is far beyond."""
        ours, exact = self.results(self.fused), self.results(self.eager)
        for i, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
            assert mine.shape == truth.shape
            size = truth.abs().max()
            if not mine.any() and size < 1e-6:  # a bias in front of a live norm: rounding is all that torch finds
                continue
            # Where norms leave nothing of a gradient, both find rounding.
            assert (mine - truth).abs().max() <= allowed * max(size, 1e-2), (i, self.spec)

    def errors(self):
        """Of float32, over twice torch's own and 16 units in the last place of the largest value (of means near 0, of a
        value of the size of a deviation): for each result."""
        ours, theirs = (self.results(run, torch.float32) for run in (self.fused, self.eager))
        found = []
        for mine, other, truth in zip(ours, theirs, self.results(self.eager), strict=True):
            error, eager = ((t.double() - truth).abs().max().item() for t in (mine, other))
            unit = torch.finfo(torch.float32).eps * max(truth.abs().max().item(), 0.1)
            found.append(error / (2 * eager + 16 * unit))
        return found


SPECS = {
    "plain": (BlockSpec(8, 48, 12), (2, 8, 9, 7)),
    "stride 2": (BlockSpec(8, 48, 12, stride=2), (2, 8, 9, 8)),
    "strides apart": (BlockSpec(8, 48, 12, stride=(1, 2)), (2, 8, 9, 8)),
    "strides apart, rows": (BlockSpec(8, 48, 12, stride=(2, 1), kernel=5), (2, 8, 9, 8)),
    "odd channels": (BlockSpec(5, 19, 7), (3, 5, 6, 11)),
    "5x5": (BlockSpec(8, 40, 12, kernel=5, stride=2), (2, 8, 13, 13)),
    "7x7": (BlockSpec(8, 24, 9, kernel=7), (2, 8, 13, 5)),
    "dilated": (BlockSpec(8, 24, 9, dilation=3), (2, 8, 13, 9)),
    "far": (BlockSpec(4, 16, 4, dilation=12), (2, 4, 7, 9)),
    "same": (BlockSpec(8, 24, 9, stride=2, padding="same"), (2, 8, 12, 10)),
    "uneven": (BlockSpec(8, 24, 9, stride=2, padding=(0, 2, 1, 0)), (2, 8, 12, 10)),
    "unreached rows": (BlockSpec(8, 24, 9, stride=2, padding=(0, 0, 0, 0)), (2, 8, 10, 12)),
    "no expansion": (BlockSpec(24, 24, 9, expand=False), (3, 24, 9, 9)),
    "no expansion, odd": (BlockSpec(19, 19, 40, expand=False, stride=2, activation="relu"), (3, 19, 9, 9)),
    "one pixel": (BlockSpec(8, 48, 12), (9, 8, 1, 1)),
    "bands": (BlockSpec(3, 96, 5), (2, 3, 70, 90)),
    "bands, stride 2": (BlockSpec(3, 96, 5, stride=2, kernel=5), (2, 3, 70, 90)),
    "bands, silu": (BlockSpec(3, 96, 5, activation="silu"), (2, 3, 70, 90)),
    "many images": (BlockSpec(4, 16, 4), (19, 4, 5, 5)),
    "wide": (BlockSpec(64, 160, 72, activation="relu"), (2, 64, 5, 5)),
    **{act: (BlockSpec(6, 40, 8, activation=act), (3, 6, 8, 8)) for act in DIFFERENTIATED},
    "two activations": (BlockSpec(6, 40, 8, activation="relu", expand_activation="silu"), (3, 6, 8, 8)),
    "two activations, other": (BlockSpec(6, 40, 8, activation="hardswish", expand_activation="relu6"), (3, 6, 8, 8)),
    "squeeze": (BlockSpec(8, 48, 12, squeeze_channels=6), (3, 8, 9, 7)),
    "squeeze, stride 2": (
        BlockSpec(8, 40, 9, kernel=5, stride=2, squeeze_channels=5, activation="silu"),
        (2, 8, 9, 13),
    ),
    "squeeze, hardswish": (
        BlockSpec(8, 40, 9, squeeze_channels=5, activation="hardswish", squeeze_activation="relu", gate="hardsigmoid"),
        (9, 8, 6, 5),
    ),
    "squeeze, no expansion": (
        BlockSpec(19, 19, 24, expand=False, squeeze_channels=4, activation="relu"),
        (3, 19, 8, 9),
    ),
    "squeeze, bands": (BlockSpec(3, 96, 5, squeeze_channels=8, activation="silu"), (2, 3, 70, 90)),
    "slope": (BlockSpec(6, 40, 8, activation="leaky_relu", negative_slope=-0.3), (3, 6, 8, 8)),
}


@by_isa
@pytest.mark.parametrize("name", SPECS)
def test_everything_is_autograds(name, isa):
    with instruction_set(isa):
        Block(*SPECS[name]).check()


@by_isa
@pytest.mark.parametrize("name", ["plain", "stride 2", "no expansion", "bands", "bands, silu", "wide"])
def test_backward_by_single_passes(name, isa, monkeypatch):
    """As of large tensors, whose groups of channels would be far away when they are read again."""
    monkeypatch.setattr(projection, "_NEAR", 0)
    with instruction_set(isa):
        Block(*SPECS[name]).check()


@by_isa
@pytest.mark.parametrize("name", SPECS)
def test_float32_is_as_exact_as_torch(name, isa):
    """In the median of some blocks: near its bound a gate may open here and stay shut there."""
    with instruction_set(isa):
        errors = [Block(*SPECS[name], seed=seed).errors() for seed in range(7)]
    for i, of_result in enumerate(zip(*errors, strict=True)):
        assert statistics.median(of_result) <= 1, (i, of_result)


@pytest.mark.parametrize("live", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_modes(live, biases, affine):
    spec, shape = SPECS["stride 2"]
    Block(spec, shape, live=live, biases=biases, affine=affine).check()
    Block(BlockSpec(8, 8, 5, expand=False), (2, 8, 6, 7), live=live, biases=biases, affine=affine).check()


def test_biases_in_front_of_live_norms_get_no_gradient():
    block = Block(*SPECS["plain"], biases=True)
    block.check()
    leaves = block.tensors(torch.float64)
    p, _ = block.fused(leaves)
    grads = torch.autograd.grad(p, [leaves[2], leaves[4]], block.g)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["bands", "many images", "no expansion"])
def test_the_same_bits_for_any_number_of_threads(name, count):
    block = Block(*SPECS[name])
    with threads(3):
        expected = block.results(block.fused, torch.float32)
    with threads(count):
        found = block.results(block.fused, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("offset", [10.0, 1000.0, -1000.0])
def test_far_from_zero(offset):
    """Means of hundreds of standard deviations, where sums of squares in float32 have no digits left."""
    block = Block(*SPECS["plain"], offset=offset)
    ours, exact = block.results(block.fused, torch.float32), block.results(block.eager)
    rounded = (block.x.float().double() - block.x).abs().max()  # of x itself, in units of its deviation
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine.double() - truth).abs().max() <= (50 * rounded + 1e-4) * truth.abs().max().clamp(min=1e-3)


def test_hardswish_on_its_bounds():
    block = Block(BlockSpec(6, 40, 8, activation="hardswish"), (3, 6, 8, 8))
    for norm in block.norms:
        norm.weight[:2] = 0.0
        norm.bias[:2] = torch.tensor([3.0, -3.0])
    block.check()


def test_constant_channels_and_ranks():
    block = Block(*SPECS["plain"])
    block.x[:, 1] = 3.0
    block.x[:, 2] = 2 * block.x[:, 3]
    block.check()
    block.x[:] = block.x[:, :1]  # rank 1
    block.check(1e-8)
    block.x[:] = 0.0
    found = block.results(block.fused)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_shows(value):
    block = Block(*SPECS["plain"])
    block.x[0, 0, 0, 0] = value
    ours, theirs = block.results(block.fused), block.results(block.eager)
    assert ours[0].isnan().all() and theirs[0].isnan().all()
    block = Block(*SPECS["plain"])
    block.g[0, 0, 0, 0] = value
    ours, theirs = block.results(block.fused), block.results(block.eager)
    assert ours[0].isfinite().all()
    for mine, other in zip(ours[5:], theirs[5:], strict=True):
        assert (~mine.isfinite()).any() == (~other.isfinite()).any()


def test_derivatives_of_derivatives():
    block = Block(BlockSpec(4, 12, 5, activation="silu"), (2, 4, 4, 5))
    found = []
    for run in (block.fused, block.eager):
        leaves = block.tensors(torch.float64)
        wanted = [t for t in leaves if t is not None]
        p, _ = run(leaves)
        grads = torch.autograd.grad(p, wanted, block.g, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_derivatives_of_derivatives_without_a_norm():
    """Of a block whose expansion is a convolution alone: FusedInvertedResidual's modules, fused and eager."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    conv = models.mobilenetv2.InvertedResidual(4, 5, 1, 3).double().train()
    conv.conv[0][1] = nn.Identity()
    fused = fuse(nn.Sequential(conv)).train()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    found = []
    for model in (fused, nn.Sequential(conv)):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), leaf)[0])
    assert fused[0].training_objection(x) is None
    torch.testing.assert_close(*found)


def test_statistics_of_a_frozen_norm_that_change_before_backward():
    """Backward is of those that forward had."""
    for live in [(False, True), (True, False)]:
        block = Block(*SPECS["plain"], live=live)
        expected = block.results(block.fused)

        def run(leaves, block=block):
            p, found = block.fused(leaves)
            for norm in block.norms:
                if norm.mean is not None:
                    norm.mean.add_(1)
            return p, found

        assert all(torch.equal(a, b) for a, b in zip(block.results(run), expected, strict=True))


def test_autocast_of_other_threads_stays_as_it_is():
    block = Block(BlockSpec(4, 16, 4), (2, 4, 5, 5))
    leaves, seen, done = block.tensors(torch.float32), [], threading.Event()

    def plain():
        while not done.is_set():
            block.fused(leaves)
            seen.append(torch.is_autocast_enabled("cpu"))

    other = threading.Thread(target=plain)
    other.start()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [(block.fused(leaves), torch.is_autocast_enabled("cpu"))[1] for _ in range(300)]
    done.set()
    other.join()
    assert all(inside) and not any(seen)


def test_gradcheck():
    block = Block(BlockSpec(3, 8, 4, activation="silu", stride=2), (2, 3, 4, 5))
    leaves = block.tensors(torch.float64)
    wanted = [t for t in leaves if t is not None]

    def run(*given):
        left = iter(given)
        return block.fused([None if t is None else next(left) for t in leaves])[0]

    assert torch.autograd.gradcheck(run, wanted)


def test_only_what_is_asked_for():
    block = Block(*SPECS["plain"])
    expected = block.results(block.fused)
    leaves = block.tensors(torch.float64)
    leaves[0] = leaves[0].detach()
    p, statistics = block.fused(leaves)
    assert not any(t.requires_grad for pair in statistics for t in pair[:2])
    wanted = [t for t in leaves[1:] if t is not None]
    for mine, other in zip(torch.autograd.grad(p, wanted, block.g), expected[6:], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm(dtype, affine, added):
    g = torch.Generator().manual_seed(0)
    x, other, grad = (torch.randn(5, 37, 6, 7, generator=g, dtype=torch.float64) for _ in range(3))
    weight, bias = (torch.randn(37, generator=g, dtype=torch.float64) for _ in range(2))

    def run(dtype, fused):
        leaves = [t.to(dtype).requires_grad_() for t in (x, other, weight, bias)]
        scale, shift = leaves[2:] if affine else (None, None)
        if fused:
            y, (*statistics, _) = normed(leaves[0], Norm(scale, shift, 1e-3), leaves[1] if added else None)
        else:
            y = F.batch_norm(leaves[0], None, None, scale, shift, training=True, eps=1e-3)
            y = y + leaves[1] if added else y
            statistics = leaves[0].mean((0, 2, 3)), leaves[0].var((0, 2, 3), unbiased=False)
        wanted = [leaves[0], *(leaves[1:2] if added else []), *(leaves[2:] if affine else [])]
        return [y, *statistics, *torch.autograd.grad(y, wanted, grad.to(dtype))]

    for ours, theirs, exact in zip(run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True):
        error, eager = ((t.double() - exact).abs().max() for t in (ours, theirs))
        assert error <= 2 * eager + 20 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["stride 2", "strides apart, rows", "no expansion", "dilated"])
def test_multiply_adds_are_counted(name, monkeypatch):
    """Each pass by itself: of expansion, filter and projection as often as the pass computes them."""
    from torch.utils.flop_counter import FlopCounterMode

    spec, shape = SPECS[name]
    height, width = spec.out_size(*shape[2:])
    pixels, after = shape[0] * shape[2] * shape[3], shape[0] * height * width * spec.hidden_channels
    e = pixels * spec.in_channels * spec.hidden_channels if spec.expand else 0
    d, p = after * spec.kernel**2, after * spec.out_channels

    def counted(live=(True, True)):
        with FlopCounterMode(display=False) as counter:
            block = Block(spec, shape, live=live)
            block.results(block.fused)
        return {str(op).split(".")[-1]: count // 2 for op, count in counter.flop_counts["Global"].items()}

    found = counted()
    assert found["training_forward"] == e + d + p and found["training_backward"] == 3 * e + 3 * d + 2 * p
    assert found.get("training_centre", 0) == (pixels * spec.in_channels**2 if spec.expand else 0)
    assert counted(live=(True, False))["inverted_residual"] == e + d + p
    spec = dataclasses.replace(spec, activation="hardswish")  # act(e) tells no derivative: e once more
    assert counted()["training_backward"] == 4 * e + 3 * d + 2 * p
    monkeypatch.setattr(projection, "_NEAR", 0)
    found = counted()
    assert found["training_backward_project"] == e + d + 2 * p
    assert found["training_backward_expand"] == 3 * e + 3 * d + p


@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
def test_multiply_adds_with_a_gate_are_counted(activation):
    from torch.utils.flop_counter import FlopCounterMode

    spec = BlockSpec(8, 48, 12, squeeze_channels=6, activation=activation)
    block = Block(spec, (3, 8, 9, 7))
    with FlopCounterMode(display=False) as counter:
        block.results(block.fused)
    found = {str(op).split(".")[-1]: count // 2 for op, count in counter.flop_counts["Global"].items()}
    e, d, p = (3 * 63 * 48 * terms for terms in (8, 9, 12))
    assert found["training_forward"] == e + d and found["training_project"] == e + d + p
    assert found["training_backward_project"] == e + d + 2 * p


def test_objections(monkeypatch):
    assert DIFFERENTIATED == ("relu6", "relu", "identity", "hardswish", "silu", "leaky_relu")
    assert objection(BlockSpec(8, 16, 8)) is None
    assert objection(BlockSpec(8, 16, 8, squeeze_channels=4)) is None
    assert "derivative of gelu" in objection(BlockSpec(8, 16, 8, activation="gelu"))
    assert objection(BlockSpec(8, 8, 8, expand=False)) is None
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_load_error", "no such file")
    assert "does not load: no such file" in objection(BlockSpec(8, 16, 8))


def test_wrong_arguments_say_what_is_wrong():
    spec, shape = SPECS["plain"]
    block = Block(spec, shape)
    ops = torch.ops.mnv2_fused
    with pytest.raises(RuntimeError, match="must be float32 or float64"):
        ops.training_moments(block.x.half())
    with pytest.raises(RuntimeError, match="in channels_last order"):
        ops.training_moments(block.x.contiguous())
    x = block.x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"values must be contiguous \[3, 16\]"):
        ops.training_normalise(x, x.new_zeros(2, 16), None)
    with pytest.raises(RuntimeError, match="block must have 26 values, got 2"):
        ops.training_statistics(x, None, None, x.new_zeros(1, 9, 16), [1, 2])
    with pytest.raises(RuntimeError, match="x must have elements"):
        ops.training_moments(x[:0])


@st.composite
def fuzzed(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    expand, kernel, stride = one_of(True, True, False), one_of(3, 5, 7), one_of(1, 1, 2, (1, 2), (2, 1))
    dilation = one_of(1, 1, draw(st.integers(2, 6))) if stride == 1 else 1
    most = dilation * (kernel - 1)
    padding = one_of(None, None, "same", tuple(draw(st.integers(0, most)) for _ in range(4)))
    c_in = draw(st.integers(1, 40))
    squeeze = one_of({}, {"squeeze_channels": draw(st.integers(1, 12)), "gate": one_of("sigmoid", "hardsigmoid")})
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 90)) if expand else c_in,
        draw(st.integers(1, 40)),
        stride=stride,
        expand=expand,
        kernel=kernel,
        dilation=dilation,
        padding=padding,
        activation=one_of(*DIFFERENTIATED),
        expand_activation=one_of(None, *DIFFERENTIATED) if expand else None,
        **squeeze,
    )
    around = padding if isinstance(padding, tuple) else (most, 0, most, 0)
    width, height = (max(1, most + 1 - a - b) for a, b in (around[:2], around[2:]))
    shape = draw(st.integers(3, 10)), c_in, height + draw(st.integers(0, 25)), width + draw(st.integers(0, 25))
    modes = {
        "near": one_of(0, 2**23),
        "live": one_of((True, True), (True, True), (True, False), (False, True)),
        "biases": draw(st.booleans()),
    }
    return spec, shape, modes | {"affine": draw(st.booleans()), "seed": draw(st.integers(0, 2**31))}


@pytest.mark.slow
@by_isa
@given(case=fuzzed())
def test_any_block(isa, case):
    spec, shape, options = case
    with instruction_set(isa), mock.patch.object(projection, "_NEAR", options.pop("near")):
        Block(spec, shape, **options).check(1e-6)


def test_copies():
    """A block may be copied, and pickled by value, while it trains."""
    block = Block(*SPECS["plain"])
    leaves = block.tensors(torch.float32)
    p, _ = block.fused(leaves)
    other = copy.deepcopy([None if t is None else t.detach() for t in leaves])
    again, _ = block.fused(other)
    assert torch.equal(p, again)
