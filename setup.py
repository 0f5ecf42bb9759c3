"""Build of the compiled part; everything else is declared in pyproject.toml."""

import os
from pathlib import Path

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI has everything used here: one binary serves it and later ones.
TORCH_TARGET = "0x020a000000000000"  # 2.10

DEBUG = os.environ.get("MNV2_FUSED_DEBUG", "0") == "1"

setup(
    ext_modules=[
        CppExtension(
            "mnv2_fused._C",
            sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]),
            # pybind11's own headers, before the copy in torch, which refuses stable-ABI builds.
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[
                "-std=c++20",
                "-O0" if DEBUG else "-O3",
                "-g" if DEBUG else "-g0",
                "-Wall",
                "-Wextra",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
