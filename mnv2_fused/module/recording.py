"""What a module computes, as the operations that torch runs for it: names and classes play no part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .reading import Unfusable

# Operations that give the elements of a tensor in another shape, or a copy of them.
_SHAPES = {
    *("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "alias", "detach", "clone", "contiguous"),
    *("expand", "_to_copy", "lift_fresh"),
}


# Operations element by element that torch does not tag so: 2.13 hardswish and gelu_, 2.11 also leaky_relu, hardtanh_
# and hardsigmoid_.
_POINTWISE = {"hardswish", "leaky_relu", "hardtanh", "hardsigmoid", "gelu"}


@dataclass(eq=False)
class Value:
    """A tensor of a recorded call, and the operation that made it."""

    # "input", "convolution", "norm", "mean", "mean of" one side, "pad", "product", "pointwise", "shape", "constant" or
    # "other"
    kind: str
    shape: tuple[int, ...]
    inputs: tuple[Value, ...] = ()
    op: str = ""
    # Parameters and buffers that it takes, by their names, None for another tensor from outside; plain arguments.
    tensors: tuple[str | None, ...] = ()
    options: tuple[Any, ...] = ()
    again: Callable[..., Tensor] | None = field(default=None, repr=False)  # of "pointwise": on other inputs
    value: Tensor | None = field(default=None, repr=False)  # of "constant"

    def unshaped(self) -> Value:
        """What it is a copy of, or a pooled vector in another shape."""
        if self.kind != "shape":
            return self
        of = self.inputs[0]
        pooled = of.shape[:2] == self.shape[:2] and all(size == 1 for size in of.shape[2:])
        return of.unshaped() if pooled or of.shape == self.shape else self


class Recording(TorchDispatchMode):
    """Records what is called inside. ``tensors``: the module's parameters and buffers, by their names.

    Raises :class:`Unfusable` at an operation that makes the result depend on more than the input's and the weights'
    values by the same arithmetic: random numbers, a look at a value, a change of a weight or of the input.
    """

    def __init__(self, x: Tensor, tensors: dict[str, Tensor], trains: bool) -> None:
        super().__init__()
        self._trains = trains  # norms take their statistics from the batch, and count batches
        self._names = {id(t): name for name, t in tensors.items()}
        self._storages = {t.untyped_storage()._cdata: name for name, t in tensors.items()}
        self._input = x
        self._values: dict[int, Value] = {id(x): Value("input", tuple(x.shape))}
        self._held: list[Tensor] = [x]  # so that no id comes twice

    def value_of(self, t: Tensor) -> Value:
        found = self._values.get(id(t))
        if found is None:  # made outside, or of weights alone
            found = Value("constant", tuple(t.shape), tensors=(self._names.get(id(t)),), value=t)
            self._keep(t, found)
        return found

    def _keep(self, t: Tensor, value: Value) -> None:
        self._values[id(t)] = value
        self._held.append(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unfusable(f"its forward draws random numbers ({name})")
        if torch.Tag.data_dependent_output in func.tags or name in ("_local_scalar_dense", "item"):
            raise Unfusable(f"its forward looks at values of tensors ({name})")
        inputs = [self.value_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        written = _written(func, args, kwargs)
        for t in written:
            self._refuse_changes(t, name)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for place, t in enumerate(made):
            self._keep(t, self._value(func, name, args, kwargs, inputs, t, place))
        return result

    def _refuse_changes(self, t: Tensor, name: str) -> None:
        storage = t.untyped_storage()._cdata
        if storage in self._storages:
            if self._trains and self._storages[storage].endswith("num_batches_tracked"):
                return
            raise Unfusable(f"its forward changes {self._storages[storage]} ({name})")
        if storage == self._input.untyped_storage()._cdata:
            raise Unfusable(f"its forward changes its input ({name})")
        for other in self._held:  # what views of the memory hold from now on, nobody wrote down
            if other is not t and other.untyped_storage()._cdata == storage:
                self._values[id(other)] = Value("other", tuple(other.shape), op=name)

    def _value(
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Value], result: Tensor, place: int
    ) -> Value:
        shape = tuple(result.shape)
        if not inputs or all(v.kind == "constant" for v in inputs):
            # A literal of forward itself comes by lift_fresh; all else from outside may change.
            sources = () if name == "lift_fresh" else tuple(t for v in inputs for t in v.tensors)
            return Value("constant", shape, tuple(inputs), name, sources, value=result)
        base = name.removesuffix("_") if func._schema.is_mutable else name

        def named(*places: int) -> tuple[str | None, ...]:
            return tuple(None if args[i] is None else self._names.get(id(args[i])) for i in places)

        def known(*places: int) -> bool:
            """Whether all tensors there are the module's own, or None."""
            return all(args[i] is None or id(args[i]) in self._names for i in places)

        if place > 0:
            return Value("other", shape, op=base)
        if base == "convolution" and known(1, 2):
            _, _, _, stride, padding, dilation, transposed, _, groups = args
            if not transposed:
                both = (tuple(v) if len(v) > 1 else (v[0], v[0]) for v in (stride, padding, dilation))
                options = (*both, groups)
                return Value("convolution", shape, (inputs[0],), base, named(1, 2), options)
        if base == "native_batch_norm" and known(1, 2, 3, 4) and args[3] is not None and (self._trains or not args[5]):
            return Value("norm", shape, (inputs[0],), base, named(1, 2, 3, 4), (args[7],))
        over = sorted(d % 4 for d in args[1] or ()) if base == "mean" and len(args) > 1 else []
        if over == [2, 3] and len(inputs[0].shape) == 4:
            return Value("mean", shape, (inputs[0],), base)
        if over in ([2], [3]) and len(shape) == len(inputs[0].shape) == 4:  # one after the other
            of = inputs[0]
            both = of.kind == "mean of" and of.options != (over[0],)
            options = () if both else (over[0],)
            return Value("mean" if both else "mean of", shape, of.inputs if both else (of,), base, (), options)
        if base == "constant_pad_nd" and (len(args) < 3 or args[2] == 0):
            return Value("pad", shape, (inputs[0],), base, options=tuple(args[1]))
        if base in ("addmm", "mm"):
            return self._product(base, args, shape)
        # Pooling in channels_last sets the strides of its result.
        restrided = base == "as_strided" and shape == inputs[0].shape and shape[2:] == (1, 1) and len(args) == 3
        if (base in _SHAPES or (restrided and args[2][:2] == [shape[1], 1])) and len(inputs) == 1:
            return Value("shape", shape, (inputs[0],), base)
        if torch.Tag.pointwise in func.tags or base in _POINTWISE:
            return Value("pointwise", shape, tuple(inputs), base, again=_again(func, args, kwargs))
        return Value("other", shape, tuple(inputs), base)

    def _product(self, base: str, args: Any, shape: tuple[int, ...]) -> Value:
        """x times a transposed weight, plus a bias: what a Linear runs."""
        bias, x, weight = (None, *args[:2]) if base == "mm" else args[:3]
        transposed = self.value_of(weight)
        is_own = transposed.op == "t" and transposed.inputs[0].op == ""  # the parameter itself, not computed from it
        name = transposed.tensors[0] if is_own else None
        of_bias = None if bias is None else self._names.get(id(bias))
        if name is None or (bias is not None and of_bias is None):
            return Value("other", shape, op=base)
        return Value("product", shape, (self.value_of(x),), base, (name, of_bias))


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            yield from (t for t in tree_leaves(given) if isinstance(t, Tensor))


def _again(func: Any, args: Any, kwargs: Any) -> Callable[..., Tensor]:
    """``func`` on other tensors in the places of its own, which stay as they are."""

    def call(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        new_args, new_kwargs = tree_map_only(Tensor, lambda _: next(rest).clone(), (args, kwargs))
        return func(*new_args, **new_kwargs)

    return call


class ChildCall(NamedTuple):
    """A call of a child with one tensor that gives one."""

    name: str
    taken: Value
    given: Value


def record(
    call: Callable[[Tensor], Any],
    x: Tensor,
    tensors: dict[str, Tensor],
    children: dict[str, nn.Module],
    trains: bool = False,
) -> tuple[Value, Tensor, list[ChildCall]]:
    """Where the result of ``call(x)`` comes from, the result, and what calls of ``children`` take and give.

    Raises :class:`Unfusable` where the result is no tensor.
    """
    calls: list[ChildCall] = []
    taken: list[Value | None] = []
    handles = []
    with torch.no_grad(), Recording(x, tensors, trains) as recording:

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            one = len(args) == 1 and type(args[0]) is Tensor and not kwargs
            taken.append(recording.value_of(args[0]) if one else None)

        def leave(name: str, _: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            before = taken.pop()
            if before is not None and type(y) is Tensor:
                calls.append(ChildCall(name, before, recording.value_of(y)))

        for name, child in children.items():
            handles += [
                child.register_forward_pre_hook(enter, with_kwargs=True),
                child.register_forward_hook(functools.partial(leave, name)),
            ]
        try:
            y = call(x)
        finally:
            for handle in handles:
                handle.remove()
    if type(y) is not Tensor:
        raise Unfusable(f"its forward returns a {type(y).__name__}, not a tensor")
    return recording.value_of(y), y, calls
