"""Sequences and whole models in compiled graphs: one op a run, which notices what a call of the model itself would."""

import copy
import gc

import pytest
import torch
from support.models import (
    HEAD,
    LINEAR,
    MAP_ONLY,
    POOLED,
    STEM,
    WHOLE,
    B,
    fitted,
    fused_model,
    make_x,
    near,
    other_state,
)
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from mnv2_fused import fuse, unfuse
from mnv2_fused.module.packed_cache import PackedCache
from mnv2_fused.sequence import RunsFused, weights
from mnv2_fused.sequence.compiled import _weights
from mnv2_fused.testing import agreement, perturb_batch_norm

pytestmark = pytest.mark.usefixtures("nothing_records", "fresh_graphs")


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


@pytest.fixture
def folds(monkeypatch):
    """One entry for each time that a row of layers is folded."""
    found, original = [], weights.fold_layers

    def counted(*arguments):
        found.append(1)
        return original(*arguments)

    monkeypatch.setattr("mnv2_fused.sequence.compiled.fold_layers", counted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_whole_model_is_one_op(backend, called, ran, folds):
    model, x = fused_model(), make_x()
    expected = model(x)
    if not called:
        model = fused_model()
    ran.clear()
    folds.clear()
    graph = compiled(model, backend)
    for _ in range(3):
        assert torch.equal(graph(x), expected)
    assert ran == [WHOLE] * 3 and len(folds) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_precisions(dtype, ran):
    model, x = fused_model().to(dtype), make_x(dtype=dtype)
    y = compiled(model)(x)
    assert ran == [WHOLE] and torch.equal(y, model(x))


def test_features_give_the_whole_map(ran):
    features, x = fused_model().features, make_x()
    y, expected = compiled(features)(x), features(x)
    assert ran == MAP_ONLY * 2
    assert torch.equal(y, expected) and y.stride() == expected.stride()


def test_changed_weights_are_noticed(ran):
    model, x = fused_model(), make_x()
    graph = compiled(model)
    changes = {
        "in place": lambda: model.features[0][0].weight.mul_(1.5),
        "of the head": lambda: model.features[-1][1].running_var.mul_(2),
        "of the classifier": lambda: model.classifier[1].bias.add_(1),
        "by .data": lambda: setattr(model.features[2].conv[0][0].weight, "data", torch.randn(24, 8, 1, 1)),
        "replaced": lambda: setattr(model.classifier[1], "weight", nn.Parameter(torch.randn(10, 1280) / 30)),
        "loaded": lambda: model.load_state_dict(other_state()),
        "eps": lambda: setattr(model.features[2].conv[3], "eps", 0.5),
        "eps of the stem": lambda: setattr(model.features[0][1], "eps", 0.5),
        "assigned": lambda: model.load_state_dict(fitted().state_dict(), assign=True),
    }
    last = graph(x)
    for name, change in changes.items():
        change()
        y = graph(x)
        assert near(y, unfuse(model)(x)), name
        assert not torch.allclose(y, last), name
        last = y
    assert ran == [WHOLE] * (len(changes) + 1)


@pytest.mark.slow
def test_its_weights_are_folded_while_it_is_traced_and_when_they_change(folds):
    model, x = fused_model(), make_x()
    before_running = []
    graph = compiled(model, lambda module, _: before_running.append(len(folds)) or module)
    for _ in range(3):
        graph(x)
    assert before_running == [1] and len(folds) == 1
    model.features[0][0].weight.mul_(1.5)
    for _ in range(3):
        graph(x)
    assert before_running == [1] and len(folds) == 2


IN_TRAINING = {
    "a norm of the stem": lambda model: model.features[0][1],
    "a norm of a block": lambda model: model.features[2].conv[3],
    "a norm of the head": lambda model: model.features[-1][1],
    "a block": lambda model: model.features[2],
    "the dropout": lambda model: model.classifier[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_module_put_into_training_afterwards_is_noticed(name, ran):
    model, x = fused_model(), make_x()
    model.classifier[0].p = 1e-9  # so that nothing is left to chance
    graph = compiled(model)
    graph(x)
    ran.clear()
    IN_TRAINING[name](model).train()
    y = graph(x)
    assert WHOLE not in ran
    assert near(y, unfuse(copy.deepcopy(model))(x))
    IN_TRAINING[name](model).eval()
    graph(x)
    assert ran[-1] == WHOLE


@pytest.mark.slow
def test_train_runs_the_modules(ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x(4)
    graph = compiled(model)
    graph(x)
    ran.clear()
    for one in (model, plain):
        one.train()
        one.classifier[0].p = 0.0
    torch.testing.assert_close(graph(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not ran
    torch.testing.assert_close(model.features[2].conv[3].running_mean, plain.features[2].conv[3].running_mean)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(frozen, ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x()
    if frozen:
        model.requires_grad_(False)
        plain.requires_grad_(False)
    graph, leaves, gradients = compiled(model), [], []
    with torch.enable_grad():
        if frozen:
            assert torch.equal(graph(x), model(x)) and ran == [WHOLE] * 2
            ran.clear()
        for one in (graph, plain):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            leaves.append(leaf.grad)
            gradients.append([p.grad for p in (model if one is graph else plain).parameters()])
    assert not ran
    torch.testing.assert_close(*leaves, rtol=1e-3, atol=1e-3 * leaves[1].abs().max().item())
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None) == frozen
        if not frozen:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.slow
def test_a_trainable_module_between_frozen_ones(ran):
    """What comes after it records, and runs by the modules."""
    model = fused_model().requires_grad_(False)
    model.features.insert(2, nn.Conv2d(8, 8, 1))
    x, graph = make_x(), compiled(model)
    assert torch.equal(graph(x), model(x))
    assert ran == [[STEM], [B, B, B, POOLED, LINEAR]] * 2
    ran.clear()
    with torch.enable_grad():
        graph(x).square().sum().backward()
        found, model.features[2].weight.grad = model.features[2].weight.grad, None
    assert ran == [[STEM]]
    plain = unfuse(model)
    with torch.enable_grad():
        plain(x).square().sum().backward()
    torch.testing.assert_close(found, plain.features[2].weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_two_models_of_one_kind_keep_to_their_own_graphs(ran):
    """Their classes' code is the same, and so is its cache of graphs."""
    first, second = fused_model(), fused_model()
    second.load_state_dict(other_state())
    x = make_x()
    graphs = [compiled(first), compiled(second)]
    for _ in range(2):
        for graph, model in zip(graphs, (first, second), strict=True):
            assert torch.equal(graph(x), model(x))
    third = copy.deepcopy(first)
    third.features[2].conv[1].register_forward_hook(lambda module, inputs, y: y * 2)
    ran.clear()
    y = torch.compile(third, backend="aot_eager")(x)
    assert WHOLE not in ran and near(y, unfuse(third)(x))


@pytest.mark.slow
def test_copies_have_weights_of_their_own():
    model, x = fused_model(), make_x()
    graph = compiled(model)
    graph(x)
    other = copy.deepcopy(model)
    other.load_state_dict(other_state())
    assert torch.equal(compiled(other)(x), other(x))
    assert torch.equal(graph(x), model(x))


@pytest.mark.slow
def test_folded_weights_go_with_the_model():
    model = fused_model()
    compiled(model, "eager")(make_x())
    (cache,) = _weights[model].values()
    token = cache.token
    assert PackedCache.of(token) is cache
    torch.compiler.reset()
    del model, cache
    gc.collect()
    assert PackedCache.of(token) is None


@pytest.mark.slow
def test_dynamic_shapes_are_one_graph(ran):
    model, graphs = fused_model(), []
    graph = compiled(model, lambda module, _: graphs.append(module) or module, dynamic=True)
    for n, h, w in [(2, 33, 40), (3, 64, 48), (5, 57, 31)]:
        x = torch.randn(n, 3, h, w)
        assert torch.equal(graph(x), model(x))
    assert len(graphs) == 1
    assert ran == [WHOLE] * 6


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
def test_gradients_over_changing_sizes(dynamic):
    """In float64, where no rounding takes a clip's other side."""
    model, plain = fused_model().double(), copy.deepcopy(fitted()).double()
    graph = compiled(model, dynamic=dynamic)
    for n, h, w in [(2, 33, 40), (3, 64, 48), (1, 57, 31), (4, 40, 72)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, 3, h, w, dtype=torch.float64).to(memory_format=layout)
            found = []
            for m in (graph, plain):
                with torch.enable_grad():
                    given = x.clone().requires_grad_()
                    y = m(given)
                    (grad,) = torch.autograd.grad(y.square().sum(), given)
                found.append((y.detach(), grad))
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9 * float(found[1][1].abs().max()))


@pytest.mark.slow
def test_autocast_runs_block_by_block(ran):
    model, x = fused_model(), make_x()
    graph = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = graph(x)
        found = agreement(y, fitted()(x), copy.deepcopy(fitted()).double()(x.double()))
    assert not ran and y.dtype == torch.bfloat16 and found.ok, found
    assert torch.equal(graph(x), model(x)) and ran == [WHOLE] * 2


@pytest.mark.slow
def test_an_input_of_another_dtype_raises_as_always():
    model, x = fused_model(), make_x()
    with pytest.raises(Exception, match=r"float64|double"):
        compiled(model)(x.double())


def follows(graph, model, x):
    """Whether a compiled graph, ``model`` run by itself and its ordinary modules agree."""
    plain = unfuse(model)
    return near(graph(x), plain(x)) and near(model(x), plain(x))


STRUCTURE = {
    "appended to the classifier": lambda model: model.classifier.append(nn.Softmax(1)),
    "appended to the features": lambda model: model.features.append(nn.SiLU()),
    "inserted": lambda model: model.features.insert(2, nn.Conv2d(8, 8, 1)),
    "deleted": lambda model: model.features.__delitem__(3),
    "another classifier": lambda model: setattr(model, "classifier", nn.Sequential(nn.Linear(1280, 10), nn.Softmax(1))),
    "another activation of the stem": lambda model: model.features[0].__setitem__(2, nn.SiLU()),
    "another activation of the head": lambda model: model.features[-1].__setitem__(2, nn.SiLU()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURE)
def test_other_children_are_noticed(name):
    model, x = fused_model(), make_x()
    graph = torch.compile(model, backend="aot_eager")
    last = graph(x)
    STRUCTURE[name](model)
    model.eval()
    y = graph(x)
    assert near(y, model(x)) and (y.shape != last.shape or not torch.allclose(y, last))


@pytest.mark.slow
def test_another_backend_of_a_block_is_noticed(ran):
    model, x = fused_model(), make_x()
    graph = compiled(model)
    graph(x)
    ran.clear()
    model.features[2].backend = "eager"
    assert near(graph(x), unfuse(model)(x))
    assert ran == [[STEM], [B, B, POOLED, LINEAR]]


@pytest.mark.slow
def test_a_childs_name_is_its_own():
    block = fused_model().features[2]
    model = nn.Sequential()
    model.add_module("block", copy.deepcopy(block))
    model.add_module("flatten", nn.Flatten(2))
    model.add_module("pool", nn.AdaptiveAvgPool1d(3))
    model = fuse(model.eval())
    x = torch.randn(2, block.spec.in_channels, 9, 10)
    assert compiled(model)(x).shape == (2, block.spec.out_channels, 3)
    assert torch.equal(compiled(model)(x), model(x))


WRITES = {
    "the model": lambda model: model,
    "features": lambda model: model.features,
    "the block": lambda model: model.features[2],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_uncounted_writes_are_noticed_after_train_and_eval(name):
    model, x = fused_model(), make_x()
    graph = compiled(model)
    graph(x)
    model.features[2].conv[0][0].weight.data.mul_(3)
    WRITES[name](model).train().eval()
    assert near(graph(x), unfuse(model)(x))


@pytest.mark.slow
def test_what_is_moved_or_unfused_is_not_kept():
    for change in (lambda model: model.half(), lambda model: unfuse(model, inplace=True)):
        model = fused_model()
        compiled(model)(make_x())
        (cache,) = _weights[model].values()
        assert cache._kept is not None
        change(model)
        assert cache._kept is None


@pytest.mark.slow
def test_nothing_runs_twice_before_a_run_that_records():
    """In place, and counting: where the blocks record, what is in front of them has run already."""
    blocks = fused_model().features[2:4]
    x = torch.randn(2, 16, 9, 10)[:, : blocks[0].spec.in_channels].contiguous()
    model = nn.Sequential(nn.Hardswish(inplace=True), nn.BatchNorm2d(x.shape[1]), *copy.deepcopy(blocks))
    model = fuse(model.eval())
    model[1].train()
    plain = copy.deepcopy(unfuse(model))
    plain[1].train()
    with torch.enable_grad():
        y, expected = compiled(model)(x.clone()), plain(x.clone())
    assert near(y, expected)
    assert model[1].num_batches_tracked == plain[1].num_batches_tracked == 1


SWITCHES = {
    "eval": lambda m, x: m.eval()(x),
    "train and eval": lambda m, x: m.train().eval()(x),
    "to": lambda m, x: m.to(torch.float32)(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("kind", ["block", "sequence", "model"])
def test_modes_are_switched_inside_a_graph(kind, name):
    model, x = fused_model(), make_x()
    if kind != "model":
        model = model.features[2] if kind == "block" else model.features[2:]
        x = torch.randn(2, 8, 9, 10)
    expected = model(x)
    graph = torch.compile(lambda x: SWITCHES[name](model, x), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.weight.data.mul_(2)
    torch.testing.assert_close(graph(x), unfuse(model)(x), rtol=1e-4, atol=1e-5)


def another_block(model, stride=1, ratio=3, residual=None):
    old = model.features[3]
    c_in, c_out = old.spec.in_channels, old.spec.out_channels
    block = perturb_batch_norm(InvertedResidual(c_in, c_out, stride, ratio)).eval()
    if residual is not None:
        block.use_res_connect = residual
    model.features[3] = fuse(block)


REPLACED = {
    "a block": another_block,
    "a block of another stride": lambda model: another_block(model, stride=2),
    "a block without its residual": lambda model: another_block(model, residual=False),
    "the stem's convolution": lambda model: model.features[0].__setitem__(0, nn.Conv2d(3, 32, 3, 1, 1, bias=False)),
    "the stem's stride": lambda model: setattr(model.features[0][0], "stride", (1, 1)),
    "the stem's padding": lambda model: setattr(model.features[0][0], "padding", (0, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
def test_other_layers_of_the_same_weights_are_noticed(name):
    model, x = fused_model(), make_x()
    graph = torch.compile(model, backend="aot_eager")
    graph(x)
    REPLACED[name](model)
    assert near(graph(x), unfuse(model)(x))


@pytest.mark.slow
def test_another_pool_is_noticed():
    model = nn.Sequential(*fused_model().features[2:], nn.AdaptiveAvgPool2d(1)).eval()
    model, x = fuse(model), torch.randn(2, 8, 9, 10)
    graph = torch.compile(model, backend="aot_eager")
    assert graph(x).shape == (2, 1280, 1, 1)
    model[-1] = nn.AdaptiveAvgPool2d(2)
    assert graph(x).shape == (2, 1280, 2, 2)
    model[-1].output_size = 3
    assert torch.compile(model, backend="aot_eager")(x).shape == (2, 1280, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another block", "fused again"])
def test_uncounted_writes_to_new_blocks(change):
    model, x = fused_model(), make_x()
    graph = torch.compile(model, backend="aot_eager")
    graph(x)
    if change == "another block":
        model.features[2] = copy.deepcopy(model.features[2])
    else:
        fuse(unfuse(model, inplace=True), inplace=True)
    assert near(graph(x), unfuse(model)(x))
    model.features[2].conv[0][0].weight.data.mul_(3)
    model.features[2].train().eval()
    assert near(graph(x), unfuse(model)(x))


class _Two(nn.Module):
    def forward(self, x):
        return x, x


class _Joined(nn.Module):
    def forward(self, both):
        return both[0] + both[1]


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_children_that_give_no_tensor(grad):
    block = fused_model().features[2]
    model = fuse(nn.Sequential(block, _Two(), _Joined(), nn.ReLU()).eval())
    x = torch.randn(2, 8, 9, 10)
    with torch.set_grad_enabled(grad):
        assert near(compiled(model)(x), unfuse(model)(x))


class Rescaled(nn.Module):
    """Weights that a graph computes: by functions, then in place."""

    def __init__(self, inner, weight):
        super().__init__()
        self.inner, self.weight = inner, weight

    def forward(self, v, x):
        def scaled(by):
            given = {self.weight: v * by}
            return torch.func.functional_call(self.inner, given, (x,))

        y1 = scaled(1.0)
        y2 = scaled(1.5 + y1.mean().abs())
        p = self.inner.get_parameter(self.weight)
        y3 = self.inner(x)
        p.mul_(-1.5)
        y4 = self.inner(x)
        p.mul_(1 + y4.mean().abs())
        return y1, y2, y3, y4, self.inner(x)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["sequence", "block"])
def test_weights_that_a_graph_computes(what, backend):
    features = fused_model().features
    inner, weight = (features[2:], "2.conv.0.0.weight") if what == "sequence" else (features[2], "conv.0.0.weight")
    block = features[2]
    x = torch.randn(2, block.spec.in_channels, 9, 10)
    model = Rescaled(inner, weight)
    plain = Rescaled(unfuse(copy.deepcopy(inner)), weight)
    v = inner.get_parameter(weight).clone()
    graph = torch.compile(model, backend=backend)
    for _ in range(3):
        for y, expected in zip(graph(v, x), plain(v, x), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(inner(x), plain.inner(x), rtol=1e-3, atol=1e-4)  # by itself, after the graph


@pytest.mark.slow
def test_what_stands_for_the_modules_tensors_in_a_graph():
    """As CUDA graphs of torch.compile make it: other objects at the same places, which count no changes."""
    block = fused_model().features[2]
    sources, eps = block._fold_parameters()
    stand_ins = [None if t is None else t.data for t in sources]

    def packed(site):
        return block._cache.get(stand_ins, eps, torch.float32, "cpu", site)

    first = packed(1)
    assert packed(1) is first is packed(2)  # a second run of the graph: it changes nothing
    sources[0].mul_(2)
    second = packed(1)
    assert packed(2) is not second  # another place in perhaps the same run, which may have changed them
    assert not torch.equal(first.w_expand, second.w_expand)
    third = packed(1)
    assert packed(1) is packed(2) is third


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sequence", "block"])
def test_forward_mode_after_a_graph_without(what):
    features = fused_model().requires_grad_(False).features
    model = features[1:] if what == "sequence" else features[2]
    block = model[0] if what == "sequence" else model
    x = torch.randn(2, block.spec.in_channels, 9, 10)
    graph = torch.compile(model, backend="aot_eager")
    with torch.enable_grad():
        graph(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents = [torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (graph, unfuse(model))]
    torch.testing.assert_close(*tangents, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hooked", "replaced"])
def test_what_may_not_run_is_found_while_tracing(name, ran):
    model, x = fused_model(), make_x()
    if name == "hooked":
        model.features[2].conv[0].register_forward_hook(lambda module, inputs, y: y * 2)
    else:
        model.features[2].conv[0][2] = nn.ELU()
    with pytest.warns(UserWarning, match="unfused"):
        expected = model(x)
    ran.clear()
    assert near(torch.compile(model, backend="aot_eager")(x), expected)
    assert ran and WHOLE not in ran


@pytest.mark.slow
def test_inductors_layers_around_a_sequence(ran):
    """The graph's own layers, and their layouts, between ops."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(1280, 4, 1)
            self.features = fused_model().features

        def forward(self, x):
            return self.after(self.features(torch.relu(self.before(x)) * 2)).sigmoid()

    model, x = Around().eval(), make_x()
    torch.testing.assert_close(compiled(model, "inductor")(x), model(x), rtol=1e-4, atol=1e-5)
    assert ran == [[STEM, B, B, B, HEAD]] * 2


@pytest.mark.slow
def test_transforms_run_the_modules(ran):
    model, x = fused_model().requires_grad_(False), make_x()
    found = torch.compile(lambda x: torch.func.vmap(model)(x[None])[0], backend="eager")(x)
    assert near(found, fitted()(x)) and not ran


@pytest.mark.slow
def test_parameters_given_from_outside(ran):
    """torch.func.functional_call inside a graph: the op gets the weights that are given."""
    model, x = fused_model(), make_x()
    given = {name: t.clone() for name, t in other_state().items()}
    other = fused_model()
    other.load_state_dict(given)
    graph = torch.compile(lambda given, x: torch.func.functional_call(model, given, (x,)), backend="aot_eager")
    assert near(graph(given, x), unfuse(other)(x))
    assert near(compiled(model)(x), unfuse(model)(x))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_their_weights(strict):
    model, x = fused_model(), make_x()
    program = torch.export.export(model, (x,), strict=strict)
    assert near(program.module()(x), model(x))
    assert "cached_sequence" not in str(program.graph)


@pytest.mark.slow
def test_is_a_sequence_of_its_own():
    """Slices of a fused Sequential run and compile, too."""
    part = fused_model().features[1:4]
    assert isinstance(part, RunsFused)
    x = torch.randn(2, part[0].spec.in_channels, 17, 20)
    assert torch.equal(compiled(part)(x), part(x))
