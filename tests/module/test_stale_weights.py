"""Every way to write a weight that torch counts, and those that it does not: the next call knows."""

import ctypes
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import fused_model, make_x, near
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from mnv2_fused import FusedInvertedResidual, backends, unfuse
from mnv2_fused.module.guard import Guard, _warn_of_late_writes
from mnv2_fused.testing import perturb_batch_norm


def weight_of(model):
    return model.features[2].conv[0][0].weight


def norm_of(model):
    return model.features[2].conv[0][1]


def by_ctypes(model):
    weight = weight_of(model)
    values = (ctypes.c_float * weight.numel()).from_address(weight.data_ptr())
    for i in range(len(values)):
        values[i] *= 1.5


def by_optimizer(optimizer, **options):
    def write(model):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer(model.parameters(), lr=0.05, **options).step()

    return write


def by_statistics(function):
    def write(model):
        norm = norm_of(model)
        x = torch.randn(4, norm.num_features, 5, 5)
        function(x, norm)

    return write


def by_dlpack(model):
    torch.from_dlpack(weight_of(model).detach()).mul_(1.5)


def by_storage(model):
    weight = weight_of(model)
    other = (weight.detach() * 1.5).contiguous(memory_format=torch.channels_last)
    weight.untyped_storage().copy_(other.untyped_storage())


def by_another_thread(model):
    thread = threading.Thread(target=lambda: weight_of(model).data.mul_(1.5))
    thread.start()
    thread.join()


def by_swap(model):
    weight = nn.Parameter(weight_of(model).detach() * 1.5)
    torch.utils.swap_tensors(weight_of(model), weight)


def assigned(model):
    model.load_state_dict(
        {k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}, assign=True
    )


def by_ema(model):
    averaged = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, n: new * 1.5)
    averaged.update_parameters(model)
    for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
        p.data.copy_(q.data * 1.5)


WRITES = {
    # Counted by torch.
    "in place": lambda m: weight_of(m).mul_(1.5),
    "one element": lambda m: weight_of(m)[3, 1, 0, 0].add_(1.0),
    "through a view": lambda m: weight_of(m).view(-1)[7:9].mul_(3.0),
    "detach": lambda m: weight_of(m).detach().mul_(1.5),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "init": lambda m: nn.init.normal_(weight_of(m)),
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 1.5),
    "SGD": by_optimizer(torch.optim.SGD),
    "Adam": by_optimizer(torch.optim.Adam),
    # Another tensor, or another memory.
    "assigned": lambda m: setattr(m.features[2].conv[0][0], "weight", nn.Parameter(weight_of(m) * 1.5)),
    "load_state_dict(assign=True)": assigned,
    "data assigned": lambda m: setattr(weight_of(m), "data", weight_of(m).data * 1.5),
    "set_": lambda m: weight_of(m).set_(weight_of(m).detach() * 1.5),
    "swap_tensors": by_swap,
    # Not counted.
    "data": lambda m: weight_of(m).data.mul_(1.5),
    "data of a statistic": lambda m: norm_of(m).running_mean.data.add_(1.0),
    "data of a classifier's bias": lambda m: m.classifier[1].bias.data.add_(1.0),
    "NumPy": lambda m: np.multiply(weight_of(m).detach().numpy(), 1.5, out=weight_of(m).detach().numpy()),
    "DLPack": by_dlpack,
    "ctypes": by_ctypes,
    "storage": by_storage,
    "another thread": by_another_thread,
    "EMA by data": by_ema,
    "fused SGD": by_optimizer(torch.optim.SGD, fused=True),
    "fused Adam": by_optimizer(torch.optim.Adam, fused=True),
    "fused AdamW": by_optimizer(torch.optim.AdamW, fused=True),
    "fused Adagrad": by_optimizer(torch.optim.Adagrad, fused=True),
    "F.batch_norm": by_statistics(
        lambda x, norm: F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)
    ),
    "F.instance_norm": by_statistics(lambda x, norm: F.instance_norm(x, norm.running_mean, norm.running_var)),
    "native_batch_norm": by_statistics(
        lambda x, norm: torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, 0.1, 1e-5
        )
    ),
}


MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRITES)
def test_the_next_call_uses_what_was_written(name, mode):
    model, x = fused_model(), make_x()
    with MODES[mode]():
        before = model(x).detach()
        assert torch.equal(model(x), before)
    with torch.no_grad():
        WRITES[name](model)
    with MODES[mode]():
        after = model(x).detach()
    assert not torch.equal(after, before)
    with torch.no_grad():
        assert near(after, unfuse(model)(x))


@pytest.mark.parametrize("name", ["data", "NumPy", "fused Adam", "F.batch_norm", "one element"])
def test_a_compiled_graph_uses_what_was_written(name, fresh_graphs):
    model, x = fused_model(), make_x()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = [compiled(x) for _ in range(3)][-1]
        WRITES[name](model)
        after = compiled(x)
        assert not torch.equal(after, before)
        assert near(after, unfuse(model)(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_frozen_norm_training_follows_its_optimizer(optimizer, fused):
    model = fused_model()
    plain = unfuse(model)
    x, target = make_x(4), torch.tensor([1, 7, 3, 0])
    losses = []
    for network in (model, plain):
        steps = optimizer(network.parameters(), lr=1e-3, fused=fused)
        losses.append([])
        for _ in range(3):
            loss = F.cross_entropy(network.eval()(x), target)
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][2], rel=1e-3)


@pytest.fixture
def warns_anew():
    _warn_of_late_writes.cache_clear()
    yield
    _warn_of_late_writes.cache_clear()


def test_a_part_written_unseen_is_found_within_the_bound(warns_anew):
    """One element, away from those that every call looks at."""
    model, x = fused_model(), make_x()
    spans = [t.nbytes for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    bound = sum(spans) // 2**14 + len(spans)
    with torch.inference_mode():
        before = model(x)
        model.features[-1][0].weight.data.view(-1)[12_345] += 50.0
        with pytest.warns(UserWarning, match="behind torch's back"):
            calls = next(n for n in range(1, bound + 1) if not torch.equal(model(x), before))
        assert calls > 1  # else a call looked at this element anyway
        assert near(model(x), unfuse(model)(x))


def test_a_late_find_warns_once(warns_anew):
    block, x = perturb_batch_norm(FusedInvertedResidual(64, 64, 1, 6)).eval(), torch.randn(1, 64, 5, 5)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            before = block(x)
            block.conv[0][0].weight.data.view(-1)[10_001] += 9.0
            assert any(not torch.equal(block(x), before) for _ in range(100))
    assert ["behind torch's back" in str(w.message) for w in caught] == [True]


def test_train_and_eval_make_the_next_call_look_at_everything():
    block, x = perturb_batch_norm(FusedInvertedResidual(64, 64, 1, 6)).eval(), torch.randn(1, 64, 5, 5)
    with torch.no_grad():
        before = block(x)
        block.conv[0][0].weight.data.view(-1)[10_001] += 9.0
        block.eval()
        assert not torch.equal(block(x), before)


def test_a_fused_step_of_some_elements_is_noticed_at_once():
    """Those that every call looks at stay as they were: their gradient is zero."""
    block, x = perturb_batch_norm(FusedInvertedResidual(64, 64, 1, 6)).eval(), torch.randn(1, 64, 5, 5)
    weight = block.conv[0][0].weight
    with torch.no_grad():
        before = block(x)
        weight.grad = torch.zeros_like(weight)
        weight.grad.view(-1)[10_001] = 1.0
        version = weight._version
        torch.optim.SGD([weight], lr=9.0, fused=True).step()
        assert weight._version == version  # else this test shows nothing
        assert not torch.equal(block(x), before)


def test_a_guard_that_failed_stays_invalid():
    weight = torch.ones(1000)
    guard = Guard([weight])
    assert guard.is_valid()
    weight.data.mul_(2)
    assert not guard.is_valid()
    weight.data.div_(2)
    assert not guard.is_valid()


@pytest.mark.parametrize("bytes_", [1, 2, 3, 7, 8, 9, 16, 31, 63, 64, 65, 127, 1000])
def test_every_byte_counts(bytes_):
    """Each byte of a tensor of any size, within the calls that the bound allows."""
    for i in range(bytes_):
        weight = torch.zeros(bytes_, dtype=torch.uint8).view(torch.float8_e5m2)
        guard = Guard([weight])
        weight.view(torch.uint8).data[i] = 1
        assert not guard.is_valid(), i


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flipped", [2, 4, 8, 64, 1024])
def test_flipped_signs_count(dtype, flipped):
    """Top bits alone, an even number of them, at even distances, in constants too: their sum is nothing."""
    for values in (torch.ones(2048, dtype=torch.float64), torch.randn(2048, dtype=torch.float64)):
        weight = values.to(dtype).repeat(8 // dtype.itemsize)
        guard = Guard([weight])
        weight.data.view(2048, -1)[16 : 16 + 1024 : 1024 // flipped, -1] *= -1
        assert not guard.is_valid()


@pytest.mark.parametrize("called_before", [False, True])
def test_a_freed_storage_is_an_error(called_before):
    """Its memory is not read."""
    block, x = FusedInvertedResidual(64, 64, 1, 6).eval(), torch.randn(1, 64, 5, 5)
    with torch.no_grad():
        if called_before:
            block(x)
        block.conv[0][0].weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="not allocated"):
            block(x)


def test_a_weight_that_wraps_others():
    """It has no memory of its own, nor a version that counts writes to what it wraps."""
    block, x = perturb_batch_norm(FusedInvertedResidual(16, 16, 1, 6)).eval(), torch.randn(1, 16, 5, 5)
    conv = block.conv[0][0]
    inner = conv.weight.detach()
    with torch.no_grad():
        before = block(x)
        conv.weight = nn.Parameter(TwoTensor(inner, inner))
        assert near(block(x).a, before)
        inner.mul_(2)
        y = block(x).a
        conv.weight = nn.Parameter(inner)
        assert near(y, unfuse(block)(x)) and not near(y, before)


@pytest.mark.parametrize("change", ["weight", "convolution", "block"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_change_just_before_the_guard_is_there(change, whole, monkeypatch):
    """Made by another thread, after the layers were looked at."""
    model, other = fused_model(), perturb_batch_norm(fused_model())
    called = model if whole else model.features[2]
    x = make_x() if whole else torch.randn(1, called.spec.in_channels, 8, 8)
    of_modules = Guard.of_modules

    def changed_first(*args):
        monkeypatch.setattr(Guard, "of_modules", of_modules)
        if change == "weight":
            model.features[2].conv[0][0].weight = weight_of(other)
        elif change == "convolution":
            model.features[2].conv[0][0] = other.features[2].conv[0][0]
        else:
            model.features[2] = other.features[2]
        return of_modules(*args)

    monkeypatch.setattr(Guard, "of_modules", changed_first)
    with torch.no_grad():
        called(x)
        assert near(called(x), unfuse(called)(x))


@pytest.mark.parametrize("holder", ["_parameters", "_buffers", "_modules"])
def test_another_dictionary_in_the_place_of_a_modules_own(holder):
    model, other, x = fused_model(), perturb_batch_norm(fused_model()), make_x()
    of = (lambda m: m.features[2].conv[0]) if holder == "_modules" else norm_of
    with torch.no_grad():
        before = model(x)
        vars(of(model)).update({holder: dict(vars(of(other))[holder])})
        y = model(x)
        assert near(y, unfuse(model)(x)) and not torch.equal(y, before)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 1, 1), (5, 1, 3, 3)])
def test_tensors_of_any_shape_are_guarded(shape):
    weight = torch.randn(shape)
    guard = Guard([weight])
    assert guard.is_valid() and guard.is_valid()
    if weight.numel():
        weight.data.add_(1)
        assert not guard.is_valid()


def test_a_guard_of_what_is_not_dense():
    whole = torch.randn(64, 64, 1, 1)
    guard = Guard([whole[::2, 3:9].transpose(0, 1), whole[:1].expand(8, -1, -1, -1)])
    assert guard.is_valid()
    whole.data[2, 4] += 1
    assert not guard.is_valid()


def test_another_dtype_at_the_same_address_is_noticed():
    weight = torch.randn(3, 4).half()
    guard = Guard([weight])
    assert guard.is_valid()
    weight.data = weight.data.view(torch.bfloat16)
    assert not guard.is_valid()


def test_swap_tensors_is_not_hindered():
    """A guard holds no reference that torch would count."""
    model, x = fused_model(), make_x()
    with torch.no_grad():
        model(x)
        torch.utils.swap_tensors(weight_of(model), nn.Parameter(torch.randn_like(weight_of(model))))


def test_fused_optimizers_still_compile(fresh_graphs):
    weight = nn.Parameter(torch.randn(3, 3))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert backends._C is not None
    FusedInvertedResidual(8, 8, 1, 6)  # has steps noted from now on
    before = weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(weight.detach(), before - 0.1)
