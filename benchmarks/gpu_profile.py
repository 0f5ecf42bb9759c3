"""Hardware counters of the fused kernels on a GPU, by Nsight Compute.

``python benchmarks/gpu_profile.py --output FOLDER --backend cuda --blocks 2 3 1 --batch 256`` writes ``profile.md``:
for each block of MobileNetV2 1.0 at 224, in float16, what bounds the kernel. Needs ``ncu`` on the path and a GPU whose
counters may be read.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from gpu_tables import grid

from mnv2_fused import backends, inverted_residual, pack
from mnv2_fused.testing import mobilenet_v2_blocks, random_weights

# Nsight Compute's name, and what it is here.
METRICS = {
    "gpu__time_duration.sum": "time, ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2, %",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared memory, %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores, %",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, %",
    "launch__registers_per_thread": "registers",
    "dram__bytes.sum": "bytes of memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled on barriers",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": "on shared memory",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "on global memory",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "on arithmetic",
}


def run_block(index: int, batch: int, backend: str) -> None:
    """One block's kernels, warm, then once more: the calls that are profiled."""
    spec, (height, width) = mobilenet_v2_blocks(224)[index - 1]
    x = torch.randn(batch, spec.in_channels, height, width, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last)
    weights = random_weights(spec)
    weights = weights._make(None if t is None else t.cuda() for t in weights)
    packed = pack(weights, x.dtype, backend)
    for _ in range(3):
        inverted_residual(x, packed, stride=spec.stride, residual=spec.residual, backend=backend)
    torch.cuda.synchronize()


def profile(index: int, batch: int, backend: str) -> list[dict[str, str]]:
    """A row of metrics for each kernel of the third call. Raises RuntimeError with what ncu says."""
    command = ["ncu", "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "regex:inverted_residual|add_splits", sys.executable, __file__]
    command += ["--run", str(index), "--batch", str(batch), "--backend", backend]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ncu gives exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return rows_of(done.stdout)


def rows_of(output: str) -> list[dict[str, str]]:
    """Of ncu's output: the last launch of each kernel, {"kernel": name, metric: value}."""
    start = output.find('"ID"')
    if start < 0:
        raise RuntimeError(f"ncu printed no table: {output[-2000:]}")
    launches: dict[str, dict[str, str]] = {}
    for line in csv.DictReader(io.StringIO(output[start:])):
        launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        launch[line["Metric Name"]] = line["Metric Value"]
    return list({launch["kernel"]: launch for launch in launches.values()}.values())


def table(found: dict[int, list[dict[str, str]]]) -> str:
    """Markdown, a column for each kernel."""
    kernels = [(index, row) for index, rows in found.items() for row in rows]
    names = [f"block {i}, {'sums of splits' if 'add_splits' in row['kernel'] else 'block'}" for i, row in kernels]
    lines = [[what, *(row.get(metric, "not told") for _, row in kernels)] for metric, what in METRICS.items()]
    return grid(["", *names], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for profile.md")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3, 1], choices=range(1, 18), metavar="BLOCK")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton"])
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)  # what ncu is given to run
    args = parser.parse_args()
    if args.run is not None:
        run_block(args.run, args.batch, args.backend)
        return 0
    if args.output is None:
        parser.error("say where to write: --output FOLDER")
    if (why := backends.backend_reasons()[args.backend]) is not None:
        print(f"no profile: {args.backend}: {why}", file=sys.stderr)
        return 1
    if shutil.which("ncu") is None:
        print("no profile: ncu is not on the path; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    found = {index: profile(index, args.batch, args.backend) for index in args.blocks}
    device = torch.cuda.get_device_name()
    head = f"# The {args.backend} kernel's counters\n\n{device}, float16, batch {args.batch}, by Nsight Compute.\n\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "profile.md").write_text(head + table(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
