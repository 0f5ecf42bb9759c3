"""The Triton kernel with a plan of few programs, and with changed source."""

import importlib.util
from pathlib import Path

import mnv2_fused
from mnv2_fused import triton_plan


def forced(spec, x, **values):
    """A plan with some values forced; few programs, since the interpreter runs one after the other."""
    patches = 16
    plan = triton_plan(spec, x.shape, dtype=x.dtype, **({"splits": 1} | values))
    while plan.programs > 4 * plan.splits and patches < 128:
        patches *= 2
        plan = triton_plan(spec, x.shape, dtype=x.dtype, **({"splits": 1} | values | {"patches": patches}))
    return plan


def mutated(tmp_path, original, replacement):
    """The kernel's module with one line of its source changed."""
    path = Path(mnv2_fused.__file__).parent / "triton_backend" / "kernels.py"
    source = path.read_text()
    assert source.count(original) == 1, original
    changed = tmp_path / "kernels.py"
    changed.write_text(source.replace(original, replacement))
    found = importlib.util.spec_from_file_location("mnv2_fused.triton_backend.mutated_kernels", changed)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
