"""The Triton kernel: on a GPU where there is one, else in Triton's interpreter, in processes of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block import DETERMINISM_SPECS, PADDING_SPECS, random_input, run, within
from test_inputs import SIZES, VIEWS

import mnv2_fused
from mnv2_fused import BlockSpec, backends, pack, triton_plan
from mnv2_fused.plans.triton import TILES
from mnv2_fused.testing import block_agreement, mobilenet_v2_blocks, random_weights

pytestmark = pytest.mark.usefixtures("poison")

REASON = backends.backend_reasons()["triton"]
DEVICE = "cpu" if backends.triton_interpreted() or not torch.cuda.is_available() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.channels_last, torch.contiguous_format]
SPECS = [BlockSpec(8, 48, 8, residual=True), BlockSpec(8, 50, 20, stride=2), BlockSpec(8, 8, 5, expand=False)]

kernel = pytest.mark.skipif(REASON is not None, reason=f"{REASON}: runs in test_in_the_interpreter")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter():
    """The interpreter patches triton.language anew for each helper a kernel calls, which is half of the time.

    For helpers of the kernel's own module, patching at the kernel is enough.
    """
    if backends.triton_interpreted():
        from triton.runtime.interpreter import InterpretedFunction

        patching = InterpretedFunction.__call__

        def call(self, *args, **options):
            if self.fn.__module__.startswith("mnv2_fused."):
                return self.rewrite()(*args, **options)
            return patching(self, *args, **options)

        InterpretedFunction.__call__ = call
        yield
        InterpretedFunction.__call__ = patching
    else:
        yield


@pytest.mark.skipif(REASON is None, reason="the kernel's tests run in this process")
def test_in_the_interpreter():
    """Every test of the kernel, here and in two other files, in two processes at a time."""
    files = __file__, *(str(Path(__file__).with_name(name)) for name in ("test_gpu_op.py", "test_triton_variants.py"))
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


def weights_of(spec, **options):
    return random_weights(spec, **options)._make(
        None if t is None else t.to(DEVICE) for t in random_weights(spec, **options)
    )


def forced(spec, x, **values):
    """A plan with some values forced; few programs, since the interpreter runs one after the other."""
    patches = 16
    plan = triton_plan(spec, x.shape, dtype=x.dtype, **({"splits": 1} | values))
    while plan.programs > 4 * plan.splits and patches < 128:
        patches *= 2
        plan = triton_plan(spec, x.shape, dtype=x.dtype, **({"splits": 1} | values | {"patches": patches}))
    return plan


def check(x, weights, spec, **options):
    """Holds the kernel to the rule and to the promises of its docstring; returns the result."""
    x = x.to(DEVICE)
    before = x.clone()
    y = run(x, weights, spec, backend="triton", **options)
    within(y, x, weights, spec)
    assert y.dtype == x.dtype
    assert torch.equal(x, before), "x was written"
    return y


BLOCKS = list(enumerate(mobilenet_v2_blocks(48)))
# In the interpreter, where a block takes seconds, each in one dtype.
IN_DTYPES = [(i, *block, dtype) for i, block in BLOCKS for dtype in (DTYPES if DEVICE == "cuda" else [DTYPES[i % 3]])]


@kernel
@pytest.mark.parametrize(
    ("i", "spec", "size", "dtype"), IN_DTYPES, ids=[f"{i}: {b} at {size[0]}-{d}" for i, b, size, d in IN_DTYPES]
)
def test_mobilenet_v2(i, spec, size, dtype):
    """Each block, the configurations taking turns over blocks and dtypes."""
    turn = i + DTYPES.index(dtype)
    x = random_input(spec, 1 + turn % 2, size, dtype=dtype, memory_format=FORMATS[turn % 2])
    plan = forced(
        spec, x, **TILES[turn % len(TILES)]._asdict(), splits=1 + turn % 3 if spec.hidden_channels > 128 else 1
    )
    y = check(x, weights_of(spec), spec, plan=plan)
    assert y.is_contiguous(memory_format=FORMATS[turn % 2]) or y.shape[-2:] == (1, 1)


@kernel
@by_dtype
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_configuration(tile, dtype):
    for spec in SPECS:
        x = random_input(spec, 2, (7, 9), dtype=dtype)
        check(x, weights_of(spec), spec, plan=triton_plan(spec, x.shape, dtype=dtype, **tile._asdict(), splits=1))


@kernel
@by_dtype
@pytest.mark.parametrize("spec", [BlockSpec(24, 144, 24, residual=True), BlockSpec(32, 192, 40, stride=2)], ids=str)
def test_the_planners_own_choice(spec, dtype):
    check(random_input(spec, 1, (7, 7), dtype=dtype), weights_of(spec), spec)


@st.composite
def cases(draw):
    expand, residual = draw(st.booleans()), draw(st.booleans())
    c_in = draw(st.integers(1, 40))
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 80)) if expand else c_in,
        c_in if residual else draw(st.integers(1, 70)),
        1 if residual else draw(st.sampled_from([1, 2])),
        expand=expand,
        residual=residual,
    )
    group = draw(st.sampled_from([16, 32, 64]))
    values = {
        "tile_rows": draw(st.integers(1, 3)),
        "tile_cols": draw(st.integers(1, 3)),
        "group": group,
        "splits": draw(st.integers(1, min(-(-spec.hidden_channels // group), 3))),
    }
    shape = draw(st.integers(0, 2)), c_in, draw(st.integers(1, 7)), draw(st.integers(1, 7))
    memory = draw(st.sampled_from(FORMATS)), draw(st.booleans())
    return spec, shape, values, memory, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))


@kernel
@settings(max_examples=int(os.environ.get("MNV2_FUSED_FUZZ", "300" if DEVICE == "cuda" else "100")))
@given(cases())
def test_any_shape_and_plan(case):
    spec, (batch, _, height, width), values, (memory_format, cropped), dtype, seed = case
    weights = weights_of(spec, seed=seed, expand_bias=seed % 20)
    x = random_input(spec, batch, (height + 2, width + 1), dtype=dtype, memory_format=memory_format, seed=seed)
    x = x[:, :, 1:-1, 1:] if cropped else x[:, :, 2:, 1:].contiguous(memory_format=memory_format)
    y = run(x.to(DEVICE), weights, spec, backend="triton", plan=forced(spec, x, **values))
    assert y.shape == run(x, random_weights(spec), spec, backend="eager").shape
    if batch:
        within(y, x.to(DEVICE), weights, spec)


@kernel
@pytest.mark.parametrize("channels", [(200, 210, 33), (17, 40, 700), (330, 64, 16)], ids=str)
def test_many_channels(channels):
    """More than one product takes: of the input in turn, of the output by several programs."""
    spec = BlockSpec(*channels)
    x = random_input(spec, 1, (3, 4), dtype=torch.float16)
    plan = triton_plan(spec, x.shape, tile_rows=1, tile_cols=2, group=64, splits=1)
    assert plan.out_tiles * plan.out_tile >= 700 or channels[2] < 700
    check(x, weights_of(spec), spec, plan=plan)
    check(x.float(), weights_of(spec), spec)  # exact float32 never keeps x


@kernel
@pytest.mark.parametrize("spec", PADDING_SPECS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5)])
def test_padding_is_of_the_expanded_tensor(spec, size):
    check(random_input(spec, 2, size), weights_of(spec, expand_bias=50), spec)


@kernel
@by_dtype
@pytest.mark.parametrize("splits", [1, 3])
def test_residual_adds_x_itself(dtype, splits):
    spec = BlockSpec(20, 120, 20, residual=True)
    nothing = weights_of(spec)._replace(
        w_project=torch.zeros(20, 120, 1, 1, device=DEVICE), b_project=torch.zeros(20, device=DEVICE)
    )
    x = (random_input(spec, 2, (5, 6), dtype=dtype) * 100).to(DEVICE)
    assert torch.equal(run(x, nothing, spec, backend="triton", plan=forced(spec, x, group=32, splits=splits)), x)


@kernel
@pytest.mark.parametrize("spec", DETERMINISM_SPECS, ids=str)
def test_every_run_gives_the_same_bits(spec):
    x, packed = random_input(spec, 2, (6, 5)).to(DEVICE), pack(weights_of(spec), backend="triton")
    plan = forced(spec, x, group=16, splits=min(3, -(-spec.hidden_channels // 16)))
    results = [run(x, packed, spec, backend="triton", plan=plan) for _ in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)
    within(results[0], x, weights_of(spec), spec)


@kernel
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    for spec in SPECS:
        check(view(), weights_of(spec), spec)


@kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    for spec in SPECS:
        x = random_input(spec, 2, size, dtype=torch.float16)
        check(x, weights_of(spec), spec, plan=forced(spec, x))


@kernel
@by_dtype
@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty_batch(dtype, memory_format):
    for spec in SPECS:
        x = torch.empty(0, 8, 9, 7, dtype=dtype, device=DEVICE).to(memory_format=memory_format)
        y = run(x, weights_of(spec), spec, backend="triton")
        assert (y.shape, y.dtype) == (run(x, weights_of(spec), spec, backend="eager").shape, dtype)


@kernel
@by_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_finite_values_spread_as_in_eager(value, spec, dtype):
    for where in ((0, 0, 0, 0), (0, 3, 4, 4), (1, 7, 6, 7)):
        x = random_input(spec, 2, (7, 8), dtype=dtype).to(DEVICE)
        x[where] = value
        y = run(x, weights_of(spec), spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=2))
        expected = run(x, weights_of(spec), spec, backend="eager")
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w_expand", "b_expand", "b_depthwise", "w_project", "b_project"])
def test_a_non_finite_weight_spreads_as_in_eager(name, value):
    """Also at the border, where no product may make a NaN of padding times infinity."""
    spec = SPECS[0]
    x, weights = random_input(spec, 1, (6, 6)).to(DEVICE), weights_of(spec, dtype=torch.float32)
    getattr(weights, name).view(-1)[5] = value
    y = run(x, weights, spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=2))
    expected = run(x, weights, spec, backend="eager")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@kernel
def test_offsets_beyond_2_31_elements(monkeypatch):
    """Two images 2^31 elements apart; no page between them is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        memory = torch.empty(2**31 + 8 * 81, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this system does not lend 4 GiB of untouched memory")
    x = memory.as_strided((2, 8, 9, 9), (2**31, 1, 72, 8))
    x.copy_(random_input(SPECS[0], 2, (9, 9)))
    for spec in SPECS:
        check(x, weights_of(spec), spec, plan=forced(spec, x))


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
    "second clamp": ("result = activate(sums[o], ACTIVATION)", "result = sums[o]"),
}  # fmt: skip


def mutated(tmp_path, original, replacement):
    """The kernels' module with one line of its source, or of the parts', changed."""
    folder = Path(mnv2_fused.__file__).parent / "triton_backend"
    sources = {name: (folder / f"{name}.py").read_text() for name in ("parts", "kernels")}
    assert sum(source.count(original) for source in sources.values()) == 1, original
    for name, source in sources.items():
        changed = tmp_path / f"{name}.py"
        source = source.replace("from .parts import", "from .mutated_parts import")
        changed.write_text(source.replace(original, replacement))
        found = importlib.util.spec_from_file_location(f"mnv2_fused.triton_backend.mutated_{name}", changed)
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # where the kernels look for the parts
        found.loader.exec_module(module)
    return module


@kernel
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from mnv2_fused.triton_backend import launch as triton_launch

    spec = BlockSpec(8, 48, 8, residual=True)
    x, weights = random_input(spec, 2, (6, 6)).to(DEVICE), weights_of(spec, expand_bias=5)
    plan = forced(spec, x, tile_rows=2, tile_cols=2)

    def verdict():
        return block_agreement(run(x, weights, spec, backend="triton", plan=plan), x, weights, spec).ok

    assert verdict()
    broken = mutated(tmp_path, *MUTATIONS[name])
    monkeypatch.setattr(triton_launch, "inverted_residual_kernel", broken.inverted_residual_kernel)
    assert not verdict()


@kernel
def test_infinite_input_shows_unmasked_padding_channels(tmp_path, monkeypatch):
    from mnv2_fused.triton_backend import launch as triton_launch

    spec = SPECS[1]  # 50 channels: 14 of the last group are padding
    x, weights = random_input(spec, 1, (5, 5)).to(DEVICE), weights_of(spec)
    x[0, 0, 2, 2] = float("inf")
    plan = forced(spec, x, group=64)
    expected = run(x, weights, spec, backend="eager").isnan()
    assert torch.equal(run(x, weights, spec, backend="triton", plan=plan).isnan(), expected)
    broken = mutated(tmp_path, "result = tl.where(exists[None, :], result, 0.0)", "pass")
    monkeypatch.setattr(triton_launch, "inverted_residual_kernel", broken.inverted_residual_kernel)
    assert not torch.equal(run(x, weights, spec, backend="triton", plan=plan).isnan(), expected)
