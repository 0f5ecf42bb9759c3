"""Finding a model's inverted residuals, fit to be fused or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..families import FLAT, Family, family_of, observed_family_of, parts_of, read_as_seen, read_mobilenet_v2
from ..module import FusedBlock, reading
from ..module.guard import has_hooks, is_compiled
from ..module.reading import Parts
from ..spec import BlockSpec
from .flat import FlatBlock, flat_blocks


class Match(NamedTuple):
    """A block that can run fused."""

    family: Family
    spec: BlockSpec
    sequence: nn.Module | None = None  # among whose children its layers lie, where they have no module of their own


def check_model(model: Any) -> None:
    """Raises TypeError for what is no module."""
    if issubclass(type(model), nn.Module):  # a wrapper may only say that it is one
        return
    found = f"the class {model.__name__}: call it first" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(f"model must be an nn.Module, got {found}")


def _match(module: nn.Module) -> Match | str | None:
    family = family_of(module) or observed_family_of(module)
    if family is None:
        return None
    parts = parts_of(module, family.read)
    if isinstance(parts, str):
        if (seen := read_as_seen(module)) is None:
            return parts
        family, parts = seen
    if is_torchvisions(module, family) and has_hooks(module):
        return "a hook on it would not be called: remove it first"
    if parts.spec.hidden_channels == 1 and not parts.spec.expand:
        return "its depthwise convolution has one channel, which leaves most of a vector empty: torch is faster"
    return Match(family, parts.spec)


def is_torchvisions(block: nn.Module, family: Family) -> bool:
    """Whether a ``FusedInvertedResidual`` takes its place: layers nested, and a sum, as torchvision's."""
    if family.read is not read_mobilenet_v2 or not isinstance(getattr(block, "use_res_connect", None), bool):
        return False
    conv: Any = block.conv
    return reading.is_plain(conv) and reading.is_plain(conv._modules.get("0"))


def blocks_of(
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
    compiled = compiled or is_compiled(module)
    found = _match(module)
    unknown = isinstance(found, str) and family_of(module) is None
    if found is not None and not unknown:
        yield name, module, _COMPILED if compiled else found
        return
    prefix = f"{name}." if name else ""
    flat = {entry.names[0]: entry for entry in flat_blocks(module)}
    of_flat = {key for entry in flat.values() if not isinstance(entry.found, str) for key in entry.names}
    inside = bool(flat)
    for key, child in module._modules.items():
        if key in flat:
            yield f"{prefix}{flat[key].name}", flat[key].block, _of_flat(flat[key], module, compiled)
        if child is not None and key not in of_flat:
            for entry in blocks_of(child, f"{prefix}{key}", compiled, seen):
                inside = True
                yield entry
    if unknown and not inside:
        yield name, module, found


def _of_flat(entry: FlatBlock, sequence: nn.Module, compiled: bool) -> Match | str | None:
    if not isinstance(entry.found, Parts):
        return entry.found
    return _COMPILED if compiled else Match(FLAT, entry.found.spec, sequence)


_COMPILED = "it is compiled: fuse first, then compile"


def computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Attributes that a hook computes from parameters before each call (pruning, weight norm).

    ``copy.deepcopy`` refuses them, unless its memo has them already.
    """
    for module in model.modules():
        yield from (t for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf)


NOT_FOUND = (
    "no inverted residual was found: neither a known class, nor a module with one depthwise convolution and the 1x1 "
    "convolutions of a block"
)
