"""A layer on integers held in float32, fast enough to correct its biases while it is made.

Sums are those of the integers but for float32's rounding, a fraction of one step of a result. Tensors hold q - zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoding import LayerKind
from .floats import Affine, FloatLayer
from .layers import FUNCTIONS, GATES, HIGHEST, STEM_STRIDE, Int8Layer, Quantizer, Squeeze, Stage
from .observers import ChannelScales
from .scales import Scales, of_tensor
from .weights import MOST_BIAS, make_stage

Means = Mapping[str, Tensor]  # of each stage's result before the activation, of each channel, in float: float64 [C]


def _over_pixels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class Simulation:
    """One layer on integers, its biases corrected so that means of results are those of float."""

    def __init__(self, source: FloatLayer, scales: Scales, means: Means, ends_in_float: bool) -> None:
        """``ends_in_float``: whether the result of a layer without activation is not to be quantised."""
        self.source, self.scales, self.means = source, scales, means
        self.ends_in_float = ends_in_float
        self.stages: dict[str, Stage] = {}

    def run(self, x: Tensor) -> tuple[Int8Layer, Tensor]:
        """The layer, and its result on x float32 [N, C, H, W]."""
        f, s = self.source, self.scales
        q = (x * (1 / s.x.scale)).round_().clamp_(-s.x.zero, HIGHEST - s.x.zero)
        given, d = of_tensor(s.x), q
        if f.expand is not None and s.e is not None:
            given, d = s.e, self._stage("expand", d, f.expand, given, s.e, f.expanded_by)
        squeeze = None
        if f.spec is not None and f.depthwise is not None and s.d is not None:
            given, d = s.d, self._stage("depthwise", d, f.depthwise, given, s.d, f.spec.activation)
            if f.reduce is not None:
                squeeze, d = self._squeezed(d)
                assert s.gated is not None
                given = s.gated
        result = s.pixels or of_tensor(s.y)
        residual = 0.0
        added = None
        if f.spec is not None and f.spec.residual:
            residual = s.x.scale / s.y.scale
            added = q * residual
        y = self._stage("project", d, f.project, given, result, f.out_activation, added)
        of_y: Quantizer | None = s.y
        pool_scale = None
        if s.pixels is not None:
            pool_scale = (s.pixels.scale / s.y.scale).float()
            y = (y.mean((2, 3), keepdim=True) * _over_pixels(pool_scale)).round().clamp(-s.y.zero, HIGHEST - s.y.zero)
        if self.ends_in_float:
            of_y = None
        else:
            y = y * s.y.scale
        layer = Int8Layer(
            f.kind,
            s.x,
            of_y,
            self.stages["project"],
            f.spec,
            self.stages.get("expand"),
            self.stages.get("depthwise"),
            squeeze,
            residual,
            pool_scale,
        )
        return layer, y.flatten(1) if f.kind is LayerKind.LINEAR else y

    def _stage(
        self,
        name: str,
        q: Tensor,
        affine: Affine,
        given: ChannelScales,
        result: ChannelScales,
        activation: str,
        added: Tensor | None = None,
    ) -> Tensor:
        """q - zero of the result; keeps the stage, its bias corrected."""
        real = name == "excite" or (name == "project" and self.ends_in_float)
        if real:  # what leaves it is float32
            result = ChannelScales(torch.ones((), dtype=torch.float64), 0)
        stage = make_stage(affine, given, result, activation)
        v = self._convolve(name, q, stage.weight.float())
        multiplier = _over_pixels(stage.multiplier)
        # The zero point's part of the bias is none of sums of q - zero.
        bias = stage.bias.double() + given.zero * stage.weight.flatten(1).double().sum(1)
        v = (v + _over_pixels(bias.float())) * multiplier
        if added is not None:
            v += added
        if name in self.means:
            to_real = result.scale if stage.scale is None else 1.0
            off = self.means[name] - v.mean((0, 2, 3)).double() * to_real  # in reals
            steps = (off / (stage.multiplier.double() * to_real)).round()
            corrected = (stage.bias.double() + steps).clamp(-MOST_BIAS, MOST_BIAS)
            v += _over_pixels(((corrected - stage.bias.double()) * stage.multiplier.double()).float())
            stage = stage._replace(bias=corrected.to(torch.int32))
        self.stages[name] = stage
        if real:
            return v
        if stage.scale is not None:
            v = FUNCTIONS[stage.activation](v) * _over_pixels(stage.scale)
        return v.round_().clamp_(min=_over_pixels(stage.low), max=_over_pixels(stage.high))

    def _convolve(self, name: str, q: Tensor, weight: Tensor) -> Tensor:
        if weight.dim() == 4:
            return F.conv2d(q, weight, None, STEM_STRIDE, 1)
        spec = self.source.spec
        if weight.dim() == 2 or spec is None:
            return F.conv2d(q, weight[:, :, None, None])
        left, right, top, bottom = spec.padding_of(*q.shape[2:])
        around = (top, left)
        if left != right or top != bottom:
            q, around = F.pad(q, (left, right, top, bottom)), (0, 0)
        return F.conv2d(q, weight[:, None], None, spec.strides, around, spec.dilation, groups=q.shape[1])

    def _squeezed(self, d: Tensor) -> tuple[Squeeze, Tensor]:
        f, s = self.source, self.scales
        assert f.spec is not None and f.reduce is not None and f.excite is not None
        assert s.d is not None and s.gated is not None and s.mean is not None and s.m is not None
        mean_scale = (s.d.scale / s.mean.scale).float()
        mean = (d.mean((2, 3), keepdim=True) * _over_pixels(mean_scale)).round_()
        mean = mean.clamp_(-s.mean.zero, HIGHEST - s.mean.zero)
        m = self._stage("reduce", mean, f.reduce, s.mean, s.m, f.spec.squeeze_activation)
        gate = GATES[f.spec.gate](self._stage("excite", m, f.excite, s.m, s.m, "identity"))
        gated_scale = (s.d.scale / s.gated.scale).float()
        gated = (d * (gate * _over_pixels(gated_scale))).round_().clamp_(-s.d.zero, HIGHEST - s.d.zero)
        squeeze = Squeeze(
            mean_scale, s.mean.zero, self.stages["reduce"], self.stages["excite"], f.spec.gate, gated_scale
        )
        return squeeze, gated
