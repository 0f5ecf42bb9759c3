"""``fuse`` a model's inverted residuals, ``unfuse`` them again.

Works on module instances: no class is patched, nothing is traced, and state_dict keys never change. What is an
inverted residual is known to :mod:`mnv2_fused.families`.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .. import backends
from ..families import family_of
from ..models import FusedMobileNet, MobileNet
from ..module import FusedBlock, FusedFlat, FusedInPlace, FusedInvertedResidual, become, fuse_in_place
from ..module.guard import is_compiled
from ..module.in_place import name_clash
from ..module.parameters import refuse_freed
from ..sequence import FusedSequential, RunsFused
from ..sequence.compiled import forget
from ..sequence.frozen import freeze, is_frozen, replaced
from ..sequence.fused import ordinary_class
from ..sequence.seen import RunsAsSeen, run_as_seen
from .find import NOT_FOUND, Match, blocks_of, check_model, computed_tensors, is_torchvisions
from .unknown import kind_of, unknown_blocks

_M = TypeVar("_M", bound=nn.Module)


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    backend: str = "auto",
    recompute: bool = False,
    strict: bool = False,
    frozen: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """A copy of ``model`` (or ``model`` itself) whose inverted residuals run as one kernel each in eval.

    The fused blocks share the modules inside the blocks they replace: parameters, their names, ``requires_grad``,
    train/eval mode and the memory format of weights stay. What fused blocks give is in channels_last, whatever they are
    given. Keep the returned value even with ``inplace``: when ``model`` itself is a block, it is the fused one. Fusing
    a fused model changes nothing. ``filter_fn(name, block)`` returns whether to fuse a block. ``recompute``: in
    ``train()``, where the training kernels do not run, keep of each block only its input and compute the rest again in
    backward: less memory, more time.

    ``frozen``: for inference alone, with weights that never change again. Packed weights take the place of the modules
    they were made of, which are let go; a call asks nothing about changes. The model is in ``eval()`` for good, in the
    dtype and on the device it has now; it cannot be unfused. Its ``state_dict`` holds packed weights.

    A block of torchvision's MobileNetV2 is replaced by a :class:`FusedInvertedResidual`; any other stays the instance
    it was, of a subclass of its class.

    Warns when nothing was fused. With ``strict`` raises ValueError instead, and also for any block that had to be
    skipped (not for those that ``filter_fn`` left out), before anything is changed. Raises ValueError for an
    unknown ``backend``. :func:`report` lists the reasons block by block.
    """
    check_model(model)
    if backend not in backends.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {backend!r}")
    if frozen and recompute:
        raise ValueError("frozen=True is for inference alone; recompute=True is for training: choose one")
    if any(map(is_frozen, model.modules())):
        return model if inplace else _copy(model)
    if not inplace:
        model = _copy(model)
    matches: dict[nn.Module, Match] = {}
    skipped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    already_fused = False
    found_blocks = list(blocks_of(model))
    for name, block, found in found_blocks:
        if isinstance(block, FusedBlock):
            already_fused = True
        elif isinstance(found, str):
            skipped[found if family_of(block) else f"{kind_of(block)}: {found}"] += 1
        elif filter_fn is not None and not filter_fn(name, block):
            left_out["filter_fn left it out"] += 1
        elif found is not None:
            matches[block] = found
    nothing_fused = not (matches or already_fused)
    reasons = [f"{n} x {reason}" for reason, n in (skipped + left_out).items()]
    if nothing_fused:
        reasons += map(str, unknown_blocks(model, (block for _, block, _ in found_blocks)))
    reasons = "; ".join(reasons)
    if strict and (skipped or nothing_fused):
        raise ValueError(f"fuse(strict=True) would leave blocks unfused: {reasons or NOT_FOUND}")
    if nothing_fused:
        warnings.warn(f"fuse() fused nothing: {reasons or NOT_FOUND}", stacklevel=2)
    if nothing_fused:
        return model
    fused = {block: _fused(block, match, backend, recompute) for block, match in matches.items()}
    names, said = {block: name for name, block, _ in found_blocks}, set()
    for block, replacement in fused.items():
        replacement._name, replacement._said = names[block], said
        if (sequence := matches[block].sequence) is not None and isinstance(replacement, FusedFlat):
            become(sequence, FusedSequential).hold(replacement)
    model = replaced(model, fused)
    _run_whole_sequences(model)
    return freeze(model) if frozen else model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of ``model`` (or ``model`` itself) with ordinary blocks again, as exporters want them.

    A block made by :func:`fuse` turns back into the instance it was, around the modules as they are now. A block
    made by ``FusedInvertedResidual``'s constructor turns into torchvision's ``InvertedResidual``; raises
    ImportError, before anything is changed, where torchvision is missing.
    """
    check_model(model)
    if any(map(is_frozen, model.modules())):
        raise ValueError("a frozen model has let its modules go and cannot be unfused; use the original model")
    if not inplace:
        model = _copy(model)
    blocks = [block for _, block, _ in blocks_of(model) if isinstance(block, FusedBlock)]
    model = replaced(model, {block: _unfused(block) for block in blocks})
    for module in model.modules():
        if isinstance(module, RunsFused):
            for name in module.OWN:
                vars(module).pop(name, None)
            forget(module)
            become(module, ordinary_class(module))
    return model


def _run_whole_sequences(model: nn.Module) -> None:
    """Lets each Sequential that holds fused blocks, and whole networks of known classes, run them in one call.

    The instances stay, with all that refers to them; they become instances of a subclass of what they were.
    """
    for module in reversed(list(model.modules())):  # children first
        if type(module) is nn.Sequential and any(isinstance(m, FusedBlock | FusedSequential) for m in module):
            become(module, FusedSequential)
        elif type(module).__module__.startswith("torchvision.models.") and "torchvision" in sys.modules:
            from .. import torchvision_model

            torchvision_model.run_whole(module)
        elif type(module) is MobileNet and "forward" not in vars(module):
            become(module, FusedMobileNet)
    if _is_network(model):
        run_as_seen(model)


def _is_network(model: nn.Module) -> bool:
    """Whether to see what its forward runs: a network of a class of its own, that does not write its class's name."""
    if isinstance(model, FusedBlock | RunsFused | nn.Sequential | torch.fx.GraphModule | torch.jit.ScriptModule):
        return False
    if type(model).__module__.startswith("torch.") or hasattr(model, "save_pretrained") or is_compiled(model):
        return False
    return "forward" not in vars(model) and name_clash(model, RunsAsSeen) is None


def _fused(block: nn.Module, match: Match, backend: str, recompute: bool) -> FusedBlock:
    if is_torchvisions(block, match.family):
        fused = _replaced(block, match, backend, recompute)
    else:
        options = {"backend": backend, "recompute": recompute}
        fused = fuse_in_place(block, match.family.read, **options, base=match.family.base)
    # What lies between fused blocks then gets what they read fastest, whatever the model is given.
    fused._channels_last = True
    return fused


def _replaced(block: nn.Module, match: Match, backend: str, recompute: bool) -> FusedInvertedResidual:
    conv: Any = block.conv
    fused = FusedInvertedResidual.adopt(
        conv,
        stride=max(match.spec.strides),
        residual=match.spec.residual,
        backend=backend,
        recompute=recompute,
    )
    # In a tuple, so that it is no submodule. It shares conv, hence follows .to(), copies and training.
    fused._original = (block,)
    return _with_state_of(block, fused)


def _unfused(block: FusedBlock) -> nn.Module:
    if isinstance(block, FusedInPlace):
        return block.unfused()
    original: Any = next(iter(vars(block)["_original"]), None)
    if original is None:
        try:
            from torchvision.models.mobilenetv2 import InvertedResidual
        except ImportError as error:
            raise ImportError(
                "unfuse rebuilds a FusedInvertedResidual that its constructor made as torchvision's "
                "InvertedResidual; install torchvision"
            ) from error
        original = InvertedResidual.__new__(InvertedResidual)
        nn.Module.__init__(original)
    original.conv = block.conv
    return _with_state_of(block, original)


def _with_state_of(source: nn.Module, target: _M) -> _M:
    """``target`` with ``source``'s mode, attributes and very hook dictionaries: handles still work."""
    own = {name for name in (*vars(nn.Module()), *FusedBlock.OWN) if "_hook" not in name} - {"training"}
    vars(target).update({name: value for name, value in vars(source).items() if name not in own})
    return target


def _copy(model: nn.Module) -> nn.Module:
    refuse_freed([*model.parameters(), *model.buffers()])
    modes = {name: module.training for name, module in model.named_modules()}
    other = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed_tensors(model)})
    # Copies of torchvision's feature extractors (0.26) come in train(), which has a graph of its own there.
    if other.training is not model.training:
        other.train(model.training)
    for name, module in other.named_modules():
        module.training = modes.get(name, module.training)
    return other
