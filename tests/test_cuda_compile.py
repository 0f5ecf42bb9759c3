"""The CUDA kernels compiled for GPUs that need not be here: registers, spills, tensor cores, wide accesses."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from cuda_configurations import PAIRS, RESULTS, compiled, compiler, nvcc, table  # noqa: E402

if nvcc() is None:
    pytest.skip("needs nvcc", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton's disassembler", allow_module_level=True)


@pytest.mark.parametrize(("architecture", "precision"), PAIRS, ids=[f"sm_{a}-{p}" for a, p in PAIRS])
def test_kernels(architecture, precision):
    kernels = compiled()[architecture, precision]
    assert len(kernels) == (6 if precision == "float32" else 16)  # exact products have no registers for more
    for kernel in kernels:
        assert kernel.stack == kernel.spilled == kernel.local == 0, kernel
        assert (kernel.products > 0) == (precision != "float32"), kernel
        assert kernel.wide_loads > 0 and kernel.wide_stores > 0, kernel
        assert kernel.registers <= 255


def test_the_table_is_of_these_kernels():
    text = RESULTS.read_text()
    if compiler() not in text:
        pytest.skip("made with another nvcc")
    assert text == table(), "run: python benchmarks/cuda_configurations.py"
