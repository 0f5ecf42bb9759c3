"""What a model costs layer by layer: parameters, multiply-adds, and the memory that eager and fused need.

One run on the meta device sees every op with the shapes it has, functional ones too; nothing is computed. What the
fused model never writes is what :func:`mnv2_fused.report` says of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..convert import Report, fuse, report, unfuse
from ..module import FusedBlock
from ..plans.cpu import plan
from ..sequence import FusedSequential, RunsFused
from ..sequence.find import Layer, layers_of
from ..sequence.joined import Joined
from ..testing import peak_activation_bytes
from .named_models import named_model
from .tables import aligned
from .trace import Call, Storage, Trace, traced


@dataclass(frozen=True)
class Separable:
    """A depthwise convolution and the 1x1 behind it, which replace one k x k convolution (MobileNetV1, 3.1)."""

    depthwise: str  # name of the module
    kernel: tuple[int, ...]
    out_channels: int  # of the 1x1 convolution
    multiply_adds: int  # of the two
    standard_multiply_adds: int  # of the convolution in their place

    @property
    def saving(self) -> float:
        """The pair's multiply-adds over the standard convolution's."""
        return 1 / self.out_channels + 1 / math.prod(self.kernel)

    def __str__(self) -> str:
        return f"1/{self.out_channels}+1/{math.prod(self.kernel)}={self.saving:.3f}"


@dataclass(frozen=True)
class LayerCost:
    """One row of a :class:`Cost`: a call of a module without children, or an op that another module calls."""

    name: str  # of the module
    kind: str  # its class, or the op
    output_shape: tuple[int, ...]
    parameters: int  # counted where they are used first
    multiply_adds: int
    eager_bytes: int  # of the tensors it makes; an op in place makes none
    fused_bytes: int  # of those that the fused model makes, too
    eager_live: int  # bytes of all tensors that are live while it runs, at most
    fused_live: int  # the same in the fused model, scratch of the kernels included
    separable: Separable | None  # on the row of the pair's 1x1 convolution


@dataclass(frozen=True)
class Cost:
    """What one call costs, the whole batch. Live and made bytes count neither parameters nor the model's input.

    ``print`` it for a table.
    """

    layers: tuple[LayerCost, ...]  # in the order in which they run
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: int  # of the model, those that no layer used included
    scratch_bytes: int  # what the fused kernels work in, at most, of all threads; 0 where none runs on the CPU
    expanded_share: float  # how much of what convolutions and linear layers put out is an expanded tensor
    report: Report  # on the fused model

    @property
    def multiply_adds(self) -> int:
        """Products of convolutions and linear layers, as the papers count them: no biases, no norms."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def eager_bytes(self) -> int:
        """Bytes of all tensors that eager makes."""
        return sum(layer.eager_bytes for layer in self.layers)

    @property
    def fused_bytes(self) -> int:
        """Bytes of all tensors that the fused model makes."""
        return sum(layer.fused_bytes for layer in self.layers)

    @property
    def eager_peak(self) -> int:
        """The most bytes live at once in eager; ops' own workspaces are not known."""
        return max((layer.eager_live for layer in self.layers), default=0)

    @property
    def fused_peak(self) -> int:
        """The most bytes live at once in the fused model, with its kernels' scratch."""
        return max((layer.fused_live for layer in self.layers), default=0)

    @property
    def separable(self) -> tuple[Separable, ...]:
        return tuple(layer.separable for layer in self.layers if layer.separable is not None)

    def __str__(self) -> str:
        header = "layer|type|output|params|M madds|eager MiB|fused MiB|eager live|fused live|separable"
        rows: list[list[str]] = [list(header.split("|"))]
        for layer in self.layers:
            rows.append(
                [
                    *(layer.name or "(model)", layer.kind, "x".join(map(str, layer.output_shape))),
                    *(f"{layer.parameters:,}" if layer.parameters else "-", _millions(layer.multiply_adds)),
                    *(_mib(layer.eager_bytes), _mib(layer.fused_bytes)),
                    *(_mib(layer.eager_live), _mib(layer.fused_live), str(layer.separable or "")),
                ]
            )
        rows.append(
            [
                *("total", "", "", f"{self.parameters:,}", _millions(self.multiply_adds)),
                *(_mib(self.eager_bytes), _mib(self.fused_bytes), _mib(self.eager_peak), _mib(self.fused_peak), ""),
            ]
        )
        return "\n".join([aligned(rows), "", *(f"{what:<15}{value}" for what, value in self._totals())])

    def _totals(self) -> Iterator[tuple[str, str]]:
        yield "parameters", f"{self.parameters:,}"
        unused = self.parameters - sum(layer.parameters for layer in self.layers)
        if unused:
            yield "", f"{unused:,} of them in layers that this call does not use"
        yield "multiply-adds", f"{self.multiply_adds:,}"
        yield "made", _compared(self.eager_bytes, self.fused_bytes)
        scratch = f"; scratch, in fused's: {_mib(self.scratch_bytes)} MiB" if self.scratch_bytes else ""
        yield "peak live", _compared(self.eager_peak, self.fused_peak) + scratch
        yield "expanded", f"{self.expanded_share:.0%} of what convolutions and linear layers put out"
        if pairs := self.separable:
            ratio = sum(p.multiply_adds for p in pairs) / sum(p.standard_multiply_adds for p in pairs)
            standard = "of the standard convolutions in their place"
            yield "separable", f"{len(pairs)} pair(s) with {ratio:.3f} of the multiply-adds {standard}"
        others = [block for block in self.report.blocks if block.bytes_never_written is None]
        if fused := len(self.report.blocks) - len(others):
            yield "fused", f"{fused} blocks, {len(self.report.layers)} layers beside them"
        if not self.report.blocks:
            yield "not fused", "no block of a family that fuse() knows"
        for reason, count in Counter(block.reason or f"run by backend {block.backend}" for block in others).items():
            yield "not fused", f"{count} x {reason}"


def cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """What one call of ``model`` in eval costs, as it is and as ``fuse(model)`` makes it.

    ``input_shape``, [N, C, H, W] or what else the model's only input has, in the dtype of its parameters.
    ``model`` is not touched. Raises ValueError when it does not run on such an input on the meta device. A network of a
    class that is not known is taken block by block: seen as a row (:mod:`mnv2_fused.sequence.seen`), it takes less.
    """
    shape = tuple(input_shape)
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"input_shape must be integers of at least 1, got {shape}; for images it is (N, C, H, W)")
    plain = unfuse(model).eval()
    dtype = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    trace = traced(plain, shape, dtype)
    fused = _fused(model).eval()  # blocks that are fused already stay so
    found = report(fused, shape)
    kept, scratch = _fused_storages(trace, fused, found, shape[0], dtype)
    rows = trace.rows
    eager_live = _live(trace.storages, trace.ops)
    fused_live = [live + works for live, works in zip(_live(kept, len(scratch)), scratch, strict=True)]
    separable = _separable(trace)
    layers = []
    for i, row in enumerate(rows):
        ticks = range(row.first, row.last + 1)
        layers.append(
            LayerCost(
                *(row.name, row.kind, row.output_shape, row.parameters, row.multiply_adds),
                eager_bytes=sum(s.bytes for s in trace.storages if s.row == i),
                fused_bytes=sum(s.bytes for s in kept if s.row == i),
                eager_live=max(eager_live[t] for t in ticks),
                fused_live=max(fused_live[t] for t in ticks),
                separable=separable.get(i),
            )
        )
    parameters = sum(p.numel() for p in model.parameters())
    most = max(scratch, default=0)
    return Cost(tuple(layers), shape, dtype, parameters, most, _expanded_share(trace), found)


def _fused_storages(
    trace: Trace, model: nn.Module, found: Report, batch: int, dtype: torch.dtype
) -> tuple[list[Storage], list[int]]:
    """What the fused ``model`` makes of eager's storages, and at each op the bytes its kernel works in."""
    kernels: dict[str, int] = {}  # modules, and the bytes they put out that the kernel does not
    works: dict[str, int] = defaultdict(int)  # bytes, by a run's first module
    several = _several(model)
    calls = trace.calls | {name: _calls_of(trace, *names) for name, *names in several.values()}
    runs, cores = _runs(model, {m: name for m, (name, *_) in several.items()}), _cores(model)
    # Modules that other calls run, too, by themselves.
    runs = {name: run for name, run in runs.items() if len({len(calls[m]) for m in run}) == 1}
    for block in found.blocks:
        if block.spec is None or block.bytes_never_written is None:
            continue
        first = runs.get(block.name, [block.name])[0]
        if core := cores.get(block.name):
            kernels |= dict.fromkeys(core, sys.maxsize) | {core[-1]: 0}
            runs |= dict.fromkeys(core, core)
            first = core[0]
        else:
            kernels[block.name] = 0
        for call in calls[core[0] if core else block.name] if block.backend == "cpu" else ():
            works[first] = max(works[first], plan(block.spec, call.input_shape, dtype=dtype).call_bytes)
    kernels |= {layer.name: batch * (layer.bytes_never_written or 0) for layer in found.layers}
    kept = [dataclasses.replace(storage) for storage in trace.storages]
    scratch = [0] * trace.ops
    for name, unwritten in kernels.items():
        run = runs.get(name, [name])
        after = run[run.index(name) + 1] if name != run[-1] else name
        # A run has its result allocated before its first kernel starts.
        starts = calls[run[0] if after == name else name]
        for start, call, next_call in zip(starts, calls[name], calls[after], strict=True):
            inside = [s for s in kept if call.first <= s.first <= call.last]
            results = [s for s in inside if s.last > call.last]
            if unwritten >= sum(s.bytes for s in results):
                results = []
            for s in results:
                s.first = start.first
                if after != name:
                    s.last = next_call.last  # however long eager's caller holds it
            gone = {id(s) for s in inside} - {id(s) for s in results}
            kept = [s for s in kept if id(s) not in gone]
            scratch[call.first : call.last + 1] = [works[run[0]]] * (call.last + 1 - call.first)
    for first, last in {(run[0], run[-1]) for run in runs.values()}:
        for start, end in zip(calls[first], calls[last], strict=True):
            for s in kept:
                if s.first < start.first <= s.last < end.last:
                    s.last = end.last  # whoever calls the run holds what it gives it
    return kept, scratch


def _several(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Of what stands for several modules: its name in a report, and theirs."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, tuple[str, ...]] = {}
    for sequence in [m for m in model.modules() if isinstance(m, FusedSequential)]:
        for m in sequence.fusable_children()[0]:
            if isinstance(m, Joined):
                inside = [names[part] for part in m.parts]
                found[m] = inside[0], *inside
        for block in sequence.flat_now():
            prefix = f"{names[sequence]}." if names[sequence] else ""
            found[block] = f"{prefix}{block.label}", *(names[part] for part in block.parts)
    return found


def _calls_of(trace: Trace, first: str, *rest: str) -> list[Call]:
    """Each from the first of these modules to the last one, which may run more than once in between."""
    calls: list[Call] = []
    last = rest[-1]
    times = rest.count(last)
    for start in trace.calls[first]:
        ends = [call.last for call in trace.calls[last] if call.first > start.first]
        calls += [Call(start.first, end, start.input_shape) for end in ends[times - 1 : times]]
    return calls


def _cores(model: nn.Module) -> dict[str, list[str]]:
    """Of each block that is only a part of its module: the children that it is."""
    blocks = ((name, m._around) for name, m in model.named_modules() if isinstance(m, FusedBlock))
    return {name: [f"{name}.{child}" for child in around.core] for name, around in blocks if around is not None}


def _runs(model: nn.Module, several: dict[nn.Module, str]) -> dict[str, list[str]]:
    """Of each module that one call of the kernels runs with others: all of that call, in order."""
    names = {module: name for name, module in model.named_modules()} | several
    runs: dict[str, list[str]] = {}
    # A whole model before its parts: it runs more in one call than they do.
    for sequence in [m for m in model.modules() if isinstance(m, RunsFused)]:
        if not sequence.layers_now():
            continue
        for _, entries in itertools.groupby(
            layers_of(sequence.fusable_children()[0]), lambda entry: isinstance(entry, Layer)
        ):
            layers = [entry for entry in entries if isinstance(entry, Layer)]
            modules = [names[m] for layer in layers for m in layer.modules if m in names]
            for name in modules:
                runs.setdefault(name, modules)
    return runs


def _live(storages: list[Storage], ops: int) -> list[int]:
    """Bytes live during each op."""
    changes = [0] * (ops + 2)
    for s in storages:
        changes[s.first] += s.bytes
        changes[s.last + 1] -= s.bytes
    return list(itertools.accumulate(changes))[:ops]


def _separable(trace: Trace) -> dict[int, Separable]:
    """The pairs by the row of their 1x1 convolution; of several behind one depthwise, the first."""
    pairs: dict[int, Separable] = {}
    paired: set[int] = set()
    for p in trace.products:
        depthwise = p.source
        if depthwise is None or not (depthwise.depthwise and p.pointwise) or id(depthwise) in paired:
            continue
        kernel = tuple(depthwise.weight_shape[2:])
        paired.add(id(depthwise))
        pairs[p.row] = Separable(
            *(trace.rows[depthwise.row].name, kernel, p.weight_shape[0]),
            multiply_adds=depthwise.multiply_adds + p.multiply_adds,
            standard_multiply_adds=p.multiply_adds * math.prod(kernel),
        )
    return pairs


def _expanded_share(trace: Trace) -> float:
    """Elements of expanded tensors, over those that convolutions and linear layers put out.

    Expanded are what a depthwise convolution puts out when the 1x1 behind it projects that to fewer channels, and
    what it takes when another 1x1 made that of fewer.
    """
    expanded: dict[int, int] = {}
    for project in trace.products:
        depthwise = project.source
        if depthwise is None or not (depthwise.depthwise and project.pointwise):
            continue
        hidden = depthwise.weight_shape[0]
        if hidden > project.weight_shape[0]:
            expanded[id(depthwise)] = depthwise.elements
            expand = depthwise.source
            if expand is not None and expand.pointwise and hidden > expand.weight_shape[1]:
                expanded[id(expand)] = expand.elements
    return sum(expanded.values()) / max(1, sum(p.elements for p in trace.products))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f}" if count else "-"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.3f}" if count else "-"


def _compared(eager: int, fused: int) -> str:
    if fused == eager:
        return f"{_mib(eager)} MiB, eager and fused"
    less = f"{eager / fused:.2f}x less" if fused < eager else f"{fused / eager:.2f}x as much"
    return f"eager {_mib(eager)} MiB, fused {_mib(fused)} MiB: {less}"


def measured_peaks(model: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """The most bytes that torch's allocator holds in a call of eager, in channels_last, and of ``fuse(model)``."""
    plain: Any = unfuse(model).eval()
    plain = plain.to(memory_format=torch.channels_last)
    dtype = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    x = torch.randn(*input_shape).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    fused = _fused(model).eval()
    with torch.inference_mode():
        return peak_activation_bytes(lambda: plain(x)), peak_activation_bytes(lambda: fused(x))


def _fused(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"fuse\(\) fused nothing")  # the report says so
        return fuse(model)


def run(name: str, input_shape: Sequence[int], dtype: torch.dtype, *, measure: bool = False) -> int:
    """Prints the :func:`cost` of the model called ``name``; returns the exit code. Raises as named_model does."""
    model = named_model(name).to(dtype)
    found = cost(model, input_shape)
    size = "x".join(map(str, input_shape))
    print(f"{name} on {size}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} thread(s), whole batch;")
    print("MiB: of the tensors that a layer makes; live: MiB of all tensors at once, parameters and input aside\n")
    print(found)
    if measure:
        for what, computed, measured in zip(
            ("eager channels_last", "fused"),
            (found.eager_peak, found.fused_peak),
            measured_peaks(model, input_shape),
            strict=True,
        ):
            ratio = f"the computed peak is {computed / measured:.3f} of it"
            print(f"{'measured peak':<15}{what} {_mib(measured)} MiB; {ratio}")
    return 0
