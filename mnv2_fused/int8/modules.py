"""Modules whose buffers are layers on integers: what :func:`mnv2_fused.quantize` puts in the place of others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoding import LayerKind
from ..module import FusedBlock
from ..module.extra_arguments import ExtraArguments
from ..ops import int8_row
from ..sequence.frozen import Whole
from ..tensors import check_tensor
from .floats import FloatLayer
from .layers import FUNCTIONS, Int8Layer, Quantizer, Squeeze, Stage
from .run import Packed, run_unpacked

_LEAVE_FLOAT = "leave the block float with mnv2_fused.quantize(model, images, skip=(its name,))"
_AGAIN = "call mnv2_fused.quantize(model, images) again, on the original model"  # as the end of a sentence

# Bounds of the result as they are stored, a byte each with its zero point added, by their names in a Stage.
_BOUNDS = {"lowest": "low", "highest": "high"}


class _Quantized(nn.Module):
    """What runs on integers: on the CPU, in eval alone."""

    is_part = False  # of what is packed as a whole

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_part:
            raise RuntimeError(
                f"a {type(self).__name__} is packed with the row it is part of: load values into the row or the model, "
                "with strict=False where some of them stay"
            )
        return super().load_state_dict(*args, **kwargs)

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
        self.is_part = True
        channels = shape[0]
        self.activation = activation if activation in FUNCTIONS else "identity"
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("multiplier", torch.zeros(channels))
        for name in _BOUNDS:
            self.register_buffer(name, torch.zeros(channels, dtype=torch.uint8))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scale", None if self.activation == "identity" else torch.zeros(channels))
        self._start()

    @property
    def stage(self) -> Stage:
        found: dict[str, Any] = dict(self._buffers)
        zero = int(found["zero"])
        bounds = {bound: found.pop(name).float() - zero for name, bound in _BOUNDS.items()}
        return Stage(**found | bounds | {"zero": zero, "activation": self.activation})

    def fill(self, stage: Stage) -> None:
        """Takes over the values of ``stage``."""
        for name, t in self._buffers.items():
            _set(t, getattr(stage, _BOUNDS[name]) + stage.zero if name in _BOUNDS else getattr(stage, name))

    def extra_repr(self) -> str:
        return f"{list(self.stage.weight.shape)}, {self.activation}"


class _Packs(_Quantized):
    """What one call of the op computes, on weights that are packed when values change: a graph finds them there.

    They are in no ``state_dict`` and no pickle, which hold the layers' own buffers.
    """

    geometry: tuple[int, ...] = ()  # the op's ``layers``

    def __init__(self, first: LayerKind, in_channels: int, last: LayerKind) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.takes_flat, self.gives_flat = first is LayerKind.LINEAR, last is LayerKind.LINEAR
        self.register_buffer("packed", None, persistent=False)
        self.register_load_state_dict_post_hook(_pack)

    def _layers(self) -> list[QuantizedLayer]:
        return [m for m in self.modules() if isinstance(m, QuantizedLayer)]

    def int8_layers(self) -> list[Int8Layer]:
        """The layers that the buffers hold. Raises RuntimeError where nothing was calibrated or loaded."""
        return [layer.int8_layer() for layer in self._layers()]

    def has_values(self) -> bool:
        """Whether something was calibrated or loaded."""
        return not any(math.isnan(layer.get_buffer("x_scale")) for layer in self._layers())

    def pack(self) -> None:
        """Takes over what the buffers hold: for whoever changed them."""
        if self.is_part:
            return
        found = None
        if self.has_values():
            with torch.inference_mode(False), torch.no_grad():
                found = Packed.of(self.int8_layers())
        if found is None:
            self.packed = None
            return
        self.geometry = found.geometry
        if self.packed is None or self.packed.shape != found.weights.shape:
            self.packed = found.weights
        else:
            with torch.no_grad():
                self.packed.copy_(found.weights)  # where graphs and other processes look

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        packed = self._buffers["packed"]
        if packed is None:
            return run_unpacked(x, self.int8_layers())
        y = int8_row(x, packed, self.geometry)
        return y.flatten(1) if self.gives_flat else y

    def _checked(self, x: Tensor) -> Tensor:
        """[N, C, H, W]."""
        check_tensor(x)
        if x.dtype is not torch.float32:
            raise TypeError(f"a quantised model takes float32, got x of {x.dtype}; convert it with x.float()")
        if not x.is_cpu:
            raise RuntimeError(f"a quantised model runs on the CPU, got x on {x.device}; move it with x.cpu()")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a quantised model has no derivative; use torch.no_grad(), or the original model")
        dims = x.dim()
        if dims == 2 and self.takes_flat:
            x, dims = x[:, :, None, None], 4
        if dims != 4:  # channels are the op's to check, which is no value that a trace has to be told of
            raise ValueError(
                f"x must be [N, {self.in_channels}, H, W], got {list(x.shape)}"
                + ("; add a batch with x[None]" if dims == 3 else "")
            )
        return x

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": self._buffers | {"packed": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


def _pack(module: _Packs, _: Any) -> None:
    module.pack()


class QuantizedLayer(_Packs):
    """One layer: float32 x [N, C, H, W] -> float32, on integers in between.

    ``float_layer`` tells of shapes alone: values come by :meth:`fill`, or from a ``state_dict``. In a row it is packed
    with the others: by itself it then packs at each call.
    """

    def __init__(self, float_layer: FloatLayer) -> None:
        f = float_layer
        super().__init__(f.kind, f.in_channels, f.kind)
        self.kind, self.spec = f.kind, f.spec
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
        self._start()

    def fill(self, layer: Int8Layer) -> None:
        """Takes over the values of ``layer``, but for what is packed."""
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
                assert isinstance(of_stage, QuantizedStage)
                of_stage.fill(stage)

    def int8_layer(self) -> Int8Layer:
        """The layer that the buffers hold.

        Raises RuntimeError where nothing was calibrated or loaded.
        """
        if not self.has_values():
            raise RuntimeError(
                "this quantised layer has no values yet: load_state_dict() those of a model that mnv2_fused.quantize "
                "made, or call mnv2_fused.quantize(model, images)"
            )
        value: dict[str, Any] = {n: t.item() if t.dim() == 0 else t for n, t in self._buffers.items() if t is not None}
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

    def extra_repr(self) -> str:
        x, y = (self._buffers[name] for name in ("x_scale", "y_scale"))
        assert x is not None and y is not None
        scales = "uncalibrated" if x.isnan() else f"x_scale={float(x):.4g}, y_scale={float(y):.4g}"
        return f"{self.spec or self.kind.name.lower()}, {scales}"


def _set(t: Tensor | None, value: Any) -> None:
    if t is not None:
        with torch.no_grad():
            t.copy_(value if isinstance(value, Tensor) else torch.tensor(value))


class QuantizedRow(_Packs, Whole):
    """Layers in a row: float32 x [N, C, H, W] -> float32, integers alone between the layers.

    The result is that of its ``layers`` one after the other, to the bit.
    """

    layers: nn.ModuleList

    def __init__(self, layers: list[QuantizedLayer]) -> None:
        super().__init__(layers[0].kind, layers[0].in_channels, layers[-1].kind)
        for layer in layers:
            layer.is_part = True
        self.layers = nn.ModuleList(layers)
        self._start()


class Unfold(nn.Module):
    """[N, C, H, W] -> [N, C k k, H', W']: what lies under each output of a k x k convolution.

    ``padding``: left, right, top, bottom, or "same" as TensorFlow pads.
    """

    def __init__(self, kernel: int, stride: int, padding: tuple[int, int, int, int] | str) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.training = False

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Unfold | None:
        """Of a convolution that may pad in its forward: in the way in which it is seen to do so, or None."""
        kernel, stride = conv.weight.shape[-1], tuple(conv.stride)
        if kernel not in (1, 3) or stride not in ((1, 1), (2, 2)) or tuple(conv.dilation) != (1, 1):
            return None
        if kernel == 1 and stride != (1, 1):
            return None
        drawn = torch.Generator().manual_seed(0)
        images = [torch.randn(1, conv.in_channels, *size, generator=drawn) for size in _SIZES]
        given = [conv(x) for x in images]
        paddings: list[Any] = ["same", *itertools.product(range(kernel), repeat=4)]
        for padding in paddings:
            found = cls(kernel, stride[0], padding)
            made = (F.conv2d(found.pad(x), conv.weight, conv.bias, stride) for x in images)
            if all(_alike(a, b) for a, b in zip(given, made, strict=True)):
                return found
        return None

    def pad(self, x: Tensor) -> Tensor:
        around = self.padding
        if isinstance(around, str):
            sides = [max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[2:]]
            (above, left), (below, right) = (n // 2 for n in sides), (n - n // 2 for n in sides)
            around = left, right, above, below
        return F.pad(x, around)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        sizes = ((n - self.kernel) // self.stride + 1 for n in x.shape[2:])
        return F.unfold(x, self.kernel, stride=self.stride).unflatten(2, tuple(sizes))

    def extra_repr(self) -> str:
        return f"{self.kernel}x{self.kernel}, stride {self.stride}, padding {self.padding}"


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())


_SIZES = ((16, 16), (17, 15), (16, 17))  # padding may differ with their remainders


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
