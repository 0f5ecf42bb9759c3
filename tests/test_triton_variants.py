"""What the Triton kernel takes beyond MobileNetV2's block: 5x5, dilation, padding, activations, squeeze-and-excite.

As in test_triton.py: on a GPU where there is one, else in Triton's interpreter, which test_in_the_interpreter starts.
"""

import itertools
import random

import pytest
import torch
from test_block import random_input
from test_triton import DEVICE, DTYPES, FORMATS, forced, kernel, mutated, quick_interpreter  # noqa: F401

from mnv2_fused import BlockSpec, inverted_residual, inverted_residual_reference, pack, triton_plan
from mnv2_fused.fold import BlockWeights
from mnv2_fused.plans.triton import TILES
from mnv2_fused.spec import ACTIVATIONS, GATES
from mnv2_fused.testing import agreement

pytestmark = pytest.mark.usefixtures("poison")

OPTIONS = {
    "kernel": (3, 5),
    "stride": (1, 2),
    "dilation": (1, 2, 3),
    "padding": (None, "same", "uneven"),
    "activation": ACTIVATIONS,
    "out_activation": ACTIVATIONS,
    "squeeze": (None, *zip(("relu", "silu"), GATES, strict=True)),
    "residual": (False, True),
    "expand": (False, True),
    "dtype": DTYPES,
}


def spec_of(kernel, stride, dilation, padding, activation, out_activation, squeeze, residual, expand, **_):
    """A block with these options, of channels that fill no panel; None where they exclude each other."""
    if stride > 1 and (dilation > 1 or residual):
        return None
    if padding == "uneven":  # what a residual needs, or any
        most = dilation * (kernel - 1)
        padding = (0, most, most - 1, 1) if residual else (1, most, 0, most - 1)
    squeeze_activation, gate = squeeze or ("relu", "hardsigmoid")
    return BlockSpec(
        *(9, 41 if expand else 9, 9 if residual else 21),
        stride=stride,
        expand=expand,
        residual=residual,
        kernel=kernel,
        dilation=dilation,
        padding=padding,
        activation=activation,
        out_activation=out_activation,
        squeeze_channels=5 if squeeze else 0,
        squeeze_activation=squeeze_activation,
        gate=gate,
    )


def every_pair():
    """Few combinations in which any two values of two options meet that can."""
    dice = random.Random(0)
    names = list(OPTIONS)

    def pairs(case):
        return set(itertools.combinations(((name, str(case[name])) for name in names), 2))

    def drawn(**fixed):
        return {name: dice.choice(values) for name, values in OPTIONS.items()} | fixed

    left = set()
    for a, b in itertools.combinations(names, 2):
        for first, second in itertools.product(OPTIONS[a], OPTIONS[b]):
            while True:
                case = drawn(**{a: first, b: second})
                if spec_of(**case) is not None:
                    left.add(((a, str(first)), (b, str(second))))
                    break
                if {a, b} <= {"stride", "dilation", "residual"}:
                    break
    found = []
    while left:
        candidates = [case for case in (drawn() for _ in range(60)) if spec_of(**case) is not None]
        best = max(candidates, key=lambda case: len(pairs(case) & left))
        if gained := pairs(best) & left:
            found.append(best)
            left -= gained
    return found


def weights_of(spec, *, expand_bias=3.0, dtype=torch.float64, seed=0):
    """Folded weights that keep activations near unit scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, fan_in=1, scale=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return (values / fan_in**0.5).to(dtype).to(DEVICE)

    e, c_in, c_out, s = spec.hidden_channels, spec.in_channels, spec.out_channels, spec.squeeze_channels
    squeeze = (normal(s, e, 1, 1, fan_in=e), normal(s), normal(e, s, 1, 1, fan_in=s), normal(e, scale=2.0))
    return BlockWeights(
        normal(e, c_in, 1, 1, fan_in=c_in) if spec.expand else None,
        normal(e, scale=expand_bias) if spec.expand else None,
        normal(e, 1, spec.kernel, spec.kernel, fan_in=spec.kernel),
        normal(e),
        normal(c_out, e, 1, 1, fan_in=e),
        normal(c_out),
        *(squeeze if s else ()),
    )


def run(x, weights, spec, plan=None):
    return inverted_residual(x, weights, backend="triton", plan=plan, **spec.geometry)


def verdict(y, x, weights, spec):
    """The tolerance rule."""
    eager = inverted_residual_reference(x, weights, **spec.geometry)
    return agreement(y, eager, inverted_residual_reference(x.double(), weights, **spec.geometry))


def check(x, weights, spec, plan=None):
    before = x.clone()
    y = run(x, weights, spec, plan)
    found = verdict(y, x, weights, spec)
    assert found.ok, f"{spec} on {list(x.shape)}, {x.dtype}: {found}"
    assert y.dtype == x.dtype
    assert torch.equal(x, before), "x was written"
    return y


@kernel
@pytest.mark.parametrize(("i", "case"), list(enumerate(every_pair())), ids=lambda v: v if isinstance(v, int) else "")
def test_every_pair_of_options(i, case):
    """Two images of odd sizes, some of whose patches share a program; configurations and formats take turns."""
    spec, tile = spec_of(**case), TILES[i % len(TILES)]
    x = random_input(spec, 2, (5, 7 - i % 2), dtype=case["dtype"], memory_format=FORMATS[i % 2]).to(DEVICE)
    splits = 1 + i % -(-spec.hidden_channels // tile.group)
    y = check(x, weights_of(spec), spec, forced(spec, x, **tile._asdict() | {"num_stages": 1}, splits=splits))
    assert y.is_contiguous(memory_format=FORMATS[i % 2])


def test_the_pairs_are_there():
    """That the list above leaves out what it claims to hold would show nowhere else."""
    cases = every_pair()
    for a, b in itertools.combinations(("kernel", "padding", "activation", "squeeze", "expand", "dtype"), 2):
        assert {(c[a], c[b]) for c in cases} == set(itertools.product(OPTIONS[a], OPTIONS[b]))
    assert {(c["kernel"], c["dilation"]) for c in cases} == set(itertools.product((3, 5), (1, 2, 3)))
    assert len(cases) < 50


# MobileNetV3's and EfficientNet's own, of smaller channels; and padding as TensorFlow does it.
SPECS = [
    BlockSpec(8, 24, 8, residual=True, kernel=5, activation="hardswish", squeeze_channels=8),
    BlockSpec(
        *(8, 40, 12),
        stride=2,
        kernel=5,
        padding="same",
        activation="silu",
        squeeze_channels=3,
        squeeze_activation="silu",
        gate="sigmoid",
    ),
    BlockSpec(8, 8, 12, expand=False, activation="relu", out_activation="relu"),
    BlockSpec(8, 33, 8, residual=True, kernel=3, dilation=2),
    BlockSpec(8, 20, 12, activation="identity", padding=(2, 0, 1, 0)),
]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@kernel
@by_spec
def test_the_planners_own_choice(spec):
    for dtype in DTYPES:
        check(random_input(spec, 1, (6, 5), dtype=dtype).to(DEVICE), weights_of(spec), spec)


@kernel
@by_spec
@pytest.mark.parametrize("size", [(1, 1), (2, 9)], ids=str)
def test_small_images(spec, size):
    x = random_input(spec, 2, size).to(DEVICE)
    if isinstance(spec.padding, tuple) and min(spec.out_size(*size)) < 1:
        with pytest.raises(ValueError, match="height and width must reach 3"):
            run(x, weights_of(spec), spec)
        return
    check(x, weights_of(spec), spec, forced(spec, x, tile_rows=2, tile_cols=1, group=32))


@kernel
def test_a_dilation_larger_than_the_image():
    spec = BlockSpec(8, 20, 8, kernel=5, dilation=9, activation="relu")
    x = random_input(spec, 2, (6, 11)).to(DEVICE)
    check(x, weights_of(spec), spec, forced(spec, x, tile_rows=2, tile_cols=2, group=32))


@kernel
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_activation", ACTIVATIONS)
def test_residual_adds_x_behind_the_outputs_activation(out_activation, splits):
    """With a projection of zeros the result is the activated bias plus x."""
    spec = BlockSpec(8, 40, 8, residual=True, out_activation=out_activation)
    weights = weights_of(spec)
    weights = weights._replace(w_project=torch.zeros_like(weights.w_project), b_project=weights.b_project * 4)
    x = random_input(spec, 2, (3, 4)).to(DEVICE)
    activated = {
        "relu6": lambda t: t.clamp(0, 6),
        "relu": lambda t: t.clamp(min=0),
        "identity": lambda t: t,
        "hardswish": lambda t: t * (t + 3).clamp(0, 6) / 6,
        "silu": lambda t: t / (1 + torch.exp(-t)),
    }[out_activation](weights.b_project)
    y = run(x, weights, spec, forced(spec, x, group=16, splits=splits))
    torch.testing.assert_close(y.double(), x.double() + activated[:, None, None], rtol=1e-6, atol=1e-6)


@kernel
def test_each_image_has_its_own_gate():
    """27 patches of three images in two programs; an image that is brighter gets other gates."""
    spec = BlockSpec(8, 40, 8, activation="relu", squeeze_channels=6)
    x = random_input(spec, 3, (3, 3)).to(DEVICE) * torch.tensor([0.1, 1.0, 10.0], device=DEVICE).view(3, 1, 1, 1)
    weights = weights_of(spec)
    plan = forced(spec, x, tile_rows=1, tile_cols=1, patches=16, group=16)
    assert plan.programs == 2
    y = check(x, weights, spec, plan)
    for image in range(3):
        alone = x[image : image + 1]
        plan = forced(spec, alone, tile_rows=1, tile_cols=1, patches=16, group=16)
        torch.testing.assert_close(run(alone, weights, spec, plan), y[image : image + 1], rtol=1e-5, atol=1e-5)


@kernel
@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_every_run_gives_the_same_bits(spec):
    x, packed = random_input(spec, 2, (3, 4)).to(DEVICE), pack(weights_of(spec), backend="triton")
    plan = forced(spec, x, tile_rows=1, tile_cols=1, group=16, splits=2)
    assert torch.equal(run(x, packed, spec, plan), run(x, packed, spec, plan))


@kernel
@by_spec
def test_empty_batch(spec):
    x = torch.empty(0, 8, 9, 7, device=DEVICE)
    y, expected = run(x, weights_of(spec), spec), inverted_residual_reference(x, weights_of(spec), **spec.geometry)
    assert y.shape == expected.shape


@kernel
@by_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_eager(value, spec):
    """From two corners of the first image; a squeeze-and-excite spreads them over that image, not into the second."""
    x = random_input(spec, 2, (5, 6)).to(DEVICE)
    x[0, 0, 0, 0] = x[0, 7, 4, 5] = value
    y = run(x, weights_of(spec), spec, forced(spec, x, tile_rows=2, tile_cols=2, group=32))
    expected = inverted_residual_reference(x, weights_of(spec, dtype=torch.float32), **spec.geometry)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y[1].isfinite().all()


def test_padding_is_compiled_once_for_all_sizes():
    """TensorFlow's padding rests on the image's size, the kernel that is compiled does not."""
    triton_launch = pytest.importorskip("mnv2_fused.triton_backend.launch")
    spec, tile = SPECS[1], {"tile_rows": 2, "tile_cols": 2, "patches": 16, "group": 32, "splits": 1}
    compiled, paddings = set(), set()
    for size in range(5, 30):
        plan = triton_plan(spec, (1, 8, size, 31), **tile)
        compiled.add(tuple(triton_launch.constants(plan, spec, False).items()))
        paddings.add(spec.padding_of(size, 31))
    assert len(compiled) == 1 and len(paddings) > 1


# What is changed in the kernels and the block that has to show it.
MUTATIONS = {
    "dilated taps": ("position // RIM_COLS * DILATION - top", "position // RIM_COLS - top", SPECS[3]),
    "dilated outputs": ("o % COLS * DILATION\n            stored", "o % COLS\n            stored", SPECS[3]),
    "rows above": ("* DILATION - top", "* DILATION - left", SPECS[4]),
    "columns before": ("* DILATION - left", "* DILATION - top", SPECS[4]),
    "fifth tap": ("0 <= row < kernel and", "0 <= row < 3 and", SPECS[0]),
    "order of taps": ("return kernel * row + col if", "return 3 * row + col if", SPECS[0]),
    "halo": ("tl.where((cap > 0.0)[:, None], activate(e, ACTIVATION), 0.0)", "activate(e, ACTIVATION)", SPECS[0]),
    "hardswish": ("_relu6(v + 3.0, 6.0)", "_relu6(v + 2.9, 6.0)", SPECS[0]),
    "silu": ("tl.exp(-v)", "tl.exp(-1.05 * v)", SPECS[1]),
    "output's activation": ("result = activate(result, OUT_ACTIVATION)", "pass", SPECS[2]),
    "gate": ("(d[o] * gates)", "(d[o])", SPECS[0]),
    "gate of another image": ("gate + image[:, None] * HIDDEN", "gate + 0 * image[:, None] * HIDDEN", SPECS[0]),
    "border in the pool": ("tl.where(there[:, None], d[o], 0.0)", "d[o]", SPECS[0]),
    "pool of another image": ("tl.program_id(0) // programs * patches +", "0 * programs * patches +", SPECS[0]),
}  # fmt: skip


@kernel
@by_spec
def test_two_contrasts(spec):
    assert of_two_contrasts(spec)


@kernel
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
    return verdict(run(x, weights, spec, forced(spec, x, tile_rows=2, tile_cols=2, group=32)), x, weights, spec).ok


@kernel
def test_a_nan_beside_the_image_of_dilated_taps_is_noticed(tmp_path, monkeypatch):
    """The pixel that a position outside reads need not lie under dilated taps: cutting off would keep its NaN."""
    from mnv2_fused.triton_backend import launch as triton_launch

    spec = SPECS[3]
    x, weights = random_input(spec, 1, (5, 5)).to(DEVICE), weights_of(spec)
    x[0, 0, 0, 2] = float("nan")
    plan = forced(spec, x, tile_rows=2, tile_cols=2, group=64)
    expected = inverted_residual_reference(x, weights, **spec.geometry).isnan()
    assert torch.equal(run(x, weights, spec, plan).isnan(), expected)
    broken = mutated(tmp_path, 'if ACTIVATION == "relu6" and DILATION == 1:', 'if ACTIVATION == "relu6":')
    monkeypatch.setattr(triton_launch, "inverted_residual_kernel", broken.inverted_residual_kernel)
    assert not torch.equal(run(x, weights, spec, plan).isnan(), expected)
