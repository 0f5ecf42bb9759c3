"""Models by name, as ``python -m mnv2_fused cost`` and ``quantize`` take them, and their weights."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pickle
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import models


def named_model(name: str) -> nn.Module:
    """A model with random weights: of torchvision, of this package's ``models``, or of timm as ``timm:NAME``.

    Raises ValueError for an unknown name, and RuntimeError when torchvision or timm is missing.
    """
    library, _, rest = name.rpartition(":")
    if library == "timm":
        timm = _imported("timm", "timm")
        known = timm.list_models()
        if rest.partition(".")[0] in known:  # behind the dot is the name of weights
            return timm.create_model(rest, pretrained=False)
        raise ValueError(f"unknown model {name!r}{_close(rest, known)}; timm.list_models() has {len(known)}")
    own = _own_models()
    if _is_own(name):
        return own[name]()
    torchvision = _imported("torchvision", "mnv2_fused[demo]").models
    known = [m for module in (torchvision, torchvision.segmentation) for m in torchvision.list_models(module=module)]
    if name in known:
        return torchvision.get_model_builder(name)(weights=None, **_without_backbone_weights(name))
    known = sorted({*known, *own})
    raise ValueError(f"unknown model {name!r}{_close(name, known)}; known are {', '.join(known)} and timm:NAME")


def source_of(name: str) -> tuple[str, str]:
    """The package that :func:`named_model` takes the model from, and the Python that makes it."""
    library, _, rest = name.rpartition(":")
    if library == "timm":
        return "timm", f"timm.create_model({rest!r})"
    if _is_own(name):
        return "mnv2_fused", f"mnv2_fused.models.{name}()"
    options = "".join(f", {key}={value}" for key, value in _without_backbone_weights(name).items())
    return "torchvision", f"torchvision.models.get_model({name!r}{options})"


def _is_own(name: str) -> bool:
    # torchvision's of the same name run their heads in one call with their blocks.
    return name in _own_models() and (name == "mobilenet_v1" or importlib.util.find_spec("torchvision") is None)


def _without_backbone_weights(name: str) -> dict[str, None]:
    """torchvision downloads those of some models where nobody says no."""
    builder = _imported("torchvision", "mnv2_fused[demo]").models.get_model_builder(name)
    return {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}


_OWN_WEIGHTS = "give the weights with --weights FILE, or --weights random to try without"


def published_state(name: str) -> tuple[dict[str, Tensor], str]:
    """The published weights of the model of that name, and what they are. Raises RuntimeError where there are none."""
    library, model = source_of(name)
    if library == "timm":
        timm = _imported("timm", "timm")
        try:
            found = timm.create_model(name.removeprefix("timm:"), pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:  # unreachable, cut off, none published
            reason = " ".join(str(error).split())[:200]
            raise RuntimeError(f"the published weights of {name} cannot be had: {reason}; {_OWN_WEIGHTS}") from error
        return found.state_dict(), f"published weights {found.pretrained_cfg.get('tag') or ''}".rstrip()
    if library == "mnv2_fused":
        raise RuntimeError(f"no weights of {model} are published; {_OWN_WEIGHTS}")
    weights = _imported("torchvision", "mnv2_fused[demo]").models.get_model_weights(name)
    if not len(weights):
        raise RuntimeError(f"torchvision publishes no weights of {name}; {_OWN_WEIGHTS}")
    state, what = downloaded(weights.DEFAULT)
    if state is None:
        raise RuntimeError(f"the published weights of {name} cannot be had: {what}; {_OWN_WEIGHTS}")
    return state, f"published weights {what}"


def downloaded(weights: Any) -> tuple[dict[str, Tensor] | None, str]:
    """A state_dict of torchvision's, from its cache or the network, and its name; or None and why there is none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # seconds; the download itself has no option for it
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True), weights.name
    except (OSError, RuntimeError) as error:  # unreachable, cut off, or not the file it should be
        return None, str(error)
    finally:
        socket.setdefaulttimeout(before)


def load_weights(model: nn.Module, path: str, way_out: str) -> None:
    """Loads the state_dict at ``path``, of torch.save or safetensors. Raises ValueError, which ends in ``way_out``."""
    try:
        state = _safetensors(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, pickle.UnpicklingError, RuntimeError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"cannot use the weights {path}: {reason}; {way_out}") from error


def _safetensors(path: str) -> dict[str, Tensor]:
    loads, errors = _imported("safetensors.torch", "safetensors"), _imported("safetensors", "safetensors")
    try:
        return loads.load_file(path)
    except errors.SafetensorError as error:
        raise OSError(str(error)) from error


def _imported(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"this model needs {module} ({error}): pip install '{install}'") from error


def _own_models() -> dict[str, Callable[[], nn.Module]]:
    found = inspect.getmembers(models, inspect.isfunction)
    return {name: f for name, f in found if f.__module__ == models.__name__ and not name.startswith("_")}


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known)
    return f", close to {', '.join(close)}" if close else ""
