"""The command line: ``python -m mnv2_fused info | plan | cost | quantize | demo | bench``.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, backends, cuda_plan, plan, testing
from .gpus import GPUS
from .tools.demo import DemoError, run_demo
from .tools.digits import train_digits
from .tools.tables import aligned

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def resolution(text: str) -> tuple[int, int]:
    """``R`` or ``HxW`` as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be R or HxW, got {text!r}")
    return positive(sides[0]), positive(sides[-1])


def instruction_set_in_use() -> str:
    """Its name, or why MNV2_FUSED_ISA names none that runs here."""
    try:
        return backends._C.instruction_set()
    except RuntimeError as error:
        return f"none: {error}"


def cuda_build() -> str:
    """What the CUDA kernel was built with, or why there is none."""
    if backends._cuda is None:
        return f"none: {backends.backend_reasons()['cuda']}"
    toolkit = backends._cuda.toolkit
    return f"built with CUDA {toolkit // 1000}.{toolkit % 1000 // 10}, for {backends._cuda.architectures}"


def info(args: argparse.Namespace) -> int:
    """Prints what was built, what can run here, and why the rest cannot."""
    rows = [
        ("mnv2_fused", __version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    if backends._C is None:
        rows.append(("compiled library", f"missing: {backends.backend_reasons()['cpu']}"))
        rows.append(("", "build it with: pip install --no-build-isolation ."))
    else:
        target, compiled = backends._C.torch_target, backends._C.instruction_sets()
        rows += [
            ("built with", f"compiler {backends._C.compiler}, for torch {target // 100}.{target % 100} and later"),
            ("instruction sets", f"compiled: {', '.join(name for name, _ in compiled)}"),
            ("", f"supported here: {', '.join(testing.available_instruction_sets())}"),
            ("", f"in use: {instruction_set_in_use()}"),
            ("L2 cache", f"{backends._C.l2_bytes() / 1024:.0f} KiB"),
            ("CUDA kernel", cuda_build()),
        ]
    rows.append(("threads", str(torch.get_num_threads())))
    for name in ("MNV2_FUSED_ISA", "MNV2_FUSED_BACKEND"):
        if name in os.environ:
            rows.append((name, os.environ[name]))
    for backend, reason in backends.backend_reasons().items():
        rows.append((f"backend {backend}", "available" if reason is None else f"cannot run: {reason}"))
    for name, value in rows:
        print(f"{name:<18}{value}")
    return 0


def print_gpu_plans(args: argparse.Namespace) -> int:
    """Prints how the CUDA kernel tiles each of MobileNetV2's 17 blocks on a GPU, and how long it expects to take."""
    header = "block|spec|input|tile|images|group|splits|thread blocks|warps|shared KiB|recompute|us|MiB never written"
    rows: list[list[str]] = [list(header.split("|"))]
    seconds, never_written = 0.0, 0
    gpu, dtype = GPUS[args.gpu], DTYPES[args.dtype or "float16"]
    for i, (spec, (height, width)) in enumerate(testing.mobilenet_v2_blocks(args.resolution), start=1):
        p = cuda_plan(spec, (args.batch, spec.in_channels, height, width), dtype=dtype, gpu=gpu)
        seconds, never_written = seconds + p.seconds, never_written + p.bytes_never_written
        rows.append(
            [
                *(str(i), str(spec), f"{height}x{width}", f"{p.tile_rows}x{p.tile_cols}", str(p.images), str(p.group)),
                *(str(p.splits), str(p.thread_blocks), str(p.warps), f"{p.shared_bytes / 1024:.0f}"),
                *(f"{p.recompute:.3f}", f"{p.seconds * 1e6:.1f}", f"{p.bytes_never_written / 2**20:.2f}"),
            ]
        )
    rows.append(["total", *[""] * 10, f"{seconds * 1e6:.1f}", f"{never_written / 2**20:.2f}"])
    height, width = args.resolution
    name = str(dtype).removeprefix("torch.")
    print(f"MobileNetV2 1.0 at {height}x{width}, batch {args.batch}, {name}, CUDA kernel on {gpu.name}; us: expected\n")
    print(aligned(rows))
    return 0


def print_plans(args: argparse.Namespace) -> int:
    """Prints how each of MobileNetV2's 17 blocks is tiled on this machine, and the memory that saves."""
    if args.gpu:
        return print_gpu_plans(args)
    dtype = args.dtype or "float32"
    header = "block|spec|input|tile|group|splits|workers|scratch KiB|recompute|MiB never written"
    rows: list[list[str]] = [list(header.split("|"))]
    total = 0
    for i, (spec, (height, width)) in enumerate(testing.mobilenet_v2_blocks(args.resolution), start=1):
        shape = (args.batch, spec.in_channels, height, width)
        p = plan(spec, shape, dtype=DTYPES[dtype], threads=args.threads)
        total += p.bytes_never_written
        rows.append(
            [
                *(str(i), str(spec), f"{height}x{width}", f"{p.tile_rows}x{p.tile_cols}", str(p.group)),
                *(str(p.splits), str(p.workers)),
                *(f"{p.call_bytes / 1024:.0f}", f"{p.recompute:.3f}"),
                f"{p.bytes_never_written / 2**20:.2f}",
            ]
        )
    rows.append(["total", *[""] * 8, f"{total / 2**20:.2f}"])
    height, width = args.resolution
    threads = args.threads or torch.get_num_threads()
    print(f"MobileNetV2 1.0 at {height}x{width}, batch {args.batch}, {dtype}, {threads} thread(s), ", end="")
    print(f"{backends._C.instruction_set()}; scratch is that of all workers\n")
    print(aligned(rows))
    return 0


def print_cost(args: argparse.Namespace) -> int:
    """Prints what a model costs layer by layer, eager and fused."""
    from .tools import cost

    return cost.run(args.model, (args.batch, 3, *args.resolution), DTYPES[args.dtype], measure=args.measure)


def numbers(text: str) -> tuple[float, ...]:
    """``R,G,B``: one number for each colour."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"must be R,G,B, three numbers such as 0.485,0.456,0.406, got {text!r}")
    return values


def deviations(text: str) -> tuple[float, ...]:
    """``R,G,B``, each above 0."""
    values = numbers(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}; 1,1,1 divides by nothing")
    return values


def shorter_side(text: str) -> tuple[int, ...]:
    """``R`` as (R,), ``HxW`` as (H, W)."""
    return resolution(text)[: text.lower().count("x") + 1]


def seed(text: str) -> int:
    """What torch's generators take."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^63 - 1, got {text!r}")
    return value


def run_quantize(args: argparse.Namespace) -> int:
    """Quantises a model on a folder of images and writes its state_dict."""
    from .tools import quantize

    return quantize.run(
        args.model,
        weights=args.weights,
        images=args.images,
        output=args.output,
        resize=args.resize,
        crop=args.crop,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
        limit=args.limit,
        seed=args.seed,
        skip=args.skip,
        rows=args.rows,
        threads=args.threads,
    )


def demo(args: argparse.Namespace) -> int:
    """Runs the demo, or the training run in its place."""
    if args.train_digits:
        epochs = 5 if args.quick else 14
        return train_digits(epochs=epochs, threads=args.threads or torch.get_num_threads())
    rounds = args.rounds or (3 if args.quick else 20)
    return run_demo(
        args.images,
        weights_file=args.weights,
        output=args.output,
        threads=args.threads or 1,
        rounds=rounds,
        high_resolution=not args.quick,
    )


def run_bench(args: argparse.Namespace) -> int:
    """Measures every engine, or shows what was measured before."""
    from .tools import bench, bench_results, int8_engines

    for name in ("matplotlib", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise RuntimeError(f"the benchmark needs {name}: pip install 'mnv2_fused[demo]'")
    plot = Path(args.output)
    if not plot.parent.is_dir():
        raise RuntimeError(f"the folder of --output {args.output} does not exist; create it first")
    if args.results:
        try:
            results, _ = bench_results.load(Path(args.results))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RuntimeError(f"{args.results} is no result of this benchmark: {error}") from error
        return bench.show(results, plot)
    if backends.resolve_backend("auto", torch.device("cpu")) == "eager":
        raise RuntimeError("MNV2_FUSED_BACKEND=eager leaves nothing to measure; unset it")
    cases = bench.QUICK[:1] if args.quick else bench.QUICK
    if args.dtype == "int8":
        cases = tuple(dataclasses.replace(case, int8=tuple(int8_engines.QUANTIZERS)) for case in cases)
    if args.threads:
        cases = tuple(dataclasses.replace(case, threads=args.threads) for case in cases)
    return bench.run(cases, seconds=args.seconds, plot=plot, quick=args.quick)


def make_parser() -> argparse.ArgumentParser:
    """The subcommands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m mnv2_fused",
        description="The MobileNetV2 inverted-residual block as one kernel, without the expanded tensor.",
        epilog="exit codes: 0 done, 1 failed, 2 bad usage",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,plan,cost,quantize,demo,bench}")

    help_info = "what was built, what can run on this machine, and why the rest cannot"
    commands.add_parser("info", help=help_info, description=help_info).set_defaults(run=info)

    help_plan = "how each of MobileNetV2's 17 blocks is tiled on this machine"
    p = commands.add_parser("plan", help=help_plan, description=help_plan)
    p.add_argument(
        *("--resolution", "-r"), type=resolution, default=(224, 224), metavar="R|HxW", help="image size (224)"
    )
    p.add_argument("--batch", "-b", type=positive, default=1, metavar="N", help="images per call (1)")
    p.add_argument("--threads", "-t", type=positive, metavar="T", help="threads to plan for (torch's number)")
    p.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (float32; float16 with --gpu)")
    p.add_argument("--gpu", choices=GPUS, help="plans of the CUDA kernel instead; no GPU is needed")
    p.set_defaults(run=print_plans)

    help_cost = "what a model costs layer by layer: parameters, multiply-adds, memory eager and fused"
    p = commands.add_parser("cost", help=help_cost, description=f"{help_cost}. Weights are random.")
    p.add_argument("model", metavar="MODEL", help="a model's name here or in torchvision, or timm:NAME")
    p.add_argument(
        *("--resolution", "-r"), type=resolution, default=(224, 224), metavar="R|HxW", help="image size (224)"
    )
    p.add_argument("--batch", "-b", type=positive, default=1, metavar="N", help="images per call (1)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (float32)")
    p.add_argument("--measure", action="store_true", help="also run it, to compare the computed peaks with measured")
    p.set_defaults(run=print_cost)

    help_quantize = "a model on 8-bit integers, calibrated on a folder of images: a state_dict, and how near it is"
    p = commands.add_parser(
        "quantize",
        help=help_quantize,
        description=f"{help_quantize}. Images are prepared as ImageNet's usually are, those for models of timm as timm "
        "notes of them; options say otherwise. What is written is loaded again and compared before the command ends. "
        "Needs pip install 'mnv2_fused[demo]'.",
    )
    p.add_argument("model", metavar="MODEL", help="a model's name here or in torchvision, or timm:NAME")
    p.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, in folders or not")
    p.add_argument(
        *("--output", "-o"),
        type=Path,
        required=True,
        metavar="FILE",
        help="where the state_dict goes: .safetensors, or .pth or .pt by torch.save",
    )
    p.add_argument("--weights", metavar="FILE", help="state_dict of the model, or the word random (published ones)")
    p.add_argument("--limit", type=positive, default=256, metavar="N", help="images at most, drawn at random (256)")
    p.add_argument("--seed", type=seed, default=0, metavar="N", help="draws them, and what biases are corrected on (0)")
    p.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="module that stays float, as model.named_modules() names it; may be given again",
    )
    p.add_argument("--resize", type=shorter_side, metavar="R|HxW", help="the shorter side, or height and width (256)")
    p.add_argument("--crop", type=resolution, metavar="R|HxW", help="the middle of that (224)")
    p.add_argument("--mean", type=numbers, metavar="R,G,B", help="of colours from 0 to 1 (0.485,0.456,0.406)")
    p.add_argument("--std", type=deviations, metavar="R,G,B", help="the same (0.229,0.224,0.225)")
    p.add_argument("--interpolation", choices=("bilinear", "bicubic", "nearest"), help="of --resize (bilinear)")
    p.add_argument(
        "--no-rows",
        dest="rows",
        action="store_false",
        help="block by block, for models that call the children of a Sequential one by one",
    )
    p.add_argument("--threads", "-t", type=positive, metavar="T", help="threads (torch's number)")
    p.set_defaults(run=run_quantize)

    help_demo = "MobileNetV2 on photographs: latency, memory and results, eager against fused"
    p = commands.add_parser(
        "demo",
        help=help_demo,
        description=f"{help_demo}. Checks every result before timing it; writes a table and a chart. "
        "Needs pip install 'mnv2_fused[demo]'.",
    )
    p.add_argument("images", nargs="*", metavar="IMAGE", help="image files (two photographs of scikit-learn)")
    p.add_argument(
        "--weights",
        metavar="FILE",
        help="state_dict of torchvision's mobilenet_v2 (published ones; where those cannot be had EfficientNet-Lite0 "
        "with its own; where its packages are missing, too, random ones)",
    )
    p.add_argument("--output", "-o", default="demo.png", metavar="PNG", help="where the chart goes (demo.png)")
    p.add_argument("--threads", "-t", type=positive, metavar="T", help="threads (1; for --train-digits torch's number)")
    p.add_argument("--rounds", type=positive, metavar="N", help="rounds of timing (20; a third at 1088x1920)")
    p.add_argument(
        "--train-digits",
        action="store_true",
        help="instead: train a small MobileNetV2 of fused blocks on scikit-learn's digits, then compare its "
        "predictions with those of torchvision's blocks",
    )
    p.add_argument("--quick", action="store_true", help="fewer rounds or epochs, nothing at 1088x1920")
    p.set_defaults(run=demo)

    help_bench = "MobileNetV2 through every engine installed, in one interleaved run: latency, memory, growth"
    p = commands.add_parser(
        "bench",
        help=help_bench,
        description=f"{help_bench}. Checks every result before timing it; prints tables and draws a plot. Needs pip "
        "install 'mnv2_fused[demo]', and 'mnv2_fused[peers]' for ONNX Runtime, OpenVINO and NNCF.",
    )
    p.add_argument("--threads", "-t", type=positive, metavar="T", help="threads of every engine (1)")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "int8"),
        default="bfloat16",
        help="beside float32: bfloat16, or int8 as well, each engine by its own quantiser (bfloat16)",
    )
    p.add_argument("--seconds", type=positive, default=8, metavar="S", help="of timing, about, for each case (8)")
    p.add_argument("--output", "-o", default="bench.png", metavar="PNG", help="where the plot goes (bench.png)")
    p.add_argument("--results", metavar="JSON", help="instead: show this file of benchmarks/results")
    p.add_argument("--quick", action="store_true", help="one image of 224x224 only, and no memory of processes")
    p.set_defaults(run=run_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code. Raises SystemExit(2) on bad usage, as argparse does."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except (DemoError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
