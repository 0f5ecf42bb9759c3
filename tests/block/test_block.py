"""The functional form against its reference: accuracy, padding, residual, determinism, memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.blocks import DETERMINISM_SPECS, PADDING_SPECS
from support.checks import check, run, within
from support.devices import ISAS, by_isa
from support.inputs import MEMORY_FORMATS, by_cpu_dtype, by_memory_format, random_input

from mnv2_fused import BlockSpec, backends, inverted_residual_reference, pack, plan
from mnv2_fused.encoding import shape_of
from mnv2_fused.testing import (
    agreement,
    block_agreement,
    instruction_set,
    mobilenet_v2_blocks,
    random_weights,
    threads,
)

pytestmark = pytest.mark.usefixtures("poison")


def by_block(resolution):
    blocks = mobilenet_v2_blocks(resolution)
    names = [f"{i}: {spec} at {size[0]}" for i, (spec, size) in enumerate(blocks)]
    return pytest.mark.parametrize(("spec", "size"), blocks, ids=names)


def test_poison_reaches_the_ops_own_allocations(poison):
    assert torch.empty(3).isnan().all()
    spec = BlockSpec(8, 48, 8)
    x, packed = random_input(spec, 1, (6, 6)), pack(random_weights(spec))
    backends._C.poison_new_memory(True)  # counts from here
    y = torch.ops.mnv2_fused.inverted_residual(x, *packed, 1, False)
    fields = shape_of(spec, 1, 6, 6)
    scratch = backends._C.plan(fields, threads=torch.get_num_threads(), dtype="float32")["call_bytes"]
    assert backends._C.poison_new_memory(True) == y.nbytes + scratch > y.nbytes


@by_block(224)
@by_memory_format
def test_mobilenet_v2_at_224(spec, size, memory_format):
    y = check(random_input(spec, 1, size, memory_format=memory_format), random_weights(spec), spec)
    assert y.is_contiguous(memory_format=memory_format)


@by_isa
@by_cpu_dtype
@by_block(64)
def test_mobilenet_v2_at_64(spec, size, isa, dtype):
    weights = random_weights(spec)
    with instruction_set(isa):
        for batch in (1, 3):
            for memory_format in MEMORY_FORMATS:
                x = random_input(spec, batch, size, dtype=dtype, memory_format=memory_format)
                y = check(x, weights, spec)
                assert y.is_contiguous(memory_format=memory_format) or y.shape[-2:] == (1, 1)


@st.composite
def cases(draw):
    expand = draw(st.booleans())
    c_in = draw(st.integers(1, 70))
    residual = draw(st.booleans())
    spec = BlockSpec(
        c_in,
        draw(st.integers(1, 200)) if expand else c_in,
        c_in if residual else draw(st.integers(1, 90)),
        1 if residual else draw(st.sampled_from([1, 2])),
        expand=expand,
        residual=residual,
    )
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    forced = None
    if draw(st.booleans()):
        panels = (spec.hidden_channels + 15) // 16
        group = draw(st.integers(1, panels))
        forced = {
            "tile_rows": draw(st.integers(1, (height - 1) // spec.stride + 1)),
            "tile_cols": draw(st.integers(1, (width - 1) // spec.stride + 1)),
            "group": 16 * group,
            "splits": draw(st.integers(1, -(-panels // group))),
        }
    return (
        spec,
        (draw(st.integers(0, 3)), c_in, height, width),
        forced,
        draw(st.sampled_from(MEMORY_FORMATS)),
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.sampled_from(ISAS)),
        draw(st.integers(0, 2**31)),
    )


@given(cases())
def test_any_shape_and_plan(case):
    spec, (batch, _, height, width), forced, memory_format, dtype, isa, seed = case
    weights = random_weights(spec, seed=seed)
    x = random_input(spec, batch, (height, width), dtype=dtype, memory_format=memory_format, seed=seed)
    with instruction_set(isa):
        chosen = forced and plan(spec, x.shape, dtype=dtype, **forced)
        y = run(x, weights, spec, plan=chosen)
    if batch == 0:
        assert y.shape == run(x, weights, spec, backend="eager").shape
        return
    within(y, x, weights, spec)


@by_isa
@pytest.mark.parametrize("large", ["bias", "x"])
def test_what_is_large_is_added_last(large, isa):
    """Or every rounding of the sum would be of its size."""
    size = 2.0**20
    spec = BlockSpec(24, 60, 24, residual=True)
    weights, x = random_weights(spec), random_input(spec, 1, (9, 9))
    if large == "x":
        weights.w_expand.zero_()
        x += size
    else:
        weights.b_project.fill_(size)
    with instruction_set(isa):
        y = run(x, weights, spec, plan=plan(spec, x.shape, group=64))
    reference = inverted_residual_reference(x.double(), weights, residual=True)
    most = size * torch.finfo(x.dtype).eps  # two roundings: of the sum with the bias, and with x
    assert (y - reference).abs().max() <= 1.01 * most


@pytest.mark.parametrize("spec", PADDING_SPECS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5)])
def test_padding_is_of_the_expanded_tensor(spec, size):
    weights, x = random_weights(spec, expand_bias=50), random_input(spec, 2, size)
    check(x, weights, spec)

    # The mistake this guards against, expanding a padded x, must break the rule, or this test is blind.
    w = [t.float() for t in weights[:6]]
    expanded = F.relu6(F.conv2d(F.pad(x, (1, 1, 1, 1)), w[0], w[1]))
    depthwise = F.relu6(F.conv2d(expanded, w[2], w[3], spec.stride, groups=spec.hidden_channels))
    wrong = F.conv2d(depthwise, w[4], w[5])
    assert not block_agreement(wrong + x if spec.residual else wrong, x, weights, spec).ok


@by_isa
@by_cpu_dtype
def test_residual_adds_x_itself(isa, dtype):
    spec = BlockSpec(20, 120, 20, residual=True)
    nothing = random_weights(spec)._replace(
        w_project=torch.zeros(20, 120, 1, 1), b_project=torch.zeros(20, dtype=torch.float64)
    )
    x = random_input(spec, 2, (9, 11), dtype=dtype) * 100
    with instruction_set(isa):
        assert torch.equal(run(x, nothing, spec), x)


def test_nothing_given_is_written():
    spec = BlockSpec(16, 96, 16, residual=True)
    weights = random_weights(spec, dtype=torch.float32)
    # x lies in the same memory as the project weights, packed and not.
    x = weights.w_project.view(1, 16, 12, 8)
    for given_weights in (weights, pack(weights)):
        before = [t.clone() for t in given_weights[:6]]
        check(x, given_weights if given_weights is weights else weights, spec)
        run(x, given_weights, spec)
        assert all(torch.equal(a, b) for a, b in zip(given_weights[:6], before, strict=True))


by_spec = pytest.mark.parametrize("spec", DETERMINISM_SPECS, ids=str)


@by_spec
def test_threads_do_not_change_a_bit(spec):
    weights = pack(random_weights(spec))
    for size in ((28, 28), (5, 61)):
        x = random_input(spec, 3, size)
        results = []
        for count in (1, 2, 3, 4):
            with threads(count):
                results += [run(x, weights, spec) for _ in range(5)]
        assert all(torch.equal(y, results[0]) for y in results)


@by_isa
def test_groups_shared_out_over_threads_do_not_change_a_bit(isa):
    """At 7x7 workers take channel groups instead of tiles; their sums are added in the order one worker would."""
    spec = BlockSpec(160, 960, 160, residual=True)
    weights, x = pack(random_weights(spec)), random_input(spec, 1, (7, 7))
    with instruction_set(isa):
        results, splits = [], []
        for count in (1, 2, 3, 4):
            with threads(count):
                splits.append(plan(spec, x.shape).splits)
                results += [run(x, weights, spec) for _ in range(5)]
        assert splits[0] == 1 and max(splits) > 1
        assert all(torch.equal(y, results[0]) for y in results)


@by_isa
@by_spec
def test_tiles_do_not_change_a_bit(spec, isa):
    """A group's terms are summed apart, so the group decides the last bits; tiles and splits decide none."""
    weights, x = pack(random_weights(spec)), random_input(spec, 2, (17, 19))
    with instruction_set(isa):
        for group in range(16, spec.hidden_channels + 16, 16):
            results = []
            for rows in (1, 2, 3, 9):
                for cols in (1, 4, 10):
                    for splits in {1, -(-spec.hidden_channels // group)}:
                        forced = plan(spec, x.shape, tile_rows=rows, tile_cols=cols, group=group, splits=splits)
                        results.append(run(x, weights, spec, plan=forced))
            assert all(torch.equal(y, results[0]) for y in results), group
            within(results[0], x, random_weights(spec), spec)


@by_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_multiply_add_instruction_sets_agree_to_the_bit(spec, dtype):
    weights, x = pack(random_weights(spec), dtype), random_input(spec, 2, (17, 19), dtype=dtype)
    results = []
    forced = plan(spec, x.shape, dtype=dtype, tile_rows=4, tile_cols=5, group=16)
    for isa in set(ISAS) - {"portable"}:  # which rounds its products
        with instruction_set(isa):
            results.append(run(x, weights, spec, plan=forced))
    assert all(torch.equal(y, results[0]) for y in results)


def test_instruction_set_switches_and_refuses():
    for isa in ISAS:
        with instruction_set(isa):
            assert backends._C.instruction_set() == isa
    with pytest.raises(RuntimeError, match=r"unknown instruction set 'abacus'.*portable"):
        backends._C.set_instruction_set("abacus")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_what_folded_ones_do(dtype):
    spec = BlockSpec(13, 50, 37, stride=2)
    weights, x = random_weights(spec), random_input(spec, 1, (9, 8), dtype=dtype)
    assert torch.equal(run(x, weights, spec), run(x, pack(weights, dtype), spec))
    packed = inverted_residual_reference(x.double(), pack(weights, torch.float64), stride=2)
    torch.testing.assert_close(packed, inverted_residual_reference(x.double(), weights, stride=2))


def test_eager_backend_is_the_reference():
    spec = BlockSpec(8, 48, 8, residual=True)
    weights, x = random_weights(spec), random_input(spec, 2, (9, 9))
    expected = inverted_residual_reference(x, weights, residual=True)
    assert torch.equal(run(x, weights, spec, backend="eager"), expected)


def test_reference_is_the_formula():
    """The reference itself against loops over the definition, so that both cannot be wrong together."""
    spec = BlockSpec(2, 3, 2, residual=True)
    weights = random_weights(spec, expand_bias=3)
    x = random_input(spec, 1, (3, 4), dtype=torch.float64)
    w_e, b_e, w_d, b_d, w_p, b_p = weights[:6]
    y = torch.zeros_like(x)
    for i in range(3):
        for j in range(4):
            for o in range(2):
                total = b_p[o] + x[0, o, i, j]
                for e in range(3):
                    depthwise = b_d[e]
                    for u in (-1, 0, 1):
                        for v in (-1, 0, 1):
                            if 0 <= i + u < 3 and 0 <= j + v < 4:
                                pixel = x[0, :, i + u, j + v] @ w_e[e, :, 0, 0] + b_e[e]
                                depthwise = depthwise + pixel.clamp(0, 6) * w_d[e, 0, u + 1, v + 1]
                    total = total + w_p[o, e, 0, 0] * depthwise.clamp(0, 6)
                y[0, o, i, j] = total
    torch.testing.assert_close(inverted_residual_reference(x, weights, residual=True), y)


def test_agreement_rule_rejects_what_it_should():
    reference = torch.linspace(-3, 3, 50, dtype=torch.float64)
    eager = reference.float()
    assert agreement(eager, eager, reference).ok
    assert not agreement(eager + 1e-5, eager, reference).ok
    assert not agreement(torch.where(eager > 2, float("nan"), eager), eager, reference).ok
    assert not agreement(torch.where(eager > 2, float("inf"), eager), eager, reference).ok
    holed = torch.where(reference > 2, float("nan"), reference)
    assert not agreement(eager, holed.float(), holed).ok
