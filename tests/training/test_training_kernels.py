"""The training kernels in a program of their own without torch: under AddressSanitizer, and emulated on 64-bit Arm."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.source_tree import ROOT

# Register tiles of every width but few heights, or the compiler takes minutes over them; chunks of several panels,
# whatever the vectors.
FLAGS = ["-std=c++20", "-O1", "-g0", "-Wall", "-Wextra", "-Werror", "-DMNV2_MOST_ROWS=2", "-DMNV2_MOST_PANELS=3"]
SOURCES = ROOT / "csrc/cpu/training"

pytestmark = [pytest.mark.slow, pytest.mark.minutes]


def built(folder, compiler, sets, *flags):
    """The check of these instruction sets' kernels."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    check = ROOT / "tests/training/training_kernel_check.cpp"
    sources = [check, *(SOURCES / f"{name}.cpp" for name in sets)]
    if not check.is_file():
        pytest.skip("needs the source tree")
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(pair):
        done = subprocess.run([compiler, *FLAGS, *flags, "-c", pair[0], "-o", pair[1]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    subprocess.run([compiler, *FLAGS, *flags, *objects, "-o", folder / "check"], check=True)
    return folder / "check"


def test_kernels_read_and_write_only_their_arrays(tmp_path):
    """Of the portable ones, whose template is every instruction set's."""
    checks = "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"
    program = built(tmp_path, os.environ.get("CXX", "g++"), ["portable"], *checks)
    done = subprocess.run([program, "25"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "portable 25 blocks, 0 wrong\n"


def test_arm(tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64: apt-get install qemu-user")
    program = built(tmp_path, "aarch64-linux-gnu-g++", ["portable", "neon"], "-static")
    done = subprocess.run(["qemu-aarch64", program, "12"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "portable neon 12 blocks, 0 wrong\n"
