"""Layers in float32 on folded weights, every tensor inside shown: what calibration looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import function_of
from ..encoding import LayerKind
from ..fold import ConvNorm, conv_norms, eps_of
from ..module import FusedBlock, reading
from ..module.parameters import Norm, conv_norm_activation, parameters_of
from ..sequence.find import Layer
from ..spec import BlockSpec
from .layers import CLIPS, FUNCTIONS, GATES, STEM_STRIDE

See = Callable[[str, Tensor], None]  # takes the name of a tensor inside, and the tensor


class Affine(NamedTuple):
    """A convolution with its norm folded in, in float64."""

    weight: Tensor  # [C, terms] of a product, [C, k, k] of a depthwise, [C, C_in, 3, 3] of a stem
    bias: Tensor  # [C]


@dataclass(frozen=True)
class FloatLayer:
    """One layer of a row; the twin of :class:`mnv2_fused.int8.layers.Int8Layer`."""

    kind: LayerKind
    project: Affine
    activation: str = "identity"  # of what is no block, behind its product
    spec: BlockSpec | None = None
    expand: Affine | None = None  # of a stem's layer the stem
    stem_activation: str = "identity"
    depthwise: Affine | None = None
    reduce: Affine | None = None
    excite: Affine | None = None

    @property
    def in_channels(self) -> int:
        first = self.expand or self.depthwise or self.project
        return first.weight.shape[0 if first is self.depthwise else 1]

    @property
    def ends_in_float(self) -> bool:
        """Whether its result, where nothing on integers follows, is float32 as it is summed."""
        return self.kind is LayerKind.LINEAR and self.activation == "identity"

    @property
    def expanded_by(self) -> str:
        """The activation in front of the depthwise convolution."""
        if self.kind is LayerKind.STEM_AND_BLOCK or self.spec is None:
            return self.stem_activation
        return self.spec.expanded_by

    @property
    def out_activation(self) -> str:
        return self.activation if self.spec is None else self.spec.out_activation

    def run(self, x: Tensor, see: See) -> Tensor:
        """[N, C, H, W] -> [N, C_out, H', W'] of a layer that is no classifier, whose x and y may be [N, C].

        ``see`` is given "x", "expand", "e", "depthwise", "d", "mean", "reduce", "m", "excite", "gated", "project",
        "pixels" and "y" as far as there are such: named after a stage is its result before the activation.
        """
        if self.kind is LayerKind.LINEAR and x.dim() == 2:
            x = x[:, :, None, None]
        see("x", x)
        y = x
        if self.spec is not None:
            y = self._depthwise(y, self.spec, see)
        y = _product(y, self.project)
        see("project", y)
        if self.spec is not None and self.spec.residual:
            y = y + x
        y = function_of(self.out_activation)(y)
        if self.kind is LayerKind.POOLED:
            see("pixels", y)
            y = y.mean((2, 3), keepdim=True)
        see("y", y)
        return y.flatten(1) if self.kind is LayerKind.LINEAR else y

    def _depthwise(self, e: Tensor, spec: BlockSpec, see: See) -> Tensor:
        assert self.depthwise is not None
        if self.expand is not None:
            stem = self.kind is LayerKind.STEM_AND_BLOCK
            weight, bias = _float32(self.expand)
            e = F.conv2d(e, weight, bias, STEM_STRIDE, 1) if stem else _product(e, self.expand)
            see("expand", e)
            e = function_of(self.expanded_by)(e)
            see("e", e)
        left, right, top, bottom = spec.padding_of(*e.shape[2:])
        around = (top, left)
        if left != right or top != bottom:
            e, around = F.pad(e, (left, right, top, bottom)), (0, 0)
        weight, bias = _float32(self.depthwise)
        d = F.conv2d(e, weight[:, None], bias, spec.strides, around, spec.dilation, groups=e.shape[1])
        see("depthwise", d)
        d = function_of(spec.activation)(d)
        see("d", d)
        if self.reduce is None or self.excite is None:
            return d
        m = d.mean((2, 3), keepdim=True)
        see("mean", m)
        m = _product(m, self.reduce)
        see("reduce", m)
        m = function_of(spec.squeeze_activation)(m)
        see("m", m)
        gate = _product(m, self.excite)
        see("excite", gate)
        d = d * function_of(spec.gate)(gate)
        see("gated", d)
        return d


def _float32(affine: Affine) -> tuple[Tensor, Tensor]:
    return affine.weight.float(), affine.bias.float()


def _product(x: Tensor, affine: Affine) -> Tensor:
    weight, bias = _float32(affine)
    return F.conv2d(x, weight[:, :, None, None], bias)


def float_layer(layer: Layer) -> FloatLayer | str:
    """What a layer of the fused model computes, or why no layer on integers does."""
    first, last = layer.modules[0], layer.modules[-1]
    if isinstance(last, FusedBlock):
        found = _of_block(last, layer.kind)
        if isinstance(found, str) or first is last:
            return found
        conv, norm, act = conv_norm_activation(first)
        stem = reading.activation_of(act)
        why = _activation_objection("stem", stem)
        if conv.in_channels > MOST_STEM_CHANNELS:
            why = f"its stem takes {conv.in_channels} channels, int8 at most {MOST_STEM_CHANNELS}"
        # A block behind a stem has no expansion of its own.
        return why or _replace_stem(found, _folded(conv, norm), stem)
    linear = layer.linear
    if linear is not None:
        activation = "identity" if last is linear else reading.activation_of(last)
        bias = linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias
        project = Affine(linear.weight.detach().double(), bias.detach().double())
    else:
        conv, norm, act = conv_norm_activation(first)
        activation = reading.activation_of(act)
        project = _product_of(_folded(conv, norm))
    why = _activation_objection("output", activation)
    return why or FloatLayer(layer.kind, project, activation)


def behind_unfold(stem: FloatLayer) -> FloatLayer:
    """A stem and its block on the pixels under the stem, as channels: the stem is a 1x1 expansion of those."""
    assert stem.spec is not None and stem.expand is not None
    expand = _product_of(stem.expand)
    activation = None if stem.stem_activation == stem.spec.activation else stem.stem_activation
    spec = dataclasses.replace(stem.spec, in_channels=expand.weight.shape[1], expand=True, expand_activation=activation)
    return dataclasses.replace(stem, kind=LayerKind.BLOCK, spec=spec, expand=expand)


def _replace_stem(block: FloatLayer, stem: Affine, activation: str) -> FloatLayer:
    return FloatLayer(
        LayerKind.STEM_AND_BLOCK,
        block.project,
        spec=block.spec,
        expand=stem,
        stem_activation=activation,
        depthwise=block.depthwise,
        reduce=block.reduce,
        excite=block.excite,
    )


def _folded(conv: nn.Conv2d, norm: Norm) -> Affine:
    weight, bias = parameters_of(conv, norm).folded(eps_of(norm))
    return Affine(weight.detach(), bias.detach())


def _product_of(affine: Affine) -> Affine:
    return Affine(affine.weight.flatten(1), affine.bias)


def _of_block(block: FusedBlock, kind: LayerKind) -> FloatLayer | str:
    spec = block.spec
    assert spec is not None  # else it were no layer
    if (why := block_objection(spec)) is not None:
        return why
    parameters, eps = block._fold_parameters()
    stages, squeeze = conv_norms(parameters, len(eps))
    *expand, depthwise, project = [_affine(stage, e) for stage, e in zip(stages, eps, strict=True)]
    reduce_excite = [_product_of(_affine(conv, 0.0)) for conv in squeeze]
    return FloatLayer(
        kind,
        _product_of(project),
        spec=spec,
        expand=_product_of(expand[0]) if expand else None,
        depthwise=Affine(depthwise.weight[:, 0], depthwise.bias),
        reduce=reduce_excite[0] if squeeze else None,
        excite=reduce_excite[1] if squeeze else None,
    )


def _affine(stage: ConvNorm, eps: float) -> Affine:
    weight, bias = stage.folded(eps)
    return Affine(weight.detach(), bias.detach())


KNOWN = (*CLIPS, *FUNCTIONS)
MOST_STEM_CHANNELS = 16  # as csrc/cpu/int8/args.h has it


def block_objection(spec: BlockSpec) -> str | None:
    """Why no layer on integers computes this block, or None where one does."""
    if spec.residual and spec.out_activation != "identity" and not spec.activates_sum:
        return f"its output has a {spec.out_activation} before x is added, int8 has none there"
    if spec.activates_sum and spec.out_activation not in CLIPS:
        return f"its sum has a {spec.out_activation}, int8 has {', '.join(CLIPS)} there"
    named = {"depthwise convolution": spec.activation, "output": spec.out_activation, "expansion": spec.expanded_by}
    if spec.squeeze_channels:
        named["squeeze-and-excite"] = spec.squeeze_activation
        if spec.gate not in GATES:
            return f"its gate is {spec.gate}, int8 has {', '.join(GATES)}"
    found = (_activation_objection(where, activation) for where, activation in named.items())
    return next((why for why in found if why is not None), None)


def _activation_objection(where: str, activation: str) -> str | None:
    return None if activation in KNOWN else f"its {where} has a {activation}, int8 has {', '.join(KNOWN)}"
