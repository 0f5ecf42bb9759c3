"""Modules that stay the instances they were: the one place that assigns ``__class__``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from .fused_block import FusedBlock, Reader
from .reading import Parts

_M = TypeVar("_M", bound=nn.Module)


def become(module: nn.Module, cls: type[_M]) -> _M:
    """Makes ``module`` an instance of ``cls``, a sub- or superclass of its own; returns it."""
    module.__class__ = cls
    assert isinstance(module, cls)
    return module


def around_the_same(module: nn.Module, cls: type[_M], without: Iterable[str] = ()) -> _M:
    """Another module of ``cls`` with the attributes, tensors and children of ``module``, but for those named."""
    other = cls.__new__(cls)
    left_out = set(without)
    vars(other).update({name: value for name, value in vars(module).items() if name not in left_out})
    other._modules = dict(module._modules)
    return other


def name_clash(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """A name of ``cls`` that ``module`` uses for something of its own; None where it could become one of those."""
    ordinary = set(dir(nn.Module)) | set(vars(nn.Module()))
    ours = {name for c in cls.__mro__ if c not in nn.Module.__mro__ for name in (*vars(c), *getattr(c, "OWN", ()))}
    ours |= {name for c in cls.__mro__ for name in vars(c).get("__annotations__", ())}
    theirs = set(vars(module)) | set(module._modules) | set(module._parameters) | set(module._buffers)
    theirs |= {name for c in type(module).__mro__ if c not in nn.Module.__mro__ for name in vars(c)}
    # Of how it is copied there is one way.
    copies = {"__getstate__", "__reduce__", "__reduce_ex__", "__deepcopy__"}
    return next(iter(sorted((ours - ordinary) & theirs | copies & theirs)), None)


class FusedInPlace(FusedBlock):
    """A block of any class that stays the instance it was: attributes, children, names in the state_dict.

    :func:`fuse_in_place` makes an instance of a subclass of both, ``Fused<Name>``, of it.
    """

    original: type[nn.Module]  # what the block was
    reader: Reader

    def __new__(cls, *args: Any, **options: Any) -> nn.Module:
        if not args and not options:  # nn.DataParallel makes replicas so
            return super().__new__(cls)
        # Sequential's slices make more of their own class: these are ordinary modules.
        return cls.original(*args, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _restored, (cls.original, cls.reader, cls.__mro__[1]), self.__getstate__()

    def _read(self) -> Parts:
        return type(self).reader(self)

    def _forward_modules(self, x: Tensor) -> Tensor:
        return super(FusedBlock, self).forward(x)

    def _ordinary(self) -> nn.Module:
        return around_the_same(self, type(self).original, self.OWN)

    def unfused(self) -> nn.Module:
        """Itself, as it was."""
        for name in self.OWN:
            vars(self).pop(name, None)
        return become(self, type(self).original)


def _restored(original: type[nn.Module], reader: Reader, base: type[FusedInPlace]) -> FusedInPlace:
    block = original.__new__(original)
    return become(block, _fused_class(original, reader, base))


@functools.cache
def _fused_class(original: type[nn.Module], reader: Reader, base: type[FusedInPlace]) -> type[FusedInPlace]:
    members = {"original": original, "reader": staticmethod(reader), "__module__": __package__, "__doc__": base.__doc__}
    return type(f"Fused{original.__name__}", (base, original), members)


def fuse_in_place(
    block: nn.Module,
    reader: Reader,
    *,
    backend: str = "auto",
    recompute: bool = False,
    base: type[FusedInPlace] = FusedInPlace,
) -> FusedInPlace:
    """Makes ``block`` run fused: it becomes an instance of a subclass of its class, and is returned.

    Raises ValueError, leaving it as it was, where ``reader`` finds it unfit, or for an unknown ``backend``.
    """
    fused = become(block, _fused_class(type(block), reader, base))
    try:
        fused._start(backend, recompute)
    except ValueError:
        fused.unfused()
        raise
    return fused
