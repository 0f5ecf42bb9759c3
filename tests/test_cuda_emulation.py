"""The CUDA kernel's own source, run on the CPU by tests/cuda_emulation; and that emulation itself."""

import ctypes
import dataclasses
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.emulation import (
    CSRC,
    HERE,
    compiled,
    compiled_kernel,
    emulated_inverted_residual,
    emulated_sequence,
    loaded,
)
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from test_block import DETERMINISM_SPECS, PADDING_SPECS, random_input
from test_inputs import SIZES, VIEWS
from test_triton_variants import SPECS as GENERAL_SPECS
from test_triton_variants import every_pair, spec_of

from mnv2_fused import BlockSpec, cuda_plan, fold, inverted_residual_reference, pack
from mnv2_fused.plans.cuda import stem_size
from mnv2_fused.reference import TORCH_ACTIVATIONS
from mnv2_fused.sequence.weights import join
from mnv2_fused.spec import ACTIVATIONS
from mnv2_fused.testing import agreement, mobilenet_v2_blocks, random_weights, threads

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are small: more threads wait for each other longer than they compute."""
    with threads(1):
        yield


KINDS = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}


def address(array):
    assert array.flags["C_CONTIGUOUS"]
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    library = loaded(compiled(tmp_path_factory.mktemp("device") / "device.so", HERE / "device_check.cpp"))
    library.check.restype = ctypes.c_char_p
    return library


def bits_of(values, kind):
    """Registers of a float array: pairs of its last axis, the first in the low half, or single numbers."""
    t = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    if kind == "tf32":
        return t.numpy().view(np.uint32)
    return t.to(KINDS[kind]).view(torch.int16).numpy().view(np.uint32)


def operand(values, kind):
    """Rounded as the tensor core is given it."""
    if kind == "tf32":
        return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return torch.from_numpy(values).to(KINDS[kind]).float().numpy()


@pytest.mark.parametrize(("kind", "depth"), [("half", 16), ("bfloat16", 16), ("tf32", 8), ("half", 8), ("bfloat16", 8)])
def test_mma(device, kind, depth):
    """Against the fragments of the PTX manual, written once more: element i of a lane is at [row(i), col(i)]."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(s).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8)))
    group, member = np.divmod(np.arange(32), 4)
    group, member = group[:, None], member[:, None]
    if kind == "tf32":
        i = np.arange(4)
        a_lanes = a[group + 8 * (i % 2), member + 4 * (i // 2)]
        b_lanes = b[member + 4 * i[:2], group]
    else:
        i = np.arange(depth // 2)
        a_lanes = a[group + 8 * (i // 2 % 2), 2 * member + i % 2 + 8 * (i // 4)]
        i = np.arange(depth // 4)
        b_lanes = b[2 * member + i % 2 + 8 * (i // 2), group]
    i = np.arange(4)
    c_at = group + 8 * (i // 2), 2 * member + i % 2
    result = np.ascontiguousarray(c[c_at])
    index = list(KINDS).index(kind) + (3 if kind != "tf32" and depth == 8 else 0)
    a_bits, b_bits = bits_of(a_lanes, kind), bits_of(b_lanes, kind)
    device.mma(index, address(a_bits), address(b_bits), address(result))
    expected = c.astype(np.float64) + operand(a, kind).astype(np.float64) @ operand(b, kind)
    np.testing.assert_allclose(result, expected[c_at], rtol=0, atol=1e-5)
    assert np.abs(expected - c - a.astype(np.float64) @ b).max() > 1e-5  # operands are rounded


def many_floats():
    """Every half and bfloat16 number, and what lies between: ties, near ties, overflow, denormals, NaN."""
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = torch.cat([narrow.view(torch.float16).float(), narrow.view(torch.bfloat16).float()]).view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    steps = [0, 1, -1, 0x1000, 0x0FFF, 0x1001, 0x8000, 0x7FFF, 0x8001]
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    return torch.cat([*(numbers + step for step in steps), anything]).view(torch.float32)


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_conversions(device, kind):
    dtype, index = KINDS[kind], list(KINDS).index(kind)
    values = many_floats()
    for clamped in (False, True):
        rounded = torch.empty_like(values, dtype=dtype)
        device.pack(index, clamped, ctypes.c_int64(len(values) // 2), pointer(values), pointer(rounded))
        expected = (F.relu6(values) if clamped else values).to(dtype)
        assert torch.equal(rounded.isnan(), values.isnan())
        known = ~values.isnan() & ((values != 0) | ~torch.tensor(clamped))  # a clamp may lose the sign of 0
        assert torch.equal(rounded.view(torch.int16)[known], expected.view(torch.int16)[known])

    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    widened = torch.empty(2**16)
    device.unpack(index, ctypes.c_int64(2**15), pointer(every), pointer(widened))
    expected = every.view(dtype).float()
    assert torch.equal(widened.isnan(), expected.isnan())
    assert torch.equal(widened.view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()])


def test_float32_conversions(device):
    values = many_floats()
    count = ctypes.c_int64(len(values))
    result = torch.empty_like(values)
    device.relu6_of(count, pointer(values), pointer(result))
    assert torch.equal(result.nan_to_num(9), F.relu6(values).nan_to_num(9))

    device.round_to_tf32(count, pointer(values), pointer(result))
    assert not (result.view(torch.int32)[~values.isnan()] & 0x1FFF).any()
    assert torch.equal(result.isnan(), values.isnan())
    normal = values.isfinite() & (values.abs() >= 2.0**-126) & result.isfinite()
    step = 2.0 ** (torch.frexp(values[normal].double()).exponent - 11)
    error = (result[normal].double() - values[normal].double()).abs()
    assert (error <= step / 2).all()
    tie = error == step / 2
    assert tie.any() and (result[normal].abs() > values[normal].abs())[tie].all()


def test_exchanges(device):
    generator = np.random.default_rng(0)
    values = generator.standard_normal(32).astype(np.float32)
    lanes = generator.integers(0, 32, 32).astype(np.int32)
    picked, exchanged = np.zeros_like(values), np.zeros_like(values)
    for mask in (1, 2, 31):
        device.exchange_lanes(address(lanes), mask, address(values), address(picked), address(exchanged))
        assert (picked == values[lanes]).all()
        assert (exchanged == values[np.arange(32) ^ mask]).all()


def test_a_correct_kernel(device):
    assert device.check(b"correct", 1, ctypes.c_uint64(1)) is None
    device.output.restype = ctypes.POINTER(ctypes.c_float)
    thread = np.arange(64)
    assert (np.ctypeslib.as_array(device.output(), (64,)) == (thread ^ 33) + 1000 * thread).all()


def test_barrier_any(device):
    assert [device.wrong_any(ctypes.c_uint64(seed)) for seed in range(3)] == [0, 0, 0]


def test_threads_run_in_another_order_each_time(device):
    device.order_of_threads.restype = ctypes.c_float
    assert len({device.order_of_threads(ctypes.c_uint64(seed)) for seed in range(8)}) == 8


# What is wrong with each kernel of device_check.cpp, as the error says it.
WRONG = {
    "missing barrier": "which thread .* since the last barrier",
    "missing barrier within a warp": "which thread .* since the last barrier",
    "missing barrier before a store": "which thread .* since the last barrier",
    "two stores to one place": "writes shared byte .* wrote since the last barrier",
    "shared memory, after its end": "thread 37 .* reads 8 bytes of shared memory at 1024, outside its 1024",
    "shared memory, before its start": "thread 37 .* writes 4 bytes of shared memory at -4, outside its 1024",
    "shared memory, misaligned": "reads 16 bytes of shared memory at 8, misaligned",
    "global memory, after its end": "reads 4 bytes of global memory, outside what it may read",
    "global memory, before its start": "thread 0 .* reads 4 bytes of global memory, outside what it may read",
    "global memory, misaligned": "reads 8 bytes of global memory, misaligned, at 4 of 256",
    "copy, misaligned": "reads 16 bytes of global memory, misaligned, at 4 of 256",
    "copy to after the end": "writes 16 bytes of shared memory at 1024, outside its 1024",
    "read of what is written": "reads 4 bytes of global memory, outside what it may read",
    "store to the input": "writes 4 bytes of global memory, outside what it may write",
    "two stores to one output": "writes global byte .* which thread .* of thread block 0 wrote",
    "two blocks' stores to one output": r"\(1, 0, 0\), .* which thread .* of thread block 0 wrote",
    "warp operation of some lanes": "waits in from_lane at .*, which not all lanes of its warp call",
    "warp operation after a barrier of others": "waits in from_lane at .*, which not all lanes of its warp call",
    "warp operations of two kinds": "calls (from_lane|exchange), but thread .* waits in (from_lane|exchange)",
    "warp operations of two places": "calls from_lane, but thread .* waits in from_lane",
    "warp operation, once more by one lane": "thread 37 waits in exchange at .*, which not all lanes of its warp call",
    "a lane that there is not": "exchanges with lane 32",
    "barrier of some threads": "thread 37 has ended, but thread 0 waits in barrier",
    "barriers of two places": "thread 37 waits in barrier at .* but thread 0 waits in barrier at",
    "unfinished copy": r"ends without copies_finish\(\)",
    "read of an unfinished copy": "reads shared byte .* is still copying to",
    "copy finished by its thread only": "which thread .*(wrote|read) since the last barrier|is still copying to",
    "copy over what others read": "which thread .*(wrote|read) since the last barrier|is still copying to",
    "read before the last kernel's end": r"reads before previous_finishes\(\)",
    "copy before the last kernel's end": r"reads before previous_finishes\(\)",
    "store before the last kernel's end": r"writes before previous_finishes\(\)",
    "read of the last kernel's results as of constants": "reads as a constant what the kernel before may have written",
    "start of the next kernel before the last one's end": "lets the next kernel start beside the one before this",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused(device, name):
    for seed in range(3):
        error = device.check(name.encode(), 2 if name.startswith("two blocks") else 1, ctypes.c_uint64(seed))
        assert error is not None and re.search(WRONG[name], error.decode()), error
        assert re.match(r"thread block \(\d, 0, 0\), thread \d+ ", error.decode()), error


def test_every_wrong_kernel_is_tested():
    names = re.findall(r'^    \{"([^"]+)",', (HERE / "device_check.cpp").read_text(), re.MULTILINE)
    assert names == ["correct", *WRONG]


# How activations are stored and multiplied, as plan.h names it.
PRECISIONS = {
    "float16": ("kHalf", torch.float16),
    "bfloat16": ("kBFloat16", torch.bfloat16),
    "float32": ("kFloat32", torch.float32),
    "tf32": ("kTf32", torch.float32),
}
by_precision = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """A library for each precision."""
    build = tmp_path_factory.mktemp("kernels")
    names = [name for name, _ in PRECISIONS.values()]
    started = [compiled_kernel(build / f"{name}.so", name) for name in names]
    return dict(zip(PRECISIONS, map(loaded, started), strict=True))


def tf32(t):
    """The nearest numbers with 10 bits of mantissa, ties away from zero, as the kernel rounds operands."""
    bits = t.float().view(torch.int32)
    return torch.where(t.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), t.float())


class Stem(NamedTuple):
    """A network's, in front of a block without an expansion."""

    weight: torch.Tensor  # [E, C, 3, 3]
    bias: torch.Tensor  # [E]
    activation: str = "relu6"

    def __call__(self, x, precision=None):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if precision == "tf32":
            x, weight = tf32(x), tf32(weight)
        return TORCH_ACTIVATIONS[self.activation](F.conv2d(x, weight, bias, 2, 1))


def eager(x, weights, spec, precision, stem=None):
    """torch's own ops in this precision. TF32, which CPUs lack, is float32 after rounding a product's operands."""
    if stem is not None:
        x = stem(x, precision)
    if precision != "tf32":
        return inverted_residual_reference(x, weights, **spec.geometry)
    w = weights._make(None if t is None else t.float() for t in weights)
    act, out_act, squeeze_act, gate = (
        TORCH_ACTIVATIONS[name] for name in (spec.activation, spec.out_activation, spec.squeeze_activation, spec.gate)
    )
    e = act(F.conv2d(tf32(x), tf32(w.w_expand), w.b_expand)) if spec.expand else x
    e = F.pad(e, spec.padding_of(*x.shape[2:]))
    d = act(F.conv2d(e, w.w_depthwise, w.b_depthwise, spec.stride, 0, spec.dilation, spec.hidden_channels))
    if spec.squeeze_channels:
        squeezed = squeeze_act(F.conv2d(d.mean((2, 3), keepdim=True), w.w_squeeze, w.b_squeeze))
        d = d * gate(F.conv2d(squeezed, w.w_excite, w.b_excite))
    y = out_act(F.conv2d(tf32(d), tf32(w.w_project), w.b_project))
    return y + x if spec.residual else y


def planned(spec, x, precision, stem=None, **forced):
    """The planner's own choice, or one with some values forced and the rest small."""
    options = {"dtype": x.dtype, "tf32": precision == "tf32", "stem": stem and stem.activation}
    size = x.shape[2:] if stem is None else [stem_size(n) for n in x.shape[2:]]
    if not forced:
        return cuda_plan(spec, x.shape, **options)
    small = {"images": 1, "tile_rows": 4, "tile_cols": 4, "strip_rows": 2, "group": 16, "splits": 1} | forced
    out = [-(-out // spec.dilation) for out in spec.out_size(*size)]
    images = 1 if spec.squeeze_channels else x.shape[0]
    limits = {"images": images, "tile_rows": out[0], "tile_cols": out[1]}
    return cuda_plan(spec, x.shape, **options, forced=[min(v, limits.get(k, v)) for k, v in small.items()])


def emulated(kernels, x, weights, spec, precision, *, seed=0, stem=None, **forced):
    packed = pack(weights, x.dtype, "cuda")
    if stem is not None:
        w_expand, b_expand = fold.pack_stem(stem.weight, stem.bias, x.dtype)
        packed = packed._replace(w_expand=w_expand, b_expand=b_expand)
    plan = planned(spec, x, precision, stem, **forced)
    return emulated_inverted_residual(kernels[precision], x, packed, spec, plan, seed, stem and stem.activation)


def verdict(y, x, weights, spec, precision, stem=None):
    e = x.double() if stem is None else stem(x.double())
    reference = inverted_residual_reference(e, weights, **spec.geometry)
    return agreement(y, eager(x, weights, spec, precision, stem), reference)


def check(kernels, x, weights, spec, precision, stem=None, **options):
    """Holds the kernel to the rule; returns the result."""
    before = x.clone()
    y = emulated(kernels, x, weights, spec, precision, stem=stem, **options)
    found = verdict(y, x, weights, spec, precision, stem)
    assert found.ok, f"{spec} on {list(x.shape)}, {precision}, {options}: {found}"
    assert torch.equal(x, before), "x was written"
    return y


def input_of(spec, batch, size, precision, **options):
    return random_input(spec, batch, size, dtype=PRECISIONS[precision][1], **options)


SPECS = [
    BlockSpec(8, 48, 8, residual=True),
    BlockSpec(8, 50, 20, stride=2),
    BlockSpec(8, 8, 5, expand=False),
    BlockSpec(24, 40, 32),
]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def by_block(resolution):
    blocks = list(enumerate(mobilenet_v2_blocks(resolution)))
    ids = [f"{i}: {spec} at {size[0]}" for i, (spec, size) in blocks]
    return pytest.mark.parametrize(("i", "spec", "size"), [(i, *block) for i, block in blocks], ids=ids)


@by_precision
@by_block(224)
def test_mobilenet_v2_at_224(kernels, i, spec, size, precision):
    """As the planner has it for one image, and a part of what it has for many."""
    x, weights = input_of(spec, 1, size, precision), random_weights(spec)
    check(kernels, x, weights, spec, precision)
    many = cuda_plan(spec, (256, *x.shape[1:]), dtype=x.dtype, tf32=precision == "tf32")
    x = input_of(spec, min(many.images, 2), size, precision)
    names = "images", "tile_rows", "tile_cols", "strip_rows", "group", "splits"
    check(kernels, x, weights, spec, precision, **dict(zip(names, many.forced(), strict=True)))


@by_precision
@by_block(48)
def test_mobilenet_v2_at_48(kernels, i, spec, size, precision):
    """With splits, and either tiles that don't fit or several images a tile."""
    splits = min(1 + i % 3, -(-spec.hidden_channels // 32))
    images = 2 if size[0] // spec.stride < 4 else 1
    options = {"tile_rows": 3, "tile_cols": 5, "images": images, "group": 32, "splits": splits}
    check(kernels, input_of(spec, 2, size, precision), random_weights(spec), spec, precision, **options)


@st.composite
def cases(draw):
    precision = draw(st.sampled_from(list(PRECISIONS)))
    expand, residual = draw(st.booleans()), draw(st.booleans())
    c_in = draw(st.integers(1, 100) | st.integers(1, 12).map(lambda n: 8 * n))
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 100)) if expand else c_in,
        c_in if residual else draw(st.integers(1, 100) | st.integers(1, 40).map(lambda n: 8 * n)),
        1 if residual else draw(st.sampled_from([1, 2])),
        expand=expand,
        residual=residual,
    )
    shape = draw(st.integers(1, 4)), c_in, draw(st.integers(1, 12)), draw(st.integers(1, 12))
    group = 16 * draw(st.integers(1, 3))
    out = [(size - 1) // spec.stride + 1 for size in shape[2:]]
    whole = draw(st.booleans())  # tiles, of which there may be several images'
    forced = {
        "images": draw(st.integers(1, min(3, shape[0]))) if whole else 1,
        "tile_rows": out[0] if whole else draw(st.integers(1, min(8, out[0]))),
        "tile_cols": out[1] if whole else draw(st.integers(1, min(8, out[1]))),
        "strip_rows": 4 if precision != "float32" and spec.out_channels <= 160 and draw(st.booleans()) else 2,
        "group": min(group, -(-spec.hidden_channels // 16) * 16),
        "splits": draw(st.integers(1, min(-(-spec.hidden_channels // group), 4))),
    }
    return spec, shape, precision, draw(st.just({}) | st.just(forced)), draw(st.integers(0, 2**31))


@given(cases())
def test_any_shape_and_plan(kernels, case):
    spec, (batch, _, height, width), precision, forced, seed = case
    x = input_of(spec, batch, (height, width), precision, seed=seed)
    weights = random_weights(spec, seed=seed, expand_bias=seed % 20)
    try:
        planned(spec, x, precision, **forced)
    except ValueError:
        reject()  # more than a thread block's warps, or empty splits
    check(kernels, x, weights, spec, precision, seed=seed, **forced)


@contextmanager
def without_onednn():
    """Its bfloat16 convolution, dilated, makes more NaNs than there are, where the processor has products of it."""
    before, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)


def spreads(kernels, x, weights, spec, precision, stem=None, **forced):
    """Whether NaN and infinities are where eager has them."""
    y = emulated(kernels, x, weights, spec, precision, stem=stem, **forced)
    with without_onednn():
        expected = eager(x, weights, spec, precision, stem)
    return torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize(
    ("precision", "strip_rows", "out_channels"),
    [
        (precision, strip_rows, out_channels)
        for precision in PRECISIONS
        for out_channels in (32, 33, 64, 96, 160, 320, 350)
        for strip_rows in (2, 4)
        if strip_rows == 2 or (precision != "float32" and out_channels <= 160)  # else it has no registers for it
    ],
)
def test_every_variant(kernels, precision, strip_rows, out_channels):
    """Output channels that fill the registers of each variant, and some that take two of its thread blocks."""
    for stride, expand in ((1, True), (2, True), (1, False), (2, False)):
        spec = BlockSpec(32, 48 if expand else 32, out_channels, stride, expand=expand)
        x, weights = input_of(spec, 2, (5, 6), precision), random_weights(spec)
        forced = {"tile_rows": 4, "tile_cols": 3, "strip_rows": strip_rows, "splits": 2 - expand}
        check(kernels, x, weights, spec, precision, **forced)
        x[1, 5, 2, 3] = float("inf")
        assert spreads(kernels, x, weights, spec, precision, **forced), spec


@by_precision
@pytest.mark.parametrize("spec", PADDING_SPECS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5)])
def test_padding_is_of_the_expanded_tensor(kernels, spec, size, precision):
    weights = random_weights(spec, expand_bias=50)
    check(kernels, input_of(spec, 2, size, precision), weights, spec, precision)
    check(kernels, input_of(spec, 2, size, precision), weights, spec, precision, tile_rows=1, tile_cols=1)


@by_precision
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("channels", [16, 20])
def test_residual_adds_x_itself(kernels, channels, splits, precision):
    spec = BlockSpec(channels, 120, channels, residual=True)
    nothing = random_weights(spec)._replace(w_project=torch.zeros(channels, 120, 1, 1), b_project=torch.zeros(channels))
    x = input_of(spec, 2, (5, 6), precision) * 100
    assert torch.equal(emulated(kernels, x, nothing, spec, precision, splits=splits), x)


@by_precision
@pytest.mark.parametrize("spec", DETERMINISM_SPECS, ids=str)
def test_the_threads_order_does_not_change_a_bit(kernels, spec, precision):
    x, weights = input_of(spec, 2, (6, 5), precision), random_weights(spec)
    results = [emulated(kernels, x, weights, spec, precision, splits=2, seed=seed) for seed in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)


@by_precision
@by_spec
def test_tiles_do_not_change_a_bit(kernels, spec, precision):
    x, weights = input_of(spec, 3, (4, 5), precision), random_weights(spec)
    results = [
        emulated(kernels, x, weights, spec, precision, tile_rows=r, tile_cols=c, images=i, group=16, splits=1)
        for r, c, i in ((1, 1, 1), (2, 3, 1), (4, 5, 1), (4, 5, 3))
    ]
    assert all(torch.equal(y, results[0]) for y in results)


def in_dtype(x, dtype):
    """The same view of memory that holds another dtype."""
    x = x.resolve_neg()
    memory = torch.empty(0).set_(x.untyped_storage())
    return memory.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@by_precision
def test_shared_memory_is_what_the_plan_says(kernels, precision):
    spec = SPECS[0]
    x, packed = input_of(spec, 1, (6, 5), precision), pack(random_weights(spec), PRECISIONS[precision][1], "cuda")
    plan = planned(spec, x, precision, tile_rows=6, tile_cols=5)
    less = dataclasses.replace(plan, shared_bytes=plan.shared_bytes - 16)
    emulated_inverted_residual(kernels[precision], x, packed, spec, plan)
    with pytest.raises(RuntimeError, match=r"of shared memory at .*, outside its"):
        emulated_inverted_residual(kernels[precision], x, packed, spec, less)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(kernels, view):
    for spec in SPECS[:3]:
        for precision, (_, dtype) in PRECISIONS.items():
            x = in_dtype(view(), dtype)
            check(kernels, x, random_weights(spec), spec, precision)


@by_precision
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(kernels, size, precision):
    for spec in SPECS:
        check(kernels, input_of(spec, 3, size, precision), random_weights(spec), spec, precision)


@by_precision
@by_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
def test_non_finite_values_spread_as_in_eager(kernels, value, spec, precision):
    for where in ((0, 0, 0, 0), (0, 3, 4, 4), (1, 7, 6, 7)):
        x = input_of(spec, 2, (7, 8), precision)
        x[where] = value
        assert spreads(kernels, x, random_weights(spec), spec, precision, tile_rows=2, tile_cols=3)


@by_precision
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w_expand", "b_expand", "b_depthwise", "w_project", "b_project"])
def test_a_non_finite_weight_spreads_as_in_eager(kernels, name, value, precision):
    """Also at the border, where no product may make a NaN of padding times infinity."""
    for spec in SPECS[:2]:
        x, weights = input_of(spec, 1, (6, 6), precision), random_weights(spec, dtype=torch.float32)
        getattr(weights, name).view(-1)[5] = value
        assert spreads(kernels, x, weights, spec, precision, tile_rows=2, tile_cols=2)


def test_offsets_beyond_2_31_elements(kernels, monkeypatch):
    """Two images 2^31 elements apart; no page between them is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        memory = torch.empty(2**31 + 8 * 81, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this system does not lend 4 GiB of untouched memory")
    x = memory.as_strided((2, 8, 9, 9), (2**31, 1, 72, 8))
    x.copy_(random_input(SPECS[0], 2, (9, 9)))
    for spec in SPECS[:3]:
        check(kernels, x, random_weights(spec), spec, "float16")


# Beyond MobileNetV2's block.


def kinds_of(dtype):
    """What activations of this dtype are computed in."""
    return [kind for kind, (_, stored) in PRECISIONS.items() if stored == dtype]


@pytest.mark.parametrize(
    ("i", "case", "precision"),
    [(i, case, kind) for i, case in enumerate(every_pair()) for kind in kinds_of(case["dtype"])],
    ids=lambda v: v if isinstance(v, int | str) else "",
)
def test_every_pair_of_options(kernels, i, case, precision):
    """Two images of odd sizes; tiles that do not fit, groups and splits take turns."""
    spec = spec_of(**case)
    x = input_of(spec, 2, (5, 7 - i % 2), precision)
    forced = {"tile_rows": 2 + i % 4, "tile_cols": 1 + i % 5}
    forced |= {"group": min(16 + 16 * (i % 3), -(-spec.hidden_channels // 16) * 16)}
    forced |= {"splits": 1 + i // 3 % 2 if spec.hidden_channels > forced["group"] else 1}
    check(kernels, x, random_weights(spec, expand_bias=3), spec, precision, seed=i, **forced)


@by_precision
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
def test_general_blocks_as_planned(kernels, spec, precision):
    for size in ((1, 1), (2, 9), (6, 5), (13, 15)):
        if min(spec.out_size(*size)) < 1:
            continue
        check(kernels, input_of(spec, 2, size, precision), random_weights(spec), spec, precision)


@by_precision
def test_a_dilation_larger_than_the_image(kernels, precision):
    spec = BlockSpec(8, 20, 8, kernel=5, dilation=9, activation="relu", residual=True)
    for size in ((1, 1), (6, 11)):
        check(kernels, input_of(spec, 2, size, precision), random_weights(spec), spec, precision)
    spec = BlockSpec(8, 20, 8, dilation=3, padding=(3, 3, 5, 1))  # windows beside the image
    check(kernels, input_of(spec, 2, (1, 2), precision), random_weights(spec), spec, precision)


@by_precision
@pytest.mark.parametrize(("i", "activation"), list(enumerate(ACTIVATIONS)))
def test_padding_is_of_the_expanded_tensor_with_every_activation(kernels, i, activation, precision):
    kernel = 3 + 2 * (i % 2)
    padding = (1, kernel - 1, kernel - 2, 0)
    spec = BlockSpec(8, 40, 12, 1 + i // 2 % 2, kernel=kernel, activation=activation, padding=padding)
    x = input_of(spec, 2, (7, 8), precision)
    check(kernels, x, random_weights(spec, expand_bias=50), spec, precision, tile_rows=3, tile_cols=3)


@by_precision
@pytest.mark.parametrize("out_channels", [64, 160, 170])
@pytest.mark.parametrize("kernel", [3, 5])
def test_every_general_variant(kernels, precision, out_channels, kernel):
    """With every stride, with and without an expansion and a gate; infinite input, which leaves infinities in e."""
    for stride, expand, squeeze in ((1, True, 0), (2, True, 5), (1, False, 5), (2, False, 0)):
        spec = BlockSpec(
            *(32, 48 if expand else 32, out_channels, stride),
            expand=expand,
            kernel=kernel,
            activation="relu",
            squeeze_channels=squeeze,
        )
        x, weights = input_of(spec, 1, (5, 6), precision), random_weights(spec)
        forced = {"tile_rows": 4, "tile_cols": 3, "splits": 2 - expand}
        check(kernels, x, weights, spec, precision, **forced)
        x[0, 5, 2, 3] = float("inf")
        assert spreads(kernels, x, weights, spec, precision, **forced), spec


@by_precision
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_activation", ACTIVATIONS)
def test_residual_adds_x_behind_the_outputs_activation(kernels, out_activation, splits, precision):
    spec = BlockSpec(8, 40, 8, residual=True, out_activation=out_activation)
    weights = random_weights(spec)
    weights = weights._replace(w_project=weights.w_project * 0, b_project=weights.b_project * 4)
    check(kernels, input_of(spec, 2, (3, 4), precision), weights, spec, precision, splits=splits)


@by_precision
def test_each_image_has_its_own_gate(kernels, precision):
    spec = BlockSpec(8, 40, 8, activation="relu", squeeze_channels=6)
    x = input_of(spec, 3, (5, 6), precision) * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1)
    x, weights = x.to(PRECISIONS[precision][1]), random_weights(spec)
    y = check(kernels, x, weights, spec, precision, tile_rows=2, tile_cols=3)
    for image in range(3):
        alone = emulated(kernels, x[image : image + 1], weights, spec, precision, tile_rows=2, tile_cols=3)
        assert torch.equal(alone, y[image : image + 1])


@by_precision
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
def test_the_threads_order_does_not_change_a_bit_of_general_blocks(kernels, spec, precision):
    x, weights = input_of(spec, 2, (6, 5), precision), random_weights(spec)
    splits = 2 if spec.hidden_channels > 16 else 1
    results = [emulated(kernels, x, weights, spec, precision, splits=splits, seed=seed) for seed in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)


@by_precision
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
def test_non_finite_values_spread_in_general_blocks_as_in_eager(kernels, spec, precision):
    x = input_of(spec, 4, (5, 6), precision)
    for image, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        x[image, 0, 0, 0] = x[image, 7, 4, 5] = value
    assert spreads(kernels, x, random_weights(spec), spec, precision, tile_rows=4, tile_cols=3)


@st.composite
def general_cases(draw):
    options = {
        "kernel": draw(st.sampled_from([3, 5])),
        "stride": draw(st.sampled_from([1, 2])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "out_activation": draw(st.sampled_from(ACTIVATIONS)),
        "squeeze_channels": draw(st.just(0) | st.integers(1, 40)),
        "expand": draw(st.booleans()),
    }
    if options["stride"] == 1:
        options["dilation"] = draw(st.integers(1, 4))
    most = options.get("dilation", 1) * (options["kernel"] - 1)
    options["padding"] = draw(st.none() | st.just("same") | st.tuples(*[st.integers(0, most)] * 4))
    c_in = draw(st.integers(1, 40))
    spec = BlockSpec(
        c_in, draw(st.integers(1, 100)) if options["expand"] else c_in, draw(st.integers(1, 80)), **options
    )
    return spec, draw(st.integers(1, 3)), (draw(st.integers(1, 11)), draw(st.integers(1, 11)))


@settings(max_examples=settings.default.max_examples // 5)
@given(general_cases(), st.sampled_from(list(PRECISIONS)), st.integers(0, 2**31))
def test_any_general_block(kernels, case, precision, seed):
    spec, batch, size = case
    if min(spec.out_size(*size)) < 1:
        reject()
    weights = random_weights(spec, seed=seed, expand_bias=seed % 20)
    check(kernels, input_of(spec, batch, size, precision, seed=seed), weights, spec, precision, seed=seed)


# A network's stem, in one kernel with the block behind it.


def stem_of(spec, channels, activation="relu6", seed=0, bias=1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.in_channels, channels, 3, 3, generator=generator) / 3
    return Stem(weight, bias * torch.randn(spec.in_channels, generator=generator), activation)


def image_of(batch, channels, size, precision, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator).to(PRECISIONS[precision][1])


BEHIND_STEMS = {
    "MobileNetV2": (BlockSpec(32, 32, 16, expand=False), "relu6"),
    "stride 2": (BlockSpec(20, 20, 20, 2, expand=False), "relu6"),
    "MobileNetV1": (BlockSpec(32, 32, 64, expand=False, out_activation="relu6"), "relu6"),
    "MobileNetV3": (
        BlockSpec(16, 16, 16, 2, expand=False, activation="relu", squeeze_channels=8),
        "hardswish",
    ),
    "EfficientNet": (
        BlockSpec(24, 24, 16, expand=False, activation="silu", squeeze_channels=6, gate="sigmoid"),
        "silu",
    ),
    "ReLU": (BlockSpec(9, 9, 70, expand=False, kernel=5, activation="hardswish", padding=(2, 1, 0, 3)), "relu"),
}
by_behind = pytest.mark.parametrize(("spec", "activation"), BEHIND_STEMS.values(), ids=BEHIND_STEMS)


@by_precision
@by_behind
def test_stem(kernels, spec, activation, precision):
    """As planned, and in tiles that do not fit; images of both formats and any number of channels."""
    for i, (channels, size) in enumerate([(3, (33, 30)), (1, (12, 11)), (4, (7, 16)), (2, (9, 10))]):
        stem, weights = stem_of(spec, channels, activation, bias=20 if i == 2 else 1), random_weights(spec)
        x = image_of(2, channels, size, precision)
        if i % 2:
            x = x.to(memory_format=torch.channels_last)
        check(kernels, x, weights, spec, precision, stem)
        forced = {"tile_rows": 3, "tile_cols": 5, "splits": 1 + (i % 2 if spec.in_channels > 16 else 0)}
        check(kernels, x, weights, spec, precision, stem, **forced)


@by_precision
def test_stem_of_small_images(kernels, precision):
    spec = BlockSpec(32, 32, 16, expand=False)
    stem, weights = stem_of(spec, 3), random_weights(spec)
    for size in ((1, 1), (1, 6), (5, 2), (8, 8)):
        x = image_of(5, 3, size, precision)
        check(kernels, x, weights, spec, precision, stem)
        check(kernels, x, weights, spec, precision, stem, images=3, tile_rows=8, tile_cols=8, strip_rows=2)


@by_precision
@by_behind
def test_non_finite_pixels_spread_through_a_stem_as_in_eager(kernels, spec, activation, precision):
    """Also into no window beside those that they lie in, at any column and border."""
    stem, weights = stem_of(spec, 3, activation), random_weights(spec)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        for where in ((0, 0, 0, 0), (1, 2, 6, 7), (1, 1, 8, 4 + i), (0, 1, 3, 11)):
            x = image_of(2, 3, (9, 12), precision)
            x[where] = value
            assert spreads(kernels, x, weights, spec, precision, stem, tile_rows=2, tile_cols=3)


@by_precision
def test_views_in_front_of_a_stem(kernels, precision):
    spec = BlockSpec(32, 32, 16, expand=False)
    stem, weights = stem_of(spec, 3), random_weights(spec)
    whole = image_of(4, 6, (24, 30), precision)
    views = [
        whole[::2, ::2, ::2, 3::2],
        whole[:, :3].transpose(2, 3),
        whole[:1, 2:5].expand(3, -1, -1, -1),
        whole[:, :1].expand(-1, 3, -1, -1),
    ]
    for x in views:
        check(kernels, x, weights, spec, precision, stem, tile_rows=4, tile_cols=4)


@by_precision
def test_shared_memory_in_front_of_a_stem_is_what_the_plan_says(kernels, precision):
    spec = BlockSpec(32, 32, 16, expand=False)
    stem, weights, x = stem_of(spec, 3), random_weights(spec), image_of(1, 3, (12, 10), precision)
    plan = planned(spec, x, precision, stem, tile_rows=6, tile_cols=5)
    packed = pack(weights, x.dtype, "cuda")
    packed = packed._replace(**dict(zip(("w_expand", "b_expand"), fold.pack_stem(*stem[:2], x.dtype), strict=True)))
    less = dataclasses.replace(plan, shared_bytes=plan.shared_bytes - 16)
    emulated_inverted_residual(kernels[precision], x, packed, spec, plan, stem="relu6")
    with pytest.raises(RuntimeError, match=r"of shared memory at .*, outside its"):
        emulated_inverted_residual(kernels[precision], x, packed, spec, less, stem="relu6")


@by_precision
@pytest.mark.parametrize("stem", [True, False], ids=["stem", "no stem"])
def test_blocks_in_a_row(kernels, precision, stem):
    """Weights joined, results in one memory between them: what blocks give one by one, to the bit."""
    front = BlockSpec(32, 32, 16, expand=False)
    specs = [
        *([front] if stem else []),
        BlockSpec(16, 96, 24, 2),
        BlockSpec(24, 70, 24, residual=True),
        BlockSpec(24, 40, 20, activation="hardswish", kernel=5, squeeze_channels=7),
        BlockSpec(20, 20, 33, expand=False, out_activation="relu"),
        BlockSpec(33, 50, 12, 2),
    ]
    dtype = PRECISIONS[precision][1]
    first = stem_of(front, 3) if stem else None
    image = image_of(2, 3, (21, 19), precision) if stem else input_of(specs[0], 2, (11, 10), precision)
    x, rows, plans = image, [], []
    for i, spec in enumerate(specs):
        weights = random_weights(spec, seed=i)
        packed = pack(weights, dtype, "cuda")
        before = first if i == 0 else None
        if before is not None:
            packed = packed._replace(
                **dict(zip(("w_expand", "b_expand"), fold.pack_stem(*before[:2], dtype), strict=True))
            )
        rows += [t for t in packed if t is not None]
        options = {"splits": 2} if i % 2 else {}
        plans.append(planned(spec, x, precision, before, **options))
        x = emulated(kernels, x, weights, spec, precision, stem=before, **options)
    y = emulated_sequence(kernels[precision], image, join(rows), specs, plans, first and "relu6")
    assert torch.equal(y, x)
    with pytest.raises(RuntimeError, match=r"weights\(\) is not what is joined"):
        emulated_sequence(kernels[precision], image, join(rows)[:-64], specs, plans, first and "relu6")


PADDED = BlockSpec(20, 40, 20, residual=True)  # channels that fill no panel
WIDE = BlockSpec(16, 48, 24)  # results in whole vectors
STRIDED = BlockSpec(20, 40, 20, stride=2)
UNEXPANDED = BlockSpec(24, 24, 20, expand=False)
OUT_BLOCKS = BlockSpec(8, 16, 180)
UNEVEN = BlockSpec(20, 40, 24, activation="relu", padding=(2, 0, 1, 0), out_activation="relu")
DILATED = BlockSpec(20, 40, 20, dilation=2, activation="silu")
FIVE = BlockSpec(20, 40, 24, kernel=5, activation="hardswish")
SQUEEZED = BlockSpec(20, 72, 20, residual=True, activation="hardswish", squeeze_channels=6)
STEMMED = BlockSpec(20, 20, 24, expand=False)

# What is changed in kernel.cuh or products.cuh; the precision and the block that then must show it are float32 and
# PADDED but for those of SHOWN_BY.
WAITS = "  previous_finishes();\n  next_may_start();\n"
MUTATIONS = {
    "barrier before a group": ("    barrier();  // this group's weights are there", "    //"),
    "barrier after the expansion": ("        barrier();  // e is there, too", "        ;"),
    "barrier after the copy of e": ("      copies_finish();\n      barrier();", "      copies_finish();"),
    "barrier that gathers infinities": ("barrier_any(any_infinite", "bool(any_infinite"),
    "end of copies": ("    copies_finish();\n    barrier();  // this", "    barrier();  // this"),
    "end of copies of e": ("      copies_finish();\n      barrier();", "      barrier();"),
    "stages": ("= 2 * l.weights + l.stage - stage", "= stage"),
    "rows of a fragment": ("a[i][1].x, a[i][0].y, a[i][1].y}", "a[i][0].y, a[i][1].x, a[i][1].y}"),
    "weights of a fragment": ("rows, b.z, b.w)", "rows, b.w, b.z)"),
    "weights of a TF32 fragment": ("round_tf32(b.z), round_tf32(b.w)", "round_tf32(b.w), round_tf32(b.z)"),
    "weights of a float32 product": ("(2 * t + col) * 4 + from", "(2 * t + col) * 4 + 3 - from"),
    "columns of a quad": ("c[1][2 * lower], c[1][2 * lower + 1]", "c[1][2 * lower + 1], c[1][2 * lower]"),
    "order of taps": ("(kKernel * k + col) * int(kPanel)", "(kKernel * col + k) * int(kPanel)"),
    "order of taps on tensor cores": ("row * kKernel + col;", "col * kKernel + row;"),
    "diagonal": ("lane / 8 == lane % 4 ? ~0u : 0u", "~0u"),
    "rows above": ("larger(t.row * stride - 1, 0)", "t.row * stride"),
    "columns to the right": ("a.tile_cols - 1) * stride + 2, a.width)", "a.tile_cols - 1) * stride + 1, a.width)"),
    "place of the halo": ("t.in_col - (t.col * stride - 1)", "t.in_col - t.col * stride"),
    "odd columns": ("(col % 2) * (e_cols + 1) / 2", "(col % 2) * e_cols / 2"),
    "expand bias": ("load_shared<float4>(bias + (p * 4 + t) * 16)", "float4{0, 0, 0, 0}"),
    "depthwise bias": ("sum[0] = load_shared<float4>(bias)", "sum[0] = {0, 0, 0, 0}"),
    "project bias": ("load_floats(a.b_project + from, left)", "float4{0, 0, 0, 0}"),
    "project bias after splits": ("add(load_floats(a.b_project + channel, left))", ""),
    "residual": ("inside && a.residual ? left : 0", "0"),
    "residual after splits": ("if (a.residual) {", "if (false) {"),
    "zeros outside the image": ("store_shared(l.e + i, uint4{0, 0, 0, 0})", ""),
    "mask of hidden channels": ("      keep(q, channels - last", "      if (false) keep(q, channels - last"),
    "mask of input channels": ("exists ? load_written", "true ? load_written"),
    "mask of output channels": ("second, channels - channel - int(kPanel))", "second, 4)"),
    "first ReLU6": ("return Numbers<kPrecision>::narrow_relu6(v)", "return Numbers<kPrecision>::narrow(v)"),
    "second ReLU6": ("return N::narrow_relu6(v)", "return N::narrow(v)"),
    "last rows": ("strip.row + o < tile.rows", "true"),
    "last columns": ("tile.rows && strip.col < tile.cols;", "tile.rows;"),
    "lanes without a strip": ("inside = strip.exists && ", "inside = "),
    "images": ("(tile.first_image + image) * a.x_image", "image * a.x_image"),
    "splits": ("blockIdx.y * pixels", "0 * pixels"),
    "out blocks": ("first_out = blockIdx.z * kOutPanels", "first_out = 0"),
    "exchange": ("{exchange(other.x, 1), exchange(other.y, 1)}", "{other.x, other.y}"),
    "infinities": ("found = found || ", "found = found && "),
    "padding above": ("a.pad_top, a.out_height", "a.pad_left, a.out_height"),
    "padding before": ("a.pad_left, a.out_width", "a.pad_top, a.out_width"),
    "first rows and columns of the halo": ("before < 0 ? (dilation - 1 - before) / dilation : 0", "0"),
    "last rows and columns of the halo": ("(tile - 1) * kStride + kKernel,", "(tile - 1) * kStride + kKernel - 1,"),
    "place of an uneven halo": ("larger(end - start, 0), start - first}", "larger(end - start, 0), 0}"),
    "dilated rows": ("row * tile.step) * a.x_row", "row) * a.x_row"),
    "dilated columns": ("col * tile.step) * a.x_col", "col) * a.x_col"),
    "dilated outputs": ("(strip.row + o) * tile.step", "(strip.row + o)"),
    "phases of a dilation": ("phase * kStride - pad, first", "-pad, first"),
    "dilated padding": ("(dilation - 1 - before) / dilation", "-before"),
    "fifth row": ("k >= 0 && k < kKernel", "k >= 0 && k < 4"),
    "fifth column": ("    float4 tap[kKernel];", "    if (col == 4) break;\n    float4 tap[kKernel];"),
    "fifth row on tensor cores": ("up[4].x, low[4].x, fifth.x", "up[3].x, low[3].x, fifth.x"),
    "fifth row's weights": ("within / 4 : within - 8", "within / 4 : 9 - within"),
    "rows three and four on tensor cores": ("third, w0.z & diagonal, w0.w", "third, w0.w & diagonal, w0.z"),
    "clip": ("return clip(v, f.low, f.high)", "return v"),
    "hardswish": ("v * (clip(v + 3, 0, 6)", "v * (clip(v + 2.9f, 0, 6)"),
    "silu": ("divide(v, 1 + exponential(-v))", "divide(v, 1 + exponential(-1.05f * v))"),
    "output's activation": ("if (kGeneral && biased) v[p]", "if (false) v[p]"),
    "output's activation of one split": ("if (kGeneral && biased) v[p]", "if (kGeneral) v[p]"),
    "output's activation after splits": ("if constexpr (kActivated) sum", "if constexpr (false) sum"),
    "infinities that activations leave": ("infinite = infinite || found", "infinite = false"),
    "barrier after an expansion with infinities": ("infinite = barrier_any(found)", "infinite = found"),
    "end of the kernel before": (f"{WAITS}  int pixels, e_at;", "  int pixels, e_at;"),
    "end of the kernel before the sum over splits": (f"{WAITS}  if (pixel >= pixels)", "  if (pixel >= pixels)"),
    "start of the next kernel": (f"{WAITS}  int pixels, e_at;", "  next_may_start();\n  int pixels, e_at;"),
    "cache of x": ("exists ? load_written", "exists ? load_global"),
    "cache of the residual": ("N::widen(load_written(reinterpret_cast", "N::widen(load_global(reinterpret_cast"),
    "gate": ("N::narrow({v.x * gate.x,", "N::narrow({v.x,"),
    "gate of another image": ("int64_t(gate_image) * a.hidden", "int64_t(0) * a.hidden"),
    "gate of another panel": ("a.hidden_panels + panel + p) * kPanel + 4 * t))", "a.hidden_panels) * kPanel + 4 * t))"),
    "last rows in the pool": ("if (row < outs) total", "total"),
    "last columns in the pool": ("outs = strip.exists && strip.col < tile.cols ?", "outs = strip.exists ?"),
    "lanes without a strip in the pool": ("strip.exists && strip.col < tile.cols ?", "strip.col < tile.cols ?"),
    "strips in the pool": ("apart < 32; apart *= 2", "apart < 16; apart *= 2"),
    "warps' sums": ("block_index()) * warps + threadIdx.x / 32", "block_index()) * warps"),
    "tiles' sums": ("block_index()) * warps + threadIdx.x / 32", "0) * warps + threadIdx.x / 32"),
    "rows of the mean": ("row += kParts)", "row += 2 * kParts)"),
    "parts of the mean": ("(int part = 0; part < kParts", "(int part = 1; part < kParts"),
    "mean": ("mean * a.scale", "mean"),
    "chunks of the mean": ("int64_t(first + at) * kPanel", "int64_t(at) * kPanel"),
    "barrier before a chunk": ("    barrier();  // nobody reads the chunk before\n", ""),
    "barrier after a chunk": ("    barrier();  // this chunk's sums are there\n", ""),
    "barrier after the last chunk": ("  barrier();  // nobody reads the last chunk\n", ""),
    "barrier before the last sum": ("  barrier();  // all sums are there\n", ""),
    "bias of the gate": ("load_global(a.bias + channel)", "0"),
    "activation between the gate's products": ("gated)\n    v = activated(v, a.activation);", "gated)\n    v += 0;"),
    "hardsigmoid": ("    v = clip(v + 3, 0, 6) * (1 / 6.f)", "    v = clip(v + 3, 0, 6)"),
    "sums of the gate's parts": ("part < kSums; ++part)", "part < kSums - 1; ++part)"),
    "end of the kernel before the gate's products": (f"{WAITS}  float sum = 0;", "  float sum = 0;"),
    "cache of the pool's sums": ("rows += load_written(", "rows += load_global("),
    "cache of the gate": ("gate = load_written(", "gate = load_global("),
    "image's border": (" && at_col < a.image_width", ""),
    "image's first column": ("kStemStride) - 1 + col", "kStemStride) + col"),
    "image's channels": ("from + k * a.x_channel", "from + k"),
    "images in front of a stem": ("at_image * a.x_image", "image * a.x_image"),
    "channels there are not in an image": ("inside && k < a.in_channels", "inside && k < 4"),
    "windows": ("row * int(kStemStride)) * pitch", "row) * pitch"),
    "images' windows": ("(image * a.image_rows + row * int(kStemStride))", "(row * int(kStemStride))"),
    "rows of a window": ("window[i][lower] + q * to_row", "window[i][lower]"),
    "a window's fourth column": ("window[i][lower] = t < 3 ?", "window[i][lower] = true ?"),
    "zeros of a stem": ("store_shared(a.shared.zeros, uint4{0, 0, 0, 0})", ""),
    "cache of the image": ("a.in_channels ? load_written(", "a.in_channels ? load_global("),
    "stem's activation": ("activated(v, a.expand_activation)", "activated(v, a.activation)"),
}  # fmt: skip
SHOWN_BY = {
    "barrier after the copy of e": ("float32", UNEXPANDED),
    "barrier that gathers infinities": ("float16", UNEXPANDED),
    "end of copies of e": ("float32", UNEXPANDED),
    "rows of a fragment": ("float16", PADDED),
    "weights of a fragment": ("bfloat16", PADDED),
    "weights of a TF32 fragment": ("tf32", PADDED),
    "order of taps on tensor cores": ("float16", PADDED),
    "diagonal": ("float16", PADDED),
    "odd columns": ("float32", STRIDED),
    "mask of output channels": ("float16", PADDED),
    "cache of x": ("float16", PADDED),
    "out blocks": ("float32", OUT_BLOCKS),
    "exchange": ("float16", WIDE),
    "infinities": ("float16", UNEXPANDED),
    **dict.fromkeys(
        (
            *("padding above", "padding before", "first rows and columns of the halo", "place of an uneven halo"),
            *("last rows and columns of the halo", "clip", "output's activation", "output's activation of one split"),
            "output's activation after splits",
        ),
        ("float32", UNEVEN),
    ),
    "infinities that activations leave": ("float16", UNEVEN),
    "barrier after an expansion with infinities": ("float16", UNEVEN),
    **dict.fromkeys((name for name in MUTATIONS if "dilat" in name or name == "silu"), ("float32", DILATED)),
    **dict.fromkeys(("fifth row", "fifth column", "hardswish"), ("float32", FIVE)),
    **dict.fromkeys(
        ("fifth row on tensor cores", "fifth row's weights", "rows three and four on tensor cores"), ("float16", FIVE)
    ),
    **dict.fromkeys(list(MUTATIONS)[list(MUTATIONS).index("gate") :], ("float32", SQUEEZED)),
    **dict.fromkeys(list(MUTATIONS)[list(MUTATIONS).index("image's border") :], ("float16", STEMMED, "hardswish")),
}


def shown_by(name):
    """Precision, block, and the activation of a stem in front of it."""
    precision, spec, activation = (*SHOWN_BY.get(name, ("float32", PADDED)), None)[:3]
    return precision, spec, activation


def noticed(library, spec, precision, activation=None):
    """Whether anything is wrong: finite and infinite input, splits, tiles that do not fit, images of two blocks."""
    kernels, weights = {precision: library}, random_weights(spec, expand_bias=5)
    stem = activation and stem_of(spec, 3, activation)
    x = image_of(2, 3, (12, 13), precision) if stem else input_of(spec, 2, (6, 7), precision)
    infinite = x.clone()
    infinite[1, 0, 3, 3] = float("inf")
    for splits in (1, 2) if spec.hidden_channels > 16 else (1,):
        forced = {"tile_cols": 5, "splits": splits}
        try:
            y = emulated(kernels, x, weights, spec, precision, stem=stem, **forced)
            right = spreads(kernels, infinite, weights, spec, precision, stem, **forced)
            if stem:  # of two images a thread block
                whole = {"images": 2, "tile_rows": 6, "tile_cols": 7}
                right = right and check(kernels, x, weights, spec, precision, stem, **whole) is not None
        except (RuntimeError, AssertionError):
            return True
        if not (right and verdict(y, x, weights, spec, precision, stem).ok):
            return True
    return False


def changed_kernel(name, folder):
    """The library of a changed kernel.cuh: of its kernels the one that small plans of the block need."""
    original, replacement = MUTATIONS[name]
    precision, spec, activation = shown_by(name)
    (folder / "cuda").mkdir()
    for source in [CSRC / "block.h", *(CSRC / "cuda").glob("*.h"), *(CSRC / "cuda").glob("*.cuh")]:
        shutil.copy(source, folder / source.relative_to(CSRC))
    changed = [p for p in (folder / "cuda").glob("*.cuh") if original in p.read_text()]
    assert len(changed) == 1 and changed[0].read_text().count(original) == 1, original
    changed[0].write_text(changed[0].read_text().replace(original, replacement))
    plan = planned(spec, input_of(spec, 2, (6, 7), precision), precision, tile_cols=5)
    general = spec.beyond_mobilenet_v2 or activation not in (None, "relu6")
    form = {3: "kThree", 5: "kFive"}[spec.kernel] if general else "kStem" if activation else "kMobileNetV2"
    only = form, spec.stride, plan.strip_rows // 2, plan.out_panels
    return loaded(compiled_kernel(folder / "kernel.so", PRECISIONS[precision][0], folder, only))


@pytest.fixture(scope="module")
def changed_kernels(request, tmp_path_factory):
    """Those that the tests to come ask for, compiled while others run."""
    items = [item for item in request.session.items if "changed_kernels" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        names = [item.callspec.params["name"] for item in items]
        yield {name: pool.submit(changed_kernel, name, tmp_path_factory.mktemp("changed")) for name in names}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(changed_kernels, name):
    precision, spec, activation = shown_by(name)
    assert noticed(changed_kernels[name].result(), spec, precision, activation)


@by_precision
@pytest.mark.parametrize(
    "spec", [PADDED, WIDE, STRIDED, UNEXPANDED, OUT_BLOCKS, UNEVEN, DILATED, FIVE, SQUEEZED], ids=str
)
def test_the_kernel_itself_is_not_broken(kernels, spec, precision):
    assert not noticed(kernels[precision], spec, precision)


@by_precision
@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
def test_the_kernel_behind_a_stem_is_not_broken(kernels, activation, precision):
    assert not noticed(kernels[precision], STEMMED, precision, activation)
