"""The Triton kernel's planner and the file that keeps what was measured; neither needs Triton to run anything."""

import json
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnv2_fused import BlockSpec, TritonPlan, triton_plan
from mnv2_fused.gpus import GPUS, H200
from mnv2_fused.plans.triton import TILES, best_plans, unsupported
from mnv2_fused.spec import ACTIVATIONS
from mnv2_fused.testing import mobilenet_v2_blocks

SPEC = BlockSpec(64, 384, 64, residual=True)
SHAPE = (1, 64, 14, 14)
SMALL = GPUS["l4"]._replace(processors=20, matrix_flops=5e13, fp32_flops=1e13)


@st.composite
def calls(draw):
    expand = draw(st.booleans())
    c_in = draw(st.integers(1, 500))
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 3000)) if expand else c_in,
        draw(st.integers(1, 1500)),
        stride := draw(st.sampled_from([1, 2])),
        expand=expand,
        kernel=draw(st.sampled_from([3, 5])),
        dilation=draw(st.integers(1, 4)) if stride == 1 else 1,
        padding=draw(st.sampled_from([None, "same"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        squeeze_channels=draw(st.sampled_from([0, 12])),
    )
    return spec, (draw(st.integers(0, 300)), c_in, draw(st.integers(1, 300)), draw(st.integers(1, 300)))


@settings(max_examples=100)
@given(calls(), st.sampled_from([torch.float16, torch.float32]), st.booleans(), st.sampled_from([H200, SMALL]))
def test_every_plan_adds_up(call, dtype, tf32, gpu):
    spec, shape = call
    n, _, height, width = shape
    plans = best_plans(spec, shape, dtype, tf32, gpu)
    assert 1 <= len(plans) <= len(TILES)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    out_h, out_w = spec.out_size(height, width)
    assert (out_h, out_w) == ((height - 1) // spec.stride + 1, (width - 1) // spec.stride + 1)
    depthwise = 1 + (spec.squeeze_channels > 0)

    def patches_along(size, outputs):
        """Row by row: a patch takes the next ``outputs`` rows of the first row's phase."""
        left, patches = set(range(size)), 0
        while left:
            first = min(left)
            left -= {first + i * spec.dilation for i in range(outputs)}
            patches += 1
        return patches

    for p in plans:
        assert p.tile[:5] in [t[:5] for t in TILES]
        assert p.shared_bytes <= gpu.shared_per_block
        assert p.registers <= 255 and 0 < p.occupancy <= 1
        groups = -(-spec.hidden_channels // p.group)
        assert 1 <= p.splits <= groups
        out_blocks = -(-spec.out_channels // (p.out_tile * p.out_tiles))
        patches = n * patches_along(out_h, p.tile_rows) * patches_along(out_w, p.tile_cols)
        assert p.programs == -(-patches // p.patches) * p.splits * out_blocks
        expanded = height * width if spec.expand else 0
        assert (
            p.bytes_never_written == n * spec.hidden_channels * (expanded + depthwise * out_h * out_w) * dtype.itemsize
        )
        least = n * (height * width * spec.in_channels + out_h * out_w * spec.out_channels) * dtype.itemsize
        partial = 8 * p.splits * n * out_h * out_w * spec.out_channels if p.splits > 1 else 0
        assert p.bytes >= least + partial
        useful = 2 * n * spec.hidden_channels * (expanded * spec.in_channels + out_h * out_w * spec.out_channels)
        # A stride of 2 over an even size leaves the last row under no window but one.
        assert p.matrix_flops >= useful * 0.2
        assert triton_plan(spec, shape, dtype=dtype, tf32=tf32, gpu=gpu, forced=p.forced()).forced() == p.forced()


def test_products_by_hand():
    # 14 x 14 in patches of 2x2: 49 patches are 4 programs of 16; 16 positions of 64 x 384, 4 outputs of 384 x 64.
    p = triton_plan(SPEC, SHAPE, tile_rows=2, tile_cols=2, patches=16, group=64, splits=1)
    assert p.programs == 4
    assert p.matrix_flops == 4 * 16 * 2 * 384 * 64 * (16 + 4)
    assert p.recompute == pytest.approx(49 * 16 / 196)
    assert p.bytes == 2 * (2 * 196 * 64 + 2 * 64 * 384) + 44 * 384


def test_products_of_both_passes_by_hand():
    # 7 x 7 in patches of 1x2 under 5x5 taps: 28 patches an image, 84 of three in 6 programs; the pass that pools has
    # two an image. 5 x 6 positions are expanded, two outputs projected.
    spec = BlockSpec(64, 384, 64, residual=True, kernel=5, squeeze_channels=96)
    p = triton_plan(spec, (3, 64, 7, 7), tile_rows=1, tile_cols=2, patches=16, group=64, splits=1)
    assert p.programs == 6
    assert p.matrix_flops == 16 * 2 * 384 * 64 * ((6 + 6) * 30 + 6 * 2)
    assert p.recompute == pytest.approx(2 * 84 * 30 / 147)
    weights = 2 * 2 * 64 * 384 + 4 * (25 + 2) * 384
    sums = 2 * 4 * (6 + 3) * 384  # of six programs, and three images' gates
    images = 2 * 147 * 64
    assert p.bytes == 3 * images + 2 * weights + sums + 2 * 4 * 96 * 384  # x twice, y once
    assert p.bytes_never_written == 2 * 3 * 384 * 3 * 49  # expanded, depthwise, gated
    assert p.seconds > triton_plan(BlockSpec(64, 384, 64, residual=True, kernel=5), (3, 64, 7, 7)).seconds


def test_dilated_patches_by_hand():
    # 14 rows at a dilation of 4: phases of 4, 4, 3 and 3 rows are two patches of 2 rows each.
    spec = BlockSpec(64, 384, 64, dilation=4)
    p = triton_plan(spec, SHAPE, tile_rows=2, tile_cols=2, patches=16, group=64, splits=1)
    assert p.programs == 8 * 8 // 16
    assert p.recompute == pytest.approx(64 * 16 / 196)


def test_small_images_are_split_over_the_processors():
    for spec, size in mobilenet_v2_blocks(224):
        p = triton_plan(spec, (1, spec.in_channels, *size))
        if size[0] <= 14:
            assert p.splits > 1
            assert p.programs >= 30
    assert all(triton_plan(s, (256, s.in_channels, *size)).splits == 1 for s, size in mobilenet_v2_blocks(224))


def test_it_is_quick_and_kept():
    start = time.process_time()
    for spec, size in mobilenet_v2_blocks(224):
        best_plans(spec, (37, spec.in_channels, *size), torch.float16, False, H200)
    assert time.process_time() - start < 1
    assert triton_plan(SPEC, SHAPE) is triton_plan(SPEC, SHAPE)


def test_a_plan_prints():
    text = str(triton_plan(SPEC, SHAPE, tile_rows=2, tile_cols=2, patches=16, group=64, splits=3, num_warps=4))
    for part in ("patch 2x2", "16 a program", "group 64", "splits 3", "12 programs", "registers", "occupancy", "MiB"):
        assert part in text
    assert isinstance(triton_plan(SPEC, SHAPE), TritonPlan)


RANGES = [
    ({"tile_rows": 0}, "tile_rows must be 1 to 8, got 0"),
    ({"tile_cols": 9}, "tile_cols must be 1 to 8, got 9"),
    ({"patches": 8}, "patches must be a power of two, 16 to 128, got 8"),
    ({"group": 48}, "group must be a power of two, 16 to 256, got 48"),
    ({"group": 128, "splits": 4}, "splits must be 1 to 3, got 4"),
    ({"num_warps": 3}, "num_warps must be a power of two, 1 to 16, got 3"),
    ({"num_stages": 0}, "num_stages must be 1 to 8, got 0"),
    ({"patches": 128, "tile_rows": 8, "tile_cols": 8}, "bytes of shared memory that NVIDIA H200"),
]


@pytest.mark.parametrize(("values", "message"), RANGES, ids=[m for _, m in RANGES])
def test_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        triton_plan(SPEC, SHAPE, **values)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64, 14, 14), {}, r"\(N, C_in, H, W\), got \(64, 14, 14\)"),
        ((1, 3, 14, 14), {}, "3 channels, the block takes 64"),
        ((-1, 64, 14, 14), {}, "batch must be at least 0"),
        ((1, 64, 0, 14), {}, "height and width at least 1"),
        ((2**20, 64, 2**10, 2**10), {}, r"at most 2\^30 output pixels.*split the batch, or use backend='eager'"),
        (SHAPE, {"dtype": torch.float64}, "float16, bfloat16 or float32.*float64; use backend='eager'"),
        (SHAPE, {"forced": [1, 2]}, r"plan must be \[tile_rows.*got 2 values"),
    ],
)
def test_bad_input(shape, options, message):
    with pytest.raises(ValueError, match=message):
        triton_plan(SPEC, shape, **options)
    with pytest.raises(TypeError, match=r"what can be forced is .*got tiles"):
        triton_plan(SPEC, SHAPE, tiles=3)


@pytest.mark.parametrize(
    ("spec", "dtype", "message"),
    [
        (
            SPEC,
            torch.float64,
            "float16, bfloat16 or float32 for backend 'triton', got torch.float64; use backend='eager'",
        ),
        (BlockSpec(8, 40000, 8), torch.float16, "at most 32768 channels, got 40000; use backend='eager'"),
        (BlockSpec(8, 48, 8, dilation=2**20), torch.float16, "at most 1048576 pixels, got 2097153 by a dilation"),
    ],
    ids=["dtype", "channels", "dilation"],
)
def test_what_is_unsupported_can_be_asked_and_is_refused(spec, dtype, message):
    assert message in unsupported(dtype, spec)
    with pytest.raises(ValueError, match=re.escape(message)):
        triton_plan(spec, (1, spec.in_channels, 9, 9), dtype=dtype)


def test_what_is_supported():
    everything = BlockSpec(
        *(16, 96, 24),
        kernel=5,
        dilation=3,
        padding=(1, 2, 3, 4),
        activation="silu",
        out_activation="hardswish",
        squeeze_channels=4,
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert unsupported(dtype, everything) is None
        assert triton_plan(everything, (1, 16, 20, 20), dtype=dtype).programs > 0


def test_an_image_of_which_nothing_is_left():
    with pytest.raises(ValueError, match=r"padding \(0, 0, 0, 0\) leaves nothing of 4 x 9 pixels; use larger images"):
        triton_plan(BlockSpec(8, 48, 8, kernel=5, padding=(0, 0, 0, 0)), (1, 8, 4, 9))


class TestTuning:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        pytest.importorskip("triton")
        from mnv2_fused.triton_backend import tune as triton_tune

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(triton_tune, "_chosen", {})
        self.tune, self.plans, self.ran = triton_tune, best_plans(SPEC, SHAPE, torch.float16, False, H200), []

    def fastest(self, seconds, key="key"):
        """What is chosen when the plans take ``seconds``; run anew, as in another process."""
        self.tune._chosen.clear()
        self.ran.clear()
        times = iter(seconds)

        def measure(run):
            run()
            return next(times)

        return self.tune.fastest(self.plans, self.ran.append, (key,), measure)

    def test_it_measures_each_once_and_keeps_the_fastest(self):
        seconds = [3.0] * len(self.plans)
        seconds[2] = 1.0
        assert self.fastest(seconds) is self.plans[2]
        assert self.ran == list(self.plans)
        assert self.fastest([]) is self.plans[2] and not self.ran  # from the file
        assert list(json.loads(self.tune.cache_file().read_text()).values()) == [self.plans[2].forced()]
        assert torch.__version__ in next(iter(json.loads(self.tune.cache_file().read_text())))

    def test_another_key_is_measured_by_itself(self):
        ascending = [float(i) for i in range(len(self.plans))]
        assert self.fastest(ascending) is self.plans[0]
        assert self.fastest(ascending[::-1], key="another") is self.plans[-1]
        assert self.fastest([]) is self.plans[0]
        assert len(json.loads(self.tune.cache_file().read_text())) == 2

    @pytest.mark.parametrize("content", ["", "{", "[1]", '{"key": 3}', "lists", "nested"])
    def test_a_spoiled_file_costs_a_measurement_only(self, content):
        file = self.tune.cache_file()
        file.parent.mkdir()
        if content == "lists":  # where numbers belong
            self.fastest([float(i) for i in range(len(self.plans))])
            content = json.dumps({key: [[8]] for key in json.loads(file.read_text())})
        file.write_text("[" * 10_000 if content == "nested" else content)
        assert self.fastest([float(i) for i in range(len(self.plans))]) is self.plans[0]
        assert self.fastest([]) is self.plans[0]
        assert [path.name for path in file.parent.iterdir()] == [file.name]

    def test_without_a_home_folder(self, monkeypatch):
        def missing():
            raise RuntimeError("no home folder")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(self.tune.Path, "home", missing)
        assert self.fastest([float(i) for i in range(len(self.plans))]) is self.plans[0]

    def test_no_part_of_a_file_is_left_behind(self, monkeypatch):
        def refuse(*names):
            raise PermissionError("not here")

        monkeypatch.setattr(self.tune.os, "replace", refuse)
        assert self.fastest([float(i) for i in range(len(self.plans))]) is self.plans[0]
        assert list(self.tune.cache_file().parent.iterdir()) == []

    def test_a_plan_of_other_configurations_is_measured_again(self):
        self.fastest([float(i) for i in range(len(self.plans))])
        file = self.tune.cache_file()
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({key: [8, 8, 128, 256, 1, 16, 8] for key in kept}))
        assert self.fastest([float(i) for i in range(len(self.plans))]) is self.plans[0] and self.ran

    def test_where_nothing_can_be_written(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        assert self.fastest([float(i) for i in range(len(self.plans))]) is self.plans[0]

    def test_only_who_asks(self, monkeypatch):
        for value, asked in {"1": True, "0": False, "": False}.items():
            monkeypatch.setenv("MNV2_FUSED_AUTOTUNE", value)
            assert self.tune.wanted() == asked
        monkeypatch.delenv("MNV2_FUSED_AUTOTUNE")
        assert not self.tune.wanted()
