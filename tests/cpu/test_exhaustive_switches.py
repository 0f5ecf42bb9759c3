"""An activation or a gate that the CPU's kernels or their planner do not know must not compile."""

import os
import re
import shutil
import subprocess

import pytest
from support.source_tree import ROOT

CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-fsyntax-only", "-Werror=switch", "-DMNV2_MOST_ROWS=2"]


@pytest.mark.parametrize(
    ("last", "source", "functions"),
    [
        ("kSilu", "cpu/portable.cpp", {"is_clip", "Clip", "activated", "activate"}),
        ("kSilu", "cpu/plan.cpp", {"activation_cost"}),
        ("kSigmoid", "cpu/portable.cpp", {"gate_of"}),
    ],
)
def test_what_is_not_handled_does_not_compile(tmp_path, last, source, functions):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler, {compiler} is not installed")
    shutil.copytree(CSRC, tmp_path / "csrc")

    def errors() -> str:
        command = [compiler, *FLAGS, str(tmp_path / "csrc" / source)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stderr

    assert not errors()
    header = tmp_path / "csrc" / "block.h"
    header.write_text(re.sub(rf"({last}) }}", r"\1, kUnknown }", header.read_text(), count=1))
    told = errors()
    assert "kUnknown" in told
    for function in functions:
        assert re.search(rf"\b{function}\(", told) or re.search(rf"\b{function}<", told), told
