"""What a block of any class computes, seen on a copy.

A copy with random weights runs on small images while its operations are recorded. They have to be the chain that the
fused op computes, in every run, and the reference's result has to be the copy's. Which modules hold the weights then
says where to find them in the block itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..fold import BlockWeights, conv_norms, eps_of
from ..reference import in_torch
from .chain import Chain, Recipe, require
from .guard import changeable, unwatched_values, watched_entries
from .in_place import FusedInPlace
from .parameters import parameters_of
from .reading import Parts, Unfusable, full_name
from .recording import record
from .training import is_live, unfolded

_Kwargs = Mapping[str, Any]
_NO_KWARGS: _Kwargs = {}

# Heights and widths, odd and even, so that padding by size shows; those of the first ones are compared, too.
_SIZES = ((7, 10), (9, 9), (8, 8), (12, 11))
_COMPARED = 2
_IMAGES = 2  # of the first size: a result may rest on other images


def recipe_of(block: nn.Module, args: Sequence[Any] = (), kwargs: _Kwargs = _NO_KWARGS, trains: bool = False) -> Recipe:
    """What ``block`` computes, by names of its modules: looked at once for as long as structure and attributes stay.

    ``args`` and ``kwargs``: what forward takes beside x. ``trains``: as it computes in the modes that its modules are
    in, where norms may take their statistics from the batch; else in eval. Raises :class:`Unfusable` with what of it no
    fused op does.
    """
    structure = _structure(block)
    kept = _recipes.get(block)
    if kept is None or not _same(kept[0], structure):
        kept = _recipes[block] = structure, _recipes_of_equals(block, structure)
    # Others of its attributes are not watched: in eval they are taken for what they were.
    unwatched = repr([unwatched_values(m) for m in block.modules()]) if trains else ""
    call = (tuple(args), tuple(sorted(kwargs.items())), trains, unwatched)
    found = kept[1].get(call)
    if found is None:
        try:
            # As ordinary calls do: inference mode keeps operations whole, autocast adds some.
            ordinary = torch.autocast("cpu", enabled=False)
            with torch.inference_mode(False), torch.no_grad(), ordinary, _one_thread(), _no_random_numbers():
                found = _observed(block, args, kwargs, trains)
        except Unfusable as why:
            found = str(why)
        kept[1][call] = found
    if isinstance(found, str):
        raise Unfusable(found)
    return found


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Refuses a forward that draws some by Python or NumPy; torch's are seen as operations."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    before, of_numpy = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        yield
        drawn = random.getstate() != before or (numpy is not None and repr(numpy.get_state()) != repr(of_numpy))
    finally:
        random.setstate(before)
        if numpy is not None:
            numpy.set_state(of_numpy)
    if drawn:
        raise Unfusable("its forward draws random numbers")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Of torch: on small images, beside a busy process, threads were seen to wait a hundred times what they save."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_recipes: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], dict[Any, Recipe | str]]] = weakref.WeakKeyDictionary()


def _recipes_of_equals(block: nn.Module, structure: list[Any]) -> dict[Any, Recipe | str]:
    """What was found of another block of this structure; nothing where integers in buffers may decide as well."""
    if all(t.is_floating_point() or "running_var" in m._buffers for m in block.modules() for t in _tensors_of(m)):
        unwatched = [unwatched_values(m) for m in block.modules()]
        for other, (known, found) in list(_recipes.items()):
            if _same(known, structure) and [unwatched_values(m) for m in other.modules()] == unwatched:
                return found
    return {}


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _structure(block: nn.Module) -> list[Any]:
    """All that decides what ``block`` computes, but for its weights' values; compared by :func:`_same`."""
    found: list[Any] = []
    places: dict[nn.Module, int] = {}  # no module itself: what is kept of a block must not keep it alive
    for name, module in block.named_modules(remove_duplicate=False):
        own = module.OWN if isinstance(module, FusedInPlace) else ()
        watched = [entry for entry in watched_entries(module) if entry[1] not in own]
        place = places.setdefault(module, len(places))
        found += [name, place, _original(module), *(key for _, key in watched), *(of[key] for of, key in watched)]
        for tensors in (module._parameters, module._buffers):
            found += [(key, None if t is None else tuple(t.shape)) for key, t in tensors.items()]
    return found


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y or (type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True))


def _original(module: nn.Module) -> type[nn.Module]:
    return type(module).original if isinstance(module, FusedInPlace) else type(module)


class _DoesNotRun(Unfusable):
    """On images of so many channels."""


def _observed(block: nn.Module, args: Sequence[Any], kwargs: _Kwargs, trains: bool) -> Recipe:
    if _original(block).forward is nn.Module.forward:
        raise Unfusable(
            "a graph of torch.fx runs its layers: fuse first, then trace or extract features, with "
            "tracer_kwargs={'leaf_modules': [mnv2_fused.FusedBlock]}"
        )
    prepared = next((m for m in block.modules() if type(m).__module__.startswith("torch.ao.")), None)
    if prepared is not None:
        raise Unfusable(f"it is prepared for quantisation: it has a {full_name(prepared)}")
    if trains and (name := next((n for m in block.modules() for n in changeable(m)), None)) is not None:
        raise Unfusable(f"its {name} may change what it computes and tells nobody")
    model = _random_copy(block, trains)
    # Nothing says which convolution comes first: most often the one that was registered first.
    channels = dict.fromkeys(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    refusals = []
    for count in channels:
        try:
            return _observed_on(model, count, lambda image: model(image, *args, **kwargs), trains)
        except _DoesNotRun as why:
            refusals.append(why)
    raise refusals[0]


def _observed_on(model: nn.Module, channels: int, call: Callable[[Tensor], Any], trains: bool) -> Recipe:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = [dict(vars(m)) for m in model.modules()]
    seen: list[tuple[Recipe, tuple[int, int, int, int], tuple[int, int]]] = []
    results: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate(_SIZES):
        x = torch.randn(1 if i else _IMAGES, channels, *size, generator=generator, dtype=torch.float64)
        try:
            y, result, calls = record(call, x, tensors, dict(model.named_children()), trains)
        except Unfusable:
            raise
        except Exception as error:  # of a forward that anybody wrote
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _DoesNotRun(f"it does not run on {list(x.shape)}: {first}") from None
        results.append((x, result))
        recipe, pads, inner = Chain(model, calls).read(y)
        seen.append((recipe, pads, (inner[0], inner[1])))
    x, result = min(results, key=lambda pair: pair[0].numel())
    require(torch.equal(call(x.clone()), result), "its result is another at the second call")
    changed = [full_name(m) for m, was in zip(model.modules(), before, strict=True) if not _attributes_same(m, was)]
    if changed:
        raise Unfusable(f"its forward changes attributes of its {changed[0]}")
    recipe = _with_padding(seen)
    _verify(model, recipe, results[:_COMPARED])
    _verify_gradient(model, recipe, call, x)
    if trains:
        _verify_buffers(model, recipe, call, x)
    return recipe


def _attributes_same(module: nn.Module, was: dict[str, Any]) -> bool:
    now = vars(module)
    if now.keys() != was.keys():
        return False
    return all(now[k] is v or (type(v) in (int, float) and now[k] == v) for k, v in was.items())


def _random_copy(block: nn.Module, trains: bool) -> nn.Module:
    """In float64 on the CPU, in eval unless it ``trains``, with weights that hide no operation, as a norm that has seen
    nothing does."""
    model: nn.Module = _original(block).__new__(_original(block))
    own = block.OWN if isinstance(block, FusedInPlace) else ()
    state = {name: value for name, value in vars(block).items() if name not in own}
    generator = torch.Generator().manual_seed(0)
    # Tensors that the copy finds in its memo are not copied: no weight is, wherever it lies.
    memo: dict[int, Any] = {id(block): model}
    for module in block.modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and id(t) not in memo:
                drawn = _drawn(t, name, "running_var" in module._buffers, generator)
                memo[id(t)] = nn.Parameter(drawn, requires_grad=False) if name in module._parameters else drawn
    try:
        vars(model).update(copy.deepcopy(state, memo))
    except Exception as error:  # of whatever attributes there are
        raise Unfusable(f"it cannot be copied to be looked at: {type(error).__name__}") from None
    for module in model.modules():  # whose hooks are not to see what it is looked at with
        vars(module).update({name: OrderedDict() for name in vars(module) if name in _HOOKS})
    if not trains:
        model.eval()  # which of some classes gives None
    return model


_HOOKS = {name for name in vars(nn.Module()) if name.endswith("_hooks")}


_DRAWN = 65521  # values of a weight at most, then the same again: a prime, so that rows differ


def _drawn(t: Tensor, name: str, in_norm: bool, generator: torch.Generator) -> Tensor:
    """What stands for ``t``, as large as training leaves weights and statistics."""
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.detach().cpu().clone()
    if name == "running_var":
        return torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5
    scale = (2 / t[0].numel()) ** 0.5 if t.dim() > 1 and t.numel() else 0.5
    around = 1.0 if in_norm and name == "weight" else 0.0
    few = torch.randn(min(t.numel(), _DRAWN), generator=generator, dtype=torch.float64) * scale + around
    return few.repeat(-(-t.numel() // _DRAWN))[: t.numel()].view(t.shape) if t.numel() else few.view(t.shape)


def _with_padding(seen: Iterable[tuple[Recipe, tuple[int, int, int, int], tuple[int, int]]]) -> Recipe:
    """One recipe for all sizes. Raises where structure, or padding, follows no rule that the fused op has."""
    recipes, pads, sizes = zip(*seen, strict=True)
    first: Recipe = recipes[0]
    require(all(recipe == first for recipe in recipes), "what it computes depends on the size of its input")
    choices: list[Any] = [None, "same", *dict.fromkeys(pads)]
    for choice in choices:
        try:
            spec = dataclasses.replace(first.spec, padding=choice)
        except ValueError:
            continue
        if all(spec.padding_of(*size) == found for size, found in zip(sizes, pads, strict=True)):
            return first._replace(spec=spec)
    raise Unfusable(f"its padding is {pads[0]} of {sizes[0]} and {pads[1]} of {sizes[1]}, by no known rule")


def _expected(model: nn.Module, recipe: Recipe, weights: BlockWeights, x: Tensor) -> Tensor:
    """What the block, and what runs around it, gives by the reference."""
    around = recipe.around
    parts = parts_of(model, recipe)
    batch = _live(parts)
    if any(batch):
        if around is not None:
            raise Unfusable("more than the block takes part in training")
        return unfolded(x, *_rows(parts), recipe.spec, batch)
    if around is None:
        return in_torch(x, weights, recipe.spec)
    y = in_torch(model.get_submodule(around.lead)(x), weights, recipe.spec)
    for name in around.tail:
        y = model.get_submodule(name)(y)
    return y + x if around.shortcut else y


def _weights(model: nn.Module, recipe: Recipe) -> BlockWeights:
    (*expand, depthwise, project), squeeze = _folded(parts_of(model, recipe))
    return BlockWeights(*(expand[0] if expand else (None, None)), *depthwise, *project, *squeeze)


def _verify_gradient(model: nn.Module, recipe: Recipe, call: Callable[[Tensor], Any], x: Tensor) -> None:
    """Raises where backward gives another gradient than the reference's: forward may detach, or have its own."""
    weights = _weights(model, recipe)
    gradients = []
    for function in (call, lambda given: _expected(model, recipe, weights, given)):
        try:
            with torch.enable_grad():
                given = x.clone().requires_grad_()
                y = function(given)
                seed = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
                gradients += torch.autograd.grad(y, given, seed)
        except RuntimeError as error:
            raise Unfusable(f"it has no gradient: {str(error).splitlines()[0]}") from None
    ours, theirs = gradients
    if not torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max())):
        raise Unfusable("its gradient is another than that of what it computes")


def _verify_buffers(model: nn.Module, recipe: Recipe, call: Callable[[Tensor], Any], x: Tensor) -> None:
    """Raises where a call in training leaves other running statistics than the kernels do, anywhere in the module."""
    parts = parts_of(model, recipe)
    norms = [norm if isinstance(norm, _BatchNorm) else None for _, norm in parts.stages]
    before = {name: t.clone() for name, t in model.named_buffers()}
    call(x.clone())
    found = {name: t.clone() for name, t in model.named_buffers()}
    for name, t in model.named_buffers():
        t.copy_(before[name])
    unfolded(x, *_rows(parts), recipe.spec, _live(parts), norms)
    for name, t in model.named_buffers():
        if not torch.allclose(t.double(), found[name].double(), rtol=1e-9, atol=1e-12):
            raise Unfusable(f"it changes {name} in another way than a norm's forward does")


def _verify(model: nn.Module, recipe: Recipe, results: list[tuple[Tensor, Tensor]]) -> None:
    """Raises where the chain that was read gives another result than the module, in float64."""
    weights = _weights(model, recipe)
    with torch.no_grad():
        for x, y in results:
            expected = _expected(model, recipe, weights, x)
            atol = 1e-9 * float(y.abs().max())
            if y.shape != expected.shape or not torch.allclose(y, expected, rtol=1e-9, atol=atol):
                raise Unfusable("it computes something else than the operations that it runs say")


def _live(parts: Parts) -> tuple[bool, ...]:
    """Which norms take their statistics from the batch."""
    return tuple(is_live(cast(Any, norm)) for _, norm in parts.stages)


def _rows(parts: Parts) -> tuple[list[Tensor | None], list[float]]:
    """What is folded, and the eps of each norm."""
    rows = [t for conv, norm in parts.stages for t in parameters_of(conv, cast(Any, norm))]
    rows += [t for conv in parts.squeeze or () for t in parameters_of(conv, None)[:2]]
    return rows, [0.0 if norm is None else eps_of(norm) for _, norm in parts.stages]


def _folded(parts: Parts) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    rows, eps = _rows(parts)
    stages, squeeze = conv_norms(rows, len(parts.stages))
    return [s.folded(e) for s, e in zip(stages, eps, strict=True)], [t for conv in squeeze for t in conv.folded(0.0)]


def parts_of(block: nn.Module, recipe: Recipe) -> Parts:
    module: Any = block.get_submodule
    stages = tuple((module(conv), None if norm is None else module(norm)) for conv, norm in recipe.stages)
    squeeze: Any = None if recipe.squeeze is None else tuple(map(module, recipe.squeeze))
    return Parts(stages, squeeze, recipe.spec, (), (), recipe.around)
