"""Modules whose buffers are layers on integers: what :func:`mnv2_fused.quantize` puts in the place of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..encoding import LayerKind
from ..module import FusedBlock
from ..module.extra_arguments import ExtraArguments
from ..sequence.frozen import Whole
from ..tensors import check_tensor
from .floats import FloatLayer
from .layers import FUNCTIONS, Int8Layer, Quantizer, Squeeze, Stage
from .run import Row

_LEAVE_FLOAT = "leave the block float with mnv2_fused.quantize(model, images, skip=(its name,))"
_AGAIN = "call mnv2_fused.quantize(model, images) again, on the original model"  # as the end of a sentence


class _Quantized(nn.Module):
    """What runs on integers: on the CPU, in eval alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Quantized:
        """Refuses a change of dtype or device: scales are float32, and integers have one meaning alone."""
        moved = fn(torch.empty(0))
        if (moved.dtype, moved.device.type) != (torch.float32, "cpu"):
            raise RuntimeError(
                f"a quantised model stays on the CPU and takes float32, it cannot become {moved.dtype} on "
                f"{moved.device}; convert the original model, or use it unquantised"
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> _Quantized:
        if mode:
            raise RuntimeError(
                f"a quantised model cannot train: its weights are integers; train the original model, then {_AGAIN}"
            )
        return super().train(False)

    def _start(self) -> None:
        self.training = False


class QuantizedStage(_Quantized):
    """The tensors of one :class:`mnv2_fused.int8.layers.Stage`, as buffers."""

    def __init__(self, shape: torch.Size, activation: str) -> None:
        super().__init__()
        channels = shape[0]
        self.activation = activation if activation in FUNCTIONS else "identity"
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(channels, dtype=torch.int32))
        for name in ("multiplier", "low", "high"):
            self.register_buffer(name, torch.zeros(channels))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scale", None if self.activation == "identity" else torch.zeros(channels))
        self._start()

    @property
    def stage(self) -> Stage:
        found: dict[str, Any] = dict(self._buffers)
        return Stage(**found | {"zero": int(found["zero"]), "activation": self.activation})

    def extra_repr(self) -> str:
        return f"{list(self.stage.weight.shape)}, {self.activation}"


class QuantizedLayer(_Quantized):
    """One layer: float32 x [N, C, H, W] -> float32, on integers in between.

    ``float_layer`` tells of shapes alone: values come by :meth:`fill`, or from a ``state_dict``.
    """

    def __init__(self, float_layer: FloatLayer) -> None:
        super().__init__()
        f = float_layer
        self.kind, self.spec, self.in_channels = f.kind, f.spec, f.in_channels
        stages = {
            "expand": (f.expand, f.expanded_by),
            "depthwise": (f.depthwise, "identity" if f.spec is None else f.spec.activation),
            "reduce": (f.reduce, "identity" if f.spec is None else f.spec.squeeze_activation),
            "excite": (f.excite, "identity"),
            "project": (f.project, f.out_activation),
        }
        for name, (affine, activation) in stages.items():
            if affine is not None:
                self.add_module(name, QuantizedStage(affine.weight.shape, activation))
        floats: dict[str, tuple[int, ...]] = {"x_scale": ()}
        zeros = ["x_zero"]
        if f.reduce is not None and f.depthwise is not None:
            hidden = f.depthwise.weight.shape[:1]
            floats |= {"mean_scale": hidden, "gated_scale": hidden}
            zeros.append("mean_zero")
        if f.kind is LayerKind.POOLED:
            floats["pool_scale"] = f.project.bias.shape
        if f.spec is not None and f.spec.residual:
            floats["residual_scale"] = ()
        # Of what may be a row's last classifier, the scale of y is 0 where y is float32.
        for name, shape in (floats | {"y_scale": ()}).items():
            self.register_buffer(name, torch.full(shape, math.nan))
        for name in (*zeros, "y_zero"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int32))
        self._layer: Int8Layer | None = None
        self._row: Row | None = None
        self._start()

    def fill(self, layer: Int8Layer) -> None:
        """Takes over the values of ``layer``."""
        y = layer.y or Quantizer(0.0, 0)
        values: dict[str, Any] = {"x_scale": layer.x.scale, "x_zero": layer.x.zero, "y_scale": y.scale}
        values |= {"y_zero": y.zero, "residual_scale": layer.residual_scale, "pool_scale": layer.pool_scale}
        stages = {"expand": layer.expand, "depthwise": layer.depthwise, "project": layer.project}
        if (s := layer.squeeze) is not None:
            stages |= {"reduce": s.reduce, "excite": s.excite}
            values |= {"mean_scale": s.mean_scale, "mean_zero": s.mean_zero, "gated_scale": s.gated_scale}
        for name, value in values.items():
            if name in self._buffers:
                _set(self._buffers[name], value)
        for name, stage in stages.items():
            if stage is not None:
                of_stage = self._modules[name]
                assert of_stage is not None
                for field, t in of_stage._buffers.items():
                    _set(t, getattr(stage, field))
        self._layer = None

    def int8_layer(self) -> Int8Layer:
        """The layer that the buffers hold, the same object until they are loaded anew.

        Raises RuntimeError where nothing was calibrated or loaded.
        """
        if self._layer is None:
            self._layer = self._read()
        return self._layer

    def _read(self) -> Int8Layer:
        value: dict[str, Any] = {n: t.item() if t.dim() == 0 else t for n, t in self._buffers.items() if t is not None}
        if math.isnan(value["x_scale"]):
            raise RuntimeError(
                "this quantised layer has no values yet: load_state_dict() those of a model that mnv2_fused.quantize "
                "made, or call mnv2_fused.quantize(model, images)"
            )
        stages: Any = {name: stage.stage for name, stage in self._modules.items() if isinstance(stage, QuantizedStage)}
        squeeze = None
        if "reduce" in stages and self.spec is not None:
            squeeze = Squeeze(
                value["mean_scale"],
                value["mean_zero"],
                stages.pop("reduce"),
                stages.pop("excite"),
                self.spec.gate,
                value["gated_scale"],
            )
        return Int8Layer(
            self.kind,
            Quantizer(value["x_scale"], value["x_zero"]),
            Quantizer(value["y_scale"], value["y_zero"]) if value["y_scale"] else None,
            spec=self.spec,
            squeeze=squeeze,
            residual_scale=value.get("residual_scale", 0.0),
            pool_scale=value.get("pool_scale"),
            **stages,
        )

    def forward(self, x: Tensor) -> Tensor:
        layer = self.int8_layer()
        if self._row is None or self._row.layers[0] is not layer:
            self._row = Row([layer])
        return _run(x, self, self._row)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._layer = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Quantized:
        self._layer = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layer": None, "_row": None}

    def extra_repr(self) -> str:
        x, y = (self._buffers[name] for name in ("x_scale", "y_scale"))
        assert x is not None and y is not None
        scales = "uncalibrated" if x.isnan() else f"x_scale={float(x):.4g}, y_scale={float(y):.4g}"
        return f"{self.spec or self.kind.name.lower()}, {scales}"


def _set(t: Tensor | None, value: Any) -> None:
    if t is not None:
        with torch.no_grad():
            t.copy_(value if isinstance(value, Tensor) else torch.tensor(value))


def _run(x: Tensor, first: QuantizedLayer, row: Row) -> Tensor:
    check_tensor(x)
    if x.dtype is not torch.float32:
        raise TypeError(f"a quantised model takes float32, got x of {x.dtype}; convert it with x.float()")
    if not x.is_cpu:
        raise RuntimeError(f"a quantised model runs on the CPU, got x on {x.device}; move it with x.cpu()")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("a quantised model has no derivative; use torch.no_grad(), or the original model")
    if x.dim() == 2 and first.kind is LayerKind.LINEAR:
        x = x[:, :, None, None]
    if x.dim() != 4 or x.shape[1] != first.in_channels:
        raise ValueError(
            f"x must be [N, {first.in_channels}, H, W], got {list(x.shape)}"
            + ("; add a batch with x[None]" if x.dim() == 3 else "")
        )
    return row(x)


class QuantizedRow(_Quantized, Whole):
    """Layers in a row: float32 x [N, C, H, W] -> float32, integers alone between the layers.

    The result is that of its ``layers`` one after the other, to the bit.
    """

    layers: nn.ModuleList

    def __init__(self, layers: list[QuantizedLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._row: Row | None = None
        self._start()

    def forward(self, x: Tensor) -> Tensor:
        found: list[Any] = list(self.layers)
        now = [layer.int8_layer() for layer in found]
        row = self._row
        if row is None or len(now) != len(row.layers) or any(a is not b for a, b in zip(now, row.layers, strict=True)):
            row = self._row = Row(now)
        return _run(x, found[0], row)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_row": None}


class QuantizedModel(Whole):
    """Quantised rows, and what stays float between them, one after the other."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        for i, step in enumerate(steps):
            self.add_module(str(i), step)
        self.training = False

    def forward(self, input: Tensor) -> Tensor:
        for step in self._modules.values():
            assert step is not None
            input = step(input)
        return input


class QuantizedBlock(nn.Module):
    """A quantised layer in the place of one block, with what the block's module runs around it in float."""

    def __init__(self, layer: QuantizedLayer, block: FusedBlock) -> None:
        super().__init__()
        around = block._around
        self.leading = block.leading_child
        self.layer = layer
        self.tail = nn.Sequential(*(block.get_submodule(name) for name in around.tail)) if around else None
        self.shortcut = around is not None and around.shortcut
        self._extra = ExtraArguments(block)
        self.training = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [N, C_in, H, W] -> [N, C_out, H', W']
        if args or kwargs:
            self._extra.check(args, kwargs, _LEAVE_FLOAT)
        y = self.layer(x if self.leading is None else self.leading(x))
        if self.tail is not None:
            y = self.tail(y)
        return y + x if self.shortcut else y


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, _Quantized)
