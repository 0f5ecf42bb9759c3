"""What the Triton kernel takes beyond MobileNetV2's block: 5x5, dilation, padding, activations, squeeze-and-excite.

On a GPU where there is one; else in Triton's interpreter, which test_triton.py::test_in_the_interpreter starts.
"""

import itertools

import pytest
import torch
from support.blocks import GENERAL_SPECS, OPTIONS, every_pair, spec_of
from support.checks import check, run
from support.devices import DEVICE, triton_kernel, weights_on
from support.inputs import GPU_DTYPES, MEMORY_FORMATS, random_input
from support.triton_kernel import forced, mutated

from mnv2_fused import BlockSpec, inverted_residual_reference, pack, triton_plan
from mnv2_fused.plans.triton import TILES, does_not_fit
from mnv2_fused.spec import ACTIVATIONS
from mnv2_fused.testing import block_agreement

pytestmark = pytest.mark.usefixtures("poison")


def weights_of(spec, **options):
    """Weights under which more of the expanded values reach an activation's limits."""
    return weights_on(DEVICE, spec, expand_bias=3, **options)


@triton_kernel
@pytest.mark.parametrize(("i", "case"), list(enumerate(every_pair())), ids=lambda v: v if isinstance(v, int) else "")
def test_every_pair_of_options(i, case):
    """Two images of odd sizes, some of whose patches share a program; configurations and formats take turns."""
    spec, tile = spec_of(**case), TILES[i % len(TILES)]
    x = random_input(spec, 2, (5, 7 - i % 2), dtype=case["dtype"], memory_format=MEMORY_FORMATS[i % 2]).to(DEVICE)
    splits = 1 + i % -(-spec.hidden_channels // tile.group)
    if does_not_fit(spec) is not None:
        assert spec.kernel == 7
        with pytest.raises(RuntimeError, match="no configuration of the Triton kernel fits"):
            run(x, weights_of(spec), spec, backend="triton")
        return
    plan = forced(spec, x, **tile._asdict() | {"num_stages": 1}, splits=splits)
    y = check(x, weights_of(spec), spec, backend="triton", plan=plan)
    assert y.is_contiguous(memory_format=MEMORY_FORMATS[i % 2])


def test_the_pairs_are_there():
    """That the list above leaves out what it claims to hold would show nowhere else."""
    cases = every_pair()
    for a, b in itertools.combinations(("kernel", "padding", "activation", "squeeze", "expand", "dtype"), 2):
        assert {(c[a], c[b]) for c in cases} == set(itertools.product(OPTIONS[a], OPTIONS[b]))
    assert {(c["kernel"], c["dilation"]) for c in cases} == set(itertools.product((3, 5, 7), (1, 2, 3)))
    assert len(cases) < 1.1 * len(ACTIVATIONS) ** 2  # what activation and out_activation alone need


by_spec = pytest.mark.parametrize("spec", GENERAL_SPECS, ids=str)


@triton_kernel
@by_spec
def test_the_planners_own_choice(spec):
    for dtype in GPU_DTYPES:
        check(random_input(spec, 1, (6, 5), dtype=dtype).to(DEVICE), weights_of(spec), spec, backend="triton")


@triton_kernel
@by_spec
@pytest.mark.parametrize("size", [(1, 1), (2, 9)], ids=str)
def test_small_images(spec, size):
    x = random_input(spec, 2, size).to(DEVICE)
    if isinstance(spec.padding, tuple) and min(spec.out_size(*size)) < 1:
        with pytest.raises(ValueError, match="height and width must reach 3"):
            run(x, weights_of(spec), spec, backend="triton")
        return
    check(x, weights_of(spec), spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=1, group=32))


@triton_kernel
def test_a_dilation_larger_than_the_image():
    spec = BlockSpec(8, 20, 8, kernel=5, dilation=9, activation="relu")
    x = random_input(spec, 2, (6, 11)).to(DEVICE)
    check(x, weights_of(spec), spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=2, group=32))


@triton_kernel
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_activation", ACTIVATIONS)
def test_residual_adds_x_behind_the_outputs_activation(out_activation, splits):
    """With a projection of zeros the result is the activated bias plus x."""
    spec = BlockSpec(8, 40, 8, residual=True, out_activation=out_activation, negative_slope=0.25)
    weights = weights_of(spec)
    weights = weights._replace(w_project=torch.zeros_like(weights.w_project), b_project=weights.b_project * 4)
    x = random_input(spec, 2, (3, 4)).to(DEVICE)
    activated = {
        "relu6": lambda t: t.clamp(0, 6),
        "relu": lambda t: t.clamp(min=0),
        "identity": lambda t: t,
        "hardswish": lambda t: t * (t + 3).clamp(0, 6) / 6,
        "silu": lambda t: t / (1 + torch.exp(-t)),
        "leaky_relu": lambda t: t.clamp(min=0) + 0.25 * t.clamp(max=0),
        "gelu": lambda t: t / 2 * (1 + torch.erf(t / 2**0.5)),
        "gelu_tanh": lambda t: t / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))),
    }[out_activation](weights.b_project)
    y = run(x, weights, spec, backend="triton", plan=forced(spec, x, group=16, splits=splits))
    torch.testing.assert_close(y.double(), x.double() + activated[:, None, None], rtol=1e-6, atol=1e-6)


@triton_kernel
def test_each_image_has_its_own_gate():
    """27 patches of three images in two programs; an image that is brighter gets other gates."""
    spec = BlockSpec(8, 40, 8, activation="relu", squeeze_channels=6)
    x = random_input(spec, 3, (3, 3)).to(DEVICE) * torch.tensor([0.1, 1.0, 10.0], device=DEVICE).view(3, 1, 1, 1)
    weights = weights_of(spec)
    plan = forced(spec, x, tile_rows=1, tile_cols=1, patches=16, group=16)
    assert plan.programs == 2
    y = check(x, weights, spec, backend="triton", plan=plan)
    for image in range(3):
        alone = x[image : image + 1]
        plan = forced(spec, alone, tile_rows=1, tile_cols=1, patches=16, group=16)
        found = run(alone, weights, spec, backend="triton", plan=plan)
        torch.testing.assert_close(found, y[image : image + 1], rtol=1e-5, atol=1e-5)


@triton_kernel
@pytest.mark.parametrize("spec", GENERAL_SPECS[:2], ids=str)
def test_every_run_gives_the_same_bits(spec):
    x, packed = random_input(spec, 2, (3, 4)).to(DEVICE), pack(weights_of(spec), backend="triton")
    plan = forced(spec, x, tile_rows=1, tile_cols=1, group=16, splits=2)
    y, again = (run(x, packed, spec, backend="triton", plan=plan) for _ in range(2))
    assert torch.equal(y, again)


@triton_kernel
@by_spec
def test_empty_batch(spec):
    x = torch.empty(0, 8, 9, 7, device=DEVICE)
    weights = weights_of(spec)
    y, expected = (run(x, weights, spec, backend=backend) for backend in ("triton", "eager"))
    assert y.shape == expected.shape


@triton_kernel
@by_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_eager(value, spec):
    """From two corners of the first image; a squeeze-and-excite spreads them over that image, not into the second."""
    x = random_input(spec, 2, (5, 6)).to(DEVICE)
    x[0, 0, 0, 0] = x[0, 7, 4, 5] = value
    y = run(x, weights_of(spec), spec, backend="triton", plan=forced(spec, x, tile_rows=2, tile_cols=2, group=32))
    expected = inverted_residual_reference(x, weights_of(spec, dtype=torch.float32), **spec.geometry)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y[1].isfinite().all()


def test_padding_is_compiled_once_for_all_sizes():
    """TensorFlow's padding rests on the image's size, the kernel that is compiled does not."""
    triton_launch = pytest.importorskip("mnv2_fused.triton_backend.launch")
    spec, tile = GENERAL_SPECS[1], {"tile_rows": 2, "tile_cols": 2, "patches": 16, "group": 32, "splits": 1}
    compiled, paddings = set(), set()
    for size in range(5, 30):
        plan = triton_plan(spec, (1, 8, size, 31), **tile)
        compiled.add(tuple(triton_launch.constants(plan, spec, False).items()))
        paddings.add(spec.padding_of(size, 31))
    assert len(compiled) == 1 and len(paddings) > 1


# What is changed in the kernels and the block that has to show it.
MUTATIONS = {
    "dilated taps": ("position // RIM_COLS * DILATION - top", "position // RIM_COLS - top", GENERAL_SPECS[3]),
    "dilated outputs": ("o % COLS * DILATION\n            stored", "o % COLS\n            stored", GENERAL_SPECS[3]),
    "rows above": ("* DILATION - top", "* DILATION - left", GENERAL_SPECS[4]),
    "columns before": ("* DILATION - left", "* DILATION - top", GENERAL_SPECS[4]),
    "fifth tap": ("0 <= row < kernel and", "0 <= row < 3 and", GENERAL_SPECS[0]),
    "order of taps": ("return kernel * row + col if", "return 3 * row + col if", GENERAL_SPECS[0]),
    "halo": (
        "tl.where((cap > 0.0)[:, None], activate(e, ACTIVATION, NEGATIVE_SLOPE), 0.0)",
        "activate(e, ACTIVATION, NEGATIVE_SLOPE)",
        GENERAL_SPECS[0],
    ),
    "hardswish": ("_relu6(v + 3.0, 6.0)", "_relu6(v + 2.9, 6.0)", GENERAL_SPECS[0]),
    "silu": ("tl.exp(-v)", "tl.exp(-1.05 * v)", GENERAL_SPECS[1]),
    "leaky_relu": ("v * NEGATIVE_SLOPE", "v * 0.01", GENERAL_SPECS[5]),
    "gelu": ("tl.erf(v * 0.707", "tl.erf(v * 0.72", GENERAL_SPECS[6]),
    "gelu_tanh": ("tl.exp(-1.5957691216057308 *", "tl.exp(-1.61 *", GENERAL_SPECS[7]),
    "output's activation": ("                if not ACTIVATES_SUM:", "                if False:", GENERAL_SPECS[2]),
    "activation of the sum": ("                if ACTIVATES_SUM:", "                if False:", GENERAL_SPECS[8]),
    "expansion's activation": ("RAGGED, EXPAND_ACTIVATION, NEG", "RAGGED, ACTIVATION, NEG", GENERAL_SPECS[9]),
    "gate": ("(d[o] * gates)", "(d[o])", GENERAL_SPECS[0]),
    "gate of another image": ("gate + image[:, None] * HIDDEN", "gate + 0 * image[:, None] * HIDDEN", GENERAL_SPECS[0]),
    "border in the pool": ("tl.where(there[:, None], d[o], 0.0)", "d[o]", GENERAL_SPECS[0]),
    "pool of another image": ("tl.program_id(0) // programs * patches +", "0 * programs * patches +", GENERAL_SPECS[0]),
}  # fmt: skip


@triton_kernel
@by_spec
def test_two_contrasts(spec):
    assert of_two_contrasts(spec)


@triton_kernel
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from mnv2_fused.triton_backend import launch as triton_launch

    original, replacement, spec = MUTATIONS[name]
    broken = mutated(tmp_path, original, replacement)
    for kernel_name in ("inverted_residual_kernel", "pool_kernel"):
        monkeypatch.setattr(triton_launch, kernel_name, getattr(broken, kernel_name))
    assert not of_two_contrasts(spec)


def of_two_contrasts(spec):
    """Whether the result on two images, the second of three times the contrast, is within the rule."""
    x, weights = random_input(spec, 2, (5, 5)).to(DEVICE), weights_of(spec)
    x[1] *= 3
    plan = forced(spec, x, tile_rows=2, tile_cols=2, group=32)
    return block_agreement(run(x, weights, spec, backend="triton", plan=plan), x, weights, spec).ok


@triton_kernel
def test_a_nan_beside_the_image_of_dilated_taps_is_noticed(tmp_path, monkeypatch):
    """The pixel that a position outside reads need not lie under dilated taps: cutting off would keep its NaN."""
    from mnv2_fused.triton_backend import launch as triton_launch

    spec = GENERAL_SPECS[3]
    x, weights = random_input(spec, 1, (5, 5)).to(DEVICE), weights_of(spec)
    x[0, 0, 0, 2] = float("nan")
    plan = forced(spec, x, tile_rows=2, tile_cols=2, group=64)
    expected = inverted_residual_reference(x, weights, **spec.geometry).isnan()
    assert torch.equal(run(x, weights, spec, backend="triton", plan=plan).isnan(), expected)
    broken = mutated(tmp_path, 'if ACTIVATION == "relu6" and DILATION == 1:', 'if ACTIVATION == "relu6":')
    monkeypatch.setattr(triton_launch, "inverted_residual_kernel", broken.inverted_residual_kernel)
    assert not torch.equal(run(x, weights, spec, backend="triton", plan=plan).isnan(), expected)
