"""quantize: float modules to layers on integers, and what is asked of the modules that it makes."""

import copy
import itertools
import re

import pytest
import torch
from support import flat
from support.devices import by_isa
from support.int8 import Block, calibration, quantized, smooth, sqnr
from support.models import fitted
from torch import nn

import mnv2_fused
from mnv2_fused import BlockSpec, fuse, models, quantize, quantized_like, quantized_report
from mnv2_fused.int8.modules import QuantizedBlock, QuantizedRow, QuantizedStage
from mnv2_fused.testing import fit_batch_norm, instruction_set, peak_activation_bytes, threads

# Of every kind that layers on integers compute.
SPECS = [
    BlockSpec(16, 96, 24, stride=2),
    BlockSpec(24, 144, 24, residual=True),
    BlockSpec(24, 144, 24, residual=True, kernel=5, activation="relu"),
    BlockSpec(32, 32, 16, expand=False),
    BlockSpec(16, 64, 16, stride=2, kernel=5, padding="same"),
    BlockSpec(16, 64, 24, activation="hardswish", squeeze_channels=16),
    BlockSpec(
        *(16, 64, 16),
        residual=True,
        activation="silu",
        squeeze_channels=4,
        squeeze_activation="silu",
        gate="sigmoid",
    ),
    BlockSpec(16, 48, 24, activation="identity", expand_activation="relu", out_activation="relu"),
    BlockSpec(16, 48, 16, residual=True, activation="relu", out_activation="relu6", activates_sum=True),
    BlockSpec(16, 48, 24, out_activation="hardswish"),
    BlockSpec(16, 48, 24, stride=(1, 2)),
    BlockSpec(16, 48, 16, kernel=7, residual=True),
    BlockSpec(16, 48, 24, dilation=2, padding="same"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_block_is_near_float(spec):
    model = Block(spec)
    x = smooth(8, spec.in_channels, 16)
    int8 = quantize(model, [x])
    y, expected = int8(x), model(x)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert sqnr(expected, y) > 30
    [row] = quantized_report(int8).layers
    assert row.quantized and row.sqnr == pytest.approx(sqnr(expected, y), abs=0.5)


def test_a_whole_network_is_one_row():
    int8 = quantized()
    assert type(int8) is QuantizedRow and not list(int8.parameters())
    x = smooth(4, 3, 64, seed=5)
    y, expected = int8(x), fitted()(x)
    assert y.shape == expected.shape and sqnr(expected, y) > 20


def test_the_original_stays_as_it_is():
    model = copy.deepcopy(fitted()).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    int8 = quantize(model, calibration())
    assert model.training and not int8.training and "MobileNetV2" in type(model).__name__
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_fused_models_and_labels_give_the_same_integers():
    expected = quantized().state_dict()
    with_labels = ((batch, torch.zeros(len(batch))) for batch in calibration())
    for model, batches in ((fuse(fitted()), calibration()), (fitted(), with_labels)):
        state = quantize(model, batches).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in state.items())


def test_batches_of_any_size_and_order_give_nearly_the_same():
    images, x = torch.cat(calibration()), smooth(4, 3, 64, seed=5)
    first = quantized()
    for batches in (images, [images[:1], images[1:]], calibration()[::-1]):
        other = quantize(fitted(), batches)
        for layer, same in zip(first.layers, other.layers, strict=True):
            assert float(same.y_scale) == pytest.approx(float(layer.y_scale), rel=0.1)
        assert sqnr(first(x), other(x)) > 25


def test_seeds_give_what_they_gave():
    many = [smooth(40, 3, 32, seed=seed) for seed in (1, 2)]
    first, second = (quantize(fitted(), many, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    other = quantize(fitted(), many, seed=4).state_dict()
    assert any(not torch.equal(t, other[name]) for name, t in first.items())


def test_layers_one_by_one_have_the_rows_bits():
    int8, x = quantized(), smooth(2, 3, 64, seed=5)
    y = x
    for layer in int8.layers:
        y = layer(y)
    assert torch.equal(y, int8(x))


def test_blocks_without_a_row_share_their_quantisers():
    int8 = quantize(fitted(), calibration(), rows=False)
    blocks = [m for m in int8.modules() if isinstance(m, QuantizedBlock)]
    assert len(blocks) == 4 and type(int8.features) is nn.Sequential
    for block, following in itertools.pairwise(blocks):
        assert block.layer.int8_layer().y == following.layer.int8_layer().x


def test_biases_are_corrected():
    """The mean of what a layer gives, of each channel, is float's, though its weights are rounded."""
    int8, x = quantized(), torch.cat(calibration())
    floats = fitted().features[:5](x)
    y = int8.layers[0](x)
    for layer in int8.layers[1:4]:
        y = layer(y)
    off = (y - floats).mean((0, 2, 3)).abs()
    assert off.max() < 0.25 * int8.layers[3].int8_layer().y.scale


def test_state_dict_loads_without_images():
    int8, x = quantized(), smooth(2, 3, 64, seed=5)
    other = quantized_like(fitted())
    with pytest.raises(RuntimeError, match=r"no values yet: load_state_dict\(\)"):
        other(x)
    other.load_state_dict(int8.state_dict())
    assert torch.equal(other(x), int8(x))
    changed = {name: t.clone() for name, t in int8.state_dict().items()}
    changed["layers.5.project.bias"] += 1000
    other.load_state_dict(changed)  # what was read before is read anew
    assert not torch.equal(other(x), int8(x))
    assert [row.name for row in quantized_report(other).layers] == [row.name for row in quantized_report(int8).layers]


def test_copies(copied):
    int8, x = quantized(), smooth(2, 3, 64, seed=5)
    expected = int8(x)
    other = copied(int8)
    assert torch.equal(other(x), expected) and str(quantized_report(other)) == str(quantized_report(int8))


def test_what_is_refused_afterwards():
    int8, x = copy.deepcopy(quantized()), smooth(1, 3, 64)
    assert int8.eval() is int8 and int8.train(False) is int8
    with pytest.raises(RuntimeError, match=r"cannot train.*quantize\(model, images\) again"):
        int8.train()
    for change in (torch.Tensor.half, torch.Tensor.double):
        with pytest.raises(RuntimeError, match="stays on the CPU and takes float32"):
            int8._apply(change)
    with pytest.raises(RuntimeError, match="stays on the CPU"):
        int8.to("meta")
    assert torch.equal(int8.float()(x), quantized()(x))
    with pytest.raises(TypeError, match=r"takes float32, got x of torch.float64; convert it with x.float"):
        int8(x.double())
    with pytest.raises(ValueError, match=r"must be \[N, 3, H, W\], got \[3, 64, 64\]; add a batch"):
        int8(x[0])
    with pytest.raises(RuntimeError, match="no derivative"):
        int8(x.requires_grad_())
    with pytest.raises(TypeError, match="rows=False"):
        int8[0]


NAN = smooth(2, 3, 32)
NAN[1, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "calibration holds no images; give 100 to 300"),
        (iter(()), ValueError, "calibration holds no images"),
        ([torch.empty(0, 3, 32, 32)], ValueError, "calibration holds no images"),
        (3, TypeError, "must be an iterable of batches, got a int"),
        ("images", TypeError, "must be an iterable of batches, got a str"),
        ([NAN], ValueError, "batch 0 has 1 values that are NaN or infinite"),
        ([smooth(1, 3, 32), smooth(1, 4, 32)], ValueError, r"does not run on calibration batch 1, \[1, 4, 32, 32\]"),
        ([smooth(1, 3, 32)[0]], ValueError, r"batch 0 must be \[N, C, H, W\], got \[3, 32, 32\]"),
        ([torch.zeros(1, 3, 32, 32, dtype=torch.uint8)], TypeError, "batch 0 must be float32, got torch.uint8"),
        ([{"image": 1}], TypeError, "batch 0 must be a torch.Tensor, got a dict"),
    ],
)
def test_calibrations_that_are_refused(batches, error, message):
    with pytest.raises(error, match=message):
        quantize(fitted(), batches)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: 3, TypeError, "must be an nn.Module, got a int"),
        (lambda: fuse(fitted(), frozen=True), ValueError, "frozen model.*quantize the original"),
        (quantized, ValueError, "quantised already"),
        (lambda: copy.deepcopy(fitted()).half(), ValueError, r"torch.float16; call model.float\(\)"),
        (lambda: copy.deepcopy(fitted()).to("meta"), ValueError, r"on meta; call model.cpu\(\)"),
        (lambda: nn.Linear(3, 3), ValueError, "nothing to quantise: no inverted residual was found"),
        (lambda: Block(BlockSpec(8, 24, 8, activation="gelu")), ValueError, "nothing to quantise: .*has a gelu"),
    ],
)
def test_models_that_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        quantize(model(), calibration())


def test_skip_leaves_layers_float():
    int8 = quantize(fitted(), calibration(), skip=("features.2", "classifier"))
    reasons = {row.name: row.reason for row in quantized_report(int8).unquantized}
    assert reasons == {"features.2": "skip names it", "classifier.1": "skip names it"}
    x = smooth(4, 3, 64, seed=5)
    assert sqnr(fitted()(x), int8(x)) > 20
    with pytest.raises(ValueError, match=r"skip names 'features\.99', which is no module"):
        quantize(fitted(), calibration(), skip=("features.99",))
    with pytest.raises(TypeError, match=re.escape("give ('classifier',)")):
        quantize(fitted(), calibration(), skip="classifier")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (BlockSpec(8, 24, 8, activation="leaky_relu"), "has a leaky_relu"),
        (BlockSpec(8, 24, 8, activation="gelu"), "has a gelu"),
        (BlockSpec(8, 24, 8, residual=True, out_activation="relu"), "before x is added"),
        (BlockSpec(8, 24, 8, residual=True, out_activation="silu", activates_sum=True), "its sum has a silu"),
    ],
    ids=str,
)
def test_what_stays_float_says_why(spec, reason):
    model = nn.Sequential(Block(spec), Block(BlockSpec(8, 24, 8)), Block(BlockSpec(8, 16, 8)))
    x = smooth(8, 8, 16)
    int8 = quantize(model, [x])
    [row] = quantized_report(int8).unquantized
    assert reason in row.reason and reason in str(quantized_report(int8))
    assert sqnr(model(x), int8(x)) > 30


def test_a_block_that_images_do_not_reach():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Sequential(*(Block(BlockSpec(8, 24, 8)) for _ in range(3)))
            self.unused = Block(BlockSpec(8, 24, 8))

        def forward(self, x):
            return self.used(x) + 1  # else it were a row that leaves out what it does not run

    model = Net()
    with pytest.raises(ValueError, match=r"did not reach unused.*skip=\('unused"):
        quantize(model, [smooth(2, 8, 16)])


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v3_small"])
def test_own_networks(name):
    torch.manual_seed(0)
    model = fit_batch_norm(getattr(models, name)(width_mult=0.35).eval(), smooth(16, 3, 64))
    report = quantized_report(quantize(model, [smooth(16, 3, 64)]))
    assert not report.unquantized
    assert report.quantized[0].sqnr > 20


def stages_of(model):
    for module in model.modules():
        if isinstance(module, QuantizedStage):
            yield module.stage


def stays_below(stage):
    """How far a stage's quotients can go, whatever is in its input."""
    sums = 255 * stage.weight.flatten(1).abs().double().sum(1) + stage.bias.abs().double()
    return sums.max(), (sums * stage.multiplier * (1 if stage.scale is None else stage.scale)).max()


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_sums_and_quotients_fit_an_int32(name):
    """Also where images differ so little that channels hardly do, and where batch norms made up large weights."""
    torch.manual_seed(0)
    model = fit_batch_norm(getattr(models, name)(width_mult=0.35).eval(), smooth(4, 3, 64) * 1e-3)
    for images in (smooth(4, 3, 64), torch.zeros(2, 3, 64, 64)):
        found = [stays_below(stage) for stage in stages_of(quantize(model, [images]))]
        assert max(sums for sums, _ in found) < 2**31
        assert max(quotient for _, quotient in found) < 2**29


def test_channels_that_are_never_used():
    """Weights of 0 and channels without values give finite numbers, and what biases say."""
    model = Block(BlockSpec(8, 24, 12))
    with torch.no_grad():
        model.expand.weight[:4] = 0  # expanded channels that hold their biases
        model.expand.bias[:2] = -1  # and two that never pass ReLU6
        model.project.weight[:2] = 0
        model.project.bias[1] = 0
        model.project.bias[0] = 1e4 * model.project.weight.abs().max()
    x = smooth(8, 8, 16)
    int8 = quantize(model, [x])
    assert all(t.isfinite().all() for t in int8.state_dict().values())
    assert sqnr(model(x), int8(x)) > 30


def test_a_block_at_several_places():
    """Each place has scales of its own; nothing that another module wrote to counts as another block's result."""
    torch.manual_seed(0)
    first, second, shared = (Block(BlockSpec(8, 24, 8)) for _ in range(3))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([first, second, shared])

        def forward(self, x):
            y = self.blocks[0](x)
            y *= 30
            return self.blocks[2](self.blocks[2](self.blocks[1](y)) * 10)

    x = smooth(8, 8, 16)
    for model in (Net(), nn.Sequential(first, shared, second, shared, first)):
        assert sqnr(model(x), quantize(model, [x])(x)) > 20


def test_in_inference_mode():
    with torch.inference_mode():
        int8 = quantize(fitted(), [smooth(8, 3, 64)])
    assert not any(t.is_inference() for t in int8.buffers())
    assert int8(smooth(1, 3, 64)).shape == (1, 10)


def test_a_large_bias_fits():
    model = Block(BlockSpec(8, 24, 12))
    with torch.no_grad():
        model.depthwise.weight[0] *= 1e-9
        model.depthwise.bias[0] = 5.0
    x = smooth(8, 8, 16)
    int8 = quantize(model, [x])
    [layer] = [m for m in int8.modules() if hasattr(m, "int8_layer")]
    assert layer.int8_layer().depthwise.bias.abs().max() <= 2**30 + 2**25
    assert sqnr(model(x), int8(x)) > 30


def test_exports():
    assert {"quantize", "quantized_like", "quantized_report", "QuantizedReport"} <= set(mnv2_fused.__all__)
    with pytest.raises(ValueError, match="is not quantised"):
        quantized_report(fitted())


def test_flat_layers():
    """Blocks whose layers lie among others' in one Sequential."""
    torch.manual_seed(0)
    layers = [*flat.stem(), *flat.separable(8, 12), *flat.separable(12, 16, 2), *flat.separable(16, 16), *flat.head(16)]
    model = fit_batch_norm(nn.Sequential(*layers).eval(), smooth(16, 3, 64))
    x = smooth(8, 3, 64)
    report = quantized_report(quantize(model, [x]))
    assert not report.unquantized
    names = [row.name for row in report.quantized]
    assert names[1] == "9-14" and len(names) == len(set(names))
    int8 = quantize(model, [x], skip=("10",))
    assert [row.name for row in quantized_report(int8).unquantized] == ["9-14"]
    assert sqnr(model(x), int8(x)) > 20
    with pytest.raises(ValueError, match="it needs rows=True"):
        quantize(model, [x], rows=False)


@pytest.mark.parametrize(("channels", "reason"), [(16, None), (17, "its stem takes 17 channels, int8 at most 16")])
def test_stems_of_many_channels(channels, reason):
    model = models.mobilenet_v2(width_mult=0.35, num_classes=7).eval()
    first = model.features[0][0]
    model.features[0][0] = nn.Conv2d(channels, first.out_channels, 3, 2, 1, bias=False)
    x = smooth(4, channels, 32)
    int8 = quantize(model, [x])
    found = {row.name: row.reason for row in quantized_report(int8).unquantized}
    assert set(found.values()) == ({reason} if reason else set())
    assert sqnr(model(x), int8(x)) > 15


@by_isa
def test_a_call_needs_little_memory(isa):
    int8 = quantize(models.mobilenet_v2().eval(), smooth(2, 3, 64))
    x = smooth(1, 3, 224).contiguous(memory_format=torch.channels_last)
    with instruction_set(isa), threads(1), torch.inference_mode():
        assert peak_activation_bytes(lambda: int8(x)) < 0.6e6
