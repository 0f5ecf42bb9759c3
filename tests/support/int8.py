"""Small quantised models, images as smooth as photographs, and blocks of any options as ordinary modules."""

import dataclasses
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from mnv2_fused import quantize
from mnv2_fused.activations import function_of
from mnv2_fused.int8.reports import sqnr as sqnr  # for tests
from mnv2_fused.testing import random_weights

from .models import fitted


def smooth(batch, channels, size, seed=0):
    """Images [batch, channels, size, size] whose neighbouring pixels are alike."""
    drawn = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, size // 4, size // 4, generator=drawn)
    return F.interpolate(coarse, (size, size), mode="bicubic")


@cache
def calibration():
    """Batches of different sizes."""
    return [smooth(3, 3, 64), smooth(8, 3, 64, seed=1), smooth(5, 3, 64, seed=2)]


@cache
def quantized():
    """The small MobileNetV2 of :func:`support.models.fitted`, quantised."""
    return quantize(fitted(), calibration())


class Block(nn.Module):
    """A block of any options as ordinary modules and functions, without norms: of a class that nothing knows."""

    def __init__(self, spec):
        super().__init__()
        w = random_weights(spec, dtype=torch.float32)
        self.wanted = spec
        self.told = dataclasses.astuple(spec)  # what is known of blocks is kept by such attributes alone
        self.expand = None if w.w_expand is None else _conv(w.w_expand, w.b_expand)
        around = 0 if spec.padding == "same" else (spec.extent - 1) // 2
        options = {"stride": spec.stride, "padding": around, "dilation": spec.dilation, "groups": spec.hidden_channels}
        self.depthwise = _conv(w.w_depthwise, w.b_depthwise, **options)
        self.reduce = None if w.w_squeeze is None else _conv(w.w_squeeze, w.b_squeeze)
        self.excite = None if w.w_excite is None else _conv(w.w_excite, w.b_excite)
        self.project = _conv(w.w_project, w.b_project)
        self.eval().requires_grad_(False)

    def forward(self, x):
        spec, d = self.wanted, x
        if self.expand is not None:
            d = function_of(spec.expanded_by, spec.negative_slope)(self.expand(d))
        if spec.padding == "same":
            d = F.pad(d, spec.padding_of(*d.shape[2:]))
        d = function_of(spec.activation, spec.negative_slope)(self.depthwise(d))
        if self.reduce is not None:
            m = function_of(spec.squeeze_activation)(self.reduce(d.mean((2, 3), keepdim=True)))
            d = d * function_of(spec.gate)(self.excite(m))
        y, out = self.project(d), function_of(spec.out_activation)
        if spec.activates_sum:
            return out(y + x)
        return out(y) + x if spec.residual else out(y)


def _conv(weight, bias, **options):
    """``weight`` [C_out, C_in / groups, k, k]."""
    conv = nn.Conv2d(weight.shape[1] * options.get("groups", 1), *weight.shape[::2], **options)
    conv.weight.data, conv.bias.data = weight, bias
    return conv
