"""What is decided once about a block, for the calls that follow."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..fold import PackedWeights
from ..spec import BlockSpec
from .guard import Guard


class PreparedCall:
    """A block found fit to run fused on ``packed``, while its ``guard`` is valid."""

    def __init__(
        self,
        spec: BlockSpec,
        parameters: list[Tensor | None],
        eps: list[float],
        drop_path: tuple[nn.Module, ...],
        guard: Guard | None,
        backend: str,
        packed: PackedWeights,
    ) -> None:
        self.backend = backend
        self.parameters = parameters
        self.tensors = [t for t in parameters if t is not None]
        self.eps = eps
        self.dtype, self.is_cpu = self.tensors[0].dtype, self.tensors[0].is_cpu
        # Stochastic depth that drops now comes before the sum with x: the kernel leaves both to the modules.
        self.drop_path = drop_path
        self.whole = spec
        self.spec = without_sum(spec) if drop_path else spec
        self.stride, self.residual = self.spec.strides[0], self.spec.residual
        # None: TensorFlow's padding at stride 2 depends on the size of the image.
        self.op_options = None if spec.padding == "same" and spec.stride != 1 else self.spec.options(8, 8)
        self.guard = guard
        self.is_valid = _never if guard is None else guard.is_valid
        self.packed = packed

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is on the weights' device and of their dtype, which on the CPU autocast brings it to."""
        if x.is_cpu is not self.is_cpu:
            return False
        if x.dtype is self.dtype:
            return True
        cast = self.is_cpu and x.is_floating_point() and x.dtype is not torch.float64
        return cast and torch.is_autocast_enabled("cpu")


def _never() -> bool:
    return False


def without_sum(spec: BlockSpec) -> BlockSpec:
    """What comes before the sum with the block's input, and before what drops it."""
    before = "identity" if spec.activates_sum else spec.out_activation
    return dataclasses.replace(spec, residual=False, out_activation=before)
