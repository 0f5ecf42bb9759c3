"""The Triton kernel with a plan of few programs, and with changed source."""

import importlib.util
import sys
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
    """The kernels' module with one line of its source, or of the parts', changed."""
    folder = Path(mnv2_fused.__file__).parent / "triton_backend"
    sources = {name: (folder / f"{name}.py").read_text() for name in ("parts", "kernels")}
    assert sum(source.count(original) for source in sources.values()) == 1, original
    for name, source in sources.items():
        changed = tmp_path / f"{name}.py"
        source = source.replace("from .parts import", "from .mutated_parts import")
        changed.write_text(source.replace(original, replacement))
        found = importlib.util.spec_from_file_location(f"mnv2_fused.triton_backend.mutated_{name}", changed)
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # where the kernels look for the parts
        found.loader.exec_module(module)
    return module
