"""benchmarks/kernel_chain.cpp fits the kernels it times: its build takes minutes, so its syntax stands in."""

import os
import shutil
import subprocess

import pytest
from support.source_tree import BENCHMARKS

pytestmark = pytest.mark.slow


def test_it_compiles():
    source, compiler = BENCHMARKS / "kernel_chain.cpp", os.environ.get("CXX", "g++")
    if not source.is_file() or shutil.which(compiler) is None:
        pytest.skip("needs the source tree and a C++ compiler")
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([compiler, *flags, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
