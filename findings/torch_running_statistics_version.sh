#!/usr/bin/env bash
# torch 2.13.0: batch_norm writes its running statistics uncounted, instance_norm counts them; gloo's all_reduce writes
# uncounted, all_reduce_coalesced counts.
#
# Expected: functions that write the same kind of argument in place count it alike in `_version`.
# Happens: F.batch_norm(training=True) changes running_mean and leaves its `_version`, F.instance_norm raises it. Between
#   two processes dist.all_reduce leaves it, dist.all_reduce_coalesced of the same tensor raises it.
# Here: mnv2_fused/module/guard.py does not rely on `_version` alone.
# Takes some 200 MB to 3 GB (whichever build pip takes), and a minute. Exits with 1 where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F


def counted(write, tensor):
    """Whether a write that changes the tensor raises its version."""
    before, version = tensor.clone(), tensor._version
    write(tensor)
    assert not torch.equal(tensor, before)
    return tensor._version > version


def in_two_processes(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    found = [
        counted(dist.all_reduce, torch.ones(3)),
        counted(lambda t: dist.all_reduce_coalesced([t]), torch.ones(3)),
    ]
    dist.destroy_process_group()
    if rank == 0:
        print("all_reduce counted", found[0], " all_reduce_coalesced counted", found[1])
    sys.exit(found != [False, True])


if __name__ == "__main__":
    x = torch.randn(4, 3, 5, 5)
    batch = counted(lambda mean: F.batch_norm(x, mean, torch.ones(3), training=True), torch.zeros(3))
    instance = counted(lambda mean: F.instance_norm(x, mean, torch.ones(3)), torch.zeros(3))
    print("running_mean of batch_norm counted", batch, " of instance_norm counted", instance)
    mp.spawn(in_two_processes, (os.path.dirname(os.path.abspath(__file__)),), nprocs=2)
    sys.exit((batch, instance) != (False, True))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
