"""An activation or a gate that a kernel does not know must not compile, on the CPU and on GPUs."""

import os
import re
import shutil
import subprocess

import pytest
from support.source_tree import ROOT

from mnv2_fused.activations import ACTIVATION_TABLE

CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-fsyntax-only", "-Werror=switch", "-DMNV2_MOST_ROWS=2"]
# The CUDA kernels' formulas, by the CPU's compiler: tests/cuda_emulation has the GPU's own operations.
CUDA = '#include "emulated_device.h"\n#include "kernel/activation.cuh"\n'


def errors(csrc, source) -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler, {compiler} is not installed")
    if source.endswith(".cuh"):
        (csrc.parent / "cuda.cpp").write_text(CUDA)
        paths = [f"-I{csrc / 'cuda'}", f"-I{ROOT / 'tests' / 'cuda_emulation'}", str(csrc.parent / "cuda.cpp")]
    else:
        paths = [str(csrc / source)]
    command = [compiler, *FLAGS, *paths]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stderr


@pytest.mark.parametrize("source", ["cpu/portable.cpp", "cuda/kernel/activation.cuh"])
def test_an_activation_without_a_formula_does_not_compile(tmp_path, source):
    shutil.copytree(CSRC, tmp_path / "csrc")
    assert not errors(tmp_path / "csrc", source)
    header = tmp_path / "csrc" / "activations.h"
    *rows, last = re.findall(r'^  ROW\(.*"\w+".*\).*$', header.read_text(), re.MULTILINE)
    assert len(rows) + 1 == len(ACTIVATION_TABLE)
    header.write_text(header.read_text().replace(last, rf'{last} ROW(kUnknown, "unknown", kFormula, 1, 1)'))
    told = errors(tmp_path / "csrc", source)
    assert "the activation needs a formula here" in told
    assert "kUnknown" in told


def test_a_gate_without_a_formula_does_not_compile(tmp_path):
    shutil.copytree(CSRC, tmp_path / "csrc")
    header = tmp_path / "csrc" / "block.h"
    header.write_text(re.sub(r"(kHardsigmoidFifth) }", r"\1, kUnknown }", header.read_text(), count=1))
    told = errors(tmp_path / "csrc", "cpu/portable.cpp")
    assert "kUnknown" in told
    assert re.search(r"\bgate_of\(", told) or re.search(r"\bgate_of<", told), told


def test_every_activation_has_a_cost_on_triton():
    assert all(function.triton_slots > 0 for function in ACTIVATION_TABLE.values())
