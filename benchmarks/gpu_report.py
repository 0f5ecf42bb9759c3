"""Builds, tests and measures on the GPU of this machine: ``make gpu-report OUT=directory``.

Writes ``gpu.json`` and ``gpu.md`` after every section, in order of worth, so that a run that is cut off leaves what it
had; what the budget had no room for is named there. Needs torch with CUDA, torchvision, triton, pytest and hypothesis,
and installs nothing. Imports only Python's own library until a GPU was found and the extension built.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_tables import FUZZ, Report, draw

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "torchvision", "triton", "pytest", "hypothesis", "pybind11", "setuptools")
# Of what runs on a GPU, what comes first.
TESTS = (
    "tests/cuda/test_cuda_op.py",
    "tests/gpu/test_gpu_op.py",
    "tests/gpu/test_gpu_sequence.py",
    "tests/triton_backend/test_triton.py",
)
# Seconds in which interrupted tests say what passed.
GRACE = 10
_PHOTO, _SQUARE = (1088, 1920), (224, 224)


class OutOfTime(BaseException):
    """No Exception, so that what catches those on the way does not swallow it."""


class Budget:
    """Seconds to spend, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock, self._end = seconds, clock, clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    @contextmanager
    def guard(self, most: float) -> Iterator[None]:
        """Raises OutOfTime inside once ``most`` seconds have gone by, or all that are left; again each second."""

        inside = True

        def ring(*_: Any) -> None:
            if inside:  # a late alarm must not stop what comes next
                raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(min(most, self.left), 1e-3), 1)
                yield
            finally:
                inside = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # An alarm on its way to another thread would end the process under the default handler: this drops it.
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Section:
    """A part of the report, run when at least ``least`` seconds are left and stopped after ``most``."""

    name: str
    run: Callable[[], None]
    least: float = 5
    most: float = 60


def run_sections(sections: Sequence[Section], report: Report, budget: Budget, save: Callable[[], None]) -> None:
    """Each in turn, saving after each; what has no time, and what fails, is named and costs no other section."""
    for section in sections:
        if budget.left < section.least:
            report.skipped[section.name] = f"{max(budget.left, 0):.0f} s left, it needs {section.least:.0f}"
            save()
            continue
        print(f"{section.name} ({budget.left:.0f} s left) ...", file=sys.stderr, flush=True)
        start = budget.left
        try:
            with budget.guard(section.most):
                section.run()
        except OutOfTime:
            report.skipped[section.name] = f"stopped after {start - budget.left:.0f} s"
        except Exception as error:
            report.failed[section.name] = f"{type(error).__name__}: {error}"[:500]
        report.seconds[section.name] = round(start - budget.left, 1)
        save()


def no_gpu() -> str | None:
    """Why there is no CUDA GPU here, or None; asks the driver, so it needs no torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver ({error})"
    count = ctypes.c_int()
    if (code := driver.cuInit(0)) != 0 or (code := driver.cuDeviceGetCount(ctypes.byref(count))) != 0:
        return f"the NVIDIA driver gives error {code}"
    return None if count.value else "the NVIDIA driver sees no GPU"


def unfit() -> str | None:
    """Why this Python cannot make the report, or None."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}; name another: make gpu-report OUT=... PYTHON=..."
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} cannot use the GPU"


def build(folder: Path) -> None:
    """The extension, in place, for this Python and this GPU; ninja's log goes to ``build.txt``."""
    import torch

    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    architecture = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": architecture}
    with (folder / "build.txt").open("w") as log:
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode != 0:
            raise SystemExit(f"no GPU report: building failed, see {log.name}")


def counts(output: str) -> dict[str, int]:
    """Of pytest's last line: {"passed": 3, "failed": 1, ...}."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)\b", lines[-1]) if lines else []
    return {kind.removesuffix("s") if kind.startswith("error") else kind: int(n) for n, kind in found}


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """The kernels' tests on the GPU; interrupted after so many seconds, with what passed until then counted."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    command += TESTS
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MNV2_FUSED_BACKEND")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"MNV2_FUSED_FUZZ": str(FUZZ), "PYTHONPATH": path}
    written = folder / "tests.txt"
    finished = True
    with written.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            # What a shell runs in the background ignores SIGINT, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            finished = False
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    output = written.read_text(errors="replace")
    found = counts(output)
    bad = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    ok = finished and process.returncode == 0 and found.get("passed", 0) > 0
    return {"ok": ok, "finished": finished, "exit code": process.returncode, **found, "bad": sorted(set(bad))}


def sections(report: Report, folder: Path, budget: Budget) -> list[Section]:
    """Everything, in order of worth."""
    import gpu_timing
    import torch
    from triton_prediction import predictions

    torch.backends.cudnn.benchmark = True  # eager at its best
    flush = gpu_timing.flusher(torch.device("cuda"))
    networks = gpu_timing.Networks()

    def tests() -> None:
        report.tests = run_tests(folder, min(0.4 * budget.seconds, budget.left - 15))

    def limits() -> None:
        report.limits = gpu_timing.limits(flush)

    def network(batch: int, dtype: str = "fp16", size: tuple[int, int] = _SQUARE, mode: str = "") -> Section:
        def run() -> None:
            try:
                report.rows.append(networks.measure(batch, size, dtype, flush, [mode] if mode else []))
            finally:
                torch.compiler.reset()
                torch.cuda.empty_cache()

        name = f"network, {dtype}, batch {batch}, {size[0]}x{size[1]}" + (f", torch.compile {mode}" if mode else "")
        return Section(name, run, *((40, 120) if mode else (15, 60)))

    def blocks(batch: int) -> Section:
        def run() -> None:
            for i, found in enumerate(predictions(batch)):
                report.rows.append(gpu_timing.measure_block(i, found, batch, report.limits, flush))

        return Section(f"blocks, fp16, batch {batch}", run, 15, 80)

    def memory() -> None:
        for batch, size, dtype in ((256, _SQUARE, "fp16"), (1, _PHOTO, "fp16"), (256, _SQUARE, "fp32")):
            report.memory.append(networks.memory(batch, size, dtype))

    def plot() -> None:
        if importlib.util.find_spec("matplotlib") is None:
            report.plot = "matplotlib is not installed"
        elif not any(row.bytes for row in report.rows):
            report.plot = "no block was measured"
        else:
            draw(report, folder / "roofline.png")

    # The compiled peers come once the sections that are sure to finish have; max-autotune may take all the time.
    return [
        Section("tests", tests, 30, 0.4 * budget.seconds + 30),
        Section("limits", limits),
        network(256),
        network(1),
        blocks(256),
        Section("memory", memory, 10, 60),
        Section("plot", plot),
        network(256, mode="max-autotune"),
        network(1, mode="reduce-overhead"),
        network(1, "fp16", _PHOTO),
        network(256, "bf16"),
        blocks(1),
        network(32),
        network(1, mode="max-autotune"),
        network(256, mode="reduce-overhead"),
        network(256, "fp32"),
        network(128),
        network(8),
        network(1, "bf16"),
        network(1, "fp32"),
        network(32, mode="max-autotune"),
        Section("plot with all blocks", plot),
    ]


def driver_version() -> str:
    """As nvidia-smi names it; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for gpu.json, gpu.md and the logs")
    parser.add_argument("--seconds", type=float, default=420, help="for everything, building included")
    parser.add_argument("--check", action="store_true", help="only tell whether there is a GPU")
    options = parser.parse_args(arguments)
    budget = Budget(options.seconds)
    why = no_gpu() if options.check else no_gpu() or unfit()
    if why is not None:
        print(f"no GPU report: {why}", file=sys.stderr)
        return 1
    if options.check:
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.pop("MNV2_FUSED_BACKEND", None)
    os.environ.pop("TRITON_INTERPRET", None)
    start = budget.left
    build(options.output)
    built = start - budget.left

    sys.path.insert(0, str(ROOT))
    import gpu_timing

    from mnv2_fused.tools import bench_results

    if not gpu_timing.runnable_backends():
        print(f"no GPU report: {gpu_timing.backends.backend_reasons(gpu_timing.torch.device('cuda'))}", file=sys.stderr)
        return 1
    report = Report(seconds={"build": round(built, 1)})
    found = sections(report, options.output, budget)
    report.machine = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"}
    report.machine |= gpu_timing.device() | {"driver": driver_version()} | bench_results.machine()
    run_sections(found, report, budget, lambda: report.save(options.output))
    print((options.output / "gpu.md").read_text())
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
