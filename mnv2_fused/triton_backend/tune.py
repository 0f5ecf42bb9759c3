"""Measuring the planner's configurations once, for those who ask with ``MNV2_FUSED_AUTOTUNE=1``.

The fastest of the bounded set of :func:`mnv2_fused.plans.triton.best_plans` is kept in a file, so that the next process
does not measure again: ``$XDG_CACHE_HOME/mnv2_fused/triton.json`` (``~/.cache`` without that variable).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
import triton

from ..plans.triton import TritonPlan
from ..version import __version__

_chosen: dict[str, TritonPlan] = {}


def wanted() -> bool:
    return os.environ.get("MNV2_FUSED_AUTOTUNE", "0") not in ("", "0")


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnv2_fused" / "triton.json"


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of ``run`` on the current GPU; the kernel is compiled before the clock starts."""
    median = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    assert isinstance(median, float)  # a list is of quantiles, none of which are asked for
    return median


def fastest(
    plans: Sequence[TritonPlan],
    run: Callable[[TritonPlan], object],
    key: tuple[Hashable, ...],
    measure: Callable[[Callable[[], object]], float] = milliseconds,
) -> TritonPlan:
    """The one of ``plans`` that runs fastest: measured now, or found in the file under ``key`` and the versions.

    A file that cannot be read or written costs a measurement, never a call; a plan in it that is no longer among
    ``plans`` is measured again.
    """
    name = "|".join(map(str, (*key, __version__, torch.__version__, triton.__version__)))
    if name in _chosen:
        return _chosen[name]
    by_values = {tuple(p.forced()): p for p in plans}
    kept = _read().get(name)
    found = None
    if isinstance(kept, list) and all(type(value) is int for value in kept):
        found = by_values.get(tuple(kept))
    if found is None:
        found = min(plans, key=lambda p: measure(lambda: run(p)))
        _write(name, found.forced())
    _chosen[name] = found
    return found


def _read() -> dict[str, list[int]]:
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, ValueError, RecursionError, RuntimeError):  # no file, no JSON, nested too deep, no home folder
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(name: str, values: list[int]) -> None:
    """Adds one entry; the file is replaced as a whole, so that no process reads half of it."""
    temporary = None
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as temporary:
            json.dump(_read() | {name: values}, temporary, indent=1, sort_keys=True)
        os.replace(temporary.name, file)
    except (OSError, TypeError, ValueError, RecursionError, RuntimeError):
        if temporary is not None:
            Path(temporary.name).unlink(missing_ok=True)
