"""The emulated GPU itself: tensor cores, conversions and exchanges, and the wrong kernels that it must refuse."""

import ctypes
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.emulation import HERE, compiled, loaded

KINDS = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}

pytestmark = pytest.mark.slow


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
        device.shuffle_lanes(address(lanes), mask, address(values), address(picked), address(exchanged))
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
    "warp operation of some lanes": "waits in shuffle at .*, which not all lanes of its warp call",
    "warp operation after a barrier of others": "waits in shuffle at .*, which not all lanes of its warp call",
    "warp operations of two kinds": "calls (shuffle|shuffle_xor), but thread .* waits in (shuffle|shuffle_xor)",
    "warp operations of two places": "calls shuffle, but thread .* waits in shuffle at",
    "warp operation, once more by one lane": "37 waits in shuffle_xor at .*, which not all lanes of its warp call",
    "a lane that there is not": "exchanges with lane 32",
    "barrier of some threads": "thread 37 has ended, but thread 0 waits in barrier",
    "barriers of two places": "thread 37 waits in barrier at .* but thread 0 waits in barrier at",
    "unfinished copy": r"ends without wait_copies\(\)",
    "read of an unfinished copy": "reads shared byte .* is still copying to",
    "copy finished by its thread only": "which thread .*(wrote|read) since the last barrier|is still copying to",
    "copy over what others read": "which thread .*(wrote|read) since the last barrier|is still copying to",
    "read before the last kernel's end": r"reads before grid_dependency_wait\(\)",
    "copy before the last kernel's end": r"reads before grid_dependency_wait\(\)",
    "store before the last kernel's end": r"writes before grid_dependency_wait\(\)",
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
