"""fuse(model, frozen=True): packed weights that are kept whatever happens, and nothing else."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.models import fitted, fused_model, make_x, near
from torch import nn

import mnv2_fused
from mnv2_fused import FusedInvertedResidual, fuse, models, unfuse
from mnv2_fused.sequence import FrozenRow
from mnv2_fused.sequence.frozen import FrozenBlock
from mnv2_fused.testing import perturb_batch_norm


def frozen_model():
    return fuse(fitted(), frozen=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_network_is_one_call_with_the_same_bits(dtype, ran):
    model = copy.deepcopy(fitted()).to(dtype)
    fused, frozen = fuse(model), fuse(model, frozen=True)
    x = make_x(dtype=dtype)
    assert type(frozen) is FrozenRow and not list(frozen.parameters())
    with torch.inference_mode():
        expected = fused(x)
        ran.clear()
        assert torch.equal(frozen(x), expected)
    assert len(ran) == 1
    with torch.no_grad():
        assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x), expected)  # whose x records no gradient


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_every_own_network(name):
    model = perturb_batch_norm(getattr(models, name)(width_mult=0.35)).eval()
    x = make_x()
    with torch.inference_mode():
        assert torch.equal(fuse(model, frozen=True)(x), fuse(model)(x))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    model = perturb_batch_norm(getattr(torchvision.models, name)(weights=None)).eval()
    x = make_x()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what has no block
        assert torch.equal(fuse(model, frozen=True)(x), fuse(model)(x))


class Alone(nn.Module):
    """Blocks that no Sequential holds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = FusedInvertedResidual(8, 8, 1, 6), FusedInvertedResidual(8, 12, 2, 1)

    def forward(self, x):
        return self.second(self.first(x) * 2)


def test_blocks_that_stand_alone():
    model = perturb_batch_norm(Alone()).eval()
    x = torch.randn(2, 8, 9, 7)
    with torch.inference_mode():
        frozen = fuse(model, frozen=True)
        assert torch.equal(frozen(x), model(x))
    assert not list(frozen.parameters()) and frozen.first.spec == model.first.spec


def test_nothing_that_happens_to_the_original_matters():
    model = fuse(fitted())
    frozen, x = fuse(model, frozen=True), make_x()
    with torch.inference_mode():
        expected = frozen(x)
        for p in model.parameters():
            p.mul_(1.5)
        assert torch.equal(frozen(x), expected)
        del model
        assert torch.equal(frozen(x), expected)


def test_the_model_that_is_given_is_left_alone():
    model, x = fitted(), make_x()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        assert near(fuse(model, frozen=True)(x), model(x))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_memory_is_that_of_the_packed_weights():
    frozen = frozen_model()
    held = sum(t.nbytes for t in frozen.state_dict().values())
    packed = fuse(fitted())
    with torch.inference_mode():
        packed(make_x())
    (run,) = packed._prepared.runs_of()
    assert held <= 1.05 * run.weights.nbytes
    assert len(pickle.dumps(frozen)) <= 1.05 * run.weights.nbytes


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: fuse(m, frozen=True)]
)
def test_copies(way):
    frozen, x = frozen_model(), make_x()
    with torch.inference_mode():
        assert torch.equal(way(frozen)(x), frozen(x))


def test_state_dict_loads_into_another_frozen_model():
    frozen, x = frozen_model(), make_x()
    other = fuse(perturb_batch_norm(copy.deepcopy(fitted()), seed=5), frozen=True)
    with torch.inference_mode():
        assert not torch.equal(other(x), frozen(x))
        other.load_state_dict(frozen.state_dict())
        assert torch.equal(other(x), frozen(x))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(fullgraph, fresh_graphs):
    frozen, x = frozen_model(), make_x()
    with torch.inference_mode():
        assert torch.equal(torch.compile(frozen, fullgraph=fullgraph)(x), frozen(x))


def test_exported():
    frozen, x = frozen_model(), make_x()
    with torch.no_grad():
        program = torch.export.export(frozen, (x,))
        assert "mnv2_fused.sequence" in str(program.graph)
        assert torch.equal(program.module()(x), frozen(x))


@pytest.mark.parametrize(
    ("misuse", "error", "said"),
    [
        (lambda m, x: m(x.half()), TypeError, r"frozen for torch.float32, got x of torch.float16; convert x, or call"),
        (lambda m, x: m(x.to("meta")), RuntimeError, "frozen for the CPU, got x on meta; move x, or call"),
        (lambda m, x: m(x.clone().requires_grad_()), RuntimeError, "has no derivative; use torch.no_grad"),
        (lambda m, x: m.half(), RuntimeError, r"stays in torch.float32 on cpu, it cannot become torch.float16 on cpu"),
        (
            lambda m, x: m.to("meta"),
            RuntimeError,
            r"become torch.float32 on meta; convert the original model, then call",
        ),
        (lambda m, x: m.train(), RuntimeError, "cannot train: its weights are packed; train the original"),
        (lambda m, x: unfuse(m), ValueError, "let its modules go and cannot be unfused; use the original"),
        (lambda m, x: mnv2_fused.report(m), ValueError, "let its modules go; report the fused model before"),
        (lambda m, x: m[0], TypeError, "runs as a whole and has no child 0"),
        (lambda m, x: list(m), TypeError, "runs as a whole and has no child 0"),
        (lambda m, x: m(x[0]), RuntimeError, "must be .N, C"),
        (lambda m, x: fuse(fitted(), frozen=True, recompute=True), ValueError, "recompute=True is for training"),
    ],
)
def test_misuse_is_named(misuse, error, said):
    with pytest.raises(error, match=said):
        misuse(frozen_model(), make_x())


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_blocks_and_rows_refuse_another_dtype(change):
    """Before their weights change: the model, like the layers between them, gives what it gave."""
    for frozen, x in ((fuse(Alone().eval(), frozen=True), torch.randn(2, 8, 9, 7)), (frozen_model(), make_x())):
        with torch.inference_mode():
            expected = frozen(x)
            with pytest.raises(
                RuntimeError, match=r"a frozen model stays in torch.float32 on cpu.*fuse\(model, frozen=True"
            ):
                getattr(frozen, change)()
            assert torch.equal(frozen(x), expected)


def test_conversions_that_change_nothing_are_taken():
    for frozen, x in ((fuse(Alone().eval(), frozen=True), torch.randn(2, 8, 9, 7)), (frozen_model(), make_x())):
        with torch.inference_mode():
            expected = frozen(x)
            for same in (frozen.float(), frozen.cpu(), frozen.to(memory_format=torch.channels_last), frozen.to(x)):
                assert torch.equal(same(x), expected)


def test_a_frozen_model_is_true():
    assert frozen_model()


def test_eval_and_train_false_change_nothing():
    frozen, x = frozen_model(), make_x()
    with torch.inference_mode():
        expected = frozen(x)
        assert torch.equal(frozen.eval()(x), expected)
        assert torch.equal(frozen.train(False)(x), expected)


def test_a_block_that_no_kernel_runs_stays_with_a_warning(monkeypatch):
    model = perturb_batch_norm(Alone()).eval()
    model.first.backend = "eager"
    x = torch.randn(1, 8, 9, 7)
    with pytest.warns(UserWarning, match=re.escape("an inverted residual is not frozen: backend='eager'")):
        frozen = fuse(model, frozen=True)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), model(x))
    assert frozen.first.conv is not None


def test_general_blocks_keep_their_bits():
    torchvision = pytest.importorskip("torchvision")
    block = perturb_batch_norm(torchvision.models.efficientnet_b0(weights=None).features[2][0]).eval()
    fused, frozen, x = fuse(block), fuse(block, frozen=True), torch.randn(1, 16, 9, 7)
    with torch.inference_mode():
        assert torch.equal(frozen(x), fused(x))
    assert mnv2_fused.report(fused).blocks[0].fused


@pytest.mark.parametrize("where", ["model", "row", "block"])
def test_hooks_still_run(where):
    """Those of what was replaced, also of what is one row or one block."""
    model, x = fused_model(), make_x()
    hooked = {"model": model, "row": model.features, "block": model.features[2]}[where]
    hooked.register_forward_hook(lambda module, inputs, y: y * 2)
    frozen = fuse(model, frozen=True)
    with torch.no_grad():
        expected = model(x)
        assert near(frozen(x), expected)
        hooked._forward_hooks.clear()
        assert not near(model(x), expected)


class _TakesRates(nn.Module):
    """A network whose blocks are given a rate that changes nothing in eval, as EfficientNets do; or a scale."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.pw = nn.Conv2d(8, 8, 1)

        def forward(self, x, drop_connect_rate=None, scale=1.0):
            y = self.pw(F.relu(self.dw(x)))
            if drop_connect_rate and self.training:
                y = F.dropout(y, drop_connect_rate)
            return x + (y if scale == 1.0 else y * scale)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x, **rest):
        for i, block in enumerate(self.blocks):
            x = block(x, drop_connect_rate=0.1 * i, **rest)
        return x


def test_arguments_that_change_nothing_in_eval_are_taken():
    torch.manual_seed(0)
    model = _TakesRates().eval()
    frozen = fuse(model, frozen=True)
    x = torch.randn(2, 8, 9, 7)
    with torch.inference_mode():
        for copied in (frozen, copy.deepcopy(frozen)):
            assert all(type(block) is FrozenBlock for block in copied.blocks)
            torch.testing.assert_close(copied(x), model(x))
            torch.testing.assert_close(copied(x, scale=1.0), model(x))
            with pytest.raises(TypeError, match=r"scale=0.5; use the model without frozen=True"):
                copied(x, scale=0.5)
