"""FusedInvertedResidual as a module: drop-in, never stale, copyable, trainable."""

import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import FrozenBatchNorm2d

from mnv2_fused import FusedInvertedResidual
from mnv2_fused.module import fused_block, packed_cache, parameters
from mnv2_fused.testing import agreement, perturb_batch_norm, threads

GEOMETRIES = [(8, 8, 1, 6), (8, 12, 2, 6), (8, 5, 1, 1), (8, 8, 1, 1)]
by_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def blocks(*geometry):
    """torchvision's block and ours with its weights, both in eval."""
    theirs = perturb_batch_norm(InvertedResidual(*geometry)).eval()
    ours = FusedInvertedResidual(*geometry).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_x(dtype=torch.float32):
    return torch.randn(2, 8, 9, 7, dtype=dtype).to(memory_format=torch.channels_last)


def eager(block, x):
    """What the inner modules compute, whatever the block would do."""
    y = block.conv(x)
    return x + y if block.use_res_connect else y


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def ran(monkeypatch):
    """The calls that reached the fused op."""
    from mnv2_fused import ops

    calls, original = [], ops.packed_inverted_residual

    def counted(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(ops, "packed_inverted_residual", counted)
    return calls


@by_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_eval_is_within_the_rule_and_fused(geometry, dtype, ran):
    theirs, ours = blocks(*geometry)
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), make_x(dtype)
    with torch.no_grad():
        y = ours(x)
        found = agreement(y, theirs(x), copy.deepcopy(theirs).double()(x.double()))
    assert len(ran) == 1
    if dtype == torch.float64:  # nothing better to compare eager with
        torch.testing.assert_close(y, theirs(x))
    else:
        assert found.ok, found


@by_geometry
def test_state_dict_both_ways(geometry):
    theirs, ours = blocks(*geometry)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    perturb_batch_norm(ours, seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = make_x()
    close(ours(x), theirs(x))


@by_geometry
def test_attributes(geometry):
    theirs, ours = blocks(*geometry)
    for name in ("out_channels", "_is_cn", "use_res_connect", "stride"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert not hasattr(ours, "fuse")
    assert "stride" in repr(ours)
    assert ours.spec.out_channels == geometry[1]


def test_mobilenet_v2_takes_the_block():
    model = torchvision.models.mobilenet_v2(block=FusedInvertedResidual, num_classes=10)
    original = torchvision.models.mobilenet_v2(num_classes=10)
    perturb_batch_norm(original)
    model.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), original.eval()(x), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(m, FusedInvertedResidual) for m in model.modules()) == 17


@by_geometry
def test_train_is_torchvisions(geometry):
    """To rounding, by kernels of its own; to the bit by the modules, where eager is asked for."""
    theirs, ours = blocks(*geometry)
    plain = copy.deepcopy(ours)
    plain.backend = "eager"
    truth = copy.deepcopy(theirs).double()
    models = [block.train() for block in (ours, plain, theirs, truth)]
    for _ in range(2):
        x = make_x()
        y, same, expected, exact = (block(x.to(next(block.parameters()).dtype)) for block in models)
        assert torch.equal(same, expected) and not torch.equal(y, expected)
        assert agreement(y, expected, exact).ok
    states = [block.state_dict().values() for block in models]
    for name, mine, same, other, exact in zip(ours.state_dict(), *states, strict=True):
        assert torch.equal(same, other), name
        assert agreement(mine.float(), other.float(), exact).ok, name
    close(ours.eval()(x), theirs.eval()(x))


@by_geometry
@pytest.mark.parametrize("x_grad", [False, True])
def test_gradients_in_eval(geometry, x_grad):
    theirs, ours = blocks(*geometry)
    theirs, ours = theirs.double(), ours.double()
    x = make_x(torch.float64)
    results = []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_(x_grad)
        block(leaf).square().sum().backward()
        results.append({"x": leaf.grad, **{n: p.grad for n, p in block.named_parameters()}})
    assert results[0].keys() == results[1].keys()
    for name, found in results[0].items():
        if name != "x" or x_grad:
            torch.testing.assert_close(found, results[1][name], msg=name)


def test_input_gradients_with_frozen_parameters():
    theirs, ours = blocks(8, 8, 1, 6)
    x = make_x().requires_grad_()
    grads = [torch.autograd.grad(b.requires_grad_(False)(x).square().sum(), x)[0] for b in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_partly_frozen_parameters():
    theirs, ours = blocks(8, 8, 1, 6)
    for block in (theirs, ours):
        block.requires_grad_(False)
        block.conv[1][1].weight.requires_grad_()
        block(make_x() * 0 + 0.5).square().sum().backward()
        assert [n for n, p in block.named_parameters() if p.grad is not None] == ["conv.1.1.weight"]
    torch.testing.assert_close(ours.conv[1][1].weight.grad, theirs.conv[1][1].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["sum", "square"])
def test_double_backward_is_refused_not_wrong(loss):
    _, ours = blocks(8, 8, 1, 6)
    x = make_x().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative .*backend='eager'"):
        torch.autograd.grad(loss(ours(x)), x, create_graph=True)


def test_forward_mode_and_function_transforms_run_the_modules():
    theirs, ours = blocks(8, 8, 1, 6)
    x, direction = make_x(), make_x()
    for block in (theirs, ours):
        block.requires_grad_(False)
        block.eval()
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            y = block(torch.autograd.forward_ad.make_dual(x, direction))
            block.tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    close(ours.tangent, theirs.tangent)
    assert ours.tangent.abs().max() > 0.1
    close(torch.func.jvp(ours, (x,), (direction,))[1], theirs.tangent)
    gradients = [torch.func.grad(lambda x, b=b: b(x).square().sum())(x) for b in (ours, theirs)]
    close(*gradients)
    parameters = dict(theirs.named_parameters())
    loss = torch.func.grad(lambda p, b: torch.func.functional_call(b, p, (x,)).square().sum())
    close(loss(parameters, ours)["conv.2.weight"], loss(parameters, theirs)["conv.2.weight"])


def test_weights_another_process_may_change_are_folded_every_time():
    theirs, ours = blocks(8, 8, 1, 6)
    ours.share_memory()
    x = make_x()
    close(ours(x), theirs(x))
    with torch.no_grad():
        theirs.conv[2].weight.mul_(3)
        # As another process would: without counting up the version that this one sees.
        weight = ours.conv[2].weight
        before = weight._version
        weight.data.mul_(3)
    assert weight._version == before
    close(ours(x), theirs(x))


def own_forward(block):
    block.conv[0][2].forward = lambda x: x.clamp(0, 1)


def reflect(block):
    block.conv[1][0].padding_mode = "reflect"
    block.conv[1][0]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def lower_clip(block):
    block.conv[0][2].max_val = 0.5


def stride_of_expand(block):
    block.conv[0][0].padding = 1
    block.conv[1][0].padding = 0


@pytest.mark.parametrize("change", [own_forward, reflect, lower_clip, stride_of_expand])
@pytest.mark.parametrize("called", [False, True])
def test_changed_attributes_of_inner_modules(change, called):
    _, ours = blocks(8, 8, 1, 6)
    x = make_x() * 3
    if called:
        ours(x)
    before = ours(x) if called else None
    change(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = ours(x)
    assert torch.equal(y, eager(ours, x))
    assert before is None or not torch.allclose(y, before)


def test_unrecognisable_layers_can_be_printed():
    _, ours = blocks(8, 8, 1, 6)
    ours.conv[0] = nn.Sequential(nn.Conv2d(8, 24, 1), nn.Conv2d(24, 48, 1))
    with pytest.warns(UserWarning, match="its layers are not"):
        ours(make_x())
    assert ours.spec is None and "its layers are not" in repr(ours)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, cuda, triton, eager, got 'cude'"):
        FusedInvertedResidual(8, 8, 1, 6, backend="cude")


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_autocast(geometry):
    theirs, ours = blocks(*geometry)
    x = make_x()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype
    wide = copy.deepcopy(theirs).double()(x.double())
    assert agreement(found.bfloat16(), expected.bfloat16(), wide).ok
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype, name
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.05 * q.grad.abs().max().item())


def test_under_autocast_weights_are_folded_once(monkeypatch):
    _, block = blocks(*GEOMETRIES[0])
    folded, fold = [], parameters.fold_and_pack
    monkeypatch.setattr(packed_cache, "fold_and_pack", lambda *args: folded.append(args) or fold(*args))
    inspected = FusedInvertedResidual._prepare
    monkeypatch.setattr(FusedInvertedResidual, "_prepare", lambda *args: folded.append(args) or inspected(*args))
    with torch.no_grad():
        block(make_x())
        folded.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for x in (make_x(), make_x().bfloat16(), make_x().half()):
                block(x)
            assert not folded
            with pytest.raises(TypeError, match="floating point"):
                block(make_x().long())
            assert block(make_x().double()).dtype == torch.float64
        with pytest.raises(TypeError, match=r"bfloat16 .*float32.*autocast"):
            block(make_x().bfloat16())


def replaced(block):
    block.conv[2].weight = nn.Parameter(torch.randn(8, 48, 1, 1))


def optimizer_step(block):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
    block(make_x()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def other_state():
    return perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6), seed=9).state_dict()


def norm_trains(block):
    block.conv[1][1].train()


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def conv_of_a_subclass(block):
    conv = Doubling(48, 8, 1, bias=False)
    conv.load_state_dict(block.conv[2].state_dict())
    block.conv[2] = conv


def conv_replaced(block):
    block.conv[0][0] = nn.Conv2d(8, 48, 1)  # with a bias


def norm_replaced(block):
    block.conv[1][1] = perturb_batch_norm(nn.BatchNorm2d(48), seed=4).eval()


def activation_replaced(block):
    block.conv[1][2] = nn.ELU()


def pruned_channels(block):
    """Structured pruning: every tensor is cut in place, so that it starts at the same address."""
    for conv in (block.conv[0][0], block.conv[1][0]):
        conv.weight.data = conv.weight.data[:32]
        conv.out_channels = 32
    block.conv[1][0].groups = block.conv[1][0].in_channels = block.conv[2].in_channels = 32
    for norm in (block.conv[0][1], block.conv[1][1]):
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data = getattr(norm, name).data[:32]
    block.conv[2].weight.data = block.conv[2].weight.data[:, :32]


def transposed(block):
    weight = block.conv[2].weight
    weight.data = weight.data.view(48, 8, 1, 1).transpose(0, 1)  # the same address


def running_statistics(block):
    block.train()(make_x())
    block.eval()


CHANGES = {
    "in place": lambda b: b.conv[0][0].weight.mul_(1.7),
    "bias in place": lambda b: b.conv[3].bias.add_(1),
    "load_state_dict": lambda b: b.load_state_dict(other_state()),
    "load_state_dict, assign": lambda b: b.load_state_dict(other_state(), assign=True),
    "optimizer": torch.enable_grad()(optimizer_step),
    "half and back": lambda b: b.half().float(),
    "running statistics": running_statistics,
    "running variance": lambda b: b.conv[1][1].running_var.mul_(3),
    "eps": lambda b: setattr(b.conv[1][1], "eps", 0.7),
    "parameter replaced": replaced,
    "data replaced": lambda b: setattr(b.conv[2].weight, "data", torch.randn(8, 48, 1, 1)),
    "data transposed": transposed,
    "channels pruned": pruned_channels,
    "conv replaced": conv_replaced,
    "norm replaced": norm_replaced,
    "reset": lambda b: b.conv[1][1].reset_parameters(),
    "data in place, then train and eval": lambda b: b.conv[2].weight.data.mul_(2) is b.train().eval(),
}
UNFUSED = {
    "conv of a subclass": conv_of_a_subclass,
    "activation": activation_replaced,
    "forward hook": lambda b: b.conv[0][0].register_forward_hook(lambda m, i, o: o + 1),
    "pre-hook": lambda b: b.conv[2].register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "hook on a stage": lambda b: b.conv[0].register_forward_hook(lambda m, i, o: o * 2),
    "hook on conv": lambda b: b.conv.register_forward_hook(lambda m, i, o: o * 2),
    "group norm": lambda b: b.conv[1].__setitem__(1, nn.GroupNorm(4, 48)),
    "parametrization": lambda b: parametrizations.spectral_norm(b.conv[2]),
    "pruning": lambda b: prune.l1_unstructured(b.conv[0][0], "weight", amount=0.5),
}


def check_change(change, grad):
    block = perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6)).eval()
    x = make_x()
    with torch.set_grad_enabled(grad):
        before = block(x)
    with torch.no_grad():
        change(block)
    with torch.set_grad_enabled(grad):
        found = block(x)
        close(found, eager(block, x))
        close(block(x), eager(block, x))
    assert not torch.equal(found, before), "the change changes nothing, so this test sees nothing"
    return block


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, grad):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # and it stays fused
        check_change(change, grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", UNFUSED.values(), ids=UNFUSED)
def test_what_cannot_be_fused_runs_unfused_and_says_so(change, grad):
    with pytest.warns(UserWarning, match="runs unfused"):
        check_change(change, grad)


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("change", UNFUSED.values(), ids=UNFUSED)
def test_what_cannot_be_fused_is_not_fused_when_compiled(change):
    block = perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6)).eval()
    change(block)
    compiled, x = torch.compile(block, backend="aot_eager"), make_x()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        close(compiled(x), eager(block, x))


def test_one_norm_back_in_training():
    theirs, ours = blocks(8, 8, 1, 6)
    x = make_x()
    for block in (theirs, ours):
        block.conv[1][1].train()
    close(ours(x), theirs(x))
    close(ours.conv[1][1].running_mean, theirs.conv[1][1].running_mean)
    ours.eval(), theirs.eval()
    close(ours(x), theirs(x))


def test_removed_hook_and_removed_pruning_fuse_again(ran):
    _, ours = blocks(8, 8, 1, 6)
    x = make_x()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        handle = ours.conv[0].register_forward_hook(lambda m, i, o: o * 2)
        ours(x)
        prune.l1_unstructured(ours.conv[0][0], "weight", amount=0.5)
        close(ours(x), eager(ours, x))
    assert not ran
    handle.remove()
    prune.remove(ours.conv[0][0], "weight")
    with torch.no_grad():
        close(ours(x), eager(ours, x))
    assert len(ran) == 1


def test_gradients_after_a_call_in_inference_mode():
    """What is folded in inference mode serves a derivative, too."""
    _, block = blocks(8, 8, 1, 6)
    block.requires_grad_(False)
    x = make_x().requires_grad_()
    with torch.inference_mode():
        block(x)
    folded = block._ready.packed
    found = torch.autograd.grad(block(x).square().sum(), x)
    assert block._ready.packed is folded
    torch.testing.assert_close(found, torch.autograd.grad(eager(block, x).square().sum(), x), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("fresh_graphs")
def test_a_compiled_graph_calls_the_op_that_keeps_what_it_folds(monkeypatch):
    """Folded while it is traced; a graph for export, or for training, has the folding inside."""
    folds, original = [], packed_cache.fold_and_pack
    monkeypatch.setattr(packed_cache, "fold_and_pack", lambda *arguments: folds.append(1) or original(*arguments))
    _, block = blocks(8, 8, 1, 6)
    graphs = []

    def traced(module, inputs):
        graphs.append((str(module.graph), len(folds)))
        return module

    compiled, x = torch.compile(block, fullgraph=True, backend=traced), make_x()
    with torch.no_grad():
        for _ in range(2):
            close(compiled(x), eager(block, x))
        ((graph, folded),) = graphs
        assert "cached_inverted_residual" in graph and folded == len(folds) == 1
        exported = str(torch.export.export(block, (x,), strict=True).graph)
    compiled(x)
    for graph in exported, graphs[-1][0]:
        assert "cached_inverted_residual" not in graph and "mnv2_fused.inverted_residual" in graph


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_transforms_run_the_modules(frozen):
    _, block = blocks(8, 8, 1, 6)
    block.requires_grad_(not frozen)
    x = make_x()
    transforms = {
        "vmap": lambda f: torch.func.vmap(f)(x[None])[0],
        "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
    }
    for transform in transforms.values():
        compiled = torch.compile(lambda transform=transform: transform(block), backend="eager")
        torch.testing.assert_close(compiled(), transform(block._forward_modules), rtol=1e-3, atol=1e-3)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        close(compiled(x), eager(block, x))
    found = torch.func.grad(lambda x: compiled(x).square().sum())(x)
    torch.testing.assert_close(found, transforms["grad"](block._forward_modules), rtol=1e-3, atol=1e-3)


def test_inference_mode_parameters():
    with torch.inference_mode():
        block = perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6)).eval()
        x = make_x()
        close(block(x), eager(block, x))
        block.conv[0][0].weight.mul_(1.7)
        close(block(x), eager(block, x))


def test_weights_that_cannot_be_watched_are_said_once(monkeypatch):
    """As those are on a GPU that were made under inference_mode(): nothing there tells of a write."""
    monkeypatch.setattr(fused_block, "trackable", lambda tensors: False)
    _, block = blocks(8, 8, 1, 6)
    x = make_x()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="folds its weights at every call") as caught:
            for _ in range(2):
                close(block(x), eager(block, x))
        assert len(caught) == 1
        block.conv[2].weight.data.mul_(2)
        close(block(x), eager(block, x))


def test_ordinary_parameters_changed_under_inference_mode():
    _, block = blocks(8, 8, 1, 6)
    x = make_x()
    with torch.inference_mode():
        block(x)
        block.conv[0][0].weight.mul_(1.7)
        close(block(x), eager(block, x))


def test_weights_are_packed_once(monkeypatch):
    module = sys.modules["mnv2_fused.module.parameters"]
    packings, original = [], module.pack_block
    monkeypatch.setattr(module, "pack_block", lambda *args: packings.append(1) or original(*args))
    _, ours = blocks(8, 8, 1, 6)
    with torch.no_grad():
        for _ in range(4):
            ours(make_x())
    assert len(packings) == 1


@by_geometry
def test_copies(copied, geometry):
    _, ours = blocks(*geometry)
    x = make_x()
    before = ours(x)
    twin = copied(ours)
    assert not twin.training
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.conv[-2].weight.mul_(2)
    close(twin(x), eager(twin, x))
    assert torch.equal(ours(x), before), "the copy shares something with its original"


def test_frozen_batch_norm():
    theirs = perturb_batch_norm(InvertedResidual(8, 8, 1, 6, norm_layer=FrozenBatchNorm2d)).eval()
    ours = FusedInvertedResidual(8, 8, 1, 6, norm_layer=FrozenBatchNorm2d).eval()
    ours.load_state_dict(theirs.state_dict())
    x = make_x()
    close(ours(x), theirs(x))
    with torch.no_grad():
        ours.conv[1][1].running_var.mul_(2)
    close(ours(x), eager(ours, x))


def without_affine(channels):
    return nn.BatchNorm2d(channels, affine=False)


def test_norm_without_affine():
    ours = perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6, norm_layer=without_affine)).eval()
    x = make_x()
    close(ours(x), eager(ours, x))
    ours(x).sum().backward()
    assert ours.conv[0][0].weight.grad is not None


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (lambda c: nn.GroupNorm(2, c), "GroupNorm cannot be folded"),
        (lambda c: nn.BatchNorm2d(c, track_running_stats=False), "no running statistics"),
        (nn.InstanceNorm2d, "InstanceNorm2d cannot be folded"),
    ],
    ids=["group", "no statistics", "instance"],
)
def test_a_norm_that_does_not_fold_is_refused(norm, message):
    with pytest.raises(ValueError, match=f"{message}.*leave this block unfused"):
        FusedInvertedResidual(8, 8, 1, 6, norm_layer=norm)


def test_adopt_shares_the_modules():
    theirs = perturb_batch_norm(InvertedResidual(8, 8, 1, 6)).eval()
    ours = FusedInvertedResidual.adopt(theirs.conv, stride=1, residual=True)
    x = make_x()
    assert ours.conv is theirs.conv and not ours.training
    close(ours(x), theirs(x))
    with torch.no_grad():
        theirs.conv[0][0].weight.mul_(2)
    close(ours(x), theirs(x))


def test_adopt_refuses_what_it_would_compute_wrongly():
    def changed(change):
        conv = InvertedResidual(8, 8, 1, 6).conv
        change(conv)
        return conv

    cases = {
        "ELU": lambda c: c[0].__setitem__(2, nn.ELU()),
        "kernel": lambda c: c[1].__setitem__(0, nn.Conv2d(48, 48, 9, padding=4, groups=48, bias=False)),
        "dilation": lambda c: c[1].__setitem__(0, nn.Conv2d(48, 48, 3, padding=1, dilation=2, groups=48)),
        "padding_mode": lambda c: c[1].__setitem__(
            0, nn.Conv2d(48, 48, 3, padding=1, groups=48, padding_mode="reflect")
        ),
    }
    accepted = []
    for name, change in cases.items():
        try:
            FusedInvertedResidual.adopt(changed(change), stride=1, residual=True)
        except ValueError:
            continue
        accepted.append(name)
    assert not accepted


@pytest.mark.parametrize("grad", [False, True])
def test_python_threads_share_a_module(grad):
    _, ours = blocks(8, 8, 1, 6)
    inputs = [torch.randn(1, 8, 5 + i % 7, 9) for i in range(40)]

    def call(x):
        with torch.set_grad_enabled(grad):
            return ours(x).detach()

    with threads(1), ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(call, inputs))
            for x, y in zip(inputs, found, strict=True):
                close(y, eager(ours, x).detach())
            with torch.no_grad():
                ours.conv[0][0].weight.mul_(1.1)


def test_eval_in_one_thread_while_another_runs():
    """A server that says eval() before every request clears the packed weights under the others' feet."""
    _, ours = blocks(8, 8, 1, 6)
    x = make_x()
    expected, interval = ours(x).detach(), sys.getswitchinterval()

    def call(i):
        with torch.no_grad():
            return torch.equal(ours.eval()(x), expected)

    sys.setswitchinterval(1e-6)
    try:
        with threads(1), ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(3000)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_after_a_call(dtype):
    theirs, ours = blocks(8, 8, 1, 6)
    ours(make_x())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = make_x(dtype)
    y = ours(x)
    assert y.dtype == dtype
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, theirs(x), **tolerance)


# --- training: what is kept, and gradients


def training_pair(geometry, **options):
    theirs = perturb_batch_norm(InvertedResidual(*geometry)).train()
    ours = FusedInvertedResidual(*geometry, **options).train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if ours.recompute:  # which is for blocks that the training kernels do not take
        ours.backend = "eager"
    return theirs, ours


def freeze_norms(block):
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    return block


def saved_by(call):
    """What a call keeps for backward, parameters and buffers aside, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call()
    return [t for t in kept if t.dim() == 4 and t.shape[0] == 2 and t.shape[2] > 1], y


def check_gradients(ours, theirs, x, dtype=torch.float32):
    """Against float64 through the ordinary modules, from the same state."""
    truth = copy.deepcopy(theirs).double()
    results = []
    for block in (ours, theirs, truth):
        block.zero_grad()
        leaf = x.clone().to(next(block.parameters()).dtype).requires_grad_()
        y = block(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in block.parameters())])
    for of_ours, of_theirs, of_truth in zip(*results, strict=True):
        found = agreement(of_ours, of_theirs, of_truth)
        assert found.ok, found


@by_geometry
@pytest.mark.parametrize("momentum", [0.1, None])
def test_recompute_keeps_the_input_alone_and_counts_statistics_once(geometry, momentum):
    theirs, ours = training_pair(geometry, recompute=True)
    for norm in (m for b in (theirs, ours) for m in b.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = momentum
    x = make_x()
    kept, y = saved_by(lambda: ours(x.requires_grad_()))
    assert [t.shape for t in kept] == [x.shape]
    assert torch.equal(y, theirs(x))
    y.sum().backward()
    for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, other), name
    check_gradients(ours, theirs, make_x())


def test_without_recompute_narrow_tensors_are_kept():
    """x and the projection's result, and beside them nothing of the image's size."""
    _, ours = training_pair((8, 8, 1, 6))
    x = make_x()
    kept, _ = saved_by(lambda: ours(x))
    assert [tuple(t.shape) for t in kept if t.dim() == 4 and t.shape[2:] == x.shape[2:]] == [x.shape] * 2
    ours.backend = "eager"
    kept, _ = saved_by(lambda: ours(x))
    assert sum(t.shape[1] == 48 for t in kept) >= 4


def test_recompute_trains_as_eager_does():
    theirs, ours = training_pair((8, 8, 1, 6), recompute=True)
    for block in (theirs, ours):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            block(torch.randn(4, 8, 6, 6, generator=generator)).square().mean().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine, other)
    x = make_x()
    close(ours.eval()(x), theirs.eval()(x))


def test_recompute_without_gradients_and_of_one_norm_in_eval():
    theirs, ours = training_pair((8, 8, 1, 6), recompute=True)
    x = make_x()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    for block in (theirs, ours):
        block.conv[1][1].eval()
    kept, _ = saved_by(lambda: ours(make_x()))
    assert len(kept) == 1
    check_gradients(ours, theirs, make_x())


def test_recompute_under_autocast():
    theirs, ours = training_pair((8, 8, 1, 6), recompute=True)
    x, truth = make_x(), copy.deepcopy(theirs).double()
    results = []
    for block in (ours, theirs, truth):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=block is not truth):
            y = block(x.to(next(block.parameters()).dtype))
        y.double().square().sum().backward()
        results.append([p.grad for p in block.parameters()])
    for of_ours, of_theirs, of_truth in zip(*results, strict=True):
        assert of_ours.dtype == of_theirs.dtype
        assert agreement(of_ours, of_theirs, of_truth).ok


@pytest.mark.parametrize("change", [UNFUSED["forward hook"], UNFUSED["pruning"], UNFUSED["parametrization"]])
def test_recompute_runs_the_modules_where_it_cannot_see_what_they_do(change):
    _, ours = training_pair((8, 8, 1, 6), recompute=True)
    change(ours)
    with pytest.warns(UserWarning, match="keeps what recompute=True would not"):
        kept, _ = saved_by(lambda: ours(make_x()))
    assert len(kept) > 1


@by_geometry
def test_frozen_norms_run_fused_in_train(geometry, ran):
    theirs, ours = (freeze_norms(b) for b in training_pair(geometry))
    before = copy.deepcopy(list(ours.buffers()))
    kept, _ = saved_by(lambda: ours(make_x()))
    assert len(ran) == 1 and len(kept) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), before, strict=True))
    check_gradients(ours, theirs, make_x())
    ours.train()
    ours(make_x())
    assert len(ran) == 2  # one norm in train() is enough for the modules


def test_frozen_batch_norm_runs_fused_in_train(ran):
    block = perturb_batch_norm(FusedInvertedResidual(8, 8, 1, 6, FrozenBatchNorm2d)).train()
    x = make_x()
    close(block(x), eager(block, x))
    assert len(ran) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_in_slices_of_the_batch(monkeypatch, dtype):
    from mnv2_fused.module import training

    theirs, ours = (freeze_norms(b).to(dtype) for b in training_pair((8, 8, 1, 6)))
    sizes, unfolded = [], training.unfolded
    monkeypatch.setattr(training, "unfolded", lambda x, *a, **k: sizes.append(x.shape[0]) or unfolded(x, *a, **k))
    monkeypatch.setattr(training, "_SLICE_BYTES", 0)
    x = torch.randn(20, 8, 9, 7, dtype=dtype)
    check_gradients(ours, theirs, x)
    assert len(sizes) > 4 and sum(sizes) == 20 and max(sizes) == 20 // 6
    ours.zero_grad()
    ours(torch.randn(0, 8, 9, 7, dtype=dtype)).sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in ours.parameters())


def test_the_peak_of_frozen_blocks_is_a_third_of_eagers():
    from mnv2_fused.testing import peak_activation_bytes

    geometries = [(16, 24, 2, 6), (24, 24, 1, 6), (24, 32, 2, 6), (32, 32, 1, 6), (32, 32, 1, 6)]
    eager = freeze_norms(nn.Sequential(*(InvertedResidual(*g) for g in geometries)).train())
    fused = freeze_norms(nn.Sequential(*(FusedInvertedResidual(*g) for g in geometries)).train())
    x = torch.randn(16, 16, 56, 56).to(memory_format=torch.channels_last).requires_grad_()
    peaks = [peak_activation_bytes(lambda model=m: model(x).sum().backward()) for m in (fused, eager)]
    assert peaks[0] <= peaks[1] / 3, peaks


def test_the_peak_of_recomputing_blocks_is_less_than_half_of_eagers():
    """With statistics of the batch: of each block its input alone is kept until backward."""
    from mnv2_fused.testing import peak_activation_bytes

    geometries = [(24, 24, 1, 6)] * 6
    eager = nn.Sequential(*(InvertedResidual(*g) for g in geometries)).train()
    fused = nn.Sequential(*(FusedInvertedResidual(*g, recompute=True) for g in geometries)).train()
    x = torch.randn(8, 24, 28, 28).to(memory_format=torch.channels_last).requires_grad_()
    peaks = [peak_activation_bytes(lambda model=m: model(x).sum().backward()) for m in (fused, eager)]
    assert peaks[0] <= peaks[1] / 2, peaks
