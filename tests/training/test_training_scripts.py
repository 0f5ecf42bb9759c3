"""The recipes of timm's train.py and of torchvision's references, on scikit-learn's digits: fused by one line more.

In float64, where fused and eager may be told apart only by rounding: losses, averaged weights, and what a checkpoint
resumes.
"""

import argparse

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnv2_fused import backends, fuse, report

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
datasets = pytest.importorskip("sklearn.datasets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends._C is None, reason="needs the compiled library"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS, BATCH = 4, 8


def batches():
    found = datasets.load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH]
    x = torch.from_numpy(found.images).double()[order, None] / 8 - 1
    x = F.interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return list(zip(x.split(BATCH), torch.from_numpy(found.target)[order].split(BATCH), strict=True))


def trains_fused(model):
    blocks = report(model).blocks
    assert blocks and all(block.fused and block.not_trained is None for block in blocks)


def by_timm(change, folder):
    """train.py: decay of weights alone, label smoothing, warm-up and cosine, clipping, EMA; resumed halfway."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad

    def made():
        torch.manual_seed(0)
        model = timm.create_model("mobilenetv3_small_050", num_classes=10, drop_rate=0.0)
        model = change(model.double().to(memory_format=torch.channels_last).train())  # the line more
        optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
        return model, optimizer, ModelEmaV3(model, decay=0.9), CosineLRScheduler(optimizer, STEPS, warmup_t=2)

    model, optimizer, ema, schedule = made()
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(model="small"), ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    losses, smooth = [], LabelSmoothingCrossEntropy(0.1)
    for step, (x, y) in enumerate(batches()):
        if step == STEPS // 2:
            saver.save_checkpoint(step, metric=losses[-1])
            model, optimizer, ema, schedule = made()
            path = str(folder / "last.pth.tar")
            resume_checkpoint(model, path, optimizer, log_info=False, weights_only=False)
            resume_checkpoint(ema.module, path, log_info=False, weights_only=False)
        schedule.step(step)
        loss = smooth(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
        optimizer.step()
        ema.update(model, step=step)
        losses.append(loss.item())
    return model, ema.module, losses


def by_torchvision(change, folder):
    """references/classification: no decay of norms, Mixup, label smoothing, accumulated EMA with buffers, warm-up."""
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torchvision.transforms import v2

    def made():
        torch.manual_seed(0)
        model = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35, dropout=0.0).double()
        model = change(model.to(memory_format=torch.channels_last).train())  # the line more
        norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
        groups = [{"params": others, "weight_decay": 2e-5}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        rates = SequentialLR(
            optimizer, [LinearLR(optimizer, 0.01, total_iters=2), CosineAnnealingLR(optimizer, STEPS - 2)], [2]
        )
        return {"model": model, "optimizer": optimizer, "model_ema": ema, "lr_scheduler": rates}

    states = made()
    mix, losses = v2.MixUp(num_classes=10), []
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for step, (x, y) in enumerate(batches()):
        if step == STEPS // 2:
            torch.save({name: state.state_dict() for name, state in states.items()}, folder / "checkpoint.pth")
            states = made()
            for name, state in torch.load(folder / "checkpoint.pth").items():
                states[name].load_state_dict(state)
        model, optimizer, ema, rates = states.values()
        torch.manual_seed(step)
        loss = criterion(*(lambda x, y, model=model: (model(x), y))(*mix(x, y)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        ema.update_parameters(model)
        losses.append(loss.item())
    return states["model"], states["model_ema"].module, losses


@pytest.mark.parametrize("recipe", [by_timm, by_torchvision])
def test_one_line_more(recipe, tmp_path):
    found = []
    for name, change in (("eager", lambda model: model), ("fused", fuse)):
        folder = tmp_path / name
        folder.mkdir()
        found.append(recipe(change, folder))
    (eager, eager_mean, expected), (fused, fused_mean, losses) = found
    trains_fused(fused)
    assert losses == pytest.approx(expected, rel=1e-8)
    x, _ = batches()[0]
    with torch.no_grad():
        for ours, theirs in ((fused, eager), (fused_mean, eager_mean)):
            a, b = ours.eval()(x), theirs.eval()(x)
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
