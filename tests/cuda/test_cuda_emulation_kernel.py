"""The CUDA kernel's own source, run on the CPU by tests/cuda_emulation, against torch's own ops."""

import dataclasses

import pytest
import torch
from cuda_emulation.cases import (
    DILATED,
    FIVE,
    OUT_BLOCKS,
    PADDED,
    PRECISIONS,
    SQUEEZED,
    STEMMED,
    STRIDED,
    UNEVEN,
    UNEXPANDED,
    WIDE,
    check,
    compiled_kernels,
    emulated,
    image_of,
    input_of,
    noticed,
    planned,
    spreads,
    stem_of,
)
from cuda_emulation.emulation import emulated_inverted_residual, emulated_sequence
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from support.blocks import CUDA_OPTIONS, DETERMINISM_SPECS, GENERAL_SPECS, PADDING_SPECS, every_pair, spec_of
from support.inputs import SIZES, VIEWS, random_input

from mnv2_fused import BlockSpec, cuda_plan, fold, pack
from mnv2_fused.sequence.weights import join
from mnv2_fused.spec import ACTIVATIONS
from mnv2_fused.testing import mobilenet_v2_blocks, random_weights, threads

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poison")]
by_precision = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are small: more threads wait for each other longer than they compute."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return compiled_kernels(tmp_path_factory.mktemp("kernels"))


SPECS = [
    BlockSpec(8, 48, 8, residual=True),
    BlockSpec(8, 50, 20, stride=2),
    BlockSpec(8, 8, 5, expand=False),
    BlockSpec(24, 40, 32),
]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def by_block(resolution):
    blocks = list(enumerate(mobilenet_v2_blocks(resolution)))
    ids = [f"{i}: {spec} at {size[0]}" for i, (spec, size) in blocks]
    return pytest.mark.parametrize(("i", "spec", "size"), [(i, *block) for i, block in blocks], ids=ids)


@by_precision
@by_block(224)
def test_mobilenet_v2_at_224(kernels, i, spec, size, precision):
    """As the planner has it for one image, and a part of what it has for many."""
    x, weights = input_of(spec, 1, size, precision), random_weights(spec)
    check(kernels, x, weights, spec, precision)
    many = cuda_plan(spec, (256, *x.shape[1:]), dtype=x.dtype, tf32=precision == "tf32")
    x = input_of(spec, min(many.images, 2), size, precision)
    names = "images", "tile_rows", "tile_cols", "strip_rows", "group", "splits"
    check(kernels, x, weights, spec, precision, **dict(zip(names, many.forced(), strict=True)))


@by_precision
@by_block(48)
def test_mobilenet_v2_at_48(kernels, i, spec, size, precision):
    """With splits, and either tiles that don't fit or several images a tile."""
    splits = min(1 + i % 3, -(-spec.hidden_channels // 32))
    images = 2 if size[0] // spec.stride < 4 else 1
    options = {"tile_rows": 3, "tile_cols": 5, "images": images, "group": 32, "splits": splits}
    check(kernels, input_of(spec, 2, size, precision), random_weights(spec), spec, precision, **options)


@st.composite
def cases(draw):
    precision = draw(st.sampled_from(list(PRECISIONS)))
    expand, residual = draw(st.booleans()), draw(st.booleans())
    c_in = draw(st.integers(1, 100) | st.integers(1, 12).map(lambda n: 8 * n))
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 100)) if expand else c_in,
        c_in if residual else draw(st.integers(1, 100) | st.integers(1, 40).map(lambda n: 8 * n)),
        1 if residual else draw(st.sampled_from([1, 2])),
        expand=expand,
        residual=residual,
    )
    shape = draw(st.integers(1, 4)), c_in, draw(st.integers(1, 12)), draw(st.integers(1, 12))
    group = 16 * draw(st.integers(1, 3))
    out = [(size - 1) // spec.stride + 1 for size in shape[2:]]
    whole = draw(st.booleans())  # tiles, of which there may be several images'
    forced = {
        "images": draw(st.integers(1, min(3, shape[0]))) if whole else 1,
        "tile_rows": out[0] if whole else draw(st.integers(1, min(8, out[0]))),
        "tile_cols": out[1] if whole else draw(st.integers(1, min(8, out[1]))),
        "strip_rows": 4 if precision != "float32" and spec.out_channels <= 160 and draw(st.booleans()) else 2,
        "group": min(group, -(-spec.hidden_channels // 16) * 16),
        "splits": draw(st.integers(1, min(-(-spec.hidden_channels // group), 4))),
    }
    return spec, shape, precision, draw(st.just({}) | st.just(forced)), draw(st.integers(0, 2**31))


@given(cases())
def test_any_shape_and_plan(kernels, case):
    spec, (batch, _, height, width), precision, forced, seed = case
    x = input_of(spec, batch, (height, width), precision, seed=seed)
    weights = random_weights(spec, seed=seed, expand_bias=seed % 20)
    try:
        planned(spec, x, precision, **forced)
    except ValueError:
        reject()  # more than a thread block's warps, or empty splits
    check(kernels, x, weights, spec, precision, seed=seed, **forced)


@pytest.mark.parametrize(
    ("precision", "strip_rows", "out_channels"),
    [
        (precision, strip_rows, out_channels)
        for precision in PRECISIONS
        for out_channels in (32, 33, 64, 96, 160, 320, 350)
        for strip_rows in (2, 4)
        if strip_rows == 2 or (precision != "float32" and out_channels <= 160)  # else it has no registers for it
    ],
)
def test_every_variant(kernels, precision, strip_rows, out_channels):
    """Output channels that fill the registers of each variant, and some that take two of its thread blocks."""
    for stride, expand in ((1, True), (2, True), (1, False), (2, False)):
        spec = BlockSpec(32, 48 if expand else 32, out_channels, stride, expand=expand)
        x, weights = input_of(spec, 2, (5, 6), precision), random_weights(spec)
        forced = {"tile_rows": 4, "tile_cols": 3, "strip_rows": strip_rows, "splits": 2 - expand}
        check(kernels, x, weights, spec, precision, **forced)
        x[1, 5, 2, 3] = float("inf")
        assert spreads(kernels, x, weights, spec, precision, **forced), spec


@by_precision
@pytest.mark.parametrize("spec", PADDING_SPECS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5)])
def test_padding_is_of_the_expanded_tensor(kernels, spec, size, precision):
    weights = random_weights(spec, expand_bias=50)
    check(kernels, input_of(spec, 2, size, precision), weights, spec, precision)
    check(kernels, input_of(spec, 2, size, precision), weights, spec, precision, tile_rows=1, tile_cols=1)


@by_precision
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("channels", [16, 20])
def test_residual_adds_x_itself(kernels, channels, splits, precision):
    spec = BlockSpec(channels, 120, channels, residual=True)
    nothing = random_weights(spec)._replace(w_project=torch.zeros(channels, 120, 1, 1), b_project=torch.zeros(channels))
    x = input_of(spec, 2, (5, 6), precision) * 100
    assert torch.equal(emulated(kernels, x, nothing, spec, precision, splits=splits), x)


@by_precision
@pytest.mark.parametrize("spec", DETERMINISM_SPECS, ids=str)
def test_the_threads_order_does_not_change_a_bit(kernels, spec, precision):
    x, weights = input_of(spec, 2, (6, 5), precision), random_weights(spec)
    results = [emulated(kernels, x, weights, spec, precision, splits=2, seed=seed) for seed in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)


@by_precision
@by_spec
def test_tiles_do_not_change_a_bit(kernels, spec, precision):
    x, weights = input_of(spec, 3, (4, 5), precision), random_weights(spec)
    results = [
        emulated(kernels, x, weights, spec, precision, tile_rows=r, tile_cols=c, images=i, group=16, splits=1)
        for r, c, i in ((1, 1, 1), (2, 3, 1), (4, 5, 1), (4, 5, 3))
    ]
    assert all(torch.equal(y, results[0]) for y in results)


def in_dtype(x, dtype):
    """The same view of memory that holds another dtype."""
    x = x.resolve_neg()
    memory = torch.empty(0).set_(x.untyped_storage())
    return memory.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@by_precision
def test_shared_memory_is_what_the_plan_says(kernels, precision):
    spec = SPECS[0]
    x, packed = input_of(spec, 1, (6, 5), precision), pack(random_weights(spec), PRECISIONS[precision][1], "cuda")
    plan = planned(spec, x, precision, tile_rows=6, tile_cols=5)
    less = dataclasses.replace(plan, shared_bytes=plan.shared_bytes - 16)
    emulated_inverted_residual(kernels[precision], x, packed, spec, plan)
    with pytest.raises(RuntimeError, match=r"of shared memory at .*, outside its"):
        emulated_inverted_residual(kernels[precision], x, packed, spec, less)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(kernels, view):
    for spec in SPECS[:3]:
        for precision, (_, dtype) in PRECISIONS.items():
            x = in_dtype(view(), dtype)
            check(kernels, x, random_weights(spec), spec, precision)


@by_precision
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(kernels, size, precision):
    for spec in SPECS:
        check(kernels, input_of(spec, 3, size, precision), random_weights(spec), spec, precision)


@by_precision
@by_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
def test_non_finite_values_spread_as_in_eager(kernels, value, spec, precision):
    for where in ((0, 0, 0, 0), (0, 3, 4, 4), (1, 7, 6, 7)):
        x = input_of(spec, 2, (7, 8), precision)
        x[where] = value
        assert spreads(kernels, x, random_weights(spec), spec, precision, tile_rows=2, tile_cols=3)


@by_precision
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w_expand", "b_expand", "b_depthwise", "w_project", "b_project"])
def test_a_non_finite_weight_spreads_as_in_eager(kernels, name, value, precision):
    """Also at the border, where no product may make a NaN of padding times infinity."""
    for spec in SPECS[:2]:
        x, weights = input_of(spec, 1, (6, 6), precision), random_weights(spec, dtype=torch.float32)
        getattr(weights, name).view(-1)[5] = value
        assert spreads(kernels, x, weights, spec, precision, tile_rows=2, tile_cols=2)


def test_offsets_beyond_2_31_elements(kernels, monkeypatch):
    """Two images 2^31 elements apart; no page between them is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        memory = torch.empty(2**31 + 8 * 81, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this system does not lend 4 GiB of untouched memory")
    x = memory.as_strided((2, 8, 9, 9), (2**31, 1, 72, 8))
    x.copy_(random_input(SPECS[0], 2, (9, 9)))
    for spec in SPECS[:3]:
        check(kernels, x, random_weights(spec), spec, "float16")


# Beyond MobileNetV2's block.


def kinds_of(dtype):
    """What activations of this dtype are computed in."""
    return [kind for kind, (_, stored) in PRECISIONS.items() if stored == dtype]


@pytest.mark.parametrize(
    ("i", "case", "precision"),
    [(i, case, kind) for i, case in enumerate(every_pair(CUDA_OPTIONS)) for kind in kinds_of(case["dtype"])],
    ids=lambda v: v if isinstance(v, int | str) else "",
)
def test_every_pair_of_options(kernels, i, case, precision):
    """Two images of odd sizes; tiles that do not fit, groups and splits take turns."""
    spec = spec_of(**case)
    x = input_of(spec, 2, (5, 7 - i % 2), precision)
    forced = {"tile_rows": 2 + i % 4, "tile_cols": 1 + i % 5}
    forced |= {"group": min(16 + 16 * (i % 3), -(-spec.hidden_channels // 16) * 16)}
    forced |= {"splits": 1 + i // 3 % 2 if spec.hidden_channels > forced["group"] else 1}
    check(kernels, x, random_weights(spec, expand_bias=3), spec, precision, seed=i, **forced)


@by_precision
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
def test_general_blocks_as_planned(kernels, spec, precision):
    for size in ((1, 1), (2, 9), (6, 5), (13, 15)):
        if min(spec.out_size(*size)) < 1:
            continue
        check(kernels, input_of(spec, 2, size, precision), random_weights(spec), spec, precision)


@by_precision
def test_a_dilation_larger_than_the_image(kernels, precision):
    spec = BlockSpec(8, 20, 8, kernel=5, dilation=9, activation="relu", residual=True)
    for size in ((1, 1), (6, 11)):
        check(kernels, input_of(spec, 2, size, precision), random_weights(spec), spec, precision)
    spec = BlockSpec(8, 20, 8, dilation=3, padding=(3, 3, 5, 1))  # windows beside the image
    check(kernels, input_of(spec, 2, (1, 2), precision), random_weights(spec), spec, precision)


@by_precision
@pytest.mark.parametrize(("i", "activation"), list(enumerate(ACTIVATIONS)))
def test_padding_is_of_the_expanded_tensor_with_every_activation(kernels, i, activation, precision):
    kernel = 3 + 2 * (i % 2)
    padding = (1, kernel - 1, kernel - 2, 0)
    spec = BlockSpec(8, 40, 12, 1 + i // 2 % 2, kernel=kernel, activation=activation, padding=padding)
    x = input_of(spec, 2, (7, 8), precision)
    check(kernels, x, random_weights(spec, expand_bias=50), spec, precision, tile_rows=3, tile_cols=3)


@by_precision
@pytest.mark.parametrize("out_channels", [64, 160, 170])
@pytest.mark.parametrize("kernel", [3, 5])
def test_every_general_variant(kernels, precision, out_channels, kernel):
    """With every stride, with and without an expansion and a gate; infinite input, which leaves infinities in e."""
    for stride, expand, squeeze in ((1, True, 0), (2, True, 5), (1, False, 5), (2, False, 0)):
        spec = BlockSpec(
            *(32, 48 if expand else 32, out_channels, stride),
            expand=expand,
            kernel=kernel,
            activation="relu",
            squeeze_channels=squeeze,
        )
        x, weights = input_of(spec, 1, (5, 6), precision), random_weights(spec)
        forced = {"tile_rows": 4, "tile_cols": 3, "splits": 2 - expand}
        check(kernels, x, weights, spec, precision, **forced)
        x[0, 5, 2, 3] = float("inf")
        assert spreads(kernels, x, weights, spec, precision, **forced), spec


@by_precision
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_activation", ACTIVATIONS)
def test_residual_adds_x_behind_the_outputs_activation(kernels, out_activation, splits, precision):
    spec = BlockSpec(8, 40, 8, residual=True, out_activation=out_activation)
    weights = random_weights(spec)
    weights = weights._replace(w_project=weights.w_project * 0, b_project=weights.b_project * 4)
    check(kernels, input_of(spec, 2, (3, 4), precision), weights, spec, precision, splits=splits)


@by_precision
def test_each_image_has_its_own_gate(kernels, precision):
    spec = BlockSpec(8, 40, 8, activation="relu", squeeze_channels=6)
    x = input_of(spec, 3, (5, 6), precision) * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1)
    x, weights = x.to(PRECISIONS[precision][1]), random_weights(spec)
    y = check(kernels, x, weights, spec, precision, tile_rows=2, tile_cols=3)
    for image in range(3):
        alone = emulated(kernels, x[image : image + 1], weights, spec, precision, tile_rows=2, tile_cols=3)
        assert torch.equal(alone, y[image : image + 1])


@by_precision
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
def test_the_threads_order_does_not_change_a_bit_of_general_blocks(kernels, spec, precision):
    x, weights = input_of(spec, 2, (6, 5), precision), random_weights(spec)
    splits = 2 if spec.hidden_channels > 16 else 1
    results = [emulated(kernels, x, weights, spec, precision, splits=splits, seed=seed) for seed in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)


@by_precision
@pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)
def test_non_finite_values_spread_in_general_blocks_as_in_eager(kernels, spec, precision):
    x = input_of(spec, 4, (5, 6), precision)
    for image, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        x[image, 0, 0, 0] = x[image, 7, 4, 5] = value
    assert spreads(kernels, x, random_weights(spec), spec, precision, tile_rows=4, tile_cols=3)


@st.composite
def general_cases(draw):
    options = {
        "kernel": draw(st.sampled_from([3, 5])),
        "stride": draw(st.sampled_from([1, 2])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "out_activation": draw(st.sampled_from(ACTIVATIONS)),
        "squeeze_channels": draw(st.just(0) | st.integers(1, 40)),
        "expand": draw(st.booleans()),
    }
    if options["stride"] == 1:
        options["dilation"] = draw(st.integers(1, 4))
    most = options.get("dilation", 1) * (options["kernel"] - 1)
    options["padding"] = draw(st.none() | st.just("same") | st.tuples(*[st.integers(0, most)] * 4))
    c_in = draw(st.integers(1, 40))
    spec = BlockSpec(
        c_in, draw(st.integers(1, 100)) if options["expand"] else c_in, draw(st.integers(1, 80)), **options
    )
    return spec, draw(st.integers(1, 3)), (draw(st.integers(1, 11)), draw(st.integers(1, 11)))


@settings(max_examples=settings.default.max_examples // 5)
@given(general_cases(), st.sampled_from(list(PRECISIONS)), st.integers(0, 2**31))
def test_any_general_block(kernels, case, precision, seed):
    spec, batch, size = case
    if min(spec.out_size(*size)) < 1:
        reject()
    weights = random_weights(spec, seed=seed, expand_bias=seed % 20)
    check(kernels, input_of(spec, batch, size, precision, seed=seed), weights, spec, precision, seed=seed)


# A network's stem, in one kernel with the block behind it.


BEHIND_STEMS = {
    "MobileNetV2": (BlockSpec(32, 32, 16, expand=False), "relu6"),
    "stride 2": (BlockSpec(20, 20, 20, 2, expand=False), "relu6"),
    "MobileNetV1": (BlockSpec(32, 32, 64, expand=False, out_activation="relu6"), "relu6"),
    "MobileNetV3": (
        BlockSpec(16, 16, 16, 2, expand=False, activation="relu", squeeze_channels=8),
        "hardswish",
    ),
    "EfficientNet": (
        BlockSpec(24, 24, 16, expand=False, activation="silu", squeeze_channels=6, gate="sigmoid"),
        "silu",
    ),
    "LeakyReLU": (BlockSpec(24, 24, 16, expand=False, activation="leaky_relu", negative_slope=0.2), "gelu"),
    "ReLU": (BlockSpec(9, 9, 70, expand=False, kernel=5, activation="hardswish", padding=(2, 1, 0, 3)), "relu"),
}
by_behind = pytest.mark.parametrize(("spec", "activation"), BEHIND_STEMS.values(), ids=BEHIND_STEMS)


@by_precision
@by_behind
def test_stem(kernels, spec, activation, precision):
    """As planned, and in tiles that do not fit; images of both formats and any number of channels."""
    for i, (channels, size) in enumerate([(3, (33, 30)), (1, (12, 11)), (4, (7, 16)), (2, (9, 10))]):
        stem, weights = stem_of(spec, channels, activation, bias=20 if i == 2 else 1), random_weights(spec)
        x = image_of(2, channels, size, precision)
        if i % 2:
            x = x.to(memory_format=torch.channels_last)
        check(kernels, x, weights, spec, precision, stem)
        forced = {"tile_rows": 3, "tile_cols": 5, "splits": 1 + (i % 2 if spec.in_channels > 16 else 0)}
        check(kernels, x, weights, spec, precision, stem, **forced)


@by_precision
def test_stem_of_small_images(kernels, precision):
    spec = BlockSpec(32, 32, 16, expand=False)
    stem, weights = stem_of(spec, 3), random_weights(spec)
    for size in ((1, 1), (1, 6), (5, 2), (8, 8)):
        x = image_of(5, 3, size, precision)
        check(kernels, x, weights, spec, precision, stem)
        check(kernels, x, weights, spec, precision, stem, images=3, tile_rows=8, tile_cols=8, strip_rows=2)


@by_precision
@by_behind
def test_non_finite_pixels_spread_through_a_stem_as_in_eager(kernels, spec, activation, precision):
    """Also into no window beside those that they lie in, at any column and border."""
    stem, weights = stem_of(spec, 3, activation), random_weights(spec)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        for where in ((0, 0, 0, 0), (1, 2, 6, 7), (1, 1, 8, 4 + i), (0, 1, 3, 11)):
            x = image_of(2, 3, (9, 12), precision)
            x[where] = value
            assert spreads(kernels, x, weights, spec, precision, stem, tile_rows=2, tile_cols=3)


@by_precision
def test_views_in_front_of_a_stem(kernels, precision):
    spec = BlockSpec(32, 32, 16, expand=False)
    stem, weights = stem_of(spec, 3), random_weights(spec)
    whole = image_of(4, 6, (24, 30), precision)
    views = [
        whole[::2, ::2, ::2, 3::2],
        whole[:, :3].transpose(2, 3),
        whole[:1, 2:5].expand(3, -1, -1, -1),
        whole[:, :1].expand(-1, 3, -1, -1),
    ]
    for x in views:
        check(kernels, x, weights, spec, precision, stem, tile_rows=4, tile_cols=4)


@by_precision
def test_shared_memory_in_front_of_a_stem_is_what_the_plan_says(kernels, precision):
    spec = BlockSpec(32, 32, 16, expand=False)
    stem, weights, x = stem_of(spec, 3), random_weights(spec), image_of(1, 3, (12, 10), precision)
    plan = planned(spec, x, precision, stem, tile_rows=6, tile_cols=5)
    packed = pack(weights, x.dtype, "cuda")
    packed = packed._replace(**dict(zip(("w_expand", "b_expand"), fold.pack_stem(*stem[:2], x.dtype), strict=True)))
    less = dataclasses.replace(plan, shared_bytes=plan.shared_bytes - 16)
    emulated_inverted_residual(kernels[precision], x, packed, spec, plan, stem="relu6")
    with pytest.raises(RuntimeError, match=r"of shared memory at .*, outside its"):
        emulated_inverted_residual(kernels[precision], x, packed, spec, less, stem="relu6")


@by_precision
@pytest.mark.parametrize("stem", [True, False], ids=["stem", "no stem"])
def test_blocks_in_a_row(kernels, precision, stem):
    """Weights joined, results in one memory between them: what blocks give one by one, to the bit."""
    front = BlockSpec(32, 32, 16, expand=False)
    specs = [
        *([front] if stem else []),
        BlockSpec(16, 96, 24, 2),
        BlockSpec(24, 70, 24, residual=True),
        BlockSpec(24, 40, 20, activation="hardswish", kernel=5, squeeze_channels=7),
        BlockSpec(20, 20, 33, expand=False, out_activation="relu"),
        BlockSpec(33, 50, 12, 2),
    ]
    dtype = PRECISIONS[precision][1]
    first = stem_of(front, 3) if stem else None
    image = image_of(2, 3, (21, 19), precision) if stem else input_of(specs[0], 2, (11, 10), precision)
    x, rows, plans = image, [], []
    for i, spec in enumerate(specs):
        weights = random_weights(spec, seed=i)
        packed = pack(weights, dtype, "cuda")
        before = first if i == 0 else None
        if before is not None:
            packed = packed._replace(
                **dict(zip(("w_expand", "b_expand"), fold.pack_stem(*before[:2], dtype), strict=True))
            )
        rows += [t for t in packed if t is not None]
        options = {"splits": 2} if i % 2 else {}
        plans.append(planned(spec, x, precision, before, **options))
        x = emulated(kernels, x, weights, spec, precision, stem=before, **options)
    y = emulated_sequence(kernels[precision], image, join(rows), specs, plans, first and "relu6")
    assert torch.equal(y, x)
    with pytest.raises(RuntimeError, match=r"weights\(\) is not what is joined"):
        emulated_sequence(kernels[precision], image, join(rows)[:-64], specs, plans, first and "relu6")


@by_precision
@pytest.mark.parametrize(
    "spec", [PADDED, WIDE, STRIDED, UNEXPANDED, OUT_BLOCKS, UNEVEN, DILATED, FIVE, SQUEEZED], ids=str
)
def test_nothing_is_noticed_of_the_kernel_itself(kernels, spec, precision):
    assert not noticed(kernels[precision], spec, precision)


@by_precision
@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
def test_nothing_is_noticed_of_the_kernel_behind_a_stem(kernels, activation, precision):
    assert not noticed(kernels[precision], STEMMED, precision, activation)
