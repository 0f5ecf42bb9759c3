"""What 0.1.0 saved still loads and gives the same bits, and what it called public is still there (tests/fixtures)."""

import copy
import gzip
import importlib
import inspect
import io
import pickle
import platform

import pytest
import torch
from fixtures.make_fixtures import CASES, EveryArgument, values_of
from support.source_tree import ROOT
from torch import nn

import mnv2_fused
from mnv2_fused import FusedBlock, backends, gpus
from mnv2_fused.testing import agreement, available_instruction_sets, instruction_set

FILES = ROOT / "tests/fixtures/v0.1.0"
# What decides the order of sums besides the code: of x86-64 the portable instruction set has no fused multiply-add, of
# other processors it may; every weight and image of the files lies in a quarter of this L2.
SAME_ORDER = platform.machine() in ("x86_64", "AMD64") and backends._C.l2_bytes() >= 256 << 10


def contents(name, kind):
    return io.BytesIO(gzip.decompress((FILES / f"{name}.{kind}.gz").read_bytes()))


def load(name, kind):
    for package in CASES[name].needs if name in CASES else ():
        pytest.importorskip(package)
    file = contents(name, kind)
    if kind == "module":
        return torch.load(file, weights_only=False)
    if kind == "pickle":
        return pickle.load(file)
    if kind == "traced":
        return torch.jit.load(file)
    if kind == "program":
        return torch.export.load(file).module()
    return torch.load(file, weights_only=True)


def of_kind(*kinds):
    return pytest.mark.parametrize(
        ("name", "kind"), [(name, kind) for name, case in CASES.items() for kind in case.kinds if kind in kinds]
    )


def fresh(name, state):
    """The case's model, made by this version, with these weights."""
    model = CASES[name].make().eval().to(CASES[name].dtype)
    model.load_state_dict(state)
    return model


def in_eager(model, x):
    """By the ordinary modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNV2_FUSED_BACKEND", "eager")
        return copy.deepcopy(model)(x)


def check_same_bits(call, y):
    """``call`` gives ``y`` by the instruction set that computed it."""
    with instruction_set("portable"):
        got = call()
    assert got.dtype == y.dtype and got.stride() == y.stride()
    if SAME_ORDER:
        assert torch.equal(got, y)


def check_in_tolerance(y, model, x):
    found = agreement(y, in_eager(model, x), in_eager(copy.deepcopy(model).double(), x.double()))
    assert found.ok, found


def check_saved(name, call, saved, model):
    """``call`` gives what was saved, to the bit where nothing but the code decides it; else both are in tolerance.

    Not both: how near eager is to float64 on a file's few values, the processor decides.
    """
    if CASES[name].kernels_only:
        check_same_bits(lambda: call(saved["x"]), saved["y"])
    if not (CASES[name].kernels_only and SAME_ORDER):
        check_in_tolerance(saved["y"], model, saved["x"])
        with instruction_set("portable"):
            check_in_tolerance(call(saved["x"]), model, saved["x"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_no_file_is_left_out():
    expected = {f"{name}.{kind}.gz" for name, case in CASES.items() for kind in (*case.kinds, "io")}
    expected |= {"every_argument.program.gz", "every_argument.io.gz", "objects.pickle.gz", "objects.io.gz"}
    assert {path.name for path in FILES.iterdir()} == expected


@of_kind("module", "pickle")
def test_models_load_and_give_the_same_bits(name, kind):
    model, saved = load(name, kind), load(name, "io")
    x = saved["x"]
    check_saved(name, copy.deepcopy(model), saved, model)
    for isa in available_instruction_sets():
        if isa != "portable":
            with instruction_set(isa):
                check_in_tolerance(copy.deepcopy(model)(x), model, x)
    new = fresh(name, model.state_dict())
    # As 0.1.0's fuse left weights, which decides how torch's own convolutions round.
    new._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)
    assert torch.equal(model(x), new(x))
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in new.named_modules()]


@of_kind("module", "pickle")
def test_loaded_models_live_on(name, kind):
    model, x = load(name, kind), load(name, "io")["x"]
    y, new = model(x), fresh(name, model.state_dict())
    assert mnv2_fused.report(model) == mnv2_fused.report(new)
    assert [str(m) for m in model.modules()] == [str(m) for m in new.modules()]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), y)
    # A weight that changes is noticed.
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    conv.weight.mul_(2)
    assert torch.equal(model(x), fresh(name, model.state_dict())(x)) and not torch.equal(model(x), y)
    with torch.enable_grad():
        model.train()(x).float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@of_kind("module", "pickle")
def test_loaded_models_unfuse(name, kind):
    pytest.importorskip("torchvision", reason="a constructed block unfuses to torchvision's")
    model, x = load(name, kind), load(name, "io")["x"]
    new = fresh(name, model.state_dict())
    y = in_eager(model, x)
    plain, expected = mnv2_fused.unfuse(model), mnv2_fused.unfuse(new)
    assert not any(isinstance(m, FusedBlock) for m in plain.modules())
    assert torch.equal(plain(x), y)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [(n, type(m), sorted(vars(m))) for n, m in plain.named_modules()] == [
        (n, type(m), sorted(vars(m))) for n, m in expected.named_modules()
    ]


@of_kind("state")
def test_state_dicts_load_and_give_the_same_bits(name, kind):
    state, saved = load(name, kind), load(name, "io")
    model = fresh(name, state)
    assert list(model.state_dict()) == list(state)
    check_saved(name, model, saved, model)


@of_kind("program", "traced")
def test_programs_load_and_give_the_same_bits(name, kind):
    program, saved = load(name, kind), load(name, "io")
    x, y = saved["x"], saved["y"]
    check_same_bits(lambda: program(x), y)
    assert torch.equal(program(x), load(name, "module")(x))


@of_kind("program")
def test_programs_call_the_op(name, kind):
    calls = [str(node.target) for node in load(name, kind).graph.nodes if "mnv2_fused" in str(node.target)]
    assert calls and set(calls) == {"mnv2_fused.inverted_residual.default"}


@pytest.mark.parametrize(
    ("name", "op"),
    [("constructed", "inverted_residual"), ("two_blocks", "sequence"), ("torchvision_v3_block", "inverted_residual")],
)
def test_traced_programs_call_the_op(name, op):
    assert f"mnv2_fused::{op}(" in str(load(name, "traced").inlined_graph)


def test_ops_take_every_argument_of_a_saved_program():
    program, saved = load("every_argument", "program"), load("every_argument", "io")
    calls = [str(node.target) for node in program.graph.nodes if "mnv2_fused" in str(node.target)]
    assert calls == [
        "mnv2_fused.inverted_residual.default",
        "mnv2_fused.sequence.default",
        *["mnv2_fused.cached_inverted_residual.default"] * 2,
        "mnv2_fused.cached_sequence.default",
    ]
    for i, y in enumerate(saved["y"]):
        check_same_bits(lambda i=i: program(saved["x"])[i], y)
    # Weights are packed now as they were packed then.
    new = EveryArgument().eval()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(new(saved["x"]), program(saved["x"]), strict=True))
    packed = dict(program.named_buffers())
    assert all(torch.equal(t, packed[name]) for name, t in new.named_buffers() if name.startswith(("w_", "b_")))
    assert torch.equal(new.weights, packed["weights"])


def holds(values, kept):
    """Whether ``values`` are those that were kept, fields apart that came later."""
    if isinstance(kept, dict):
        return all(name in values and holds(values[name], value) for name, value in kept.items())
    if isinstance(kept, list):
        return len(values) == len(kept) and all(map(holds, values, kept))
    return values == kept


def test_objects_load():
    found, saved = load("objects", "pickle"), load("objects", "io")
    for name, thing in found.items():
        kept, values = saved["values"][name], values_of(thing)
        if name in ("weights", "packed"):
            assert list(values) == list(kept)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(thing, kept.values(), strict=True))
            continue
        assert holds(values, kept), name
        assert str(thing)
        assert pickle.loads(pickle.dumps(thing)) == thing
    x, y = saved["x"], saved["y"]
    spec = mnv2_fused.BlockSpec(8, 16, 12, stride=2)
    for weights in (found["weights"], found["packed"]):
        for plan in (None, found["plan"]):
            check_same_bits(lambda w=weights, p=plan: mnv2_fused.inverted_residual(x, w, stride=2, plan=p), y)
    packed = mnv2_fused.pack(found["weights"])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(packed, found["packed"], strict=True))
    with instruction_set("portable"):
        assert mnv2_fused.plan(spec, (2, 8, 7, 6), threads=2) == found["plan"] or not SAME_ORDER
    assert mnv2_fused.cuda_plan(spec, (2, 8, 7, 6)) == found["cuda_plan"]
    assert mnv2_fused.triton_plan(spec, (2, 8, 7, 6)) == found["triton_plan"]
    assert found["gpu"] == gpus.H200


# Where pickles find classes and functions; a pickle imports the module by its name.
PICKLED = {
    "block": ["BlockSpec"],
    "convert": ["BlockReport", "LayerReport", "Report"],
    "cuda_plan": ["CudaPlan"],
    "families": [
        *("FusedTransformersStem", "read_efficientnet", "read_mnasnet", "read_mobilenet_v2", "read_mobilenet_v3"),
        *("read_sequential", "read_timm", "read_transformers", "read_transformers_stem"),
    ],
    "fold": ["BlockWeights", "PackedWeights"],
    "gpus": ["Gpu"],
    "models": ["FusedMobileNet", "InvertedResidual", "InvertedResidualV3", "MobileNet", "SqueezeExcitation"],
    "module": ["FusedInPlace", "FusedInvertedResidual", "_restored"],
    "plan": ["Plan"],
    "sequence": ["FusedSequential"],
    "torchvision_model": ["EfficientNet", "MobileNetV2", "MobileNetV3"],
    "triton_plan": ["TritonPlan"],
}


class _Names(pickle.Unpickler):
    def __init__(self, file, names):
        super().__init__(file)
        self.names = names

    def find_class(self, module, name):
        package, _, module_name = module.partition(".")
        if package == "mnv2_fused":
            self.names.setdefault(module_name, set()).add(name)
        return super().find_class(module, name)


@pytest.mark.parametrize("module", PICKLED)
def test_names_in_pickles_are_found(module):
    if module == "torchvision_model":
        pytest.importorskip("torchvision")
    found = importlib.import_module(f"mnv2_fused.{module}")
    assert all(callable(getattr(found, name)) for name in PICKLED[module])


def test_names_in_pickles_are_all_listed():
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package)
    names = {}
    for path in FILES.glob("*.pickle.gz"):
        _Names(io.BytesIO(gzip.decompress(path.read_bytes())), names).load()
    assert names and all(found <= set(PICKLED[module]) for module, found in names.items())


# Without annotations; a default that is no plain value by its type's name.
SIGNATURES = {
    "BlockSpec": "in_channels, hidden_channels, out_channels, stride=1, expand=True, residual=False, kernel=3, "
    "dilation=1, padding=None, activation='relu6', out_activation='identity', squeeze_channels=0, "
    "squeeze_activation='relu', gate='hardsigmoid'",
    "BlockWeights": "w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project, w_squeeze=None, "
    "b_squeeze=None, w_excite=None, b_excite=None",
    "CudaPlan": "images, tile_rows, tile_cols, strip_rows, group, splits, out_panels, out_blocks, warps, "
    "thread_blocks, shared_bytes, resident, partial_bytes, squeeze_bytes, bytes_never_written, bytes, recompute, "
    "seconds",
    "FusedBlock": "*args, **kwargs",
    "FusedInvertedResidual": "inp, oup, stride, expand_ratio, norm_layer=None, *, backend='auto', recompute=False",
    "PackedWeights": "w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project, w_squeeze=None, "
    "b_squeeze=None, w_excite=None, b_excite=None",
    "Plan": "tile_rows, tile_cols, group, band_rows, splits, tasks, workers, scratch_bytes, partial_bytes, keeps, "
    "recompute, bytes_never_written, cost, call_bytes",
    "Report": "blocks, training, layers=()",
    "TritonPlan": "tile_rows, tile_cols, patches, group, splits, num_warps, num_stages, chunk, keep_x, out_tile, "
    "out_tiles, programs, shared_bytes, registers, occupancy, recompute, bytes, matrix_flops, flops, "
    "bytes_never_written, seconds",
    "cuda_plan": "spec, input_shape, *, dtype=torch.float16, gpu=H200, tf32=False, forced=None, stem=None",
    "fuse": "model, *, inplace=False, backend='auto', recompute=False, strict=False, filter_fn=None",
    "inverted_residual": "x, weights, *, backend='auto', plan=None, **geometry",
    "inverted_residual_reference": "x, weights, **geometry",
    "pack": "weights, dtype=torch.float32, backend='auto'",
    "plan": "spec, input_shape, *, dtype=torch.float32, threads=None, tile_rows=None, tile_cols=None, group=None, "
    "splits=None",
    "report": "model, input_shape=None",
    "triton_plan": "spec, input_shape, *, dtype=torch.float16, gpu=H200, tf32=False, forced=None, **values",
    "unfuse": "model, *, inplace=False",
    "models.mobilenet_v1": "width_mult=1.0, num_classes=1000, dropout=0.001",
    "models.mobilenet_v2": "width_mult=1.0, num_classes=1000, dropout=0.2",
    "models.mobilenet_v3_large": "width_mult=1.0, num_classes=1000, dropout=0.2",
    "models.mobilenet_v3_small": "width_mult=1.0, num_classes=1000, dropout=0.2",
}


def parameters_of(signature):
    """Positional parameters, all others by name, and whether each has a default."""
    found = signature.parameters.values()
    ordered = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return ordered, {p.name: p for p in found if p not in ordered}


def is_optional(parameter):
    return parameter.default is not parameter.empty or parameter.kind in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_only_grow(name):
    known = {"torch": torch, "H200": gpus.H200}
    then = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None", known))
    thing = mnv2_fused
    for part in name.split("."):
        thing = getattr(thing, part)
    now = inspect.signature(thing)
    (ordered, named), (ordered_now, named_now) = parameters_of(then), parameters_of(now)

    def same(a, b):
        return (a.name, a.kind) == (b.name, b.kind) and (a.default is b.default or a.default == b.default)

    assert len(ordered_now) >= len(ordered)
    assert all(same(a, b) for a, b in zip(ordered, ordered_now, strict=False))
    assert all(same(p, named_now[key]) for key, p in named.items())
    more = [*ordered_now[len(ordered) :], *(p for key, p in named_now.items() if key not in named)]
    assert all(map(is_optional, more))


def test_public_names():
    names = {name for name in SIGNATURES if "." not in name} | {"models"}
    assert len(names) == 19 and names <= set(mnv2_fused.__all__)
    assert inspect.isfunction(mnv2_fused.plan) and inspect.isfunction(mnv2_fused.cuda_plan)
    assert inspect.isfunction(mnv2_fused.triton_plan) and inspect.ismodule(mnv2_fused.models)
    assert isinstance(mnv2_fused.__version__, str)


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "models": "FusedMobileNet InvertedResidual InvertedResidualV3 MobileNet SqueezeExcitation mobilenet_v1 "
        "mobilenet_v2 mobilenet_v3_large mobilenet_v3_small",
        "gpus": "GPUS Gpu H200",
        "testing": "Agreement MOBILENET_V2_STAGES Timing agreement available_instruction_sets block_agreement "
        "fit_batch_norm instruction_set interleave mobilenet_v2_blocks multiply_adds multiply_adds_at_peak of_peak "
        "peak_activation_bytes perturb_batch_norm random_weights ratio threads",
    }.items(),
)
def test_names_of_public_modules(module, names):
    found = importlib.import_module(f"mnv2_fused.{module}")
    assert getattr(mnv2_fused, module) is found
    assert [name for name in names.split() if not hasattr(found, name)] == []


_BLOCK = (
    "(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, Tensor b_depthwise, Tensor w_project, "
    "Tensor b_project, Tensor? w_squeeze, Tensor? b_squeeze, Tensor? w_excite, Tensor? b_excite, int stride, "
    "bool residual, int[] plan=[], int dilation=1, int[] padding=[], int activation=0, int out_activation=2, "
    "int squeeze_activation=1, int gate=0"
)
SCHEMAS = (
    f"mnv2_fused::inverted_residual{_BLOCK}) -> Tensor",
    f"mnv2_fused::inverted_residual_triton{_BLOCK}) -> Tensor",
    f"mnv2_fused::inverted_residual_cuda{_BLOCK}, bool tf32=False) -> Tensor",
    "mnv2_fused::sequence(Tensor x, Tensor weights, int[] layers) -> Tensor",
    "mnv2_fused::sequence_row(Tensor x, Tensor weights, Tensor layers, bool flat) -> Tensor",
    "mnv2_fused::sequence_cuda(Tensor x, Tensor weights, int[] layers, bool tf32=False) -> Tensor",
    "mnv2_fused::cached_inverted_residual(Tensor x, Tensor?[] sources, float[] eps, int stride, bool residual, "
    'int cache, str backend="cpu", int[] rest=[], int site=-1) -> Tensor',
    "mnv2_fused::cached_sequence(Tensor x, Tensor?[] sources, float[] eps, int[] layers, int cache, str backend, "
    "int site) -> Tensor",
)


@pytest.mark.parametrize("text", SCHEMAS, ids=lambda text: text.partition("(")[0])
def test_schemas_only_grow(text):
    then = torch._C.parse_schema(text)
    now = getattr(torch.ops.mnv2_fused, then.name.partition("::")[2]).default._schema

    def described(argument):
        default = argument.default_value if argument.has_default_value() else "none given"
        return argument.name, str(argument.type), default, argument.kwarg_only, argument.alias_info

    arguments = [described(a) for a in now.arguments]
    assert arguments[: len(then.arguments)] == [described(a) for a in then.arguments]
    assert all(a.has_default_value() for a in now.arguments[len(then.arguments) :])
    assert [str(r.type) for r in now.returns] == [str(r.type) for r in then.returns]
    assert not now.is_mutable


def test_no_op_is_without_a_known_schema():
    found = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mnv2_fused::")}
    assert {text.partition("(")[0] for text in SCHEMAS} <= found


@pytest.mark.parametrize("name", CASES)
def test_state_dict_keys_are_the_originals(name):
    pytest.importorskip("torchvision")
    for package in CASES[name].needs:
        pytest.importorskip(package)
    model = CASES[name].make()
    assert list(model.state_dict()) == list(mnv2_fused.unfuse(model).state_dict())
    assert list(model.state_dict()) == list(load(name, "module").state_dict())
