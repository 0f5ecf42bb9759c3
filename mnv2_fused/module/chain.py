"""The chain that the fused ops compute, found in a recorded call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATION_TABLE, GATE_TABLE, LEAKY_RELU, Function
from ..spec import KERNELS, KERNELS_IN_WORDS, BlockSpec
from .reading import Around, Unfusable, full_name
from .recording import ChildCall, Value

Pads = tuple[int, int, int, int]  # left, right, top, bottom


class Recipe(NamedTuple):
    """A block, as it was seen to compute: modules by their names inside it."""

    stages: tuple[tuple[str, str | None], ...]  # (convolution, norm) of [expand,] depthwise, project
    squeeze: tuple[str, str] | None
    spec: BlockSpec
    around: Around | None = None


class Chain:
    """Reads a recorded result backwards: [input,] project, [gate,] depthwise, [expand,] input."""

    def __init__(self, model: nn.Module, calls: list[ChildCall]) -> None:
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._calls = calls  # of the module's children, in their order
        self._used: list[str] = []

    def read(self, result: Value) -> tuple[Recipe, Pads, tuple[int, ...]]:
        """The block with padding None, how it padded: left, right, top, bottom, and the size of what it takes."""
        result = result.unshaped()
        residual, summed = _residual(result)
        chain = self._without_tail(summed)
        out_activation, out_slope, end = _function(chain, ACTIVATION_TABLE, of_sum=not residual)
        activates_sum = False
        if not residual and end.kind == "pointwise":  # of a sum
            activates_sum, end = _residual(end)
            require(activates_sum, f"there is aten::{end.op} of two tensors where an activation belongs")
            residual = True
            end = end.unshaped()
        project, source = self._stage(end, "project")
        gate = None
        if source.op in ("mul", "mul_") and len(_sources(source)) == 2:
            gate, source = self._gate(source)
        activation, slope, middle = _function(source, ACTIVATION_TABLE)
        depthwise, source, depthwise_options, pads = self._depthwise(middle)
        slopes = {s for s in (out_slope, slope) if s is not None}
        expand = before = None
        if source.kind != "input":
            used = list(self._used)
            try:
                before, slope, start = _function(source, ACTIVATION_TABLE)
                expand, source = self._stage(start, "expand")
                slopes |= set() if slope is None else {slope}
            except Unfusable:
                if not self._gives(source):
                    raise
                before, self._used = None, used  # the block has no expansion, and something runs in front
        around = None
        if source.kind != "input" or chain is not summed:
            require(self._gives(source), "what its expansion takes is not its input as it is")
            require(not activates_sum, "an activation follows the sum of its input and more than a block")
            around = self._around(source, chain, summed, residual)
            residual = False
        require(len(set(self._used)) == len(self._used), "one of its modules is used twice")
        options: dict[str, Any] = {}
        squeeze = None
        if gate is not None:
            squeeze, options, of_gate = gate
            slopes |= of_gate
        require(len(slopes) < 2, f"its LeakyReLUs have slopes of {sorted(slopes)}, the fused op has one for a block")
        stride, dilation, kernel = depthwise_options
        dw, pw = self._modules[depthwise[0]], self._modules[project[0]]
        try:
            spec = BlockSpec(
                source.shape[1],
                dw.out_channels,
                pw.out_channels,
                stride,
                expand=expand is not None,
                residual=residual,
                kernel=kernel,
                dilation=dilation,
                activation=activation,
                out_activation=out_activation,
                expand_activation=before,
                activates_sum=activates_sum,
                **({"negative_slope": slopes.pop()} if slopes else {}),
                **options,
            )
        except ValueError as error:
            raise Unfusable(str(error)) from None
        stages = (depthwise, project) if expand is None else (expand, depthwise, project)
        return Recipe(stages, squeeze, spec, around), pads, source.shape[2:]

    def _gives(self, v: Value) -> bool:
        """Whether ``v`` is the result of the first child that computes something, which takes the module's input."""
        first = next((call for call in self._calls if call.taken.unshaped() is not call.given.unshaped()), None)
        return first is not None and first.taken.kind == "input" and first.given.unshaped() is v

    def _without_tail(self, end: Value) -> Value:
        """What the last children take that scale channels by weights of their own; ``end`` where there are none."""
        for call in reversed(self._calls):
            scales = call.given.unshaped() is end and end.op in ("mul", "mul_")
            if scales and any(v.kind == "constant" and not _is_number(v) for v in end.inputs):
                end = call.taken.unshaped()
        return end

    def _around(self, source: Value, end: Value, summed: Value, shortcut: bool) -> Around:
        """The children that run in a row up to ``source``, to ``end``, and to ``summed``."""
        parts: tuple[list[str], list[str], list[str]] = [], [], []
        ends, at = [source, end, summed], None
        for call in self._calls:
            taken, given = call.taken.unshaped(), call.given.unshaped()
            require(taken.kind == "input" if at is None else taken is at, "its children do not run in a row")
            while len(ends) > 1 and at is ends[0]:
                ends.pop(0)
            parts[3 - len(ends)].append(call.name)
            at = given
        require(at is summed, "what is added to its input is no child's result")
        lead, core, tail = ([n for n in part if type(self._modules[n]) is not nn.Identity] for part in parts)
        require(len(lead) == 1 and bool(core), "more than one child runs before the block")
        return Around(lead[0], tuple(core), tuple(tail), shortcut)

    def _module_of(self, names: tuple[str | None, ...], holds: tuple[str, ...]) -> str:
        """The one module whose tensors these are, by the names in ``holds``."""
        first = names[0] or names[-1]
        assert first is not None  # a weight, or statistics
        owner = first.rpartition(".")[0]
        module = self._modules[owner]
        for name, key in zip(names, holds, strict=True):
            own = module._parameters.get(key, module._buffers.get(key))
            expected = f"{owner}.{key}" if owner else key
            require(
                name == expected or (name is None and own is None),
                f"{first} and {name} do not belong to one module as {key}",
            )
        self._used.append(owner)
        return owner

    def _stage(self, end: Value, role: str) -> tuple[tuple[str, str | None], Value]:
        conv, norm = self._convolution(end, role)
        stride, padding, _, groups = conv.options  # the dilation of a 1x1 changes nothing
        name = self._module_of(conv.tensors, ("weight", "bias"))
        weight = self._modules[name]._parameters["weight"]
        require(
            stride == (1, 1) and padding == (0, 0) and groups == 1 and tuple(weight.shape[2:]) == (1, 1),
            f"the {role} convolution is no 1x1 convolution of stride 1 without padding",
        )
        return (name, norm), conv.inputs[0].unshaped()

    def _depthwise(self, end: Value) -> tuple[tuple[str, str | None], Value, tuple[tuple[int, int], int, int], Pads]:
        conv, norm = self._convolution(end, "depthwise")
        stride, padding, dilation, groups = conv.options
        name = self._module_of(conv.tensors, ("weight", "bias"))
        shape = tuple(self._modules[name]._parameters["weight"].shape)
        source = conv.inputs[0].unshaped()
        require(
            groups == shape[0] == source.shape[1] > 1 or (groups == shape[0] == 1 == source.shape[1]),
            f"a convolution of {groups} groups is where a depthwise one belongs",
        )
        require(
            shape[2] == shape[3] and shape[2] in KERNELS and set(stride) <= {1, 2} and dilation[0] == dilation[1],
            f"the depthwise convolution has kernel {shape[2:]}, stride {stride} and dilation {dilation}, the fused op "
            f"takes kernel {KERNELS_IN_WORDS}, stride 1 or 2 and one dilation",
        )
        pads = [padding[1], padding[1], padding[0], padding[0]]
        while source.kind == "pad":
            require(len(source.options) in (2, 4), "it pads more than rows and columns")
            for i, size in enumerate(source.options):
                pads[i] += size
            source = source.inputs[0].unshaped()
        require(min(pads) >= 0, "it crops what its depthwise convolution takes")
        left, right, top, bottom = pads
        return (name, norm), source, (stride, dilation[0], shape[2]), (left, right, top, bottom)

    def _convolution(self, end: Value, role: str) -> tuple[Value, str | None]:
        norm = None
        if end.kind == "norm":
            weight, bias, mean, variance = end.tensors
            norm = self._module_of((mean, variance, weight, bias), ("running_mean", "running_var", "weight", "bias"))
            require(
                getattr(self._modules[norm], "eps", None) == end.options[0],
                f"its {full_name(self._modules[norm])} normalises by another eps than its own",
            )
            end = end.inputs[0].unshaped()
        require(end.kind == "convolution", f"there is {_described(end)} where its {role} convolution belongs")
        return end, norm

    def _gate(self, v: Value) -> tuple[tuple[tuple[str, str], dict[str, Any], set[float]], Value]:
        """Of depthwise result times gate: the squeeze-and-excite, and the depthwise result."""
        require(_multiplies(v), "its gate is not one product")
        for d, g in (v.inputs, v.inputs[::-1]):
            d = d.unshaped()
            try:
                gate, _, end = _function(g.unshaped(), GATE_TABLE)
            except Unfusable:
                if d is v.inputs[1].unshaped():
                    raise
                continue
            if end.kind in ("convolution", "product") and end.shape[2:] in ((), (1, 1)):
                excite, source = self._pooled_product(end)
                between, slope, end = _function(source, ACTIVATION_TABLE)
                reduce, source = self._pooled_product(end)
                require(
                    source.kind == "mean" and source.inputs[0].unshaped() is d,
                    "its squeeze-and-excite does not take the mean of what it multiplies",
                )
                weight = self._modules[reduce]._parameters["weight"]
                options = {"squeeze_channels": weight.shape[0], "squeeze_activation": between, "gate": gate}
                return ((reduce, excite), options, set() if slope is None else {slope}), d
        raise Unfusable("its gate does not end in a product of channels")

    def _pooled_product(self, end: Value) -> tuple[str, Value]:
        require(end.kind in ("convolution", "product"), f"there is {_described(end)} in its squeeze-and-excite")
        name = self._module_of(end.tensors, ("weight", "bias"))
        if end.kind == "convolution":
            weight = self._modules[name]._parameters["weight"]
            require(
                tuple(weight.shape[2:]) == (1, 1) and end.options[1] == (0, 0) and end.options[3] == 1,
                "its squeeze-and-excite has a convolution that is no 1x1",
            )
        return name, end.inputs[0].unshaped()


def require(holds: bool, why: str) -> None:
    if not holds:
        raise Unfusable(why)


def _described(v: Value) -> str:
    return {"input": "its input", "norm": "a norm", "pad": "padding"}.get(v.kind, f"aten::{v.op or v.kind}")


def _residual(v: Value) -> tuple[bool, Value]:
    """Whether ``v`` is a sum with the block's input, and what else it is the sum of; or ``v`` itself."""
    if v.op not in ("add", "add_") or len(v.inputs) != 2:
        return False, v
    a, b = (value.unshaped() for value in v.inputs)
    if "input" not in (a.kind, b.kind):
        return False, v
    require(_adds(v), "its sum with the input is weighted")
    require(a.shape == b.shape, "its sum with the input broadcasts")
    return True, a if b.kind == "input" else b


def _sources(v: Value) -> list[Value]:
    """What the elements of ``v`` are computed from, element by element."""
    v = v.unshaped()
    if v.kind != "pointwise":
        return [v]
    found: dict[Value, None] = {}
    for value in v.inputs:
        if not _is_number(value):
            found.update(dict.fromkeys(_sources(value)))
    return list(found)


def _is_number(v: Value) -> bool:
    """Whether it is one number of forward itself, whatever weights and attributes hold."""
    return v.kind == "constant" and v.value is not None and v.value.numel() == 1 and not v.tensors


def _evaluate(v: Value, source: Value, t: Tensor) -> Tensor:
    """``v`` where ``source`` is ``t``."""
    v = v.unshaped()
    if v is source:
        return t
    if _is_number(v):
        assert v.value is not None
        return v.value
    assert v.again is not None
    return v.again(*(_evaluate(value, source, t) for value in v.inputs))


# Where activations are told apart: every bend of a known one, and values beyond.
_GRID = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.tensor([-1e3, -1.0, 1e3]).double()])


def _sum_with_input(v: Value) -> Value | None:
    """The sum of the block's input and something else that ``v`` is computed from alone, element by element."""
    v = v.unshaped()
    if v.kind != "pointwise":
        return None
    if v.op in ("add", "add_") and any(value.unshaped().kind == "input" for value in v.inputs):
        return v
    found = {s for value in v.inputs if not _is_number(value) for s in [_sum_with_input(value)]}
    return found.pop() if len(found) == 1 else None


def _function(v: Value, table: dict[str, Function], *, of_sum: bool = False) -> tuple[str, float | None, Value]:
    """Which of ``table`` makes ``v`` of its source, with a slope; and the source. ``of_sum``: that may be a sum with
    the block's input.
    """
    v = v.unshaped()
    sources = _sources(v)
    if of_sum and len(sources) == 2 and (whole := _sum_with_input(v)) is not None:
        sources = [whole]
    require(len(sources) == 1, f"there is aten::{v.op} of two tensors where an activation belongs")
    source = sources[0]
    if v is source:
        require("identity" in table, f"there is {_described(v)} where a gate belongs")
        return "identity", None, source
    with torch.no_grad():
        y = _evaluate(v, source, _GRID)
        for name, function in table.items():
            slope = None
            if name == LEAKY_RELU:
                slope = -y[_GRID == -1.0].item()
                expected = function.torch(_GRID, slope)
            else:
                expected = function.torch(_GRID)
            if y.shape == _GRID.shape and torch.allclose(y, expected, rtol=1e-9, atol=1e-12):
                return name, slope, source
    raise Unfusable(f"its function after {_described(source)} ends in aten::{v.op} and is none of {', '.join(table)}")


def _two(v: Value, expected: Callable[[Tensor, Tensor], Tensor]) -> bool:
    a, b = torch.tensor([3.0, -2.0]).double(), torch.tensor([0.5, 7.0]).double()
    return v.again is not None and len(v.inputs) == 2 and torch.equal(v.again(a, b), expected(a, b))


_adds = functools.partial(_two, expected=torch.add)
_multiplies = functools.partial(_two, expected=torch.mul)
