"""Models by name, as ``python -m mnv2_fused cost`` takes them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

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
    if name in own and (name == "mobilenet_v1" or importlib.util.find_spec("torchvision") is None):
        return own[name]()  # torchvision's of the same name run their heads in one call with their blocks
    torchvision = _imported("torchvision", "mnv2_fused[demo]").models
    known = [m for module in (torchvision, torchvision.segmentation) for m in torchvision.list_models(module=module)]
    if name in known:
        builder = torchvision.get_model_builder(name)
        backbone = "weights_backbone" in inspect.signature(builder).parameters
        return builder(weights=None, **({"weights_backbone": None} if backbone else {}))
    known = sorted({*known, *own})
    raise ValueError(f"unknown model {name!r}{_close(name, known)}; known are {', '.join(known)} and timm:NAME")


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
