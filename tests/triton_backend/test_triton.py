"""The Triton kernel: on a GPU where there is one, else in Triton's interpreter, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from support.blocks import (
    DETERMINISM_SPECS,
    NUMBERED_BLOCKS,
    PADDING_SPECS,
    SMALL_SPECS,
    by_small_spec,
    gpu_cases,
)
from support.checks import check, run, within
from support.devices import DEVICE, NO_TRITON, triton_kernel, weights_on
from support.inputs import GPU_DTYPES, MEMORY_FORMATS, SIZES, VIEWS, by_gpu_dtype, random_input
from support.quick_interpreter import check_overflow
from support.triton_kernel import forced, mutated

from mnv2_fused import BlockSpec, pack, triton_plan
from mnv2_fused.plans.triton import TILES
from mnv2_fused.testing import block_agreement, random_weights

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.skipif(NO_TRITON is None, reason="the kernel's tests run in this process")
def test_in_the_interpreter():
    """Every test of the kernel, here and in two other files, in two processes at a time."""
    folder = Path(__file__).parent
    files = __file__, str(folder / "test_triton_variants.py"), str(folder.parent / "gpu/test_gpu_op.py")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *files, "-k"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # About half of the time.
    first = "mobilenet or gpu_op or sizes or (variants and (pair or broken or finite))"
    halves = [
        subprocess.Popen([*command, half], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for half in (first, f"not ({first})")
    ]
    for half in halves:
        output, _ = half.communicate()
        assert half.returncode == 0, output[-6000:]
        assert " passed" in output and "runs in test_in_the_interpreter" not in output, output[-6000:]


def dtypes_of(i):
    """In the interpreter, where a block takes seconds, each in one dtype."""
    return GPU_DTYPES if DEVICE == "cuda" else [GPU_DTYPES[i % 3]]


IN_DTYPES = [(i, *block, dtype) for i, block in NUMBERED_BLOCKS for dtype in dtypes_of(i)]


@triton_kernel
@pytest.mark.parametrize(
    ("i", "spec", "size", "dtype"), IN_DTYPES, ids=[f"{i}: {b} at {size[0]}-{d}" for i, b, size, d in IN_DTYPES]
)
def test_mobilenet_v2(i, spec, size, dtype):
    """Each block, the configurations taking turns over blocks and dtypes."""
    turn = i + GPU_DTYPES.index(dtype)
    x = random_input(spec, 1 + turn % 2, size, dtype=dtype, memory_format=MEMORY_FORMATS[turn % 2])
    plan = forced(
        spec, x, **TILES[turn % len(TILES)]._asdict(), splits=1 + turn % 3 if spec.hidden_channels > 128 else 1
    )
    y = check(x, weights_on(DEVICE, spec), spec, backend="triton", plan=plan)
    assert y.is_contiguous(memory_format=MEMORY_FORMATS[turn % 2]) or y.shape[-2:] == (1, 1)


@triton_kernel
@pytest.mark.parametrize(("tile", "dtype"), [(t, d) for i, t in enumerate(TILES) for d in dtypes_of(i)], ids=str)
def test_every_configuration(tile, dtype):
    for spec in SMALL_SPECS:
        x = random_input(spec, 2, (7, 9), dtype=dtype)
        plan = triton_plan(spec, x.shape, dtype=dtype, **tile._asdict(), splits=1)
        check(x, weights_on(DEVICE, spec), spec, backend="triton", plan=plan)


@triton_kernel
@by_gpu_dtype
@pytest.mark.parametrize("spec", [BlockSpec(24, 144, 24, residual=True), BlockSpec(32, 192, 40, stride=2)], ids=str)
def test_the_planners_own_choice(spec, dtype):
    check(random_input(spec, 1, (7, 7), dtype=dtype), weights_on(DEVICE, spec), spec, backend="triton")


@triton_kernel
@settings(max_examples=int(os.environ.get("MNV2_FUSED_FUZZ", "300" if DEVICE == "cuda" else "40")))
@given(gpu_cases())
def test_any_shape_and_plan(case):
    spec, (batch, _, height, width), values, (memory_format, cropped), dtype, seed = case
    weights = weights_on(DEVICE, spec, seed=seed, expand_bias=seed % 20)
    x = random_input(spec, batch, (height + 2, width + 1), dtype=dtype, memory_format=memory_format, seed=seed)
    x = x[:, :, 1:-1, 1:] if cropped else x[:, :, 2:, 1:].contiguous(memory_format=memory_format)
    y = run(x.to(DEVICE), weights, spec, backend="triton", plan=forced(spec, x, **values))
    assert y.shape == run(x, random_weights(spec), spec, backend="eager").shape
    if batch:
        within(y, x.to(DEVICE), weights, spec)


@triton_kernel
@pytest.mark.parametrize("channels", [(200, 210, 33), (17, 40, 700), (330, 64, 16)], ids=str)
def test_many_channels(channels):
    """More than one product takes: of the input in turn, of the output by several programs."""
    spec = BlockSpec(*channels)
    x = random_input(spec, 1, (3, 4), dtype=torch.float16)
    plan = triton_plan(spec, x.shape, tile_rows=1, tile_cols=2, group=64, splits=1)
    assert plan.out_tiles * plan.out_tile >= 700 or channels[2] < 700
    check(x, weights_on(DEVICE, spec), spec, backend="triton", plan=plan)
    check(x.float(), weights_on(DEVICE, spec), spec, backend="triton")  # exact float32 never keeps x


@triton_kernel
@pytest.mark.parametrize("spec", PADDING_SPECS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5)])
def test_padding_is_of_the_expanded_tensor(spec, size):
    check(random_input(spec, 2, size), weights_on(DEVICE, spec, expand_bias=50), spec, backend="triton")


@triton_kernel
@by_gpu_dtype
@pytest.mark.parametrize("splits", [1, 3])
def test_residual_adds_x_itself(dtype, splits):
    spec = BlockSpec(20, 120, 20, residual=True)
    nothing = weights_on(DEVICE, spec)._replace(
        w_project=torch.zeros(20, 120, 1, 1, device=DEVICE), b_project=torch.zeros(20, device=DEVICE)
    )
    x = (random_input(spec, 2, (5, 6), dtype=dtype) * 100).to(DEVICE)
    assert torch.equal(run(x, nothing, spec, backend="triton", plan=forced(spec, x, group=32, splits=splits)), x)


@triton_kernel
@pytest.mark.parametrize("spec", DETERMINISM_SPECS, ids=str)
def test_every_run_gives_the_same_bits(spec):
    x, packed = random_input(spec, 2, (6, 5)).to(DEVICE), pack(weights_on(DEVICE, spec), backend="triton")
    plan = forced(spec, x, group=16, splits=min(3, -(-spec.hidden_channels // 16)))
    results = [run(x, packed, spec, backend="triton", plan=plan) for _ in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)
    within(results[0], x, weights_on(DEVICE, spec), spec)


@triton_kernel
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    for spec in SMALL_SPECS:
        check(view(), weights_on(DEVICE, spec), spec, backend="triton")


@triton_kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    for spec in SMALL_SPECS:
        x = random_input(spec, 2, size, dtype=torch.float16)
        check(x, weights_on(DEVICE, spec), spec, backend="triton", plan=forced(spec, x))


@triton_kernel
@by_gpu_dtype
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_empty_batch(dtype, memory_format):
    for spec in SMALL_SPECS:
        x = torch.empty(0, 8, 9, 7, dtype=dtype, device=DEVICE).to(memory_format=memory_format)
        y = run(x, weights_on(DEVICE, spec), spec, backend="triton")
        assert (y.shape, y.dtype) == (run(x, weights_on(DEVICE, spec), spec, backend="eager").shape, dtype)


@triton_kernel
@by_small_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_finite_values_spread_as_in_eager(value, spec, dtype):
    for where in ((0, 0, 0, 0), (0, 3, 4, 4), (1, 7, 6, 7)):
        x = random_input(spec, 2, (7, 8), dtype=dtype).to(DEVICE)
        x[where] = value
        y = run(x, weights_on(DEVICE, spec), spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=2))
        expected = run(x, weights_on(DEVICE, spec), spec, backend="eager")
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@triton_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w_expand", "b_expand", "b_depthwise", "w_project", "b_project"])
def test_a_non_finite_weight_spreads_as_in_eager(name, value):
    """Also at the border, where no product may make a NaN of padding times infinity."""
    spec = SMALL_SPECS[0]
    x, weights = random_input(spec, 1, (6, 6)).to(DEVICE), weights_on(DEVICE, spec, dtype=torch.float32)
    getattr(weights, name).view(-1)[5] = value
    y = run(x, weights, spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=2))
    expected = run(x, weights, spec, backend="eager")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@triton_kernel
def test_offsets_beyond_2_31_elements(monkeypatch):
    """Two images 2^31 elements apart; no page between them is touched."""
    check_overflow(monkeypatch)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        memory = torch.empty(2**31 + 8 * 81, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this system does not lend 4 GiB of untouched memory")
    x = memory.as_strided((2, 8, 9, 9), (2**31, 1, 72, 8))
    x.copy_(random_input(SMALL_SPECS[0], 2, (9, 9)))
    for spec in SMALL_SPECS:
        check(x, weights_on(DEVICE, spec), spec, backend="triton", plan=forced(spec, x))


# What is taken out of the kernel, and what the tests above must then notice.
MUTATIONS = {
    "halo mask": ("tl.where(inside, 6.0, 0.0)", "tl.where(inside, 6.0, 6.0)"),
    "expand bias": ("0.0, tl.float32) + bias[None, :]\n    if KEEP_X", "0.0, tl.float32)\n    if KEEP_X"),
    "depthwise bias": ("(M, GROUP), 0.0, tl.float32) + bias", "(M, GROUP), 0.0, tl.float32) + 0 * bias"),
    "project bias": ("result += tl.load(b_project + out, mask=out < C_OUT, other=0.0)[None, :]", "result += 0.0"),
    "residual": ("result += tl.load(x_at, mask=stored_at, other=0.0).to(tl.float32)", "result += 0.0"),
    "order of taps": ("return kernel * row + col if", "return kernel * col + row if"),
    "last rows": ("(given & (r < out_height)", "(given & (r < out_height - 1)"),
    "first clamp": ("tl.minimum(tl.maximum(v, 0.0, propagate_nan=_ALL), cap", "tl.minimum(v, cap"),
    "second clamp": ("result = activate(sums[o], ACTIVATION, NEGATIVE_SLOPE)", "result = sums[o]"),
}  # fmt: skip


@triton_kernel
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from mnv2_fused.triton_backend import launch as triton_launch

    spec = BlockSpec(8, 48, 8, residual=True)
    x, weights = random_input(spec, 2, (6, 6)).to(DEVICE), weights_on(DEVICE, spec, expand_bias=5)
    plan = forced(spec, x, tile_rows=2, tile_cols=2)

    def verdict():
        return block_agreement(run(x, weights, spec, backend="triton", plan=plan), x, weights, spec).ok

    assert verdict()
    broken = mutated(tmp_path, *MUTATIONS[name])
    monkeypatch.setattr(triton_launch, "inverted_residual_kernel", broken.inverted_residual_kernel)
    assert not verdict()


@triton_kernel
def test_infinite_input_shows_unmasked_padding_channels(tmp_path, monkeypatch):
    from mnv2_fused.triton_backend import launch as triton_launch

    spec = SMALL_SPECS[1]  # 50 channels: 14 of the last group are padding
    x, weights = random_input(spec, 1, (5, 5)).to(DEVICE), weights_on(DEVICE, spec)
    x[0, 0, 2, 2] = float("inf")
    plan = forced(spec, x, group=64)
    expected = run(x, weights, spec, backend="eager").isnan()
    assert torch.equal(run(x, weights, spec, backend="triton", plan=plan).isnan(), expected)
    broken = mutated(tmp_path, "result = tl.where(exists[None, :], result, 0.0)", "pass")
    monkeypatch.setattr(triton_launch, "inverted_residual_kernel", broken.inverted_residual_kernel)
    assert not torch.equal(run(x, weights, spec, backend="triton", plan=plan).isnan(), expected)
