"""What runs MobileNetV2 on a CPU: PyTorch's own ways, ONNX Runtime, OpenVINO and this project, each as its users set
it up."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import fuse

Call = Callable[[], Any]

FUSED, FROZEN, CHANNELS_LAST = "fused", "fused frozen", "eager channels_last"


class EngineMissing(Exception):
    """An engine is not installed, or has no kernels for a dtype; the message says which."""


def require(*packages: str) -> None:
    """Raises EngineMissing, which says how to get them."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise EngineMissing(f"{package} is not installed: pip install 'mnv2_fused[peers]'")


def channels_last(t: Any) -> Any:
    """A tensor, or a model, in that memory format."""
    return t.to(memory_format=torch.channels_last)


def inference(model: nn.Module, x: Tensor) -> Call:
    """The model as torch runs it where no gradients are asked for."""

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


def eager(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    """The model as it is, in the contiguous layout."""
    return inference(copy.deepcopy(model).to(dtype), x.to(dtype))


def eager_channels_last(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    """The model as it is, weights and input in channels_last."""
    return inference(channels_last(copy.deepcopy(model).to(dtype)), channels_last(x.to(dtype)))


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    """``torch.compile`` for inference: weights frozen into the graph, folded, packed by oneDNN."""
    from torch._inductor import config

    x = channels_last(x.to(dtype))
    with config.patch(freezing=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.compile(channels_last(copy.deepcopy(model).to(dtype)))
        module(x)

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call


def onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    """ONNX Runtime with all graph optimisations, its threads in one pool of this size."""
    if dtype != torch.float32:
        raise EngineMissing(f"ONNX Runtime has no CPU kernels for {dtype}")
    require("onnxruntime", "onnx")
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]  # an optional peer

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = str(Path(folder) / "model.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(copy.deepcopy(model), (x,), path, opset_version=17, dynamo=False)
        session = ort.InferenceSession(path, onnx_options(threads), providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)[0]


def onnx_options(threads: int) -> Any:
    """Of an ONNX Runtime session: all graph optimisations, its threads in one pool."""
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]  # an optional peer

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options


def openvino(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    """OpenVINO compiled for this input's shape and for latency, in one stream of so many threads."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    if precision is None:
        raise EngineMissing(f"OpenVINO runs float32 and bfloat16 here, not {dtype}")
    require("openvino")
    logging.getLogger("openvino").setLevel(logging.ERROR)
    import openvino as ov  # pyright: ignore[reportMissingImports]  # an optional peer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(copy.deepcopy(model), example_input=x, input=[list(x.shape)])
    compiled = ov.Core().compile_model(converted, "CPU", openvino_options(threads, precision))
    return infer_openvino(compiled, x)


def openvino_options(threads: int, precision: str) -> dict[str, Any]:
    """Of a compiled model: for latency, in one stream; ``precision``, f32 or bf16, of what runs on floats."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }


def infer_openvino(compiled: Any, x: Tensor) -> Call:
    """A call of a compiled model that copies neither images nor result."""
    import openvino as ov  # pyright: ignore[reportMissingImports]  # an optional peer

    request, pixels = compiled.create_infer_request(), ov.Tensor(x.contiguous().numpy(), shared_memory=True)
    return lambda: request.infer([pixels], share_inputs=True, share_outputs=True)[0]


def fused(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int, backend: str = "auto") -> Call:
    """``mnv2_fused.fuse(model)``."""
    return inference(fuse(copy.deepcopy(model).to(dtype), backend=backend), channels_last(x.to(dtype)))


def fused_frozen(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    """``mnv2_fused.fuse(model, frozen=True)``."""
    return inference(fuse(copy.deepcopy(model).to(dtype), frozen=True), channels_last(x.to(dtype)))


ENGINES: dict[str, Callable[[nn.Module, Tensor, torch.dtype, int], Call]] = {
    "eager": eager,
    CHANNELS_LAST: eager_channels_last,
    "torch.compile": compiled,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    FUSED: fused,
    FROZEN: fused_frozen,
}
PEERS = ("ONNX Runtime", "OpenVINO")


def as_tensor(result: Any) -> Tensor:
    """An engine's result as a float32 tensor."""
    return torch.as_tensor(result).float()
