"""Folders of the source tree beside tests/, for tests of what no wheel has."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
_TORCH = {"op.cpp", "run.cpp", "sequence.cpp"}  # the files of csrc/cpu that know torch
# The CPU kernels on floats, which know no torch, and the program that checks them.
CPU_KERNEL_CHECK = [
    ROOT / "tests/cpu/cpu_kernel_check.cpp",
    ROOT / "csrc/block.cpp",
    *sorted(path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.name not in _TORCH),
]


def make_importable(folder: Path) -> None:
    """Scripts in ``folder`` can be imported from here on; without the source tree the calling test is skipped."""
    if not folder.is_dir():
        pytest.skip("needs the source tree", allow_module_level=True)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
