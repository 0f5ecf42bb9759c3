"""quantized_from: networks that torch quantised in eager mode, integer for integer beside torch's own kernels."""

import copy
import pickle
import warnings
from functools import cache, partial

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as ao
import torchvision
from support.devices import by_isa
from support.int8 import smooth, sqnr
from torch import nn
from torchvision.models import quantization as networks
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from mnv2_fused import models, quantize, quantized_from, quantized_like, quantized_report
from mnv2_fused.int8.layers import Quantizer, run_layer, run_reference
from mnv2_fused.int8.modules import QuantizedModel, QuantizedRow
from mnv2_fused.testing import fit_batch_norm, instruction_set

ENGINES = [e for e in ("qnnpack", "fbgemm", "x86", "onednn") if e in torch.backends.quantized.supported_engines]
needs_qnnpack = pytest.mark.skipif("qnnpack" not in ENGINES, reason="torch has no QNNPACK here")
pytestmark = [
    pytest.mark.skipif(not ENGINES, reason="torch has no engine for quantised layers here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
V2 = {"inverted_residual_setting": [[1, 8, 1, 1], [3, 16, 2, 2], [3, 24, 1, 1]]}
NO_RESIDUALS = {"inverted_residual_setting": [[1, 8, 1, 1], [3, 16, 1, 2], [3, 24, 1, 1]]}
STEPS = {  # kernel, hidden channels, channels, squeeze, activation, stride, dilation of a MobileNetV3
    "residuals": [(3, 16, 16, False, "RE", 1, 1), (5, 48, 24, True, "RE", 2, 1), (3, 64, 24, True, "HS", 1, 1)],
    "stem in a block": [(3, 16, 8, False, "RE", 1, 1), (3, 32, 16, False, "HS", 1, 2)],
}


@pytest.fixture(autouse=True)
def _engine():
    engine = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = engine


def v3(steps):
    settings, channels = [], 16
    for kernel, hidden, out, squeeze, activation, stride, dilation in steps:
        args = channels, kernel, hidden, out, squeeze, activation, stride, dilation
        settings.append(InvertedResidualConfig(*args, width_mult=1.0))
        channels = out
    block = networks.mobilenetv3.QuantizableInvertedResidual
    model = networks.QuantizableMobileNetV3(settings, 64, num_classes=10, block=block)
    networks.utils._replace_relu(model)
    return model


MODELS = {
    "v2": partial(networks.mobilenet_v2, num_classes=10, quantize=False, **V2),
    "no residuals": partial(networks.mobilenet_v2, num_classes=10, quantize=False, **NO_RESIDUALS),
    **{f"v3, {name}": partial(v3, steps) for name, steps in STEPS.items()},
}


@cache
def floats(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    return fit_batch_norm(model.eval(), torch.randn(8, 3, 64, 64))


def prepared(name, engine, fuse=True, **options):
    """Calibrated, and not converted; ``options`` of a QConfig."""
    torch.backends.quantized.engine = engine
    model = copy.deepcopy(floats(name))
    if fuse:
        model.fuse_model(is_qat=False)
    model.qconfig = ao.get_default_qconfig(engine)._replace(**options)
    ao.prepare(model, inplace=True)
    with torch.no_grad():
        model(smooth(8, 3, 64))
    return model


@cache
def converted(name, engine):
    return ao.convert(prepared(name, engine))


def layer_by_layer(model, x):
    """(name, layer, torch's integers, ours of torch's input) of each layer."""
    given = {}

    def note(name, _, args, y):
        given[name] = args[0], y

    hooks = [m.register_forward_hook(partial(note, name)) for name, m in model.named_modules()]
    model(x)
    for hook in hooks:
        hook.remove()
    int8 = quantized_from(model)
    row = int8 if isinstance(int8, QuantizedRow) else int8._modules["1"]
    features = f"features.{len(model.features) - 1}"
    for report, layer in zip(quantized_report(int8).layers, row.int8_layers(), strict=True):
        q, y = given[report.name][0].int_repr(), given[report.name][1]
        if layer.expand is not None and layer.expand.weight.dim() == 4:
            q = given["features.0"][0].int_repr()
        elif report.name == "features.0":
            padded = nn.functional.pad(q.float(), (1, 1, 1, 1), value=layer.x.zero)
            q = nn.functional.unfold(padded, 3, stride=2).unflatten(2, y.shape[2:]).to(torch.uint8)
        elif report.name == features:
            y = nn.functional.adaptive_avg_pool2d(y, 1)
        elif report.name == "classifier.0":
            y = given["classifier.1"][1]
        q, y = (t if t.dim() == 4 else t[:, :, None, None] for t in (q, y.int_repr()))
        yield report.name, layer, y.int(), run_layer(q, layer).int()


@needs_qnnpack
@by_isa
def test_a_network_without_residuals_has_qnnpacks_bits(isa):
    model = converted("no residuals", "qnnpack")
    int8, x = quantized_from(model), smooth(4, 3, 64, seed=5)
    assert type(int8) is QuantizedRow and not list(int8.parameters())
    with instruction_set(isa):
        assert torch.equal(int8(x), model(x))


@by_isa
def test_weights_of_minus_128(isa):
    """torch's range of weights has 256 values, that of ``quantize`` 255."""
    model, x = quantized_from(converted("v2", ENGINES[0])), smooth(2, 3, 64, seed=5)
    state = {
        n: t.clamp(max=-128) if n.endswith("weight") and "project" not in n else t
        for n, t in model.state_dict().items()
    }
    model.load_state_dict(state)
    with instruction_set(isa):
        assert torch.equal(model(x), run_reference(x, model.int8_layers()))


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_without_residual_are_torchs(engine):
    """Other engines than QNNPACK add the bias in float32, where it is no whole number of steps."""
    found = list(layer_by_layer(converted("v2", engine), smooth(8, 3, 64, seed=5)))
    assert [name for name, *_ in found] == [*(f"features.{n}" for n in range(1, 6)), "classifier.1"]
    for name, layer, expected, given in found:
        off = (expected - given).abs()
        if layer.residual_scale:
            assert off.max() <= 1, name  # torch rounds the projection's result before x is added
        elif engine == "qnnpack":
            assert off.max() == 0, name
        else:
            assert off.max() <= 2 and (off > 0).float().mean() < 0.05, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [n for n in MODELS if n != "no residuals"])
def test_networks_are_near_torchs(name, engine):
    model, x = converted(name, engine), smooth(16, 3, 64, seed=5)
    expected, given = model(x), quantized_from(model)(x)
    assert given.dtype == torch.float32 and given.shape == expected.shape
    steps = ((given - expected) / model.classifier[-1].scale).abs()
    assert steps.max() < 10 and steps.mean() < 2
    first, second = expected.topk(2).values.unbind(1)
    clear = first - second > 6 * model.classifier[-1].scale
    assert torch.equal(given.argmax(1)[clear], expected.argmax(1)[clear])
    in_float = floats(name)(x)
    assert sqnr(in_float, given) > sqnr(in_float, expected) - 2  # hardly worse than torch's own


@needs_qnnpack
@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("v3")])
def test_layers_of_v3_are_near_torchs(name):
    """torch rounds in front of hardswish, gates, and before x is added."""
    for layer_name, _, expected, given in layer_by_layer(converted(name, "qnnpack"), smooth(8, 3, 64, seed=5)):
        off = (expected - given).abs().float()
        assert off.mean() < 1 and off.max() <= 8, layer_name
        if layer_name == "classifier.3":
            assert off.max() == 0


def test_the_stem_of_v3_joins_a_block_without_residual():
    first = quantized_from(converted("v3, stem in a block", ENGINES[0]))
    assert type(first) is QuantizedRow
    second = quantized_from(converted("v3, residuals", ENGINES[0]))
    assert type(second) is QuantizedModel and quantized_report(second).layers[0].name == "features.0"


def test_all_engines_pack_the_same():
    """What a model was packed for does not matter: it is unpacked, whichever engine is chosen then."""
    models_of = [prepared("v2", "qnnpack" if "qnnpack" in ENGINES else ENGINES[0])]
    models_of = [copy.deepcopy(models_of[0]) for _ in ENGINES]
    states = []
    for engine, model in zip(ENGINES, models_of, strict=True):
        torch.backends.quantized.engine = engine
        ao.convert(model, inplace=True)
        torch.backends.quantized.engine = ENGINES[0]
        states.append(quantized_from(model).state_dict())
    for state in states[1:]:
        assert all(torch.equal(t, states[0][name]) for name, t in state.items())


WEIGHTS = {
    "per tensor": ao.default_weight_observer,
    "per channel": ao.default_per_channel_weight_observer,
}


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@needs_qnnpack
def test_ranges_and_schemes_of_weights(weights, reduce_range):
    observer = ao.HistogramObserver.with_args(reduce_range=reduce_range)
    model = ao.convert(prepared("no residuals", "qnnpack", weight=WEIGHTS[weights], activation=observer))
    x = smooth(4, 3, 64, seed=5)
    assert torch.equal(quantized_from(model)(x), model(x))


@needs_qnnpack
def test_training_aware_of_quantisation():
    torch.backends.quantized.engine = "qnnpack"
    model = copy.deepcopy(floats("no residuals")).train()
    model.fuse_model(is_qat=True)
    model.qconfig = ao.get_default_qat_qconfig("qnnpack")
    ao.prepare_qat(model, inplace=True)
    model(smooth(8, 3, 64))
    with pytest.raises(ValueError, match=r"prepared, and not converted yet: call torch.ao.quantization.convert"):
        quantized_from(model)
    model, x = ao.convert(model.eval()), smooth(4, 3, 64, seed=5)
    assert torch.equal(quantized_from(model)(x), model(x))


def test_saves_and_loads():
    int8, x = quantized_from(converted("v2", ENGINES[0])), smooth(2, 3, 64, seed=5)
    for made in (int8, quantized_from(converted("v3, residuals", ENGINES[0]))):
        assert torch.equal(pickle.loads(pickle.dumps(made))(x), made(x))
    other = quantized_like(torchvision.models.MobileNetV2(num_classes=10, **V2).eval())
    other.load_state_dict(int8.state_dict())
    assert torch.equal(other(x), int8(x))


def test_the_original_stays_as_it_is():
    model, x = converted("v2", ENGINES[0]), smooth(2, 3, 64, seed=5)
    before = model(x)
    quantized_from(model)
    assert torch.equal(model(x), before)
    report = quantized_report(quantized_from(model))
    assert len(report.quantized) == 6 and not report.unquantized


@needs_qnnpack
def test_a_bias_that_is_larger_than_an_int32():
    """Of a channel that is nearly dead."""
    model = copy.deepcopy(converted("no residuals", "qnnpack"))
    conv = model.features[3].conv[2]
    weight, bias = conv._weight_bias()
    q, scales = weight.int_repr(), torch.full((len(bias),), weight.q_scale(), dtype=torch.float64)
    scales[0], bias[0] = 1e-12, 1.0
    zeros = torch.zeros(len(bias), dtype=torch.int64)
    conv.set_weight_bias(torch._make_per_channel_quantized_tensor(q, scales, zeros, 0), bias)
    layer = quantized_from(model).layers[2].int8_layer()
    stage = layer.project
    assert float(stage.bias[0]) * float(stage.multiplier[0]) * layer.y.scale == pytest.approx(1.0, rel=0.01)


def test_quantising_rounds_as_torch():
    x = (torch.arange(-400, 400) + 0.5) * 0.5
    for zero in (113, 114):
        expected = torch.quantize_per_tensor(x, 0.5, zero, torch.quint8).int_repr()
        assert torch.equal(Quantizer(0.5, zero).quantize(x), expected)


def refused(kind, match, model, function=quantized_from):
    with pytest.raises(kind, match=match):
        function(model)


def test_other_models_are_refused():
    refused(TypeError, "takes MobileNetV2 and MobileNetV3 of torchvision.models.quantization, got", nn.ReLU())
    refused(TypeError, "give float models to mnv2_fused.quantize", models.mobilenet_v2(width_mult=0.35))
    refused(ValueError, "the model is float", floats("v2"))
    refused(ValueError, "prepared, and not converted yet", prepared("v2", ENGINES[0]))
    model = converted("v2", ENGINES[0])
    refused(TypeError, "got torch.nn.modules.container.Sequential", nn.Sequential(model))
    refused(ValueError, "quantised already", quantized_from(model))
    refused(
        ValueError, r"mnv2_fused.quantized_from\(model\) reads it", model, lambda m: quantize(m, [smooth(1, 3, 64)])
    )
    refused(ValueError, r"mnv2_fused.quantized_from\(model\) reads it", model, quantized_like)


def test_unfused_layers_are_refused():
    model = ao.convert(prepared("v2", ENGINES[0], fuse=False))
    refused(ValueError, r"features.0.1 is a .*BatchNorm2d.*: call model.fuse_model\(\) before", model)


def test_a_part_in_float_is_refused():
    model = copy.deepcopy(converted("v2", ENGINES[0]))
    model.features[2].conv[2] = nn.Conv2d(24, 16, 1)
    refused(ValueError, "features.2.conv.2 is a torch.nn.modules.conv.Conv2d, which quantized_from does not", model)
    model.quant = ao.QuantStub()
    refused(ValueError, "quant is a .*QuantStub, not torch's Quantize: quantise the whole model", model)


def test_hooks_are_refused():
    model = copy.deepcopy(converted("v2", ENGINES[0]))
    model.features[2].register_forward_hook(lambda *_: None)
    refused(ValueError, "the model cannot be read: .*hook", model)


def test_weights_and_activations_of_other_types_are_refused():
    model = copy.deepcopy(converted("v2", ENGINES[0]))
    model.quant = nnq.Quantize(0.1, 0, torch.qint8)
    refused(ValueError, r"activations are torch.qint8, int8 takes torch.quint8", model)
    torch.backends.quantized.engine = "qnnpack" if "qnnpack" in ENGINES else ENGINES[0]
    model = copy.deepcopy(converted("v2", ENGINES[0]))
    conv = model.features[2].conv[2]
    weight, bias = conv._weight_bias()
    conv.set_weight_bias(torch._make_per_tensor_quantized_tensor(weight.int_repr(), 0.1, 3), bias)
    refused(ValueError, "features.2.conv.2 has weights with a zero point that is not 0: quantise them symm", model)


def test_nothing_warns_of_what_is_deprecated():
    model = converted("v2", ENGINES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized_from(model)
