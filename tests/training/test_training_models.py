"""Networks in train() whose blocks run on the training kernels, beside the ordinary modules."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnv2_fused import FusedInvertedResidual, backends, fuse, report, unfuse
from mnv2_fused.module import FusedBlock
from mnv2_fused.testing import peak_activation_bytes, threads

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.skipif(backends._C is None, reason="needs the compiled library")


def small(seed=0, **options):
    torch.manual_seed(seed)
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2], [6, 40, 2, 1]]
    made = torchvision.models.mobilenet_v2(
        num_classes=5, width_mult=0.5, inverted_residual_setting=stages, dropout=0.0, **options
    )
    return made.to(memory_format=torch.channels_last).train()


def batch(dtype=torch.float64, count=12, size=32):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, size, size, generator=g, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.randint(0, 5, (count,), generator=g)


def losses(model, x, y, steps, lr=0.002, accumulate=1):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            loss = F.cross_entropy(model(part_x), part_y)
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        found.append(loss.item())
    return found


def trains_fused(model):
    blocks = [m for m in model.modules() if isinstance(m, FusedBlock)]
    assert blocks and all(block.training_objection() is None for block in blocks)
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
def test_twenty_steps_in_float64(accumulate):
    """The same losses to 1e-8, the same parameters and statistics."""
    eager = small().double()
    fused = trains_fused(fuse(eager).train())
    x, y = batch()
    ours, theirs = (losses(model, x, y, 20, accumulate=accumulate) for model in (fused, eager))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-8
    assert ours[-1] < ours[0]
    for (name, mine), other in zip(fused.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8, msg=name)


def test_the_first_loss_in_float32():
    eager = small()
    truth = copy.deepcopy(eager).double()
    x, y = batch()
    fused = trains_fused(fuse(eager).train())
    exact = F.cross_entropy(truth(x), y).item()
    assert abs(F.cross_entropy(fused(x.float()), y).item() - exact) < 1e-6 * max(1, abs(exact))
    for (name, mine), other in zip(fused.named_buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=1e-6, msg=name)


def test_whole_networks_give_the_same_bits_for_any_number_of_threads():
    x, _ = batch(torch.float32)
    model = fuse(small())

    def grads(count):
        trained = copy.deepcopy(model).train()
        # From the stem to the last block: what torch itself runs behind them rests on the number of threads.
        features = trained.features[:-1]
        with threads(count):
            z = features(x)
            z.backward(torch.ones_like(z) * torch.arange(z.shape[1])[:, None, None])
        return [z, *(p.grad for p in features.parameters()), *features.buffers()]

    expected = grads(1)
    for count in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(grads(count), expected, strict=True))


def test_statistics_alone():
    """update_bn of stochastic weight averaging: forward without gradients, momentum None."""
    eager = small().double()
    fused = fuse(eager)
    x, _ = batch()
    for model in (eager, fused):
        torch.optim.swa_utils.update_bn(x.split(4), model)
    for (name, mine), other in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12, msg=name)
    assert fused.features[1].conv[0][1].num_batches_tracked == 3


def test_some_norms_frozen():
    eager = small().double()
    for i, norm in enumerate(m for m in eager.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
        if i % 3 == 1:
            norm.eval().requires_grad_(False)
    fused = fuse(eager)
    x, y = batch()
    ours, theirs = (losses(model, x, y, 3) for model in (fused, eager))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-10
    for (name, mine), other in zip(fused.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(mine, other[1], rtol=1e-9, atol=1e-12, msg=name)


def test_a_copy_and_a_checkpoint_in_the_middle():
    x, y = batch()
    model = fuse(small().double()).train()
    losses(model, x, y, 2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = fuse(small(1).double()).train()
    again.load_state_dict(torch.load(file, weights_only=True))
    copied, ordinary = copy.deepcopy(model), unfuse(model)
    expected = losses(model, x, y, 2)
    for other in (again, copied):
        assert losses(other, x, y, 2) == expected
    assert max(abs(a - b) for a, b in zip(losses(ordinary, x, y, 2), expected, strict=True)) < 1e-10


def test_eval_follows_training():
    x, y = batch(torch.float32)
    model = fuse(small()).train()
    losses(model, x, y, 3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), unfuse(model).eval()(x), rtol=1e-4, atol=1e-4)


def test_nothing_wide_is_kept():
    """A step's peak, from the stem to the last block, is a fraction of eager's."""
    x, _ = batch(torch.float32, 16, 160)
    peaks = []
    for model in (fuse(small()).train(), small()):
        features = model.features[:-1]

        def step(features=features):
            features(x).sum().backward()

        step()
        peaks.append(peak_activation_bytes(step))
    assert peaks[0] < peaks[1] / 5, peaks


def test_one_value_a_channel_is_torchs_error():
    model = fuse(small()).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 2, 2))


def test_what_does_not_train_fused_says_why():
    model = fuse(torchvision.models.mobilenet_v3_small()).train()
    found = report(model)
    assert {row.not_trained for row in found.blocks} == {None, "it has a squeeze-and-excite"}
    assert "9 as ordinary modules: it has a squeeze-and-excite" in str(found)
    half = fuse(small().bfloat16()).train()
    assert "bfloat16" in report(half).blocks[0].not_trained


@pytest.mark.parametrize("why", ["eager", "autocast", "hook", "dtype"])
def test_where_kernels_do_not_run_the_modules_do(why):
    eager = small()
    fused = fuse(eager, backend="eager" if why == "eager" else "auto").train()
    x, _ = batch(torch.float32)
    if why == "hook":
        for model in (eager, fused):
            for module in model.modules():
                if isinstance(module, nn.ReLU6):
                    module.register_forward_hook(lambda *_: None)
    if why == "dtype":
        x, eager, fused = x.bfloat16(), eager.bfloat16(), fused.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        assert torch.equal(fused(x), eager(x))


def test_a_block_in_a_network_of_ones_own():
    """FusedInvertedResidual from the start, without fuse: each block alone."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35, block=FusedInvertedResidual, dropout=0.0)
    plain = torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35, dropout=0.0)
    plain.load_state_dict(model.state_dict())
    x, y = batch(count=6, size=64)
    ours, theirs = (losses(m.double().train(), x, y, 3) for m in (model, plain))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-8


def test_an_outer_checkpoint_updates_statistics_as_the_modules_do():
    from torch.utils.checkpoint import checkpoint

    eager = small().double()
    fused = fuse(eager).train()
    x, _ = batch()
    grads = []
    for model in (fused, eager):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    for mine, other in zip(fused.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert fused.features[1].conv[0][1].num_batches_tracked == 2
