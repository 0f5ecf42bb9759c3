"""A training step at 224 on the CPU: time and peak memory, eager, compiled and fused side by side.

One interleaved run a case: forward in train(), cross entropy, backward, a step of SGD. Before anything is timed, the
first loss of each is compared with float64's.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision

from mnv2_fused import fuse, testing

EAGER, COMPILED, AUTOCAST = "eager channels_last", "torch.compile", "eager autocast bfloat16"
FUSED, FUSED_AUTOCAST = "fused", "fused autocast bfloat16"
# Over which fused counts.
OVER = {EAGER: FUSED, COMPILED: FUSED, AUTOCAST: FUSED_AUTOCAST}


class Trainer:
    """Steps of one way to train."""

    def __init__(self, way, model, x, y):
        model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
        model = fuse(model).train() if way in (FUSED, FUSED_AUTOCAST) else model
        self.parameters = list(model.parameters())
        self.run = torch.compile(model) if way == COMPILED else model
        self.autocast = way in (AUTOCAST, FUSED_AUTOCAST)
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3)
        self.x, self.y = x, y

    def __call__(self):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.run(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.item()


CASES = [("mobilenet_v2", 8, 1), ("mobilenet_v2", 8, 2), ("mobilenet_v2", 32, 1), ("mobilenet_v2", 32, 2)]
CASES += [("mobilenet_v3_large", 32, 1), ("efficientnet_b0", 32, 1)]


@pytest.mark.parametrize(("network", "count", "threads"), CASES, ids=str)
def test_training(benchmark, table, network, count, threads):
    benchmark.group = f"a training step, batch {count}"
    with torch.inference_mode(False), testing.threads(threads):
        torch.manual_seed(0)
        options = {"stochastic_depth_prob": 0.0} if network == "efficientnet_b0" else {}
        model = getattr(torchvision.models, network)(dropout=0.0, **options)
        x = torch.randn(count, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        y = torch.randint(0, 1000, (count,))
        with torch.no_grad():
            exact = F.cross_entropy(copy.deepcopy(model).double().train()(x.double()), y).item()
        ways = {way: Trainer(way, model, x, y) for way in (EAGER, COMPILED, AUTOCAST, FUSED, FUSED_AUTOCAST)}
        for way, step in ways.items():
            assert abs(step() - exact) < (2e-2 if step.autocast else 1e-4), way
        benchmark.pedantic(ways[FUSED], rounds=1)
        timings = testing.interleave(ways, rounds=5, warmup=1)
        peaks = {way: testing.peak_activation_bytes(step) for way, step in ways.items()}
    ratios = {way: testing.ratio(timings[fused], timings[way]) for way, fused in OVER.items()}
    benchmark.extra_info.update(ratios=ratios, peaks=peaks)
    cells = {way: f"{timings[way].median:.2f} s, {peaks[way] / 1e6:.0f} MB" for way in ways}
    for way, ratio in ratios.items():
        cells[way] += f", {ratio:.2f}"
    table({"network": network, "batch": str(count), "threads": str(threads), **cells})
