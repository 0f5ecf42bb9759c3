"""Training from scratch with live batch norms, eager and fused: losses, time and memory of a step.

``python examples/train_digits.py`` trains a MobileNet or EfficientNet on enlarged digits of scikit-learn, from several
seeds, by eager PyTorch in channels_last and by ``fuse(model).train()``. Prints for each the mean of the last losses and
the accuracy on digits that were kept back, the time of a step, and its peak memory at 224; draws losses and memory.

    torchrun --nproc-per-node 2 examples/train_digits.py

shares each batch out among processes, here or on several machines: gradients are averaged by
``DistributedDataParallel`` over gloo, and statistics of the norms are those of the whole batch (``SyncBatchNorm``,
which on a CPU torch itself does not run). The losses are those of one process, to rounding.

Needs ``pip install 'mnv2_fused[demo]'``.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused.testing import fit_batch_norm, peak_activation_bytes

EAGER, FUSED = "eager channels_last", "fused"
COLOURS = {EAGER: "#7d8ba1", FUSED: "#e4572e"}
NETWORKS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0")
KEPT_BACK = 397  # digits for the accuracy, of 1797
LAST = 20  # losses whose mean is printed
METERED = 32, 224  # images and their size where memory is metered


class Digits(NamedTuple):
    x: Tensor  # [N, 1, 8, 8], -1 to 1
    y: Tensor  # [N], 0 to 9

    def batch(self, index: Tensor, resolution: int) -> tuple[Tensor, Tensor]:  # [n, 3, H, W] channels_last, [n]
        enlarged = F.interpolate(self.x[index], size=resolution, mode="bilinear").expand(-1, 3, -1, -1)
        return enlarged.contiguous(memory_format=torch.channels_last), self.y[index]


class Run(NamedTuple):
    """What one training came to."""

    losses: list[float]
    seconds: float  # a step, the median
    accuracy: float  # on digits that were kept back

    @property
    def last(self) -> float:
        return statistics.fmean(self.losses[-LAST:])


def digits() -> tuple[Digits, Digits]:
    """To train on, and to test on."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x, y = torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    kept, rest = order[:KEPT_BACK], order[KEPT_BACK:]
    return Digits(x[rest], y[rest]), Digits(x[kept], y[kept])


def new_network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    options = {"stochastic_depth_prob": 0.0} if name.startswith("efficientnet") else {}
    model = getattr(torchvision.models, name)(num_classes=10, dropout=0.0, **options)
    return model.to(memory_format=torch.channels_last).train()


def train(
    model: nn.Module, of: Digits, args: argparse.Namespace, seed: int, autocast: bool = False
) -> tuple[list[float], float]:
    """Losses, and the seconds of a step. Each of several processes takes its part of each batch."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = torch.optim.SGD(model.parameters(), args.rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps)
    generator = torch.Generator().manual_seed(seed)
    losses, seconds = [], []
    for _ in range(args.steps):
        index = torch.randint(len(of.y), (args.batch,), generator=generator).chunk(processes)[rank]
        x, y = of.batch(index, args.resolution)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    return losses, statistics.median(seconds)


def accuracy(model: nn.Module, of: Digits, training: Digits, resolution: int) -> float:
    """In eval. So few steps leave running averages behind: they are taken anew, from digits trained on."""
    fit_batch_norm(model, training.batch(torch.arange(256), resolution)[0])
    model.eval()
    with torch.inference_mode():
        x, y = of.batch(torch.arange(len(of.y)), resolution)
        return (model(x).argmax(1) == y).float().mean().item()


def peaks(make: Callable[[], nn.Module], autocast: bool = False) -> dict[str, int]:
    """Bytes of activations and gradients that a step on some images of 224x224 holds at most; prints them."""
    count, resolution = METERED
    x = torch.randn(count, 3, resolution, resolution).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(count, dtype=torch.long)
    found = {}
    for way in (EAGER, FUSED):
        model = mnv2_fused.fuse(make()).train() if way == FUSED else make()

        def step(model=model) -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
            loss.backward()

        found[way] = peak_activation_bytes(step)
    share = found[FUSED] / found[EAGER]
    print("\npeak memory of a step on {} images of {}x{}: ".format(*METERED, METERED[1]), end="")
    print(f"eager {found[EAGER] / 1e6:.0f} MB, fused {found[FUSED] / 1e6:.0f} MB, {share:.0%}")
    return found


def draw(runs: dict[str, list[Run]], memory: dict[str, int], title: str, output: Path) -> None:
    """Losses of all seeds on the left, peak memory on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=[3, 1])
    for way, found in runs.items():
        for i, run in enumerate(found):
            left.plot(run.losses, color=COLOURS[way], linewidth=1, alpha=0.8, label=None if i else way)
    left.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    left.legend(frameon=False)
    values = [memory[way] / 1e6 for way in memory]
    bars = right.bar(range(len(values)), values, 0.6, color=[COLOURS[way] for way in memory])
    right.bar_label(bars, [f"{value:.0f}" for value in values], padding=2)
    right.set_xticks(range(len(values)), list(memory))
    right.set(ylabel="MB", title="peak memory of a step,\n{} images of {}x{}".format(*METERED, METERED[1]))
    right.margins(y=0.12)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110, format="png")
    plt.close(figure)


def compare(args: argparse.Namespace) -> None:
    """Eager and fused, each seed from the same weights and on the same batches."""
    training, testing = digits()
    runs: dict[str, list[Run]] = {EAGER: [], FUSED: []}
    print(f"{args.network}, {args.steps} steps of {args.batch} digits of {args.resolution}x{args.resolution}")
    print(f"\nseed  {'':<19}  first loss  mean of the last {LAST}  accuracy  s a step")
    for seed in range(args.seeds):
        start = new_network(args.network, seed)
        for way in runs:
            model = mnv2_fused.fuse(start).train() if way == FUSED else copy.deepcopy(start)
            losses, seconds = train(model, training, args, seed, args.autocast)
            run = Run(losses, seconds, accuracy(model, testing, training, args.resolution))
            runs[way].append(run)
            numbers = f"{losses[0]:>10.6f}  {run.last:>19.4f}  {run.accuracy:>8.1%}  {seconds:>8.3f}"
            print(f"{seed:>4}  {way:<19}  {numbers}", flush=True)
    for way, found in runs.items():
        last = [run.last for run in found]
        print(f"mean of the last losses, {way}: {statistics.fmean(last):.4f}, from {min(last):.4f} to {max(last):.4f}")
    memory = peaks(lambda: new_network(args.network, 0), args.autocast)
    how = ", autocast to bfloat16" if args.autocast else ""
    draw(runs, memory, f"{args.network} from scratch, {args.seeds} seeds{how}", args.output)
    print(f"wrote {args.output}")


def train_together(args: argparse.Namespace) -> None:
    """One training by several processes, fused."""
    dist.init_process_group("gloo")
    training, testing = digits()
    model = mnv2_fused.fuse(new_network(args.network, 0)).train()
    # In this order: around norms that are SyncBatchNorms already, DistributedDataParallel asks for GPUs.
    parallel = nn.parallel.DistributedDataParallel(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    losses, seconds = train(parallel, training, args, 0, args.autocast)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {args.batch // dist.get_world_size()} images each")
        print("losses " + " ".join(f"{loss:.6f}" for loss in losses))
        print(f"{seconds:.3f} s a step")
    dist.barrier()
    # Before the group, which would else end with the module: its thread waits then for Python, and Python for it.
    del parallel
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print(f"accuracy {accuracy(model, testing, training, args.resolution):.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default=NETWORKS[0])
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of training (60)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images a step (64)")
    parser.add_argument("--resolution", type=int, default=64, metavar="PIXELS", help="of the enlarged digits (64)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings of each kind (5)")
    parser.add_argument("--rate", type=float, default=0.05, metavar="RATE", help="learning rate at its highest (0.05)")
    parser.add_argument("--autocast", action="store_true", help="under torch.autocast to bfloat16")
    parser.add_argument("--output", type=Path, default=Path("train_digits.png"), help="where the picture goes")
    args = parser.parse_args()
    for name, least in {"steps": 2, "batch": 4, "resolution": 32, "seeds": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(args, name)}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch % processes:
        parser.error(f"--batch {args.batch} cannot be shared out among {processes} processes")
    if processes > 1:
        train_together(args)
    else:
        compare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
