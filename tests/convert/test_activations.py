"""Networks of LeakyReLU and GELU: read from their modules, in every way in which a fused model runs."""

import copy
import functools
import pickle

import pytest
import torch
from support.models import fitted, make_x, near
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from mnv2_fused import fuse, report
from mnv2_fused.activations import ACTIVATION_TABLE, ACTIVATIONS
from mnv2_fused.encoding import split_layers
from mnv2_fused.testing import agreement, perturb_batch_norm

MODULES = {
    "LeakyReLU(0.2)": functools.partial(nn.LeakyReLU, 0.2),
    "LeakyReLU(0.9) in place": functools.partial(nn.LeakyReLU, 0.9, inplace=True),
    "LeakyReLU(-1)": functools.partial(nn.LeakyReLU, -1),
    "GELU": nn.GELU,
    "GELU by tanh": functools.partial(nn.GELU, approximate="tanh"),
}
by_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def with_activation(make, model=None):
    """torchvision's model with another activation in every place."""
    model = copy.deepcopy(fitted() if model is None else model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, make())
    return perturb_batch_norm(model, seed=3)


def close(model, fused, x):
    with torch.inference_mode():
        found = agreement(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert found.ok, found
    assert found.eager_error < 1e-4  # a result of no sense has any other


@by_module
def test_a_whole_network_is_one_call(make, ran):
    model = with_activation(make)
    fused = fuse(model)
    close(model, fused, make_x())
    with torch.inference_mode():
        ran.clear()
        fused(make_x())
    assert len(ran) == 1


@by_module
def test_frozen_and_saved(make):
    model = with_activation(make)
    fused, frozen, x = fuse(model), fuse(model, frozen=True), make_x()
    with torch.inference_mode():
        expected = fused(x)
        assert torch.equal(frozen(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), expected)


@pytest.mark.slow
@by_module
def test_compiled_and_exported(make, fresh_graphs):
    model = with_activation(make)
    fused, x = fuse(model), make_x()
    with torch.inference_mode():
        expected = fused(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, fullgraph=True)(x), expected)
        exported = torch.export.export(fused, (x,)).module()
        assert near(exported(x), expected)  # block by block, and stem and head in torch's own ops
        block = fused.features[2]
        x = torch.randn(2, 8, 9, 11)
        assert torch.equal(torch.compile(block, fullgraph=True)(x), block(x))


@by_module
def test_gradients(make):
    """With frozen norms, where every expanded tensor is computed again."""
    model = with_activation(make).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.Dropout):
            m.eval()
    fused, truth, x = fuse(model), copy.deepcopy(model).double(), make_x()
    gradients = []
    for m, image in ((fused, x), (model, x), (truth, x.double())):
        m(image).square().sum().backward()
        gradients.append([p.grad for p in m.parameters()])
    for mine, eager, exact in zip(*gradients, strict=True):
        found = agreement(mine, eager, exact)
        assert found.ok, found


def network(*activations):
    """One block, after whose expansion and depthwise convolution these run."""
    inner = InvertedResidual(8, 12, 1, 3)
    for layer, activation in zip(inner.conv, activations, strict=False):
        layer[2] = activation
    return perturb_batch_norm(nn.Sequential(inner)).eval()


def reason(*activations):
    (skipped,) = report(network(*activations)).skipped
    return skipped.reason


def test_what_no_kernel_computes_is_named():
    slopes = reason(nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))
    assert slopes == "its LeakyReLUs have slopes of [0.1, 0.2], the fused op has one for a block"
    assert reason(nn.LeakyReLU(float("inf")), nn.ReLU6()) == "its LeakyReLU has the slope inf"
    assert "its activation is torch.nn.modules.activation.ELU, the fused op computes relu6" in reason(
        nn.ELU(), nn.ELU()
    )


def test_a_slope_of_0_is_read_as_relu():
    fused = fuse(network(nn.LeakyReLU(0), nn.LeakyReLU(0.0)))
    assert fused[0].spec.activation == "relu"
    assert fused[0].spec == fuse(network(nn.ReLU(), nn.ReLU()))[0].spec


def test_a_stem_of_another_slope_runs_by_itself():
    model = with_activation(functools.partial(nn.LeakyReLU, 0.2))
    model.features[0][2] = nn.LeakyReLU(0.3)
    fused = fuse(model)
    close(model, fused, make_x())
    with torch.inference_mode():
        run = next(iter(fused._prepared.runs_of()))
    kinds = [values[0] for values, _ in split_layers(run.geometry)]
    assert 2 not in kinds  # of a stem with the block behind it


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_classes_of_other_packages(package):
    """Each that the table names is there, and computes what the table says."""
    module = pytest.importorskip(f"{package}.{'layers.activations' if package == 'timm' else 'activations'}")
    x = torch.linspace(-6, 6, 101)
    found = 0
    for name in ACTIVATIONS:
        for kind in ACTIVATION_TABLE[name].modules:
            if kind.startswith(module.__name__ + "."):
                made = getattr(module, kind.rpartition(".")[2])()
                assert f"{type(made).__module__}.{type(made).__name__}" == kind
                torch.testing.assert_close(made(x), ACTIVATION_TABLE[name].torch(x), rtol=1e-5, atol=1e-6)
                found += 1
    assert found > 2
