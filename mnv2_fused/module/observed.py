"""Blocks of any class, fused by what they were seen to compute instead of by their names; see probe.py."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import reading
from .fused_block import FusedBlock, block_of, fallback_reason_of
from .in_place import FusedInPlace, name_clash
from .probe import parts_of, recipe_of
from .reading import Around, Parts, Unfusable

# Of a block: expand, depthwise, squeeze, excite, project; and another depthwise one in front.
_MOST_CONVOLUTIONS, _MOST_DEPTHWISE = 6, 2


def why_no_candidate(module: nn.Module) -> str | None:
    """What ``module`` holds that keeps it from being one block; None where it may be one."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    depthwise = [c for c in convs if is_depthwise(c)]
    others = [c for c in convs if not is_depthwise(c)]
    if not depthwise or not others or type(module) is nn.Conv2d:
        return "it has no depthwise and 1x1 convolution"
    if len(depthwise) > _MOST_DEPTHWISE:
        return f"it has {len(depthwise)} depthwise convolutions"
    for conv in others:
        if not is_pointwise(conv):
            size = "x".join(map(str, conv.weight.shape[2:]))
            return f"it has a {size} convolution of {conv.groups} groups beside the depthwise one"
    return f"it has {len(convs)} convolutions" if len(convs) > _MOST_CONVOLUTIONS else None


def is_depthwise(conv: nn.Conv2d) -> bool:
    return 1 < conv.groups == conv.in_channels == conv.out_channels and max(conv.weight.shape[2:]) > 1


def is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and tuple(conv.weight.shape[2:]) == (1, 1)


def observe(block: nn.Module) -> Parts:
    """The reader of any class. Raises :class:`Unfusable` with what of its computation no fused op does."""
    clash = None if isinstance(block, FusedBlock) else name_clash(block, FusedObserved)
    if clash is not None:
        raise Unfusable(f"its {clash} has a name that fused blocks use for something of their own")
    recipe = recipe_of(block)
    try:
        return parts_of(block, recipe)
    except (AttributeError, KeyError) as error:
        raise Unfusable(f"a module that it was seen to use is gone ({error})") from None


@torch.compiler.assume_constant_result
def _allows(token: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    """Asked once per graph, too."""
    block = block_of(token)
    assert isinstance(block, FusedObserved)
    return block.allows(args, dict(kwargs))


class FusedObserved(FusedInPlace):
    """A block that was read by what it computes in eval. In training it is looked at once more.

    What forward takes beside x is passed to the modules, unless it was seen to change nothing.
    """

    _FOUND = (*FusedInPlace._FOUND, "_allowed", "_is_part")
    OWN = (*FusedInPlace.OWN, "_allowed", "_is_part")

    def _inspect(self) -> None:
        super()._inspect()
        self._allowed: dict[Any, bool] = {}
        self._is_part: bool = vars(self).get("_is_part", self._around is not None)
        if self._objection is None and self._is_part is (self._around is None):
            self._objection = "what runs around the block was changed: unfuse, and fuse again"
        if self._objection is not None:
            self._around = None

    def fallback_reason(self) -> str | None:
        # First, since a feature extractor may hook the modules anew at each call: looking at all takes milliseconds.
        hooked = next(reading.hook_objections(self._inside()), None)
        if hooked is None:
            return super().fallback_reason()
        self._objection = hooked
        return hooked

    @property
    def leading_child(self) -> nn.Module | None:
        return None if self._around is None else self.get_submodule(self._around.lead)

    def _forward_modules(self, x: Tensor) -> Tensor:
        if self._around is None:
            return super()._forward_modules(x)
        for name in self._around.core:
            x = self.get_submodule(name)(x)
        return x

    def _inside(self) -> list[nn.Module]:
        if self._around is None:
            return super()._inside()
        return [m for name in self._around.core for m in self.get_submodule(name).modules()]

    def _around_now(self) -> Around | None:
        """What runs around the block; None where something changed that makes the module run as it is."""
        ready = self._ready
        if torch.compiler.is_compiling():
            reason = fallback_reason_of(self._token)
        else:
            valid = ready is not None and ready.is_valid()
            reason = None if valid else self.fallback_reason()
        return self._around if reason is None else None

    def _forward_whole(self, x: Tensor) -> Tensor:
        """The block, and what runs around it."""
        if not self._is_part:
            return super().forward(x)
        around = self._around_now()
        if around is None:
            return super(FusedBlock, self).forward(x)
        y = super().forward(self.get_submodule(around.lead)(x))
        for name in around.tail:
            y = self.get_submodule(name)(y)
        return y + x if around.shortcut else y

    def _trains(self) -> bool:
        return any(m.training and _may_mind_mode(m) for m in self.modules())

    def _forward_training(self, x: Tensor) -> Tensor:
        return self._forward_modules(x) if self.training_objection(x) is not None else self._train_fused(x)

    def not_trained(self) -> str | None:
        if (why := super().not_trained()) is not None:
            return why
        if self._is_part:
            return "more than a block was fused by what its class was seen to run"
        norms = [norm for _, norm in self._pairs if norm is not None]
        if any(getattr(type(norm), "forward", None) is not _BatchNorm.forward for norm in norms):
            return "its norms have a forward of their own"
        if not self._trains():
            return "it is looked at in train()"
        try:
            same = recipe_of(self, trains=True) == recipe_of(self)
        except Unfusable as why:
            return f"in train(), {why}"
        return None if same else "in train() its class was seen to run something else"

    def allows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these arguments change nothing, in eval or in the mode that it is in."""
        if not all(value is None or type(value) in (bool, int, float, str) for value in (*args, *kwargs.values())):
            return False
        ready = self._ready
        if ready is None or not ready.is_valid():
            self._allowed = {}
        trains = self._trains()
        call = (args, tuple(sorted(kwargs.items())), trains)
        if call not in self._allowed:
            try:
                self._allowed[call] = recipe_of(self, args, kwargs, trains) == recipe_of(self)
            except Unfusable:
                self._allowed[call] = False
        return self._allowed[call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not (self._is_part and self._trains()):
            return self._forward_whole(args[0])
        rest = dict(kwargs)
        x = args[0] if args else rest.pop(_first_parameter(type(self).original), None)
        trains = self._trains()
        fits = isinstance(x, Tensor) and not (trains and self.training_objection(x) is not None)
        decided = trains or torch.compiler.is_compiling() or (self._ready is not None and self._ready.is_valid())
        if fits and not decided and (why := self.fallback_reason()) is not None:
            self._warn(f"runs unfused: {why}")
            fits = False
        if fits and (not (args[1:] or rest) or _allows(self._token, args[1:], tuple(rest.items()))):
            return self._forward_whole(x)
        return super(FusedBlock, self).forward(*args, **kwargs)


def _may_mind_mode(module: nn.Module) -> bool:
    """Whether a forward may do something else in training: any but those of torch's that do not."""
    package, _, file = type(module).__module__.rpartition(".")
    return package != "torch.nn.modules" or file in ("batchnorm", "instancenorm", "dropout") or type(module) is nn.RReLU


@functools.cache
def _first_parameter(cls: type[nn.Module]) -> str:
    """Of forward, behind self."""
    return [*inspect.signature(cls.forward).parameters, "", ""][1]
