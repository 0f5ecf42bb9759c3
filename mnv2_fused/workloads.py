"""MobileNetV2's blocks as workloads of tests, benchmarks and the command line."""

from __future__ import annotations

from .spec import BlockSpec

# (expand ratio, output channels, repeats, first stride): table 2 of the MobileNetV2 paper, 17 blocks.
MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2_blocks(resolution: int | tuple[int, int] = 224) -> list[tuple[BlockSpec, tuple[int, int]]]:
    """(spec, input height and width) of MobileNetV2 1.0's 17 blocks for an image of ``resolution``."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution

    def halved(size: int) -> int:
        return (size - 1) // 2 + 1

    height, width = halved(height), halved(width)  # the stem
    blocks, channels = [], 32
    for ratio, out_channels, repeats, first_stride in MOBILENET_V2_STAGES:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            residual = stride == 1 and channels == out_channels
            spec = BlockSpec(channels, channels * ratio, out_channels, stride, expand=ratio != 1, residual=residual)
            blocks.append((spec, (height, width)))
            if stride == 2:
                height, width = halved(height), halved(width)
            channels = out_channels
    return blocks
