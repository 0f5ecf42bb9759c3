"""The inverted-residual block: its spec, its reference, the fused function and the drop-in module.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), section 3.3 for the block
and section 5.1 for computing it without its expanded tensor.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .fold import BlockWeights, PackedWeights, fold_conv_bn, pack, unfoldable, unpack
from .plan import Plan


@dataclass(frozen=True)
class BlockSpec:
    """Geometry of one block. ``expand=False`` is t = 1: no expansion, ``hidden_channels == in_channels``."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    stride: int = 1
    expand: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {self.stride}; use backend='eager'")
        if not self.expand and self.hidden_channels != self.in_channels:
            raise ValueError(
                f"without an expansion hidden_channels must equal in_channels ({self.in_channels}), "
                f"got {self.hidden_channels}"
            )
        if self.residual and (self.stride != 1 or self.in_channels != self.out_channels):
            raise ValueError(
                "a residual needs stride 1 and in_channels equal to out_channels, got stride "
                f"{self.stride}, {self.in_channels} and {self.out_channels}"
            )

    def __str__(self) -> str:
        hidden = f" -> {self.hidden_channels}" if self.expand else ""
        residual = ", residual" if self.residual else ""
        return f"{self.in_channels}{hidden} -> {self.out_channels}, stride {self.stride}{residual}"

    @staticmethod
    def of(weights: BlockWeights | PackedWeights, stride: int = 1, residual: bool = False) -> BlockSpec:
        """The spec that these weights have; raises ValueError where their shapes disagree."""
        if isinstance(weights, PackedWeights):
            weights = unpack(weights)
        if (weights.w_expand is None) != (weights.b_expand is None):
            raise ValueError("w_expand and b_expand must both be given or both be None")
        hidden = weights.w_depthwise.shape[0]
        out_channels = weights.w_project.shape[0]
        in_channels = hidden if weights.w_expand is None else weights.w_expand.shape[1]
        expected = BlockWeights(
            None if weights.w_expand is None else (hidden, in_channels, 1, 1),
            None if weights.b_expand is None else (hidden,),
            (hidden, 1, 3, 3),
            (hidden,),
            (out_channels, hidden, 1, 1),
            (out_channels,),
        )
        for name, tensor, shape in zip(weights._fields, weights, expected, strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        return BlockSpec(
            in_channels, hidden, out_channels, stride, expand=weights.w_expand is not None, residual=residual
        )


def _check_input(x: Tensor, in_channels: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C_in, H, W], got {list(x.shape)}; add a batch with x[None]")
    if x.shape[1] != in_channels:
        raise ValueError(f"x must have {in_channels} channels, got {x.shape[1]} in {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; convert it with x.float()")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"height and width must be at least 1, got {list(x.shape)}")


def inverted_residual_reference(
    x: Tensor,  # [N, C_in, H, W]
    weights: BlockWeights | PackedWeights,
    *,
    stride: int = 1,
    residual: bool = False,
) -> Tensor:  # [N, C_out, H', W'], H' = (H - 1) // stride + 1
    """The block in plain torch ops, any floating dtype, any device: the truth every kernel is checked against.

    ``relu6(conv1x1(x))``, then ``relu6(depthwise3x3)`` with zero padding of the *expanded* tensor, then a linear
    1x1 projection, then ``+ x`` when ``residual``. Weights are cast to ``x.dtype``. Raises as
    :func:`inverted_residual` does. Paper: section 3.3, table 1.
    """
    spec = BlockSpec.of(weights, stride, residual)
    _check_input(x, spec.in_channels)
    if isinstance(weights, PackedWeights):
        weights = unpack(weights)
    w = BlockWeights(*(None if t is None else t.to(x.dtype) for t in weights))
    expanded = x if w.w_expand is None else F.relu6(F.conv2d(x, w.w_expand, w.b_expand))
    depthwise = F.relu6(
        F.conv2d(expanded, w.w_depthwise, w.b_depthwise, stride, padding=1, groups=spec.hidden_channels)
    )
    y = F.conv2d(depthwise, w.w_project, w.b_project)
    return y + x if residual else y


def inverted_residual(
    x: Tensor,  # [N, C_in, H, W]; channels_last is read in place, other strides are copied once
    weights: BlockWeights | PackedWeights,
    *,
    stride: int = 1,
    residual: bool = False,
    backend: str = "auto",
    plan: Plan | None = None,
) -> Tensor:  # [N, C_out, H', W'], H' = (H - 1) // stride + 1, in x's dtype and memory format
    """The block as one kernel, one group of expanded channels at a time; the expanded tensor never exists.

    float32 and float64 compute in their own precision; float16 and bfloat16 are widened to float32 inside.
    Differentiable in ``x`` and the weights, by recomputing the expansion. Folded weights are packed on every
    call: pass ``mnv2_fused.pack(weights)`` for repeated calls, or use :class:`FusedInvertedResidual`.

    ``plan`` forces the CPU kernel's tiling (see :func:`mnv2_fused.plan`). Raises ValueError for shapes, strides or
    plans out of range, TypeError for an ``x`` that is not floating point, RuntimeError when no kernel takes the
    call. Paper: section 5.1.
    """
    spec = BlockSpec.of(weights, stride, residual)
    _check_input(x, spec.in_channels)
    if ops.resolve_backend(backend, x.device) == "eager":
        return inverted_residual_reference(x, weights, stride=stride, residual=residual)
    packed = weights if isinstance(weights, PackedWeights) else pack(weights, x.dtype)
    forced = ()
    if plan is not None:
        forced = plan.forced()
        limits = ((x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
        for name, value, limit in zip(("tile_rows", "tile_cols"), forced, limits, strict=False):
            if not 1 <= value <= limit:
                raise ValueError(f"plan: {name} must be 1 to {limit} for this input, got {value}")
    return ops.packed_inverted_residual(x, packed, stride, residual, forced)


class _PackedCache:
    """Packed weights of one module, valid while the tensors they came from stay what they were."""

    def __init__(self) -> None:
        self._stamp: list[Any] | None = None
        self._sources: list[Tensor] = []
        self._packed: PackedWeights | None = None

    def clear(self) -> None:
        self.__init__()

    def get(self, sources: list[Tensor | None], eps: list[float], dtype: torch.dtype) -> PackedWeights:
        """``sources`` are six per convolution: weight, bias, and the norm's weight, bias, mean, variance."""
        tensors = [t for t in sources if t is not None]
        try:
            stamp = [dtype, *eps, *[t._version for t in tensors], *[t.data_ptr() for t in tensors]]
        except RuntimeError:
            # Inference tensors count no versions, so a change in place could not be noticed.
            return _fold_and_pack(sources, eps, dtype)
        if stamp != self._stamp:
            with torch.no_grad():
                packed = _fold_and_pack(sources, eps, dtype)
            # Aliases keep the storages alive, so that no other tensor can appear at the same address.
            self._sources = [t.detach() for t in tensors]
            self._packed, self._stamp = packed, stamp
        return self._packed


def _fold_and_pack(sources: list[Tensor | None], eps: list[float], dtype: torch.dtype) -> PackedWeights:
    folded: list[Tensor | None] = [] if len(eps) == 3 else [None, None]
    for i, e in enumerate(eps):
        folded += fold_conv_bn(*sources[6 * i : 6 * i + 6], e)
    return pack(BlockWeights(*folded), dtype)


# Caches by number, for the op that a compiled graph calls: a graph can hold a number but not an object.
_caches: weakref.WeakValueDictionary[int, _PackedCache] = weakref.WeakValueDictionary()
_tokens = itertools.count()


def _parameters_of(conv: nn.Conv2d, norm: nn.Module) -> list[Tensor | None]:
    # Straight from the dictionaries: nn.Module.__getattr__ costs more than the rest of the check.
    of_norm = norm._buffers if "weight" in norm._buffers else norm._parameters
    return [
        conv._parameters["weight"],
        conv._parameters["bias"],
        of_norm["weight"],
        of_norm["bias"],
        norm._buffers["running_mean"],
        norm._buffers["running_var"],
    ]


def _unfolded(x: Tensor, sources: list[Tensor | None], eps: list[float], stride: int, residual: bool) -> Tensor:
    """The block as separate convolutions and norms in eval, from the cache's source tensors."""
    y = x
    for i, e in enumerate(eps):
        weight, bias, *norm = sources[6 * i : 6 * i + 6]
        depthwise = i == len(eps) - 2
        y = F.conv2d(
            y,
            weight,
            bias,
            stride if depthwise else 1,
            padding=1 if depthwise else 0,
            groups=weight.shape[0] if depthwise else 1,
        )
        y = F.batch_norm(y, norm[2], norm[3], norm[0], norm[1], training=False, eps=e)
        if i < len(eps) - 1:
            y = F.relu6(y)
    return y + x if residual else y


class _Recomputed(torch.autograd.Function):
    """Forward by the fused op; backward through :func:`_unfolded`, computed again from the saved input."""

    @staticmethod
    def forward(ctx, x, packed, eps, stride, residual, *sources):
        ctx.save_for_backward(x, *sources)
        ctx.eps, ctx.stride, ctx.residual = eps, stride, residual
        device = ctx.device = x.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return ops.packed_inverted_residual(x, packed, stride, residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device, enabled=enabled, dtype=dtype):
            y = _unfolded(leaves[0], leaves[1:], ctx.eps, ctx.stride, ctx.residual)
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad))
        x_grad, *source_grads = (next(found) if need else None for need in needed)
        return x_grad, None, None, None, None, *source_grads


class FusedInvertedResidual(nn.Module):
    """Drop-in for torchvision's ``InvertedResidual``: same constructor, same state_dict, fused in eval.

    ``torchvision.models.mobilenet_v2(block=FusedInvertedResidual)`` loads published weights and trains. In
    ``train()`` the ordinary modules run, since batch statistics need the whole expanded tensor. In ``eval()`` the
    block is one kernel on weights folded in float64; they are folded again whenever a parameter or statistic
    changes, in place or not (the exception: writes through ``tensor.data``, which torch does not count; call
    ``train()`` and ``eval()`` after those). With gradients on, backward recomputes the expanded tensor instead of
    saving it.

    ``x``: [N, inp, H, W], floating point, of the parameters' dtype unless under autocast -> [N, oup, H', W'].
    Raises ValueError for a stride other than 1 or 2 and for a ``norm_layer`` that cannot be folded.
    """

    conv: nn.Sequential

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        norm = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)

        def with_relu6(channels: int, **conv: Any) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, hidden, bias=False, **conv), norm(hidden), nn.ReLU6(inplace=True))

        layers = [] if expand_ratio == 1 else [with_relu6(inp, kernel_size=1)]
        layers.append(with_relu6(hidden, kernel_size=3, stride=stride, padding=1, groups=hidden))
        layers += [nn.Conv2d(hidden, oup, 1, bias=False), norm(oup)]
        self._adopt(nn.Sequential(*layers), stride, stride == 1 and inp == oup, backend)

    @classmethod
    def adopt(cls, conv: nn.Sequential, *, stride: int, residual: bool, backend: str = "auto") -> FusedInvertedResidual:
        """A block around existing modules, laid out as torchvision's ``InvertedResidual.conv``, sharing them."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.training = conv.training
        block._adopt(conv, stride, residual, backend)
        return block

    def _adopt(self, conv: nn.Sequential, stride: int, residual: bool, backend: str) -> None:
        self.conv = conv
        self.stride = stride
        self.use_res_connect = residual
        self.backend = backend
        self._is_cn = stride > 1
        self._warned = False
        self._look_inside()
        if self._obstacle is not None:
            raise ValueError(f"{self._obstacle}; leave this block unfused")
        self.out_channels = self._pairs[-1][0].out_channels
        self._reset_cache()

    def _look_inside(self) -> None:
        """Notes the inner modules, where each is held, and what about them the fused op could not honour."""
        children = list(self.conv._modules.values())
        parents = [self.conv, *children[:-2]]
        self._inside = [
            (parent._modules, name, child, type(child)) for parent in parents for name, child in parent._modules.items()
        ]
        # (convolution, norm) of each stage: [expand,] depthwise, project.
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._obstacle: str | None = None
        try:
            for stage in children[:-2]:
                conv, norm, activation = stage._modules.values()
                self._pairs.append((conv, norm))
                if type(activation) is not nn.ReLU6:
                    self._obstacle = f"a {type(activation).__name__} in place of a ReLU6"
            self._pairs.append((children[-2], children[-1]))
        except (IndexError, ValueError):
            self._obstacle = "its layers are not those of an inverted residual"
        for conv, norm in self._pairs:
            if type(conv) is not nn.Conv2d:
                self._obstacle = f"a {type(conv).__name__} in place of a Conv2d"
            self._obstacle = self._obstacle or unfoldable(norm)

    def _runs_modules(self) -> bool:
        """Whether the inner modules were changed since, so that they must run themselves; warns once."""
        hooked = None
        for siblings, name, child, kind in self._inside:
            if siblings.get(name) is not child or type(child) is not kind:
                self._look_inside()
                return self._runs_modules()
            if child._forward_hooks or child._forward_pre_hooks:
                hooked = f"a forward hook on an inner {kind.__name__}"
        why = self._obstacle or hooked
        if why is not None and not self._warned:
            self._warned = True
            warnings.warn(f"an inverted residual runs unfused: {why}", stacklevel=4)
        return why is not None

    def _reset_cache(self) -> None:
        self._cache = _PackedCache()
        self._token = next(_tokens)
        _caches[self._token] = self._cache

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_cache", "_token", "_pairs", "_inside", "_obstacle"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_inside()
        self._reset_cache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedInvertedResidual:
        self._cache.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FusedInvertedResidual:
        self._cache.clear()
        return super().train(mode)

    @property
    def spec(self) -> BlockSpec:
        convs = [conv for conv, _ in self._pairs]
        return BlockSpec(
            convs[0].in_channels,
            convs[-1].in_channels,
            convs[-1].out_channels,
            self.stride,
            expand=len(convs) == 3,
            residual=self.use_res_connect,
        )

    def extra_repr(self) -> str:
        return f"{self.spec}, backend={self.backend}"

    def forward(self, x: Tensor) -> Tensor:  # [N, C_in, H, W] -> [N, C_out, H', W']
        if self.training or ops.resolve_backend(self.backend, x.device) == "eager":
            return self._forward_modules(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and self._runs_modules():
            return self._forward_modules(x)
        for _, norm in self._pairs:
            if norm.training and "running_mean" in norm._buffers and norm._parameters:
                return self._forward_modules(x)

        sources: list[Tensor | None] = []
        eps: list[float] = []
        for conv, norm in self._pairs:
            sources += _parameters_of(conv, norm)
            eps.append(norm.eps)
        weight_dtype = sources[0].dtype
        if x.dtype != weight_dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x is {x.dtype} but the block's parameters are {weight_dtype}; convert one of them or use autocast"
            )
        stride, residual = self.stride, self.use_res_connect
        dtype = weight_dtype if x.dtype != torch.float64 else x.dtype
        recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
        if not compiling:
            packed = self._cache.get(sources, eps, dtype)
            if recording:
                return _Recomputed.apply(x, packed, eps, stride, residual, *sources)
            return ops.packed_inverted_residual(x, packed, stride, residual)
        if recording or torch.compiler.is_exporting() or (torch.is_grad_enabled() and x.requires_grad):
            # Folding goes into the graph: differentiable, and an exported program owns its weights.
            packed = _fold_and_pack(sources, eps, dtype)
            return ops.packed_inverted_residual(x, packed, stride, residual)
        return torch.ops.mnv2_fused.cached_inverted_residual(x, sources, eps, stride, residual, self._token)

    def _forward_modules(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y


# What a compiled graph calls in inference: it sees the parameters themselves, so a change in place is noticed
# there too, and folding stays out of the graph. No autograd: FusedInvertedResidual folds in the graph for that.
_library = torch.library.Library("mnv2_fused", "FRAGMENT")
_library.define(
    "cached_inverted_residual(Tensor x, Tensor?[] sources, float[] eps, int stride, bool residual, int cache) -> Tensor"
)


def _cached_inverted_residual(x, sources, eps, stride, residual, cache):
    found = _caches.get(cache) or _PackedCache()
    packed = found.get(sources, eps, x.dtype)
    return ops.packed_inverted_residual(x, packed, stride, residual)


_library.impl("cached_inverted_residual", _cached_inverted_residual, "CompositeExplicitAutograd")
_library.impl(
    "cached_inverted_residual",
    ops.autocast_rule(torch.ops.mnv2_fused.cached_inverted_residual.default),
    "AutocastCPU",
)


@torch.library.register_fake("mnv2_fused::cached_inverted_residual")
def _(x, sources, eps, stride, residual, cache):
    return ops.empty_output(x, sources[-6].shape[0], stride)
