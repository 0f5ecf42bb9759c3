"""Networks in one call of the CUDA kernel: on a GPU by it, elsewhere by the reference on the same joined weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICE, STANDS_IN, cuda_kernel_there, cuda_op_there, gpu
from support.inputs import GPU_DTYPES, by_gpu_dtype
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mnv2_fused
from mnv2_fused import BlockSpec, FusedInvertedResidual, backends, encoding, fold, ops
from mnv2_fused import inverted_residual_reference as reference
from mnv2_fused.activations import ACTIVATIONS, GATES, NEGATIVE_SLOPE, function_of, slope_of_bits
from mnv2_fused.fold import FRAGMENT, PANEL, PackedWeights
from mnv2_fused.module import packed_cache
from mnv2_fused.module.parameters import trackable
from mnv2_fused.sequence.weights import join
from mnv2_fused.testing import agreement, perturb_batch_norm

pytestmark = cuda_op_there
op = torch.ops.mnv2_fused.sequence_cuda


class _Reader:
    """Hands out tensors from joined weights, written once more from the layout that fold.py tells."""

    def __init__(self, weights):
        self.weights, self.at = weights, 0

    def take(self, dtype, *shape):
        count = math.prod(shape) * dtype.itemsize
        found = self.weights[self.at : self.at + count].view(dtype).view(shape)
        self.at += -(-count // 64) * 64
        return found


def _reference_sequence(x, weights, layers, tf32=False):
    """What the op computes, in torch's own layers."""
    reader, dtype = _Reader(weights), x.dtype
    for (kind, c_in, hidden, c_out, stride, residual), further in encoding.split_layers(layers):
        kernel, dilation, *padding, act, out, squeeze, squeeze_act, gate, stem_act = further[:12] or (
            *(3, 1, 1, 1, 1, 1, 0, 2, 0, 1, 0),
            0,
        )
        slope = slope_of_bits(further[12]) if len(further) > 12 else NEGATIVE_SLOPE
        expand_act, _, activates_sum = further[13:] or (-1, 0, 0)
        panels, outs, squeezes = (-(-n // PANEL) for n in (hidden, c_out, squeeze))
        w_expand = b_expand = None
        if kind == encoding.LayerKind.STEM_AND_BLOCK:
            rows = fold._of_fragments(reader.take(dtype, panels, 3, FRAGMENT))[:hidden]
            bias = reader.take(torch.float32, panels * PANEL + c_in)[:hidden].to(dtype)
            rows = rows.view(hidden, 3, 4, 4)
            assert not rows[:, :, 3].any() and not rows[..., c_in:].any()
            x = F.conv2d(x, rows[:, :, :3, :c_in].permute(0, 3, 1, 2), bias, 2, 1)
            x, c_in = function_of(ACTIVATIONS[stem_act], slope)(x), hidden
        elif kind == encoding.LayerKind.BLOCK:
            w_expand = reader.take(dtype, panels, -(-c_in // PANEL), FRAGMENT)
            b_expand = reader.take(torch.float32, panels * PANEL + c_in)
        packed = [
            reader.take(torch.float32, panels, kernel * kernel, PANEL),
            reader.take(torch.float32, hidden + PANEL),
            reader.take(dtype, panels, outs, FRAGMENT),
            reader.take(torch.float32, c_out),
        ]
        if squeeze:
            packed += [
                reader.take(torch.float32, squeezes, hidden, PANEL),
                reader.take(torch.float32, squeezes * PANEL),
                reader.take(torch.float32, panels, squeeze, PANEL),
                reader.take(torch.float32, panels * PANEL),
            ]
        spec = BlockSpec(
            *(c_in, hidden, c_out, stride, kind == encoding.LayerKind.BLOCK, bool(residual), kernel, dilation),
            padding="same" if padding[0] == -1 else tuple(padding),
            activation=ACTIVATIONS[act],
            out_activation=ACTIVATIONS[out],
            squeeze_channels=squeeze,
            squeeze_activation=ACTIVATIONS[squeeze_act],
            gate=GATES[gate],
            negative_slope=slope,
            expand_activation=None if expand_act == -1 else ACTIVATIONS[expand_act],
            activates_sum=bool(activates_sum),
        )
        x = reference(x, PackedWeights(w_expand, b_expand, *packed), **spec.geometry)
    assert reader.at == weights.numel()
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The layers of each call of the op; where no GPU is, by the reference."""
    calls = []
    library = None
    if STANDS_IN:
        monkeypatch.setenv("MNV2_FUSED_BACKEND", "cuda")
        library = torch.library.Library("mnv2_fused", "IMPL")
        library.impl("sequence_cuda", _reference_sequence, "CPU")
    original = ops.sequence

    def counting(x, weights, geometry, backend="cpu"):
        calls.append((backend, [values[0] for values, _ in encoding.split_layers(geometry)]))
        return original(x, weights, geometry, backend)

    monkeypatch.setattr(ops, "sequence", counting)
    yield calls
    if library is not None:
        library._destroy()


def images(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def verified(fused, model, x):
    """Runs ``fused`` without gradients and holds it to the rule."""
    with torch.no_grad():
        y, expected = fused(x), model(x)
        wide = copy.deepcopy(model).double()(x.double())
    found = agreement(y, expected, wide)
    assert found.ok, found
    return y


def network(**options):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=10, **options)
    return perturb_batch_norm(model).eval().to(DEVICE)


BLOCK, UNEXPANDED, STEM = (
    encoding.LayerKind.BLOCK,
    encoding.LayerKind.BLOCK_WITHOUT_EXPAND,
    encoding.LayerKind.STEM_AND_BLOCK,
)


@by_gpu_dtype
@pytest.mark.parametrize("size", [(32, 32), (37, 50)], ids=str)
def test_mobilenet_v2_is_one_call_from_stem_to_head(counted, size, dtype):
    model = network().to(dtype)
    fused = mnv2_fused.fuse(model)
    for x in (images(2, 3, *size, dtype=dtype), images(1, 3, *size, dtype=dtype).to(memory_format=torch.channels_last)):
        verified(fused, model, x)
    assert counted == [("cuda", [STEM, *[BLOCK] * 16])] * 2
    told = mnv2_fused.report(fused, (2, 3, *size)).layers
    stem = 16 * -(-size[0] // 2) * -(-size[1] // 2) * dtype.itemsize
    assert [(row.name, row.backend, row.bytes_never_written) for row in told] == [("features.0", "cuda", stem)]


@by_gpu_dtype
def test_squeeze_and_excite_networks(counted, dtype):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    model = perturb_batch_norm(model).eval().to(DEVICE, dtype)
    verified(mnv2_fused.fuse(model), model, images(2, 3, 48, 40, dtype=dtype))
    assert counted == [("cuda", [STEM, *[BLOCK] * 10])]


def blocks(*specs, stem=None):
    """A sequence of MobileNetV2's blocks, [inp, oup, stride, expand_ratio] each."""
    front = []
    if stem is not None:
        channels, out = stem
        front = [
            nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6(inplace=True))
        ]
    torch.manual_seed(0)
    model = nn.Sequential(*front, *(FusedInvertedResidual(*spec) for spec in specs))
    return perturb_batch_norm(model).eval().to(DEVICE)


def runs_fused(model):
    """The same weights in the sequence that fuse() makes, and in plain modules."""
    plain = mnv2_fused.unfuse(mnv2_fused.fuse(model))
    return mnv2_fused.fuse(model), plain


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_a_stem_of_more_than_four_channels_runs_by_itself(counted, channels):
    fused, plain = runs_fused(blocks((8, 6, 1, 1), (6, 7, 2, 6), stem=(channels, 8)))
    verified(fused, plain, images(2, channels, 17, 12))
    assert counted == [("cuda", [STEM, BLOCK] if channels <= 4 else [UNEXPANDED, BLOCK])]


def test_changed_weights_are_noticed(counted):
    fused, plain = runs_fused(blocks((8, 6, 1, 1), (6, 6, 1, 6), stem=(3, 8)))
    x, last = images(1, 3, 14, 14), None
    changes = [lambda m: None, lambda m: m[0][0].weight.mul_(1.5), lambda m: m[2].conv[1][1].bias.add_(1)]
    for change in changes:
        with torch.no_grad():
            change(fused)
            change(plain)
        y = verified(fused, plain, x)
        assert last is None or not torch.equal(y, last)
        last = y
    assert len(counted) == 3


@pytest.mark.usefixtures("fresh_graphs")
def test_compiled_graphs_make_the_same_calls(counted):
    """On a GPU head and classifier are the graph's own."""
    for model, x in ((network(), images(2, 3, 33, 40)), (blocks((8, 6, 1, 1), (6, 6, 1, 6)), images(1, 8, 9, 9))):
        fused, plain = runs_fused(model)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        verified(fused, plain, x)
        once = counted.copy()
        verified(compiled, plain, x)
        assert counted == once * 2 and len(once) == 1
        with torch.no_grad():
            for one in (fused, plain):
                next(one.parameters()).mul_(1.5)
        verified(compiled, plain, x)
        assert counted == once * 3
        counted.clear()


def test_where_gradients_or_autocast_are_on_blocks_run_one_by_one(counted):
    fused, plain = runs_fused(blocks((8, 6, 2, 6), (6, 6, 1, 6)))
    x = images(1, 8, 9, 9)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-2, atol=1e-2)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16
    assert not counted
    with torch.no_grad():
        fused(x)
        fused.train()
        fused(x)
        fused.eval().double()
        if DEVICE == "cpu":
            return  # the stand-in for the block's op takes float64, too
        with pytest.raises(RuntimeError, match="float64"):
            fused(x.double())
    assert len(counted) == 1


def test_another_backend_or_a_hook_stays_outside(counted):
    fused, plain = runs_fused(blocks((8, 6, 2, 6), (6, 6, 1, 6), (6, 6, 1, 6)))
    seen, x = [], images(1, 8, 9, 9)
    fused[1].register_forward_hook(lambda *_: seen.append(1))
    verified(fused, plain, x)
    assert counted == [("cuda", [BLOCK])] * 2 and seen
    fused[0].backend = "eager"
    counted.clear()
    verified(fused, plain, x)
    assert counted == [("cuda", [BLOCK])]


def test_fake_strides_are_the_real_ones():
    fused, _ = runs_fused(blocks((8, 6, 1, 1), (6, 7, 2, 6), stem=(3, 8)))
    with torch.no_grad():
        fused(images(1, 3, 9, 9))
    run = fused._prepared.steps[0]
    for n, h, w in [(2, 9, 12), (1, 1, 1), (0, 5, 5)]:
        x = images(n, 3, h, w)
        with torch.inference_mode():
            real = op(x, run.weights, run.geometry)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(mode.from_tensor(x), run.weights, run.geometry)
        described = [(t.shape, t.stride(), t.dtype, t.device) for t in (real, fake)]
        assert described[0] == described[1]


@cuda_kernel_there
def test_one_call_gives_what_blocks_give_one_by_one():
    """To the bit: the kernels and their plans are the same."""
    for dtype in GPU_DTYPES:
        fused, _ = runs_fused(blocks((16, 16, 1, 6), (16, 24, 2, 6), (24, 24, 1, 1)).to(dtype))
        x = images(3, 16, 15, 13, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            y, by_blocks = fused(x), x
            for block in fused:
                by_blocks = block(by_blocks)
        assert torch.equal(y, by_blocks)


@cuda_kernel_there
def test_bad_input():
    fused, _ = runs_fused(blocks((8, 6, 1, 1), (6, 7, 2, 6), stem=(3, 8)))
    x = images(1, 3, 9, 9)
    with torch.no_grad():
        fused(x)
        weights, geometry = fused._prepared.steps[0].weights, fused._prepared.steps[0].geometry

        def fails(match, *arguments):
            with pytest.raises(RuntimeError, match=f"sequence_cuda: .*{match}"):
                op(*arguments)

        fails(r"\d+ bytes of weights for x of this dtype, got", x, weights[:-64], geometry)
        fails(r"\d+ bytes of weights for x of this dtype, got", x.half(), weights, geometry)
        fails(r"weights are not; move one with \.to", x, weights.cpu(), geometry)
        fails("one contiguous row of bytes that starts", x, weights[1:], geometry)
        fails("x must have 3 channels, got 4", images(1, 4, 9, 9), weights, geometry)
        fails("at least one layer", x, weights, [])
        fails("they end within layer 0", x, weights, geometry[:3])
        fails("must be blocks, kinds 0 to 2, got 3", x, weights, [3, 3, 0, 8, 1, 0, 0])
        fails("at most 4 channels in front of a stem, got 5", images(1, 5, 9, 9), weights, [2, 5, 8, 8, 1, 0, 0])
        fails("float64", x.double(), weights, geometry)


@gpu
@cuda_kernel_there
def test_gpu_graph_of_a_network_replays():
    model = network().half()
    fused, x = mnv2_fused.fuse(model), images(2, 3, 64, 64, dtype=torch.float16)
    with torch.inference_mode():
        fused(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, fused(x))


@gpu
@cuda_kernel_there
@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("kind", ["mobilenet_v2", "mobilenet_v3_small"])
def test_gpu_kernels_that_start_early_wait_for_each_other(kind, graphed):
    """Many short kernels one after the other, splits and squeeze-and-excite among them: the same bits as one by one."""
    make = {"mobilenet_v2": mnv2_fused.models.mobilenet_v2, "mobilenet_v3_small": mnv2_fused.models.mobilenet_v3_small}
    torch.manual_seed(0)
    fused = perturb_batch_norm(make[kind](num_classes=10)).eval().to(DEVICE).half()
    x = images(1, 3, 64, 64, dtype=torch.float16)
    with torch.inference_mode():
        backends._cuda.allow_early_starts(False)
        try:
            expected = [fused.features(x * i) for i in range(1, 6)]
        finally:
            backends._cuda.allow_early_starts(True)
        given, call = x.clone(), lambda: fused.features(given)
        if graphed:
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = call()

            def call():
                graph.replay()
                return y

        for i in range(200):
            torch.mul(x, i % 5 + 1, out=given)  # a kernel that knows nothing of what follows it
            assert torch.equal(call(), expected[i % 5])


@gpu
@cuda_kernel_there
def test_gpu_the_first_kernel_of_a_call_waits_for_changed_weights():
    """Blocks' weights are read before their input is there, but never while something else may write them."""
    fused, _ = runs_fused(blocks((64, 64, 1, 6), (64, 64, 1, 6)).half())
    x = images(1, 64, 7, 7, dtype=torch.float16).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        fused(x)
        run = fused._prepared.steps[0]
        weights = [run.weights, torch.zeros_like(run.weights)]
        results = [op(x, w, run.geometry).clone() for w in weights]
        assert not torch.equal(*results)
        now = torch.empty_like(run.weights)
        for i in range(200):
            now.copy_(weights[i % 2])
            assert torch.equal(op(x, now, run.geometry), results[i % 2])


@gpu
@cuda_kernel_there
def test_gpu_what_a_capture_folds_is_not_kept():
    """Captured without a call before: a graph that is not yet replayed has folded nothing."""
    model = network().half()
    x = images(2, 3, 64, 64, dtype=torch.float16)
    between = images(2, 8, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x)  # cuDNN's own first call
    for fused, given in ((mnv2_fused.fuse(model), x), (mnv2_fused.fuse(model).features[2], between)):
        with torch.inference_mode():
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = fused(given)
            expected = fused(given)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)


@gpu
@cuda_kernel_there
def test_gpu_folds_once(monkeypatch):
    """Weights on a GPU are always in memory that may be shared, and yet watched."""
    folds, original = [], packed_cache.fold_and_pack

    def counted(*arguments):
        folds.append(1)
        return original(*arguments)

    for name in ("module.packed_cache", "sequence.weights", "module.fused_block"):
        monkeypatch.setattr(f"mnv2_fused.{name}.fold_and_pack", counted)
    fused = mnv2_fused.fuse(network())
    block, x = fused.features[3], images(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
            block(images(1, block.spec.in_channels, 8, 8))
    assert len(folds) == 18


@gpu
@cuda_kernel_there
def test_gpu_a_graph_keeps_the_weights_of_its_capture():
    """They are not freed when others take their place."""
    model = mnv2_fused.fuse(network().half())
    whole, between = images(2, 3, 64, 64, dtype=torch.float16), images(2, 8, 32, 32, dtype=torch.float16)
    for fused, x in ((model, whole), (mnv2_fused.fuse(network().half()).features[2], between)):
        with torch.inference_mode():
            fused(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = fused(x)
            graph.replay()
            expected = y.clone()
            for parameter in fused.parameters():
                parameter.mul_(1.5)
            fused.train()
            fused.eval()
            assert not torch.equal(fused(x), expected)
            junk = [torch.full((n,), float("nan"), device="cuda") for n in (100, 10_000, 1_000_000) for _ in range(50)]
            graph.replay()
            assert torch.equal(y, expected) and junk


@gpu
@cuda_kernel_there
def test_gpu_runs_on_the_current_stream():
    fused, _ = runs_fused(blocks((16, 16, 1, 6), (16, 24, 2, 6)).half())
    with torch.no_grad():
        expected = fused(torch.full((2, 16, 9, 9), 0.5, device="cuda", dtype=torch.float16))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # what runs beside this stream would read x too early
            x = torch.full((2, 16, 9, 9), 0.5, device="cuda", dtype=torch.float16)
            y = fused(x)
        stream.synchronize()
    assert torch.equal(y, expected)


@gpu
@cuda_kernel_there
def test_gpu_a_network_moves_between_devices(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = network()
    fused, x = mnv2_fused.fuse(model), images(1, 3, 32, 32)
    with torch.no_grad():
        on_gpu = fused(x)
        on_cpu = fused.cpu()(x.cpu())
        again = fused.cuda()(x)
    assert torch.equal(on_gpu, again)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_which_tensors_a_guard_can_track():
    """On another device than the CPU (here meta stands for it), a guard needs a version."""
    with torch.inference_mode():
        on_cpu, elsewhere = torch.ones(3), torch.ones(3, device="meta")
    assert trackable([torch.ones(3), torch.ones(3, device="meta"), on_cpu])
    assert not trackable([torch.ones(3), elsewhere])


def test_what_a_capture_folds_is_not_kept(counted, monkeypatch):
    for name in ("module.packed_cache", "sequence.fused"):
        monkeypatch.setattr(f"mnv2_fused.{name}.capturing", lambda device: True)
    fused, plain = runs_fused(blocks((8, 6, 1, 1), (6, 6, 1, 6), stem=(3, 8)))
    x = images(1, 3, 14, 14)
    for _ in range(2):
        verified(fused, plain, x)
        assert fused._prepared is None
    with torch.no_grad():
        fused[1](images(1, 8, 7, 7))
    assert fused[1]._ready is None and fused[1]._cache._kept is None
    assert len(counted) == 2


def test_what_a_graph_was_captured_with_stays(monkeypatch):
    """Weights changed since are folded elsewhere, and those that the graph reads are not freed."""
    cache, source = packed_cache.PackedCache(), images(16, 16, 1, 1)
    sources = [source, *[None] * 5, images(16, 1, 3, 3), *[None] * 5, images(8, 16, 1, 1), *[None] * 5]

    def packed():
        return cache.get(sources, [0.0] * 3, torch.float32, "cuda")

    first = packed()
    assert not cache._captured
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "capturing", lambda device: True)
        assert packed() is first and packed() is first
        assert [held is first for held in cache._captured] == [True]
        source.mul_(2)
        in_graph = packed()
        assert in_graph is not packed() and cache._kept.packed is first  # folded by every replay
    cache.clear()
    assert packed() is packed() is not first
    assert cache._captured == [first]


def test_replicas_do_not_run_what_was_prepared_of_the_original(counted):
    """As nn.DataParallel makes them."""
    fused, _ = runs_fused(blocks((8, 6, 1, 1), (6, 6, 1, 6), stem=(3, 8)))
    with torch.no_grad():
        fused(images(1, 3, 14, 14))
    with pytest.warns(UserWarning, match="runs unfused in nn.DataParallel"):
        replica = fused[1]._replicate_for_data_parallel()
    whole = fused._replicate_for_data_parallel()
    assert fused._prepared is not None and whole._prepared is None and replica.backend == "eager"


def test_joined_weights_are_aligned():
    rows = [torch.ones(n, dtype=torch.uint8, device=DEVICE) for n in (1, 64, 65)]
    joined = join(rows)
    assert joined.numel() == 64 + 64 + 128
    assert joined.sum() == 130 and joined[0] == joined[64] == joined[128] == joined[192] == 1
