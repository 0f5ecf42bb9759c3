"""The Triton op as torch and the modules see it: gradients, autocast, graphs, fuse; on a GPU streams and devices."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from test_op import layouts
from test_triton import DEVICE, DTYPES, REASON, SPECS, forced, kernel, quick_interpreter, weights_of  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mnv2_fused
from mnv2_fused import BlockSpec, BlockWeights, FusedInvertedResidual, inverted_residual, ops, pack, triton_plan
from mnv2_fused import inverted_residual_reference as reference
from mnv2_fused.testing import agreement, perturb_batch_norm, random_weights

op = torch.ops.mnv2_fused.inverted_residual_triton
gpu = pytest.mark.skipif(DEVICE != "cuda" or REASON is not None, reason="needs a CUDA GPU")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])


def make_block(inp=8, oup=8, stride=1, expand_ratio=6, dtype=torch.float32):
    block = FusedInvertedResidual(inp, oup, stride, expand_ratio, backend="triton")
    return perturb_batch_norm(block).eval().to(DEVICE, dtype)


def make_x(*shape, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, dtype).to(memory_format=torch.channels_last)


def within(fused, block, x):
    """The block's result against its own modules in the same dtype and in float64."""
    wide = copy.deepcopy(block).double()
    found = agreement(fused, block._forward_modules(x), wide._forward_modules(x.double()))
    assert found.ok, found


@kernel
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fake_strides_are_the_real_ones(spec):
    packed, seen = pack(weights_of(spec), torch.float16, "triton"), 0
    for n, h, w in [(2, 3, 4), (1, 1, 1), (0, 3, 3), (2, 4, 1)]:
        for name, x in layouts(n, spec.in_channels, h, w, torch.float16):
            x = x.to(DEVICE) if DEVICE == "cuda" else x
            real = op(x, *packed, spec.stride, spec.residual)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op(mode.from_tensor(x), *packed, spec.stride, spec.residual)
            described = [(t.shape, t.stride(), t.dtype, t.device) for t in (real, fake)]
            assert described[0] == described[1], f"{name} {list(x.shape)}"
            seen += 1
    assert seen == 48


@kernel
def test_opcheck():
    pytest.importorskip("expecttest")  # opcheck imports it
    spec = BlockSpec(4, 24, 4, residual=True)
    packed = [t.requires_grad_() for t in pack(weights_of(spec), torch.float32, "triton")]
    x = make_x(2, 4, 4, 3).requires_grad_()
    torch.library.opcheck(op.default, (x, *packed, 1, True))
    forced_plan = triton_plan(spec, x.shape, dtype=x.dtype, tile_rows=2, tile_cols=1, splits=1).forced()
    torch.library.opcheck(op.default, (x.detach(), *packed, 1, True, forced_plan))


@kernel
@by_dtype
@pytest.mark.parametrize("spec", [BlockSpec(4, 24, 4, residual=True), BlockSpec(5, 5, 3, 2, expand=False)], ids=str)
def test_gradients(spec, dtype):
    weights, x = random_weights(spec), torch.randn(2, spec.in_channels, 5, 4, dtype=torch.float64)
    geometry = {"stride": spec.stride, "residual": spec.residual}

    def gradients(function, dtype, **options):
        present = [t.to(DEVICE, dtype).requires_grad_() for t in (x, *weights) if t is not None]
        tensors = present[1:] if spec.expand else [None, None, *present[1:]]
        y = function(present[0], BlockWeights(*tensors), **geometry, **options)
        return torch.autograd.grad(y, present, torch.ones_like(y))

    wide, eager = gradients(reference, torch.float64), gradients(reference, dtype)
    for f, e, r in zip(gradients(inverted_residual, dtype, backend="triton"), eager, wide, strict=True):
        assert f.dtype == dtype
        found = agreement(f, e, r)
        assert found.ok, found


@kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_autocast(spec, dtype, x_dtype):
    """The products run in autocast's dtype; a wider x that is added back makes the result as wide as in eager."""
    weights, x = weights_of(spec, dtype=torch.float32), make_x(2, 8, 5, 4, dtype=x_dtype)
    geometry = {"stride": spec.stride, "residual": spec.residual}
    with torch.autocast(DEVICE, dtype=dtype):
        fused = inverted_residual(x, weights, backend="triton", **geometry)
        eager = reference(x, weights, **geometry)
    assert fused.dtype == eager.dtype
    wide = reference(x.double(), weights_of(spec), **geometry)
    found = agreement(fused.to(dtype), eager.to(dtype), wide)
    assert found.ok, found


@kernel
@by_dtype
def test_a_block_follows_its_weights(dtype):
    block, x = make_block(dtype=dtype), make_x(2, 8, 5, 4, dtype=dtype)
    changes = [
        lambda: None,
        lambda: block.conv[0][0].weight.mul_(1.5),
        lambda: block.conv[1][1].running_var.mul_(2),
        lambda: block.load_state_dict(perturb_batch_norm(make_block(dtype=dtype), seed=3).state_dict()),
        lambda: setattr(block.conv[3], "eps", 0.5),
    ]
    last = None
    with torch.no_grad():
        for change in changes:
            change()
            y = block(x)
            within(y, block, x)
            assert block._ready.backend == "triton" and torch.equal(block(x), y)
            assert last is None or not torch.equal(y, last)
            last = y
        block.backend = "eager"
        assert torch.equal(block(x), block._forward_modules(x))


@kernel
def test_a_block_trains_and_differentiates():
    block, x = make_block(), make_x(2, 8, 5, 4).requires_grad_()
    leaves = [x, *block.parameters()]
    found = torch.autograd.grad(block(x).square().sum(), leaves)
    expected = torch.autograd.grad(block._forward_modules(x).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    block.train()
    torch.testing.assert_close(block(x), block._forward_modules(x))


@kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_block_under_autocast(dtype):
    block, x = make_block(), make_x(2, 8, 5, 4)
    wide = copy.deepcopy(block).double()._forward_modules(x.double())
    with torch.no_grad():
        plain = block(x)
        with torch.autocast(DEVICE, dtype=dtype):
            fused, eager = block(x), block._forward_modules(x)
        assert fused.dtype == eager.dtype
        found = agreement(fused.to(dtype), eager.to(dtype), wide)
        assert found.ok, found
        assert torch.equal(block(x), plain), "outside autocast, what it packed there is used"


@kernel
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad):
    block, x = make_block(8, 7, 2), make_x(2, 8, 5, 4)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), block._forward_modules(x))
        block.conv[0][0].weight.data.mul_(1)
        with torch.no_grad():
            block.conv[0][0].weight.mul_(1.5)
        torch.testing.assert_close(compiled(x), block._forward_modules(x))


@kernel
def test_export_round_trip():
    block, x = make_block(), make_x(2, 8, 5, 4)
    program = torch.export.export(block, (x,))
    assert "mnv2_fused.inverted_residual_triton" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), block._forward_modules(x))


@kernel
@pytest.mark.parametrize("how", ["half", "autocast"])
def test_fuse_a_whole_model(how, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    model = perturb_batch_norm(torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)).eval().to(DEVICE)
    wide, x = copy.deepcopy(model).double(), make_x(2, 3, 32, 32)
    if how == "half":
        model, x = model.half(), x.half()
    fused = mnv2_fused.fuse(model, backend="triton", strict=True)
    assert {b.backend for b in mnv2_fused.report(fused).blocks} == {"triton"}
    assert not mnv2_fused.report(fused).layers
    calls, original = [], ops.packed_inverted_residual

    def counted(*args, **options):
        calls.append(options["backend"])
        return original(*args, **options)

    monkeypatch.setattr(ops, "packed_inverted_residual", counted)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.float16, enabled=how == "autocast"):
        y, expected = fused(x), model(x)
    assert calls == ["triton"] * 17
    assert y.dtype == expected.dtype
    with torch.no_grad():
        found = agreement(y.half(), expected.half(), wide(x.double()))
    assert found.ok, found


@kernel
def test_the_environment_chooses(monkeypatch):
    block, x = make_block(), make_x(1, 8, 5, 4)
    block.backend = "auto"
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "triton")
    with torch.no_grad():
        block(x)
        assert block._ready.backend == "triton"


@kernel
def test_bad_input():
    spec, x = SPECS[0], make_x(1, 8, 5, 4)
    weights = weights_of(spec)
    packed = pack(weights, torch.float32, "triton")

    def fails(error, match, *args, **options):
        with pytest.raises(error, match=match):
            inverted_residual(*args, backend="triton", **options)

    fails((TypeError, ValueError), "float64.*backend='eager'", x.double(), weights)
    fails((RuntimeError, ValueError), "w_expand must be torch.float16.*pack", x.half(), packed)
    fails(ValueError, "must have 8 channels, got 3", make_x(1, 3, 5, 4), weights)
    fails(ValueError, "takes one of mnv2_fused.triton_plan, got a Plan", x, packed, plan=mnv2_fused.plan(spec, x.shape))
    fails(RuntimeError, "meta", x, packed._replace(w_project=packed.w_project.to("meta")))
    fails(RuntimeError, "b_expand must be contiguous", x, packed._replace(b_expand=packed.b_expand.repeat(2)[::2]))
    fails(ValueError, "stride must be 1 or 2, got 3", x, weights, stride=3)
    with pytest.raises(ValueError, match=r"plan must be .*got 2 values"):
        op(x, *packed, 1, True, [1, 2])
    with pytest.raises(ValueError, match="group must be a power of two, 16 to 256, got 48"):
        op(x, *packed, 1, True, [1, 1, 16, 48, 1, 4, 1])
    with pytest.raises((RuntimeError, ValueError), match=r"\[N, C_in, H, W\]"):
        op(x[0], *packed, 1, True)
    with pytest.raises(RuntimeError, match="w_expand and b_expand must both"):
        op(x, None, *packed[1:], 1, True)


@pytest.mark.skipif(REASON is None, reason="Triton runs here")
def test_where_it_cannot_run_it_says_why():
    weights, x = random_weights(SPECS[0]), torch.randn(1, 8, 5, 4)
    with pytest.raises(RuntimeError, match=r"backend='triton'\): triton: .+; move .*backend='eager'"):
        inverted_residual(x, weights, backend="triton")
    with pytest.raises(RuntimeError, match="triton"):
        FusedInvertedResidual(8, 8, 1, 6, backend="triton").eval()(x)


def test_info_tells():
    ran = subprocess.run([sys.executable, "-m", "mnv2_fused", "info"], capture_output=True, text=True)
    assert "backend triton" in ran.stdout


def test_import_leaves_the_kernel_alone():
    """Importing triton takes its time, and decides whether it interprets."""
    code = "import sys, mnv2_fused; assert 'mnv2_fused.triton_kernels' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@gpu
def test_gpu_auto_is_triton():
    assert ops.resolve_backend("auto", torch.device("cuda")) == "triton"


@gpu
def test_gpu_graph_capture_replays():
    spec = BlockSpec(64, 384, 64, residual=True)
    x, packed = make_x(1, 64, 14, 14, dtype=torch.float16), pack(weights_of(spec), torch.float16)
    assert triton_plan(spec, x.shape).splits > 1  # both kernels
    call = lambda: inverted_residual(x, packed, residual=True)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, call())


@gpu
def test_gpu_reduce_overhead():
    model = nn.Sequential(make_block(), make_block(8, 7, 2)).half()
    compiled, x = torch.compile(model, mode="reduce-overhead", fullgraph=True), make_x(2, 8, 9, 9, dtype=torch.float16)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(compiled(x).clone(), model(x))


@gpu
def test_gpu_runs_on_the_current_stream():
    spec, packed = SPECS[0], pack(weights_of(SPECS[0]), torch.float16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs beside this stream would read x too early
        x = torch.full((2, 8, 9, 9), 0.5, device="cuda", dtype=torch.float16)
        y = inverted_residual(x, packed, residual=True)
    stream.synchronize()
    assert torch.equal(y, inverted_residual(torch.full_like(x, 0.5), packed, residual=spec.residual))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_other_devices():
    spec = SPECS[0]
    x = make_x(2, 8, 9, 9, dtype=torch.float16)
    y = inverted_residual(x, pack(weights_of(spec), torch.float16), residual=True)
    there = [None if t is None else t.to("cuda:1") for t in pack(weights_of(spec), torch.float16)]
    assert torch.equal(op(x.to("cuda:1"), *there, 1, True).to("cuda:0"), y)


@gpu
def test_gpu_autotune_measures_once(monkeypatch, tmp_path):
    from mnv2_fused import triton_tune

    monkeypatch.setenv("MNV2_FUSED_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    triton_tune._chosen.clear()
    spec, x = SPECS[0], make_x(2, 8, 9, 9, dtype=torch.float16)
    y = inverted_residual(x, weights_of(spec), residual=True)
    assert triton_tune.cache_file().is_file()
    monkeypatch.setattr(triton_tune, "milliseconds", None)
    triton_tune._chosen.clear()
    assert torch.equal(inverted_residual(x, weights_of(spec), residual=True), y)
