"""The CPU kernels for 64-bit Arm, cross-compiled and run under emulation."""

import shutil
import subprocess

import pytest
from support.source_tree import CPU_KERNEL_CHECK

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
for tool, package in (COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user"):
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}: apt-get install {package}", allow_module_level=True)
# Register tiles of every width but few heights.
FLAGS = ["-std=c++20", "-O1", "-g0", "-static", "-Wall", "-Wextra", "-Werror", "-DMNV2_MOST_ROWS=2"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = tmp_path_factory.mktemp("arm")
    objects = [(source, build / f"{i}.o") for i, source in enumerate(CPU_KERNEL_CHECK)]
    started = [subprocess.Popen([COMPILER, *FLAGS, "-c", source, "-o", target]) for source, target in objects]
    assert [compilation.wait() for compilation in started] == [0] * len(objects)
    subprocess.run([COMPILER, *FLAGS, *(target for _, target in objects), "-o", build / "check"], check=True)
    return build / "check"


# Processors: with dot products of bfloat16, and without.
@pytest.mark.parametrize(
    ("processor", "sets"), [("max", ["neon_bf16", "neon", "portable"]), ("cortex-a72", ["neon", "portable"])]
)
def test_kernels(program, processor, sets):
    done = subprocess.run([EMULATOR, "-cpu", processor, program, "20", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: 120 of 120" for name in sets]
