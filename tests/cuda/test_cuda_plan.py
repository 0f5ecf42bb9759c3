"""The CUDA kernel's planner: pure, so that every generation of GPUs is planned for on any machine."""

import re
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from support.source_tree import ROOT

from mnv2_fused import BlockSpec, backends, cuda_plan, gpus
from mnv2_fused.activations import ACTIVATIONS
from mnv2_fused.encoding import shape_of
from mnv2_fused.gpus import GPUS, H200
from mnv2_fused.testing import mobilenet_v2_blocks

KINDS = {"float16": {}, "bfloat16": {"dtype": torch.bfloat16}, "float32": {"dtype": torch.float32}}
KINDS["tf32"] = {"dtype": torch.float32, "tf32": True}
SPEC = BlockSpec(64, 384, 64, residual=True)
SHAPE = (8, 64, 14, 14)
BLOCKS = [b for size in (224, 96, (1088, 1920)) for b in mobilenet_v2_blocks(size)]


def takes(gpu, kind):
    return gpu.capability >= 80 or kind in ("float16", "float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_block_fits_every_generation(gpu, kind):
    for spec, size in BLOCKS:
        for batch in (1, 256):
            shape = (batch, spec.in_channels, *size)
            if not takes(gpu, kind) and kind == "bfloat16":
                with pytest.raises(ValueError, match=r"needs compute capability 8.0, this GPU has 7.5; use"):
                    cuda_plan(spec, shape, gpu=gpu, **KINDS[kind])
                continue
            p = cuda_plan(spec, shape, gpu=gpu, **KINDS[kind])
            height, width = ((n - 1) // spec.stride + 1 for n in size)
            assert p.shared_bytes <= gpu.shared_per_block
            assert p.resident * (p.shared_bytes + 1024) <= gpu.shared_per_processor or p.resident == 1
            assert p.resident * p.warps * 32 <= gpu.threads_per_processor
            strips = p.images * -(-p.tile_rows // p.strip_rows) * p.tile_cols
            assert 8 * (p.warps - 1) < strips <= 8 * p.warps
            assert p.out_panels * p.out_blocks * 16 >= spec.out_channels
            assert p.splits * p.group < spec.hidden_channels + p.group
            tiles = -(-batch // p.images) * -(-height // p.tile_rows) * -(-width // p.tile_cols)
            assert p.thread_blocks == tiles * p.splits * p.out_blocks
            assert p.images == 1 or (p.tile_rows >= height and p.tile_cols >= width)
            assert p.partial_bytes == (4 * p.splits * batch * spec.out_channels * height * width if p.splits > 1 else 0)
            assert p.recompute >= 1 or spec.stride == 2
            assert p.seconds > p.bytes / gpu.copy_bytes


# MobileNetV3's and EfficientNet's largest of each kind, an encoder's dilated block, TensorFlow's padding.
GENERAL_BLOCKS = [
    (BlockSpec(40, 240, 80, 2, activation="hardswish"), (28, 28)),
    (BlockSpec(112, 672, 160, 2, kernel=5, activation="hardswish", squeeze_channels=168), (14, 14)),
    (BlockSpec(192, 1152, 320, activation="silu", squeeze_channels=48, squeeze_activation="silu"), (7, 7)),
    (BlockSpec(160, 960, 160, kernel=5, dilation=2, residual=True, activation="hardswish"), (33, 33)),
    (BlockSpec(512, 512, 256, expand=False, dilation=12, activation="relu", out_activation="relu"), (65, 65)),
    (BlockSpec(24, 144, 40, 2, kernel=5, padding="same", squeeze_channels=6), (57, 113)),
    (BlockSpec(16, 96, 24, 2, padding=(0, 1, 0, 2)), (544, 960)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_general_block_fits_every_generation(gpu, kind):
    for spec, size in GENERAL_BLOCKS if takes(gpu, kind) else ():
        for batch in (1, 32):
            p = cuda_plan(spec, (batch, spec.in_channels, *size), gpu=gpu, **KINDS[kind])
            phases = [min(spec.dilation, out) for out in spec.out_size(*size)]
            apart = [-(-out // spec.dilation) for out in spec.out_size(*size)]
            tiles = phases[0] * -(-apart[0] // p.tile_rows) * phases[1] * -(-apart[1] // p.tile_cols)
            assert p.thread_blocks == -(-batch // p.images) * tiles * p.splits * p.out_blocks
            assert p.shared_bytes <= gpu.shared_per_block
            assert 8 * (p.warps - 1) < p.images * -(-p.tile_rows // p.strip_rows) * p.tile_cols <= 8 * p.warps
            hidden, squeezed = -(-spec.hidden_channels // 16) * 16, -(-spec.squeeze_channels // 16) * 16
            kept = batch * (tiles * p.warps * hidden + squeezed + hidden) * 4
            assert p.squeeze_bytes == (kept if squeezed else 0)
            assert p.images == 1 or not squeezed
            assert p.seconds > p.bytes / gpu.copy_bytes


def test_more_of_a_block_takes_longer():
    shape = (64, 40, 56, 56)
    plain = cuda_plan(BlockSpec(40, 240, 40, activation="relu"), shape).seconds
    five = cuda_plan(BlockSpec(40, 240, 40, activation="relu", kernel=5), shape).seconds
    squeezed = cuda_plan(BlockSpec(40, 240, 40, activation="relu", kernel=5, squeeze_channels=10), shape).seconds
    assert plain < five < squeezed / 1.5 < five * 2


def test_dilated_tiles_have_no_larger_halo():
    ordinary, dilated = (
        cuda_plan(
            BlockSpec(40, 240, 40, dilation=d, activation="relu"), (1, 40, size, size), forced=[1, 8, 8, 2, 32, 1]
        )
        for d, size in ((1, 16), (4, 64))
    )
    assert dilated.shared_bytes == ordinary.shared_bytes and dilated.recompute == ordinary.recompute
    assert dilated.thread_blocks == 16 * ordinary.thread_blocks


def test_registers_of_a_processor_suffice():
    """65536, of which a warp's lanes have at most 255 each: 8 warps at least, whatever the variant."""
    for spec, size in BLOCKS:
        p = cuda_plan(spec, (256, spec.in_channels, *size))
        sums = 32 * p.warps * p.resident * p.out_panels * p.strip_rows // 2 * 8
        assert sums < 65536 * 0.7, p


def test_forced_plans():
    automatic = cuda_plan(SPEC, SHAPE)
    assert cuda_plan(SPEC, SHAPE, forced=automatic.forced()) == automatic
    p = cuda_plan(SPEC, SHAPE, forced=[1, 7, 5, 2, 48, 3])
    assert p.forced() == [1, 7, 5, 2, 48, 3]
    assert (p.warps, p.splits, p.thread_blocks) == (-(-4 * 5 // 8), 3, 8 * 2 * 3 * 3)
    with pytest.raises(FrozenInstanceError):
        p.group = 1
    assert "tile 7x5" in str(p) and "splits 3" in str(p)


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ([1, 7, 7, 2, 48], r"must be \[images, .*splits\], got 5 values"),
        ([9, 14, 14, 4, 48, 1], r"images must be 1 to the batch of 8, got 9"),
        ([2, 7, 7, 2, 48, 1], r"several images need a tile of the whole image, got 7x7"),
        ([1, 0, 7, 2, 48, 1], r"tile_rows must be 1 to 14, got 0"),
        ([1, 7, 15, 2, 48, 1], r"tile_cols must be 1 to 14, got 15"),
        ([1, 7, 7, 3, 48, 1], r"no kernel is compiled for strip_rows 3"),
        ([1, 7, 7, 2, 40, 1], r"group must be a multiple of 16, got 40"),
        ([1, 7, 7, 2, 0, 1], r"group must be a multiple of 16, got 0"),
        ([1, 7, 7, 2, 400, 1], r"group must be 1 to 384, got 400"),
        ([1, 7, 7, 2, 48, 9], r"splits must be 1 to 8, got 9"),
        ([1, 7, 7, 2, 48, 5], r"splits of 5 leave one without any of the 8 groups"),
        ([1, 14, 14, 2, 48, 1], r"at most 56 strips of 2 rows, got 98; choose a smaller tile"),
        ([1, 8, 14, 4, 384, 1], r"bytes of shared memory, a thread block of this GPU has 232448; choose"),
    ],
)
def test_a_bad_plan_names_the_value_and_the_limit(forced, message):
    with pytest.raises(ValueError, match=message):
        cuda_plan(SPEC, SHAPE, forced=forced)


@pytest.mark.parametrize(
    ("spec", "shape", "options", "message"),
    [
        (BlockSpec(8, 40000, 8), (1, 8, 4, 4), {}, r"at most 2\^15 channels, got 40000; use backend='eager'"),
        (BlockSpec(8, 8, 8), (2**18, 8, 64, 128), {}, r"at most 2\^30 output pixels, .* split the batch"),
        (BlockSpec(20000, 16, 16), (1, 20000, 4, 4), {}, r"no tile of 20000 -> 16 -> 16 channels fits into the 232448"),
        (SPEC, (1, 64, 8, 8), {"dtype": torch.float64}, r"takes float32, float16 and bfloat16, got torch.float64"),
        (SPEC, (1, 63, 8, 8), {}, r"input_shape has 63 channels, the block takes 64"),
        (BlockSpec(8, 48, 8, kernel=7), (1, 8, 9, 9), {}, r"takes kernel 3 or 5, got 7; use backend='triton' or"),
        (BlockSpec(8, 48, 8, stride=(2, 1)), (1, 8, 9, 9), {}, r"one stride for rows and columns, got 2 and 1; use"),
        (BlockSpec(8, 8, 8, dilation=2**17), (1, 8, 4, 4), {}, r"dilation must be 1 to 2\^16, got 131072"),
        (SPEC, (64, 8, 8), {}, r"input_shape must be \(N, C_in, H, W\)"),
    ],
)
def test_what_no_kernel_takes(spec, shape, options, message):
    with pytest.raises(ValueError, match=message):
        cuda_plan(spec, shape, **options)


def test_an_unknown_kind_is_refused_by_name():
    """Behind Python's own checks, which know the kinds by name."""
    block, options = shape_of(SPEC, *SHAPE[:1], *SHAPE[2:]), {"precision": "float16", "gpu": H200[1:9]}
    count = len(ACTIVATIONS)
    kinds_of = {"activation": count, "out_activation": count, "expand_activation": count, "gate": 3, "expand": 3}
    for name, kinds in kinds_of.items():
        for value in (-1, kinds):
            with pytest.raises(ValueError, match=rf"^{name} must be 0 to {kinds - 1} .*, got {value}$"):
                backends._C.cuda_plan(block | {name: value}, **options)


def test_small_batches_fill_the_processors():
    """One image of 14x14 and 384 channels is one tile, yet most processors of an H200 get a part of it."""
    p = cuda_plan(SPEC, (1, 64, 14, 14))
    assert p.splits > 1 and p.thread_blocks >= H200.processors / 2


def test_more_work_takes_longer():
    seconds = [cuda_plan(SPEC, (n, 64, 14, 14)).seconds for n in (1, 32, 256, 1024)]
    assert seconds == sorted(seconds) and seconds[-1] > 2 * seconds[-2]
    slow = H200._replace(clock=H200.clock / 2, copy_bytes=H200.copy_bytes / 2)
    assert cuda_plan(SPEC, (256, 64, 14, 14), gpu=slow).seconds > 1.5 * seconds[2]


def test_the_notes_are_of_this_planner():
    benchmarks = ROOT / "benchmarks"
    if not benchmarks.is_dir():
        pytest.skip("needs the source tree")
    sys.path.insert(0, str(benchmarks))
    from cuda_prediction import NOTES, notes

    assert NOTES.read_text() == notes(NOTES.read_text()), "run: python benchmarks/cuda_prediction.py"


def test_limits_of_a_gpu_stand_in_the_same_order_on_both_sides():
    """gpus.Gpu is handed to C++ as a tuple; the fields are those of csrc/cuda/plan.h by other names."""
    struct = re.search(r"struct Gpu \{(.*?)\n\};", (ROOT / "csrc/cuda/plan.h").read_text(), re.S)[1]
    fields = re.findall(r"^  (?:int64_t|double) (\w+);", struct, re.M)
    names = {
        "multiprocessors": "processors",
        "shared_per_multiprocessor": "shared_per_processor",
        "threads_per_multiprocessor": "threads_per_processor",
        "memory_bandwidth": "copy_bytes",
    }
    assert [names.get(field, field) for field in fields] == list(gpus.Gpu._fields[1:9])


def test_both_readers_of_a_gpu_assume_the_same_where_it_does_not_tell():
    """csrc/cuda/gpu.cpp and Gpu.of: share of the memory's clock that copies reach, and an H200's rates."""
    source = (ROOT / "csrc/cuda/gpu.cpp").read_text()
    (reached,) = re.findall(r"kReached = ([\d.]+);", source)
    ((bandwidth, multiprocessors),) = re.findall(r"memory > 0 \? memory : ([\d.e]+) / (\d+) \*", source)
    (clock,) = re.findall(r"clock > 0 \? clock : ([\d.e]+);", source)
    assert float(reached) == gpus._COPIED
    assert float(bandwidth) == H200.copy_bytes and int(multiprocessors) == H200.processors
    assert float(clock) == H200.clock
    attributes = dict(re.findall(r"g\.(\w+) = at\(cudaDevAttr(\w+)\);", source))
    assert attributes == {
        "multiprocessors": "MultiProcessorCount",
        "shared_per_block": "MaxSharedMemoryPerBlockOptin",
        "shared_per_multiprocessor": "MaxSharedMemoryPerMultiprocessor",
        "threads_per_multiprocessor": "MaxThreadsPerMultiProcessor",
        "l2_bytes": "L2CacheSize",
    }
