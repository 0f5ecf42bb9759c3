"""``quantize`` a model's inverted residuals and what lies in a row with them; ``quantized_like`` without images."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.find import NOT_FOUND, check_model
from ..convert.swap import fuse
from ..sequence.frozen import is_frozen
from .calibrate import Calibration
from .modules import is_quantized
from .reports import ATTRIBUTE, QuantizedLayerReport, QuantizedReport
from .structure import Structure, build, what_of
from .torch_quantized import is_torch_quantized


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    skip: Collection[str] = (),
    rows: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A copy of ``model`` in eval whose inverted residuals, and layers in a row with them, run on 8-bit integers.

    ``model``: any that :func:`mnv2_fused.fuse` takes, fused or not, in float32 on the CPU; it stays as it is.
    ``calibration``: batches [N, C, H, W], float32, prepared as the model takes them, or pairs of such a batch and
    labels, which are ignored; or one tensor of all images. 100 to 300 images that look like later ones are enough;
    each batch is read once. ``skip``: names of modules, as ``model.named_modules()`` has them, in which nothing is
    quantised. ``rows``: whether layers in a row become one module without children to index, as
    ``fuse(model, frozen=True)`` makes them; without rows each block is quantised by itself, for models that call the
    children of a Sequential one by one. ``seed`` draws the images that biases are corrected on.

    The copy takes float32 and returns float32; inside rows of layers integers alone are passed on. Weights are int8,
    one scale for each output channel; x is uint8, one scale for each tensor. What no layer on integers computes stays
    float: :func:`quantized_report` says why, and how far from float each layer is. Its ``state_dict`` loads into
    :func:`quantized_like` of the same model. It neither trains nor moves to a GPU.

    Raises TypeError for what is no module, or for a calibration of other things than float32 tensors; ValueError for a
    frozen or quantised model, one in another dtype or on a GPU, nothing to quantise, no images, images with NaN or
    infinite values, a shape that the model does not run on, a name in ``skip`` of no module, and a block that the
    images do not reach.
    """
    _check_calibration(calibration)
    with torch.inference_mode(False), torch.no_grad():
        structure = _structure(model, skip, rows)
        calibrated = Calibration(structure, seed)
        for i, images in enumerate(_batches(calibration)):
            _check_images(images, i)
            try:
                calibrated.observe(images)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"the model does not run on calibration batch {i}, {list(images.shape)}: {error}"
                ) from error
        if calibrated.kept.count == 0:
            raise ValueError("calibration holds no images; give 100 to 300, and a new iterator for each call")
        errors, expected, given = calibrated.finish()
    floats = _report(structure)
    measured = tuple(
        dataclasses.replace(row, sqnr=found.sqnr, error=found.error)
        for row, found in zip(floats.quantized, errors, strict=True)
    )
    report = QuantizedReport((*measured, *floats.unquantized))
    report = report.with_results(len(calibrated.kept.images), expected, given)
    vars(structure.model)[ATTRIBUTE] = report
    return structure.model


def quantized_like(model: nn.Module, *, skip: Collection[str] = (), rows: bool = True) -> nn.Module:
    """What :func:`quantize` makes of ``model``, without values: load a ``state_dict`` of such a model into it.

    ``skip`` and ``rows`` as :func:`quantize` was given them. Its forward raises RuntimeError until then. Raises as
    :func:`quantize` does for a model or for ``skip``.
    """
    with torch.inference_mode(False), torch.no_grad():
        structure = _structure(model, skip, rows)
    vars(structure.model)[ATTRIBUTE] = _report(structure)
    return structure.model


def _structure(model: nn.Module, skip: Collection[str], rows: bool) -> Structure:
    check_model(model)
    if isinstance(skip, str):
        raise TypeError(f"skip must be a collection of names, got {skip!r}; give ({skip!r},)")
    if any(map(is_frozen, model.modules())):
        raise ValueError("a frozen model has let its modules go; quantize the original model")
    if any(map(is_quantized, model.modules())):
        raise ValueError("the model is quantised already; quantize the original model")
    if is_torch_quantized(model):
        raise ValueError(
            "torch quantised the model: mnv2_fused.quantized_from(model) reads it; or quantize the original"
        )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and t.dtype != torch.float32:
            raise ValueError(f"quantize takes models in float32, got {name} in {t.dtype}; call model.float() first")
        if not t.is_cpu:
            raise ValueError(f"quantize takes models on the CPU, got {name} on {t.device}; call model.cpu() first")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fused = fuse(model)
    nothing = "fuse() fused nothing: "
    reasons = [str(w.message).removeprefix(nothing) for w in said if str(w.message).startswith(nothing)]
    fused.eval().requires_grad_(False)
    structure = build(fused, skip, rows)
    if not structure.units:
        reasons += [f"{row.name or 'model'}: {row.reason}" for row in structure.unquantized]
        raise ValueError(f"there is nothing to quantise: {'; '.join(reasons) or NOT_FOUND}")
    return structure


def _report(structure: Structure) -> QuantizedReport:
    rows = [QuantizedLayerReport(u.name, what_of(u.source), True) for u in structure.units]
    rows += [QuantizedLayerReport(u.name, u.what, False, u.reason) for u in structure.unquantized]
    return QuantizedReport(tuple(rows))


_WAY_OUT = "give batches [N, C, H, W], or pairs of a batch and its labels"


def _check_calibration(calibration: Any) -> None:
    if isinstance(calibration, (str, bytes, dict)) or not hasattr(calibration, "__iter__"):
        raise TypeError(f"calibration must be an iterable of batches, got a {type(calibration).__name__}; {_WAY_OUT}")
    if isinstance(calibration, Tensor) and calibration.dim() != 4:
        raise ValueError(f"calibration must be [N, C, H, W], got {list(calibration.shape)}; {_WAY_OUT}")


def _batches(calibration: Any) -> Iterator[Any]:
    """Images of each batch, with a bar on stderr where tqdm is there."""
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        batches = tqdm(batches, desc="calibration", unit="batch", leave=False, disable=None)
    for batch in batches:
        yield batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _check_images(images: Any, i: int) -> None:
    where = f"calibration batch {i}"
    if not isinstance(images, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got a {type(images).__name__}; {_WAY_OUT}")
    if images.dim() != 4:
        raise ValueError(f"{where} must be [N, C, H, W], got {list(images.shape)}; {_WAY_OUT}")
    if images.dtype is not torch.float32:
        raise TypeError(f"{where} must be float32, got {images.dtype}; prepare images as the model takes them")
    if not images.is_cpu:
        raise ValueError(f"{where} must be on the CPU, got {images.device}; move it with .cpu()")
    bad = int((~images.isfinite()).sum())
    if bad:
        raise ValueError(f"{where} has {bad} values that are NaN or infinite; leave such images out")
