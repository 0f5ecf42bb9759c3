"""The AVX-512 kernels on 8-bit integers, on an x86-64 processor with AVX2 alone: their intrinsics emulated."""

import platform
import shutil
import subprocess

import pytest
import torch
from support.source_tree import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

HERE = ROOT / "tests/int8"
# Fewer rows of pixels in a register tile than there are registers for, or the compiler takes minutes.
OPTIONS = ["-std=c++20", "-O1", "-mavx2", "-ffp-contract=off", "-DMNV2_MOST_ROWS=4"]
# In a namespace of their own: their kernels are another instruction set's.
EMULATED = [
    *("-DMNV2_EMULATED_AVX512", "-Davx512_vnni=emulated_avx512"),
    *("-include", str(HERE / "emulated_avx512.h")),
]


@pytest.mark.skipif(not HERE.is_dir(), reason="needs the source tree")
@pytest.mark.skipif(torch.cpu._is_vnni_supported(), reason="this processor runs them: test_kernels.py")
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_avx512_equals_the_portable_kernels(tmp_path):
    kernels = ROOT / "csrc/cpu/int8"
    builds = [
        subprocess.Popen(["g++", *OPTIONS, *options, "-c", source, "-o", tmp_path / f"{source.stem}.o"])
        for source, options in (
            (kernels / "avx512_vnni.cpp", EMULATED),
            (kernels / "portable.cpp", []),
            (HERE / "int8_kernel_check.cpp", []),
            (ROOT / "csrc/cpu/plan.cpp", []),
            (ROOT / "csrc/block.cpp", []),
        )
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    program = tmp_path / "check"
    subprocess.run(["g++", *tmp_path.glob("*.o"), "-o", program], check=True)
    found = subprocess.run([program, "300"], capture_output=True, text=True)
    expected = "portable: 300 of 300 equal\nemulated_avx512: 300 of 300 equal\n"
    assert found.stdout == expected, found.stdout + found.stderr
