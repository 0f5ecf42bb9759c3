"""The kernels on 8-bit integers for 64-bit Arm, cross-compiled and run under emulation."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.source_tree import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
for tool, package in (COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user"):
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}: apt-get install {package}", allow_module_level=True)

pytestmark = pytest.mark.slow

FLAGS = ["-std=c++20", "-O1", "-g0", "-static", "-Wall", "-Wextra", "-Werror", "-DMNV2_MOST_ROWS=2"]
HERE, KERNELS = ROOT / "tests/int8", ROOT / "csrc/cpu/int8"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not HERE.is_dir():
        pytest.skip("needs the source tree")
    build = tmp_path_factory.mktemp("arm")
    sources = [KERNELS / f"{name}.cpp" for name in ("neon_dotprod", "neon_i8mm", "portable")]
    sources += [HERE / "int8_kernel_check.cpp", ROOT / "csrc/cpu/plan.cpp", ROOT / "csrc/block.cpp"]

    def compile_one(source):
        target = build / f"{source.stem}.o"
        subprocess.run([COMPILER, *FLAGS, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([COMPILER, *FLAGS, *objects, "-o", build / "check"], check=True)
    return build / "check"


# Processors: with products of uint8 by int8, with those of one sign alone, and with neither.
@pytest.mark.parametrize(
    ("processor", "sets"),
    [("max", ["neon_i8mm", "neon_dotprod"]), ("neoverse-n1", ["neon_dotprod"]), ("cortex-a72", [])],
)
def test_they_equal_the_portable_kernels(program, processor, sets):
    done = subprocess.run([EMULATOR, "-cpu", processor, program, "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: 60 of 60 equal" for name in ("portable", *sets)]
