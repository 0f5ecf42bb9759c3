"""The compiled op: loading, backend choice, fake kernel, autograd and autocast.

``torch.ops.mnv2_fused.inverted_residual`` takes packed weights (see :mod:`mnv2_fused.fold`). Its schema and CPU
kernel are registered from C++ (``csrc/ops.cpp``); everything here is what the C++ stable ABI has no call for.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .fold import PackedWeights, pack, unpack

try:
    from . import _C
except ImportError as error:  # a source checkout that was never built, or a torch older than the build
    _C = None
    _load_error: str | None = str(error)
else:
    _load_error = None

BACKENDS = ("auto", "cpu", "eager")


def backend_reasons() -> dict[str, str | None]:
    """Per backend, why it cannot run on this machine, or None when it can."""
    cpu = None
    if _load_error is not None:
        cpu = f"the compiled library does not load: {_load_error}"
    return {"cpu": cpu, "eager": None}


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs tensors on ``device``: ``"cpu"`` or ``"eager"``.

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
    reason = backend_reasons()["cpu"] or f"it takes CPU tensors, got one on {device}"
    raise RuntimeError(
        f"no kernel takes this call (backend={name!r}): cpu: {reason}; "
        "move the model and its input with .cpu(), or use backend='eager'"
    )


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is going on: the op knows neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def packed_inverted_residual(
    x: Tensor,  # [N, C_in, H, W]
    packed: PackedWeights,
    stride: int,
    residual: bool,
    plan: Sequence[int] = (),
) -> Tensor:  # [N, C_out, H', W']
    """The op itself, skipping the Python part of autograd where nothing records."""
    arguments = (x, *packed, stride, residual, plan) if plan else (x, *packed, stride, residual)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return torch.ops.mnv2_fused.inverted_residual.default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mnv2_fused.inverted_residual.default(*arguments)


def sequence(x: Tensor, weights: Tensor, geometry: list[int]) -> Tensor:
    """``mnv2_fused::sequence`` where nothing records: it has no derivative (see :mod:`mnv2_fused.sequence`)."""
    if torch.is_inference_mode_enabled():
        return torch.ops.mnv2_fused.sequence.default(x, weights, geometry)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mnv2_fused.sequence.default(x, weights, geometry)


class LayerKind(enum.IntEnum):
    """What a layer of the op's ``layers`` is; csrc/ops.cpp has its twin.

    Six values tell of each layer: kind, C_in, E (of a block), C_out, stride, residual.
    """

    BLOCK = 0
    BLOCK_WITHOUT_EXPAND = 1
    STEM_AND_BLOCK = 2
    POINTWISE = 3
    POOLED = 4
    LINEAR = 5


def _sequence_fake(x, weights, layers):
    torch._check(x.dim() == 4, lambda: f"x must be [N, C, H, W], got {list(x.shape)}")
    if weights.device != x.device:
        raise RuntimeError(f"x is on {x.device} but the packed weights are on {weights.device}; move one with .to()")
    n, channels, height, width = x.shape
    for first in range(0, len(layers), 6):
        kind, channels, stride = LayerKind(layers[first]), layers[first + 3], layers[first + 4]
        if kind is LayerKind.STEM_AND_BLOCK:
            height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        if kind <= LayerKind.STEM_AND_BLOCK:
            height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        if kind is LayerKind.POOLED:
            height = width = 1
    shape = n, channels, height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sequence_backward(ctx, grad):
    raise RuntimeError(
        "mnv2_fused::sequence has no derivative, it is for calls where nothing records gradients: use torch.no_grad(), "
        "or run the modules one by one"
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


def empty_output(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """An uninitialised result with the strides the kernel gives it."""
    n, _, h, w = x.shape
    return torch.empty(
        (n, out_channels, (h - 1) // stride + 1, (w - 1) // stride + 1),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format,
    )


def _fake(x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project, stride, residual, plan=()):
    torch._check(x.dim() == 4, lambda: f"x must be [N, C_in, H, W], got {list(x.shape)}")
    for t in (w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project):
        if t is not None and t.device != x.device:
            raise RuntimeError(f"x is on {x.device} but packed weights are on {t.device}; move one with .to()")
    return empty_output(x, b_project.shape[0], stride)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.stride, ctx.residual, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    """Recomputes both expanded tensors; only the block's input and weights were kept.

    Made of differentiable torch ops, so that it traces under torch.compile and has a derivative itself.
    """
    x, *packed = ctx.saved_tensors
    dtype, stride = packed[-1].dtype, ctx.stride
    packed_weights = PackedWeights(*packed)
    w = unpack(packed_weights, x.shape[1])
    w = w._make(None if t is None else t.to(dtype) for t in w)
    x_wide, grad = x.to(dtype), grad.to(dtype)
    hidden = w.w_project.shape[1]

    def relu6_grad(g: Tensor, before: Tensor) -> Tensor:
        return g * ((before > 0) & (before < 6)).to(g.dtype)

    def conv_grad(g: Tensor, inp: Tensor, weight: Tensor, stride: int, padding: int, groups: int):
        two = [1, 1]
        return torch.ops.aten.convolution_backward(
            g, inp, weight, None, [stride] * 2, [padding] * 2, two, False, [0, 0], groups, [True, True, False]
        )[:2]

    if w.w_expand is not None:
        before_expand = F.conv2d(x_wide, w.w_expand, w.b_expand)
        expanded = F.hardtanh(before_expand, 0.0, 6.0)
    else:
        expanded = x_wide
    before_depthwise = F.conv2d(expanded, w.w_depthwise, w.b_depthwise, stride, 1, 1, hidden)
    depthwise = F.hardtanh(before_depthwise, 0.0, 6.0)

    sum_pixels = [0, 2, 3]
    g_depthwise, g_w_project = conv_grad(grad, depthwise, w.w_project, 1, 0, 1)
    g_before = relu6_grad(g_depthwise, before_depthwise)
    g_expanded, g_w_depthwise = conv_grad(g_before, expanded, w.w_depthwise, stride, 1, hidden)
    g_w_expand = g_b_expand = None
    if w.w_expand is not None:
        g_before_expand = relu6_grad(g_expanded, before_expand)
        g_x, g_w_expand = conv_grad(g_before_expand, x_wide, w.w_expand, 1, 0, 1)
        g_b_expand = g_before_expand.sum(sum_pixels)
    else:
        g_x = g_expanded
    if ctx.residual:
        g_x = g_x + grad
    grads = w._replace(
        w_expand=g_w_expand,
        b_expand=g_b_expand,
        w_depthwise=g_w_depthwise,
        b_depthwise=g_before.sum(sum_pixels),
        w_project=g_w_project,
        b_project=grad.sum(sum_pixels),
    )
    return g_x.to(x.dtype), *pack(grads, packed_weights.w_project.dtype), None, None, None


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


if _C is not None:
    torch.library.register_fake("mnv2_fused::inverted_residual", _fake)
    torch.library.register_autograd("mnv2_fused::inverted_residual", _backward, setup_context=_setup_context)
    torch.library.register_fake("mnv2_fused::sequence", _sequence_fake)
    torch.library.register_autograd("mnv2_fused::sequence", _sequence_backward)
    _library = torch.library.Library("mnv2_fused", "IMPL")
    _library.impl("inverted_residual", autocast_rule(torch.ops.mnv2_fused.inverted_residual.default), "AutocastCPU")
