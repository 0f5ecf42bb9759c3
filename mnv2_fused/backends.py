"""Which compiled kernels are here, which can run on a device, and why the others cannot.

Importing never fails: a library that does not load is a reason, not an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

try:
    _C: Any = importlib.import_module("mnv2_fused._C")
except ImportError as _error:  # a source checkout that was never built, or a torch older than the build
    _C = None
    _load_error: str | None = str(_error)
else:
    _load_error = None


def _load_cuda() -> tuple[Any, str | None]:
    """The CUDA kernel's library, or why there is none. It needs CUDA's own, which another torch may not bring."""
    if _C is None:
        return None, f"the compiled library does not load: {_load_error}"
    if _C.no_cuda is not None:
        return None, f"it was not built: {_C.no_cuda}"
    try:
        _cuda = importlib.import_module("mnv2_fused._cuda")
        _cuda.allow_early_starts(os.environ.get("MNV2_FUSED_PDL") != "0")
    except (ImportError, AttributeError) as error:  # the second of a library that is older than this file
        return None, f"it does not load with torch {torch.__version__}: {error}"
    return _cuda, None


_cuda, _cuda_error = _load_cuda()


def refuse_library(why: str) -> None:
    """Treats the compiled library as one that does not load: it is older or newer than these files."""
    global _C, _load_error, _cuda, _cuda_error
    _C, _load_error = None, why
    _cuda, _cuda_error = _load_cuda()


BACKENDS = ("auto", "cpu", "cuda", "triton", "eager")


# Of a GPU, at least: csrc/cuda has code for Turing's tensor cores, Triton none for what came before the A100.
_LEAST_CAPABILITY = {"cuda": (7, 5), "triton": (8, 0)}


def _gpu_reason(backend: str, device: torch.device | None) -> str | None:
    """Why no GPU here is one that ``backend`` could run on; None when one is."""
    if device is not None and device.type != "cuda":
        return f"it takes CUDA tensors, got one on {device}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    capability, least = torch.cuda.get_device_capability(device), _LEAST_CAPABILITY[backend]
    if capability < least:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability {_dotted(least)}, {name} has {_dotted(capability)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@torch.compiler.assume_constant_result
def _cuda_reason(device: torch.device | None) -> str | None:
    """Why the CUDA kernel cannot run on ``device``, or on any here; None when it can."""
    return _cuda_reason_here(device)


@functools.cache
def _cuda_reason_here(device: torch.device | None) -> str | None:
    if _cuda_error is not None:
        return _cuda_error
    if (why := _gpu_reason("cuda", device)) is not None:
        return why
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(_cuda.architectures, capability):
        return (
            f"it was built for {_cuda.architectures}, {torch.cuda.get_device_name(device)} has compute capability "
            f"{_dotted(capability)}: build it with TORCH_CUDA_ARCH_LIST={_dotted(capability)}"
        )
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, "sm_80 sm_90 compute_90", runs on a GPU of this capability.

    Code of an architecture runs on later ones of the same generation, PTX ("compute") on all later ones.
    """
    number = 10 * capability[0] + capability[1]
    for kind, digits, exact in re.findall(r"(sm|compute)_(\d+)(\w?)", architectures):
        built = int(digits)
        same = built // 10 == number // 10
        if built == number or (not exact and built < number and (kind == "compute" or same)):
            return True
    return False


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@torch.compiler.assume_constant_result
def _triton_reason(device: torch.device | None) -> str | None:
    """Why the Triton kernel cannot run on ``device``, or on any here; None when it can."""
    return _triton_reason_here(device)


@functools.cache
def _triton_reason_here(device: torch.device | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if triton_interpreted():
        return None
    return _gpu_reason("triton", device)


def backend_reasons(device: torch.device | None = None) -> dict[str, str | None]:
    """Per backend, why it cannot run on this machine, or on tensors of ``device``; None when it can."""
    if _load_error is not None:
        missing = f"the compiled library does not load: {_load_error}"
        return {"cpu": missing, "cuda": missing, "triton": missing, "eager": None}
    cpu = None if device is None or device.type == "cpu" else f"it takes CPU tensors, got one on {device}"
    return {"cpu": cpu, "cuda": _cuda_reason(device), "triton": _triton_reason(device), "eager": None}


def runs(backend: str, device: torch.device) -> bool:
    """Whether ``backend`` can run on tensors of ``device``."""
    return backend_reasons(device)[backend] is None


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs tensors on ``device``: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"eager"``.

    ``"auto"`` is the CPU's own kernel, and on a GPU the CUDA kernel, or Triton's where that cannot run.

    ``MNV2_FUSED_BACKEND`` overrides ``backend``. Raises ValueError for an unknown name and RuntimeError, with
    each backend's reason, when none can run.
    """
    override = os.environ.get("MNV2_FUSED_BACKEND")
    name = override or backend
    if name in ("auto", "cpu") and device.type == "cpu" and _load_error is None:
        return "cpu"
    if name == "eager":
        return name
    if name not in BACKENDS:
        source = "MNV2_FUSED_BACKEND" if override else "backend"
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    reasons = backend_reasons(device)
    on_gpu = ("cuda", "triton") if device.type == "cuda" else ()
    for candidate in on_gpu if name == "auto" else (name,):
        if reasons[candidate] is None:
            return candidate
    asked = {b: why for b, why in reasons.items() if why is not None and name in ("auto", b)}
    move = "move the model and its input with .cpu()"
    if device.type == "cpu":  # where they are already
        move = (
            "build the extension" if name in ("auto", "cpu") else "move the model and its input to a GPU with .cuda()"
        )
    raise RuntimeError(
        f"no kernel takes this call (backend={name!r}): {'; '.join(f'{b}: {why}' for b, why in asked.items())}; "
        f"{move}, or use backend={'eager' if name in ('auto', 'cpu') else 'auto'!r}"
    )


def gpu_backend(device: torch.device) -> str:
    """The kernel, ``"cuda"`` or ``"triton"``, that weights on a GPU are packed for when nobody names one."""
    try:
        backend = resolve_backend("auto", device)
    except RuntimeError:
        backend = "eager"
    if backend in ("cuda", "triton"):
        return backend
    return "triton" if _cuda_reason(device) else "cuda"


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether convolutions on a GPU may round float32 products to TF32. A graph keeps the answer it was traced with."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by torch's newer names, for convolutions and recurrent networks unlike
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def within_functorch() -> bool:
    return peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether a torch.func transform, forward-mode differentiation or torch.jit.trace is going on.

    The op knows none of the first two, and what a trace keeps must be what others read: ordinary modules.
    """
    # Written out: every call of a block asks.
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or torch._C._is_tracing()
