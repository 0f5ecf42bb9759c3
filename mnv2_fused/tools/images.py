"""Images as networks take them: files, resized, cropped and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageError(ValueError):
    """An image cannot be read, or not be used; the message says which and why."""


@dataclass(frozen=True)
class Preprocessing:
    """How a network takes images, as in its training; the defaults are torchvision's."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of red, green and blue in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def resize(self, image: Image, size: list[int]) -> Tensor:
        """An image of PIL's, whatever its annotation; ``size`` is that of the shorter side, or [H, W]."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as T

        # torchvision's functions are annotated for tensors, and take images and give images, too.
        return T.resize(cast(Tensor, image), size, InterpolationMode(self.interpolation))

    def to_input(self, image: Image | Tensor) -> Tensor:
        """[1, 3, H, W], normalised; ``image`` is PIL's, whatever its annotation."""
        from torchvision.transforms import functional as T

        return T.normalize(T.to_tensor(cast("Image", image)), list(self.mean), list(self.std))[None]


def read_image(path: str | Path) -> Image:
    """In RGB. Raises ImageError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Of broken files Pillow's readers raise all of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {path}: {error}") from error


def image_files(folder: Path) -> list[Path]:
    """Files in it and in its folders whose names end as images' do, in the order of their paths."""
    from PIL import Image

    known = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())


def squares(images: Sequence[Image], count: int, side: int, taken: Preprocessing, seed: int = 0) -> Tensor:
    """[count, 3, side, side]: of each image in turn a square of at least half its shorter side, drawn at random."""
    drawn = torch.Generator().manual_seed(seed)

    def below(most: int) -> int:
        return int(torch.randint(most, (), generator=drawn))

    found = []
    for i in range(count):
        image = images[i % len(images)]
        shorter = min(image.size)
        size = shorter // 2 + below(shorter - shorter // 2 + 1)
        left, top = below(image.width - size + 1), below(image.height - size + 1)
        cut = image.crop((left, top, left + size, top + size))
        found.append(taken.to_input(taken.resize(cut, [side, side])))
    return torch.cat(found)
