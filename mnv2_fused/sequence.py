"""Layers in a row as one call: stem, inverted residuals, head, pooling and classifier of a network."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from . import layers, ops
from .block import ACTIVATIONS, GATES, BlockSpec
from .fold import fold_conv_bn, pack_conv, pack_stem
from .module import FusedBlock
from .ops import LayerKind
from .watch import Watch, capturing, lasting, may_be_kept, parameters_of


class _ChangedMeanwhile(Exception):
    """Another thread changed a block while it was being prepared."""


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
        """This layer's part of the op's ``layers``; see :class:`mnv2_fused.ops.LayerKind`."""
        first, last = self.modules[0], self.modules[-1]
        if isinstance(last, FusedBlock):
            spec, stem = last.spec, None if first is last else first
            values = spec.hidden_channels, spec.out_channels, spec.stride, int(spec.residual)
            further = _further(spec, "relu6" if stem is None else layers.activation_of(stem[2]))
            in_channels = spec.in_channels if stem is None else stem[0].in_channels
            return [self.kind, in_channels, *values, len(further), *further]
        if (linear := self.linear) is not None:
            c_out, c_in = linear.weight.shape
            activation = "identity" if last is linear else layers.activation_of(last)
            usual = activation == "identity"
        else:
            c_in, c_out, activation = first[0].in_channels, first[0].out_channels, layers.activation_of(first[2])
            usual = activation == "relu6"
        further = [] if usual else [ACTIVATIONS.index(activation)]
        return [self.kind, c_in, 0, c_out, 1, 0, len(further), *further]

    def packed(self, dtype: torch.dtype, backend: str = "cpu") -> Iterator[Tensor]:
        """The weights in the order in which the op takes them, for the kernels of ``backend``, "cpu" or "cuda"."""
        with torch.no_grad():
            for module in self.modules:
                if isinstance(module, FusedBlock):
                    packed = module.packed_for_sequence(backend)
                    if packed is None:
                        raise _ChangedMeanwhile
                    yield from (t for t in packed if t is not None)
                elif isinstance(module, nn.Linear):
                    weight = module.weight
                    bias = weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias
                    yield from pack_conv(weight[:, :, None, None], bias, dtype)
                elif isinstance(module, nn.Sequential):
                    conv, norm, _ = module
                    folded = fold_conv_bn(*parameters_of(conv, norm), norm.eps)
                    yield from pack_stem(*folded, dtype) if backend == "cuda" else pack_conv(*folded, dtype)


def _further(spec: BlockSpec, stem_activation: str) -> list[int]:
    """A block's further values in the op's ``layers``: none where all is as in MobileNetV2."""
    if not spec.beyond_mobilenet_v2 and stem_activation == "relu6":
        return []
    padding = [-1] * 4 if spec.padding == "same" else spec.padding_of(1, 1)
    activation, out, squeezed, stem = map(
        ACTIVATIONS.index, (spec.activation, spec.out_activation, spec.squeeze_activation, stem_activation)
    )
    gate = GATES.index(spec.gate)
    return [spec.kernel, spec.dilation, *padding, activation, out, spec.squeeze_channels, squeezed, gate, stem]


STEM_CHANNELS = 4  # of an image, at most, whose stem the CUDA kernel runs with the block behind it
_ALIGNMENT = 64  # bytes, of every tensor among those joined: a cache line
_HUGE_PAGE = 2**21


def join(packed: Sequence[Tensor]) -> Tensor:
    """Packed tensors of several layers one after the other, as ``mnv2_fused::sequence`` takes them: [bytes].

    One tensor where a network has a hundred, so that a call has one to look at, on the CPU in huge pages where the
    system has them: weights are read once a call, and more pages than the processor's address caches hold would be
    looked up anew each time.
    """
    rows = [t.detach().contiguous().flatten().view(torch.uint8) for t in packed]
    ends = list(itertools.accumulate(-(-row.numel() // _ALIGNMENT) * _ALIGNMENT for row in rows))
    if not rows[0].is_cpu:
        return torch.cat([F.pad(row, (0, -row.numel() % _ALIGNMENT)) for row in rows])
    room = torch.empty(ends[-1] + _HUGE_PAGE, dtype=torch.uint8)
    joined = room[-room.data_ptr() % _HUGE_PAGE :][: ends[-1]]
    if ops._C is not None:
        ops._C.advise_huge_pages(joined.data_ptr(), joined.numel())
    for row, begin, end in zip(rows, [0, *ends[:-1]], ends, strict=True):
        joined[begin : begin + row.numel()] = row
        joined[begin + row.numel() : end] = 0
    return joined


def layers_of(children: list[nn.Module | None], backend: str = "cpu") -> Iterator[Layer | nn.Module | None]:
    """``children`` in order: a :class:`Layer` where a kernel of ``backend`` takes them, else the child itself."""
    layer_at = {"cpu": _layer_at, "cuda": _block_at}[backend]
    previous = None
    i = 0
    while i < len(children):
        kind, count = layer_at(children[i : i + 4], previous)
        previous = kind
        if kind is None:
            yield children[i]
        else:
            yield Layer(kind, children[i : i + count], children[i - 1] if i > 0 else None)
        i += count


def _block_at(
    ahead: list[nn.Module | None], previous: LayerKind | None = None, backend: str = "cuda"
) -> tuple[LayerKind | None, int]:
    """The kind of the block that the next modules begin with, or None, and how many of them it takes."""
    first, second, *_ = [*ahead, None]
    if isinstance(first, FusedBlock):
        if _block_can_run(first, backend):
            return LayerKind.BLOCK if first.spec.expand else LayerKind.BLOCK_WITHOUT_EXPAND, 1
    elif isinstance(second, FusedBlock) and _is_conv(first, "stem") and _block_can_run(second, backend):
        spec, conv = second.spec, first[0]
        fits = backend == "cpu" or (conv.in_channels <= STEM_CHANNELS and spec.dilation == 1)
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
    dropouts = 1 if ahead and _is_plain(ahead[0], nn.Dropout) and not ahead[0].training else 0
    linear, activation, *_ = [*ahead[dropouts:], None, None]
    if not (_is_plain(linear, nn.Linear) and _is_lasting(linear.weight, linear.bias) and _bias_fits(linear)):
        return 0
    if activation is None or "forward" in vars(activation) or layers.has_hooks(activation):
        return dropouts + 1
    try:
        layers.activation_of(activation)
    except layers.Unfusable:
        return dropouts + 1
    return dropouts + 2


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it is just that: no subclass, nothing hooked, no weight that is computed from others."""
    if type(module) is not kind or "forward" in vars(module) or layers.has_hooks(module):
        return False
    return kind is not nn.Linear or ("weight" in module._parameters and not layers.is_compiled(module))


def _is_lasting(*tensors: Tensor | None) -> bool:
    """Whether they are ordinary tensors of one kind whose changes can be seen."""
    found = [t for t in tensors if t is not None]
    ordinary = all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in found)
    return ordinary and lasting(found) and len({(t.dtype, t.device) for t in found}) == 1


def _bias_fits(linear: nn.Linear) -> bool:
    return linear.bias is None or linear.bias.shape == linear.weight.shape[:1]  # another shape is broadcast


def _is_conv(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Sequential) or next(layers.conv_objections(module, name), None) is not None:
        return False
    conv, norm, _ = module
    return not (norm.training and norm._parameters) and _is_lasting(*parameters_of(conv, norm))


def _block_can_run(block: FusedBlock, backend: str) -> bool:
    if block.backend not in ("auto", backend) or "forward" in vars(block) or layers.has_hooks(block):
        return False
    return block.fits_sequence()


class _Run:
    """Layers that one call of the op computes."""

    def __init__(self, found: list[Layer], dtype: torch.dtype, backend: str) -> None:
        self.dtype = dtype
        self.backend = backend
        self.modules = [module for layer in found for module in layer.modules]
        self.geometry = [value for layer in found for value in layer.geometry]
        self.weights = join([tensor for layer in found for tensor in layer.packed(dtype, backend)])
        self.is_cpu = self.weights.is_cpu
        self.flat = found[-1].kind is LayerKind.LINEAR

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is what the op takes, not recording gradients."""
        ordinary = type(x) is Tensor and x.is_cpu is self.is_cpu and x.dtype is self.dtype
        return ordinary and not (x.requires_grad and torch.is_grad_enabled())

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x):  # made by a module between two runs
            for module in self.modules:
                x = module(x)
            return x
        y = ops.sequence(x, self.weights, self.geometry, self.backend)
        return y.flatten(1) if self.flat else y


_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _one_kind(kinds: set[tuple[torch.dtype, torch.device]], backend: str) -> bool:
    """Whether these dtypes and devices of weights are what one call of the op takes."""
    return len(kinds) == 1 and (backend == "cpu" or next(iter(kinds))[0] in _CUDA_DTYPES)


class _Prepared:
    """Children cut into runs of ``backend`` and single modules, valid while ``watch`` holds."""

    def __init__(
        self,
        children: list[nn.Module | None],
        parents: list[nn.Module],
        next_hook: int,
        backend: str,
        is_cpu: bool,
    ) -> None:
        self.is_cpu = is_cpu
        found = list(layers_of(children, backend))
        in_runs = [m for layer in found if isinstance(layer, Layer) for m in layer.modules]
        others = [entry for entry in found if isinstance(entry, nn.Module)]
        hooked = [*parents, *itertools.chain.from_iterable(m.modules() for m in others)]
        self.watch = Watch(in_runs, next_hook, parents, hooked)
        kinds = {(t.dtype, t.device) for t in self.watch.tensors}
        self.dtype, device = next(iter(kinds), (None, None))
        has_blocks = any(isinstance(m, FusedBlock) for m in in_runs)
        self.runs = has_blocks and (device and device.type == "cpu") is is_cpu and _one_kind(kinds, backend)
        self.steps: list[_Run | nn.Module] = []
        if not self.runs:
            return
        for is_run, group in itertools.groupby(found, lambda entry: isinstance(entry, Layer)):
            entries = list(group)
            self.steps += [_Run(entries, self.dtype, backend)] if is_run else entries
        self.lasts = all(may_be_kept(run.weights) for run in self.runs_of())

    def runs_of(self) -> Iterator[_Run]:
        """Those among the steps."""
        return (step for step in self.steps if isinstance(step, _Run))


def sequence_backend(device: torch.device) -> str | None:
    """Whose kernels run layers in a row on ``device``: "cpu"'s or "cuda"'s, or None."""
    try:
        backend = ops.resolve_backend("auto", device)
    except (RuntimeError, ValueError):  # which blocks say, where one is asked for a kernel
        return None
    return backend if backend in ("cpu", "cuda") else None


# Of each sequence what CUDA graphs were captured with, which read its weights where they are.
_captured: weakref.WeakKeyDictionary[nn.Module, list[_Prepared]] = weakref.WeakKeyDictionary()


class RunsFused:
    """What a module that calls its children one after the other inherits from to run them fused where it can.

    In eval, where nothing records gradients, neighbouring fused blocks and what lies beside them are one call, on the
    CPU and by the CUDA kernel: the blocks' outputs share one buffer; a stem (3x3, stride 2, norm, activation) runs in
    the kernel of the block behind it, if that has neither expansion nor residual, so that its output is never written.
    On the CPU a head (1x1, norm, activation) runs on the blocks' kernel, and the tensor before an
    ``AdaptiveAvgPool2d(1)`` is never written; each ``Linear`` behind that joins in. A ``FusedSequential`` among the
    children counts as its own. Anything else, and everything in any other mode, runs module by module.
    """

    _prepared: _Prepared | None = None

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        """The modules that forward calls in a row, and those whose lists of children they come from."""
        children: list[nn.Module | None] = []
        parents: list[nn.Module] = [self]
        for child in self._modules.values():
            if type(child) is FusedSequential and "forward" not in vars(child) and not layers.has_hooks(child):
                inner, more = child.fusable_children()
                children += inner
                parents += more
            else:
                children.append(child)
        return children, parents

    def run_fused(self, x: Tensor) -> Tensor | None:
        """The result, in channels_last where it has pixels; None where the ordinary forward has to run."""
        # Every call runs this with cold caches, so what the watch would notice is looked at in _prepare alone.
        if torch.compiler.is_compiling() or self.training or type(x) is not Tensor:
            return None
        prepared = self._prepared
        if prepared is None or prepared.is_cpu is not x.is_cpu or not prepared.watch.holds():
            if self._blocks_record():
                return None  # fine-tuning changes the weights every step: nothing is folded for a run that may not be
            prepared = self._prepare(x)
        if prepared is None or not prepared.runs or x.dtype is not prepared.dtype:
            return None
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type) or ops.transformed():
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in prepared.watch.tensors)):
            return None
        if not prepared.is_cpu and capturing(x.device):
            held = _captured.setdefault(self, [])
            if prepared not in held:
                held.append(prepared)
        for step in prepared.steps:
            x = step(x)
        return x

    def _blocks_record(self) -> bool:
        children, _ = self.fusable_children()
        blocks = (m for m in children if isinstance(m, FusedBlock))
        return torch.is_grad_enabled() and any(t.requires_grad for block in blocks for t in block.parameters())

    def layers_now(self, backend: str = "cpu") -> list[Layer]:
        """What a call in this state runs on the kernels of ``backend``, beside modules that run by themselves; none in
        train().
        """
        if ops._C is None or self.training:
            return []
        children, _ = self.fusable_children()
        on_kernels = [layer for layer in layers_of(children, backend) if isinstance(layer, Layer)]
        blocks = [m for layer in on_kernels for m in layer.modules if isinstance(m, FusedBlock)]
        kinds = {(t.dtype, t.device) for block in blocks for t in block.parameters()}
        runs = _one_kind(kinds, backend) and all(sequence_backend(device) == backend for _, device in kinds)
        return on_kernels if runs else []

    def _prepare(self, x: Tensor) -> _Prepared | None:
        self._prepared = None  # the watch counts attributes, this one too
        next_hook = RemovableHandle.next_id  # before looking, so that what changes meanwhile is noticed next time
        if ops._C is None or ops.transformed():
            return None
        if torch_module._has_any_global_hook():  # which would miss the modules inside
            return None
        if (backend := sequence_backend(x.device)) is None:
            return None
        try:
            prepared = _Prepared(*self.fusable_children(), next_hook, backend, x.is_cpu)
        except _ChangedMeanwhile:
            return None
        if not prepared.runs or prepared.lasts:
            self._prepared = prepared
        return prepared  # another thread may have dropped it from self again

    def train(self, mode: bool = True) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_prepared", None)  # of the original's weights
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_prepared", None)
        return state


class FusedSequential(RunsFused, nn.Sequential):
    """What :func:`mnv2_fused.fuse` makes of each ``nn.Sequential`` that holds fused blocks, or others of its kind."""

    def forward(self, input: Tensor) -> Tensor:
        y = self.run_fused(input)
        return super().forward(input) if y is None else y


# What a network may do by functions between its two modules, as modules.
_POOL, _FLATTEN = nn.AdaptiveAvgPool2d(1).eval(), nn.Flatten().eval()


class RunsWhole(RunsFused):
    """A network's: ``features``, the mean over their pixels (``avgpool``, if there is one), and ``classifier``.

    Called directly, they still give what they always gave.
    """

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        parents = [self, self.features, self.classifier]
        if any(type(m).forward not in (nn.Sequential.forward, FusedSequential.forward) for m in parents[1:]):
            return [], parents
        if any("forward" in vars(m) or layers.has_hooks(m) for m in parents[1:]):
            return [], parents
        features, inner = [*self.features._modules.values()], []
        if isinstance(self.features, FusedSequential):
            features, (_, *inner) = self.features.fusable_children()
        pool = self._modules.get("avgpool", _POOL)
        return [*features, pool, _FLATTEN, *self.classifier._modules.values()], [*parents, *inner]
