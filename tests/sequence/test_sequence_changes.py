"""What a sequence does when its modules change, are hooked, copied, shared or released: it is never stale."""

import copy
import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.inputs import image
from support.models import (
    BW,
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
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from mnv2_fused import fuse, unfuse
from mnv2_fused.module.guard import Guard
from mnv2_fused.testing import (
    perturb_batch_norm,
    threads,
)

pytestmark = pytest.mark.usefixtures("nothing_records")


def head_of(model):
    return model.features[-1]


def rounded_twice(module):
    """Through half precision in two steps, so that the second tensor can lie where the first one lay."""
    module.weight.data = module.weight.data.half()
    module.weight.data = module.weight.data.mul_(1.3).float()


def written_unseen(module, container):
    module.weight.data.mul_(1.5)
    container.train()
    container.eval()


def half_and_back(module, conv):
    conv.weight.data.mul_(1.3)
    module.half().float()


def running_statistics(model):
    model.train()(make_x(8))
    model.eval()


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(make_x()).square().sum().backward()
    optimizer.step()


def another_block(model):
    model.features[3] = fuse(perturb_batch_norm(InvertedResidual(16, 16, 1, 6)).eval())


def another_stem(model):
    model.features[0] = Conv2dNormActivation(3, 32, stride=2, activation_layer=nn.ReLU6).eval()


def smaller_classifier(model):
    model.classifier[1].weight = nn.Parameter(torch.randn(3, 1280))
    model.classifier[1].bias = nn.Parameter(torch.randn(3))


def cut_classifier(model):
    """Both tensors start at the same addresses as before."""
    for parameter in model.classifier[1].parameters():
        parameter.data = parameter.data[:3]


def reflected(conv):
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def own_forward(module):
    original = module.forward
    module.forward = lambda x: 2 * original(x)


WITHOUT_STEM, WITHOUT_HEAD = [[BW, B, B, B, POOLED, LINEAR]], [[STEM, B, B, B]]
WITHOUT_LINEAR, WITHOUT_BLOCK = [WHOLE[:-1]], [[STEM, B], [B, POOLED, LINEAR]]

# Name: (change, the op's calls afterwards)
CHANGES = {
    "classifier bias removed": (lambda m: setattr(m.classifier[1], "bias", None), [WHOLE]),
    "classifier of another size": (smaller_classifier, [WHOLE]),
    "classifier cut": (cut_classifier, [WHOLE]),
    "classifier bias broadcast": (
        lambda m: setattr(m.classifier[1], "bias", nn.Parameter(torch.randn(1))),
        WITHOUT_LINEAR,
    ),
    "load_state_dict": (lambda m: m.load_state_dict(other_state()), [WHOLE]),
    "load_state_dict, assign": (lambda m: m.load_state_dict(other_state(), assign=True), [WHOLE]),
    "optimizer": (optimizer_step, [WHOLE]),
    "running statistics": (running_statistics, [WHOLE]),
    "half and back": (lambda m: half_and_back(m, head_of(m)[0]), [WHOLE]),
    "head half and back": (lambda m: half_and_back(head_of(m), head_of(m)[0]), [WHOLE]),
    "stem data in two steps": (lambda m: rounded_twice(m.features[0][0]), [WHOLE]),
    "block data in two steps": (lambda m: rounded_twice(m.features[3].conv[2]), [WHOLE]),
    "head data in two steps": (lambda m: rounded_twice(head_of(m)[0]), [WHOLE]),
    "classifier data in two steps": (lambda m: rounded_twice(m.classifier[1]), [WHOLE]),
    "data of the head, then model.eval()": (lambda m: written_unseen(head_of(m)[0], m), [WHOLE]),
    "data of the stem, then features.eval()": (lambda m: written_unseen(m.features[0][0], m.features), [WHOLE]),
    "data of a block, then block.eval()": (
        lambda m: written_unseen(m.features[3].conv[2], m.features[3]),
        [WHOLE],
    ),
    "stem eps": (lambda m: setattr(m.features[0][1], "eps", 0.7), [WHOLE]),
    "block eps": (lambda m: setattr(m.features[3].conv[1][1], "eps", 0.7), [WHOLE]),
    "head eps": (lambda m: setattr(head_of(m)[1], "eps", 0.7), [WHOLE]),
    "residual": (lambda m: setattr(m.features[3], "use_res_connect", False), [WHOLE]),
    "block replaced": (another_block, [WHOLE]),
    "stem replaced": (another_stem, [WHOLE]),
    "parameter replaced": (
        lambda m: setattr(m.features[3].conv[2], "weight", nn.Parameter(torch.randn(16, 48, 1, 1))),
        [WHOLE],
    ),
    "block stride": (lambda m: setattr(m.features[2].conv[1][0], "stride", (1, 1)), [WHOLE]),
    "stem stride": (lambda m: setattr(m.features[0][0], "stride", (1, 1)), WITHOUT_STEM),
    "stem padding": (lambda m: setattr(m.features[0][0], "padding", (2, 2)), WITHOUT_STEM),
    "stem padding mode": (lambda m: reflected(m.features[0][0]), WITHOUT_STEM),
    "head stride": (lambda m: setattr(head_of(m)[0], "stride", (2, 2)), WITHOUT_HEAD),
    "head padding": (lambda m: setattr(head_of(m)[0], "padding", (1, 1)), WITHOUT_HEAD),
    "stem limit": (lambda m: setattr(m.features[0][2], "max_val", 0.5), WITHOUT_STEM),
    "block limit": (lambda m: setattr(m.features[3].conv[0][2], "min_val", 0.3), WITHOUT_BLOCK),
    "head limit": (lambda m: setattr(head_of(m)[2], "max_val", 0.5), WITHOUT_HEAD),
    "forward of features": (lambda m: own_forward(m.features), MAP_ONLY),
    "forward of the classifier": (lambda m: own_forward(m.classifier), MAP_ONLY),
    "forward of the stem": (lambda m: own_forward(m.features[0]), WITHOUT_STEM),
    "forward inside a block": (lambda m: own_forward(m.features[3].conv[2]), WITHOUT_BLOCK),
    "forward of the head": (lambda m: own_forward(head_of(m)), WITHOUT_HEAD),
    "forward of the linear layer": (lambda m: own_forward(m.classifier[1]), WITHOUT_LINEAR),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m.classifier[1]), WITHOUT_LINEAR),
    "pruned head": (lambda m: prune.l1_unstructured(head_of(m)[0], "weight", amount=0.5), WITHOUT_HEAD),
    "group norm": (lambda m: head_of(m).__setitem__(1, nn.GroupNorm(4, 1280)), WITHOUT_HEAD),
}


def test_every_parameter_and_statistic_counts(ran):
    model, x = fused_model(), make_x()
    before = model(x)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(1.3).add_(0.05)
            y = model(x)
            assert near(y, unfuse(model)(x)), name
            assert not near(y, before), name
            before = y
    assert ran and all(call == WHOLE for call in ran)


@pytest.mark.filterwarnings("ignore:an inverted residual runs unfused")
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, expected, ran):
    model, x = fused_model(), make_x()
    before = model(x)
    change(model)
    ran.clear()
    y = model(x)
    assert ran == expected
    eager = unfuse(model)(x)
    assert near(y, eager)
    assert not near(before, eager), "the change changes nothing, so this test sees nothing"
    assert torch.equal(model(x), y)


def test_a_blocks_own_forward(ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x()
    model(x)
    own_forward(model.features[3])
    own_forward(plain.features[3])
    assert near(model(x), plain(x))
    assert ran == [WHOLE, *WITHOUT_BLOCK]


def test_a_pool_and_a_flatten_that_change():
    model = fuse(nn.Sequential(*fitted().features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    x = make_x()
    model(x)
    model[-1].start_dim = 2
    assert model(x).shape == (2, 1280, 1)
    model[-2].output_size = 2
    assert near(model(x), unfuse(model)(x))
    assert model(x).shape == (2, 1280, 4)


def test_dropout_that_is_switched_on(ran):
    """As Monte Carlo dropout does: the layer alone goes into train()."""
    model, x = fused_model(), make_x()
    y = model(x)
    model.classifier[0].train()
    assert not torch.equal(model(x), model(x))
    assert ran == [WHOLE, *2 * WITHOUT_LINEAR]
    model.eval()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "part", [lambda m: m.features[0][1], lambda m: m.features[3].conv[1][1], lambda m: head_of(m)[1]]
)
def test_one_norm_in_training(part):
    model, x = fused_model(), make_x()
    model(x)
    plain = unfuse(model)
    for one in (model, plain):
        part(one).train()
    assert near(model(x), plain(x))
    torch.testing.assert_close(part(model).running_mean, part(plain).running_mean, rtol=1e-4, atol=1e-5)
    model.eval(), plain.eval()
    assert near(model(x), plain(x))


def test_one_block_in_training(ran):
    model, x = fused_model(), make_x()
    y = model(x)
    model.features[3].train()
    assert not torch.allclose(model(x), y)
    assert ran[1:] == WITHOUT_BLOCK


def test_the_backend_of_a_block(ran):
    model, x = fused_model(), make_x()
    y = model(x)
    model.features[3].backend = "eager"
    assert calls_of(model, x, ran) == WITHOUT_BLOCK
    for i in (1, 2, 4):
        model.features[i].backend = "eager"
    assert calls_of(model, x, ran) == []
    for child in model.features[1:5]:
        child.backend = "auto"
    model.eval()
    assert torch.equal(model(x), y)
    assert ran == [WHOLE]


# Where a hook sits, and the op's calls while it does.
HOOKED = {
    "block": (lambda m: m.features[3], WITHOUT_BLOCK),
    "inside a block": (lambda m: m.features[3].conv[1][0], WITHOUT_BLOCK),
    "activation in a block": (lambda m: m.features[3].conv[0][2], WITHOUT_BLOCK),
    "layers of a block": (lambda m: m.features[3].conv, WITHOUT_BLOCK),
    "block behind the stem": (lambda m: m.features[1], [[B, B, B, POOLED, LINEAR]]),
    "stem": (lambda m: m.features[0], WITHOUT_STEM),
    "inside the stem": (lambda m: m.features[0][1], WITHOUT_STEM),
    "head": (head_of, WITHOUT_HEAD),
    "inside the head": (lambda m: head_of(m)[2], WITHOUT_HEAD),
    "features": (lambda m: m.features, MAP_ONLY),
    "classifier": (lambda m: m.classifier, MAP_ONLY),
    "dropout": (lambda m: m.classifier[0], WITHOUT_LINEAR),
    "linear": (lambda m: m.classifier[1], WITHOUT_LINEAR),
    "model": (lambda m: m, [WHOLE]),
}
REGISTER = {
    "forward": lambda m, f: m.register_forward_hook(lambda module, given, y: f(y)),
    "forward with kwargs": lambda m, f: m.register_forward_hook(lambda module, given, _, y: f(y), with_kwargs=True),
    "pre": lambda m, f: m.register_forward_pre_hook(lambda module, given: f(given[0])),
}


@pytest.mark.filterwarnings("ignore:an inverted residual runs unfused")
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
@pytest.mark.parametrize(("part", "expected"), HOOKED.values(), ids=HOOKED)
def test_hooks_fire_and_go_away(part, expected, register, ran):
    model, x = fused_model(), make_x()
    before = model(x)
    fired = []
    handle = register(part(model), lambda t: fired.append(1) or t * 1.5)
    for count in (1, 2):
        ran.clear()
        y = model(x)
        assert ran == expected and len(fired) == count
    eager = unfuse(model)(x)
    assert near(y, eager) and not near(before, eager)
    handle.remove()
    ran.clear()
    assert torch.equal(model(x), before)
    assert ran == [WHOLE]


def test_a_hook_elsewhere_folds_nothing_again(ran):
    model, x = fused_model(), make_x()
    before, prepared = model(x), model._prepared
    elsewhere = nn.Linear(3, 3)
    for _ in range(2):
        elsewhere.register_forward_hook(lambda *_: None)
        assert torch.equal(model(x), before) and model._prepared is prepared
    fired = []
    model.features[3].register_forward_hook(lambda *_: fired.append(1))
    assert calls_of(model, x, ran) == WITHOUT_BLOCK and fired


def test_a_hook_elsewhere_folds_a_blocks_weights_not_again():
    block = fused_model().features[3]
    x = image(1, block.spec.in_channels, 9, 9)
    block(x)
    ready = block._ready
    nn.Linear(3, 3).register_forward_pre_hook(lambda *_: None)
    block(x)
    assert ready is not None and block._ready is ready


def test_a_hook_set_while_the_layers_are_looked_at(monkeypatch):
    """By another thread, after the look at the hooks and before the guard is there."""
    model, x, fired = fused_model(), make_x(), []
    of_modules = Guard.of_modules

    def hooked_first(*args):
        monkeypatch.setattr(Guard, "of_modules", of_modules)
        model.features[3].register_forward_hook(lambda *_: fired.append(1))
        return of_modules(*args)

    monkeypatch.setattr(Guard, "of_modules", hooked_first)
    model(x), model(x)
    assert fired


@pytest.mark.parametrize("name", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks_see_every_module(name, ran):
    model, x = fused_model(), make_x()
    before, seen = model(x), []
    handle = getattr(nn.modules.module, name)(lambda module, *_: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    # A block is one module here, as where it runs alone.
    inside = {m for block in model.features[1:5] for m in block.modules()} - set(model.features[1:5])
    assert set(model.modules()) - inside == set(seen)
    assert torch.equal(model(x), before)
    assert ran == [WHOLE, WHOLE]


def test_backward_hooks_fire(ran):
    model = fused_model()
    model(make_x())
    fired = []
    model.features[3].register_full_backward_hook(lambda *_: fired.append(1))
    head_of(model).register_full_backward_pre_hook(lambda *_: fired.append(2))
    with torch.enable_grad():
        model(make_x()).sum().backward()
    assert sorted(fired) == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_another_dtype_and_back(dtype, ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and ran == [WHOLE]
    assert near(model.float()(x), unfuse(model)(x))


# --- copies, lifetime, threads


@pytest.mark.parametrize("called", [False, True])
def test_copies(copied, called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    before = model(x)
    twin = copied(model)
    assert type(twin) is type(model) and not twin.training
    assert torch.equal(twin(x), before)
    twin.features[0][0].weight.mul_(1.5)
    assert calls_of(twin, x, ran) == [WHOLE]
    assert torch.equal(model(x), before), "the copy shares something with its original"


def test_nothing_keeps_a_model_alive():
    model = fused_model()
    model(make_x())
    model.features(make_x())
    watched = [weakref.ref(t) for t in (model, model.features, model.features[3], model.classifier[1].weight)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


def test_a_removed_module_is_released_by_the_next_call():
    model, x = fused_model(), make_x()
    model(x)
    removed = weakref.ref(model.classifier[1])
    model.classifier = nn.Sequential(nn.Linear(1280, 3)).eval()
    model(x)
    gc.collect()
    assert removed() is None


def test_shared_parameters(ran):
    model, x = fused_model(), make_x()
    model.features[4] = model.features[3]  # the same block twice
    head_of(model)[0].weight, head_of(model)[0].in_channels = nn.Parameter(torch.randn(1280, 16, 1, 1)), 16
    model.features[1].conv[0][1] = model.features[0][1]  # one norm behind two convolutions
    for _ in range(2):
        ran.clear()
        assert near(model(x), unfuse(model)(x))
        assert ran == [WHOLE]
        model.features[3].conv[2].weight.mul_(1.5)
        model.features[0][1].bias.add_(0.5)


def test_inference_mode_parameters(ran):
    with torch.inference_mode():
        model, x = copy.deepcopy(fused_model()), make_x()
        assert model.classifier[1].weight.is_inference()
        for change in (lambda: None, lambda: head_of(model)[0].weight.mul_(1.5)):
            change()
            assert calls_of(model, x, ran) == [WHOLE]


def test_one_inference_tensor(ran):
    model, x = fused_model(), make_x()
    model(x)
    with torch.inference_mode():
        model.classifier[1].weight = nn.Parameter(torch.randn(10, 1280), requires_grad=False)
    assert calls_of(model, x, ran) == [WHOLE]
    with torch.inference_mode():
        model.classifier[1].weight.mul_(1.5)
    assert calls_of(model, x, ran) == [WHOLE]


def test_ordinary_parameters_changed_under_inference_mode(ran):
    model, x = fused_model(), make_x()
    with torch.inference_mode():
        model(x)
        head_of(model)[0].weight.mul_(1.5)
        assert calls_of(model, x, ran) == [WHOLE]


def test_weights_that_another_process_may_change(ran):
    model, x = fused_model(), make_x()
    model(x)
    head_of(model)[0].weight.share_memory_()
    assert calls_of(model, x, ran) == [WHOLE]
    head_of(model)[0].weight.data.mul_(1.5)  # as another process would: uncounted
    assert calls_of(model, x, ran) == [WHOLE]


def test_python_threads_share_a_model():
    model, inputs = fused_model(), [image(1, 3, 20 + i % 7, 25, seed=i) for i in range(24)]

    def call(x):
        with torch.no_grad():  # which is a thread's own
            return model(x)

    with threads(1), ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(call, inputs))
            assert all(near(y, unfuse(model)(x)) for x, y in zip(inputs, found, strict=True))
            head_of(model)[0].weight.mul_(1.1)
            model.classifier[1].weight.mul_(0.9)


def test_eval_in_one_thread_while_another_runs():
    model, x = fused_model(), image(1, 3, 9, 9)
    expected, interval = model(x), sys.getswitchinterval()

    def call(i):
        with torch.no_grad():
            return torch.equal((model.eval() if i % 4 == 0 else model)(x), expected)

    sys.setswitchinterval(1e-6)
    try:
        with threads(1), ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(200)))
    finally:
        sys.setswitchinterval(interval)
