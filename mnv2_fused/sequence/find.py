"""Which neighbouring modules of a network one kernel computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from .. import backends
from ..activations import NEGATIVE_SLOPE
from ..encoding import LayerKind, block_values, layer_values
from ..module import reading
from ..module.flat import FusedFlat
from ..module.fused_block import FusedBlock
from ..module.guard import has_hooks, is_compiled
from ..module.parameters import conv_norm_activation, parameters_of, trackable
from ..ops import missing_kernel
from ..spec import BlockSpec
from .joined import Joined


@dataclass(frozen=True)
class Layer:
    """What runs as one kernel: neighbouring children of a sequence."""

    kind: LayerKind
    modules: list[nn.Module]
    before: nn.Module | None = None  # the child in front of them

    @property
    def linear(self) -> nn.Linear | None:
        return next((m for m in self.modules if isinstance(m, nn.Linear)), None)

    @property
    def geometry(self) -> list[int]:
        """This layer's part of the op's ``layers``; see :class:`mnv2_fused.encoding.LayerKind`."""
        first, last = self.modules[0], self.modules[-1]
        if isinstance(last, FusedBlock):
            spec = last.spec
            assert spec is not None  # else it were no layer
            values = spec.hidden_channels, spec.out_channels, spec.strides[0], int(spec.residual)
            if first is last:
                in_channels, op_options = spec.in_channels, block_values(spec)
            else:
                stem, _, act = conv_norm_activation(first)
                in_channels, op_options = stem.in_channels, block_values(spec, *_activation(act))
            return [self.kind, in_channels, *values, len(op_options), *op_options]
        if (linear := self.linear) is not None:
            c_out, c_in = linear.weight.shape
            op_options = [] if last is linear else layer_values("identity", *_activation(last))
        else:
            conv, _, act = conv_norm_activation(first)
            c_in, c_out = conv.in_channels, conv.out_channels
            op_options = layer_values("relu6", *_activation(act))
        return [self.kind, c_in, 0, c_out, 1, 0, len(op_options), *op_options]


def _activation(module: nn.Module) -> tuple[str, float]:
    """Its name and its slope, which matters for a leaky_relu."""
    return reading.activation_of(module), next(iter(reading.slope_of(module)), NEGATIVE_SLOPE)


# At most, of the image whose stem runs with the block behind it: what CUDA's kernel has room for, and how long a sum
# the CPU's, which adds nine times as many products one after the other, makes as exactly as torch's convolution.
STEM_CHANNELS = {"cuda": 4, "cpu": 32}


def layers_of(children: list[nn.Module | None], backend: str = "cpu") -> Iterator[Layer | nn.Module | None]:
    """``children`` in order: a :class:`Layer` where a kernel of ``backend`` takes them, else the child itself."""
    layer_at = {"cpu": _layer_at, "cuda": _block_at}[backend]
    previous = None
    i = 0
    while i < len(children):
        kind, count = layer_at(children[i : i + 4], previous)
        previous = kind
        if kind is None:
            child = children[i]
            yield from child.parts if isinstance(child, Joined | FusedFlat) else (child,)
        else:
            modules = [m for m in children[i : i + count] if m is not None]
            yield Layer(kind, modules, children[i - 1] if i > 0 else None)
        i += count


def _block_at(
    ahead: list[nn.Module | None], previous: LayerKind | None = None, backend: str = "cuda"
) -> tuple[LayerKind | None, int]:
    """The kind of the block that the next modules begin with, or None, and how many of them it takes."""
    first, second, *_ = [*ahead, None]
    if isinstance(first, FusedBlock):
        if (spec := _spec_of_block(first, backend)) is not None:
            return LayerKind.BLOCK if spec.expand else LayerKind.BLOCK_WITHOUT_EXPAND, 1
    elif isinstance(second, FusedBlock) and _is_conv(first, "stem"):
        if (spec := _spec_of_block(second, backend)) is None:
            return None, 1
        conv, _, act = conv_norm_activation(first)
        fits = conv.in_channels <= STEM_CHANNELS[backend] and (backend == "cpu" or spec.dilation == 1)
        slopes = reading.slope_of(act) | ({spec.negative_slope} if spec.has_slope else set())
        fits = fits and len(slopes) < 2
        if fits and not spec.expand and not spec.residual and spec.in_channels == conv.out_channels:
            return LayerKind.STEM_AND_BLOCK, 2
    return None, 1


def _layer_at(ahead: list[nn.Module | None], previous: LayerKind | None) -> tuple[LayerKind | None, int]:
    """The kind of the layer that the next modules begin with, or None, and how many of them it takes."""
    kind, count = _block_at(ahead, previous, "cpu")
    if kind is not None:
        return kind, count
    first, *rest = ahead
    second = rest[0] if rest else None
    if _is_conv(first, "head"):
        if _is_plain(second, nn.AdaptiveAvgPool2d) and second.output_size in (1, (1, 1)):
            return LayerKind.POOLED, 2
        return LayerKind.POINTWISE, 1
    elif previous is LayerKind.POOLED and _is_plain(first, nn.Flatten) and (first.start_dim, first.end_dim) == (1, -1):
        if count := _linear_at(rest):
            return LayerKind.LINEAR, 1 + count
    elif previous is LayerKind.LINEAR and (count := _linear_at(ahead)):
        return LayerKind.LINEAR, count
    return None, 1


def _linear_at(ahead: list[nn.Module | None]) -> int:
    """How many of the next modules are [dropout,] linear layer [, activation]; 0 where they are something else."""
    first = ahead[0] if ahead else None
    dropouts = 1 if _is_plain(first, nn.Dropout) and not first.training else 0
    linear, activation, *_ = [*ahead[dropouts:], None, None]
    if not (_is_plain(linear, nn.Linear) and _is_trackable(linear.weight, linear.bias) and _bias_fits(linear)):
        return 0
    if activation is None or "forward" in vars(activation) or has_hooks(activation):
        return dropouts + 1
    try:
        reading.activation_of(activation)
    except reading.Unfusable:
        return dropouts + 1
    return dropouts + 2


_M = TypeVar("_M", bound=nn.Module)


def _is_plain(module: nn.Module | None, kind: type[_M]) -> TypeGuard[_M]:
    """Whether it is just that: no subclass, nothing hooked, no weight that is computed from others."""
    if module is None or type(module) is not kind or "forward" in vars(module) or has_hooks(module):
        return False
    return kind is not nn.Linear or ("weight" in module._parameters and not is_compiled(module))


def _is_trackable(*tensors: Tensor | None) -> bool:
    """Whether they are ordinary tensors of one kind whose changes can be seen."""
    found = [t for t in tensors if t is not None]
    ordinary = all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in found)
    return ordinary and trackable(found) and len({(t.dtype, t.device) for t in found}) == 1


def _bias_fits(linear: nn.Linear) -> bool:
    return linear.bias is None or linear.bias.shape == linear.weight.shape[:1]  # another shape is broadcast


def _is_conv(module: nn.Module | None, name: str) -> TypeGuard[nn.Sequential]:
    if not isinstance(module, nn.Sequential) or next(reading.conv_objections(module, name), None) is not None:
        return False
    conv, norm, _ = conv_norm_activation(module)
    return not (norm.training and norm._parameters) and _is_trackable(*parameters_of(conv, norm))


def _spec_of_block(block: FusedBlock, backend: str) -> BlockSpec | None:
    """The block's spec where ``backend`` can run it in a row of layers."""
    if block.backend not in ("auto", backend) or "forward" in vars(block) or has_hooks(block):
        return None
    spec = block.spec if block.fits_sequence() else None
    return None if spec is None or missing_kernel(backend, spec) is not None else spec


def grouped(found: Iterable[Layer | nn.Module | None]) -> Iterator[tuple[bool, list[Any]]]:
    """Neighbours of a kind together: layers, each group of which is a run, or single modules."""
    for is_run, group in itertools.groupby(found, lambda entry: isinstance(entry, Layer)):
        yield is_run, list(group)


def geometry_of(run: list[Layer]) -> list[int]:
    return [value for layer in run for value in layer.geometry]


_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def one_kind(kinds: set[tuple[torch.dtype, torch.device]], backend: str) -> bool:
    """Whether these dtypes and devices of weights are what one call of the op takes."""
    return len(kinds) == 1 and (backend == "cpu" or next(iter(kinds))[0] in _CUDA_DTYPES)


def sequence_backend(device: torch.device) -> str | None:
    """Whose kernels run layers in a row on ``device``: "cpu"'s or "cuda"'s, or None."""
    try:
        backend = backends.resolve_backend("auto", device)
    except (RuntimeError, ValueError):  # which blocks say, where one is asked for a kernel
        return None
    return backend if backend in ("cpu", "cuda") else None


# What a network may do by functions between its two modules, as modules.
POOL: nn.Module = nn.AdaptiveAvgPool2d(1).eval()
FLATTEN: nn.Module = nn.Flatten().eval()
