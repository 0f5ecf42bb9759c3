"""The CUDA kernels compiled for GPUs that need not be here: registers, spills, tensor cores, wide accesses."""

import importlib.util
import os
import sys

import pytest
from support.source_tree import ROOT

BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from cuda_configurations import PAIRS, RESULTS, cell, compiled, compiler, kept, nvcc  # noqa: E402

if nvcc() is None:
    pytest.skip("needs nvcc", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton's disassembler", allow_module_level=True)


pytestmark = [pytest.mark.slow, pytest.mark.minutes]

# Each pair takes a processor minutes: of all generations and precisions one, or those of the environment.
CHOSEN = "75-half"
CASES = [tuple(pair.split("-")) for pair in os.environ.get("MNV2_FUSED_COMPILE", CHOSEN).split()]
assert CASES and set(CASES) <= set(PAIRS), f"MNV2_FUSED_COMPILE must name some of {PAIRS}, got {CASES}"


@pytest.mark.parametrize(("architecture", "precision"), CASES, ids=[f"sm_{a}-{p}" for a, p in CASES])
def test_kernels(architecture, precision):
    kernels = compiled(tuple(CASES))[architecture, precision]
    assert len(kernels) == (19 if precision == "float32" else 30)  # exact products have no registers for more
    for kernel in kernels:
        assert kernel.stack == kernel.spilled == kernel.local == 0, kernel
        assert (kernel.products > 0) == (precision != "float32"), kernel
        assert kernel.wide_loads > 0 and kernel.wide_stores > 0, kernel
        assert kernel.registers <= 255
        assert kernel.waits == (int(architecture.rstrip("a")) >= 90), kernel
    if compiler() in RESULTS.read_text():
        remake = "run: python benchmarks/cuda_configurations.py"
        assert [cell(kernel) for kernel in kernels] == kept(architecture, precision), remake
