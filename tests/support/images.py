"""Image files with some structure."""

import pytest
import torch


def make_photo(path, size=(96, 128), seed=0):
    """A small image of that height and width, in the format that the name's suffix says; returns the path."""
    image = pytest.importorskip("PIL.Image")
    pixels = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic").clamp(0, 1)
    image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return path
