"""Blocks on the emulated CUDA kernel, held to torch's own ops; for the tests of the kernel and of its mutations."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mnv2_fused import BlockSpec, cuda_plan, fold, inverted_residual_reference, pack
from mnv2_fused.activations import function_of
from mnv2_fused.spec import stem_size
from mnv2_fused.testing import agreement, random_weights

from .emulation import compiled_kernel, emulated_inverted_residual, loaded

# Of each precision the name in csrc/cuda/precision.h, and the dtype of activations.
PRECISIONS = {
    "float16": ("kHalf", torch.float16),
    "bfloat16": ("kBFloat16", torch.bfloat16),
    "float32": ("kFloat32", torch.float32),
    "tf32": ("kTf32", torch.float32),
}

# Small blocks that show what a kernel can get wrong.
PADDED = BlockSpec(20, 40, 20, residual=True)  # channels that fill no panel
WIDE = BlockSpec(16, 48, 24)  # results in whole vectors
STRIDED = BlockSpec(20, 40, 20, stride=2)
UNEXPANDED = BlockSpec(24, 24, 20, expand=False)
OUT_BLOCKS = BlockSpec(8, 16, 180)
UNEVEN = BlockSpec(20, 40, 24, activation="relu", padding=(2, 0, 1, 0), out_activation="relu")
DILATED = BlockSpec(20, 40, 20, dilation=2, activation="silu")
LEAKY = BlockSpec(20, 40, 20, activation="leaky_relu", negative_slope=0.2)
SUMMED = BlockSpec(
    *(20, 40, 20),
    residual=True,
    activation="relu",
    expand_activation="silu",
    out_activation="hardswish",
    activates_sum=True,
)
GELU, GELU_TANH = (BlockSpec(20, 40, 20, activation=name) for name in ("gelu", "gelu_tanh"))
FIVE = BlockSpec(20, 40, 24, kernel=5, activation="hardswish")
SQUEEZED = BlockSpec(20, 72, 20, residual=True, activation="hardswish", squeeze_channels=6)
STEMMED = BlockSpec(20, 20, 24, expand=False)


def compiled_kernels(folder: Path) -> dict:
    """A library for each precision."""
    names = [name for name, _ in PRECISIONS.values()]
    started = [compiled_kernel(folder / f"{name}.so", name) for name in names]
    return dict(zip(PRECISIONS, map(loaded, started), strict=True))


def input_of(spec, batch, size, precision, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, spec.in_channels, *size, generator=generator, dtype=torch.float64)
    return x.to(PRECISIONS[precision][1]).contiguous(memory_format=torch.channels_last)


def tf32(t):
    """The nearest numbers with 10 bits of mantissa, ties away from zero, as the kernel rounds operands."""
    bits = t.float().view(torch.int32)
    return torch.where(t.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), t.float())


class Stem(NamedTuple):
    """A network's stem, in front of a block without an expansion."""

    weight: torch.Tensor  # [E, C, 3, 3]
    bias: torch.Tensor  # [E]
    activation: str = "relu6"
    negative_slope: float = 0.01

    def __call__(self, x, precision=None):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if precision == "tf32":
            x, weight = tf32(x), tf32(weight)
        return function_of(self.activation, self.negative_slope)(F.conv2d(x, weight, bias, 2, 1))


def eager(x, weights, spec, precision, stem=None):
    """torch's own ops in this precision. CPUs lack TF32: it is float32 with a product's operands rounded."""
    if stem is not None:
        x = stem(x, precision)
    if precision != "tf32":
        return inverted_residual_reference(x, weights, **spec.geometry)
    w = weights._make(None if t is None else t.float() for t in weights)
    expand_act, act, out_act, squeeze_act, gate = (
        function_of(name, spec.negative_slope)
        for name in (spec.expanded_by, spec.activation, spec.out_activation, spec.squeeze_activation, spec.gate)
    )
    e = expand_act(F.conv2d(tf32(x), tf32(w.w_expand), w.b_expand)) if spec.expand else x
    e = F.pad(e, spec.padding_of(*x.shape[2:]))
    d = act(F.conv2d(e, w.w_depthwise, w.b_depthwise, spec.stride, 0, spec.dilation, spec.hidden_channels))
    if spec.squeeze_channels:
        squeezed = squeeze_act(F.conv2d(d.mean((2, 3), keepdim=True), w.w_squeeze, w.b_squeeze))
        d = d * gate(F.conv2d(squeezed, w.w_excite, w.b_excite))
    y = F.conv2d(tf32(d), tf32(w.w_project), w.b_project)
    if spec.activates_sum:
        return out_act(y + x)
    return out_act(y) + x if spec.residual else out_act(y)


def planned(spec, x, precision, stem=None, **forced):
    """The planner's own choice, or one with some values forced and the rest small."""
    options = {"dtype": x.dtype, "tf32": precision == "tf32", "stem": stem and stem.activation}
    size = x.shape[2:] if stem is None else [stem_size(n) for n in x.shape[2:]]
    if not forced:
        return cuda_plan(spec, x.shape, **options)
    small = {"images": 1, "tile_rows": 4, "tile_cols": 4, "strip_rows": 2, "group": 16, "splits": 1} | forced
    out = [-(-out // spec.dilation) for out in spec.out_size(*size)]
    images = 1 if spec.squeeze_channels else x.shape[0]
    limits = {"images": images, "tile_rows": out[0], "tile_cols": out[1]}
    return cuda_plan(spec, x.shape, **options, forced=[min(v, limits.get(k, v)) for k, v in small.items()])


def emulated(kernels, x, weights, spec, precision, *, seed=0, stem=None, **forced):
    packed = pack(weights, x.dtype, "cuda")
    if stem is not None:
        w_expand, b_expand = fold.pack_stem(stem.weight, stem.bias, x.dtype)
        packed = packed._replace(w_expand=w_expand, b_expand=b_expand)
    plan = planned(spec, x, precision, stem, **forced)
    return emulated_inverted_residual(kernels[precision], x, packed, spec, plan, seed, stem and stem.activation)


def verdict(y, x, weights, spec, precision, stem=None):
    e = x.double() if stem is None else stem(x.double())
    reference = inverted_residual_reference(e, weights, **spec.geometry)
    return agreement(y, eager(x, weights, spec, precision, stem), reference)


def check(kernels, x, weights, spec, precision, stem=None, **options):
    """Holds the kernel to the rule; returns the result."""
    before = x.clone()
    y = emulated(kernels, x, weights, spec, precision, stem=stem, **options)
    found = verdict(y, x, weights, spec, precision, stem)
    assert found.ok, f"{spec} on {list(x.shape)}, {precision}, {options}: {found}"
    assert torch.equal(x, before), "x was written"
    return y


@contextmanager
def without_onednn():
    """Its bfloat16 convolution, dilated, makes more NaNs than there are, where the processor has products of it."""
    before, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)


def spreads(kernels, x, weights, spec, precision, stem=None, **forced):
    """Whether NaN and infinities are where eager has them."""
    y = emulated(kernels, x, weights, spec, precision, stem=stem, **forced)
    with without_onednn():
        expected = eager(x, weights, spec, precision, stem)
    return torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def stem_of(spec, channels, activation="relu6", seed=0, bias=1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.in_channels, channels, 3, 3, generator=generator) / 3
    return Stem(weight, bias * torch.randn(spec.in_channels, generator=generator), activation)


def image_of(batch, channels, size, precision, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator).to(PRECISIONS[precision][1])


def noticed(library, spec, precision, activation=None):
    """Whether anything is wrong: finite and infinite input, splits, tiles that do not fit, images of two blocks."""
    kernels, weights = {precision: library}, random_weights(spec, expand_bias=5)
    stem = activation and stem_of(spec, 3, activation)
    x = image_of(2, 3, (12, 13), precision) if stem else input_of(spec, 2, (6, 7), precision)
    infinite = x.clone()
    infinite[1, 0, 3, 3] = float("inf")
    for splits in (1, 2) if spec.hidden_channels > 16 else (1,):
        forced = {"tile_cols": 5, "splits": splits}
        try:
            y = emulated(kernels, x, weights, spec, precision, stem=stem, **forced)
            right = spreads(kernels, infinite, weights, spec, precision, stem, **forced)
            if stem:  # of two images a thread block
                whole = {"images": 2, "tile_rows": 6, "tile_cols": 7}
                right = right and check(kernels, x, weights, spec, precision, stem, **whole) is not None
        except (RuntimeError, AssertionError):
            return True
        if not (right and verdict(y, x, weights, spec, precision, stem).ok):
            return True
    return False
