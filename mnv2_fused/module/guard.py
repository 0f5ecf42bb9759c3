"""Whether everything that a prepared call relies on is unchanged: the Python side of ``csrc/python/guard.h``."""

from __future__ import annotations

import functools
import itertools
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, device, dtype, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import backends


class Guard:
    """Dictionaries, attributes and tensors that a prepared call does not look at again, and whether they changed.

    Tensors count as changed by their version, address, shape and strides, by a cache line or two of their memory, and
    by a checksum whose next 16 KiB are compared at each call: torch does not count every write.
    """

    __slots__ = ("_aliases", "_native", "is_valid", "serves", "tensors")

    def __init__(
        self,
        tensors: Iterable[Tensor],
        values: Iterable[dict[str, Any]] = (),
        sizes: Iterable[dict[Any, Any]] = (),
        entries: Iterable[tuple[dict[str, Any], str]] = (),
        hooks: Iterable[dict[int, Any]] = (),
        next_hook: int | None = None,
    ) -> None:
        """``values``: dictionaries whose values must stay the very same objects; ``sizes``: dictionaries that must keep
        their number of entries; ``entries``: values that must stay equal; ``hooks``: dictionaries whose number of
        entries is looked at only after some module was hooked; ``next_hook``: ``RemovableHandle.next_id`` from before
        the modules were looked at, so that a hook added meanwhile counts.
        """
        self.tensors = list(tensors)
        # Aliases keep the memory alive: no other tensor can appear at the same address.
        self._aliases = [t.detach() for t in self.tensors]
        spans = [(t, _span(t)) for t in self.tensors]
        self._native = backends._C.Guard(list(values), list(sizes), list(entries), spans, list(hooks), next_hook)
        self.is_valid = self._native.is_valid
        self.serves = self._native.serves

    @classmethod
    def of_modules(
        cls,
        roots: Iterable[nn.Module],
        next_hook: int,
        parents: Iterable[nn.Module] = (),
        hooked: Iterable[nn.Module] = (),
        watched: Iterable[nn.Module] = (),
    ) -> Guard:
        """Of everything inside ``roots``.

        ``parents``: modules whose lists of children count too, but nothing in children outside ``roots``. ``hooked``:
        modules that count as changed once they lose a hook they have now. ``watched``: modules whose attributes count.
        """
        modules = list(dict.fromkeys(itertools.chain.from_iterable(root.modules() for root in roots)))
        tensors = dict.fromkeys(t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
        return cls(
            [t for t in tensors if t is not None and t.is_floating_point()],
            [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d] + [p._modules for p in parents],
            # An instance's own forward is one attribute more.
            [vars(m) for m in (*modules, *parents)] + [hooks for m in hooked for hooks in hooks_of(m) if hooks],
            [entry for m in modules for entry in watched_entries(m)]
            + [entry for m in watched for entry in watched_entries(m, private=True)]
            # Other dictionaries in their place.
            + [(vars(m), name) for m in modules for name in ("_modules", "_parameters", "_buffers")]
            + [(vars(p), "_modules") for p in parents],
            [hooks for m in dict.fromkeys((*modules, *parents, *hooked)) for hooks in hooks_of(m)] + _global_hooks(),
            next_hook,
        )

    def warn_if_late(self) -> None:
        """Warns, once a process, where a checksum found what no earlier call could see."""
        if self._native.found_late:
            _warn_of_late_writes()


def readable(t: Tensor) -> bool:
    """Whether all elements lie in memory of the CPU now: not those of wrappers, nor of storages that were freed."""
    if not t.is_cpu or t.numel() == 0 or t.data_ptr() == 0:
        return False
    return (t.storage_offset() + _elements(t)) * t.itemsize <= t.untyped_storage().nbytes()


def _elements(t: Tensor) -> int:
    """From the first one to behind the last one."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1


def _span(t: Tensor) -> int:
    """Bytes from a CPU tensor's first element to behind its last one; 0 where memory cannot be read."""
    return _elements(t) * t.itemsize if readable(t) else 0


@functools.cache
def _warn_of_late_writes() -> None:
    warnings.warn(
        "part of a weight of a fused block was written behind torch's back (tensor.data, NumPy, another process ...); "
        "calls since then may have used the weight as it was before. After such a write call model.eval(), which "
        "makes the next call look at everything",
        stacklevel=5,
    )


@functools.cache
def watch_optimizers() -> None:
    """Has the steps of optimizers with ``fused=True`` noted: torch does not count what their kernels write.

    The next call then compares all memory of its weights on a CPU, and folds those on a GPU again.
    """
    register_optimizer_step_post_hook(_note_fused_step)


def _note_fused_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):
        backends._C.note_uncounted_writes()


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries that hold a module's hooks."""
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def _global_hooks() -> list[dict[int, Any]]:
    """The dictionaries that hold the hooks of all modules."""
    return [value for name, value in vars(torch_module).items() if name.startswith("_global_") and "_hooks" in name]


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


_WATCHED = (bool, int, float, str, tuple, list, type, types.FunctionType, types.BuiltinFunctionType)


def watched_entries(module: nn.Module, private: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """(dictionary, key) of what decides what ``module`` computes, besides its tensors and submodules.

    ``private``: whether attributes whose names begin with an underscore may do so, but for those of this package.
    """
    attributes = vars(module)
    own = getattr(module, "OWN", ())
    for name, value in attributes.items():
        public = name[0] != "_" or (private and name not in own)
        # A fused block counts how often its cache was cleared.
        if name == "_forgotten" or (public and (value is None or type(value) in _WATCHED or isinstance(value, tuple))):
            yield attributes, name
    config = attributes.get("config")
    if "tf_padding" in getattr(config, "__dict__", ()):  # transformers' MobileNetV2 looks at it in forward
        yield vars(config), "tf_padding"


def unwatched_values(module: nn.Module) -> dict[str, Any]:
    """Attributes that :func:`watched_entries` leaves out, for ``==``: objects are equal where they are the same."""
    watched = {name for _, name in watched_entries(module)}
    names = vars(module).keys() - watched - _OF_ANY_MODULE - set(getattr(module, "OWN", ()))
    return {name: _comparable(vars(module)[name]) for name in names}


_OF_ANY_MODULE = vars(nn.Module()).keys()


def changeable(module: nn.Module) -> list[str]:
    """Attributes whose insides may change, which :func:`unwatched_values` does not tell."""
    return [name for name in unwatched_values(module) if not _plain(vars(module)[name])]


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    known = (bool, int, float, str, types.NoneType, dtype, device, type)
    return isinstance(value, (*known, types.FunctionType, types.BuiltinFunctionType))


def _comparable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value), [_comparable(entry) for entry in value]
    return value if type(value) in (bool, int, float, str, types.NoneType) else id(value)


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
