"""The ops: loading, backend choice, fake kernel, autograd and autocast.

``torch.ops.mnv2_fused.inverted_residual`` takes packed weights (see :mod:`mnv2_fused.fold`). Its schema and CPU
kernel are registered from C++ (``csrc/ops.cpp``); everything here is what the C++ stable ABI has no call for.
``inverted_residual_cuda`` is the same by the CUDA kernel (``csrc/cuda/op.cpp``), ``inverted_residual_triton`` by
the Triton kernel (:mod:`mnv2_fused.triton_launch`).
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .fold import FRAGMENT, PackedWeights, cast_fragments, unpack

try:
    from . import _C
except ImportError as error:  # a source checkout that was never built, or a torch older than the build
    _C = None
    _load_error: str | None = str(error)
else:
    _load_error = None


def _load_cuda():
    """The CUDA kernel's library, or why there is none. It needs CUDA's own, which another torch may not bring."""
    if _C is None:
        return None, f"the compiled library does not load: {_load_error}"
    if _C.no_cuda is not None:
        return None, f"it was not built: {_C.no_cuda}"
    try:
        from . import _cuda

        _cuda.allow_early_starts(os.environ.get("MNV2_FUSED_PDL") != "0")
    except (ImportError, AttributeError) as error:  # the second of a library that is older than this file
        return None, f"it does not load with torch {torch.__version__}: {error}"
    return _cuda, None


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
    raise RuntimeError(
        f"no kernel takes this call (backend={name!r}): {'; '.join(f'{b}: {why}' for b, why in asked.items())}; "
        "move the model and its input with .cpu(), or use backend='eager'"
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
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def within_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is going on: the op knows neither."""
    return within_functorch() or forward_ad._current_level >= 0


def packed_inverted_residual(
    x: Tensor,  # [N, C_in, H, W]
    packed: PackedWeights,
    stride: int,
    residual: bool,
    plan: Sequence[int] = (),
    backend: str = "cpu",
    options: tuple[Any, ...] = (),
) -> Tensor:  # [N, C_out, H', W']
    """The op itself, skipping the Python part of autograd where nothing records. ``options``: of a BlockSpec."""
    family = torch.ops.mnv2_fused
    arguments = (x, *packed, stride, residual, plan, *options) if plan or options else (x, *packed, stride, residual)
    if backend == "cuda":
        op = family.inverted_residual_cuda.default
        tf32 = x.dtype == torch.float32 and tf32_allowed()
        arguments = (x, *packed, stride, residual, plan, *(options or _PLAIN), tf32)
    else:
        op = family.inverted_residual_triton.default if backend == "triton" else family.inverted_residual.default
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


# Dilation, padding and activations of MobileNetV2's block: the op's defaults.
_PLAIN = (1, (), 0, 2, 1, 0)


def sequence(x: Tensor, weights: Tensor, geometry: list[int], backend: str = "cpu") -> Tensor:
    """``mnv2_fused::sequence`` where nothing records: it has no derivative (see :mod:`mnv2_fused.sequence`)."""
    op, arguments = torch.ops.mnv2_fused.sequence.default, (x, weights, geometry)
    if backend == "cuda":
        op = torch.ops.mnv2_fused.sequence_cuda.default
        arguments = (*arguments, x.dtype == torch.float32 and tf32_allowed())
    if torch.is_inference_mode_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


class LayerKind(enum.IntEnum):
    """What a layer of the op's ``layers`` is; csrc/layers.h has its twin.

    Seven values tell of each layer: kind, C_in, E (of a block), C_out, stride, residual, and how many further ones
    follow. None do for what MobileNetV2 has. Else a block's are kernel, dilation, padding left, right, top and bottom
    (-1: "same"), activation, of the output, channels of a squeeze-and-excite, its activation and gate, and activation
    of a stem; another layer's is its activation. Numbers of activations and gates are those of block.py.
    """

    BLOCK = 0
    BLOCK_WITHOUT_EXPAND = 1
    STEM_AND_BLOCK = 2
    POINTWISE = 3
    POOLED = 4
    LINEAR = 5


def split_layers(layers: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(the first six values, further ones) of each layer of the op's ``layers``."""
    first = 0
    while first < len(layers):
        end = first + 7 + layers[first + 6]
        yield layers[first : first + 6], layers[first + 7 : end]
        first = end


def sequence_fake(x: Tensor, weights: Tensor, layers: Sequence[int], tf32: bool = False) -> Tensor:
    """An uninitialised result, as the kernels give it: channels_last."""
    torch._check(x.dim() == 4, lambda: f"x must be [N, C, H, W], got {list(x.shape)}")
    if weights.device != x.device:
        raise RuntimeError(f"x is on {x.device} but the packed weights are on {weights.device}; move one with .to()")
    n, c_out, height, width = x.shape
    for values, further in split_layers(layers):
        kind, _, _, c_out, stride, _ = values
        if kind == LayerKind.STEM_AND_BLOCK:
            height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        if kind <= LayerKind.STEM_AND_BLOCK:
            kernel, dilation, left, right, top, bottom = further[:6] or (3, 1, 1, 1, 1, 1)
            # SAME: as many outputs as the stride allows, whatever the kernel.
            around = 1 if left == -1 else dilation * (kernel - 1) + 1
            rows, columns = (0, 0) if left == -1 else (top + bottom, left + right)
            height, width = (height + rows - around) // stride + 1, (width + columns - around) // stride + 1
        if kind == LayerKind.POOLED:
            height = width = 1
    shape = n, c_out, height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sequence_backward(ctx, grad):
    raise RuntimeError(
        "mnv2_fused::sequence has no derivative, nor has sequence_cuda: they are for calls where nothing records "
        "gradients: use torch.no_grad(), or run the modules one by one"
    )


def _is_channels_last(x: Tensor) -> bool:
    """Torch's own strides test (ambiguous shapes count as contiguous); csrc/binding.cpp has its twin."""
    if x.stride(1) == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = x.size(dim), x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def empty_output(x: Tensor, out_channels: int, out_size: tuple[int, int]) -> Tensor:
    """An uninitialised result with the strides the kernel gives it."""
    return torch.empty(
        (x.shape[0], out_channels, *out_size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format,
    )


_TENSORS = 1 + len(PackedWeights._fields)  # that the op takes, before all else


def _spec(x: Tensor, packed: PackedWeights, stride: int, residual: bool, plan=(), *options):
    from .block import BlockSpec, check_input  # which imports this module

    check_input(x, x.shape[1] if x.dim() == 4 else -1)
    spec = BlockSpec.of_op(packed, x.shape[1], stride, residual, *options[:6])  # behind them, whether TF32 may be
    check_input(x, spec.in_channels, spec)
    return spec


def _fake(x, *arguments):
    packed = PackedWeights(*arguments[: _TENSORS - 1])
    torch._check(x.dim() == 4, lambda: f"x must be [N, C_in, H, W], got {list(x.shape)}")
    for t in packed:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"x is on {x.device} but packed weights are on {t.device}; move one with .to()")
    spec = _spec(x, packed, *arguments[_TENSORS - 1 :])
    return empty_output(x, spec.out_channels, spec.out_size(*x.shape[2:]))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.others = inputs[_TENSORS:]


def _backward(ctx, grad: Tensor):
    """Recomputes both expanded tensors; only the block's input and weights were kept.

    Through torch's own derivatives, so that it traces under torch.compile and has a derivative itself.
    """
    from .block import in_torch  # which imports this module

    x, *packed = ctx.saved_tensors
    spec = _spec(x, PackedWeights(*packed), *ctx.others)
    dtype = packed[5].dtype  # b_project's: what sums are in

    def block(x: Tensor, *given: Tensor) -> Tensor:
        tensors = iter(given)
        weights = unpack(PackedWeights(*(None if t is None else next(tensors) for t in packed)), spec.in_channels)
        return in_torch(x.to(dtype), weights._make(None if t is None else t.to(dtype) for t in weights), spec)

    _, pullback = torch.func.vjp(block, x, *(t for t in packed if t is not None))
    x_grad, *grads = pullback(grad.to(dtype))
    left = iter(grads)
    return x_grad, *(None if t is None else next(left).contiguous() for t in packed), *[None] * len(ctx.others)


def autocast_rule(op: torch._ops.OpOverload):
    """Under autocast the kernel keeps float32 and only its result takes autocast's dtype, as a conv's would.

    Weights that are packed as bfloat16 have no more precision to keep.
    """

    place = next(i for i, a in enumerate(op._schema.arguments) if a.name == "residual") - 1

    def run(x: Tensor, *rest):
        dtype = torch.get_autocast_dtype("cpu")
        if rest[place]:  # a conv's result plus x, which autocast leaves as it is
            dtype = torch.promote_types(dtype, x.dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            if x.dtype == torch.float64:  # autocast leaves double alone
                return op(x, *rest)
            is_bfloat16 = any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in rest)
            return op(x.bfloat16() if is_bfloat16 else x.float(), *rest).to(dtype)

    return run


def half_autocast_rule(op: torch._ops.OpOverload, device: str, products: Sequence[int] = ()):
    """Under autocast the kernel computes in autocast's dtype, as a GPU's convolutions do.

    ``products``: which of the arguments after x are weights of 1x1 products, to be cast with it.
    """

    def cast_product(t: Tensor, dtype: torch.dtype) -> Tensor:
        return cast_fragments(t, dtype) if t.shape[-1] == FRAGMENT else t.to(dtype)

    place = next(i for i, a in enumerate(op._schema.arguments) if a.name == "residual") - 1
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def run(x: Tensor, *rest):
        dtype = torch.get_autocast_dtype(device.lower())
        with torch._C._ExcludeDispatchKeyGuard(key):
            if x.dtype == torch.float64:  # autocast leaves double alone
                return op(x, *rest)
            cast = [cast_product(t, dtype) if i in products and t is not None else t for i, t in enumerate(rest)]
            if not rest[place] or torch.promote_types(x.dtype, dtype) == dtype:
                return op(x.to(dtype), *cast)
            cast[place] = False  # a convolution's result plus x, which autocast leaves as it is
            return op(x.to(dtype), *cast) + x

    return run


def _inverted_residual_triton(*arguments):
    from .triton_launch import inverted_residual_triton  # imports triton, which takes its time

    return inverted_residual_triton(*arguments)


if _C is not None:
    for _name in ("inverted_residual", "inverted_residual_cuda", "inverted_residual_triton"):
        torch.library.register_fake(f"mnv2_fused::{_name}", _fake)
        torch.library.register_autograd(f"mnv2_fused::{_name}", _backward, setup_context=_setup_context)
    for _name in ("sequence", "sequence_cuda"):
        torch.library.register_fake(f"mnv2_fused::{_name}", sequence_fake)
        torch.library.register_autograd(f"mnv2_fused::{_name}", _sequence_backward)
    _library = torch.library.Library("mnv2_fused", "IMPL")
    _library.impl("inverted_residual", autocast_rule(torch.ops.mnv2_fused.inverted_residual.default), "AutocastCPU")
    _op = torch.ops.mnv2_fused.inverted_residual_cuda.default
    _library.impl("inverted_residual_cuda", half_autocast_rule(_op, "CUDA", (0, 4)), "AutocastCUDA")
    for _device in ("CUDA", "CPU") if triton_interpreted() else ("CUDA",):
        _op = torch.ops.mnv2_fused.inverted_residual_triton.default
        _library.impl("inverted_residual_triton", _inverted_residual_triton, _device)
        _library.impl("inverted_residual_triton", half_autocast_rule(_op, _device, (0, 4)), f"Autocast{_device}")
