"""Which activations the kernels of training have a derivative of."""

from __future__ import annotations

from .. import backends
from ..spec import BlockSpec

# Columns of csrc/activations.h; none where the compiled library does not load.
DIFFERENTIATED: tuple[str, ...] = () if backends._C is None else tuple(backends._C.differentiated())
# Whose results tell their derivatives.
CLIPS: tuple[str, ...] = () if backends._C is None else tuple(backends._C.clips())


def objection(spec: BlockSpec) -> str | None:
    """Why no kernel trains this block, None if they do."""
    if backends._C is None:
        return backends.backend_reasons()["cpu"]
    activations = (spec.activation, spec.expanded_by) if spec.expand else (spec.activation,)
    for activation in activations:
        if activation not in DIFFERENTIATED:
            return f"no kernel has the derivative of {activation}"
    return None
