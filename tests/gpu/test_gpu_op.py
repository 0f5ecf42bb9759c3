"""The GPU kernels' ops as torch and the modules see them: gradients, autocast, graphs, fuse, streams, devices."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from support.blocks import SMALL_SPECS
from support.devices import (
    DEVICE,
    NO_CUDA_THERE,
    NO_TRITON,
    cuda_kernel_there,
    cuda_op_there,
    gpu,
    triton_kernel,
    weights_on,
)
from support.inputs import by_gpu_dtype, layouts
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mnv2_fused
from mnv2_fused import (
    BlockSpec,
    BlockWeights,
    FusedInvertedResidual,
    backends,
    cuda_plan,
    encoding,
    inverted_residual,
    ops,
    pack,
    triton_plan,
)
from mnv2_fused import inverted_residual_reference as reference
from mnv2_fused.gpus import H200, Gpu
from mnv2_fused.module import packed_cache
from mnv2_fused.testing import agreement, perturb_batch_norm, random_weights

OPS = {
    "cuda": torch.ops.mnv2_fused.inverted_residual_cuda,
    "triton": torch.ops.mnv2_fused.inverted_residual_triton,
}
by_backend = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=triton_kernel), pytest.param("cuda", marks=cuda_op_there)]
)
by_kernel = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=triton_kernel), pytest.param("cuda", marks=cuda_kernel_there)]
)


def make_block(backend, inp=8, oup=8, stride=1, expand_ratio=6, dtype=torch.float32):
    block = FusedInvertedResidual(inp, oup, stride, expand_ratio, backend=backend)
    return perturb_batch_norm(block).eval().to(DEVICE, dtype)


def make_x(*shape, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, dtype).to(memory_format=torch.channels_last)


def split_plan(backend, spec, x, splits):
    """A plan whose groups are shared by so many programs or thread blocks."""
    if backend == "triton":
        return triton_plan(spec, x.shape, dtype=x.dtype, tile_rows=2, tile_cols=1, group=16, splits=splits)
    options = {"dtype": x.dtype, "gpu": Gpu.of(x.device) if x.is_cuda else H200}
    *plan, _, _ = cuda_plan(spec, x.shape, **options).forced()
    return cuda_plan(spec, x.shape, **options, forced=[*plan, 16, splits])


def within(fused, block, x):
    """The block's result against its own modules in the same dtype and in float64."""
    wide = copy.deepcopy(block).double()
    found = agreement(fused, block._forward_modules(x), wide._forward_modules(x.double()))
    assert found.ok, found


@by_backend
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=str)
def test_fake_strides_are_the_real_ones(backend, spec):
    packed, seen = pack(weights_on(DEVICE, spec), torch.float16, backend), 0
    for n, h, w in [(2, 3, 4), (1, 1, 1), (0, 3, 3), (2, 4, 1)]:
        for name, x in layouts(n, spec.in_channels, h, w, torch.float16):
            x = x.to(DEVICE) if DEVICE == "cuda" else x
            real = OPS[backend](x, *packed, spec.stride, spec.residual)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = OPS[backend](mode.from_tensor(x), *packed, spec.stride, spec.residual)
            described = [(t.shape, t.stride(), t.dtype, t.device) for t in (real, fake)]
            assert described[0] == described[1], f"{name} {list(x.shape)}"
            seen += 1
    assert seen == 48


@by_backend
def test_opcheck(backend):
    pytest.importorskip("expecttest")  # opcheck imports it
    spec = BlockSpec(4, 24, 4, residual=True)
    packed = [t if t is None else t.requires_grad_() for t in pack(weights_on(DEVICE, spec), torch.float32, backend)]
    x = make_x(2, 4, 4, 3).requires_grad_()
    torch.library.opcheck(OPS[backend].default, (x, *packed, 1, True))
    plan = split_plan(backend, spec, x, 2).forced()
    torch.library.opcheck(OPS[backend].default, (x.detach(), *packed, 1, True, plan))


@by_backend
@by_gpu_dtype
@pytest.mark.parametrize("spec", [BlockSpec(4, 24, 4, residual=True), BlockSpec(5, 5, 3, 2, expand=False)], ids=str)
def test_gradients(backend, spec, dtype):
    # One input for every run: on others half precision may fall to the other side of a corner of ReLU6 than eager.
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(spec)
    x = torch.randn(2, spec.in_channels, 5, 4, dtype=torch.float64, generator=generator)
    geometry = {"stride": spec.stride, "residual": spec.residual}

    def gradients(function, dtype, **options):
        present = [t.to(DEVICE, dtype).requires_grad_() for t in (x, *weights) if t is not None]
        tensors = present[1:] if spec.expand else [None, None, *present[1:]]
        y = function(present[0], BlockWeights(*tensors), **geometry, **options)
        return torch.autograd.grad(y, present, torch.ones_like(y))

    wide, eager = gradients(reference, torch.float64), gradients(reference, dtype)
    for f, e, r in zip(gradients(inverted_residual, dtype, backend=backend), eager, wide, strict=True):
        assert f.dtype == dtype
        found = agreement(f, e, r)
        assert found.ok, found


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=str)
def test_autocast(backend, spec, dtype, x_dtype):
    """The products run in autocast's dtype; a wider x that is added back makes the result as wide as in eager."""
    weights, x = weights_on(DEVICE, spec, dtype=torch.float32), make_x(2, 8, 5, 4, dtype=x_dtype)
    geometry = {"stride": spec.stride, "residual": spec.residual}
    with torch.autocast(DEVICE, dtype=dtype):
        fused = inverted_residual(x, weights, backend=backend, **geometry)
        eager = reference(x, weights, **geometry)
    assert fused.dtype == eager.dtype
    wide = reference(x.double(), weights_on(DEVICE, spec), **geometry)
    found = agreement(fused.to(dtype), eager.to(dtype), wide)
    assert found.ok, found


@by_backend
@by_gpu_dtype
def test_a_block_follows_its_weights(backend, dtype):
    block, x = make_block(backend, dtype=dtype), make_x(2, 8, 5, 4, dtype=dtype)
    changes = [
        lambda: None,
        lambda: block.conv[0][0].weight.mul_(1.5),
        lambda: block.conv[1][1].running_var.mul_(2),
        lambda: block.load_state_dict(perturb_batch_norm(make_block(backend, dtype=dtype), seed=3).state_dict()),
        lambda: setattr(block.conv[3], "eps", 0.5),
    ]
    last = None
    with torch.no_grad():
        for change in changes:
            change()
            y = block(x)
            within(y, block, x)
            assert block._ready.backend == backend and torch.equal(block(x), y)
            assert last is None or not torch.equal(y, last)
            last = y
        block.backend = "eager"
        assert torch.equal(block(x), block._forward_modules(x))


@by_backend
def test_a_block_trains_and_differentiates(backend):
    block, x = make_block(backend), make_x(2, 8, 5, 4).requires_grad_()
    leaves = [x, *block.parameters()]
    found = torch.autograd.grad(block(x).square().sum(), leaves)
    expected = torch.autograd.grad(block._forward_modules(x).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    block.train()
    torch.testing.assert_close(block(x), block._forward_modules(x))


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_block_under_autocast(backend, dtype):
    block, x = make_block(backend), make_x(2, 8, 5, 4)
    wide = copy.deepcopy(block).double()._forward_modules(x.double())
    with torch.no_grad():
        plain = block(x)
        with torch.autocast(DEVICE, dtype=dtype):
            fused, eager = block(x), block._forward_modules(x)
        assert fused.dtype == eager.dtype
        found = agreement(fused.to(dtype), eager.to(dtype), wide)
        assert found.ok, found
        assert torch.equal(block(x), plain), "outside autocast, what it packed there is used"


@by_backend
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("grad", [False, True])
def test_compile(backend, grad):
    block, x = make_block(backend, 8, 7, 2), make_x(2, 8, 5, 4)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), block._forward_modules(x))
        block.conv[0][0].weight.data.mul_(1)
        with torch.no_grad():
            block.conv[0][0].weight.mul_(1.5)
        torch.testing.assert_close(compiled(x), block._forward_modules(x))


@by_backend
@pytest.mark.usefixtures("fresh_graphs")
def test_a_compiled_graph_folds_while_it_is_traced(backend, monkeypatch):
    """Its first run may own the memory of all that it makes, as reduce-overhead's does."""
    folds, original = [], packed_cache.fold_and_pack

    def counted(*arguments):
        folds.append(torch.compiler.is_compiling())
        return original(*arguments)

    monkeypatch.setattr(packed_cache, "fold_and_pack", counted)
    block, x = make_block(backend), make_x(2, 8, 5, 4)
    seen = []

    def traced(module, inputs):
        seen.append(len(folds))
        return module

    compiled = torch.compile(block, fullgraph=True, backend=traced)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), block._forward_modules(x))
    assert seen == [1] and len(folds) == 1


@by_backend
def test_export_round_trip(backend):
    block, x = make_block(backend), make_x(2, 8, 5, 4)
    program = torch.export.export(block, (x,))
    assert f"mnv2_fused.inverted_residual_{backend}" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), block._forward_modules(x))


@by_backend
@pytest.mark.parametrize("how", ["half", "autocast"])
def test_fuse_a_whole_model(backend, how, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    model = perturb_batch_norm(torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)).eval().to(DEVICE)
    wide, x = copy.deepcopy(model).double(), make_x(2, 3, 32, 32)
    if how == "half":
        model, x = model.half(), x.half()
    fused = mnv2_fused.fuse(model, backend=backend, strict=True)
    assert {b.backend for b in mnv2_fused.report(fused).blocks} == {backend}
    assert not mnv2_fused.report(fused).layers
    calls, original, in_a_row = [], ops.packed_inverted_residual, ops.sequence

    def counted(*args, **options):
        calls.append(options["backend"])
        return original(*args, **options)

    def all_counted(x, weights, geometry, backend):
        calls.extend([backend] * len([*encoding.split_layers(geometry)]))
        return in_a_row(x, weights, geometry, backend)

    monkeypatch.setattr(ops, "packed_inverted_residual", counted)
    monkeypatch.setattr(ops, "sequence", all_counted)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.float16, enabled=how == "autocast"):
        y, expected = fused(x), model(x)
    assert calls == [backend] * 17
    assert y.dtype == expected.dtype
    with torch.no_grad():
        found = agreement(y.half(), expected.half(), wide(x.double()))
    assert found.ok, found


@by_backend
def test_the_environment_chooses(backend, monkeypatch):
    block, x = make_block(backend), make_x(1, 8, 5, 4)
    block.backend = "auto"
    monkeypatch.setenv("MNV2_FUSED_BACKEND", backend)
    with torch.no_grad():
        block(x)
        assert block._ready.backend == backend


@by_kernel
def test_bad_input(backend):
    spec, x = SMALL_SPECS[0], make_x(1, 8, 5, 4)
    weights = weights_on(DEVICE, spec)
    packed = pack(weights, torch.float32, backend)

    def fails(error, match, *args, **options):
        with pytest.raises(error, match=match):
            inverted_residual(*args, backend=backend, **options)

    fails((TypeError, RuntimeError), "float64.*backend='eager'", x.double(), weights)
    fails((RuntimeError, ValueError), r"w_expand must be (torch\.)?float16.*pack", x.half(), packed)
    fails(ValueError, "must have 8 channels, got 3", make_x(1, 3, 5, 4), weights)
    made = f"takes one of mnv2_fused.{backend}_plan, got a Plan"
    fails(ValueError, made, x, packed, plan=mnv2_fused.plan(spec, x.shape))
    fails(
        ValueError,
        "packed for another backend than",
        x,
        pack(weights, torch.float32, {"cuda": "triton"}.get(backend, "cuda")),
    )
    fails(RuntimeError, "meta", x, packed._replace(w_project=packed.w_project.to("meta")))
    fails(RuntimeError, "b_expand must be contiguous", x, packed._replace(b_expand=packed.b_expand.repeat(2)[::2]))
    fails(ValueError, "stride must be 1 or 2, got 3", x, weights, stride=3)
    with pytest.raises((RuntimeError, ValueError), match=r"plan:? must be .*got 2 values"):
        OPS[backend](x, *packed, 1, True, [1, 2])
    group = {
        "cuda": ([1, 5, 4, 2, 24, 1], "group must be a multiple of 16, got 24"),
        "triton": ([1, 1, 16, 48, 1, 4, 1], "group must be a power of two, 16 to 256, got 48"),
    }
    with pytest.raises((RuntimeError, ValueError), match=group[backend][1]):
        OPS[backend](x, *packed, 1, True, group[backend][0])
    with pytest.raises((RuntimeError, ValueError), match=r"\[N, C_in, H, W\]"):
        OPS[backend](x[0], *packed, 1, True)
    with pytest.raises(RuntimeError, match="w_expand and b_expand must both"):
        OPS[backend](x, None, *packed[1:], 1, True)


@pytest.mark.skipif(NO_TRITON is None, reason="Triton runs here")
def test_where_it_cannot_run_it_says_why():
    weights, x = random_weights(SMALL_SPECS[0]), torch.randn(1, 8, 5, 4)
    with pytest.raises(RuntimeError, match=r"backend='triton'\): triton: .+; move .*backend='(eager|auto)'"):
        inverted_residual(x, weights, backend="triton")
    with pytest.raises(RuntimeError, match="triton"):
        FusedInvertedResidual(8, 8, 1, 6, backend="triton").eval()(x)


@pytest.mark.slow
def test_info_tells():
    ran = subprocess.run([sys.executable, "-m", "mnv2_fused", "info"], capture_output=True, text=True)
    assert "backend triton" in ran.stdout and "backend cuda" in ran.stdout and "CUDA kernel" in ran.stdout


def test_import_leaves_the_kernel_alone():
    """Importing triton takes its time, and decides whether it interprets."""
    code = "import sys, mnv2_fused; assert 'mnv2_fused.triton_backend.kernels' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@gpu
def test_gpu_auto_is_cuda_where_it_runs():
    assert backends.resolve_backend("auto", torch.device("cuda")) == ("cuda" if NO_CUDA_THERE is None else "triton")


@gpu
@by_kernel
def test_gpu_graph_capture_replays(backend):
    spec = BlockSpec(64, 384, 64, residual=True)
    x, packed = make_x(1, 64, 14, 14, dtype=torch.float16), pack(weights_on(DEVICE, spec), torch.float16, backend)
    plan = split_plan(backend, spec, x, 4)  # both kernels
    call = lambda: inverted_residual(x, packed, residual=True, backend=backend, plan=plan)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, call())


@gpu
@by_kernel
def test_gpu_reduce_overhead(backend):
    model = nn.Sequential(make_block(backend), make_block(backend, 8, 7, 2)).half()
    compiled, x = torch.compile(model, mode="reduce-overhead", fullgraph=True), make_x(2, 8, 9, 9, dtype=torch.float16)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(compiled(x).clone(), model(x))
        model[0].conv[0][0].weight.mul_(2)
        torch.compiler.reset()  # its graphs keep the weights of their capture
        for _ in range(3):
            assert torch.equal(compiled(x).clone(), model(x))


@gpu
@by_kernel
def test_gpu_runs_on_the_current_stream(backend):
    packed = pack(weights_on(DEVICE, SMALL_SPECS[0]), torch.float16, backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs beside this stream would read x too early
        x = torch.full((2, 8, 9, 9), 0.5, device="cuda", dtype=torch.float16)
        y = inverted_residual(x, packed, residual=True, backend=backend)
    stream.synchronize()
    assert torch.equal(y, inverted_residual(torch.full_like(x, 0.5), packed, residual=True, backend=backend))


@gpu
@by_kernel
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_other_devices(backend):
    x = make_x(2, 8, 9, 9, dtype=torch.float16)
    packed = pack(weights_on(DEVICE, SMALL_SPECS[0]), torch.float16, backend)
    y = inverted_residual(x, packed, residual=True, backend=backend)
    there = [t.to("cuda:1") for t in packed]
    assert torch.equal(OPS[backend](x.to("cuda:1"), *there, 1, True).to("cuda:0"), y)
    assert torch.cuda.current_device() == 0


@gpu
@triton_kernel
def test_gpu_autotune_measures_once(monkeypatch, tmp_path):
    from mnv2_fused.triton_backend import tune as triton_tune

    monkeypatch.setenv("MNV2_FUSED_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    triton_tune._chosen.clear()
    spec, x = SMALL_SPECS[0], make_x(2, 8, 9, 9, dtype=torch.float16)
    y = inverted_residual(x, weights_on(DEVICE, spec), residual=True, backend="triton")
    assert triton_tune.cache_file().is_file()
    monkeypatch.setattr(triton_tune, "milliseconds", None)
    triton_tune._chosen.clear()
    assert torch.equal(inverted_residual(x, weights_on(DEVICE, spec), residual=True, backend="triton"), y)
