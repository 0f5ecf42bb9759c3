"""Compiles what the Triton planner can choose, for architectures that need not be here, and looks at the machine code.

``python benchmarks/triton_configurations.py`` writes ``benchmarks/results/triton-configurations.md``: registers,
shared memory and occupancy of each configuration. No GPU is needed.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnv2_fused import BlockSpec, TritonPlan, triton_plan
from mnv2_fused.gpus import H200, Gpu
from mnv2_fused.testing import mobilenet_v2_blocks
from mnv2_fused.triton_backend import kernels as triton_kernels
from mnv2_fused.triton_backend.launch import constants, constants_of_adding, constants_of_pooling

RESULTS = Path(__file__).parent / "results" / "triton-configurations.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# (compute capability, bytes of shared memory a kernel may ask for): A100, H100 and H200, B200
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_REGISTERS, _WARPS = 65536, 64  # of a processor


@dataclass(frozen=True)
class Compiled:
    """What one configuration became."""

    registers: int
    stack: int  # bytes of a thread, mostly spilled registers
    shared: int
    instructions: int
    ptx: str

    def occupancy(self, plan: TritonPlan, shared_per_processor: int) -> float:
        """Resident warps over the most there can be."""
        threads = 32 * plan.num_warps
        registers = -(-self.registers // 8) * 8 * threads
        resident = min(_REGISTERS // registers, shared_per_processor // (self.shared + 1024), _WARPS // plan.num_warps)
        return resident * plan.num_warps / _WARPS


def compile_for(
    plan: TritonPlan,
    spec: BlockSpec,
    dtype: torch.dtype,
    capability: int,
    tf32: bool = False,
    integers: str | int = "i32",
) -> Compiled:
    """The kernel as it is launched on channels_last input of many channels: pointers and strides of whole 16 bytes.

    ``integers``: type of sizes and strides, or the value 1, which triton compiles into the kernel.
    """
    pointers = _pointers(dtype) | {"y": "*fp32" if plan.splits > 1 else f"*{DTYPES[dtype]}"}
    return _compile(
        triton_kernels.inverted_residual_kernel,
        pointers,
        constants(plan, spec, tf32) | {"y_channel": 1} | _compiled_in(spec),
        capability,
        integers,
        {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
    )


def compile_pooling(
    plan: TritonPlan, spec: BlockSpec, dtype: torch.dtype, capability: int, tf32: bool = False
) -> Compiled:
    """The kernel that pools the depthwise results for a squeeze-and-excite."""
    return _compile(
        triton_kernels.pool_kernel,
        _pointers(dtype) | {"sums": "*fp32"},
        constants_of_pooling(plan, spec, tf32) | _compiled_in(spec),
        capability,
        "i32",
        {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
    )


def _pointers(dtype: torch.dtype) -> dict[str, str]:
    pointers = dict.fromkeys(("x", "w_expand", "w_project"), f"*{DTYPES[dtype]}")
    return pointers | dict.fromkeys(("b_expand", "w_depthwise", "b_depthwise", "b_project", "gate"), "*fp32")


def _compiled_in(spec: BlockSpec) -> dict[str, int]:
    """Rows and columns of padding that triton compiles into the kernel: where they are 1."""
    left, _, top, _ = spec.padding_of(16, 16)
    return {name: 1 for name, size in {"top": top, "left": left}.items() if size == 1}


def compile_adding(spec: BlockSpec, dtype: torch.dtype, capability: int, integers: str | int = "i32") -> Compiled:
    """The kernel that adds the splits' sums."""
    pointers = {"partial": "*fp32", "b_project": "*fp32", "x": f"*{DTYPES[dtype]}", "y": f"*{DTYPES[dtype]}"}
    fixed = constants_of_adding(5, spec) | {"y_channel": 1}
    return _compile(triton_kernels.add_splits_kernel, pointers, fixed, capability, integers, {})


def _compile(
    kernel: triton.JITFunction,
    pointers: dict[str, str],
    fixed: dict[str, object],
    capability: int,
    integers: str | int,
    options: dict[str, int],
) -> Compiled:
    names = kernel.arg_names
    pointers = {name: kind for name, kind in pointers.items() if name in names}
    if integers == 1:
        fixed = dict.fromkeys([n for n in names if n not in pointers], 1) | fixed
    signature = {n: "constexpr" if n in fixed else pointers.get(n, integers) for n in names}
    aligned = [n for n in names if n not in fixed and (n in pointers or n.startswith(("x_", "y_")))]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(found.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _run("cuobjdump", "-sass", cubin.name)
    registers, stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE))
    return Compiled(registers, stack, found.metadata.shared, instructions, found.asm["ptx"])


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout


def gpu_with(shared: int) -> Gpu:
    return H200._replace(
        name=f"a GPU with {shared // 1024} KiB", shared_per_block=shared, shared_per_processor=shared + 1024
    )


def chosen(
    dtype: torch.dtype, gpu: Gpu = H200, batches: tuple[int, ...] = (1, 16, 256)
) -> list[tuple[BlockSpec, TritonPlan]]:
    """Each kernel that MobileNetV2 at 224 is compiled to: the planner's first choice of every block and batch."""
    found: dict[tuple, tuple[BlockSpec, TritonPlan]] = {}
    for batch in batches:
        for spec, size in mobilenet_v2_blocks(224):
            plan = triton_plan(spec, (batch, spec.in_channels, *size), dtype=dtype, gpu=gpu)
            found.setdefault(tuple(constants(plan, spec, False).values()) + tuple(plan.tile), (spec, plan))
    return list(found.values())


# Blocks of other networks, as they come: MobileNetV3-Large, EfficientNet-B0, DeepLab's and TensorFlow's MobileNetV2.
OTHERS = [
    (BlockSpec(40, 120, 40, residual=True, kernel=5, activation="relu", squeeze_channels=32), 28),
    (BlockSpec(80, 184, 80, residual=True, activation="hardswish"), 14),
    (BlockSpec(160, 960, 160, residual=True, kernel=5, activation="hardswish", squeeze_channels=240), 7),
    (
        BlockSpec(
            *(24, 144, 40),
            stride=2,
            kernel=5,
            activation="silu",
            squeeze_channels=6,
            squeeze_activation="silu",
            gate="sigmoid",
        ),
        56,
    ),
    (
        BlockSpec(
            *(32, 32, 16),
            expand=False,
            activation="silu",
            squeeze_channels=8,
            squeeze_activation="silu",
            gate="sigmoid",
        ),
        112,
    ),
    (BlockSpec(96, 576, 96, residual=True, dilation=2), 28),
    (BlockSpec(16, 96, 24, stride=2, padding="same"), 112),
]


def digest() -> str:
    """Of the code that decides the table: kernel, planner, GPUs and this file, without comments and docstrings."""
    package = Path(triton_kernels.__file__).parent.parent
    text = ""
    for file in (Path(triton_kernels.__file__), package / "plans/triton.py", package / "gpus.py", Path(__file__)):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        text += ast.dump(tree)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compiler() -> str:
    return f"triton {triton.__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"


def table() -> str:
    header = [
        "| block | dtype | patch | patches | group | splits | warps | registers | estimated | stack | shared KiB "
        "| estimated | occupancy | instructions |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines = [
        "# The Triton kernel's configurations, compiled",
        "",
        "Made by `python benchmarks/triton_configurations.py` with no GPU: what `ptxas` reports of each kernel that",
        "MobileNetV2 1.0 at 224 runs as at batch 1, 16 or 256, for compute capability 9.0. Patch: outputs of one row",
        "of the products. Stack: bytes a thread spills, mostly. Instructions: of the whole kernel. Not a measurement",
        f"of speed. {compiler()}, sources {digest()}.",
        "",
        *header,
    ]

    def add(spec: BlockSpec, dtype: torch.dtype, p: TritonPlan, c: Compiled, note: str = "") -> None:
        lines.append(
            f"| {spec}{note} | {DTYPES[dtype]} | {p.tile_rows}x{p.tile_cols} | {p.patches} | {p.group} | {p.splits} "
            f"| {p.num_warps} | {c.registers} | {p.registers} | {c.stack} | {c.shared / 1024:.0f} "
            f"| {p.shared_bytes / 1024:.0f} | {c.occupancy(p, H200.shared_per_processor):.2f} | {c.instructions} |"
        )
        print(lines[-1], flush=True)

    for dtype in DTYPES:
        for spec, p in chosen(dtype):
            add(spec, dtype, p, compile_for(p, spec, dtype, 90))
    lines += ["", "Blocks of other networks, at batch 256; of a squeeze-and-excite both passes:", "", *header]
    for dtype in DTYPES:
        for spec, size in OTHERS:
            p = triton_plan(spec, (256, spec.in_channels, size, size), dtype=dtype)
            if spec.squeeze_channels:
                add(spec, dtype, p, compile_pooling(p, spec, dtype, 90), ", first pass")
            add(spec, dtype, p, compile_for(p, spec, dtype, 90))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    RESULTS.write_text(table())
