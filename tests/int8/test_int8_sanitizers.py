"""The kernels on 8-bit integers under AddressSanitizer and UndefinedBehaviorSanitizer, without torch.

Buffers have exact sizes, and behind every part of a worker's scratch are bytes that no kernel may touch.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.source_tree import ROOT

from mnv2_fused.testing import available_instruction_sets

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

# Register tiles of few heights, and checks that are calls: either halves the compiler's minutes.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-DMNV2_MOST_ROWS=2"]
FLAGS += ["-DMNV2_SCRATCH_GAP=64", "--param", "asan-instrumentation-with-call-threshold=0"]
ADDRESS = "-fsanitize=address"
# The template is the same for each instruction set: once with both.
BOTH = f"{ADDRESS},signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow"

HERE, KERNELS = ROOT / "tests/int8", ROOT / "csrc/cpu/int8"
RUNS = set(available_instruction_sets())
# Which of the package's instruction sets can run each file.
WIDE = {"avx2": {"avx2"}, "avx2_vnni": {"avx2_vnni"}, "avx512_vnni": {"avx512", "avx512_bf16"}}
CHECKED = [
    name for name, needs in WIDE.items() if needs & RUNS and (name != "avx512_vnni" or torch.cpu._is_vnni_supported())
][-1:]  # one stands for the others


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not HERE.is_dir():
        pytest.skip("needs the source tree")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    build = tmp_path_factory.mktemp("sanitizers")

    def compile_one(source: Path) -> Path:
        target = build / f"{source.stem}.o"
        flags = [ADDRESS if source.stem in WIDE else BOTH]
        done = subprocess.run(["g++", *FLAGS, *flags, "-c", source, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning:" not in done.stderr, done.stderr
        return target

    sources = [KERNELS / f"{name}.cpp" for name in ("portable", *CHECKED)]
    sources += [HERE / "int8_kernel_check.cpp", ROOT / "csrc/cpu/plan.cpp", ROOT / "csrc/block.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run(["g++", *FLAGS, BOTH, *objects, "-o", build / "check"], check=True)
    return build / "check"


@pytest.mark.skipif(platform.system() != "Linux", reason="needs GCC's sanitizers")
@pytest.mark.parametrize("seed", ["1", "2"])
def test_int8_kernels_read_and_write_only_their_buffers(program, seed):
    done = subprocess.run([program, "150", seed], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ["portable", *CHECKED]:
        assert f"{line}: 150 of 150 equal" in done.stdout
