"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of its own without torch."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.source_tree import CPU_KERNEL_CHECK

from mnv2_fused.testing import available_instruction_sets

# Register tiles of every width but few heights, and checks that are calls: the compiler takes minutes over others.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-DMNV2_MOST_ROWS=2"]
FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
ADDRESS = "-fsanitize=address"
# Without the checks of every reference: the kernel is lambdas that refer to registers, and its compiler never ends.
BOTH = f"{ADDRESS},signed-integer-overflow,shift,integer-divide-by-zero,bounds,float-cast-overflow"
# The kernel's template is the same for each instruction set: with both sanitizers the compiler takes minutes over the
# wide ones' register tiles, and with one of them still a minute. One wide set stands for the others.
WIDE = {"avx512", "avx512_bf16", "avx2"}
CHECKED = next((name for name in available_instruction_sets() if name in WIDE), None)

# Blocks drawn for each of two seeds.
BLOCKS = 50 if "CI" in os.environ else 150

pytestmark = [pytest.mark.slow, pytest.mark.minutes]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler, {compiler} is not installed")
    build = tmp_path_factory.mktemp("sanitizers")

    def compile_one(source: Path) -> Path:
        target = build / f"{source.stem}.o"
        flags = [ADDRESS if source.stem in WIDE else BOTH]
        if source.stem in WIDE - {CHECKED}:  # only to be linked
            flags = ["-O0", "-fno-sanitize=all"]
        done = subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning:" not in done.stderr, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, CPU_KERNEL_CHECK))
    subprocess.run([compiler, *FLAGS, BOTH, *objects, "-o", build / "check"], check=True)
    return build / "check"


@pytest.mark.parametrize("seed", [1, 2])
def test_kernel_reads_and_writes_only_its_buffers(program, seed):
    done = subprocess.run([program, str(BLOCKS), str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"portable: {6 * BLOCKS} of {6 * BLOCKS}" in done.stdout
