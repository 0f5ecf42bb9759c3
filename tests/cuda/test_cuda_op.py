"""The CUDA kernel's op beside the kernel: packing, build, choice of backend, reasons; on a GPU what it computes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from support.blocks import (
    DETERMINISM_SPECS,
    GENERAL_SPECS,
    NUMBERED_BLOCKS,
    PADDING_SPECS,
    SMALL_SPECS,
    by_small_spec,
    every_pair,
    gpu_cases,
    spec_of,
)
from support.checks import check, run, within
from support.devices import NO_CUDA, cuda_kernel, weights_on
from support.inputs import GPU_DTYPES, MEMORY_FORMATS, SIZES, VIEWS, by_gpu_dtype, layouts, random_input
from support.source_tree import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from mnv2_fused import (
    BlockSpec,
    FusedInvertedResidual,
    PackedWeights,
    backends,
    cuda_plan,
    fold,
    inverted_residual,
    pack,
)
from mnv2_fused import inverted_residual_reference as reference
from mnv2_fused.gpus import Gpu
from mnv2_fused.testing import random_weights

op = torch.ops.mnv2_fused.inverted_residual_cuda

PACKED_SPECS = [
    BlockSpec(5, 37, 7),
    BlockSpec(16, 96, 24, stride=2),
    BlockSpec(20, 20, 33, expand=False),
    BlockSpec(1, 1, 1, residual=True),
    BlockSpec(48, 33, 48, residual=True),
    BlockSpec(5, 37, 7, kernel=5, activation="silu"),
    BlockSpec(20, 70, 7, activation="relu", squeeze_channels=21),
]
by_packed_spec = pytest.mark.parametrize("spec", PACKED_SPECS, ids=str)


@by_packed_spec
@pytest.mark.parametrize("dtype", [*GPU_DTYPES, torch.float64], ids=str)
def test_unpack_gives_back_what_was_packed(spec, dtype):
    weights = random_weights(spec, dtype=dtype)
    packed = pack(weights, dtype, "cuda")
    assert all(t is None or t.is_contiguous() for t in packed)
    found = fold.unpack(packed)
    for name, a, b in zip(weights._fields, found, weights, strict=True):
        assert (a is None and b is None) or torch.equal(a.to(dtype), b), name
    assert BlockSpec.of(packed, **spec.geometry) == spec
    x = torch.randn(1, spec.in_channels, 3, 4).to(dtype)
    assert torch.equal(reference(x, packed, **spec.geometry), reference(x, weights, **spec.geometry))


@by_packed_spec
@by_gpu_dtype
def test_a_lane_finds_its_weights(spec, dtype):
    """The layout once more, element by element, as fold's docstring gives it; zeros where there is no channel."""
    weights = random_weights(spec, dtype=dtype)
    packed = pack(weights, dtype, "cuda")
    # [E/16, C_in/16, 256] of [E, C_in], and [E/16, C_out/16, 256] of [C_out, E].
    for found, weight in (packed.w_expand, weights.w_expand), (packed.w_project.transpose(0, 1), weights.w_project):
        if found is None:
            continue
        rows, columns = found.shape[:2]
        whole = torch.zeros(16 * rows, 16 * columns, dtype=dtype)
        whole[: weight.shape[0], : weight.shape[1]] = weight[:, :, 0, 0]
        for n in range(rows):
            for k in range(columns):
                tile = whole[16 * n : 16 * n + 16, 16 * k : 16 * k + 16]
                for lane in range(32):
                    g, t = divmod(lane, 4)
                    for j in range(2):
                        first = 8 * lane + 4 * j if dtype.itemsize == 2 else 128 * j + 4 * lane
                        row = 4 * (g // 2) + 2 * j + g % 2
                        assert torch.equal(found[n, k, first : first + 4], tile[row, 4 * t : 4 * t + 4])
    hidden = spec.hidden_channels
    assert packed.b_depthwise.shape == (hidden + 16,) and not packed.b_depthwise[hidden:].any()
    assert not spec.expand or not packed.b_expand[hidden:].any()
    assert packed.w_depthwise.dtype == packed.b_project.dtype == torch.float32


@by_packed_spec
@pytest.mark.parametrize("to", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_fragments_change_their_dtype_and_order(spec, dtype, to):
    weights = random_weights(spec, dtype=dtype)
    rounded = weights._replace(w_project=weights.w_project.to(to))
    found = fold.cast_product(pack(weights, dtype, "cuda").w_project, to)
    assert torch.equal(found, pack(rounded, to, "cuda").w_project)


@pytest.mark.parametrize("spec", [BlockSpec(2, 5, 3), BlockSpec(3, 3, 2, expand=False)], ids=str)
def test_packing_is_differentiable(spec):
    present = [t for t in random_weights(spec) if t is not None]

    def packed(*tensors):
        given = tensors if spec.expand else (None, None, *tensors)
        return pack(fold.BlockWeights(*given), torch.float64, "cuda")

    def both_ways(*tensors):
        return [t for t in packed(*tensors) if t is not None] + [
            t for t in fold.unpack(packed(*tensors)) if t is not None
        ]

    assert torch.autograd.gradcheck(both_ways, [t.requires_grad_() for t in present], fast_mode=True)


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("w_expand", (3, 2, 256), r"w_expand must be \[3, 1, 256\], got \[3, 2, 256\]"),
        ("b_expand", (48 + 17,), r"w_expand must be \[3, 2, 256\], got \[3, 1, 256\]"),
        ("b_depthwise", (48,), r"w_expand must be \[2, 1, 256\], got \[3, 1, 256\]"),
        ("w_project", (3, 3, 256), r"w_project must be \[3, 1, 256\]"),
        ("w_depthwise", (3, 9), "w_depthwise must have 3 dimensions"),
    ],
)
def test_packed_weights_that_disagree(field, shape, message):
    spec = BlockSpec(5, 37, 7)
    packed = pack(random_weights(spec), torch.float16, "cuda")._replace(**{field: torch.zeros(shape)})
    with pytest.raises(ValueError, match=message):
        BlockSpec.of(packed)


def test_weights_for_another_backend_are_named():
    x, weights = torch.randn(1, 8, 5, 4), random_weights(SMALL_SPECS[0], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"packed for another backend than 'cpu'.*mnv2_fused.pack\(.*'cpu'\)"):
        inverted_residual(x, pack(weights, backend="cuda"))
    with pytest.raises(ValueError, match="must have 8 channels, got 9"):
        inverted_residual(torch.randn(1, 9, 5, 4), pack(weights, backend="cuda"))


@by_small_spec
@by_gpu_dtype
def test_fake_strides_are_those_of_the_cpu_op(spec, dtype):
    """On fakes of a GPU's tensors, of which none need be here; what the kernel gives is compared in test_gpu_op."""
    packed = pack(random_weights(spec), dtype, "cuda")
    on_cpu = pack(random_weights(spec), dtype)
    for n, h, w in [(2, 3, 4), (1, 1, 1), (0, 3, 3)]:
        for name, x in layouts(n, 8, h, w, dtype):
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake_x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda")
                there = [None if t is None else torch.empty_like(t, device="cuda") for t in packed]
                y = op(fake_x, *there, spec.stride, spec.residual, [], True)
            expected = torch.ops.mnv2_fused.inverted_residual(x, *on_cpu, spec.stride, spec.residual)
            assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype), name
            assert y.device.type == "cuda"


@by_small_spec
def test_gradients_have_the_packed_shapes(spec):
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 4, device="meta", dtype=torch.float16, requires_grad=True)
        weights = random_weights(spec)
        weights = weights._make(None if t is None else t.to("meta") for t in weights)
        packed = PackedWeights(*(None if t is None else t.requires_grad_() for t in pack(weights, x.dtype, "cuda")))
        present = [t for t in (x, *packed) if t is not None]
        y = op(x, *packed, spec.stride, spec.residual)
        for t, g in zip(present, torch.autograd.grad(y, present, torch.empty_like(y)), strict=True):
            assert (g.shape, g.dtype, g.stride()) == (t.shape, t.dtype, t.stride())


# What setup.py decides.

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@pytest.fixture(scope="module")
def setup_py():
    """The names of setup.py, which builds nothing when it is not the main program."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@needs_source
def test_what_is_built(setup_py):
    def why(choice, torch_cuda, release):
        toolkit = release and setup_py.Toolkit("/opt/cuda/bin/nvcc", release, [], [])
        return setup_py.why_no_cuda(choice, torch_cuda, toolkit)

    for choice in ("", "1"):
        assert why(choice, "13.0", (13, 0)) is None
        assert why(choice, "12.6", (12, 8)) is None
    assert why("0", "13.0", (13, 0)) == "MNV2_FUSED_CUDA=0"
    lacking = [
        (None, None, "has no CUDA: install a CUDA build of torch"),
        ("13.0", None, "no nvcc was found: install the CUDA toolkit 13.0 and set CUDA_HOME"),
        ("13.0", (12, 8), "/opt/cuda/bin/nvcc is of CUDA 12.8 and torch of 13.0"),
    ]
    for torch_cuda, release, message in lacking:
        assert message in why("", torch_cuda, release)
        with pytest.raises(SystemExit, match="MNV2_FUSED_CUDA=1, but ") as left:
            why("1", torch_cuda, release)
        assert message in str(left.value)
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        why("yes", "13.0", (13, 0))


@needs_source
def test_default_architectures_are_those_the_toolkit_has(setup_py):
    assert setup_py.default_architectures((13, 0)) == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert setup_py.default_architectures((12, 8)) == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert setup_py.default_architectures((12, 6)) == "7.5;8.0;8.6;8.9;9.0+PTX"


@needs_source
def test_a_toolkit_is_asked_for_its_folders(setup_py, tmp_path, monkeypatch):
    """Also through a script that stands on the path in its place."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert setup_py.find_toolkit(None) is None or "nvcc" in setup_py.find_toolkit(None).nvcc
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo "Cuda compilation tools, release 12.8, V12.8.61";;\n'
        "*) echo '#$ INCLUDES=\"-I/real/include\"' >&2\n"
        'echo \'#$ LIBRARIES=  "-L/real/lib/stubs" "-L/real/lib"\' >&2;; esac\n'
    )
    nvcc.chmod(0o755)
    expected = (str(nvcc), (12, 8), ["/real/include"], ["/real/lib"])
    for home in (None, str(tmp_path), "/no/such/folder"):
        assert tuple(setup_py.find_toolkit(home)) == expected
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert setup_py.find_toolkit(str(tmp_path)) is None


@pytest.mark.slow
@needs_source
def test_requiring_it_without_a_toolkit_stops_the_build(tmp_path):
    pytest.importorskip("pybind11", reason="setup.py needs it, the installed wheel does not")
    environment = os.environ | {"MNV2_FUSED_CUDA": "1", "CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode != 0 and "MNV2_FUSED_CUDA=1, but " in ran.stderr


# What was built, and what can run.


@pytest.mark.slow
def test_import_needs_no_driver():
    """The library asks for CUDA's runtime, the one torch brings, and for no driver."""
    if backends._cuda is None:
        assert backends._cuda_error and backends._cuda_error == NO_CUDA
        return
    library = Path(backends._cuda.__file__).read_bytes()
    assert b"libcudart.so" in library and b"libcuda.so" not in library
    code = "import mnv2_fused; print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libcudart' in line})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(ran.stdout.split()) == 1, ran.stdout + ran.stderr
    assert backends._cuda.architectures.startswith(("sm_", "compute_")) and backends._cuda.toolkit >= 12000


@pytest.mark.slow
def test_a_library_that_does_not_load_costs_only_its_backend():
    code = (
        "import sys, torch; sys.modules['mnv2_fused._cuda'] = None\n"
        "import mnv2_fused; from mnv2_fused import backends\n"
        "if backends._C.no_cuda is None: assert 'does not load with torch' in backends.backend_reasons()['cuda']\n"
        "else: assert backends.backend_reasons()['cuda'] == 'it was not built: ' + backends._C.no_cuda\n"
        "from mnv2_fused.testing import random_weights\n"
        "weights = random_weights(mnv2_fused.BlockSpec(4, 24, 4))\n"
        "assert mnv2_fused.inverted_residual(torch.randn(1, 4, 5, 5), weights).shape == (1, 4, 5, 5)\n"
        "from mnv2_fused.__main__ import main; sys.exit(main(['info']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "CUDA kernel       none: it " in ran.stdout and "backend cuda      cannot run: it " in ran.stdout


@pytest.mark.skipif(NO_CUDA is None, reason="the CUDA kernel runs here")
def test_where_it_cannot_run_it_says_why():
    weights, x = random_weights(SMALL_SPECS[0]), torch.randn(1, 8, 5, 4)
    with pytest.raises(RuntimeError, match=r"backend='cuda'\): cuda: .+; move .*backend='(eager|auto)'"):
        inverted_residual(x, weights, backend="cuda")
    with pytest.raises(RuntimeError, match="cuda: "):
        FusedInvertedResidual(8, 8, 1, 6, backend="cuda").eval()(x)


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_90", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_90a", [(9, 0)], [(10, 0)]),
        ("sm_75 sm_100 compute_100", [(7, 5), (10, 0), (10, 3), (12, 0)], [(8, 0), (9, 0)]),
        ("sm_120 compute_120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_code_runs_on_its_generation_and_ptx_on_later_ones(architectures, runs, does_not):
    assert all(backends.runs_on(architectures, c) for c in runs)
    assert not any(backends.runs_on(architectures, c) for c in does_not)


@pytest.fixture
def made_up_gpu(monkeypatch):
    """A GPU of a given capability, and a library built for given architectures, as far as choosing goes."""

    def make(capability, architectures="sm_75 sm_80 sm_90"):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a made-up GPU")
        monkeypatch.setattr(backends, "_cuda", SimpleNamespace(architectures=architectures))
        monkeypatch.setattr(backends, "_cuda_error", None)
        monkeypatch.setattr(
            backends, "_triton_reason", lambda device: None if capability >= (8, 0) else "it needs more"
        )
        backends._cuda_reason_here.cache_clear()
        return torch.device("cuda")

    yield make
    backends._cuda_reason_here.cache_clear()


def test_auto_is_the_cuda_kernel_then_triton(made_up_gpu, monkeypatch):
    device = made_up_gpu((9, 0))
    assert backends.resolve_backend("auto", device) == backends.gpu_backend(device) == "cuda"
    assert backends.resolve_backend("triton", device) == "triton"
    assert backends.resolve_backend("auto", torch.device("cpu")) == "cpu"
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "triton")
    assert backends.resolve_backend("auto", device) == backends.gpu_backend(device) == "triton"
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert backends.gpu_backend(device) == "cuda"
    monkeypatch.delenv("MNV2_FUSED_BACKEND")
    device = made_up_gpu((8, 0), "sm_90")
    why = backends.backend_reasons(device)["cuda"]
    assert "built for sm_90, a made-up GPU has compute capability 8.0" in why and "TORCH_CUDA_ARCH_LIST=8.0" in why
    assert backends.resolve_backend("auto", device) == backends.gpu_backend(device) == "triton"
    with pytest.raises(RuntimeError, match="cuda: it was built for sm_90"):
        backends.resolve_backend("cuda", device)


def test_old_gpus_are_named(made_up_gpu):
    device = made_up_gpu((7, 5))
    assert backends.resolve_backend("auto", device) == "cuda"
    device = made_up_gpu((7, 0))
    with pytest.raises(RuntimeError, match=r"cuda: it needs compute capability 7.5, a made-up GPU has 7.0; triton: it"):
        backends.resolve_backend("auto", device)
    assert backends.gpu_backend(device) == "triton"


def test_no_gpu_or_tensors_elsewhere(made_up_gpu, monkeypatch):
    device = made_up_gpu((9, 0))
    assert backends.backend_reasons(torch.device("cpu"))["cuda"] == "it takes CUDA tensors, got one on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.backend_reasons(device)["cuda"] == "there is no CUDA GPU here"
    monkeypatch.setattr(torch.version, "cuda", None)
    backends._cuda_reason_here.cache_clear()
    assert backends.backend_reasons(device)["cuda"].endswith("is built without CUDA")


def test_tf32_follows_torch():
    cudnn = torch.backends.cudnn
    before, conv = cudnn.allow_tf32, cudnn.conv.fp32_precision
    try:
        for allowed in (True, False):
            cudnn.allow_tf32 = allowed
            assert backends.tf32_allowed() == allowed
        cudnn.allow_tf32 = True
        for precision in ("ieee", "tf32"):  # torch's own allow_tf32 refuses to answer in one of these
            cudnn.conv.fp32_precision = precision
            assert backends.tf32_allowed() == (precision == "tf32")
    finally:
        cudnn.conv.fp32_precision = conv
        cudnn.allow_tf32 = before


# On a GPU.


def forced(spec, x, group=16, splits=1):
    """The planner's plan with another group and number of splits."""
    gpu = Gpu.of(x.device)
    *plan, _, _ = cuda_plan(spec, x.shape, dtype=x.dtype, gpu=gpu).forced()
    return cuda_plan(spec, x.shape, dtype=x.dtype, gpu=gpu, forced=[*plan, group, splits])


poisoned = pytest.mark.usefixtures("poison")


@cuda_kernel
@poisoned
@by_gpu_dtype
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize(("spec", "size"), [block for _, block in NUMBERED_BLOCKS], ids=str)
def test_mobilenet_v2(spec, size, memory_format, dtype):
    x = random_input(spec, 2, size, dtype=dtype, memory_format=memory_format)
    y = check(x, weights_on("cuda", spec), spec, backend="cuda")
    assert y.is_contiguous(memory_format=memory_format)


@cuda_kernel
@poisoned
@pytest.mark.parametrize(("spec", "size"), [block for _, block in NUMBERED_BLOCKS], ids=str)
def test_tf32_is_as_good_as_float16(spec, size, monkeypatch):
    """Its products have as many bits. Where torch does not allow it, the same call is exact."""
    x, weights = random_input(spec, 2, size).cuda(), weights_on("cuda", spec)
    exact = check(x, weights, spec, backend="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    y = run(x, weights, spec, backend="cuda")
    within(y.half(), x.half(), weights, spec)
    assert torch.equal(y, exact) == (torch.cuda.get_device_capability() < (8, 0))


@cuda_kernel
@poisoned
@given(gpu_cases())
def test_any_shape_group_and_splits(case):
    spec, (batch, _, height, width), values, (memory_format, cropped), dtype, seed = case
    weights = weights_on("cuda", spec, seed=seed, expand_bias=seed % 20)
    x = random_input(spec, batch, (height + 2, width + 1), dtype=dtype, memory_format=memory_format, seed=seed)
    x = x[:, :, 1:-1, 1:] if cropped else x[:, :, 2:, 1:].contiguous(memory_format=memory_format)
    x = x.cuda()
    most = -(-spec.hidden_channels // 16)
    splits = values["splits"] if most % values["splits"] == 0 else 1
    y = run(x, weights, spec, backend="cuda", plan=forced(spec, x, splits=splits) if batch else None)
    assert y.shape == reference(x, weights, stride=spec.stride, residual=spec.residual).shape
    if batch:
        within(y, x, weights, spec)


# Beyond MobileNetV2's block.


@cuda_kernel
@poisoned
@pytest.mark.parametrize("case", every_pair(), ids=lambda case: "")
def test_every_pair_of_options(case, monkeypatch):
    spec = spec_of(**case)
    x, weights = random_input(spec, 2, (5, 7), dtype=case["dtype"]), weights_on("cuda", spec, expand_bias=3)
    check(x, weights, spec, backend="cuda")
    splits = -(-spec.hidden_channels // 16)
    check(x, weights, spec, backend="cuda", plan=forced(spec, x.cuda(), splits=splits))
    if case["dtype"] == torch.float32:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        y = inverted_residual(x.cuda(), weights, backend="cuda", **spec.geometry)
        within(y.half(), x.cuda().half(), weights, spec)


@cuda_kernel
@poisoned
@by_gpu_dtype
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
@pytest.mark.parametrize("size", [(2, 9), (31, 30), (112, 90)], ids=str)
def test_general_blocks(spec, size, dtype):
    check(random_input(spec, 2, size, dtype=dtype), weights_on("cuda", spec), spec, backend="cuda")


@cuda_kernel
@poisoned
@by_gpu_dtype
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("out_channels", [64, 160, 170])
def test_every_general_variant(out_channels, kernel_size, dtype):
    for stride, squeeze in ((1, 0), (2, 24), (1, 24), (2, 0)):
        spec = BlockSpec(
            *(40, 240, out_channels, stride), kernel=kernel_size, activation="hardswish", squeeze_channels=squeeze
        )
        check(random_input(spec, 2, (14, 13), dtype=dtype), weights_on("cuda", spec), spec, backend="cuda")


@cuda_kernel
@poisoned
@pytest.mark.parametrize("spec", GENERAL_SPECS[:2], ids=str)
def test_every_run_of_a_squeeze_and_excite_gives_the_same_bits(spec):
    x, packed = random_input(spec, 2, (28, 29)).cuda(), pack(weights_on("cuda", spec), backend="cuda")
    results = [inverted_residual(x, packed, backend="cuda", **spec.geometry) for _ in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)


@cuda_kernel
@poisoned
@by_gpu_dtype
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_in_general_blocks_as_in_eager(value, spec, dtype):
    x = random_input(spec, 2, (5, 6), dtype=dtype).cuda()
    x[0, 0, 0, 0] = x[0, 7, 4, 5] = value
    y = inverted_residual(x, weights_on("cuda", spec), backend="cuda", **spec.geometry)
    expected = reference(x, weights_on("cuda", spec), **spec.geometry)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@cuda_kernel
@poisoned
@pytest.mark.parametrize("channels", [(200, 210, 33), (17, 40, 700), (330, 64, 16)], ids=str)
def test_many_channels(channels):
    spec = BlockSpec(*channels)
    for dtype in GPU_DTYPES:
        check(random_input(spec, 1, (3, 4), dtype=dtype), weights_on("cuda", spec), spec, backend="cuda")


@cuda_kernel
@poisoned
@pytest.mark.parametrize("spec", PADDING_SPECS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5)])
def test_padding_is_of_the_expanded_tensor(spec, size):
    check(random_input(spec, 2, size), weights_on("cuda", spec, expand_bias=50), spec, backend="cuda")


@cuda_kernel
@poisoned
@by_gpu_dtype
@pytest.mark.parametrize("splits", [1, 4])
def test_residual_adds_x_itself(dtype, splits):
    spec = BlockSpec(20, 120, 20, residual=True)
    nothing = weights_on("cuda", spec)._replace(
        w_project=torch.zeros(20, 120, 1, 1, device="cuda"), b_project=torch.zeros(20, device="cuda")
    )
    x = (random_input(spec, 2, (5, 6), dtype=dtype) * 100).cuda()
    assert torch.equal(run(x, nothing, spec, backend="cuda", plan=forced(spec, x, splits=splits)), x)


@cuda_kernel
@poisoned
@pytest.mark.parametrize("spec", DETERMINISM_SPECS, ids=str)
def test_every_run_gives_the_same_bits(spec):
    x, packed = random_input(spec, 2, (6, 5)).cuda(), pack(weights_on("cuda", spec), backend="cuda")
    plan = forced(spec, x, splits=2 if spec.hidden_channels > 16 else 1)
    results = [run(x, packed, spec, backend="cuda", plan=plan) for _ in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)
    within(results[0], x, weights_on("cuda", spec), spec)


@cuda_kernel
@poisoned
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    for spec in SMALL_SPECS:
        check(view(), weights_on("cuda", spec), spec, backend="cuda")
        check(view().half(), weights_on("cuda", spec), spec, backend="cuda")


@cuda_kernel
@poisoned
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    for spec in SMALL_SPECS:
        check(random_input(spec, 2, size, dtype=torch.float16), weights_on("cuda", spec), spec, backend="cuda")


@cuda_kernel
@by_gpu_dtype
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_empty_batch(dtype, memory_format):
    for spec in SMALL_SPECS:
        x = torch.empty(0, 8, 9, 7, dtype=dtype, device="cuda").to(memory_format=memory_format)
        y = run(x, weights_on("cuda", spec), spec, backend="cuda")
        assert (y.shape, y.dtype) == (run(x, weights_on("cuda", spec), spec, backend="eager").shape, dtype)


@cuda_kernel
@poisoned
@by_small_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
@by_gpu_dtype
def test_non_finite_values_spread_as_in_eager(value, spec, dtype):
    for where in ((0, 0, 0, 0), (0, 3, 4, 4), (1, 7, 6, 7)):
        x = random_input(spec, 2, (7, 8), dtype=dtype).cuda()
        x[where] = value
        y = run(x, weights_on("cuda", spec), spec, backend="cuda")
        expected = run(x, weights_on("cuda", spec), spec, backend="eager")
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@cuda_kernel
def test_misaligned_weights_are_named():
    spec, x = SMALL_SPECS[0], random_input(SMALL_SPECS[0], 1, (5, 4), dtype=torch.float16).cuda()
    packed = pack(weights_on("cuda", spec), torch.float16, "cuda")
    moved = torch.cat([packed.w_project.new_zeros(1), packed.w_project.flatten()])[1:].view(packed.w_project.shape)
    with pytest.raises(RuntimeError, match=r"w_project must start at a multiple of 16 bytes; clone\(\) it"):
        run(x, packed._replace(w_project=moved), spec, backend="cuda")


@cuda_kernel
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0), reason="needs Turing"
)
def test_bfloat16_is_refused_before_ampere():
    spec = SMALL_SPECS[0]
    with pytest.raises(RuntimeError, match=r"bfloat16 needs compute capability 8\.0"):
        check(random_input(spec, 1, (5, 4), dtype=torch.bfloat16), weights_on("cuda", spec), spec, backend="cuda")
