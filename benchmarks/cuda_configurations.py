"""Compiles the CUDA kernels for GPUs that need not be here, and looks at the machine code.

``python benchmarks/cuda_configurations.py`` writes ``benchmarks/results/cuda-configurations.md``: registers, spills and
tensor-core instructions of every kernel on every architecture. Needs nvcc, and Triton for its disassembler; no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch.utils.cpp_extension import CUDA_HOME

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
RESULTS = Path(__file__).parent / "results" / "cuda-configurations.md"
# Of what setup.py builds for: 8.6 and 8.9 get the code of 8.0 but for up to six registers more in float32; 9.0 as 9.0a.
ARCHITECTURES = ("75", "80", "90a", "100", "120")
FORMS = ("MobileNetV2's", "3x3", "5x5", "stem and MobileNetV2's first")
PRECISIONS = ("half", "bfloat16", "tf32", "float32")
# bfloat16 and TF32 products came with 8.0; for 7.5 nothing of them is ever launched.
PAIRS = [(a, p) for a in ARCHITECTURES for p in PRECISIONS if a != "75" or p in ("half", "float32")]


@dataclass(frozen=True)
class Kernel:
    """One instantiation, for one architecture."""

    form: str  # of csrc/cuda/variant.h
    stride: int
    strip_rows: int
    out_channels: int  # that its sums have room for; none in the first pass of a squeeze-and-excite
    registers: int
    stack: int
    spilled: int  # bytes stored and loaded
    products: int  # tensor-core instructions
    wide_loads: int  # 16 bytes from global memory to shared memory or registers
    wide_stores: int  # 16 bytes to global memory
    local: int  # instructions on local memory
    instructions: int
    waits: bool  # once, for the kernel before it, and then lets the next one start; until there it only copies


def nvcc() -> str | None:
    """The compiler, if there is one."""
    found = Path(CUDA_HOME or "/nowhere") / "bin" / "nvcc"
    return str(found) if found.exists() else None


@cache
def compiler() -> str:
    """Its version."""
    text = subprocess.run([nvcc() or "nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + re.findall(r"V([\d.]+)", text)[0]


def _disassembler() -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, "needs triton: pip install triton"
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _waits(lines: list[str]) -> bool:
    global_or_order = r"\b(ACQBULK|PREEXIT|LDGSTS|LDG|LD|STG|ST|ATOMG|RED)\b"
    order = [found[0] for line in lines if (found := re.search(global_or_order, line))]
    if "ACQBULK" not in order:
        return False
    at = order.index("ACQBULK")
    return (
        set(order[:at]) <= {"LDGSTS"} and order[at + 1] == "PREEXIT" and not {"ACQBULK", "PREEXIT"} & {*order[at + 2 :]}
    )


def compile_for(architecture: str, precision: str) -> list[Kernel]:
    """Every kernel of a precision; raises CalledProcessError when the compiler does."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc(), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
        command += ["-cubin", "-o", str(cubin), str(SOURCES / f"kernels_{precision}.cu")]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        dump = [_disassembler(), "-sass", str(cubin)]
        code = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    found = []
    pattern = r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    for name, stack, stores, loads, registers in re.findall(pattern + r"Used (\d+) registers", report, re.DOTALL):
        if "inverted_residual_kernel" not in name:
            continue
        stride, tiles, panels = map(int, re.findall(r"Li(\d+)E", name)[-3:])
        form = FORMS[int(re.findall(r"FormE(\d)E", name)[0])]
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", bodies[name], re.MULTILINE)

        def count(regex: str, lines: list[str] = lines) -> int:
            return sum(re.search(regex, line) is not None for line in lines)

        numbers = {
            "products": count(r"\bHMMA\b"),
            "wide_loads": count(r"\b(LDG|LDGSTS)\.\S*128"),
            "wide_stores": count(r"\bSTG\.\S*128"),
            "local": count(r"\b(LDL|STL)\b"),
            "instructions": len(lines),
            "waits": _waits(lines),
        }
        spilled = int(stores) + int(loads)
        found.append(Kernel(form, stride, 2 * tiles, 16 * panels, int(registers), int(stack), spilled, **numbers))
    return sorted(found, key=lambda k: (FORMS.index(k.form), k.strip_rows, k.out_channels, k.stride))


@cache
def compiled(pairs: tuple[tuple[str, str], ...]) -> dict[tuple[str, str], list[Kernel]]:
    """Of these architectures and precisions, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(pairs, pool.map(lambda pair: compile_for(*pair), pairs), strict=True))


def cell(k: Kernel) -> str:
    """What the table says of it."""
    return f"{k.registers} / {k.products} / {k.wide_loads}, {k.wide_stores}"


def kept(architecture: str, precision: str) -> list[str]:
    """The cells of one column in the file."""
    section = RESULTS.read_text().split(f"\n## {precision}\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.split("|")] for line in section.splitlines() if line.startswith("|")]
    column = rows[0].index("sm_" + architecture)
    return [row[column] for row in rows[2:]]


def table() -> str:
    """The file."""
    kernels = compiled(tuple(PAIRS))
    lines = [
        "# The CUDA kernels, compiled",
        "",
        "Made by `python benchmarks/cuda_configurations.py` with no GPU: what `ptxas` and the disassembly say of each",
        "kernel. Block: MobileNetV2's own, or any with a depthwise kernel of 3x3 or 5x5, or MobileNetV2's first with",
        "the stem. Strip rows, outputs: what a warp's sums have room for; none in the first pass of a",
        "squeeze-and-excite. Cells: registers a lane / tensor-core instructions / 16-byte loads from and stores to",
        "global memory. No kernel spills a register or",
        f"uses local memory. Not a measurement of speed. {compiler()}.",
        "",
        f"{sum(map(len, kernels.values()))} kernels, {max(len(k) for k in kernels.values())} at most of one precision.",
    ]
    for precision in PRECISIONS:
        columns = [a for a, p in PAIRS if p == precision]
        heads = ["block, strip rows, outputs, stride", *("sm_" + a for a in columns)]
        lines += ["", f"## {precision}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in zip(*(kernels[a, precision] for a in columns), strict=True):
            first = row[0]
            cells = map(cell, row)
            assert not any(k.spilled or k.local for k in row), row
            assert [k.waits for k in row] == [int(a.rstrip("a")) >= 90 for a in columns], row
            name = f"{first.form}, {first.strip_rows}, {first.out_channels}, {first.stride}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if nvcc() is None:
        sys.exit("needs nvcc: install the CUDA toolkit, or point CUDA_HOME at it")
    RESULTS.write_text(table())
