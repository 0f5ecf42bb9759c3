"""The drop-in module: folded weights that follow their sources, autograd, and what a compiled graph calls."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import layers, ops
from .block import BlockSpec, check_input
from .fold import PackedWeights, packed_dtypes
from .watch import PackedCache, Watch, fold_and_pack, lasting, parameters_of


class _Ready:
    """A block found fit to run fused on ``packed``, while its ``watch`` holds."""

    def __init__(
        self, block: FusedInvertedResidual, sources: list[Tensor | None], next_hook: int, backend: str
    ) -> None:
        self.backend = backend
        self.is_cpu = sources[0].is_cpu
        self.sources = sources
        self.tensors = [t for t in sources if t is not None]
        self.eps = [norm.eps for _, norm in block._pairs]
        self.dtype = sources[0].dtype
        self.stride = layers.stride_of(block._pairs[-2][0])
        self.lasting = lasting(self.tensors)
        self.watch = Watch([block], next_hook) if self.lasting else None
        self.packed: PackedWeights | None = None


# Caches by number, for the op that a compiled graph calls: a graph can hold a number but not an object.
_caches: weakref.WeakValueDictionary[int, PackedCache] = weakref.WeakValueDictionary()
_tokens = itertools.count()
_blocks: weakref.WeakValueDictionary[int, FusedInvertedResidual] = weakref.WeakValueDictionary()


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


@torch.compiler.assume_constant_result
def _why_modules(token: int) -> str | None:
    """Asked once per graph: dynamo cannot trace the look at hooks and types."""
    return _blocks[token].why_modules()


class _Recomputed(torch.autograd.Function):
    """Forward by the fused op; backward through :func:`_unfolded`, computed again from the saved input."""

    @staticmethod
    def forward(ctx, x, packed, eps, stride, residual, backend, *sources):
        ctx.save_for_backward(x, *sources)
        ctx.eps, ctx.stride, ctx.residual = eps, stride, residual
        device = ctx.device = x.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return ops.packed_inverted_residual(x, packed, stride, residual, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused block has no second derivative here (create_graph=True); run it with backend='eager' or "
                "unfuse the model"
            )
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
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
        return x_grad, None, None, None, None, None, *source_grads


class FusedInvertedResidual(nn.Module):
    """Drop-in for torchvision's ``InvertedResidual``: same constructor, same state_dict, fused in eval.

    ``torchvision.models.mobilenet_v2(block=FusedInvertedResidual)`` loads published weights and trains. In
    ``train()`` the ordinary modules run, since batch statistics need the whole expanded tensor. In ``eval()`` the
    block is one kernel on weights folded in float64; they are folded again whenever a parameter or statistic
    changes, in place or not (the exception: writes through ``tensor.data``, which torch does not count; call
    ``train()`` and ``eval()`` after those). With gradients on, backward recomputes the expanded tensor instead of
    saving it; a second derivative is refused. Under ``torch.func`` transforms and forward-mode differentiation the
    ordinary modules run.

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
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {backend!r}")
        self.conv = conv
        self.stride = stride
        self.use_res_connect = residual
        self.backend = backend
        self._is_cn = stride > 1
        self._original: tuple[nn.Module, ...] = ()  # the block that fuse() replaced; a tuple, so no submodule
        self._warned = False
        self._forgotten = 0
        self._look_inside()
        if self._objection is not None:
            raise ValueError(f"{self._objection}; leave this block unfused")
        self.out_channels = self._pairs[-1][0].out_channels
        self._reset_cache()

    def _look_inside(self) -> None:
        """Notes what the inner modules are, and why the fused op could not stand in for them."""
        self._objection = next(layers.objections(self.conv), None)
        # (convolution, norm) of each stage: [expand,] depthwise, project.
        self._pairs = [(conv, norm) for conv, norm, _ in layers.stages_of(self.conv) or ()]

    def why_modules(self) -> str | None:
        """Why the inner modules run one by one even in eval, because of how they were changed; None if they don't."""
        self._look_inside()
        return self._objection

    def _reset_cache(self) -> None:
        self._ready: _Ready | None = None
        self._cache = PackedCache()
        self._token = next(_tokens)
        _caches[self._token] = self._cache
        _blocks[self._token] = self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_ready", "_cache", "_token", "_objection", "_pairs"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_inside()
        self._reset_cache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedInvertedResidual:
        self._forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FusedInvertedResidual:
        self._forget()
        return super().train(mode)

    @property
    def spec(self) -> BlockSpec:
        convs = [conv for conv, _ in self._pairs]
        return BlockSpec(
            convs[0].in_channels,
            convs[-1].in_channels,
            convs[-1].out_channels,
            layers.stride_of(convs[-2]),
            expand=len(convs) == 3,
            residual=self.use_res_connect,
        )

    def extra_repr(self) -> str:
        return f"{self._objection or self.spec}, backend={self.backend}"

    def _forget(self) -> None:
        self._forgotten += 1  # seen by a sequence that runs this block
        self._ready = None
        self._cache.clear()

    def forward(self, x: Tensor) -> Tensor:  # [N, C_in, H, W] -> [N, C_out, H', W']
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
        ready = self._ready
        if ops.transformed():
            return self._forward_modules(x)
        if ready is None or x.dtype is not ready.dtype or x.is_cpu is not ready.is_cpu or not ready.watch.holds():
            # Mode and backend are looked at here only: while the watch holds, they are what they were.
            if self.training or (backend := ops.resolve_backend(self.backend, x.device)) == "eager":
                return self._forward_modules(x)
            ready = self._prepare(x, backend)
            if ready is None:
                return self._forward_modules(x)
        sources = ready.sources
        try:
            if torch.is_grad_enabled() and any(t.requires_grad for t in ready.tensors):
                geometry = ready.eps, ready.stride, self.use_res_connect, ready.backend
                return _Recomputed.apply(x, ready.packed, *geometry, *sources)
            return ops.packed_inverted_residual(
                x, ready.packed, ready.stride, self.use_res_connect, backend=ready.backend
            )
        except RuntimeError:
            check_input(x, self._pairs[0][0].in_channels)  # says it better, if x is what is wrong
            raise

    def _prepare(self, x: Tensor, backend: str) -> _Ready | None:
        """Looks at everything and folds what changed; None when the inner modules must run."""
        next_hook = RemovableHandle.next_id  # before looking, so that what changes meanwhile is noticed next time
        if (why := self.why_modules()) is not None:
            if not self._warned:
                self._warned = True
                warnings.warn(f"an inverted residual runs unfused: {why}", stacklevel=3)
            return None
        if self._norms_train():
            return None
        sources, eps = self._sources()
        ready = _Ready(self, sources, next_hook, backend)
        dtype = self._compute_dtype(x, sources, backend)
        ready.packed = self._cache.get(sources, eps, dtype, backend)
        if ready.lasting and x.dtype == ready.dtype == dtype:  # else autocast allows it, for now
            self._ready = ready
        return ready

    def fits_sequence(self) -> bool:
        """Whether a sequence may run this block in eval, as long as it watches it."""
        if self.training or self.why_modules() is not None or self._norms_train():
            return False
        sources, _ = self._sources()
        dtype, device = sources[0].dtype, sources[0].device
        # In one run, every product's weights are packed alike.
        alike = packed_dtypes(dtype, device, self.spec.hidden_channels) == packed_dtypes(dtype, device)
        return alike and lasting(t for t in sources if t is not None)

    def packed_for_sequence(self) -> PackedWeights | None:
        """Weights for a sequence that runs this block and keeps them; None if it may not."""
        if not self.fits_sequence():
            return None
        sources, eps = self._sources()
        with torch.no_grad():
            return fold_and_pack(sources, eps, sources[0].dtype)

    def _norms_train(self) -> bool:
        return any(norm.training for _, norm in self._pairs if norm._parameters)  # FrozenBatchNorm2d has none

    def _sources(self) -> tuple[list[Tensor | None], list[float]]:
        sources: list[Tensor | None] = []
        for pair in self._pairs:
            sources += parameters_of(*pair)
        return sources, [norm.eps for _, norm in self._pairs]

    def _compute_dtype(self, x: Tensor, sources: list[Tensor | None], backend: str) -> torch.dtype:
        dtype, device = sources[0].dtype, x.device.type
        autocast = torch.is_autocast_enabled(device)
        if x.dtype != dtype and not autocast:
            raise TypeError(
                f"x is {x.dtype} but the block's parameters are {dtype}; convert one of them or use autocast"
            )
        if x.dtype == torch.float64:
            return x.dtype
        return torch.get_autocast_dtype(device) if autocast and backend in ("cuda", "triton") else dtype

    def _forward_compiled(self, x: Tensor) -> Tensor:
        if self.training or (backend := ops.resolve_backend(self.backend, x.device)) == "eager":
            return self._forward_modules(x)
        if _why_modules(self._token) is not None or self._norms_train():
            return self._forward_modules(x)
        sources, eps = self._sources()
        dtype = self._compute_dtype(x, sources, backend)
        check_input(x, self._pairs[0][0].in_channels)
        stride, residual = layers.stride_of(self._pairs[-2][0]), self.use_res_connect
        recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *sources))
        if recording or torch.compiler.is_exporting():
            # Folding goes into the graph: differentiable, and an exported program owns its weights.
            packed = fold_and_pack(sources, eps, dtype, backend)
            return ops.packed_inverted_residual(x, packed, stride, residual, backend=backend)
        return torch.ops.mnv2_fused.cached_inverted_residual(x, sources, eps, stride, residual, self._token, backend)

    def _forward_modules(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y


# What a compiled graph calls in inference: it sees the parameters themselves, so a change in place is noticed
# there too, and folding stays out of the graph. No autograd: FusedInvertedResidual folds in the graph for that.
_library = torch.library.Library("mnv2_fused", "FRAGMENT")
_library.define(
    "cached_inverted_residual(Tensor x, Tensor?[] sources, float[] eps, int stride, bool residual, int cache, "
    'str backend="cpu") -> Tensor'
)


def _cached_inverted_residual(x, sources, eps, stride, residual, cache, backend="cpu"):
    found = _caches.get(cache) or PackedCache()
    packed = found.get(sources, eps, x.dtype, backend)
    return ops.packed_inverted_residual(x, packed, stride, residual, backend=backend)


_library.impl("cached_inverted_residual", _cached_inverted_residual, "CompositeExplicitAutograd")
_library.impl(
    "cached_inverted_residual",
    ops.autocast_rule(torch.ops.mnv2_fused.cached_inverted_residual.default),
    "AutocastCPU",
)
_library.impl(
    "cached_inverted_residual",
    ops.half_autocast_rule(torch.ops.mnv2_fused.cached_inverted_residual.default, "CUDA"),
    "AutocastCUDA",
)


@torch.library.register_fake("mnv2_fused::cached_inverted_residual")
def _(x, sources, eps, stride, residual, cache, backend="cpu"):
    size = ((n - 1) // stride + 1 for n in x.shape[2:])
    return ops.empty_output(x, sources[-6].shape[0], tuple(size))
