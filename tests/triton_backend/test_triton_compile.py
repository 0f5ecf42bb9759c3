"""The Triton kernel compiled for GPUs that need not be here: resources, spills, tensor cores."""

import importlib.util
import re

import pytest
import torch
from support.source_tree import BENCHMARKS, make_importable

from mnv2_fused import BlockSpec, backends, triton_plan
from mnv2_fused.testing import mobilenet_v2_blocks

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if backends.triton_interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

make_importable(BENCHMARKS)

from triton_configurations import (  # noqa: E402
    ARCHITECTURES,
    RESULTS,
    compile_adding,
    compile_for,
    compile_pooling,
    compiler,
    digest,
    gpu_with,
)

from mnv2_fused.plans.triton import TILES, best_plans  # noqa: E402

KINDS = {  # dtype, whether products may round to TF32
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}
CASES = [("bfloat16", 80), ("float16", 90), ("float16", 100), ("tf32", 90), ("float32", 90)]
# A few registers that ptxas keeps on the stack outside of the loop; what spills inside of it takes hundreds.
MOST_STACK = 64


def hardest(tile, kind, capability):
    """The block of MobileNetV2 that asks most of this configuration, of those that the planner may run it on."""
    dtype, tf32 = KINDS[kind]
    found = []
    for spec, size in mobilenet_v2_blocks(224):
        for batch in (1, 256):
            shape = (batch, spec.in_channels, *size)
            for plan in best_plans(spec, shape, dtype, tf32, gpu_with(ARCHITECTURES[capability])):
                if plan.tile[:5] == tile[:5]:
                    found.append((plan.registers, plan.shared_bytes, plan.splits == 1, spec, plan))
    return max(found, key=lambda f: f[:3])[3:] if found else None


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "capability"), CASES, ids=[f"{k}-sm_{c}" for k, c in CASES])
@pytest.mark.parametrize("tile", TILES, ids=[f"{t[0]}x{t[1]}-{t[2]}-{t[3]}-{t[4]}" for t in TILES])
def test_fits_and_does_not_spill(tile, kind, capability):
    case = hardest(tile, kind, capability)
    if case is None:
        pytest.skip("the planner runs no block of MobileNetV2 with it: it would spill")
    spec, plan = case
    dtype, tf32 = KINDS[kind]
    fits(compile_for(plan, spec, dtype, capability, tf32), plan, spec, kind, capability)


def fits(found, plan, spec, kind, capability):
    """Holds what a kernel became to what the planner and the other tests rest on."""
    assert found.stack <= MOST_STACK, (spec, plan, found.stack)
    assert found.shared <= plan.shared_bytes + 1024, "the planner expects less than it takes"
    assert found.shared <= ARCHITECTURES[capability]
    products = len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", found.ptx))
    assert (products > 0) == (kind != "float32")
    # Without .NaN a clamp would make numbers of NaNs, which the interpreter does not show.
    clamps = re.findall(r"\b(?:min|max)(\.NaN)?\.(?:ftz\.)?f32", found.ptx)
    assert all(clamps) and (bool(clamps) or spec.activation == "silu")
    assert not re.search(r"\b(?:red|atom)\.", found.ptx), "atomics would make results depend on timing"


SQUEEZE = BlockSpec(40, 120, 40, residual=True, kernel=5, activation="hardswish", squeeze_channels=32)
VARIANTS = [
    (SQUEEZE, "float16", 90),
    (SQUEEZE, "float32", 90),
    (BlockSpec(24, 144, 40, stride=2, kernel=5, padding="same", activation="silu"), "bfloat16", 80),
    (BlockSpec(32, 192, 32, dilation=2, out_activation="relu", squeeze_channels=8), "float16", 100),
    (BlockSpec(32, 192, 32, activation="silu", squeeze_channels=8), "tf32", 90),
    (BlockSpec(32, 32, 16, expand=False, activation="relu", squeeze_channels=8), "float16", 90),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "kind", "capability"), VARIANTS, ids=str)
def test_variants_fit_and_do_not_spill(spec, kind, capability):
    """As the planner runs single images; of a squeeze-and-excite both passes. More of them are in the table."""
    dtype, tf32 = KINDS[kind]
    gpu = gpu_with(ARCHITECTURES[capability])
    plan = triton_plan(spec, (1, spec.in_channels, 28, 28), dtype=dtype, tf32=tf32, gpu=gpu)
    found = compile_for(plan, spec, dtype, capability, tf32)
    fits(found, plan, spec, kind, capability)
    if not spec.squeeze_channels:
        return
    pooling = compile_pooling(plan, spec, dtype, capability, tf32)
    if spec.expand:
        fits(pooling, plan, spec, kind, capability)
    else:
        assert pooling.stack <= MOST_STACK


@pytest.mark.slow
@pytest.mark.parametrize("integers", ["i32", "i64", 1])
def test_every_kind_of_size_compiles(integers):
    """Strides beyond 2^31, and sizes of 1, which triton compiles into the kernel, as of one image of one pixel."""
    for spec in (BlockSpec(24, 144, 24, residual=True), BlockSpec(32, 32, 16, expand=False)):
        for splits in (1, 3):
            if splits <= -(-spec.hidden_channels // 32):
                plan = triton_plan(spec, (1, spec.in_channels, 8, 8), **TILES[-1]._asdict(), splits=splits)
                assert compile_for(plan, spec, torch.float16, 90, integers=integers).stack <= MOST_STACK
        assert compile_adding(spec, torch.float16, 90, integers).stack == 0


def test_the_table_is_of_this_kernel():
    text = RESULTS.read_text()
    if compiler() not in text:
        pytest.skip("made with another triton or Python")
    assert f"sources {digest()}." in text, "run: python benchmarks/triton_configurations.py"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    stack, shared = rows[0].index("stack"), rows[0].index("shared KiB")
    assert len(rows) > 60
    for row in (row for row in rows if row[stack].isdigit()):
        assert int(row[stack]) <= MOST_STACK and int(row[shared]) <= 227, row


def test_every_configuration_is_some_blocks_choice_or_fits_it():
    for tile in TILES:
        assert hardest(tile, "float16", 90) is not None, tile


def test_the_prediction_is_of_this_planner():
    from triton_prediction import NOTES, notes

    assert NOTES.read_text() == notes(), "run: python benchmarks/triton_prediction.py"
