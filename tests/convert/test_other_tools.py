"""What users hold a fused model with: tracers, exporters and counters read what they would read of the original."""

import copy
import io
import subprocess
import sys
import warnings
from functools import cache

import pytest
import timm
import torch
import torchvision
from support.models import ahead_of_time, fitted, make_x, scripted
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import feature_extraction

from mnv2_fused import FusedBlock, fuse, unfuse
from mnv2_fused.module import compiled
from mnv2_fused.sequence import RunsFused
from mnv2_fused.testing import perturb_batch_norm


@cache
def original(name):
    torch.manual_seed(0)
    if name == "torchvision v2":
        return fitted()
    make = {
        "torchvision v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        "first blocks of v3": lambda: original("torchvision v3").features[:5],
        "timm efficientnet": lambda: timm.create_model("efficientnet_lite0", num_classes=10),
        "timm mobilenetv4": lambda: timm.create_model("mobilenetv4_conv_small", num_classes=10),
    }[name]
    return perturb_batch_norm(make().eval())


NAMES = ["torchvision v2", "torchvision v3", "timm efficientnet", "timm mobilenetv4"]
by_model = pytest.mark.parametrize("name", NAMES)
by_calls_before = pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def fused_of(name, called=False):
    model = fuse(original(name))
    assert number_of_fused(model)
    if called:
        with torch.no_grad():
            model(make_x())
    return model


def other(name):
    return perturb_batch_norm(copy.deepcopy(original(name)), seed=5)


def same(y, expected):
    largest = expected.abs().max()
    return y.shape == expected.shape and (y - expected).abs().max() <= 1e-5 * largest


@quietly
@by_calls_before
@by_model
def test_jit_trace(name, called):
    """The trace is the ordinary modules': it owns their parameters, so that another state changes its results."""
    model = fused_of(name, called)
    traced = torch.jit.trace(model, make_x())
    assert "mnv2_fused::" not in str(traced.inlined_graph)
    x = make_x(3)
    assert same(traced(x), original(name)(x))
    traced.load_state_dict(other(name).state_dict())
    assert same(traced(x), other(name)(x))


@quietly
@by_calls_before
@by_model
def test_jit_trace_without_gradients(name, called):
    with torch.no_grad():
        traced = torch.jit.trace(fused_of(name, called), make_x())
    assert "mnv2_fused::" not in str(traced.inlined_graph)
    assert same(traced(make_x(3)), original(name)(make_x(3)))


@by_calls_before
@by_model
def test_fx_traces_into_blocks(name, called):
    model = fused_of(name, called)
    traced = torch.fx.symbolic_trace(model)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    leaves = [traced.get_submodule(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert {id(c) for c in convs} <= {id(m) for m in leaves}
    assert same(traced(make_x(3)), original(name)(make_x(3)))


@quietly
@by_model
def test_jit_script(name):
    """torch.jit.script writes what it compiles into the model that it is given, unless that says what to compile."""
    models = []

    def make():
        models.append(fused_of(name))
        return models[-1]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script = scripted(make)
    x = make_x(3)
    assert same(script(x), original(name)(x))
    script.train()
    script(x).sum().backward()
    assert all(p.grad is not None for p in script.parameters() if p.requires_grad)
    # These networks are seen as a whole, and say what is compiled; a module that is none loses its blocks.
    assert isinstance(models[-1], RunsFused) and number_of_fused(models[-1]) == number_of_fused(fused_of(name))
    assert not any("call fuse() again" in str(w.message) for w in caught)


@quietly
def test_jit_script_of_blocks_in_a_module_of_torch():
    blocks = [m for m in fused_of("torchvision v2").modules() if isinstance(m, FusedBlock)]
    model, x = torch.nn.Sequential(*blocks[1:3]), torch.randn(2, blocks[1].spec.in_channels, 8, 9)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"call fuse\(\) again"):
        script = scripted(lambda: model)
    assert same(script(x), expected)
    assert number_of_fused(model) == 0 and number_of_fused(fuse(model)) == 2


def number_of_fused(model):
    return sum(isinstance(m, FusedBlock) for m in model.modules())


def by_onnx(model, x, **options):
    import onnxruntime

    file = io.BytesIO()
    if options["dynamo"]:
        torch.onnx.export(model, (x,), **options).save(file)
    else:
        torch.onnx.export(model, (x,), file, **options)
    session = onnxruntime.InferenceSession(file.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["by trace", "by export"])
@by_model
def test_onnx(name, dynamo):
    x = make_x(2)
    assert same(by_onnx(fused_of(name, called=True), x, dynamo=dynamo, verbose=False), original(name)(x))


@quietly
@pytest.mark.slow
@by_model
def test_openvino(name):
    import openvino

    x = make_x(2)
    found = openvino.convert_model(fused_of(name), example_input=x)
    # In float32, as it was exported: some processors get bfloat16 unasked.
    run = openvino.compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert same(torch.from_numpy(run(x.numpy())[0]), original(name)(x))


by_freezing = pytest.mark.parametrize("frozen", [False, True], ids=["in step", "frozen"])


def exported(name, frozen):
    model = fuse(original(name), frozen=frozen)
    sizes = {0: torch.export.Dim("images", min=1, max=64)}
    with torch.no_grad():
        return torch.export.export(model, (make_x(2),), dynamic_shapes=(sizes,))


@pytest.mark.filterwarnings("ignore:an exported program of fused blocks folds")
@by_freezing
@by_model
def test_export(name, frozen):
    program = exported(name, frozen)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = make_x(3)
    for run in (program, torch.export.load(file)):
        assert same(run.module()(x), original(name)(x))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    if frozen and name == "torchvision v2":
        assert calls == ["mnv2_fused.sequence.default", "aten.flatten.using_ints"]
    assert any("mnv2_fused" in call for call in calls)
    assert ("aten.rsqrt.default" in calls) is not frozen  # of norms that are folded at each call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torchvision v2", "torchvision v3"])
def test_a_quantiser_that_traces_sees_the_convolutions(name):
    """torch's by fx, as it does of the original; those that export are told to unfuse first."""
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = pytest.importorskip("torch.ao.quantization").get_default_qconfig_mapping("x86")
    observers = []
    for model in (copy.deepcopy(original(name)), fuse(original(name))):  # whose modules are told things
        prepared = fx.prepare_fx(model, mapping, (make_x(1),))
        observers.append(sum("Observer" in type(m).__name__ for m in prepared.modules()))
    assert observers[0] == observers[1] > 10


def test_exports_that_fold_say_so():
    compiled._warn_of_folding.cache_clear()
    with pytest.warns(UserWarning, match=r"export fuse\(model, frozen=True\).*quantisers .*unfuse\(model\) first"):
        exported("torchvision v2", False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an exported program")
        exported("torchvision v2", False)
        compiled._warn_of_folding.cache_clear()
        exported("torchvision v2", True)


RUN_PACKAGE = """
import sys, torch
import mnv2_fused  # the operators
x, expected = torch.load(sys.argv[2])
y = torch._inductor.aoti_load_package(sys.argv[1])(x)
assert y.shape == expected.shape and (y - expected).abs().max() <= 1e-5 * expected.abs().max()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "frozen"),
    [("torchvision v2", True), ("first blocks of v3", False)],
    ids=["torchvision v2-frozen", "first blocks of v3-in step"],
)
def test_ahead_of_time_inductor(name, frozen, tmp_path):
    """Compiled here, run in a process of its own: one with empty lists among its arguments, and one without."""
    package = ahead_of_time(exported(name, frozen), tmp_path / "m.pt2")
    x = make_x(3)
    with torch.no_grad():
        torch.save((x, original(name)(x)), tmp_path / "x.pt")
    command = [sys.executable, "-W", "ignore", "-c", RUN_PACKAGE, package, str(tmp_path / "x.pt")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def flops(model, *args, backward=False):
    with FlopCounterMode(display=False) as counter:
        y = model(*args)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@by_model
def test_flop_counter(name):
    """Whichever way a fused model runs, as many multiply-adds as the original."""
    x, model = make_x(2), fused_of(name)
    expected = flops(original(name), x)
    assert flops(model, x) == expected  # with gradients: block by block
    for _ in range(2):
        with torch.no_grad():
            assert flops(model, x) == expected
    with torch.inference_mode():
        assert flops(model, x) == expected
    with torch.no_grad():
        assert flops(fuse(original(name), frozen=True), x) == expected
    # Forward and two products of each convolution backward, and what training kernels compute again.
    assert flops(fuse(copy.deepcopy(original(name)).train()), x, backward=True) > 3 * expected


@by_model
def test_flop_counter_in_a_graph(name):
    torch._dynamo.reset()
    x, model = make_x(2), fused_of(name)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        assert flops(compiled, x) == flops(original(name), x)


def test_flops_of_a_backward_are_those_that_run():
    """The block's own derivative computes the expanded tensor again: forward counts twice, as under a checkpoint."""
    block = torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 6).eval()
    x = torch.randn(2, 8, 12, 13, requires_grad=True)
    forward = flops(block, x)
    both = flops(block, x, backward=True)
    assert flops(fuse(block), x, backward=True) == both + forward


def test_flops_of_rows():
    """Counting by module hooks the modules, so that a whole row runs only beside one that does not."""
    model, x = fused_of("torchvision v2", called=True), make_x()
    (row,) = model._prepared.steps
    with torch.no_grad():
        assert flops(row.call, x) == flops(original("torchvision v2"), x)
        y = torch.ops.mnv2_fused.sequence(x, row.weights, row.geometry)
        assert flops(torch.ops.mnv2_fused.sequence, x, row.weights, row.geometry) == flops(row.call, x)
        assert torch.equal(y.flatten(1), model(x))


def test_every_op_is_counted():
    from torch.utils.flop_counter import flop_registry

    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mnv2_fused::")}
    ops = {getattr(torch.ops.mnv2_fused, name.split("::")[1]) for name in schemas}
    assert len(ops) > 5
    assert ops <= set(flop_registry)


def test_unfused_models_script_as_they_are():
    model = unfuse(fused_of("torchvision v2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        script = scripted(lambda: model)
    assert same(script(make_x()), original("torchvision v2")(make_x()))


def test_copies_of_feature_extractors_keep_their_mode():
    """Their deepcopy comes in train(); and where there is nothing to fuse, the warning says what to do."""
    extractor = feature_extraction.create_feature_extractor(original("torchvision v2"), ["features.1", "features.3"])
    assert not extractor.training and copy.deepcopy(extractor).training  # torchvision's doing
    with pytest.warns(UserWarning, match="fuse first, then trace or extract features"):
        model = fuse(extractor)
    x = make_x()
    assert not any(m.training for m in (*model.modules(), *unfuse(model).modules()))
    assert all(torch.equal(a, b) for a, b in zip(model(x).values(), extractor(x).values(), strict=True))


def test_feature_extractors_of_fused_models():
    names = ["features.1", "features.3"]
    model, x = fused_of("torchvision v2"), make_x()
    leaves = {"leaf_modules": [FusedBlock]}
    expected = feature_extraction.create_feature_extractor(original("torchvision v2"), names)(x)
    for options in ({}, {"tracer_kwargs": leaves}):
        found = feature_extraction.create_feature_extractor(model, names, **options)
        assert (number_of_fused(found) > 0) is bool(options)
        assert all(same(found(x)[name], expected[name]) for name in names)


SAVING = ["torchvision v2", "timm efficientnet"]


@pytest.mark.parametrize("name", SAVING)
def test_weights_can_be_pruned_and_saved_as_the_originals(name, tmp_path):
    """Where weights were moved to channels_last, both refused the stem's."""
    import safetensors.torch as safetensors

    model = fused_of(name)
    stem = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    safetensors.save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    loaded = safetensors.load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in original(name).state_dict().items())
    prune.l1_unstructured(stem, "weight", 0.5)
    x = make_x()
    pruned = copy.deepcopy(original(name))
    prune.l1_unstructured(next(m for m in pruned.modules() if isinstance(m, torch.nn.Conv2d)), "weight", 0.5)
    assert same(model(x), pruned(x))
