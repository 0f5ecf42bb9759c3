"""Networks of any class whose forward was seen to run modules one after the other: as one call, from stem to head.

What forward does is recorded at the first call with an input of each shape: which modules run, and that each takes what
the one before it gave, with nothing in between.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..module.fused_block import FusedBlock
from ..module.guard import has_hooks, is_compiled
from ..module.in_place import become
from ..module.observed import FusedObserved
from .find import FLATTEN, POOL
from .fused import FusedSequential, PreparedRun, RunsFused
from .joined import Joined, with_blocks

_MOST_SHAPES = 256  # of inputs that one network is seen with; others run as they did
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.flatten.using_ints)


class _Operation(NamedTuple):
    """What no module inside ran."""

    func: Any
    args: tuple[Any, ...]
    result: Any


@dataclasses.dataclass
class _Call:
    """One call of a module."""

    module: nn.Module
    x: Any
    version: int = -1  # of x, so that a write in between shows
    result: Any = None
    result_version: int = -1
    more: bool = False  # whether it was given more than x, which may matter
    inside: list[_Call | _Operation] = dataclasses.field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """The calls of modules while a model runs, and the operations beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.stack: list[_Call] = []
        self.first: _Call | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.stack:
            self.stack[-1].inside.append(_Operation(func, () if kwargs else args, result))
        return result

    def enter(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if threading.get_ident() != self.thread:  # hooks are every thread's
            return
        call = _Call(module, given[0] if given else None, _version(given[0]) if given else -1)
        if self.stack:
            self.stack[-1].inside.append(call)
        self.first = self.first or call
        self.stack.append(call)

    def leave(self, module: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        call = self.stack.pop()
        call.result, call.result_version = result, _version(result)
        if len(given) != 1 or kwargs:
            call.more = not (isinstance(module, FusedObserved) and given and module.allows(given[1:], kwargs))


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1


def record(model: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, list[nn.Module] | None]:
    """The result of ``call(x)``, which runs ``model``, and the modules that it ran in a row, if that is all it did."""
    recorder = _Recorder()
    entered = register_module_forward_pre_hook(recorder.enter)
    left = register_module_forward_hook(recorder.leave, with_kwargs=True)
    try:
        with recorder:
            result = call(x)
    finally:
        entered.remove()
        left.remove()
        # torch (2.11 to 2.13) forgets to, and takes the slower way through every module's call from then on.
        torch_module._global_forward_hooks_with_kwargs.pop(left.id, None)
    assert recorder.first is not None
    found = _row_of(recorder.first)
    return result, None if found == [model] else found


def _row_of(call: _Call) -> list[nn.Module]:
    """The modules that one call comes down to; the module itself where it is more than a row of others."""
    module = call.module
    if is_compiled(module) or "forward" in vars(module) or has_hooks(module):
        return [module]
    if type(module) is nn.Identity:
        return []
    leaf = isinstance(module, FusedBlock) or not any(isinstance(entry, _Call) for entry in call.inside)
    if leaf or getattr(module, "running_mean", None) is not None:
        return [module]
    row: list[nn.Module] = []
    now, version = call.x, call.version
    for entry in call.inside:
        if isinstance(entry, _Operation):
            takes_it = bool(entry.args) and _same(entry.args[0], now)
            if not takes_it or (known := _as_modules(entry, now)) is None:
                return [module]
            row += known
            now, version = entry.result, _version(entry.result)
        else:
            if entry.more or not _same(entry.x, now) or entry.version != version:
                return [module]
            row += _row_of(entry)
            now, version = entry.result, entry.result_version
    return row if _same(call.result, now) and call.result_version == version else [module]


def _same(a: Any, b: Any) -> bool:
    """Whether they are one tensor; results of views come in two objects."""
    if a is b:
        return isinstance(a, Tensor)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel()):
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _as_modules(operation: _Operation, x: Tensor) -> list[nn.Module] | None:
    """The mean over pixels, or [N, C, 1, 1] as [N, C]; None for any other operation."""
    func, args, y = operation
    if x.dim() != 4 or not isinstance(y, Tensor):
        return None
    one_pixel = x.shape[2:] == (1, 1)
    if func in _VIEWS:
        return [FLATTEN] if one_pixel and y.shape == x.shape[:2] else None
    if func is torch.ops.aten.as_strided_.default:  # as pooling keeps channels_last
        channels = x.shape[1]
        return [] if one_pixel and y.shape == x.shape and y.stride()[:2] == (channels, 1) and len(args) == 3 else None
    dims = args[1] if len(args) > 1 else None
    if func is not torch.ops.aten.mean.dim or not dims or {d % 4 for d in dims} != {2, 3}:
        return None
    return [POOL] if y.dim() == 4 else [POOL, FLATTEN]


def _parents_of(model: nn.Module, row: list[nn.Module]) -> list[nn.Module]:
    """``model`` and what lies between it and the modules of the row, or beside them."""
    inside, members = [], set(row)
    pending = [model]
    while pending:
        parent = pending.pop()
        inside.append(parent)
        pending += [m for m in parent._modules.values() if m is not None and m not in members]
    return inside


def _state(model: nn.Module) -> list[Any]:
    """What forward may leave in attributes: values, and how many there are of others."""
    found: list[Any] = []
    for module in model.modules():
        own = getattr(module, "OWN", ())
        for name, value in vars(module).items():
            if name in own or name in _OF_ANY_MODULE:
                continue
            sized = isinstance(value, list | dict | set | bytearray | collections.deque)
            found.append((name, id(value), len(value) if sized else 0, value if type(value) in (int, float) else 0))
    return found


_OF_ANY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class RunsAsSeen(RunsFused):
    """What a network inherits from beside its own class, once it was seen to run modules in a row."""

    OWN = (*RunsFused.OWN, "_row", "_shapes")
    outermost = True
    original: type[nn.Module]
    _row: list[nn.Module] | None = None  # as seen; empty: it does something else
    _shapes: frozenset[torch.Size] = frozenset()  # of inputs that it was seen with

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not forward: tools read how that is called.
        ordinary = super(RunsFused, self).__call__
        if len(args) != 1 or kwargs or self.training or torch.compiler.is_compiling() or type(args[0]) is not Tensor:
            return ordinary(*args, **kwargs)
        (x,) = args
        if x.shape in self._shapes:
            y = self.run_fused(x)
            return ordinary(x) if y is None else y
        if self._row == [] or backends._C is None or not self._may_record(x):
            return ordinary(x)
        return self._look(x)

    def runs_a_row(self, x: Tensor) -> bool:
        """Whether forward runs modules in a row, the same ones for ``x`` as for all that it was given before."""
        if x.shape not in self._shapes and self._row != [] and not self.training and self._may_record(x):
            self._look(x)
        return x.shape in self._shapes

    def _look(self, x: Tensor) -> Any:
        """The result of forward, of which it is noted what it runs."""
        before = _state(self)
        result, row = record(self, super(RunsFused, self).__call__, x)
        if _state(self) != before:  # a call does more than give a result
            row = None
        if self._row is None or row == self._row:
            self._row, self._shapes = row or [], self._shapes | {x.shape} if row else frozenset()
        else:  # it depends on the input's size what it does
            self._row, self._shapes = [], frozenset()
        return result

    def _may_record(self, x: Tensor) -> bool:
        if len(self._shapes) >= _MOST_SHAPES:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        quiet = not (backends.transformed() or torch_module._has_any_global_hook())
        # Under autocast it may do something else.
        if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
            return False
        fits = x.dim() == 4 and "forward" not in vars(self)
        return quiet and fits and not (has_hooks(self) or is_compiled(self))

    def fusable_children(self) -> tuple[list[nn.Module | None], list[nn.Module]]:
        if not self._row:
            return [], [self]
        flat = [block for m in self.modules() if isinstance(m, FusedSequential) for block in m.flat_now()]
        return list(Joined.in_row(self, with_blocks(self._row, flat))), _parents_of(self, self._row)

    def _prepare(self, x: Tensor) -> PreparedRun | None:
        if self._prepared is not None:  # something changed: what forward does now has to be seen again
            self._forget_row()
            return None
        return super()._prepare(x)

    def _under_autocast(self, prepared: PreparedRun, x: Tensor) -> Tensor | None:
        """None: a forward may do there what it was not seen to do, as ``x.float()`` of what is in half precision."""
        return None

    def _watched(self, parents: list[nn.Module]) -> list[nn.Module]:
        return parents

    def _forget_row(self) -> None:
        for name in self.OWN:
            vars(self).pop(name, None)

    def run_traced(self, x: Tensor) -> Tensor | None:
        return None

    def train(self, mode: bool = True) -> nn.Module:
        self._forget_row()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._forget_row()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in self.OWN}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (type(self).original,), self.__getstate__()


def _restored(original: type[nn.Module]) -> nn.Module:
    return become(original.__new__(original), _seen_class(original))


@functools.cache
def _seen_class(original: type[nn.Module]) -> type[RunsAsSeen]:
    members = {"original": original, "__module__": __package__, "__doc__": RunsAsSeen.__doc__}
    return type(f"Fused{original.__name__}", (RunsAsSeen, original), members)


def run_as_seen(model: nn.Module) -> None:
    """Makes a network run in one call where it can: it becomes an instance of a subclass of its class."""
    become(model, _seen_class(type(model)))
