"""``python -m mnv2_fused quantize``: a model on 8-bit integers, calibrated on a folder of images."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..int8 import quantize, quantized_like, quantized_report
from ..testing import threads as torch_threads
from .images import ImageError, Preprocessing, image_files, read_image
from .named_models import load_weights, named_model, published_state, source_of

SUFFIXES = (".safetensors", ".pth", ".pt")
FEW = 100  # images: quantize's docstring asks for so many
RESIZE, CROP = 256, 224  # pixels: how ImageNet's images are prepared for networks of 224x224
_BATCH = 16 * 224 * 224  # pixels that are read at a time


@dataclass(frozen=True)
class Preparation:
    """What is done with each image; :class:`Preprocessing` has the rest."""

    resize: tuple[int, ...]  # of the shorter side, or (H, W)
    crop: tuple[int, int]  # (H, W) in the middle
    values: Preprocessing

    def __str__(self) -> str:
        mean, std = (",".join(f"{v:g}" for v in values) for values in (self.values.mean, self.values.std))
        resized = "x".join(map(str, self.resize))
        crop = "x".join(map(str, self.crop))
        return f"resize {resized} ({self.values.interpolation}), crop {crop}, mean {mean}, std {std}"

    def read(self, path: Path) -> Tensor:
        """[1, 3, H, W]. Raises ImageError."""
        from torchvision.transforms import functional as T

        try:
            image = read_image(path)
        except ImageError as error:
            raise ImageError(f"{error}; take the file out of the folder") from error
        resized: Any = self.values.resize(image, list(self.resize))
        height, width = self.crop
        if resized.height < height or resized.width < width:
            raise ImageError(
                f"--crop {height}x{width} does not fit into {path}, {image.height}x{image.width}, which --resize "
                f"{'x'.join(map(str, self.resize))} makes {resized.height}x{resized.width}; give a smaller --crop or a "
                "larger --resize"
            )
        return self.values.to_input(T.center_crop(resized, [height, width]))


def preparation_of(
    model: nn.Module,
    resize: tuple[int, ...] | None,
    crop: tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    interpolation: str | None,
) -> Preparation:
    """What was asked for; for the rest what timm notes of its models, or else ImageNet's usual preparation."""
    usual, side, part = Preprocessing(), CROP, CROP / RESIZE
    noted = getattr(model, "pretrained_cfg", None)
    if isinstance(noted, dict) and "input_size" in noted:
        values = (tuple(noted.get(key, getattr(usual, key))) for key in ("mean", "std"))
        usual = Preprocessing(*values, interpolation=noted.get("interpolation", usual.interpolation))
        side, part = noted["input_size"][-1], noted.get("crop_pct", part)
    crop = crop or (side, side)
    # A crop alone is taken out of an image that is larger as usual.
    resize = resize or (math.floor(min(crop) / part),)
    return Preparation(
        resize, crop, Preprocessing(mean or usual.mean, std or usual.std, interpolation or usual.interpolation)
    )


@dataclass(frozen=True)
class Batches:
    """The files' images, read as they are asked for: [N, 3, H, W] each."""

    files: Sequence[Path]
    preparation: Preparation

    @property
    def size(self) -> int:
        return max(1, _BATCH // math.prod(self.preparation.crop))

    def __len__(self) -> int:
        return -(-len(self.files) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(0, len(self.files), self.size):
            yield torch.cat([self.preparation.read(path) for path in self.files[i : i + self.size]])


def _check_output(output: Path) -> None:
    if output.suffix not in SUFFIXES:
        raise ValueError(
            f"--output must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {str(output)!r}; "
            "safetensors holds tensors alone and any framework reads it, the others are torch.save's"
        )
    if output.suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise RuntimeError(f"--output {output} needs safetensors: pip install safetensors, or give a name with .pth")
    if not output.parent.is_dir():
        raise ValueError(f"the folder of --output {output} does not exist; create it first")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file in it")


def _choose(folder: Path, limit: int, seed: int) -> tuple[list[Path], int]:
    """At most so many of the folder's images, drawn at random, and how many there are."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"--images {folder} {what}; give a folder of images, in folders of its own or not")
    found = image_files(folder)
    if not found:
        raise ValueError(
            f"--images {folder} holds no image that Pillow reads by its suffix, such as .jpg or .png; give a folder "
            f"of {FEW} to 300 images like later ones"
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:limit]
    return [found[i] for i in order.tolist()], len(found)


def _save(state: dict[str, Tensor], output: Path) -> None:
    try:
        if output.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: t.contiguous() for name, t in state.items()}, output)
        else:
            torch.save(state, output)
    except OSError as error:
        raise RuntimeError(f"cannot write --output {output}: {error}") from error


def _bytes_of(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def _same(y: Any, expected: Any) -> bool:
    leaves = zip(_pytree.tree_leaves(y), _pytree.tree_leaves(expected), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in leaves)


def run(
    name: str,
    *,
    weights: str | None,
    images: Path,
    output: Path,
    resize: tuple[int, ...] | None = None,
    crop: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
    limit: int = 256,
    seed: int = 0,
    skip: Collection[str] = (),
    rows: bool = True,
    threads: int | None = None,
) -> int:
    """Quantises, writes a state_dict, loads it again, and prints what became of each layer; returns the exit code.

    ``weights``: a file, "random", or None for published ones. Raises ValueError or RuntimeError.
    """
    for package in ("torchvision", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"reading images needs {package}: pip install 'mnv2_fused[demo]'")
    _check_output(output)
    files, count = _choose(images, limit, seed)
    torch.manual_seed(seed)
    model = named_model(name)
    if weights == "random":
        what = "random weights, whose results mean nothing"
    elif weights is None:
        state, what = published_state(name)
        model.load_state_dict(state)
    else:
        load_weights(model, weights, f"give a state_dict of {name}, as torch.save(model.state_dict(), FILE) writes it")
        what = f"weights of {Path(weights).name}"
    model.eval()
    preparation = preparation_of(model, resize, crop, mean, std, interpolation)
    print(f"{name}, {what}\n{len(files)} of {count} images of {images}: {preparation}", flush=True)
    if len(files) < FEW:
        print(f"these are few: {FEW} to 300 images that look like later ones give better ranges")
    with torch_threads(threads or torch.get_num_threads()):
        batches = Batches(files, preparation)
        quantized = quantize(model, batches, skip=tuple(skip), rows=rows, seed=seed)
        print(f"\n{quantized_report(quantized)}\n")
        _save(quantized.state_dict(), output)
        again = quantized_like(named_model(name), skip=tuple(skip), rows=rows)
        load_weights(again, str(output), "this is an error of mnv2_fused")
        x = preparation.read(files[0])
        with torch.inference_mode():
            if not _same(again(x), quantized(x)):
                raise RuntimeError(f"{output} does not give what was quantised; this is an error of mnv2_fused")
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB; in float32 {_bytes_of(model) / 1e6:.2f} MB. To load it:\n")
    print(_loading(name, output, tuple(skip), rows))
    return 0


def _loading(name: str, output: Path, skip: tuple[str, ...], rows: bool) -> str:
    """Python that loads what was written."""
    library, model = source_of(name)
    options = (f", skip={skip!r}" if skip else "") + ("" if rows else ", rows=False")
    if output.suffix == ".safetensors":
        load, state = "safetensors.torch", f"safetensors.torch.load_file({str(output)!r})"
    else:
        load, state = "torch", f"torch.load({str(output)!r}, weights_only=True)"
    return (
        f"import {', '.join(sorted({'mnv2_fused', library, load}))}\n\n"
        f"model = mnv2_fused.quantized_like({model}{options})\n"
        f"model.load_state_dict({state})"
    )
