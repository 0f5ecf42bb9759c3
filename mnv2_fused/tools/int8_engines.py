"""What runs MobileNetV2 on 8-bit integers on a CPU: this project, ONNX Runtime, OpenVINO; each calibrated by its own
quantiser and set up as its users do."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..int8 import quantize, quantized_report
from .bench_results import bfloat16, int8
from .engines import FUSED, Call, channels_last, infer_openvino, inference, onnx_options, openvino_options, require

ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"


@dataclass(frozen=True)
class Quantized:
    """A network that one engine has quantised."""

    bytes_on_disk: int  # of the file, or the files, that its users deploy
    engines: dict[str, Callable[[Tensor, int], Call]]  # by name: what runs on images [N, 3, H, W] with so many threads
    layers: int | None = None  # how many run on integers, where the engine tells


def fused(model: nn.Module, calibration: Sequence[Tensor]) -> Quantized:
    """``mnv2_fused.quantize(model, calibration)``."""
    quantized = quantize(model, calibration)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)

    def build(x: Tensor, threads: int) -> Call:
        return inference(quantized, channels_last(x))

    return Quantized(file.tell(), {int8(FUSED): build}, len(quantized_report(quantized).quantized))


def onnxruntime(model: nn.Module, calibration: Sequence[Tensor]) -> Quantized:
    """ONNX Runtime's static quantiser: nodes of QuantizeLinear and DequantizeLinear, uint8 activations, int8 weights
    with a scale for each channel, ranges by minimum and maximum; what it documents for processors with VNNI."""
    require("onnxruntime", "onnx")
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]  # an optional peer
    from onnxruntime import quantization  # pyright: ignore[reportMissingImports]
    from onnxruntime.quantization import shape_inference  # pyright: ignore[reportMissingImports]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = one_by_one(calibration)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.images, None)
            return None if x is None else {"x": x.numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        exported, prepared, written = (str(Path(folder) / f"{name}.onnx") for name in ("float", "prepared", "int8"))
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        example = next(one_by_one(calibration))
        torch.onnx.export(
            *(copy.deepcopy(model), (example,), exported),
            opset_version=17,
            dynamo=False,
            input_names=["x"],
            dynamic_axes=axes,
        )
        shape_inference.quant_pre_process(exported, prepared)
        quantization.quantize_static(
            *(prepared, written, Reader()),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        content = Path(written).read_bytes()

    def build(x: Tensor, threads: int) -> Call:
        options = onnx_options(threads)
        for axis, name in axes["x"].items():
            options.add_free_dimension_override_by_name(name, x.shape[axis])
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        inputs = {"x": x.contiguous().numpy()}
        return lambda: session.run(None, inputs)[0]

    return Quantized(len(content), {int8(ONNX_RUNTIME): build})


def openvino(model: nn.Module, calibration: Sequence[Tensor]) -> Quantized:
    """NNCF's post-training quantisation of the model that OpenVINO made of the torch module.

    Not by way of ONNX: depthwise layers then stay in float. What is left in float runs in float32, or rounded to
    bfloat16 on processors that compute so: the second engine.
    """
    require("openvino", "nncf")
    import nncf  # pyright: ignore[reportMissingImports]  # an optional peer
    import openvino as ov  # pyright: ignore[reportMissingImports]

    with _quiet():
        nncf.set_log_level(logging.ERROR)
        images = list(one_by_one(calibration))
        shape = [-1, images[0].shape[1], -1, -1]
        converted = ov.convert_model(copy.deepcopy(model), example_input=images[0], input=[shape])
        dataset = nncf.Dataset(images, lambda x: x.numpy())
        quantized = nncf.quantize(converted, dataset, subset_size=min(300, len(images)))
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(quantized, str(Path(folder) / "int8.xml"))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())

    def builder(precision: str) -> Callable[[Tensor, int], Call]:
        def build(x: Tensor, threads: int) -> Call:
            reshaped = quantized.clone()
            reshaped.reshape(list(x.shape))
            compiled = ov.Core().compile_model(reshaped, "CPU", openvino_options(threads, precision))
            return infer_openvino(compiled, x)

        return build

    name = int8(OPENVINO)
    return Quantized(size, {name: builder("f32"), bfloat16(name): builder("bf16")})


QUANTIZERS: dict[str, Callable[[nn.Module, Sequence[Tensor]], Quantized]] = {
    ONNX_RUNTIME: onnxruntime,
    OPENVINO: openvino,
    FUSED: fused,
}
"""Each gets a model in eval and float32, and batches [N, 3, H, W]; raises EngineMissing where it is not installed."""


def one_by_one(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of all batches, each as [1, C, H, W], contiguous."""
    for batch in batches:
        yield from batch.contiguous().split(1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Quantisers warn and draw bars as they like."""
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
