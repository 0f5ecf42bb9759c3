"""``report`` on any model that runs, whatever its forward takes, keeps and returns; and on what nobody knows."""

import copy

import pytest
import timm
import torch
from support.models import fitted, make_x
from torch import nn

from mnv2_fused import FusedInvertedResidual, fuse, report


def small():
    blocks = FusedInvertedResidual(8, 8, 1, 6), FusedInvertedResidual(8, 16, 2, 6)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks).eval()


class Wrapped(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body


class TakesTwo(Wrapped):
    def forward(self, image, *, scale):
        return self.body(image * scale["by"])


class SaysWords(Wrapped):
    def forward(self, image):
        return ["cat" if y.mean() > 0 else "dog" for y in self.body(image)]


class GivesNumPy(Wrapped):
    def forward(self, image):
        return self.body(image).detach().numpy()


class EvalGivesNothing(Wrapped):
    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        self.train(False)

    def forward(self, image):
        return self.body(image)


class PlainTensor(Wrapped):
    def __init__(self, body):
        super().__init__(body)
        self.mean = torch.full((1, 3, 1, 1), 0.5)

    def forward(self, image):
        return self.body(image - self.mean)


class KeepsOutput(Wrapped):
    """As feature extractors that hooks fill."""

    def __init__(self, body):
        super().__init__(body)
        self.kept = {}
        body[0].register_forward_hook(self.keep)

    def keep(self, module, args, y):
        self.kept["stem"] = y

    def forward(self, image):
        self.body(image)
        return self.kept["stem"]


MODELS = {
    "plain": lambda: small(),
    "words": lambda: SaysWords(small()),
    "NumPy": lambda: GivesNumPy(small()),
    "eval() gives nothing": lambda: EvalGivesNothing(small()),
    "a plain tensor": lambda: PlainTensor(small()),
    "a hook keeps an output": lambda: KeepsOutput(small()),
}
SIZE = 2, 3, 18, 20


@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_that_runs(name, called):
    expected = report(small(), SIZE)
    assert expected.bytes_never_written
    model = MODELS[name]()
    if called:
        model(torch.randn(SIZE))
    before, modes = copy.copy(vars(model)), [m.training for m in model.modules()]
    for found in (report(model, SIZE), report(model, example_inputs=torch.randn(SIZE))):
        assert [row.bytes_never_written for row in found.blocks] == [r.bytes_never_written for r in expected.blocks]
    assert vars(model).keys() == before.keys() and [m.training for m in model.modules()] == modes


def test_inputs_of_every_kind():
    expected = report(small(), SIZE).bytes_never_written
    model = TakesTwo(small())
    x = torch.randn(SIZE)
    assert report(model, example_inputs={"image": x, "scale": {"by": 2}}).bytes_never_written == expected
    for example in (x, (x,), [x]):
        assert report(small(), example_inputs=example).bytes_never_written == expected
    with pytest.raises(ValueError, match=r"does not run on these inputs: .*scale.*without example_inputs"):
        report(model, example_inputs=x)
    with pytest.raises(ValueError, match=r"does not run on one input of shape \[1, 5, 8, 8\]: "):
        report(small(), (1, 5, 8, 8))


def test_a_run_leaves_modes_statistics_and_prepared_weights():
    model = fuse(fitted())
    x = make_x()
    with torch.no_grad():
        y = model(x)
        prepared = model._prepared
        rows = report(model, example_inputs=x).blocks
        assert all(row.bytes_never_written for row in rows)
        assert torch.equal(model(x), y) and model._prepared.only is not None
    assert type(prepared) is type(model._prepared)
    trained = small().train()
    trained[1].eval()
    modes = [m.training for m in trained.modules()]
    state = copy.deepcopy(trained.state_dict())
    assert report(trained, example_inputs=torch.randn(SIZE)).training
    assert [m.training for m in trained.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())


class Attention(nn.Module):
    """A depthwise convolution that no 1x1 one goes with."""

    def __init__(self):
        super().__init__()
        self.position = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        return self.project((x + self.position(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Twice(nn.Module):
    """Three depthwise convolutions in one."""

    def __init__(self):
        super().__init__()
        self.zeroth = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.first = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.expand = nn.Conv2d(8, 24, 1)
        self.second = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.project = nn.Conv2d(24, 8, 1)

    def forward(self, x):
        return self.project(self.second(self.expand(self.first(self.zeroth(x))).relu()).relu())


def test_what_is_not_known_is_counted_by_class():
    model = nn.Sequential(Twice(), Attention(), nn.Sequential(Twice(), nn.ReLU()), FusedInvertedResidual(8, 8, 1, 6))
    found = report(model.eval())
    assert len(found.blocks) == 1
    (row,) = found.unknown
    assert row.kind == f"{__name__}.Twice" and row.names == ("0", "2.0")
    assert row.reason == "it has 3 depthwise convolutions"
    assert f"not known: 2 x {__name__}.Twice (0): it has 3 depthwise convolutions" in str(found)
    with pytest.warns(UserWarning, match=rf"fused nothing: 2 x {__name__}.Twice \(0\): it has 3 depthwise"):
        fuse(model[:3])


def test_known_models_leave_nothing_unknown():
    assert report(fuse(fitted())).unknown == ()
    found = report(timm.create_model("mobilenetv4_conv_small"))
    depthwise = {name for name, m in timm.create_model("mobilenetv4_conv_small").named_modules() if _depthwise(m)}
    names = [*(row.name for row in found.blocks), *(name for row in found.unknown for name in row.names)]
    assert len(names) == len(set(names))
    inside = {d for d in depthwise if any(d.startswith(f"{name}.") for name in names)}
    assert inside == depthwise
    assert found.unknown == () and len(found.blocks) == 12


def _depthwise(module):
    return isinstance(module, nn.Conv2d) and module.groups > 1
