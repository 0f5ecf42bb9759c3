"""One run of a model on the meta device: which ops each module calls, what they make, and how long that lives."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..convert.find import computed_tensors


@dataclass
class Row:
    """One call of a module without children, or an op that another module calls."""

    name: str
    kind: str
    call: int | None  # which call of a module without children
    first: int  # op
    last: int
    output_shape: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0


@dataclass
class Storage:
    """A tensor's memory, live while the ops from ``first`` to ``last`` run."""

    bytes: int
    row: int  # that made it
    first: int
    last: int


@dataclass(frozen=True)
class Call:
    """The ops of one call of a module."""

    first: int
    last: int
    input_shape: torch.Size  # of the first tensor given; empty without one


@dataclass(frozen=True)
class Product:
    """A convolution or a matrix product."""

    row: int
    multiply_adds: int
    elements: int  # that it puts out
    weight_shape: tuple[int, ...] = ()  # of a convolution that is not transposed, else empty
    groups: int = 1
    same_pixels: bool = False  # it puts out as many as it takes
    source: Product | None = None  # whose output it takes, perhaps through norms and activations

    @property
    def depthwise(self) -> bool:
        """k x k, one filter a channel."""
        w = self.weight_shape
        return bool(w) and self.groups == w[0] > 1 and w[1] == 1 and math.prod(w[2:]) > 1

    @property
    def pointwise(self) -> bool:
        w = self.weight_shape
        return bool(w) and self.groups == 1 and math.prod(w[2:]) == 1 and self.same_pixels


class Trace(TorchDispatchMode):
    """Notes each op: which module calls it, what it makes and multiplies, and how long what it made lives."""

    def __init__(self, model: nn.Module, x: Tensor, counter: FlopCounterMode) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.ops: int = 0  # so far
        self.storages: list[Storage] = []
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.products: list[Product] = []
        self._counter = counter
        self._parameters = {_key(p): p.numel() for p in model.parameters()}
        self._outside = {_key(t) for t in (*model.parameters(), *model.buffers(), x)}
        self._live: dict[int, Storage] = {}
        self._sources: dict[int, Product] = {}  # of what is live now
        self._stack: list[tuple[str, nn.Module, int, int, torch.Size]] = []
        self._numbers = itertools.count()
        for name, module in model.named_modules():
            self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            shape = next((t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.Size())
            self._stack.append((name, module, next(self._numbers), self.ops, shape))

        def leave(*_: Any) -> None:
            _name, _module, _number, first, shape = self._stack.pop()
            self.calls[name].append(Call(first, self.ops - 1, shape))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        multiply_adds = (self._counter.get_total_flops() - before) // 2
        op = func._overloadpacket
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if op is torch.ops.aten.native_batch_norm:
            made = made[:1]  # the statistics behind it are empty in eval, on the meta device they are not
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        new = [t for t in made if _key(t) not in self._live and _key(t) not in self._outside]
        tick = self.ops
        if multiply_adds or func._schema.is_mutable or any(t.untyped_storage().nbytes() for t in new):
            row = self._row(op.__name__, tick)
            self.rows[row].multiply_adds += multiply_adds
            self.rows[row].parameters += sum(self._parameters.pop(_key(t), 0) for t in given)
            self.rows[row].output_shape = tuple(made[0].shape) if made else ()
            for t in new:
                self._born(t, row, tick)
            if multiply_adds:
                self.products.append(self._product(op, args, made[0], row, multiply_adds))
                self._sources[_key(made[0])] = self.products[-1]
            elif made:
                self._follow(op, given, made[0])
        self.ops += 1
        return out

    def _row(self, op: str, tick: int) -> int:
        name, module, call, *_ = self._stack[-1] if self._stack else ("", None, 0)
        leaf = module is not None and next(module.children(), None) is None
        if leaf and self.rows and self.rows[-1].call == call:
            self.rows[-1].last = tick
        else:
            kind = type(module).__name__ if leaf else op
            self.rows.append(Row(name, kind, call if leaf else None, tick, tick))
        return len(self.rows) - 1

    def _born(self, t: Tensor, row: int, tick: int) -> None:
        storage, key = t.untyped_storage(), _key(t)
        if key in self._live:  # the op gave it twice
            return
        self._live[key] = record = Storage(storage.nbytes(), row, tick, tick)
        self.storages.append(record)
        weakref.finalize(storage, self._died, key).atexit = False

    def _died(self, key: int) -> None:
        self._sources.pop(key, None)
        if key in self._live:
            self._live.pop(key).last = self.ops - 1

    def finish(self) -> None:
        """What is live now outlives the last op."""
        for record in self._live.values():
            record.last = self.ops
        self._live.clear()

    def _follow(self, op: Any, given: list[Tensor], y: Tensor) -> None:
        """Notes which product's output ``y`` still is, channel by channel, if it is one's."""
        found = []
        if not any(word in op.__name__ for word in ("mean", "pool")):
            sources = [self._sources.get(_key(t)) for t in given if t.shape[:2] == y.shape[:2]]
            found = [p for p in self.products if any(p is s for s in sources)]
        # A gate is computed from what it scales, so that is the product that ran first.
        if len(found) == 1 or (found and op is torch.ops.aten.mul):
            self._sources[_key(y)] = found[0]
        else:
            self._sources.pop(_key(y), None)

    def _product(self, op: Any, args: Any, y: Tensor, row: int, multiply_adds: int) -> Product:
        if op is not torch.ops.aten.convolution or args[6]:  # transposed
            return Product(row, multiply_adds, y.numel())
        x, weight = args[:2]
        source = self._sources.get(_key(x))
        return Product(row, multiply_adds, y.numel(), weight.shape, args[8], x.shape[2:] == y.shape[2:], source)


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def traced(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Trace:
    """One run of a copy of ``model`` on the meta device, without its hooks."""
    # Tensors that the copy finds in its memo are not copied: no weight is.
    memo = {id(t): t.detach().to("meta") for t in (*model.parameters(), *model.buffers(), *computed_tensors(model))}
    try:
        meta = copy.deepcopy(model, memo)
        for module in meta.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        x = torch.empty(*shape, dtype=dtype, device="meta")
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            trace = Trace(meta, x, counter)
            with trace:
                y = meta(x)
            trace.finish()
            del y
    except Exception as error:
        raise ValueError(
            f"the model does not run on one input of shape {list(shape)} on the meta device: {error}; give the shape "
            "of its only input, batch first"
        ) from error
    return trace
