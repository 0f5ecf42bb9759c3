"""Whether everything that a fused call relies on is still what it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import backends


class Watch:
    """Everything inside some modules that a fused call does not look at again, and whether it is unchanged.

    Hand over ``RemovableHandle.next_id`` from before the modules were examined, so that a hook added meanwhile counts.
    """

    def __init__(
        self,
        roots: Iterable[nn.Module],
        next_hook: int,
        parents: Iterable[nn.Module] = (),
        hooked: Iterable[nn.Module] = (),
    ) -> None:
        """``parents``: modules whose lists of children count too, but nothing in children outside ``roots``.

        ``hooked``: modules that count as changed once they lose a hook they have now.
        """
        modules = list(dict.fromkeys(itertools.chain.from_iterable(root.modules() for root in roots)))
        self.next_hook = next_hook
        tensors = dict.fromkeys(t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
        self.tensors: list[Tensor] = [t for t in tensors if t is not None and t.is_floating_point()]
        # Aliases keep the storages alive, so that no other tensor can appear at the same address.
        self._aliases = [t.detach() for t in self.tensors]
        self._native = backends._C.Watch(
            [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d] + [p._modules for p in parents],
            # An instance's own forward is one attribute more.
            [vars(m) for m in (*modules, *parents)] + [hooks for m in hooked for hooks in hooks_of(m) if hooks],
            [entry for m in modules for entry in watched_entries(m)],
            self.tensors,
            # A view through .data (channels cut, axes swapped) can have the address and version of the whole.
            [t for t in self.tensors if t.dim() > 1],
        )

    def holds(self) -> bool:
        return RemovableHandle.next_id == self.next_hook and self._native.holds()


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries that hold a module's hooks."""
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


_WATCHED = (bool, int, float, str, tuple, list)


def watched_entries(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """(dictionary, key) of what decides what ``module`` computes, besides its tensors and submodules."""
    attributes = vars(module)
    for name, value in attributes.items():
        # A fused block counts how often it forgot what it knew.
        if name == "_forgotten" or (name[0] != "_" and (value is None or type(value) in _WATCHED)):
            yield attributes, name
    config = attributes.get("config")
    if "tf_padding" in getattr(config, "__dict__", ()):  # transformers' MobileNetV2 looks at it in forward
        yield vars(config), "tf_padding"


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
