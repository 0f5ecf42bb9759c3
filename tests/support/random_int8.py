"""Random layers on 8-bit integers, with sums and bounds as calibration leaves them or far from it."""

import torch

from mnv2_fused import BlockSpec
from mnv2_fused.encoding import LayerKind
from mnv2_fused.int8.layers import HIGHEST, Int8Layer, Quantizer, Squeeze, Stage


def random_stage(shape, generator, *, activation="identity", terms=None, wide=False, full=False):
    """``shape``: of the weight. ``wide``: weights, biases and multipliers at the ends of their ranges. ``full``: bounds
    are a uint8's own, which a conversion that saturates may stand for."""

    def integers(least, most, *size):
        return torch.randint(least, most + 1, size, generator=generator)

    channels = shape[0]
    terms = terms or torch.Size(shape[1:]).numel()
    weight = integers(-127, 127, *shape)
    if wide:
        weight = torch.where(integers(0, 1, *shape) > 0, 127, -127)
    bias = integers(-(2**30), 2**30, channels) if wide else integers(-3000, 3000, channels)
    spread = terms**0.5 * 74 * 148
    functions = activation != "identity"
    multiplier = (torch.rand(channels, generator=generator) + 0.5) * (4 if functions else 100) / spread
    if wide:
        multiplier = multiplier * 2.0 ** integers(-20, 3, channels)
    zero = int(integers(0, 120, 1)) if functions or activation == "identity" else 0
    low = torch.full((channels,), float(-zero))
    high = float(HIGHEST - zero) - (0 if full else 1) * integers(0, 60, channels).float()
    scale = (torch.rand(channels, generator=generator) + 0.5) * 30 if functions else None
    return Stage(weight.to(torch.int8), bias.to(torch.int32), multiplier, low, high, zero, activation, scale)


def random_block(
    spec: BlockSpec, seed=0, stem=0, wide=False, activation="identity", squeeze=0, gate="hardsigmoid", full=False
):
    """``stem``: channels of the image, of a stem in front. ``full``: of all stages, see ``random_stage``."""
    generator = torch.Generator().manual_seed(seed)
    e, k = spec.hidden_channels, spec.kernel
    options = {"activation": activation, "wide": wide, "full": full}
    expand = None
    if stem:
        expand = random_stage((e, stem, 3, 3), generator, **options)
    elif spec.expand:
        expand = random_stage((e, spec.in_channels), generator, **options)
    x_zero = int(torch.randint(0, 200, (1,), generator=generator))
    of_squeeze = None
    if squeeze:
        of_squeeze = Squeeze(
            torch.rand(e, generator=generator) + 0.5,
            30,
            random_stage((squeeze, e), generator),
            random_stage((e, squeeze), generator)._replace(multiplier=torch.rand(e, generator=generator) / 3000),
            gate,
            torch.rand(e, generator=generator) + 0.5,
        )
    kind = LayerKind.STEM_AND_BLOCK if stem else LayerKind.BLOCK if spec.expand else LayerKind.BLOCK_WITHOUT_EXPAND
    project = random_stage((spec.out_channels, e), generator, wide=wide, full=full)
    return Int8Layer(
        kind,
        Quantizer(0.02, x_zero),
        Quantizer(0.05, project.zero),
        project,
        spec,
        expand,
        random_stage((e, k, k), generator, **options),
        of_squeeze,
        residual_scale=0.7,
    )


def random_head(c_in, c_out, x, seed=0, pool=False, linear=False, activation="identity"):
    """A 1x1 convolution, pooled perhaps; or a linear layer whose result is float32."""
    generator = torch.Generator().manual_seed(seed)
    stage = random_stage((c_out, c_in), generator, activation=activation)
    kind = LayerKind.LINEAR if linear else LayerKind.POOLED if pool else LayerKind.POINTWISE
    y = None if linear else Quantizer(0.03, 5 if pool else stage.zero)
    pool_scale = torch.rand(c_out, generator=generator) + 0.2 if pool else None
    return Int8Layer(kind, x, y, stage, pool_scale=pool_scale)
