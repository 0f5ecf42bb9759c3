"""Converting a model: ``fuse`` its inverted residuals, ``unfuse`` them again, ``report`` what runs fused and why not.

Works on module instances: no class is patched, nothing is traced, and state_dict keys never change. What is an
inverted residual is known to :mod:`mnv2_fused.families`.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import layers, ops
from .block import BlockSpec
from .families import Family, family_of, inline_blocks, parts_of, read_mobilenet_v2
from .models import FusedMobileNet, MobileNet
from .module import FusedBlock, FusedInPlace, FusedInvertedResidual, fuse_in_place, kernel_for
from .ops import LayerKind
from .plan import plan
from .runs import Layer, sequence_backend
from .sequence import FusedSequential, RunsFused
from .traced import RunsTraced, forget


class Match(NamedTuple):
    """A block that can run fused."""

    family: Family
    spec: BlockSpec


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    backend: str = "auto",
    recompute: bool = False,
    strict: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """A copy of ``model`` (or ``model`` itself) whose inverted residuals run as one kernel each in eval.

    The fused blocks share the modules inside the blocks they replace: parameters, their names, ``requires_grad``
    and train/eval mode stay. If anything was fused, the whole model is moved to channels_last, once. Keep the
    returned value even with ``inplace``: when ``model`` itself is a block, it is the fused one. Fusing a fused
    model changes nothing. ``filter_fn(name, block)`` returns whether to fuse a block. ``recompute``: in ``train()``
    keep of each block only its input and compute the rest again in backward: less memory, more time.

    A block of torchvision's MobileNetV2 is replaced by a :class:`FusedInvertedResidual`; any other stays the instance
    it was, of a subclass of its class.

    Warns when nothing was fused. With ``strict`` raises ValueError instead, and also for any block that had to be
    skipped (not for those that ``filter_fn`` left out), before anything is changed. Raises ValueError for an
    unknown ``backend``. :func:`report` lists the reasons block by block.
    """
    if backend not in ops.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {backend!r}")
    if not inplace:
        model = _copy(model)
    matches: dict[nn.Module, Match] = {}
    skipped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    already_fused = False
    for name, block, found in _blocks(model):
        if isinstance(block, FusedBlock):
            already_fused = True
        elif isinstance(found, str):
            skipped[found] += 1
        elif filter_fn is not None and not filter_fn(name, block):
            left_out["filter_fn left it out"] += 1
        else:
            matches[block] = found
    nothing_fused = not (matches or already_fused)
    reasons = "; ".join(f"{n} x {reason}" for reason, n in (skipped + left_out).items())
    if strict and (skipped or nothing_fused):
        raise ValueError(f"fuse(strict=True) would leave blocks unfused: {reasons or _NOT_FOUND}")
    if nothing_fused:
        warnings.warn(f"fuse() fused nothing: {reasons or _NOT_FOUND}", stacklevel=2)
    if nothing_fused:
        return model
    model = _replace(model, {block: _fused(block, match, backend, recompute) for block, match in matches.items()})
    _run_whole_sequences(model)
    # As model.to(memory_format=torch.channels_last) does, which refuses models that have 5-d weights too.
    return model._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of ``model`` (or ``model`` itself) with ordinary blocks again, as exporters want them.

    A block made by :func:`fuse` turns back into the instance it was, around the modules as they are now. A block
    made by ``FusedInvertedResidual``'s constructor turns into torchvision's ``InvertedResidual``; raises
    ImportError, before anything is changed, where torchvision is missing.
    """
    if not inplace:
        model = _copy(model)
    blocks = [block for _, block, _ in _blocks(model) if isinstance(block, FusedBlock)]
    model = _replace(model, {block: _unfused(block) for block in blocks})
    for module in model.modules():
        if isinstance(module, RunsFused):
            vars(module).pop("_prepared", None)
            forget(module)
            module.__class__ = next(c for c in type(module).__mro__ if not issubclass(c, RunsTraced))
    return model


@dataclass(frozen=True)
class BlockReport:
    """One block of a :class:`Report`."""

    name: str
    spec: BlockSpec | None  # None where no matcher could read one
    fused: bool
    backend: str | None  # what runs it in eval(); None when it is not fused or no backend takes it
    reason: str | None  # why it is not fused, or fused but not run by a kernel
    bytes_never_written: int | None  # expanded tensors per image, for blocks that a kernel runs


@dataclass(frozen=True)
class LayerReport:
    """What runs on the kernels beside the blocks of a :class:`Report`."""

    name: str  # of its first module
    what: str
    backend: str  # "cpu" or "cuda"
    bytes_never_written: int | None  # tensors per image that only the ordinary modules write


@dataclass(frozen=True)
class Report:
    """Every inverted residual of a model, and what runs with them. ``print`` it for a table."""

    blocks: tuple[BlockReport, ...]
    training: bool  # whether a fused block is in train(), where the ordinary modules run
    layers: tuple[LayerReport, ...] = ()  # stem, head and classifier, where they run in one call with the blocks

    @property
    def fused(self) -> tuple[BlockReport, ...]:
        return tuple(b for b in self.blocks if b.fused)

    @property
    def skipped(self) -> tuple[BlockReport, ...]:
        return tuple(b for b in self.blocks if not b.fused)

    @property
    def bytes_never_written(self) -> int | None:
        """Bytes per image over blocks and layers, or None when the report was made without ``input_shape``."""
        found = [row.bytes_never_written for row in (*self.blocks, *self.layers)]
        known = [count for count in found if count is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        rows = [("block", "spec", "backend", "never written", "reason")]
        for b in self.blocks:
            spec = "-" if b.spec is None else str(b.spec)
            rows.append((b.name or "(model)", spec, b.backend or "-", _mib(b.bytes_never_written), b.reason or ""))
        for layer in self.layers:
            rows.append((layer.name, layer.what, layer.backend, _mib(layer.bytes_never_written), ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = f"{len(self.fused)} fused, {len(self.skipped)} not fused"
        if self.bytes_never_written is not None:
            total += f", {_mib(self.bytes_never_written)} never written per image"
        if self.training:
            total += "; now in train(), where the ordinary modules run: call eval()"
        return "\n".join([*lines, total])


def report(model: nn.Module, input_shape: Sequence[int] | None = None) -> Report:
    """Which inverted residuals of ``model`` run fused in eval, by which backend, and why the others do not.

    ``input_shape``, [N, C, H, W] of the model's only input, adds the bytes per image that are never written: the
    expanded tensors of each fused block, at its own input shape, over all its calls. The shapes come from a copy on
    the meta device: nothing is computed and ``model`` is not touched. Raises ValueError when that copy does not
    run on such an input.
    """
    found = list(_blocks(model))
    shapes = {} if input_shape is None else _block_input_shapes(model, input_shape)
    rows = tuple(_block_report(*entry, shapes.get(entry[0])) for entry in found)
    training = any(isinstance(block, FusedBlock) and block.training for _, block, _ in found)
    return Report(rows, training, tuple(_layer_reports(model, shapes)))


_LAYERS = {
    LayerKind.STEM_AND_BLOCK: "3x3 stem, inside the block behind it",
    LayerKind.POINTWISE: "1x1 convolution",
    LayerKind.POOLED: "1x1 convolution and pooling",
    LayerKind.LINEAR: "classifier",
}


def _layer_reports(model: nn.Module, shapes: dict[str, list[torch.Size]]) -> Iterator[LayerReport]:
    """What runs in one call with fused blocks now: nothing in train(), or where something is hooked."""
    parameter = next(model.parameters(), None)
    backend = None if parameter is None else sequence_backend(parameter.device)
    if backend is None:
        return  # every block's row says why
    names = {module: name for name, module in model.named_modules()}
    seen: set[nn.Module] = set()
    # A whole model before its parts: it runs more in one call than they do.
    for sequence in [m for m in model.modules() if isinstance(m, RunsFused)]:
        for layer in sequence.layers_now(backend):
            first, last = layer.modules[0], layer.modules[-1]
            module = layer.linear or first
            if layer.kind not in _LAYERS or module in seen:
                continue
            seen.add(module)
            block = last if layer.kind is LayerKind.STEM_AND_BLOCK else layer.before
            count = None
            if block is not None and (found := shapes.get(names.get(block, ""))):
                count = _never_written(layer, block.spec, found[0])
            yield LayerReport(names[module], _LAYERS[layer.kind], backend, count)


def _never_written(layer: Layer, spec: BlockSpec, shape: torch.Size) -> int:
    """Bytes per image; ``shape`` is what the nearest block takes."""
    height, width = shape[2:]
    conv = layer.modules[0][0] if isinstance(layer.modules[0], nn.Sequential) else None
    if layer.kind is LayerKind.POOLED:
        height, width = spec.out_size(height, width)
    if conv is None or layer.kind is LayerKind.POINTWISE:
        return 0
    return conv.out_channels * height * width * conv.weight.dtype.itemsize


_NOT_FOUND = (
    "no inverted residual of a known layout was found (known: torchvision's and timm's MobileNet, MNASNet and "
    "EfficientNet, transformers' and OpenMMLab's MobileNetV2, a block's layers in a Sequential)"
)


_INLINE = "its layers lie among others' in one Sequential: put them into a Sequential of their own"


def _match(module: nn.Module) -> Match | str | None:
    family = family_of(module)
    if family is None:
        return None
    parts = parts_of(module, family.read)
    if isinstance(parts, str):
        return parts
    if _is_torchvisions(module, family) and layers.has_hooks(module):
        return "a hook on it would not be called: remove it first"
    return Match(family, parts.spec)


def _is_torchvisions(block: nn.Module, family: Family) -> bool:
    """Whether a ``FusedInvertedResidual`` takes its place: layers nested, and a sum, as torchvision's."""
    if family.read is not read_mobilenet_v2 or not isinstance(getattr(block, "use_res_connect", None), bool):
        return False
    return layers.is_plain(block.conv) and layers.is_plain(block.conv._modules.get("0"))


def _blocks(
    module: nn.Module, name: str = "", compiled: bool = False, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, Match | str | None]]:
    """(name, block, match or reason) for every block, once, by its first name; (name, block, None) for fused ones."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, FusedBlock):
        yield name, module, None
        return
    compiled = compiled or layers.is_compiled(module)
    found = _match(module)
    if found is not None:
        yield name, module, "it is compiled: fuse first, then compile" if compiled else found
        return
    for key, child in inline_blocks(module):
        yield f"{name}.{key}" if name else key, child, _INLINE
    for key, child in module._modules.items():
        if child is not None:
            yield from _blocks(child, f"{name}.{key}" if name else key, compiled, seen)


def _replace(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in swaps:
                parent._modules[key] = swaps[child]
    return swaps.get(model, model)


def _run_whole_sequences(model: nn.Module) -> None:
    """Lets each Sequential that holds fused blocks, and whole networks of known classes, run them in one call.

    The instances stay, with all that refers to them; they become instances of a subclass of what they were.
    """
    for module in reversed(list(model.modules())):  # children first
        if type(module) is nn.Sequential and any(isinstance(m, FusedBlock | FusedSequential) for m in module):
            module.__class__ = FusedSequential
        elif type(module).__module__.startswith("torchvision.models.") and "torchvision" in sys.modules:
            from . import torchvision_model

            torchvision_model.run_whole(module)
        elif type(module) is MobileNet and "forward" not in vars(module):
            module.__class__ = FusedMobileNet


def _fused(block: nn.Module, match: Match, backend: str, recompute: bool) -> FusedBlock:
    if not _is_torchvisions(block, match.family):
        options = {"backend": backend, "recompute": recompute}
        return fuse_in_place(block, match.family.read, **options, base=match.family.base)
    fused = FusedInvertedResidual.adopt(
        block.conv,
        stride=match.spec.stride,
        residual=match.spec.residual,
        backend=backend,
        recompute=recompute,
    )
    # In a tuple, so that it is no submodule. It shares conv, hence follows .to(), copies and training.
    fused._original = (block,)
    return _with_state_of(block, fused)


def _unfused(block: FusedBlock) -> nn.Module:
    if isinstance(block, FusedInPlace):
        return block.unfused()
    original = next(iter(block._original), None)
    if original is None:
        try:
            from torchvision.models.mobilenetv2 import InvertedResidual
        except ImportError as error:
            raise ImportError(
                "unfuse rebuilds a FusedInvertedResidual that its constructor made as torchvision's "
                "InvertedResidual; install torchvision"
            ) from error
        original = InvertedResidual.__new__(InvertedResidual)
        nn.Module.__init__(original)
    original.conv = block.conv
    return _with_state_of(block, original)


def _with_state_of(source: nn.Module, target: nn.Module) -> nn.Module:
    """``target`` with ``source``'s mode, attributes and very hook dictionaries: handles still work."""
    own = {name for name in (*vars(nn.Module()), *FusedBlock.OWN) if "_hook" not in name} - {"training"}
    vars(target).update({name: value for name, value in vars(source).items() if name not in own})
    return target


def computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Attributes that a hook computes from parameters before each call (pruning, weight norm).

    ``copy.deepcopy`` refuses them, unless its memo has them already.
    """
    for module in model.modules():
        yield from (t for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf)


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed_tensors(model)})


def _block_report(
    name: str, block: nn.Module, found: Match | str | None, inputs: list[torch.Size] | None
) -> BlockReport:
    if isinstance(found, str):
        return BlockReport(name, None, False, None, found, None)
    if isinstance(found, Match):
        return BlockReport(name, found.spec, False, None, "not fused: call fuse(model)", None)
    reason = block.why_modules()
    if block.spec is None:  # its layers were changed beyond recognition
        return BlockReport(name, None, True, "eager", reason, None)
    weight = block._pairs[-1][0].weight
    backend: str | None = "eager"
    if reason is None:
        try:
            backend, reason = kernel_for(block.spec, block.backend, weight.device)
        except (RuntimeError, ValueError) as error:  # no backend here, or an override that names none
            backend, reason = None, str(error)
    never_written = None
    if inputs is not None and backend not in (None, "eager"):
        never_written = sum(
            plan(block.spec, (1, *shape[1:]), dtype=weight.dtype).bytes_never_written for shape in inputs
        )
    return BlockReport(name, block.spec, True, backend, reason, never_written)


def _block_input_shapes(model: nn.Module, input_shape: Sequence[int]) -> dict[str, list[torch.Size]]:
    """The input shapes of each fused block, by name and call, from a copy on the meta device, without hooks."""
    tensors = [*model.parameters(), *model.buffers(), *computed_tensors(model)]
    # Tensors that the copy finds in its memo are not copied: no weight is.
    memo = {id(t): t.detach().to("meta") for t in tensors}
    shapes: dict[str, list[torch.Size]] = {}
    try:
        meta = copy.deepcopy(model, memo).eval()
        for module in meta.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        for name, block, _ in _blocks(meta):
            if isinstance(block, FusedBlock) and block.spec is not None:
                block.forward = _recorder(block.spec, shapes.setdefault(name, []), block.in_front)
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        with torch.no_grad(), torch.device("meta"):
            meta(torch.empty(*input_shape, dtype=dtype))
    except Exception as error:
        raise ValueError(
            f"the model does not run on one input of shape {list(input_shape)} on the meta device: {error}; "
            "call report(model) without input_shape"
        ) from error
    return shapes


def _recorder(spec: BlockSpec, shapes: list[torch.Size], in_front: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """Stands in for a block's forward: notes the input's shape, returns an output without values."""

    def forward(x: Tensor) -> Tensor:
        x = x if in_front is None else in_front(x)
        shapes.append(x.shape)
        return x.new_empty(x.shape[0], spec.out_channels, *spec.out_size(*x.shape[2:]))

    return forward


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f} MiB"
