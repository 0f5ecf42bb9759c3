"""FusedSequential, torchvision's whole model as one call, and when that must not be used."""

import copy
import sys
import warnings

import pytest
import torch
import torchvision
from support.inputs import channels_last, image
from support.models import (
    BW,
    HEAD,
    LINEAR,
    MAP_ONLY,
    POOLED,
    STEM,
    WHOLE,
    B,
    calls_of,
    fitted,
    fused_model,
    make_x,
    near,
    other_state,
)
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from mnv2_fused import FusedInvertedResidual, backends, fuse, models, unfuse
from mnv2_fused.sequence import FusedSequential
from mnv2_fused.testing import (
    agreement,
    fit_batch_norm,
    perturb_batch_norm,
    threads,
)

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
pytestmark = pytest.mark.usefixtures("nothing_records")


@pytest.mark.parametrize("width", [0.35, 1.0, 1.4])
def test_the_whole_model_is_one_call(width, ran):
    plain = fitted(width)
    model, wide = fuse(plain), copy.deepcopy(plain).double()
    # Several images: how far eager is off in a few values is luck.
    for x in (image(12, 3, 64, 64), channels_last(8, 3, 97, 65)):
        found = agreement(model(x), plain(x), wide(x.double()))
        assert found.ok, found
    assert ran == [[STEM] + [B] * 16 + [POOLED, LINEAR]] * 2


@by_dtype
def test_precisions(dtype, ran):
    plain = copy.deepcopy(fitted()).to(dtype)
    model, x = fuse(plain), make_x(dtype=dtype)
    y = model(x)
    assert ran == [WHOLE] and y.dtype == dtype
    found = agreement(y, plain(x), copy.deepcopy(plain).double()(x.double()))
    assert found.ok, found


def test_the_result_looks_like_eagers(ran):
    model = fused_model()
    for batch in (0, 1, 3):
        x = make_x(batch)
        y, expected = model(x), fitted()(x)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert ran == [WHOLE] * 3


def test_features_give_the_whole_map(ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    y = model.features(x)
    assert ran == [[STEM, B, B, B, HEAD]]
    assert y.shape == (2, 1280, 9, 10) and y.is_contiguous(memory_format=torch.channels_last)
    assert near(y, fitted().features(x))
    assert torch.equal(model.features(input=x), y)


def test_batch_and_threads_do_not_change_a_bit_of_the_model():
    model, x = fused_model(), make_x(5)
    y = model(x)
    for count in (1, 2, 3, 4, 5):
        with threads(count):
            assert torch.equal(model(x), y)
            assert torch.equal(torch.cat([model(one) for one in x.split(1)]), y)


def test_weights_are_packed_once(monkeypatch):
    module = sys.modules["mnv2_fused.sequence.weights"]
    packings, original = [], module.pack_conv
    monkeypatch.setattr(module, "pack_conv", lambda *args: packings.append(1) or original(*args))
    model = fused_model()
    for _ in range(4):
        model(make_x())
    assert len(packings) == 3  # stem, head, linear


# When it must not be used: context or change -> calls of the op that are still made.


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_records(context, ran):
    model = fused_model()
    with context():
        assert calls_of(model, make_x(), ran) == [WHOLE]


def test_gradients_run_the_modules(ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x()
    model(x)
    ran.clear()
    gradients = []
    with torch.enable_grad():
        for one in (model, plain):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            gradients.append([leaf.grad, *(p.grad for p in one.parameters())])
    assert not ran
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_frozen_model_is_fused_with_gradients_on(ran):
    model = fused_model().requires_grad_(False)
    with torch.enable_grad():
        assert calls_of(model, make_x(), ran) == [WHOLE]
        y = model(make_x().requires_grad_())
        assert y.requires_grad and len(ran) == 1
        model.features[0][0].weight.requires_grad_()
        assert model(make_x()).requires_grad and len(ran) == 1


def test_a_trainable_classifier_behind_frozen_features(ran):
    model = fused_model()
    model.features.requires_grad_(False)
    with torch.enable_grad():
        model(make_x()).sum().backward()
    assert ran == [[STEM, B, B, B, HEAD]]
    assert model.classifier[1].weight.grad.abs().max() > 0


def test_a_trainable_module_between_frozen_ones(ran):
    """What comes after it is called with a tensor that records."""
    model = fused_model().requires_grad_(False)
    model.features.insert(2, nn.Conv2d(8, 8, 1))
    gradients = []
    with torch.enable_grad():
        for one in (model, unfuse(model)):
            one(make_x()).square().sum().backward()
            gradients.append(one.features[2].weight.grad)
    assert ran == [[STEM]]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_an_optimizer_step_folds_each_block_once(monkeypatch, ran):
    """Not once more for runs that gradients keep from running."""
    folded = []
    for name in ("module.fused_block", "sequence.weights", "module.packed_cache"):
        module = sys.modules[f"mnv2_fused.{name}"]
        original = module.fold_and_pack
        monkeypatch.setattr(module, "fold_and_pack", lambda *args, f=original: folded.append(1) or f(*args))
    model = fused_model()
    blocks = sum(isinstance(m, FusedInvertedResidual) for m in model.features)
    step = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(3):
            folded.clear()
            step.zero_grad()
            model(make_x()).square().sum().backward()
            step.step()
            assert len(folded) == blocks
    assert not ran
    model(make_x())
    assert ran == [WHOLE]


def test_train_runs_no_row(ran):
    """Blocks by themselves, stem and first block together."""
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x(4)
    model(x)
    ran.clear()
    for one in (model, plain):
        one.train().classifier[0].eval()
        one.to(memory_format=torch.channels_last)
    found = agreement(model(x), plain(x), copy.deepcopy(plain).double()(x.double()))
    assert found.ok, found
    assert not ran
    model.eval()
    assert calls_of(model, x, ran) == [WHOLE]


by_autocast_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@by_autocast_dtype
def test_autocast_is_one_call_in_float32(dtype, ran):
    """Whose result has the dtype that eager's has."""
    model, x = fused_model(), make_x()
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype=dtype):
            y, expected = model(given), fitted()(given)
        assert y.dtype == expected.dtype == dtype
        found = agreement(y, expected, copy.deepcopy(fitted()).double()(given.double()))
        assert found.ok, found
        assert torch.equal(y, model(given.float()).to(dtype))
    assert ran == [WHOLE] * 4
    with torch.autocast("cpu", dtype=dtype):
        model.features[3].conv[0][0].weight.mul_(2)
        y = model(x)
    assert torch.equal(y, model(x).to(dtype)) and not torch.equal(y, expected)
    ran.clear()
    with torch.autocast("cpu", dtype=dtype), torch.enable_grad():
        assert model(x).requires_grad
    assert not ran


@by_autocast_dtype
def test_a_sum_with_a_wider_input_under_autocast_is_as_wide(dtype, ran):
    """Of a row that begins with a residual block."""
    plain, x = nn.Sequential(*copy.deepcopy(fitted()).features[3:5]).eval(), torch.randn(2, 16, 9, 7)
    assert plain[0].use_res_connect
    model = fuse(plain)
    for given, calls in ((x, 0), (x.to(dtype), 1)):
        ran.clear()
        with torch.autocast("cpu", dtype=dtype):
            y, expected = model(given), plain(given)
        assert y.dtype == expected.dtype and len(ran) == calls
        assert agreement(y.to(dtype), expected.to(dtype), copy.deepcopy(plain).double()(given.double())).ok


def test_function_transforms_run_the_modules(ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    plain = fitted()
    with torch.enable_grad():
        gradients = [torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (model, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    mapped = [torch.func.vmap(m)(x[:, None]) for m in (model, plain)]
    torch.testing.assert_close(*mapped, rtol=1e-3, atol=1e-4)
    tangents = [torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (model, plain)]
    torch.testing.assert_close(*tangents, rtol=1e-3, atol=1e-4)
    assert not ran


def test_functional_call_uses_the_given_weights():
    model, x = fused_model(), make_x()
    before = model(x)
    given_weights = {name: 1.1 * p for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, given_weights, x)
    torch.testing.assert_close(y, torch.func.functional_call(fitted(), given_weights, x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(y, before)
    assert torch.equal(model(x), before)


def test_backend_from_the_environment(monkeypatch, ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    plain = unfuse(model)
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert torch.equal(model(x), plain(x)) and not ran
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MNV2_FUSED_BACKEND must be one of"):
        model(x)
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "cpu")
    assert calls_of(model, x, ran) == [WHOLE]


def test_eager_blocks_run_the_modules(ran):
    model, x = fuse(fitted(), backend="eager"), make_x()
    assert torch.equal(model(x), unfuse(model)(x))
    assert torch.equal(model.features(x), unfuse(model).features(x))
    assert not ran


def test_eager_blocks_need_no_compiled_library(monkeypatch):
    model, x = fuse(fitted(), backend="eager"), make_x()
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_load_error", "no such file")
    assert torch.equal(model(x), unfuse(model)(x))


class Subclass(Tensor):
    pass


def test_tensor_subclasses_stay_what_they_are(ran):
    model, x = fused_model(), make_x()
    y = model(x.as_subclass(Subclass))
    assert type(y) is Subclass
    assert near(y.as_subclass(Tensor), fitted()(x))
    assert near(model(nn.Parameter(x)), fitted()(x))
    assert not ran


def subclassed(module):
    module.weight = nn.Parameter(module.weight.as_subclass(Subclass), requires_grad=False)


def test_weights_of_a_subclass_run_in_their_modules(ran):
    model, x = fused_model(), make_x()
    expected = model(x)
    for module in (model.classifier[1], model.features[-1][0]):
        subclassed(module)
        torch.testing.assert_close(model(x).as_subclass(Tensor), expected, rtol=1e-4, atol=1e-4)
    assert ran == [WHOLE, WHOLE[:-1], [STEM, B, B, B]]


def test_a_sparse_classifier_runs_as_a_module(ran):
    model, x = fused_model(), make_x()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.classifier[1].weight = nn.Parameter(model.classifier[1].weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert ran == [WHOLE, WHOLE[:-1]]


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.features], ids=["model", "features"])
def test_bad_x_to_modules(part):
    module = part(fused_model())
    for x, message in (
        (image(1, 4, 9, 9), "must have 3 channels, got 4"),
        (image(3, 9, 9), r"\[N, C_in, H, W\]"),
        (image(1, 3, 0, 9), "height and width must be at least 1|height must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module(x)
    for dtype in (torch.float64, torch.float16, torch.int64):
        with pytest.raises((RuntimeError, TypeError)):
            module(make_x().to(dtype))


def test_fx_traces_through_the_containers():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, FusedInvertedResidual) or super().is_leaf_module(module, name)

    model, x = fused_model(), make_x()
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    model, x = fused_model(), make_x()
    model(x)  # else the folding is traced, too
    traced = torch.jit.trace(model, x)
    for batch in (2, 5):
        torch.testing.assert_close(traced(make_x(batch)), model(make_x(batch)), rtol=1e-4, atol=1e-4)


def test_export_the_whole_model(ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert "mnv2_fused.inverted_residual" in str(program.graph)
    for batch in (1, 5):
        assert near(program.module()(make_x(batch)), fitted()(make_x(batch)))
    assert not ran


# --- other models made of the same parts


def hooked(module):
    module.register_forward_hook(lambda module, args, y: y + 1)
    return module


CLASSIFIERS = {
    "another size": (lambda: nn.Linear(1280, 3), [[STEM, B, B, B, HEAD]]),
    "identity": (nn.Identity, [[STEM, B, B, B, HEAD]]),
    "empty": (nn.Sequential, [WHOLE[:-1]]),
    "linear alone": (lambda: nn.Sequential(nn.Linear(1280, 33)), [WHOLE]),
    "without bias": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(1280, 7, bias=False)), [WHOLE]),
    "two layers": (lambda: nn.Sequential(nn.Linear(1280, 8), nn.ReLU(), nn.Linear(8, 3)), [[*WHOLE, LINEAR]]),
    "three": (
        lambda: nn.Sequential(nn.Linear(1280, 9), nn.Linear(9, 8), nn.Hardswish(), nn.Dropout(), nn.Linear(8, 3)),
        [[*WHOLE, LINEAR, LINEAR]],
    ),
    "an activation of no kernel": (lambda: nn.Sequential(nn.Linear(1280, 8), nn.ELU(), nn.Linear(8, 3)), [WHOLE]),
    "a ReLU6 that clips elsewhere": (
        lambda: nn.Sequential(nn.Linear(1280, 8), nn.Hardtanh(0, 3), nn.Linear(8, 3)),
        [WHOLE],
    ),
    "a hooked activation": (
        lambda: nn.Sequential(nn.Linear(1280, 8), hooked(nn.ReLU()), nn.Linear(8, 3)),
        [WHOLE],
    ),
    "two dropouts": (lambda: nn.Sequential(nn.Dropout(), nn.Dropout(), nn.Linear(1280, 8)), [WHOLE[:-1]]),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm1d(1280), nn.Linear(1280, 8)), [WHOLE[:-1]]),
}


@pytest.mark.parametrize(("make", "expected"), CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("called", [False, True])
def test_a_replaced_classifier(make, expected, called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    model.classifier = make().eval()
    assert calls_of(model, x, ran) == expected
    assert calls_of(model, x, ran) == expected


def test_replaced_classifiers_can_be_put_back(ran):
    model, x = fused_model(), make_x()
    original, y = model.classifier, model(x)
    model.classifier = nn.Identity()
    model(x)
    model.classifier = original
    assert torch.equal(model(x), y)
    assert ran == [WHOLE, [STEM, B, B, B, HEAD], WHOLE]


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


CHILDREN = {
    "appended": (lambda m: m.features.append(Shift()), [[STEM, B, B, B, HEAD]]),
    "in between": (lambda m: m.features.insert(3, Shift()), [[STEM, B], [B, B, POOLED, LINEAR]]),
    "after the stem": (lambda m: m.features.insert(1, Shift()), [[BW, B, B, B, POOLED, LINEAR]]),
    "in front": (lambda m: m.features.insert(0, Shift()), [WHOLE]),
    "behind the classifier": (lambda m: m.classifier.append(nn.Softmax(1)), [WHOLE]),
    "in front of the classifier": (lambda m: m.classifier.insert(0, Shift()), [WHOLE[:-1]]),
    "nested": (
        lambda m: m.features.__setitem__(2, nn.Sequential(m.features[2], Shift())),
        [[STEM], [B, B, POOLED, LINEAR]],
    ),
    "another activation": (lambda m: m.features[-1].__setitem__(2, nn.Hardswish()), [WHOLE]),
    "an activation of no kernel": (lambda m: m.features[-1].__setitem__(2, nn.ELU()), [[STEM, B, B, B]]),
    "a stem's activation": (lambda m: m.features[0].__setitem__(2, nn.SiLU()), [WHOLE]),
    "a stem of stride 1": (lambda m: setattr(m.features[0][0], "stride", (1, 1)), [[BW, B, B, B, POOLED, LINEAR]]),
    "an unused module": (lambda m: m.add_module("extra", nn.Sequential(nn.Linear(3, 3))), [WHOLE]),
}


@pytest.mark.parametrize(("change", "expected"), CHILDREN.values(), ids=CHILDREN)
@pytest.mark.parametrize("called", [False, True])
def test_changed_children(change, expected, called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    change(model)
    assert calls_of(model, x, ran) == expected


def test_blocks_that_no_longer_fit_each_other():
    model, x = fused_model(), make_x()
    model(x)
    del model.features[2]
    with pytest.raises(RuntimeError, match="x must have 16 channels, got 8"):
        model(x)


SLICES = {
    "front": (slice(0, 5), [[STEM, B, B, B]]),
    "middle": (slice(1, 4), [[BW, B, B]]),
    "back": (slice(3, 6), [[B, B, HEAD]]),
    "stem": (slice(0, 1), []),
    "head": (slice(5, 6), []),
}


@pytest.mark.parametrize(("cut", "expected"), SLICES.values(), ids=SLICES)
def test_sliced_features(cut, expected, ran):
    model = fused_model()
    x = model.features[: cut.start](make_x())
    part = model.features[cut]
    assert near(part(x), unfuse(part)(x))  # nn.Sequential makes slices in train()
    assert calls_of(part.eval(), x, ran) == expected


def test_a_network_as_one_sequence(ran):
    plain = copy.deepcopy(fitted())
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *plain.classifier]
    flat = nn.Sequential(*plain.features, *pool).eval()
    assert calls_of(fuse(flat), make_x(), ran) == [WHOLE]
    nested = nn.Sequential(plain.features, *pool).eval()
    assert calls_of(fuse(nested), make_x(), ran) == [WHOLE]


def test_norms_of_other_kinds(ran):
    def without_affine(channels):
        return nn.BatchNorm2d(channels, affine=False)

    for norm in (FrozenBatchNorm2d, without_affine, nn.SyncBatchNorm):
        layers = (
            Conv2dNormActivation(3, 8, stride=2, norm_layer=norm, activation_layer=nn.ReLU6),
            InvertedResidual(8, 8, 1, 1, norm_layer=norm),
            InvertedResidual(8, 8, 1, 6, norm_layer=norm),
            Conv2dNormActivation(8, 20, kernel_size=1, norm_layer=norm, activation_layer=nn.ReLU6),
        )
        # The first block has a residual, so the stem stays alone.
        model = fuse(perturb_batch_norm(nn.Sequential(*layers)).eval())
        assert calls_of(model, make_x(), ran) == [[BW, B, HEAD]]


def test_convolutions_with_bias(ran):
    stem_conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
    head_conv = nn.Sequential(nn.Conv2d(4, 20, 1), nn.BatchNorm2d(20), nn.ReLU6())
    model = nn.Sequential(stem_conv, InvertedResidual(8, 4, 1, 1), head_conv)
    assert calls_of(fuse(perturb_batch_norm(model).eval()), make_x(), ran) == [[STEM, HEAD]]


POOLS = {
    "1": (nn.AdaptiveAvgPool2d(1), POOLED),
    "(1, 1)": (nn.AdaptiveAvgPool2d((1, 1)), POOLED),
    "2": (nn.AdaptiveAvgPool2d(2), HEAD),
    "(1, None)": (nn.AdaptiveAvgPool2d((1, None)), HEAD),
    "maximum": (nn.AdaptiveMaxPool2d(1), HEAD),
}


@pytest.mark.parametrize(("pool", "kind"), POOLS.values(), ids=POOLS)
def test_pools(pool, kind, ran):
    model = nn.Sequential(*fitted().features, pool).eval()
    assert calls_of(fuse(model), make_x(), ran) == [[STEM, B, B, B, kind]]


def test_mixed_precision_runs_the_modules(ran):
    model = nn.Sequential(InvertedResidual(3, 8, 1, 6), InvertedResidual(8, 8, 1, 6)).eval()
    model = fuse(perturb_batch_norm(model))
    model[1].double()
    with pytest.raises(TypeError):
        model(make_x())
    assert not ran


# --- fuse and unfuse


def test_unfuse_gives_the_classes_back():
    model = fused_model()
    model(make_x())
    assert isinstance(model, MobileNetV2) and type(model) is not MobileNetV2
    assert type(model.features) is FusedSequential
    plain, original = unfuse(model), fitted()
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in original.modules()]
    assert type(plain) is MobileNetV2 and type(plain.features) is nn.Sequential
    assert near(plain(make_x()), original(make_x()))
    assert type(model.features) is FusedSequential, "unfuse changed its argument"


def test_unfuse_in_place():
    model = fused_model()
    features = model.features
    assert unfuse(model, inplace=True) is model
    assert type(model) is MobileNetV2 and model.features is features and type(features) is nn.Sequential


def test_state_dicts_both_ways():
    model, plain = fused_model(), copy.deepcopy(fitted())
    assert list(model.state_dict()) == list(plain.state_dict())
    state = other_state()
    model.load_state_dict(state, strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), state.values(), strict=True))
    assert near(model(make_x()), plain(make_x()))


def test_fusing_twice_changes_nothing(ran):
    model = fused_model()
    twice = fuse(model)
    assert [type(m) for m in twice.modules()] == [type(m) for m in model.modules()]
    assert calls_of(twice, make_x(), ran) == [WHOLE]
    assert torch.equal(twice(make_x()), model(make_x()))


def test_fusing_in_place_keeps_every_container():
    plain = copy.deepcopy(fitted())
    features, classifier = plain.features, plain.classifier
    model = fuse(plain, inplace=True)
    assert model is plain and model.features is features and model.classifier is classifier
    assert type(features) is FusedSequential and type(classifier) is nn.Sequential


def test_models_made_of_fused_blocks(ran):
    model = torchvision.models.mobilenet_v2(block=FusedInvertedResidual, num_classes=10)
    model = fit_batch_norm(model.eval(), torch.randn(8, 3, 64, 64))
    fused = fuse(model)
    assert calls_of(fused, image(1, 3, 64, 64), ran) == [[STEM] + [B] * 16 + [POOLED, LINEAR]]


class Scaled(MobileNetV2):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_the_model_keeps_its_forward(ran):
    model = copy.deepcopy(fitted())
    model.__class__ = Scaled
    fused = fuse(model)
    assert isinstance(fused, Scaled)
    fused(make_x())  # the first call is looked at
    assert calls_of(fused, make_x(), ran) == MAP_ONLY


def test_a_model_with_its_own_forward_keeps_it(ran):
    model = copy.deepcopy(fitted())
    model.forward = lambda x: x + 1
    fused = fuse(model)
    assert torch.equal(fused(make_x()), make_x() + 1)
    assert not ran


class Sequence(nn.Sequential):
    pass


def test_subclasses_of_sequential_are_left_alone(ran):
    model = fuse(Sequence(*fitted().features).eval())
    assert type(model) is Sequence
    assert calls_of(model, make_x(), ran) == []


# --- sequences within sequences, and other networks


def nested_model():
    """[stem, first block], [two blocks], [a block], [head, pooling, classifier], each in a Sequential."""
    stem_, *blocks, head_ = copy.deepcopy(fitted()).features
    rest = [head_, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *copy.deepcopy(fitted()).classifier]
    stages = [nn.Sequential(stem_, blocks[0]), nn.Sequential(*blocks[1:3]), nn.Sequential(blocks[3]), *rest]
    return fuse(nn.Sequential(*stages).eval())


NESTED = {
    "as it is": (lambda m: None, [WHOLE]),
    "a module in a stage": (lambda m: m[1].insert(1, Shift()), [[STEM, B], [B, B, POOLED, LINEAR]]),
    "a module behind a stage": (lambda m: m.insert(1, Shift()), [[STEM], [B, B, B, POOLED, LINEAR]]),
    "a block taken away": (lambda m: m[1].pop(1), [[STEM, B, B, POOLED, LINEAR]]),
    "an empty stage": (lambda m: m.insert(2, nn.Sequential()), [[STEM, B, B], [B, POOLED, LINEAR]]),
    "a hooked stage": (lambda m: hooked(m[1]), [[STEM], [B, B], [B, POOLED, LINEAR]]),
    "a stage's own forward": (
        lambda m: setattr(m[1], "forward", lambda x, f=m[1].forward: f(x) + 1),
        [[STEM], [B, B], [B, POOLED, LINEAR]],
    ),
    "a stage in train": (lambda m: m[2].train(), [[STEM, B, B], [POOLED, LINEAR]]),
    "weights": (lambda m: m[1][1].conv[0][0].weight.mul_(1.5), [WHOLE]),
}


@pytest.mark.parametrize(("change", "expected"), NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("called", [False, True])
def test_nested_sequences(change, expected, called, ran, copied):
    model, x = copied(nested_model()), make_x()
    if called:
        model(x)
    change(model)
    assert calls_of(model, x, ran) == expected


def test_a_nested_sequence_by_itself(ran):
    model, x = nested_model(), make_x()
    y = model(x)
    assert near(model[2](model[1](model[0](x))), fitted().features[:5](x))
    ran.clear()
    assert torch.equal(model(x), y) and ran == [WHOLE]
    assert [type(m) for m in model if isinstance(m, nn.Sequential)][:3] == [FusedSequential] * 3
    assert [type(m) for m in unfuse(model) if isinstance(m, nn.Sequential)][:3] == [nn.Sequential] * 3


NETWORKS = {
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, [[STEM, *[B] * 10, POOLED, LINEAR, LINEAR]]),
    # The first block adds its input to its result, which the stem therefore has to write.
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, [[BW, *[B] * 14, POOLED, LINEAR, LINEAR]]),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, [[STEM, *[B] * 15, POOLED, LINEAR]]),
    "V1": (models.mobilenet_v1, [[STEM, *[BW] * 12]]),
    "V2": (models.mobilenet_v2, [[STEM, *[B] * 16, POOLED, LINEAR]]),
    "V3 small": (models.mobilenet_v3_small, [[STEM, *[B] * 10, POOLED, LINEAR, LINEAR]]),
    "V3 large": (models.mobilenet_v3_large, [[BW, *[B] * 14, POOLED, LINEAR, LINEAR]]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "expected"), NETWORKS.values(), ids=NETWORKS)
def test_other_networks_are_one_call(make, expected, ran, copied):
    plain = perturb_batch_norm(unfuse(make(num_classes=10)).eval())
    plain = fit_batch_norm(plain, torch.randn(4, 3, 64, 64)).to(memory_format=torch.channels_last)
    model, x = copied(fuse(plain)), channels_last(2, 3, 65, 64)
    assert near(model(x), plain(x))  # tests/convert/test_real_models.py holds them to the rule
    assert ran == expected
    assert isinstance(model, type(plain)) and list(model.state_dict()) == list(plain.state_dict())
    back = unfuse(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(back(x), plain(x))
    weight = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight
    weight.mul_(1.5)
    assert near(model(x), unfuse(model)(x))
    assert ran == expected * 2


def test_a_new_network_of_this_project_is_one_call(ran):
    model = models.mobilenet_v2(num_classes=10).eval()
    assert calls_of(model, image(1, 3, 64, 64), ran) == [[STEM, *[B] * 16, POOLED, LINEAR]]


def test_stochastic_depth_keeps_a_block_out(ran):
    model, x = fuse(torchvision.models.efficientnet_b0(num_classes=10).eval()), channels_last(2, 3, 64, 64)
    model(x)
    model.features[2][1].stochastic_depth.train()
    ran.clear()
    model(x)
    assert ran == [[STEM, B], [*[B] * 13, POOLED, LINEAR]]
