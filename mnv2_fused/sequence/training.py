"""A row of layers in training: what a network has beside its blocks, by their training kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import backends, training_ops
from ..activations import LEAKY_RELU
from ..fold import eps_of
from ..module import reading
from ..module.flat import FusedFlat
from ..module.fused_block import FusedBlock
from ..module.guard import has_hooks
from ..module.parameters import conv_norm_activation, freed, parameters_of
from ..module.training import fewest_values, is_live, norm_live, takes_dtypes, train_fused
from ..spec import stem_size


def train_row(x: Tensor, row: Sequence[nn.Module]) -> Tensor:
    """What the modules of ``row`` make of x one after the other, the norms of 1x1 convolutions by the training kernels.

    A stem is the expansion of the block behind it: its result, the widest tensor of a network, is never written.
    """
    blocks = (child for child in row if isinstance(child, FusedBlock))
    if not any(block.training_objection() is None for block in blocks):  # eager, by whatever is asked for
        for child in row:
            x = _run(x, child)
        return x
    at = 0
    if len(row) > 1 and (y := _stem(x, *row[:2])) is not None:
        x, at = y, 2
    for child in row[at:]:
        y = _with_norm(x, child) if isinstance(child, nn.Sequential) else None
        x = _run(x, child) if y is None else y
    return x


def _run(x: Tensor, child: nn.Module) -> Tensor:
    """Layers that lie among others' run as a block where that trains, else one by one."""
    if not isinstance(child, FusedFlat) or (not _by_modules(x) and child.training_objection(x) is None):
        return child(x)
    for layer in child.parts:
        x = layer(x)
    return x


def _by_modules(x: Tensor) -> bool:
    """Whether only modules give what is asked for: graphs, transforms, hooks around all modules."""
    if torch.compiler.is_compiling() or backends.transformed() or torch_module._has_any_global_hook():
        return True
    ordinary = type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.numel() > 0 and x.layout is torch.strided
    return not ordinary or backends.resolve_backend("auto", x.device) != "cpu"


def _fit(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether weights are what the training kernels take beside x."""
    return all(t is None or (takes_dtypes(x.dtype, t.dtype) and t.is_cpu and not freed(t)) for t in tensors)


def _with_norm(x: Tensor, layer: nn.Sequential) -> Tensor | None:
    """A head or stem, [convolution, norm, activation], with the norm on its kernel; None where the modules have to
    run."""
    if _by_modules(x) or has_hooks(layer):
        return None
    if all(next(reading.conv_objections(layer, role), None) is not None for role in ("head", "stem")):
        return None
    conv, norm, activation = layer._modules.values()
    if type(norm) is not nn.BatchNorm2d and type(norm) is not nn.SyncBatchNorm:
        return None
    if not is_live(norm) or not isinstance(conv, nn.Conv2d):
        return None
    if x.shape[1] != conv.in_channels or not _fit(x, parameters_of(conv, norm)):
        return None
    assert activation is not None  # conv_objections looked at it
    y = conv(x)
    enough = y.shape[0] * y.shape[2] * y.shape[3] >= fewest_values([norm])
    return activation(norm_live(y, norm) if enough else norm(y))


def _stem(x: Tensor, stem: nn.Module, block: nn.Module) -> Tensor | None:
    """What ``stem`` and then ``block`` make of x; None where the modules have to run."""
    if not isinstance(block, FusedBlock) or not isinstance(stem, nn.Sequential) or x.requires_grad or _by_modules(x):
        return None
    if next(reading.conv_objections(stem, "stem"), None) is not None or has_hooks(block) or "forward" in vars(block):
        return None
    conv, norm, activation = conv_norm_activation(stem)
    spec = block.spec
    if not is_live(norm) or spec is None or spec.expand or spec.residual:
        return None
    if spec.in_channels != conv.out_channels or block.training_objection() is not None:
        return None
    own = parameters_of(conv, norm)
    parameters, eps = block._fold_parameters()
    expanded_by = reading.activation_of(activation)
    if (
        x.shape[1] != conv.in_channels
        or not _fit(x, [*own, *parameters])
        or LEAKY_RELU in (expanded_by, spec.activation)
    ):
        return None
    joint = dataclasses.replace(spec, in_channels=9 * conv.in_channels, expand=True, expand_activation=expanded_by)
    height, width = map(stem_size, x.shape[2:])
    norms = [norm, *(norm for _, norm in block._pairs)]
    out_height, out_width = spec.out_size(height, width)
    fewest = x.shape[0] * min(height * width, out_height * out_width)
    if training_ops.objection(joint) is not None or fewest < fewest_values(norms) or min(out_height, out_width) < 1:
        return None
    return train_fused(x, [*own, *parameters], [eps_of(norm), *eps], joint, norms)
