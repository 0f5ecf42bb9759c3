"""Inputs of a block: random images, in every dtype, size and memory order that a user can give."""

import pytest
import torch
import torch.nn.functional as F

MEMORY_FORMATS = [torch.channels_last, torch.contiguous_format]
CPU_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GPU_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_memory_format = pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["channels_last", "nchw"])
by_cpu_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=["float32", "float64", "float16", "bfloat16"])
by_gpu_dtype = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=["float32", "float16", "bfloat16"])

# Heights and widths below, at and beyond what a tile holds.
SIZES = [(1, 1), (1, 13), (13, 1), (2, 2), (1, 2), (2, 1), (3, 3), (5, 31), (17, 4)]


def image(*shape, dtype=torch.float32, seed=1):
    """Random numbers of mean 0 and variance 1, the same ones in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channels_last(*shape, dtype=torch.float32):
    return image(*shape, dtype=dtype).to(memory_format=torch.channels_last)


def random_input(spec, batch, size, *, dtype=torch.float32, memory_format=torch.channels_last, seed=1):
    """An input [batch, C_in, *size] of the block ``spec``."""
    return image(batch, spec.in_channels, *size, dtype=dtype, seed=seed).contiguous(memory_format=memory_format)


# Views of 8 channels, by what is odd about their strides.
VIEWS = {
    "offset": lambda: image(8 * 81 + 3)[3:].view(1, 9, 9, 8).permute(0, 3, 1, 2),
    "cropped": lambda: channels_last(2, 8, 20, 20)[:, :, 3:12, 5:16],
    "cropped nchw": lambda: image(2, 8, 20, 20)[:, :, 3:12, 5:16],
    "channel slice": lambda: channels_last(2, 30, 9, 9)[:, 7:15],
    "channel slice nchw": lambda: image(2, 30, 9, 9)[:, 7:15],
    "every second channel": lambda: channels_last(2, 16, 9, 9)[:, ::2],
    "every second pixel": lambda: channels_last(2, 8, 19, 17)[:, :, ::2, ::3],
    "every second image": lambda: channels_last(5, 8, 9, 9)[::2],
    "batch expanded": lambda: channels_last(1, 8, 9, 9).expand(3, 8, 9, 9),
    "rows expanded": lambda: channels_last(2, 8, 1, 9).expand(2, 8, 9, 9),
    "columns expanded": lambda: channels_last(2, 8, 9, 1).expand(2, 8, 9, 9),
    "channels expanded": lambda: image(2, 1, 9, 9).expand(2, 8, 9, 9),
    "one value": lambda: torch.tensor(0.7).expand(2, 8, 9, 9),
    "transposed": lambda: channels_last(2, 8, 7, 9).transpose(2, 3),
    "permuted": lambda: image(9, 2, 8, 7).permute(1, 2, 0, 3),
    "batch innermost": lambda: image(8, 9, 9, 2).permute(3, 0, 1, 2),
    "overlapping windows": lambda: image(4000).as_strided((2, 8, 9, 9), (30, 1, 24, 3)),
    "negated lazily": lambda: torch.imag(torch.randn(2, 8, 9, 9, dtype=torch.complex64).conj()),
}


def layouts(n, c, h, w, dtype=torch.float32):
    """[n, c, h, w] in memory orders, cuts and expansions that a model or a user can produce, each with its name."""
    dense = torch.randn(n, c, h, w, dtype=dtype, generator=torch.Generator().manual_seed(0))
    last = torch.channels_last
    yield "nchw", dense
    yield "channels_last", dense.contiguous(memory_format=last)
    yield "cropped", F.pad(dense, (1, 2, 3, 1)).contiguous(memory_format=last)[:, :, 3 : 3 + h, 1 : 1 + w]
    yield "cropped nchw", F.pad(dense, (1, 2, 3, 1))[:, :, 3 : 3 + h, 1 : 1 + w]
    yield "channel slice", torch.cat([dense, dense], 1).contiguous(memory_format=last)[:, :c]
    yield "channel slice nchw", torch.cat([dense, dense], 1)[:, :c]
    yield "permuted", dense.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    yield "transposed", dense.mT.contiguous(memory_format=last).mT
    yield "expanded rows", dense[:, :, :1].expand(n, c, h, w)
    yield "expanded batch", dense[:1].contiguous(memory_format=last).expand(n, c, h, w)
    yield "expanded channels", dense[:, :1].expand(n, c, h, w)
    yield "sliced batch", dense.repeat(2, 1, 1, 1).contiguous(memory_format=last)[::2]
