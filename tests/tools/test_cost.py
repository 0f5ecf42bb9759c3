"""What a model costs: counts against papers and hand counts, memory against what torch's allocator measures."""

import copy
import importlib.machinery
import math
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnv2_fused
from mnv2_fused import backends, fuse, testing
from mnv2_fused.__main__ import main
from mnv2_fused.sequence.seen import RunsAsSeen
from mnv2_fused.tools import named_models
from mnv2_fused.tools.cost import cost, measured_peaks
from mnv2_fused.tools.named_models import named_model

torchvision = pytest.importorskip("torchvision")
needs_kernels = pytest.mark.skipif(backends._C is None, reason="the compiled library is missing")


class Small(nn.Module):
    """A residual around a depthwise-separable pair, with functional ops; small enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.depthwise(x), inplace=True)
        y = self.pointwise(y)
        x = F.relu(x + y)
        return self.linear(x.mean((2, 3)))


def test_a_model_counted_by_hand():
    found = cost(Small(), (2, 3, 8, 8))
    one = 2 * 8 * 4 * 4 * 4  # bytes of a tensor behind the stem
    # While F.relu runs, x is still the stem's output: with y, the sum and the result, four tensors live.
    assert [
        (r.name, r.kind, r.output_shape, r.parameters, r.multiply_adds, r.eager_bytes, r.eager_live)
        for r in found.layers
    ] == [
        ("stem", "Conv2d", (2, 8, 4, 4), 8 * 27, 2 * 8 * 16 * 27, one, one),
        ("depthwise", "Conv2d", (2, 8, 4, 4), 8 * 9, 2 * 8 * 16 * 9, one, 2 * one),
        ("", "relu_", (2, 8, 4, 4), 0, 0, 0, 2 * one),
        ("pointwise", "Conv2d", (2, 8, 4, 4), 8 * 8, 2 * 8 * 16 * 8, one, 3 * one),
        ("", "add", (2, 8, 4, 4), 0, 0, one, 3 * one),
        ("", "relu", (2, 8, 4, 4), 0, 0, one, 4 * one),
        ("", "mean", (2, 8), 0, 0, 64, 2 * one + 64),
        ("linear", "Linear", (2, 5), 8 * 5 + 5, 2 * 8 * 5, 40, 2 * one + 64 + 40),
    ]
    assert found.parameters == 216 + 72 + 64 + 45
    assert found.multiply_adds == 6912 + 2304 + 2048 + 80
    assert found.eager_bytes == found.fused_bytes == 5 * one + 104
    assert found.eager_peak == found.fused_peak == 4 * one
    assert found.scratch_bytes == 0 and found.expanded_share == 0
    (pair,) = found.separable
    assert found.layers[3].separable is pair and (pair.depthwise, pair.out_channels) == ("depthwise", 8)
    assert (pair.multiply_adds, pair.standard_multiply_adds) == (2304 + 2048, 2 * 8 * 16 * 8 * 9)
    assert pair.saving == 1 / 8 + 1 / 9 and str(pair) == "1/8+1/9=0.236"


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet1_0", "efficientnet_b0", "resnet50"],
)
def test_counts_are_those_torchvision_states(name):
    meta = torchvision.models.get_model_weights(name).DEFAULT.meta
    found = cost(named_model(name), (1, 3, 224, 224))
    assert found.parameters == meta["num_params"] == sum(layer.parameters for layer in found.layers)
    assert round(found.multiply_adds / 1e9, 3) == meta["_ops"]


@pytest.mark.parametrize(
    "name, multiply_adds, parameters",
    [
        ("mobilenet_v2", 300e6, 3.4e6),
        ("mobilenet_v3_large", 219e6, 5.4e6),
        ("mobilenet_v3_small", 56e6, 2.5e6),
        ("efficientnet_b0", 390e6, 5.3e6),
        ("timm:mobilenetv1_100", 569e6, 4.2e6),
    ],
)
def test_counts_are_those_of_the_papers(name, multiply_adds, parameters):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    found = cost(named_model(name), (1, 3, 224, 224))
    assert found.multiply_adds == pytest.approx(multiply_adds, rel=0.015)  # they round, and count SE or not
    assert found.parameters == pytest.approx(parameters, rel=0.035)


def test_counts_grow_with_the_batch_and_the_dtype():
    model = named_model("mobilenet_v2")
    one, four = cost(model, (1, 3, 64, 96)), cost(model, (4, 3, 64, 96))
    wide = cost(model.double(), (1, 3, 64, 96))
    assert four.multiply_adds == 4 * one.multiply_adds and four.parameters == one.parameters
    assert four.eager_bytes == 4 * one.eager_bytes and four.fused_bytes == 4 * one.fused_bytes
    assert four.eager_peak == 4 * one.eager_peak and four.expanded_share == one.expanded_share
    assert wide.dtype == torch.float64 and wide.eager_peak == 2 * one.eager_peak
    assert wide.multiply_adds == one.multiply_adds and wide.fused_bytes == 2 * one.fused_bytes


@pytest.mark.parametrize("name, count", [("mobilenet_v2", 17), ("mobilenet_v3_large", 15), ("mnasnet1_0", 17)])
def test_every_separable_pair_saves_what_the_formula_says(name, count):
    model = named_model(name)
    found = cost(model, (1, 3, 224, 224))
    convs = dict(model.named_modules())
    assert len(found.separable) == count
    for layer in found.layers:
        pair = layer.separable
        if pair is None:
            continue
        depthwise, pointwise = convs[pair.depthwise], convs[layer.name]
        assert depthwise.groups == depthwise.in_channels == pointwise.in_channels
        assert pair.kernel == depthwise.kernel_size and pair.out_channels == pointwise.out_channels
        assert pair.saving == 1 / pointwise.out_channels + 1 / math.prod(depthwise.kernel_size)
        pixels = math.prod(layer.output_shape[2:])
        standard = math.prod(depthwise.kernel_size) * pointwise.in_channels * pointwise.out_channels * pixels
        assert pair.standard_multiply_adds == standard
        assert pair.multiply_adds / standard == pytest.approx(pair.saving, rel=1e-12)
    depthwise_convs = [n for n, m in convs.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert [pair.depthwise for pair in found.separable] == depthwise_convs


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0"])
def test_squeeze_and_excite_is_no_part_of_a_pair(name):
    """Where images shrink to a pixel, its 1x1 convolutions have the shapes of a projection's."""
    large, tiny = (cost(named_model(name), (1, 3, size, size)) for size in (224, 32))

    def pairs(found):
        return [(r.name, r.separable.depthwise) for r in found.layers if r.separable is not None]

    assert (1, 1) in {r.output_shape[2:] for r in tiny.layers if r.separable is not None}
    assert pairs(tiny) == pairs(large) and len(pairs(large)) >= 11


class Branches(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


def depthwise(channels, **kwargs):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **kwargs)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)],  # a standard convolution
        [nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1)],  # a grouped one
        [nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1)],  # two filters a channel
        [depthwise(8), nn.Conv2d(8, 8, 1, groups=2)],
        [depthwise(8), nn.Conv2d(8, 8, 1, stride=2)],
        [depthwise(8), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 8, 1)],
        [Branches(depthwise(8), depthwise(8)), nn.Conv2d(8, 8, 1)],
    ],
)
def test_what_is_no_separable_pair(layers):
    assert cost(nn.Sequential(*layers), (1, 8, 6, 6)).separable == ()
    pair = cost(nn.Sequential(depthwise(8), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1)), (1, 8, 6, 6))
    assert len(pair.separable) == 1


def test_a_depthwise_convolution_is_in_one_pair():
    found = cost(nn.Sequential(depthwise(8), Branches(nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1))), (1, 8, 6, 6))
    assert [r.name for r in found.layers if r.separable is not None] == ["1.branches.0"]


def test_the_share_of_expanded_tensors():
    found = cost(named_model("mobilenet_v2"), (1, 3, 224, 224))
    blocks = testing.mobilenet_v2_blocks(224)
    expanded = sum(
        s.hidden_channels * (h * w * s.expand + math.prod((side - 1) // s.stride + 1 for side in (h, w)))
        for s, (h, w) in blocks
    )
    projected = sum(s.out_channels * math.prod((side - 1) // s.stride + 1 for side in size) for s, size in blocks)
    others = 32 * 112 * 112 + 1280 * 7 * 7 + 1000  # stem, head, classifier
    assert found.expanded_share == expanded / (expanded + projected + others)
    assert found.expanded_share == pytest.approx(0.84, abs=0.005)


@pytest.mark.parametrize(
    "channels, share",
    [
        ((4, 8, 4), 2 * 8 / (2 * 8 + 4)),
        ((8, 8, 4), 8 / (2 * 8 + 4)),  # the first 1x1 expands nothing
        ((4, 8, 8), 0),  # and here none is projected back: MobileNetV1
    ],
)
def test_which_tensors_are_expanded(channels, share):
    first, hidden, last = channels
    layers = [nn.Conv2d(first, hidden, 1), nn.ReLU(), depthwise(hidden), nn.ReLU(), nn.Conv2d(hidden, last, 1)]
    assert cost(nn.Sequential(*layers), (1, first, 6, 6)).expanded_share == share


@needs_kernels
@pytest.mark.parametrize("batch, size", [(1, (224, 224)), (2, (97, 161))])
def test_fused_blocks_make_their_output_alone(batch, size):
    model = named_model("mobilenet_v2")
    found = cost(model, (batch, 3, *size))
    report = mnv2_fused.report(mnv2_fused.fuse(model.eval()), (batch, 3, *size))
    assert found.report == report and len(report.fused) == 17 and len(report.layers) == 3
    for block in report.blocks:
        rows = [r for r in found.layers if r.name == block.name or r.name.startswith(f"{block.name}.")]
        *inside, last = rows
        assert last.kind == ("add" if block.spec.residual else "BatchNorm2d")
        assert last.fused_bytes == 4 * math.prod(last.output_shape) and not any(r.fused_bytes for r in inside)
        convolutions = [r for r in rows if r.kind == "Conv2d"]
        assert sum(r.eager_bytes for r in convolutions[:-1]) == batch * block.bytes_never_written
        assert sum(r.eager_bytes for r in rows) == (
            2 * sum(r.eager_bytes for r in convolutions) + block.spec.residual * last.fused_bytes
        )
        assert len({r.fused_live for r in rows}) == 1
    outside = {r.name: r.fused_bytes for r in found.layers if not re.match(r"features\.([1-9]|1[0-7])(\.|$)", r.name)}
    assert {name for name, made in outside.items() if made} == {"", "classifier.1"}  # neither stem nor head
    assert found.fused_bytes * 20 < found.eager_bytes and found.fused_peak * 4 < found.eager_peak


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3, 448, 448), (2, 3, 224, 160)])
def test_computed_peaks_are_the_measured_ones(threads, shape):
    """All that eager's layers and the kernels allocate is known; the limit is for logits beside a full buffer."""
    with testing.threads(threads):
        model = named_model("mobilenet_v2")
        found = cost(model, shape)
        eager, fused = measured_peaks(model, shape)
    assert found.eager_peak == pytest.approx(eager, rel=0.001)
    assert found.fused_peak == pytest.approx(fused, rel=0.01)
    assert found.scratch_bytes > 0.01 * fused  # without which the last line would not hold


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        *("mobilenet_v1", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet0_5"),
        *("lraspp_mobilenet_v3_large", "timm:mobilenetv2_050", "timm:mobilenetv3_large_100", "timm:efficientnet_b0"),
    ],
)
def test_computed_peaks_of_other_families_are_the_measured_ones(name):
    """What their squeeze-and-excites keep included, and what stays while one call runs several blocks.

    Large enough that what timm's head works in, which no one knows, is not the peak.
    """
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model, shape = named_model(name), (5, 3, 192, 160)
    with testing.threads(2), torch.inference_mode():
        eager, called = measured_peaks(model, shape)
        found = cost(model, shape)
        fused, x = fuse(model).eval(), torch.randn(shape).contiguous(memory_format=torch.channels_last)
        by_blocks = testing.peak_activation_bytes(lambda: fused.forward(x))
    assert found.eager_peak == pytest.approx(eager, rel=0.001)
    assert found.fused_peak == pytest.approx(by_blocks, rel=0.001)
    # A call of a network that is seen as a row takes no more.
    assert called <= 1.001 * by_blocks
    assert isinstance(fused, RunsAsSeen) or called == pytest.approx(by_blocks, rel=0.001)


def test_a_residual_is_an_addition_that_makes_a_tensor():
    block = torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 6)
    with_residual = cost(nn.Sequential(nn.Conv2d(3, 8, 1), block), (1, 3, 10, 10))
    block.use_res_connect = False
    without = cost(nn.Sequential(nn.Conv2d(3, 8, 1), block), (1, 3, 10, 10))
    (added,) = [r for r in with_residual.layers if r.kind == "add"]
    assert added.name == "1" and added.eager_bytes == 4 * 8 * 100
    assert with_residual.eager_bytes - without.eager_bytes == 4 * 8 * 100
    assert [r.kind for r in without.layers] == [r.kind for r in with_residual.layers if r.kind != "add"]


def test_parameters_are_counted_once():
    shared = nn.Conv2d(4, 4, 1)
    found = cost(nn.Sequential(shared, nn.ReLU(), shared), (1, 4, 5, 5))
    assert [r.parameters for r in found.layers] == [20, 0, 0] and found.parameters == 20
    assert [r.multiply_adds for r in found.layers] == [400, 0, 400]


def test_parameters_that_no_layer_uses():
    model = Small()
    model.auxiliary = nn.Linear(8, 100)
    found = cost(model, (1, 3, 8, 8))
    assert found.parameters == sum(layer.parameters for layer in found.layers) + 900
    assert "900 of them in layers that this call does not use" in str(found)


def test_the_model_is_not_touched():
    model = named_model("mobilenet_v2").train()
    calls = []
    model.features[3].register_forward_hook(lambda *_: calls.append(1))
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    cost(model, (1, 3, 64, 64))
    assert model.training and not calls and kinds == [type(m) for m in model.modules()]
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()
    assert len(model.features[3]._forward_hooks) == 1


def test_a_fused_model_costs_what_its_original_costs():
    model = named_model("mobilenet_v2").eval()
    assert cost(mnv2_fused.fuse(model), (1, 3, 64, 64)) == cost(model, (1, 3, 64, 64))


def test_where_no_kernel_runs_fused_is_eager(monkeypatch):
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    found = cost(named_model("mobilenet_v2"), (1, 3, 64, 64))
    assert found.fused_bytes == found.eager_bytes and found.fused_peak == found.eager_peak
    assert re.search(r"not fused +17 x run by backend eager", str(found))


def test_a_skipped_block_counts_as_eager_with_its_reason():
    model = named_model("mobilenet_v2")
    model.features[3].conv[0][2] = nn.ELU()
    found = cost(model, (1, 3, 64, 64))
    (skipped,) = found.report.skipped
    assert skipped.name == "features.3"
    assert re.search(rf"^not fused +1 x {re.escape(skipped.reason)}$", str(found), re.M)
    inside = [r for r in found.layers if r.name.startswith("features.3.")]
    assert inside and all(r.fused_bytes == r.eager_bytes for r in inside)


class Universal(nn.Module):
    """A depthwise convolution, a block, a scale of each channel, and a sum: of which the block alone is fused."""

    def __init__(self):
        super().__init__()
        self.ahead = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.widen, self.spread = nn.Conv2d(8, 48, 1), nn.Sequential(nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.ReLU())
        self.narrow = nn.Conv2d(48, 8, 1)

    def forward(self, x):
        return x + self.narrow(self.spread(self.widen(self.ahead(x))))


@needs_kernels
def test_what_runs_around_a_block_counts():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Universal(), nn.Conv2d(8, 4, 1)).eval()
    found, measured = cost(model, (1, 3, 40, 48)), measured_peaks(model, (1, 3, 40, 48))
    assert len(found.report.fused) == 1
    assert found.fused_peak == pytest.approx(measured[1], rel=0.05)
    assert found.fused_peak < found.eager_peak / 2


@pytest.mark.parametrize("shape", [(), (0, 3, 8, 8), (1, 3, -8, 8), (1, 3, 8.0, 8)])
def test_shapes_that_are_none(shape):
    with pytest.raises(ValueError, match=r"input_shape must be integers of at least 1, got \("):
        cost(Small(), shape)


def test_a_shape_that_the_model_does_not_take():
    with pytest.raises(ValueError, match=r"does not run on one input of shape \[1, 4, 8, 8\] on the meta device: "):
        cost(Small(), (1, 4, 8, 8))


@pytest.mark.parametrize(
    "name, said",
    [
        ("mobilenet_v9", r"unknown model 'mobilenet_v9', close to .*mobilenet_v2.*; known are .*alexnet, .* timm:NAME"),
        ("", "unknown model ''; known are "),
        ("resnet18:", "unknown model 'resnet18:', close to resnet18"),
        ("timm:mobilenetv2_10", r"unknown model 'timm:mobilenetv2_10', close to .*mobilenetv2_100"),
    ],
)
def test_unknown_names(name, said, capsys):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=said):
        named_model(name)
    assert main(["cost", name]) == 1
    captured = capsys.readouterr()
    assert re.match(f"error: {said}", captured.err) and captured.out == ""


@pytest.mark.parametrize("name, library", [("mobilenet_v2", "torchvision"), ("timm:mobilenetv2_100", "timm")])
def test_a_missing_library(name, library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(named_models, "models", own_models())
    assert main(["cost", name]) == 1
    assert re.match(rf"error: this model needs {library} .+: pip install ", capsys.readouterr().err)


def own_models(**builders):
    module = types.ModuleType("mnv2_fused.models")
    module.__spec__ = importlib.machinery.ModuleSpec("mnv2_fused.models", None)
    for name, builder in builders.items():
        builder.__module__ = module.__name__
        setattr(module, name, builder)
    return module


def test_this_packages_models_are_known():
    assert isinstance(named_model("mobilenet_v1"), mnv2_fused.models.MobileNet)
    assert isinstance(named_model("mobilenet_v2"), torchvision.models.MobileNetV2)
    with pytest.raises(ValueError, match="close to mobilenet_v2"):
        named_model("mobilenet_v22")


def test_timm_takes_names_of_weights():
    timm = pytest.importorskip("timm")
    model = named_model("timm:mobilenetv2_050.lamb_in1k")
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in timm.create_model("mobilenetv2_050").parameters()
    )


@pytest.mark.slow
@needs_kernels
def test_the_command():
    command = [sys.executable, "-m", "mnv2_fused", "cost", "mobilenet_v2", "-r", "64x96", "-b", "2", "--measure"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    found = cost(named_model("mobilenet_v2"), (2, 3, 64, 96))
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("mobilenet_v2 on 2x3x64x96, float32, ")
    assert max(map(len, lines)) <= 160
    rows = [re.split(r"\s{2,}", line) for line in lines[5 : 5 + len(found.layers)]]
    assert [(r[0], r[1]) for r in rows] == [(layer.name or "(model)", layer.kind) for layer in found.layers]
    for row, layer in zip(rows, found.layers, strict=True):
        millions, eager, fused = (0.0 if cell == "-" else float(cell) for cell in row[4:7])
        assert millions == pytest.approx(layer.multiply_adds / 1e6, abs=6e-4)
        assert eager == pytest.approx(layer.eager_bytes / 2**20, abs=6e-4)
        assert fused == pytest.approx(layer.fused_bytes / 2**20, abs=6e-4)
        assert row[3] == (f"{layer.parameters:,}" if layer.parameters else "-")
        assert [float(cell) for cell in row[7:9]] == [
            pytest.approx(live / 2**20, abs=6e-4) for live in (layer.eager_live, layer.fused_live)
        ]
        assert row[9:] == ([] if layer.separable is None else [str(layer.separable)])
    totals = dict(re.findall(r"^([a-z][a-z -]+?)  +(\S.*)$", "\n".join(lines[6 + len(found.layers) :]), re.M))
    assert totals["parameters"] == "3,504,872" and totals["multiply-adds"] == f"{found.multiply_adds:,}"
    assert totals["made"] == (
        f"eager {found.eager_bytes / 2**20:.3f} MiB, fused {found.fused_bytes / 2**20:.3f} MiB: "
        f"{found.eager_bytes / found.fused_bytes:.2f}x less"
    )
    assert totals["fused"] == "17 blocks, 3 layers beside them"
    assert (
        len(re.findall(r"^measured peak .+ MiB; the computed peak is (?:1.000|0.9\d+) of it$", ran.stdout, re.M)) == 2
    )


def test_the_widest_table_fits_160_columns(capsys):
    assert main(["cost", "mobilenet_v3_large", "--batch", "16", "--resolution", "320", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 160
    assert "mobilenet_v3_large on 16x3x320x320, float16, " in out


@pytest.mark.parametrize("argv", [["cost"], ["cost", "mobilenet_v2", "-r", "0"], ["cost", "mobilenet_v2", "-b", "0"]])
def test_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2 and "error: " in capsys.readouterr().err
