"""Blocks whose layers lie among others' in one nn.Sequential: what changes, and modes, dtypes and tracers."""

import copy

import pytest
import torch
from support.flat import MODELS, check, fitted
from support.inputs import image
from support.models import BW, STEM, near
from torch import nn
from torch.nn.utils import prune

from mnv2_fused import fuse, report, unfuse
from mnv2_fused.testing import perturb_batch_norm

pytestmark = pytest.mark.usefixtures("nothing_records")


def test_state_dicts_both_ways():
    plain, x = fitted("MobileNetV1"), image(2, 3, 33, 40)
    other = perturb_batch_norm(copy.deepcopy(plain), seed=5)
    model = fuse(plain)
    model(x)
    model.load_state_dict(other.state_dict())
    check(model, other, x)
    plain = copy.deepcopy(plain)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), other(x))


def another(model, i, module):
    model[i] = module.eval()


CHANGES = {
    "a weight": (lambda m: m[3].weight.mul_(2), 3),
    "a whole tensor behind torch's back": (lambda m: m[6].weight.data.mul_(2), 3),
    "a statistic": (lambda m: m[10].running_var.mul_(2), 3),
    "an eps": (lambda m: setattr(m[7], "eps", 0.5), 3),
    "another convolution": (lambda m: another(m, 6, nn.Conv2d(8, 12, 1, bias=False)), 3),
    "another stride": (lambda m: setattr(m[3], "stride", (2, 2)), 3),
    "another kernel": (lambda m: another(m, 3, nn.Conv2d(8, 8, 5, 1, 2, groups=8)), 3),
    "another activation": (lambda m: another(m, 5, nn.SiLU()), 3),
    "an activation that no kernel computes": (lambda m: another(m, 11, nn.Softplus()), 2),
    "a standard convolution": (lambda m: another(m, 9, nn.Conv2d(12, 12, 3, 2, 1)), 2),
    "another norm": (lambda m: another(m, 4, nn.GroupNorm(2, 8)), 2),
    "no layer": (lambda m: another(m, 8, nn.Identity()), 3),
    "another pooling in the place of a block's norm": (lambda m: another(m, 13, nn.MaxPool2d(2)), 2),
    "a layer less": (lambda m: m.__delitem__(5), 2),
    "a layer more": (lambda m: m.insert(4, nn.Sigmoid()), 2),
    "more behind": (lambda m: m.append(nn.Sigmoid()), 3),
    "none left": (lambda m: [m.__delitem__(0) for _ in range(18)], 0),
    "another forward": (lambda m: setattr(m[5], "forward", torch.sigmoid), 2),
    "a hook": (lambda m: m[5].register_forward_hook(lambda m, a, y: 2 * y), 2),
    "a hook before": (lambda m: m[9].register_forward_pre_hook(lambda m, a: (3 * a[0],)), 2),
    "pruned": (lambda m: prune.random_unstructured(m[6], "weight", 0.5), 2),
    "a norm in training": (lambda m: m[4].train(), 2),
}


@pytest.mark.filterwarnings("ignore:an inverted residual")
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name, ran):
    change, blocks = CHANGES[name]
    plain = nn.Sequential(*copy.deepcopy(fitted("MobileNetV1"))).eval()
    model, x = fuse(plain), image(2, 3, 33, 40)
    model(x)
    for changed in (model, plain):
        torch.manual_seed(4)
        change(changed)
    x = x if name != "none left" else image(2, 16, 9, 9)
    for _ in range(2):
        torch.manual_seed(5)
        ran.clear()
        y = model(x)
        torch.manual_seed(5)
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
        assert sum(kind in (BW, STEM) for kinds in ran for kind in kinds) == blocks


def test_moved_layers_stay_blocks(ran):
    model, plain, x = fuse(fitted("MobileNetV1")), copy.deepcopy(fitted("MobileNetV1")), image(2, 3, 33, 40)
    for change, names in (
        (lambda m: m.insert(0, nn.Sigmoid()), ["4-9", "10-15", "16-21"]),
        (lambda m: m.__delitem__(slice(0, 2)), ["2-7", "8-13", "14-19"]),
    ):
        for one in (model, plain):
            change(one)
        x = x if names[0] == "4-9" else image(2, 8, 33, 40)
        ran.clear()
        check(model, plain, x)
        assert [b.name for b in report(model).fused] == names and sum(map(len, ran)) == 3


@pytest.mark.filterwarnings("ignore:an inverted residual")
def test_layers_that_moved_and_changed_at_once():
    """A block that lies under the old names of another one's layers, some of which are others now."""
    for where in (0, 4, 9):
        for which in (5, 6, 8, 11, 12, 17, 18, 20):
            model, plain = fuse(fitted("MobileNetV1")), copy.deepcopy(fitted("MobileNetV1"))
            x = image(2, 3, 33, 40)
            model(x)
            for one in (model, plain):
                another = copy.deepcopy(one[which])
                for p in another.parameters():
                    p.mul_(1.5)
                one[which] = another if isinstance(another, nn.Conv2d) else nn.SiLU()
                one.insert(where, nn.Sigmoid())
            check(model, plain, x)
            check(fuse(model), plain, x)
            check(fuse(unfuse(model)), plain, x)


def test_layers_that_are_torn_apart(ran):
    model, plain, x = fuse(fitted("MobileNetV1")), copy.deepcopy(fitted("MobileNetV1")), image(2, 3, 33, 40)
    model(x)
    for one in (model, plain):
        one.insert(5, nn.Sigmoid())
    with pytest.warns(UserWarning, match="runs unfused"):
        check(model, plain, x)


def test_hooks_fire_and_go_away(ran):
    model, plain, x, seen = fuse(fitted("groups")), fitted("groups"), image(2, 3, 33, 40), []
    for part in (model[1], model[1][2], model[2][0]):
        model(x)
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        ran.clear()
        with pytest.warns(UserWarning, match="a hook on a") if part is model[1] else pytest.warns(UserWarning):
            check(model, plain, x)
        handle.remove()
        assert seen == [1] and ran != MODELS["groups"][1]
        seen.clear()
        for block in model._flat:
            block._said.clear()
    ran.clear()
    check(model, plain, x)
    assert not seen and ran == MODELS["groups"][1]
    model.register_forward_hook(lambda *_: seen.append(2))
    check(model, plain, x)
    assert seen == [2] and ran[-1:] == MODELS["groups"][1]


def test_training_and_back(ran):
    plain = copy.deepcopy(fitted("MobileNetV2"))
    plain[-2].p = 0.0
    model, x = fuse(plain), image(4, 3, 33, 40)
    model(x)
    for one in (model, plain):
        one.train()
    ran.clear()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)  # by the training kernels
    assert not ran and report(model).training and {block.not_trained for block in report(model).blocks} == {None}
    for one in (model, plain):
        one.eval()
    check(model, plain, x)  # whose statistics are others now
    assert ran == MODELS["MobileNetV2"][1] and not report(model).training


def test_gradients(ran):
    model, plain, x = fuse(fitted("MobileNetV1")), copy.deepcopy(fitted("MobileNetV1")), image(2, 3, 33, 40)
    model(x)
    ran.clear()
    gradients = []
    with torch.enable_grad():
        for one in (model, plain):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            gradients.append([leaf.grad, *(p.grad for p in one.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    with torch.enable_grad():
        torch.optim.SGD(model.parameters(), 0.1).step()
    check(model, unfuse(model), x)
    assert ran == [[STEM, BW, BW]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_to_another_dtype(dtype, ran):
    model, x = fuse(fitted("MobileNetV2")), image(2, 3, 33, 40)
    model(x)
    model.to(dtype)
    ran.clear()
    check(model, unfuse(model), x.to(dtype))
    assert ran == MODELS["MobileNetV2"][1]
    with pytest.raises((RuntimeError, TypeError)):
        model(x)


def test_autocast_and_transforms(ran):
    model, plain, x = fuse(fitted("MobileNetV1")), fitted("MobileNetV1"), image(2, 3, 33, 40)
    model(x)
    ran.clear()
    with torch.autocast("cpu"):
        assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(model)(x[None])[0], plain(x), rtol=1e-4, atol=1e-4)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, doubled, (x,))
    torch.testing.assert_close(y, torch.func.functional_call(plain, doubled, (x,)), rtol=1e-4, atol=1e-4)


def test_compiled():
    torch._dynamo.reset()
    plain, x = copy.deepcopy(fitted("nested")), image(2, 3, 33, 40)
    model = fuse(plain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check(compiled, plain, x)
    for change in (
        lambda m: m[0][3].weight.mul_(2),
        lambda m: m[1][1].running_mean.add_(1),
        lambda m: m[0].__setitem__(6, nn.Conv2d(8, 12, 1, bias=False)),
        lambda m: m[0].__setitem__(5, nn.Hardswish()),
        lambda m: m[0].__setitem__(5, nn.Softplus()),
        lambda m: m.to(torch.float64),
    ):
        for one in (model, plain):
            torch.manual_seed(4)
            change(one)
        check(compiled, plain, x := x.to(model[0][3].weight.dtype))
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for one, leaf in zip((compiled, plain), leaves, strict=True):
            one(leaf).square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-6)
    for one in (model, plain):
        one.train()
        one[-2].p = 0.0
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-6)


def test_a_compiled_call_is_one_op():
    torch._dynamo.reset()
    model, graphs = fuse(fitted("MobileNetV1")), []
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)(image(2, 3, 33, 40))
    ops = [str(node.target) for graph in graphs for node in graph.graph.nodes if "mnv2_fused" in str(node.target)]
    assert ops == ["mnv2_fused.cached_sequence"]


@pytest.mark.filterwarnings("ignore")
def test_exported_traced_and_scripted():
    model, plain, x = fuse(fitted("MobileNetV1")), fitted("MobileNetV1"), image(2, 3, 33, 40)
    model(x)
    for made in (
        torch.export.export(model, (x,)).module(),
        torch.export.export(model, (x,), strict=True).module(),
        torch.jit.trace(model, x),
        torch.fx.symbolic_trace(model),
        torch.jit.script(fuse(plain)),
    ):
        torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-4)
    frozen = torch.export.export(fuse(plain, frozen=True), (x,))
    assert "mnv2_fused" in str(frozen.graph)
    assert near(frozen.module()(x), plain(x))


def test_a_meta_copy_gives_shapes():
    model = fuse(fitted("MobileNetV2")).to("meta")
    assert model(torch.empty(2, 3, 33, 40, device="meta")).shape == (2, 5)
