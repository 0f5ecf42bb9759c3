"""The ops: calls, fake kernels, autograd and autocast.

``torch.ops.mnv2_fused.inverted_residual`` takes packed weights (see :mod:`mnv2_fused.fold`). Its schema and CPU
kernel are registered from C++ (``csrc/ops.cpp``, ``csrc/cpu/op.cpp``); everything here is what the C++ stable ABI has
no call for.
``inverted_residual_cuda`` is the same by the CUDA kernel (``csrc/cuda/op.cpp``), ``inverted_residual_triton`` by
the Triton kernel (:mod:`mnv2_fused.triton_backend.launch`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .encoding import PLAIN_OPTIONS, rest_activates_sum
from .flops import count_flops, multiply_adds, row_multiply_adds, sizes_of_layers
from .fold import PackedWeights, cast_product, unpack
from .plans import cuda as cuda_plans
from .plans import triton as triton_plans
from .reference import in_torch
from .spec import BlockSpec
from .tensors import check_input, empty_output


def missing_kernel(backend: str, spec: BlockSpec) -> str | None:
    """What of such a block ``backend`` has no kernel for, in words; None where it takes the block."""
    if backend == "triton":
        why = triton_plans.unsupported(torch.float16, spec)  # dtypes are the op's to refuse
        why = why or triton_plans.does_not_fit(spec)
        return None if why is None else why.removesuffix("; use backend='eager'")
    if backend == "cuda":
        return cuda_plans.missing_kernel(spec)
    return None


def kernel_for(spec: BlockSpec, backend: str, device: torch.device) -> tuple[str, str | None]:
    """The backend that runs such a block on ``device``, and, where "auto" finds no kernel for it, why.

    Raises as :func:`mnv2_fused.backends.resolve_backend`, and RuntimeError where a named backend does not take the
    block.
    """
    return kernel_instead(backends.resolve_backend(backend, device), spec, backend, device)


def kernel_instead(found: str, spec: BlockSpec, asked: str, device: torch.device) -> tuple[str, str | None]:
    """``found``, the backend that ``asked`` resolved to, or what runs such a block instead; why, where that is eager.

    Raises RuntimeError where ``asked`` names that backend: only "auto" may run the block another way.
    """
    reason = missing_kernel(found, spec)
    if reason is None:
        return found, None
    if (os.environ.get("MNV2_FUSED_BACKEND") or asked) != "auto":
        raise RuntimeError(f"{reason} (backend={found!r}); use backend='auto' or 'eager', or unfuse the model")
    if found == "cuda" and backends.runs("triton", device) and missing_kernel("triton", spec) is None:
        return "triton", None  # which is compiled for each block, so that none is too rare for it
    return "eager", reason


def packed_inverted_residual(
    x: Tensor,  # [N, C_in, H, W]
    packed: PackedWeights,
    stride: int,
    residual: bool,
    plan: Sequence[int] = (),
    backend: str = "cpu",
    op_options: tuple[Any, ...] = (),
) -> Tensor:  # [N, C_out, H', W']
    """The op itself, skipping the Python part of autograd where nothing records.

    ``op_options``: what :meth:`mnv2_fused.spec.BlockSpec.options` returns.
    """
    family = torch.ops.mnv2_fused
    if plan or op_options:
        arguments = (x, *packed, stride, residual, plan, *op_options)
    else:
        arguments = (x, *packed, stride, residual)
    if backend == "cuda":
        op = family.inverted_residual_cuda.default
        tf32 = x.dtype == torch.float32 and backends.tf32_allowed()
        first, last = op_options[:6] or PLAIN_OPTIONS, op_options[6:]
        arguments = (x, *packed, stride, residual, plan, *first, tf32, *last)
    else:
        op = family.inverted_residual_triton.default if backend == "triton" else family.inverted_residual.default
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def sequence(x: Tensor, weights: Tensor, geometry: list[int], backend: str = "cpu") -> Tensor:
    """``mnv2_fused::sequence`` where nothing records: it has no derivative (see :mod:`mnv2_fused.sequence`)."""
    op, arguments = torch.ops.mnv2_fused.sequence.default, (x, weights, geometry)
    if backend == "cuda":
        op = torch.ops.mnv2_fused.sequence_cuda.default
        arguments = (*arguments, x.dtype == torch.float32 and backends.tf32_allowed())
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def sequence_row(x: Tensor, weights: Tensor, layers: Tensor, flat: bool) -> Tensor:
    """:func:`sequence` on the CPU, outside of graphs. ``layers``: its geometry, int64; ``flat``: [N, C H W]."""
    if torch.is_inference_mode_enabled():
        return _row_op(x, weights, layers, flat)
    with torch._C._AutoDispatchBelowAutograd():
        return _row_op(x, weights, layers, flat)


def int8_row(x: Tensor, weights: Tensor, layers: Sequence[int]) -> Tensor:
    """``mnv2_fused::int8_sequence`` where nothing records; see :mod:`mnv2_fused.int8.packing`."""
    if torch.compiler.is_compiling():
        return torch.ops.mnv2_fused.int8_sequence.default(x, weights, layers)
    if torch.is_inference_mode_enabled():
        return _int8_op(x, weights, layers)
    with torch._C._AutoDispatchBelowAutograd():
        return _int8_op(x, weights, layers)


def sequence_fake(x: Tensor, weights: Tensor, layers: Sequence[int], tf32: bool = False) -> Tensor:
    """An uninitialised result, as the kernels give it: channels_last."""
    torch._check(x.dim() == 4, lambda: f"x must be [N, C, H, W], got {list(x.shape)}")
    torch._check(x.shape[1] == layers[1], lambda: f"x must have {layers[1]} channels, got {x.shape[1]}")
    if weights.device != x.device:
        raise RuntimeError(f"x is on {x.device} but the packed weights are on {weights.device}; move one with .to()")
    *_, (values, _, _, size) = sizes_of_layers(x.shape[2:], layers)
    shape = x.shape[0], values[3], *size
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sequence_backward(ctx, grad):
    raise RuntimeError(
        "mnv2_fused::sequence has no derivative, nor have sequence_cuda, sequence_row and int8_sequence: they are for "
        "calls where nothing records gradients: use torch.no_grad(), or run the modules one by one"
    )


_TENSORS = 1 + len(PackedWeights._fields)  # that the op takes, before all else


def _spec(x: Tensor, packed: PackedWeights, stride: int, residual: bool, plan=(), *options):
    check_input(x, x.shape[1] if x.dim() == 4 else -1)
    last = options[6:]
    if last and isinstance(last[0], bool):  # before them the CUDA op has whether TF32 may be
        last = last[1:]
    spec = BlockSpec.of_op(packed, x.shape[1], stride, residual, *options[:6], *last)
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


def _multiply_adds(x: Tensor, *arguments: Any) -> int:
    packed = PackedWeights(*arguments[: _TENSORS - 1])
    return multiply_adds(_spec(x, packed, *arguments[_TENSORS - 1 :]), x.shape)


def _row_multiply_adds(x: Tensor, weights: Tensor, layers: Tensor | Sequence[int], *others: Any) -> int:
    values = layers.tolist() if isinstance(layers, Tensor) else layers
    return row_multiply_adds(x.shape, values)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.others = inputs[_TENSORS:]


def _backward(ctx, grad: Tensor):
    """Recomputes both expanded tensors; only the block's input and weights were kept.

    Through torch's own derivatives, so that it traces under torch.compile and has a derivative itself.
    """
    x, *packed = ctx.saved_tensors
    spec = _spec(x, PackedWeights(*packed), *ctx.others)
    dtype = packed[5].dtype  # b_project's: what sums are in

    def block(x: Tensor, *given: Tensor) -> Tensor:
        tensors = iter(given)
        parts: list[Any] = [None if t is None else next(tensors) for t in packed]
        weights = unpack(PackedWeights(*parts), spec.in_channels)
        return in_torch(x.to(dtype), weights._make(None if t is None else t.to(dtype) for t in weights), spec)

    _, pullback, *_ = torch.func.vjp(block, x, *(t for t in packed if t is not None))
    x_grad, *grads = pullback(grad.to(dtype))
    left = iter(grads)
    return x_grad, *(None if t is None else next(left).contiguous() for t in packed), *[None] * len(ctx.others)


def _left_alone(x: Tensor) -> bool:
    """Whether autocast gives ``x`` to an op as it is: double, and integers, which the op refuses."""
    return x.dtype == torch.float64 or not x.is_floating_point()


def autocast_rule(op: torch._ops.OpOverload) -> Callable[..., Tensor]:
    """Under autocast the kernel keeps float32 and only its result takes autocast's dtype, as a conv's would.

    Weights that are packed as bfloat16 have no more precision to keep.
    """

    place = next(i for i, a in enumerate(op._schema.arguments) if a.name == "residual") - 1

    def run(x: Tensor, *rest):
        dtype = torch.get_autocast_dtype("cpu")
        if rest[place]:  # a conv's result plus x, which autocast leaves as it is
            dtype = torch.promote_types(dtype, x.dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            if _left_alone(x):
                return op(x, *rest)
            is_bfloat16 = any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in rest)
            return op(x.bfloat16() if is_bfloat16 else x.float(), *rest).to(dtype)

    return run


def _activates_sum(arguments: dict[str, Any]) -> bool:
    """Whether these arguments of one of the ops, by name, say that an activation follows the sum with x."""
    return arguments.get("activates_sum", False) or rest_activates_sum(arguments.get("rest", ()))


def half_autocast_rule(op: torch._ops.OpOverload, device: str, products: Sequence[int] = ()) -> Callable[..., Tensor]:
    """Under autocast the kernel computes in autocast's dtype, as a GPU's convolutions do.

    ``products``: which of the arguments after x are weights of 1x1 products, to be cast with it.
    """

    names = [a.name for a in op._schema.arguments][1:]
    place = names.index("residual")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def run(x: Tensor, *rest):
        dtype = torch.get_autocast_dtype(device.lower())
        with torch._C._ExcludeDispatchKeyGuard(key):
            if _left_alone(x):
                return op(x, *rest)
            cast = [cast_product(t, dtype) if i in products and t is not None else t for i, t in enumerate(rest)]
            wider = torch.promote_types(x.dtype, dtype)
            if not rest[place] or wider == dtype:
                return op(x.to(dtype), *cast)
            if _activates_sum(dict(zip(names, rest, strict=False))):  # the sum is the kernel's own
                return op(x.to(dtype), *cast).to(wider)
            cast[place] = False  # a convolution's result plus x, which autocast leaves as it is
            return op(x.to(dtype), *cast) + x

    return run


def _inverted_residual_triton(*arguments):
    from .triton_backend.launch import inverted_residual_triton  # imports triton, which takes its time

    return inverted_residual_triton(*arguments)


if backends._C is not None:
    for _name in ("inverted_residual", "inverted_residual_cuda", "inverted_residual_triton"):
        torch.library.register_fake(f"mnv2_fused::{_name}", _fake)
        torch.library.register_autograd(f"mnv2_fused::{_name}", _backward, setup_context=_setup_context)
        count_flops(getattr(torch.ops.mnv2_fused, _name), _multiply_adds)
    for _name in ("sequence", "sequence_cuda", "sequence_row", "int8_sequence"):
        torch.library.register_autograd(f"mnv2_fused::{_name}", _sequence_backward)
        count_flops(getattr(torch.ops.mnv2_fused, _name), _row_multiply_adds)
        if _name != "sequence_row":  # the shape of whose result is in a tensor's values
            torch.library.register_fake(f"mnv2_fused::{_name}", sequence_fake)
    # The way there costs microseconds with cold caches, as does each call in Python around what torch calls in C++.
    _row_op, _int8_op = (
        getattr(op.default, "_op", op.default)
        for op in (torch.ops.mnv2_fused.sequence_row, torch.ops.mnv2_fused.int8_sequence)
    )
    _library = torch.library.Library("mnv2_fused", "IMPL")
    _library.impl("inverted_residual", autocast_rule(torch.ops.mnv2_fused.inverted_residual.default), "AutocastCPU")
    _op = torch.ops.mnv2_fused.inverted_residual_cuda.default
    _library.impl("inverted_residual_cuda", half_autocast_rule(_op, "CUDA", (0, 4)), "AutocastCUDA")
    for _device in ("CUDA", "CPU") if backends.triton_interpreted() else ("CUDA",):
        _op = torch.ops.mnv2_fused.inverted_residual_triton.default
        _library.impl("inverted_residual_triton", _inverted_residual_triton, _device)
        _library.impl("inverted_residual_triton", half_autocast_rule(_op, _device, (0, 4)), f"Autocast{_device}")
