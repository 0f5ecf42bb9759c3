"""Builds and calls the CUDA kernel's emulation on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnv2_fused import BlockSpec, CudaPlan, PackedWeights
from mnv2_fused.encoding import BLOCK_FIELDS, shape_of
from mnv2_fused.spec import stem_size

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fmax-errors=3"]
FLAGS = ["-std=c++20", "-O2", "-g0", "-shared", "-fPIC", *WARNINGS]


def compiled(target: Path, source: Path, *options: str) -> subprocess.Popen:
    """Starts to compile one shared library; see :func:`loaded`."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the emulation switches stacks as an x86-64 does, this is {platform.machine()}")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler, {compiler} is not installed")
    command = [compiler, *FLAGS, f"-I{HERE}", *options, str(source), "-o", str(target)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finished(compilation: subprocess.Popen) -> None:
    output, _ = compilation.communicate()
    assert compilation.returncode == 0, output


def loaded(compilation: subprocess.Popen) -> ctypes.CDLL:
    """The library, once it is compiled."""
    _finished(compilation)
    return ctypes.CDLL(compilation.args[-1])


# Of a kernel that runs once; what a change leaves unused is no error.
ONCE = ["-w", "-O0"]


def precompiled_headers(folder: Path) -> Path:
    """The emulation's own headers, for many a :func:`compiled_kernel` of changed sources: half of its time."""
    header = folder / "headers.h"
    header.write_text('#include "emulated_device.h"\n')
    _finished(compiled(folder / "headers.h.gch", header, *ONCE, "-x", "c++-header"))
    return header


def compiled_kernel(
    target: Path,
    precision: str,
    csrc: Path | None = None,
    only: tuple[str, int, int, int] | None = None,
    headers: Path | None = None,
) -> subprocess.Popen:
    """Starts to compile the kernels of one precision, or those of ``only``'s form, stride, tiles and output panels.

    ``headers`` are :func:`precompiled_headers`, of kernels with ``only``.
    """
    options = [f"-I{(csrc or CSRC) / 'cuda'}", f"-DEMULATED_PRECISION={precision}"]
    if only is not None:
        names = "FORM", "STRIDE", "TILES", "OUT_PANELS"
        options += ONCE if headers is None else [*ONCE, "-include", str(headers)]
        options += [f"-DEMULATED_{name}={value}" for name, value in zip(names, only, strict=True)]
    return compiled(target, HERE / "emulate.cpp", *options)


class _Shape(ctypes.Structure):  # csrc/block.h: all but a few are numbers of eight bytes, a double its bits
    _fields_ = [
        (
            name,
            ctypes.c_int8
            if name in ("expand", "residual", "gate", "activates_sum") or "activation" in name
            else ctypes.c_int64,
        )
        for name in BLOCK_FIELDS
    ]


class _Plan(ctypes.Structure):  # csrc/cuda/plan.h
    _fields_ = [
        (field.name, {"int": ctypes.c_int64, "float": ctypes.c_double}[field.type]) for field in fields(CudaPlan)
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


def _buffer(t: Tensor | None) -> _Buffer:
    """A tensor's memory, from its first element to its last, gaps included."""
    if t is None:
        return _Buffer(None, 0)
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return _Buffer(t.data_ptr(), (last + 1) * t.itemsize)


def _shape(spec: BlockSpec, x: Tensor, stem: str | None) -> _Shape:
    n, channels, height, width = x.shape
    if stem is None:
        return _Shape(**shape_of(spec, n, height, width))
    return _Shape(**shape_of(spec, n, stem_size(height), stem_size(width), (stem, channels, height, width)))


def _strides(x: Tensor) -> ctypes.Array:
    return (ctypes.c_int64 * 4)(x.stride(0), x.stride(2), x.stride(3), x.stride(1))


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def emulated_inverted_residual(
    library: ctypes.CDLL,  # of one precision
    x: Tensor,  # [N, C_in, H, W]
    packed: PackedWeights,  # for backend "cuda" and x's dtype
    spec: BlockSpec,
    plan: CudaPlan,
    seed: int = 0,
    stem: str | None = None,
) -> Tensor:  # [N, C_out, H', W']
    """The block as the CUDA kernel computes it.

    Raises RuntimeError where a thread does what a GPU must not be asked to do. ``seed`` decides the threads' order.
    ``stem``: the activation of a stem in front of it, whose weights are the packed ``w_expand`` and ``b_expand``.
    """
    if stem is None and x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    shape = _shape(spec, x, stem)
    nan = float("nan")
    y = torch.full((x.shape[0], *spec.out_size(shape.height, shape.width), spec.out_channels), nan, dtype=x.dtype)
    partial = torch.full((plan.splits, *y.shape), nan) if plan.splits > 1 else None
    squeezed = torch.full((plan.squeeze_bytes // 4,), nan) if plan.squeeze_bytes else None
    tensors = (x, *packed, y, partial, squeezed)
    buffers = (_Buffer * len(tensors))(*map(_buffer, tensors))

    library.emulate.restype = ctypes.c_char_p
    plan = ctypes.byref(_Plan(*astuple(plan)))
    _check(library.emulate(ctypes.byref(shape), plan, buffers, _strides(x), ctypes.c_uint64(seed)))
    return y.permute(0, 3, 1, 2)


def emulated_sequence(
    library: ctypes.CDLL,  # of one precision
    x: Tensor,  # [N, C, H, W]
    weights: Tensor,  # [bytes], joined
    specs: Sequence[BlockSpec],
    plans: Sequence[CudaPlan],
    stem: str | None = None,
    seed: int = 0,
) -> Tensor:  # [N, C_out, H', W']
    """Blocks in a row, the first of which may have a stem in front of it."""
    if stem is None and x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    n = x.shape[0]
    shapes, size = [], x
    for i, spec in enumerate(specs):
        shapes.append(_shape(spec, size, stem if i == 0 else None))
        out = spec.out_size(shapes[-1].height, shapes[-1].width)
        size = torch.empty(n, spec.out_channels, *out, device="meta")
    nan = float("nan")
    y = torch.full((n, *size.shape[2:], size.shape[1]), nan, dtype=x.dtype)
    arguments = (
        (_Shape * len(shapes))(*shapes),
        (_Plan * len(plans))(*(_Plan(*astuple(plan)) for plan in plans)),
        ctypes.c_int64(len(shapes)),
    )
    library.sequence_memory.restype = ctypes.c_int64
    memory = torch.full((-(-library.sequence_memory(*arguments) // 4),), nan)
    tensors = (x, weights, memory, y)
    buffers = (_Buffer * len(tensors))(*map(_buffer, tensors))
    library.emulate_sequence.restype = ctypes.c_char_p
    _check(library.emulate_sequence(*arguments, buffers, _strides(x), ctypes.c_uint64(seed)))
    return y.permute(0, 3, 1, 2)
