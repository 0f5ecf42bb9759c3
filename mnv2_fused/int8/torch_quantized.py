"""``quantized_from``: networks that ``torch.ao.quantization`` quantised in eager mode, read into layers on integers.

Weights, scales and zero points are torch's. A bias, float there, becomes int32 at the scale of the sums, and a
multiplier is a product of float32 factors, both rounded as in QNNPACK: a convolution has its integers. Where torch
rounds more often than layers here, what is in between is left unrounded: a projection's result before x is added, a
result before hardswish, a gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.find import check_model
from ..encoding import LayerKind
from ..module import reading
from ..spec import BlockSpec
from .floats import MOST_STEM_CHANNELS, Affine, FloatLayer, block_objection
from .layers import HIGHEST, STEM_STRIDE, Int8Layer, Quantizer, Squeeze, Stage, hardswish
from .modules import QuantizedLayer, QuantizedModel, QuantizedRow, Unfold, is_quantized
from .reports import ATTRIBUTE, QuantizedLayerReport, QuantizedReport
from .structure import what_of
from .weights import MOST_BIAS

_TAKEN = "MobileNetV2 and MobileNetV3 of torchvision.models.quantization"
_LEAST_SCALE = 2.0**-100
_LEAST_OF_HARDSWISH = -1.5  # it falls up to there, and rises behind


def quantized_from(model: nn.Module) -> nn.Module:
    """What :func:`mnv2_fused.quantize` makes, of a network that torch quantised in eager mode: no images are needed.

    ``model``: a ``MobileNetV2`` or ``MobileNetV3`` of ``torchvision.models.quantization`` behind
    ``torch.ao.quantization.convert``, of any of torch's engines; it stays as it is. Weights are int8, one scale for
    each output channel or for each tensor; activations are quint8. The copy takes float32 and returns float32.
    ``docs/quantize.md`` says where its integers are torch's own, and where they are one step away.

    Raises TypeError for what is no module or no such network; ValueError for one that is not converted yet, or holds
    what layers on integers do not compute.
    """
    check_model(model)
    _check_network(model)
    with torch.inference_mode(False), torch.no_grad():
        read = list(_Reader(model).layers())
    made: list[QuantizedLayer] = []
    for _, floats, integers in read:
        layer = QuantizedLayer(floats)
        layer.fill(integers)
        made.append(layer)
    result: nn.Module = QuantizedRow(made)
    for module in (result, *made):
        module.pack()
    if read[0][1].kind is LayerKind.POINTWISE:
        result = QuantizedModel(Unfold(3, STEM_STRIDE, (1, 1, 1, 1)), result)
    rows = (QuantizedLayerReport(name, what_of(floats), True) for name, floats, _ in read)
    vars(result)[ATTRIBUTE] = QuantizedReport(tuple(rows))
    return result


def is_torch_quantized(model: nn.Module) -> bool:
    """Whether torch quantised any module inside."""
    return any(_is_of_torch(m, "quantized") for m in model.modules() if not _adds_floats(m))


def _adds_floats(module: nn.Module) -> bool:
    """Whether it is what a sum is written with before anything is quantised."""
    return type(module).__name__ in ("FloatFunctional", "FXFloatFunctional")


def _is_of_torch(module: nn.Module, what: str) -> bool:
    path = type(module).__module__.split(".")
    return path[:3] == ["torch", "ao", "nn"] and what in path


def _is_prepared(module: nn.Module) -> bool:
    """Whether an observer or a fake quantisation is behind it."""
    behind = module._modules.get("activation_post_process")
    return _is_of_torch(module, "qat") or not isinstance(behind, nn.Identity | None)


def _check_network(model: nn.Module) -> None:
    if any(map(is_quantized, model.modules())):
        raise ValueError("the model is quantised already, on integers of mnv2_fused")
    name = _class(model)
    if name not in _BLOCKS:
        raise TypeError(
            f"quantized_from takes {_TAKEN}, got {name}; give float models to mnv2_fused.quantize(model, images)"
        )
    if any(map(_is_prepared, model.modules())):
        raise ValueError(
            "the model is prepared, and not converted yet: call torch.ao.quantization.convert(model.eval()) first"
        )
    if not is_torch_quantized(model):
        raise ValueError(
            "the model is float: give it to mnv2_fused.quantize(model, images), or quantise it with "
            "torch.ao.quantization first"
        )
    if (why := next(reading.inner_objections([*model.modules()]), None)) is not None:
        raise ValueError(f"the model cannot be read: {why}")


_PACKAGE = "torchvision.models.quantization"
_BLOCKS = {  # by class of a network: where its blocks have their layers
    f"{_PACKAGE}.mobilenetv2.QuantizableMobileNetV2": "conv",
    f"{_PACKAGE}.mobilenetv3.QuantizableMobileNetV3": "block",
}


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A quantised convolution or linear layer with the activation behind it."""

    name: str
    module: Any
    activation: str  # "identity", "relu" or "hardswish"
    y: Quantizer
    before: Quantizer  # of what is in front of a hardswish; else ``y``

    @property
    def is_plain(self) -> bool:
        """Whether it is a 1x1 product."""
        m = self.module
        return (*m.kernel_size, *m.stride, *m.padding, m.groups) == (1, 1, 1, 1, 0, 0, 1)

    def stage(self, given: Quantizer, result: Quantizer | None = None) -> Stage:
        """From integers of ``given`` to those of ``result``, its own where None."""
        packed = self.module if _is_convolution(self.module) else self.module._packed_params
        weight, bias = packed._weight_bias()
        scale = self._scales(weight)
        q = weight.int_repr()
        c = q.shape[0]
        sums = _float(given.scale) * scale  # a step of the sums, of each channel
        bias = torch.zeros(c) if bias is None else bias.detach().float()
        sums, q = _raised(sums, bias, q)
        of_zero = given.zero * q.flatten(1).sum(1, dtype=torch.int64).double()
        integers = ((bias * (1 / sums)).round().double() - of_zero).to(torch.int32)
        y = self.y if result is None else result
        low, high = self._bounds(y, own=result is None)
        function = self.activation == "hardswish"
        return Stage(
            _shaped(q),
            integers,
            sums if function else sums * (1 / _float(y.scale)),
            torch.full((c,), low),
            torch.full((c,), high),
            y.zero,
            self.activation if function else "identity",
            torch.full((c,), 1 / y.scale) if function else None,
        )

    def _bounds(self, y: Quantizer, own: bool) -> tuple[float, float]:
        low, high = float(-y.zero), float(HIGHEST - y.zero)
        if self.activation == "relu":
            return max(low, 0.0), high
        if self.activation == "hardswish" and own:
            # Where the integers in front of it end.
            least, most = -self.before.zero * self.before.scale, (HIGHEST - self.before.zero) * self.before.scale
            of_least, of_most = (float(hardswish(_float(v)) / y.scale) for v in (least, most))
            if least > _LEAST_OF_HARDSWISH:
                low = max(low, float(round(of_least)))
            if most > 0:
                high = min(high, float(round(of_most)))
        return low, high

    def _scales(self, weight: Tensor) -> Tensor:
        """float32 [C]."""
        if weight.dtype is not torch.qint8:
            raise ValueError(f"{self.name} has weights of {weight.dtype}, int8 takes torch.qint8")
        if weight.qscheme() is torch.per_tensor_affine:
            scale, zero = torch.tensor([weight.q_scale()]), torch.tensor(weight.q_zero_point())
        elif weight.qscheme() is torch.per_channel_affine and weight.q_per_channel_axis() == 0:
            scale, zero = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        else:
            raise ValueError(
                f"{self.name} has weights quantised by {weight.qscheme()}, int8 takes one scale for each output "
                "channel or for each tensor"
            )
        if bool((zero != 0).any()):
            raise ValueError(f"{self.name} has weights with a zero point that is not 0: quantise them symmetrically")
        return scale.float().expand(weight.shape[0]).contiguous()


def _shaped(q: Tensor) -> Tensor:
    """A weight as stages have it."""
    if q.shape[2:].numel() == 1:
        return q.flatten(1)
    return q[:, 0] if q.shape[1] == 1 else q


def _raised(sums: Tensor, bias: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and weights of which no bias leaves its int32: channels that are nearly dead have a greater scale."""
    raised = sums.maximum(bias.abs() / MOST_BIAS).clamp(min=_LEAST_SCALE)
    factor = (sums / raised).view(-1, *(1,) * (q.dim() - 1))
    return raised, torch.where(factor < 1, (q.float() * factor).round(), q.float()).to(torch.int8)


def _float(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


class _Reader:
    """A converted network as layers in a row."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.inside = _BLOCKS[_class(model)]

    def layers(self) -> Iterator[tuple[str, FloatLayer, Int8Layer]]:
        """(name, what it is, its integers) of each."""
        first, *blocks, last = self.model.features
        x = self._input()
        stem = self._only(first)
        if (stem.module.kernel_size, stem.module.stride, stem.module.padding) != ((3, 3), (2, 2), (1, 1)):
            raise ValueError("its stem is no 3x3 convolution of stride 2 with padding 1, int8 has no other")
        if stem.module.in_channels > MOST_STEM_CHANNELS or stem.module.groups != 1:
            raise ValueError(f"its stem takes more than {MOST_STEM_CHANNELS} channels, or is in groups")
        joined: _Convolution | None = None
        if len(self._parts(blocks[0])) == 2 and not blocks[0].use_res_connect:
            joined = stem  # as kernels have it, of a block with neither expansion nor residual
        else:
            stage = stem.stage(x)
            layer = Int8Layer(LayerKind.POINTWISE, x, stem.y, stage._replace(weight=stage.weight.flatten(1)))
            yield self._entry(first, layer, stem.activation)
            x = stem.y
        for block in blocks:
            found = self._block(block, x, joined)
            joined = None
            assert found[2].y is not None
            yield found
            x = found[2].y
        head = self._only(last)
        if not head.is_plain:
            raise ValueError(f"{head.name} is no 1x1 convolution")
        pool = torch.ones(head.module.out_channels)
        layer = Int8Layer(LayerKind.POOLED, x, head.y, head.stage(x), pool_scale=pool)
        yield self._entry(last, layer, head.activation)
        yield from self._classifier(head.y)

    def _input(self) -> Quantizer:
        quant, dequant = self.model.quant, self.model.dequant
        for name, module in (("Quantize", quant), ("DeQuantize", dequant)):
            if _class(module) != f"{_MODULES}.{name}":
                raise ValueError(
                    f"{self.names[module]} is a {_class(module)}, not torch's {name}: quantise the whole model, with "
                    "model.qconfig set"
                )
        if quant.dtype is not torch.quint8:
            raise ValueError(f"the model's activations are {quant.dtype}, int8 takes torch.quint8")
        return Quantizer(float(quant.scale.float()), int(quant.zero_point))

    def _classifier(self, x: Quantizer) -> Iterator[tuple[str, FloatLayer, Int8Layer]]:
        for found in self._convolutions(self.model.classifier, nn.Linear):
            layer = Int8Layer(LayerKind.LINEAR, x, found.y, found.stage(x))
            yield self._entry(found.module, layer, found.activation)
            x = found.y

    def _parts(self, block: nn.Module) -> list[_Convolution]:
        """The convolutions of a block, without those of its squeeze-and-excite."""
        name = self.names[block]
        if _class(block) not in _INVERTED_RESIDUALS:
            raise ValueError(f"{name} is a {_class(block)}, quantized_from takes {_TAKEN}")
        children = [m for m in getattr(block, self.inside) if not _is_squeeze(m)]
        found = list(self._convolutions(children, nn.Conv2d))
        if len(found) not in (2, 3):
            raise ValueError(f"{name} has {len(found)} convolutions, an inverted residual has two or three")
        return found

    def _block(self, block: Any, x: Quantizer, stem: _Convolution | None) -> tuple[str, FloatLayer, Int8Layer]:
        *expand, depthwise, project = self._parts(block)
        squeeze = next(filter(_is_squeeze, getattr(block, self.inside)), None)
        y, residual = project.y, 0.0
        if block.use_res_connect:
            y = Quantizer(float(block.skip_add.scale), int(block.skip_add.zero_point))
            residual = float(_float(x.scale) / _float(y.scale))
        at = depthwise.module
        spec = BlockSpec(
            project.module.in_channels if not expand else expand[0].module.in_channels,
            at.in_channels,
            project.module.out_channels,
            stride=at.stride if at.stride[0] != at.stride[1] else at.stride[0],
            expand=bool(expand),
            residual=bool(block.use_res_connect),
            kernel=at.kernel_size[0],
            dilation=at.dilation[0],
            activation=depthwise.activation,
            expand_activation=expand[0].activation if expand else None,
            out_activation=project.activation,
            squeeze_channels=0 if squeeze is None else squeeze.fc1.out_channels,
            squeeze_activation="relu",
        )
        name = self.names[block]
        if (why := block_objection(spec)) is not None:
            raise ValueError(f"{name}: {why}")
        around = at.dilation[0] * (at.kernel_size[0] - 1) // 2
        plain = all(part.is_plain for part in (*expand, project))
        if tuple(at.padding) != (around, around) or at.groups != at.in_channels or not plain:
            raise ValueError(f"{name} is no inverted residual with zeros around it on every side")
        first = stem.stage(x) if stem else expand[0].stage(x) if expand else None
        given = stem.y if stem else expand[0].y if expand else x
        of_d, given, gates = depthwise.stage(given), depthwise.y, None
        if squeeze is not None:
            gates, given = self._squeeze(squeeze, given)
        kind = LayerKind.STEM_AND_BLOCK if stem else LayerKind.BLOCK if expand else LayerKind.BLOCK_WITHOUT_EXPAND
        layer = Int8Layer(kind, x, y, project.stage(given, y), spec, first, of_d, gates, residual)
        return self._entry(block, layer, stem.activation if stem else "identity")

    def _squeeze(self, module: Any, d: Quantizer) -> tuple[Squeeze, Quantizer]:
        """With the quantiser of what takes the place of d."""
        name = self.names[module]
        if type(module.scale_activation) is not nn.Hardsigmoid:
            raise ValueError(f"{name} has a gate of {type(module.scale_activation).__name__}, not Hardsigmoid")
        reduce = self._one(module.fc1, module.activation)
        excite = self._one(module.fc2, None)
        torchs = Quantizer(float(module.skip_mul.scale), int(module.skip_mul.zero_point))
        # One zero point for d and what takes its place, at a scale of which all of torch's range is held.
        scale = torchs.scale * max(HIGHEST - torchs.zero, 1) / max(HIGHEST - d.zero, 1)
        if d.zero > 0:
            scale = max(scale, torchs.scale * torchs.zero / d.zero)
        gated = Quantizer(torchs.scale if torchs.zero == d.zero else scale, d.zero)
        e = module.fc2.out_channels
        step = excite.stage(reduce.y, Quantizer(1.0, 0))  # its result is float
        made = Squeeze(
            torch.ones(e), d.zero, reduce.stage(d), step, "hardsigmoid", torch.full((e,), d.scale / gated.scale)
        )
        return made, gated

    def _only(self, sequence: Any) -> _Convolution:
        found = list(self._convolutions([sequence], nn.Conv2d))
        if len(found) != 1:
            raise ValueError(f"{self.names[sequence]} holds {len(found)} convolutions, not one")
        return found[0]

    def _convolutions(self, modules: Any, kind: type[nn.Module]) -> Iterator[_Convolution]:
        """Those of ``modules`` and of Sequentials among them, in order, with what follows each."""
        flat = [m for m in _flat(modules) if not _does_nothing(m)]
        while flat:
            first = flat.pop(0)
            act = flat.pop(0) if flat and _class(flat[0]) == _HARDSWISH else None
            found = self._one(first, act)
            if _is_convolution(first) != (kind is nn.Conv2d):
                raise ValueError(f"{self.names[first]} is a {type(first).__name__}, where a {kind.__name__} belongs")
            yield found

    def _one(self, module: Any, act: Any) -> _Convolution:
        name = self.names[module]
        activation = _KNOWN.get(_class(module))
        if activation is None:
            alone = "Norm" in type(module).__name__ or isinstance(module, nn.ReLU)
            way_out = ": call model.fuse_model() before the model is prepared" if alone else ""
            raise ValueError(f"{name} is a {_class(module)}, which quantized_from does not read{way_out}")
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"{name} pads by {module.padding_mode}, int8 by zeros")
        before = y = Quantizer(float(module.scale), int(module.zero_point))
        if act is not None and not _does_nothing(act):
            if _class(act) != _HARDSWISH:
                raise ValueError(
                    f"{name} is followed by a {_class(act)}: call model.fuse_model() before it is prepared"
                )
            activation, y = "hardswish", Quantizer(float(act.scale), int(act.zero_point))
        return _Convolution(name, module, activation, y, before)

    def _entry(self, module: nn.Module, layer: Int8Layer, activation: str) -> tuple[str, FloatLayer, Int8Layer]:
        stages = {"expand": layer.expand, "depthwise": layer.depthwise, "project": layer.project}
        if layer.squeeze is not None:
            stages |= {"reduce": layer.squeeze.reduce, "excite": layer.squeeze.excite}
        shapes: dict[str, Any] = {n: Affine(s.weight, s.bias) for n, s in stages.items() if s is not None}
        behind: dict[str, Any] = {"stem_activation" if layer.spec else "activation": activation}
        return self.names[module], FloatLayer(layer.kind, spec=layer.spec, **shapes, **behind), layer


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


_INVERTED_RESIDUALS = tuple(f"{_PACKAGE}.mobilenetv{n}.QuantizableInvertedResidual" for n in (2, 3))
_MODULES = "torch.ao.nn.quantized.modules"
_HARDSWISH = f"{_MODULES}.activation.Hardswish"
_KNOWN = {
    f"{_MODULES}.conv.Conv2d": "identity",
    f"{_MODULES}.linear.Linear": "identity",
    "torch.ao.nn.intrinsic.quantized.modules.conv_relu.ConvReLU2d": "relu",
    "torch.ao.nn.intrinsic.quantized.modules.linear_relu.LinearReLU": "relu",
}


def _does_nothing(module: nn.Module) -> bool:
    return _class(module) == f"{_MODULES}.dropout.Dropout" or isinstance(module, nn.Identity | nn.Dropout)


def _is_squeeze(module: nn.Module) -> bool:
    return _class(module) == f"{_PACKAGE}.mobilenetv3.QuantizableSqueezeExcitation"


def _is_convolution(module: nn.Module) -> bool:
    return hasattr(module, "groups")


def _flat(modules: Any) -> Iterator[nn.Module]:
    for m in modules:
        if isinstance(m, nn.Sequential):
            yield from _flat(m)
        else:
            yield m
