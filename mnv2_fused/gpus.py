"""GPUs as the planners of the CUDA and the Triton kernel see them: limits, and rates a second."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What the planners know of a GPU."""

    name: str
    capability: int  # 90 for compute capability 9.0
    processors: int  # streaming multiprocessors
    shared_per_block: int  # bytes a kernel may ask for
    shared_per_processor: int
    threads_per_processor: int
    l2_bytes: int
    clock: float  # processor cycles a second
    copy_bytes: float  # a second, to and from memory
    matrix_flops: float  # a second, float16 products summed in float32, as ``mma.sync`` does them
    fp32_flops: float  # a second, in float32

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Gpu:
        """The GPU at ``device``, with products and float32 as fast as those of an H200 for its number of processors."""
        p = torch.cuda.get_device_properties(device)
        share = p.multi_processor_count / H200.processors
        # Where a virtual GPU does not tell its clocks, an H200's share; csrc/cuda/gpu.cpp has its twin.
        memory = 2e3 * p.memory_clock_rate * p.memory_bus_width / 8 * _COPIED
        return Gpu(
            p.name,
            10 * p.major + p.minor,
            p.multi_processor_count,
            p.shared_memory_per_block_optin,
            p.shared_memory_per_multiprocessor,
            p.max_threads_per_multi_processor,
            p.L2_cache_size,
            1e3 * p.clock_rate or H200.clock,
            memory or H200.copy_bytes * share,
            H200.matrix_flops * share,
            H200.fp32_flops * share,
        )


_COPIED = 0.87  # of what an H200's memory clock and width give, a copy was measured to reach

# Copy and float32 rates as measured; mma.sync reaches about 0.62 of the 780 TFLOP/s measured of wgmma.
H200 = Gpu(
    *("NVIDIA H200", 90, 132, 227 * 1024, 228 * 1024, 2048, 50 << 20),
    *(1.98e9, 4.3e12, 0.62 * 780e12, 67e12),
)


def _published(
    name: str,
    capability: int,
    processors: int,
    l2_mib: int,
    clock_ghz: float,
    memory_gb: float,  # a second
    matrix_tflops: float,
    fp32_tflops: float,
) -> Gpu:
    shared, threads = _LIMITS[capability]
    reserved = 1 if capability >= 80 else 0  # KiB of each block's shared memory that are the system's
    return Gpu(
        *(name, capability, processors, (shared - reserved) * 1024, shared * 1024, threads, l2_mib << 20),
        *(clock_ghz * 1e9, memory_gb * 1e9 * _COPIED, matrix_tflops * 1e12, fp32_tflops * 1e12),
    )


# KiB of shared memory and threads of a processor: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
_LIMITS = {
    75: (64, 1024),
    80: (164, 2048),
    86: (100, 1536),
    89: (100, 1536),
    90: (228, 2048),
    100: (228, 2048),
    120: (100, 1536),
}

# A GPU or two of each generation, by short name: boost clock, memory, dense float16 products summed in float32, and
# float32, as NVIDIA's data sheets (T4, A100, L4, H100, B200) and white papers (GA102, AD102, GB202) give them.
GPUS = {
    "t4": _published("NVIDIA T4", 75, 40, 4, 1.59, 320, 65, 8.1),
    "a100": _published("NVIDIA A100", 80, 108, 40, 1.41, 2039, 312, 19.5),
    "rtx3090": _published("NVIDIA GeForce RTX 3090", 86, 82, 6, 1.695, 936, 71, 35.6),
    "l4": _published("NVIDIA L4", 89, 58, 48, 2.04, 300, 121, 30.3),
    "rtx4090": _published("NVIDIA GeForce RTX 4090", 89, 128, 72, 2.52, 1008, 165, 82.6),
    "h100": _published("NVIDIA H100", 90, 132, 50, 1.98, 3350, 989, 67),
    "h200": H200,
    "b200": _published("NVIDIA B200", 100, 148, 126, 1.965, 8000, 2250, 75),
    "rtx5090": _published("NVIDIA GeForce RTX 5090", 120, 170, 96, 2.407, 1792, 209.5, 104.8),
}
