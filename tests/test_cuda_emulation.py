"""The CUDA kernel's own source, run on the CPU by tests/cuda_emulation; and that emulation itself."""

import ctypes
import dataclasses
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.emulation import CSRC, HERE, compiled, compiled_kernel, emulated_inverted_residual, loaded
from hypothesis import given, reject
from hypothesis import strategies as st
from test_block import DETERMINISM_SPECS, PADDING_SPECS, random_input, run
from test_inputs import SIZES, VIEWS

from mnv2_fused import BlockSpec, cuda_plan, pack
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


def eager(x, weights, spec, precision):
    """torch's own ops in this precision. TF32, which CPUs lack, is float32 after rounding a product's operands."""
    if precision != "tf32":
        return run(x, weights, spec, backend="eager")
    w = [None if t is None else t.float() for t in weights]
    e = F.relu6(F.conv2d(tf32(x), tf32(w[0]), w[1])) if spec.expand else x
    d = F.relu6(F.conv2d(e, w[2], w[3], spec.stride, 1, groups=spec.hidden_channels))
    y = F.conv2d(tf32(d), tf32(w[4]), w[5])
    return y + x if spec.residual else y


def planned(spec, x, precision, **forced):
    """The planner's own choice, or one with some values forced and the rest small."""
    options = {"dtype": x.dtype, "tf32": precision == "tf32"}
    if not forced:
        return cuda_plan(spec, x.shape, **options)
    small = {"images": 1, "tile_rows": 4, "tile_cols": 4, "strip_rows": 2, "group": 16, "splits": 1} | forced
    out = [(size - 1) // spec.stride + 1 for size in x.shape[2:]]
    limits = {"images": x.shape[0], "tile_rows": out[0], "tile_cols": out[1]}
    return cuda_plan(spec, x.shape, **options, forced=[min(v, limits.get(k, v)) for k, v in small.items()])


def emulated(kernels, x, weights, spec, precision, *, seed=0, **forced):
    packed = pack(weights, x.dtype, "cuda")
    plan = planned(spec, x, precision, **forced)
    return emulated_inverted_residual(kernels[precision], x, packed, spec, plan, seed)


def verdict(y, x, weights, spec, precision):
    reference = run(x.double(), weights, spec, backend="eager")
    return agreement(y, eager(x, weights, spec, precision), reference)


def check(kernels, x, weights, spec, precision, **options):
    """Holds the kernel to the rule; returns the result."""
    before = x.clone()
    y = emulated(kernels, x, weights, spec, precision, **options)
    found = verdict(y, x, weights, spec, precision)
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


def spreads(kernels, x, weights, spec, precision, **forced):
    """Whether NaN and infinities are where eager has them."""
    y = emulated(kernels, x, weights, spec, precision, **forced)
    expected = eager(x, weights, spec, precision)
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


PADDED = BlockSpec(20, 40, 20, residual=True)  # channels that fill no panel
WIDE = BlockSpec(16, 48, 24)  # results in whole vectors
STRIDED = BlockSpec(20, 40, 20, stride=2)
UNEXPANDED = BlockSpec(24, 24, 20, expand=False)
OUT_BLOCKS = BlockSpec(8, 16, 180)

# What is changed in kernel.cuh; the precision and the block that then must show it are float32 and PADDED but for those
# of SHOWN_BY.
MUTATIONS = {
    "barrier before a group": ("    barrier();  // this group's weights are there", "    //"),
    "barrier after the expansion": ("      barrier();  // e is there", ""),
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
    "order of taps": ("(3 * k + col) * int(kPanel)", "(3 * col + k) * int(kPanel)"),
    "order of taps on tensor cores": ("row * 3 + col, channel", "col * 3 + row, channel"),
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
    "mask of input channels": ("exists ? load_global", "true ? load_global"),
    "mask of output channels": ("second, channels - channel - int(kPanel))", "second, 4)"),
    "first ReLU6": ("N::narrow_relu6(quad_of(c[p][i], lower))", "N::narrow(quad_of(c[p][i], lower))"),
    "second ReLU6": ("= N::narrow_relu6(sum[o])", "= N::narrow(sum[o])"),
    "last rows": ("strip.row + o < tile.rows", "true"),
    "last columns": ("strip.col < tile.cols", "true"),
    "lanes without a strip": ("inside = strip.exists && ", "inside = "),
    "images": ("(tile.first_image + image) * a.x_image", "image * a.x_image"),
    "splits": ("blockIdx.y * pixels", "0 * pixels"),
    "out blocks": ("first_out = blockIdx.z * kOutPanels", "first_out = 0"),
    "exchange": ("{exchange(other.x, 1), exchange(other.y, 1)}", "{other.x, other.y}"),
    "infinities": ("found = found || ", "found = found && "),
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
    "out blocks": ("float32", OUT_BLOCKS),
    "exchange": ("float16", WIDE),
    "infinities": ("float16", UNEXPANDED),
}


def noticed(library, spec, precision):
    """Whether anything is wrong: finite and infinite input, splits, tiles that do not fit, images of two blocks."""
    kernels, weights = {precision: library}, random_weights(spec, expand_bias=5)
    x = input_of(spec, 2, (6, 7), precision)
    infinite = x.clone()
    infinite[1, 0, 3, 3] = float("inf")
    for splits in (1, 2) if spec.hidden_channels > 16 else (1,):
        forced = {"tile_cols": 5, "splits": splits}
        try:
            y = emulated(kernels, x, weights, spec, precision, **forced)
            right = spreads(kernels, infinite, weights, spec, precision, **forced)
        except RuntimeError:
            return True
        if not (right and verdict(y, x, weights, spec, precision).ok):
            return True
    return False


def changed_kernel(name, folder):
    """The library of a changed kernel.cuh: of its kernels the one that small plans of the block need."""
    original, replacement = MUTATIONS[name]
    precision, spec = SHOWN_BY.get(name, ("float32", PADDED))
    (folder / "cuda").mkdir()
    for source in [CSRC / "block.h", *(CSRC / "cuda").glob("*.h"), *(CSRC / "cuda").glob("*.cuh")]:
        shutil.copy(source, folder / source.relative_to(CSRC))
    kernel = folder / "cuda/kernel.cuh"
    assert kernel.read_text().count(original) == 1, original
    kernel.write_text(kernel.read_text().replace(original, replacement))
    plan = planned(spec, input_of(spec, 2, (6, 7), precision), precision, tile_cols=5)
    only = spec.stride, plan.strip_rows // 2, plan.out_panels
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
    precision, spec = SHOWN_BY.get(name, ("float32", PADDED))
    assert noticed(changed_kernels[name].result(), spec, precision)


@by_precision
@pytest.mark.parametrize("spec", [PADDED, WIDE, STRIDED, UNEXPANDED, OUT_BLOCKS], ids=str)
def test_the_kernel_itself_is_not_broken(kernels, spec, precision):
    assert not noticed(kernels[precision], spec, precision)
