"""Two processes over gloo, each with half of every batch, whose norms have their statistics together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mnv2_fused import backends, fuse

PROCESSES, STEPS = 2, 3


def train(model, x, y):
    """The last loss of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.detach()


def one_of_several(network, output):
    from test_training_models import NETWORKS, batch, trains_fused
    from torchvision.models import mobilenetv2

    dist.init_process_group("gloo")
    model = fuse(NETWORKS[network]().double()).train()
    parallel = nn.parallel.DistributedDataParallel(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trains_fused(model)
    x, y = (t.chunk(PROCESSES)[dist.get_rank()] for t in batch())
    loss = train(parallel, x, y)
    dist.all_reduce(loss)
    one = fuse(nn.Sequential(mobilenetv2.InvertedResidual(4, 4, 1, 6))).double().train()
    nn.SyncBatchNorm.convert_sync_batchnorm(one)
    assert one(torch.ones(1, 4, 1, 1).double() * (1 + dist.get_rank())).isfinite().all()  # one value a channel here
    with pytest.raises(RuntimeError, match="several processes has no second derivative here"):
        grads = torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)
        grads[0].sum().backward()
    if dist.get_rank() == 0:
        torch.save({"loss": loss / PROCESSES, "state": model.state_dict()}, output)
    del parallel  # else the group ends with it: its thread waits for Python then, and Python for its thread
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(backends._C is None or not dist.is_gloo_available(), reason="needs the compiled library and gloo")
@pytest.mark.parametrize("network", ["V2", "V3", "EfficientNet"])
def test_they_train_as_one_does_with_the_whole_batch(tmp_path, network):
    """By the ordinary modules, in float64: DistributedDataParallel averages gradients, SyncBatchNorm statistics."""
    pytest.importorskip("torchvision")
    from test_training_models import NETWORKS, batch

    folder = Path(__file__).parent
    paths = [str(folder.parent), str(folder), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [*command, __file__, network, tmp_path / "found.pt"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "Grad strides do not match" not in done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    eager = NETWORKS[network]().double()
    torch.testing.assert_close(found["loss"], train(eager, *batch()), rtol=1e-10, atol=0)
    eager(batch()[0])  # the call that asked for a second derivative
    for (name, mine), other in zip(found["state"].items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11, msg=name)


if __name__ == "__main__":
    one_of_several(*sys.argv[1:])
