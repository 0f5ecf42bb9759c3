"""Layers in a row as one call: the op."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.devices import ISAS, by_isa
from support.inputs import channels_last, image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mnv2_fused import BlockSpec, inverted_residual_reference, pack
from mnv2_fused.activations import ACTIVATIONS, GATES, function_of, slope_bits
from mnv2_fused.encoding import LayerKind
from mnv2_fused.fold import pack_conv
from mnv2_fused.sequence.weights import join
from mnv2_fused.testing import (
    agreement,
    instruction_set,
    random_weights,
    threads,
)

op = torch.ops.mnv2_fused.sequence
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
poisoned = pytest.mark.usefixtures("poison")
pytestmark = pytest.mark.usefixtures("nothing_records")


class OpLayer(NamedTuple):
    """One layer as the op takes it, and in torch's own ops."""

    geometry: tuple[int, ...]
    packed: Callable[[torch.dtype], list[Tensor]]
    eager: Callable[[Tensor], Tensor]


def conv_weights(c_out, c_in, kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(c_out, c_in, kernel, kernel, generator=generator, dtype=torch.float64)
    return weight / (c_in * kernel**2) ** 0.5, torch.randn(c_out, generator=generator, dtype=torch.float64)


def further(spec, stem="relu6"):
    """What follows of a block that is not MobileNetV2's."""
    padding = [-1] * 4 if spec.padding == "same" else spec.padding_of(5, 5)
    of_squeeze = spec.squeeze_channels, ACTIVATIONS.index(spec.squeeze_activation), GATES.index(spec.gate)
    activations = ACTIVATIONS.index(spec.activation), ACTIVATIONS.index(spec.out_activation)
    last = []
    if spec.expand_activation is not None or spec.strides[0] != spec.strides[1] or spec.activates_sum:
        expand = -1 if spec.expand_activation is None else ACTIVATIONS.index(spec.expand_activation)
        last = [expand, spec.strides[1], int(spec.activates_sum)]
    slope = [slope_bits(spec.negative_slope)] if spec.has_slope or last else []
    return [spec.kernel, spec.dilation, *padding, *activations, *of_squeeze, ACTIVATIONS.index(stem), *slope, *last]


def block(spec, seed=0):
    weights = random_weights(spec, seed=seed)
    more = further(spec) if spec.beyond_mobilenet_v2 else []
    return OpLayer(
        (
            LayerKind.BLOCK if spec.expand else LayerKind.BLOCK_WITHOUT_EXPAND,
            *(spec.in_channels, spec.hidden_channels, spec.out_channels, spec.stride, int(spec.residual)),
            *(len(more), *more),
        ),
        lambda dtype: [t for t in pack(weights, dtype) if t is not None],
        lambda x: inverted_residual_reference(x, weights, **spec.geometry),
    )


def stem(c_in, hidden, c_out, stride=1, seed=0, activation="relu6", block_activation="relu6", **options):
    """``options``: of the block behind it."""
    weight, bias = conv_weights(hidden, c_in, 3, seed)
    spec = BlockSpec(hidden, hidden, c_out, stride, expand=False, activation=block_activation, **options)
    behind, act = block(spec, seed), function_of(activation, spec.negative_slope)
    more = further(spec, activation) if spec.beyond_mobilenet_v2 or activation != "relu6" else []
    return OpLayer(
        (LayerKind.STEM_AND_BLOCK, c_in, hidden, c_out, stride, 0, len(more), *more),
        lambda dtype: [*pack_conv(weight, bias, dtype), *behind.packed(dtype)],
        lambda x: behind.eager(act(F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), 2, padding=1))),
    )


def head(c_in, c_out, pool=False, seed=0, activation="relu6", slope=()):
    weight, bias = conv_weights(c_out, c_in, 1, seed)

    def eager(x):
        y = function_of(activation, *slope)(F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype)))
        return F.adaptive_avg_pool2d(y, 1) if pool else y

    kind = LayerKind.POOLED if pool else LayerKind.POINTWISE
    more = [] if activation == "relu6" else [ACTIVATIONS.index(activation), *map(slope_bits, slope)]
    geometry = kind, c_in, 0, c_out, 1, 0, len(more), *more
    return OpLayer(geometry, lambda dtype: list(pack_conv(weight, bias, dtype)), eager)


def linear(c_in, c_out, seed=0, activation="identity"):
    weight, bias = conv_weights(c_out, c_in, 1, seed)

    def eager(x):
        y = F.linear(x.flatten(1), weight[:, :, 0, 0].to(x.dtype), bias.to(x.dtype))
        return function_of(activation)(y)[:, :, None, None]

    more = [] if activation == "identity" else [ACTIVATIONS.index(activation)]
    geometry = LayerKind.LINEAR, c_in, 0, c_out, 1, 0, len(more), *more
    return OpLayer(geometry, lambda dtype: list(pack_conv(weight, bias, dtype)), eager)


def arguments(layers, dtype):
    packed = [t for layer in layers for t in layer.packed(dtype)]
    return join(packed), [v for layer in layers for v in layer.geometry]


def run(layers, x):
    return op(x, *arguments(layers, x.dtype))


def eager(layers, x):
    for layer in layers:
        x = layer.eager(x)
    return x


def check_layers(layers, x):
    """Runs the layers and holds them to the tolerance rule."""
    before = x.clone()
    y = run(layers, x)
    # How far eager is off in a few values is luck: then several images are judged together.
    images = [x] + [image(*x.shape, dtype=x.dtype, seed=seed) for seed in range(2, 10) if y.numel() < 64]
    results = [(run(layers, x), eager(layers, x), eager(layers, x.double())) for x in images]
    found = agreement(*map(torch.cat, zip(*results, strict=True)))
    assert found.ok, f"{[layer.geometry for layer in layers]} on {list(x.shape)}, {x.dtype}: {found}"
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before), "x was written"
    return y


def check_steps(layers, x):
    """Every layer is within the rule for what it is given, and all in one call give the same bits as one by one."""
    y = run(layers, x)
    assert y.dtype == x.dtype
    if x.dtype == torch.float16:  # between layers of one call, nothing is rounded to it
        x = x.float()
    for layer in layers:
        x = check_layers([layer], x)
    assert torch.equal(y, x.to(y.dtype))


CHANNELS = list(itertools.product((1, 3, 4), (8, 16, 24, 32, 33, 48)))
SIZES = (1, 2, 3, 5, 8, 17, 31)


@poisoned
@by_isa
@pytest.mark.parametrize(("c_in", "hidden"), CHANNELS)
def test_stem_channels(c_in, hidden, isa):
    with instruction_set(isa):
        for c_out in (1, 8, 16, 24, 33):
            check_layers([stem(c_in, hidden, c_out)], channels_last(2, c_in, 9, 12))
            check_layers([stem(c_in, hidden, c_out, stride=2)], image(1, c_in, 12, 7))


@pytest.mark.slow
@poisoned
@by_isa
@pytest.mark.parametrize("c_in", [1, 3, 4])
def test_stem_sizes(c_in, isa):
    with instruction_set(isa):
        for height, width in itertools.product(SIZES, SIZES):
            check_layers([stem(c_in, 24, 8)], channels_last(1, c_in, height, width))
            check_layers([stem(c_in, 33, 8, stride=2)], image(1, c_in, height, width))


@poisoned
@by_isa
@pytest.mark.parametrize("pool", [False, True])
def test_head_channels_and_sizes(pool, isa):
    with instruction_set(isa):
        for c_in, c_out in itertools.product((1, 7, 24), (1, 15, 16, 17, 40, 100)):
            check_layers([head(c_in, c_out, pool)], channels_last(2, c_in, 5, 4))
        for height, width in ((1, 1), (1, 13), (16, 16), (16, 17), (31, 29)):
            for dtype in (torch.float32, torch.bfloat16):
                check_layers([head(24, 40, pool)], channels_last(2, 24, height, width, dtype=dtype))


@poisoned
@by_isa
@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_linear(batch, isa):
    with instruction_set(isa):
        for c_in, c_out in ((1, 1), (33, 10), (100, 33)):
            check_layers([linear(c_in, c_out)], image(batch, c_in, 1, 1))


@poisoned
@by_isa
def test_long_sums(isa):
    """As many terms as the classifier's and a wide network's head have round no worse than eager's."""
    with instruction_set(isa):
        for batch in (1, 4):
            check_layers([linear(1280, 1000)], image(batch, 1280, 1, 1))
            check_layers([head(448, 1792)], channels_last(batch, 448, 7, 7))


@by_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_means_over_many_pixels(activation, isa):
    """Of nearly the same values, where a sum of one pixel after the other loses most."""
    with instruction_set(isa):
        for size in ((5, 33), (16, 16), (34, 60)):
            check_layers([head(3, 40, pool=True, activation=activation)], image(1, 3, *size) / 100)


CHAIN = [
    stem(3, 32, 16),
    block(BlockSpec(16, 96, 24, 2)),
    block(BlockSpec(24, 144, 24, residual=True)),
    block(BlockSpec(24, 24, 33, expand=False)),
    head(33, 200, pool=True),
    linear(200, 11),
]


# What other networks have, each in one of its kinds.
GENERAL = [
    stem(3, 16, 16, 2, activation="hardswish", block_activation="relu", squeeze_channels=8),
    block(BlockSpec(16, 72, 24, 2, kernel=5, activation="relu", padding="same")),
    block(BlockSpec(24, 96, 24, kernel=5, activation="hardswish", squeeze_channels=20, residual=True)),
    block(BlockSpec(24, 48, 34, dilation=2, activation="silu", squeeze_channels=9, gate="sigmoid")),
    block(BlockSpec(34, 34, 40, expand=False, out_activation="relu6", padding=(1, 2, 2, 0))),
    head(40, 100, activation="hardswish"),
    head(100, 200, pool=True, activation="silu"),
    linear(200, 50, activation="hardswish"),
    linear(50, 11),
]
LEAKY = [
    stem(3, 16, 16, 2, activation="leaky_relu", block_activation="leaky_relu", negative_slope=0.3),
    block(BlockSpec(16, 72, 24, 2, activation="gelu", squeeze_channels=5, squeeze_activation="leaky_relu")),
    block(BlockSpec(24, 50, 24, residual=True, activation="gelu_tanh", out_activation="leaky_relu", negative_slope=-3)),
    head(24, 100, activation="leaky_relu", slope=(0.2,)),
    head(100, 200, pool=True, activation="gelu"),
    linear(200, 50, activation="leaky_relu"),
    linear(50, 11, activation="gelu_tanh"),
]
CHAINS = {"MobileNetV2": CHAIN, "others": GENERAL, "slopes": LEAKY}
by_length = pytest.mark.parametrize(
    ("name", "length"), [(name, i + 1) for name, chain in CHAINS.items() for i in range(len(chain))]
)


@poisoned
@by_isa
@by_dtype
@by_length
def test_a_whole_network(name, length, isa, dtype):
    with instruction_set(isa):
        check_steps(CHAINS[name][:length], image(2, 3, 35, 30, dtype=dtype))


@pytest.mark.slow
@poisoned
@by_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_beside_blocks(activation, isa):
    with instruction_set(isa):
        for dtype, size in itertools.product((torch.float32, torch.bfloat16), ((1, 1), (5, 4), (16, 17))):
            x = channels_last(2, 24, *size, dtype=dtype)
            for c_out in (1, 15, 16, 40, 100):
                check_layers([head(24, c_out, activation=activation)], x)
                check_layers([head(24, c_out, pool=True, activation=activation)], x)
                check_layers([linear(24, c_out, activation=activation)], x[:, :, :1, :1])
            rgb = image(2, 3, *size, dtype=dtype)
            check_layers([stem(3, 24, 8, activation=activation)], rgb)
            check_layers([stem(3, 24, 8, 2, activation=activation, kernel=5, padding="same")], rgb)


@pytest.mark.slow
def test_images_that_a_squeeze_and_excite_keeps_apart():
    """More than fit beside each other: the batch runs in parts, the last of them smaller."""
    layers = [block(BlockSpec(8, 160, 8, squeeze_channels=8, residual=True)), head(8, 24, pool=True)]
    x = channels_last(7, 8, 90, 90)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(check_layers(layers, x), torch.cat([run(layers, one) for one in x.split(1)]))


VIEWS = {
    "channels_last": lambda n, c: channels_last(n, c, 9, 11),
    "nchw": lambda n, c: image(n, c, 9, 11),
    "offset": lambda n, c: image(c * 81 + 3)[3:].view(1, 9, 9, c).permute(0, 3, 1, 2),
    "cropped": lambda n, c: channels_last(n, c, 20, 20)[:, :, 3:12, 5:16],
    "cropped nchw": lambda n, c: image(n, c, 20, 20)[:, :, 3:12, 5:16],
    "channel slice": lambda n, c: channels_last(n, c + 5, 9, 9)[:, 2 : 2 + c],
    "channel slice nchw": lambda n, c: image(n, c + 5, 9, 9)[:, 2 : 2 + c],
    "every second channel": lambda n, c: channels_last(n, 2 * c, 9, 9)[:, ::2],
    "every second pixel": lambda n, c: channels_last(n, c, 19, 17)[:, :, ::2, ::3],
    "every second pixel nchw": lambda n, c: image(n, c, 19, 17)[:, :, ::2, ::3],
    "batch expanded": lambda n, c: channels_last(1, c, 9, 9).expand(n, c, 9, 9),
    "batch expanded nchw": lambda n, c: image(1, c, 9, 9).expand(n, c, 9, 9),
    "rows expanded": lambda n, c: image(n, c, 1, 9).expand(n, c, 9, 9),
    "channels expanded": lambda n, c: image(n, 1, 9, 9).expand(n, c, 9, 9),
    "one value": lambda n, c: torch.tensor(0.7).expand(n, c, 9, 9),
    "transposed": lambda n, c: channels_last(n, c, 7, 9).transpose(2, 3),
    "batch innermost": lambda n, c: image(c, 9, 9, n).permute(3, 0, 1, 2),
    "overlapping windows": lambda n, c: image(4000).as_strided((n, c, 9, 9), (30, 1, 24, 3)),
    "negated lazily": lambda n, c: torch.imag(torch.randn(n, c, 9, 9, dtype=torch.complex64).conj()),
}


@poisoned
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    check_layers([stem(3, 24, 8)], view(2, 3))
    check_layers([stem(1, 8, 3), head(3, 20)], view(2, 1))
    check_layers([block(BlockSpec(8, 48, 8, residual=True)), head(8, 20, pool=True)], view(2, 8))
    check_layers([head(8, 20)], view(2, 8))
    check_layers([linear(8, 20)], view(2, 8)[:, :, 4:5, 4:5])


@by_dtype
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@by_length
def test_empty_batch(name, length, dtype, memory_format):
    layers, x = CHAINS[name][:length], torch.empty(0, 3, 35, 30, dtype=dtype).to(memory_format=memory_format)
    y = run(layers, x)
    assert (y.shape, y.dtype) == (eager(layers, x).shape, dtype)


@st.composite
def options(draw, residual, stride):
    """What of a block may not be MobileNetV2's."""
    if draw(st.booleans()):
        return {}
    found = {"kernel": draw(st.sampled_from([3, 5, 7])), "activation": draw(st.sampled_from(ACTIVATIONS))}
    found["dilation"] = draw(st.integers(1, 3)) if stride == 1 else 1
    found["out_activation"] = draw(st.sampled_from(ACTIVATIONS))
    if draw(st.booleans()):
        found["expand_activation"], found["activates_sum"] = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    if not residual:
        most = found["dilation"] * (found["kernel"] - 1)
        pads = st.tuples(*[st.integers(0, most)] * 2)  # what is cut off on one side is padded on the other
        left, top = draw(pads)
        found["padding"] = draw(st.sampled_from([None, "same", (left, most - left, top, most - top)]))
    if draw(st.booleans()):
        found["squeeze_channels"] = draw(st.integers(1, 20))
        found["squeeze_activation"] = draw(st.sampled_from(ACTIVATIONS))
        found["gate"] = draw(st.sampled_from(GATES))
    return found


@st.composite
def chains(draw):
    """Layers in a row, and the shape they take."""
    channels = first = draw(st.integers(1, 40))
    layers = []
    if draw(st.booleans()):
        first, channels, stride = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 2]))
        more = draw(options(False, stride))
        act = draw(st.sampled_from(ACTIVATIONS)) if more else "relu6"
        more = {"block_activation" if name == "activation" else name: value for name, value in more.items()}
        layers.append(stem(first, draw(st.integers(1, 50)), channels, stride, activation=act, **more))
    for seed in range(draw(st.integers(0 if layers else 1, 4))):
        expand, residual = draw(st.booleans()), draw(st.booleans())
        hidden = draw(st.integers(1, 100)) if expand else channels
        c_out = channels if residual else draw(st.integers(1, 40))
        stride = 1 if residual else draw(st.sampled_from([1, 2]))
        more = draw(options(residual, stride))
        layers.append(block(BlockSpec(channels, hidden, c_out, stride, expand=expand, residual=residual, **more), seed))
        channels = c_out
    ending = draw(st.sampled_from(["none", "head", "pooled", "linear"]))
    if ending != "none":
        c_out = draw(st.integers(1, 90))
        layers.append(head(channels, c_out, pool=ending != "head", activation=draw(st.sampled_from(ACTIVATIONS))))
        if ending == "linear":
            layers.append(linear(c_out, draw(st.integers(1, 40)), activation=draw(st.sampled_from(ACTIVATIONS))))
    shape = draw(st.integers(1, 3)), first, draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return layers, shape


@poisoned
@given(
    chains(),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(ISAS),
    st.integers(1, 4),
)
def test_any_chain(chain, memory_format, dtype, isa, count):
    layers, shape = chain
    with instruction_set(isa), threads(count):
        check_steps(layers, image(*shape, dtype=dtype).to(memory_format=memory_format))


@pytest.mark.slow
@poisoned
@by_isa
@by_length
def test_threads_and_batch_do_not_change_a_bit(name, length, isa):
    layers, x = CHAINS[name][:length], channels_last(5, 3, 63, 45)
    with instruction_set(isa):
        results = []
        for count in (1, 2, 3, 4, 5):
            with threads(count):
                results += [run(layers, x), torch.cat([run(layers, one) for one in x.split(1)])]
        assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("c_out", [40, 320, 1280])
def test_a_pooled_head_sums_in_one_order_on_any_number_of_threads(c_out):
    layers, x = [head(24, c_out, pool=True)], channels_last(1, 24, 7, 7)
    results = []
    for count in (1, 2, 3, 4, 5, 7):
        with threads(count):
            results.append(run(layers, x))
    assert all(torch.equal(y, results[0]) for y in results)


@poisoned
@by_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_non_finite_values_spread_as_in_eager(value, isa):
    cases = [
        ([stem(3, 24, 8)], 3),
        ([stem(3, 24, 8), block(BlockSpec(8, 48, 8, residual=True))], 3),
        ([head(8, 20)], 8),
        ([block(BlockSpec(8, 48, 8, residual=True)), head(8, 20, pool=True), linear(20, 5)], 8),
    ]
    for (layers, channels), where in itertools.product(cases, ((0, 0, 0, 0), (1, 2, 4, 5), (1, 1, 8, 9))):
        x = channels_last(2, channels, 9, 10)
        x[where] = value
        with instruction_set(isa):
            y = run(layers, x)
        expected = eager(layers, x)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        torch.testing.assert_close(y, expected, equal_nan=True)


@by_isa
def test_non_finite_values_pass_a_linear_layer(isa):
    x = image(4, 20, 1, 1)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    with instruction_set(isa):
        y = run([linear(20, 9)], x)
    torch.testing.assert_close(y, eager([linear(20, 9)], x), equal_nan=True)


def fails(parts, *given):
    """The op raises RuntimeError, and the message says all of it."""
    with pytest.raises(RuntimeError) as raised:
        op(*given)
    for part in parts:
        assert part in str(raised.value), raised.value


BLOCK = block(BlockSpec(8, 48, 8, residual=True))
WEIGHTS, LAYERS = arguments([BLOCK], torch.float32)


@pytest.mark.parametrize("layers", [[], [0], [0, 8, 48], LAYERS[:-1], [*LAYERS, 0]], ids=str)
def test_a_wrong_number_of_layer_values(layers):
    fails(["layers must hold"], image(1, 8, 9, 9), WEIGHTS, layers)


@pytest.mark.parametrize("kind", [-1, 6, 2**62, -(2**62)])
def test_an_unknown_kind(kind):
    fails(["kind must be 0 to 5", f"got {kind}"], image(1, 8, 9, 9), WEIGHTS, [kind, *LAYERS[1:]])


@pytest.mark.parametrize("layer", [stem(3, 24, 8), BLOCK, head(8, 20), head(8, 20, pool=True), linear(8, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_wrong_number_of_bytes(layer, dtype):
    x = image(1, 3 if layer.geometry[0] == LayerKind.STEM_AND_BLOCK else 8, 1, 1, dtype=dtype)
    weights, layers = arguments([layer], dtype)
    for bytes_given in (weights[:0], weights[:-64], weights[:-1], torch.cat([weights, weights])):
        fails(
            [f"take {len(weights)} bytes", f"got {len(bytes_given)}", "sequence.weights.join"], x, bytes_given, layers
        )
    with pytest.raises(RuntimeError, match=r"take \d+ bytes"):
        op(x, weights, layers * 2 if layer is BLOCK else [*layers[:3], layers[3] + 16, *layers[4:]])


def test_weights_must_be_one_row_of_bytes():
    x = image(1, 8, 9, 9)
    for wrong in (WEIGHTS[None], WEIGHTS.float(), torch.cat([WEIGHTS, WEIGHTS])[::2], WEIGHTS[0]):
        fails(["one contiguous row of bytes", "sequence.weights.join"], x, wrong, LAYERS)


def test_join_aligns_every_tensor():
    parts = [torch.arange(n, dtype=dtype) for n, dtype in ((3, torch.float32), (1, torch.bfloat16), (9, torch.float64))]
    joined = join(parts)
    assert joined.data_ptr() % 64 == 0 and joined.shape == (64 + 64 + 128,)
    for part, begin in zip(parts, (0, 64, 128), strict=True):
        end = begin + part.nbytes
        assert torch.equal(joined[begin:end].view(part.dtype), part)
    assert joined[12:64].eq(0).all() and joined[66:128].eq(0).all() and joined[200:].eq(0).all()


def test_bfloat16_takes_an_even_number_of_expanded_channels():
    weights, layers = arguments([block(BlockSpec(8, 49, 8))], torch.bfloat16)
    x = image(1, 8, 9, 9, dtype=torch.bfloat16)
    fails(["hidden_channels must be even for bfloat16, got 49"], x, weights, layers)


BAD_X = {
    "3-D": (lambda: image(8, 9, 9), ["[N, C_in, H, W]", "[8, 9, 9]", "x[None]"]),
    "2-D": (lambda: image(9, 9), ["[N, C_in, H, W]", "[9, 9]"]),
    "5-D": (lambda: image(1, 8, 9, 9, 1), ["[N, C_in, H, W]"]),
    "channels": (lambda: image(1, 3, 9, 9), ["x must have 8 channels, got 3"]),
    "no channels": (lambda: image(1, 0, 9, 9), ["x must have 8 channels, got 0"]),
    "no rows": (lambda: image(1, 8, 0, 9), ["height must be at least 1, got 0"]),
    "no columns": (lambda: image(1, 8, 9, 0), ["width must be at least 1, got 0"]),
    "integer": (lambda: torch.ones(1, 8, 9, 9, dtype=torch.int32), ["x.float()"]),
    "bool": (lambda: torch.ones(1, 8, 9, 9).bool(), ["x.float()"]),
    "complex": (lambda: image(1, 8, 9, 9) + 0j, ["x.float()"]),
    "float64": (lambda: image(1, 8, 9, 9).double(), ["bytes of weights for x of this dtype", "sequence.weights.join"]),
    "bfloat16": (
        lambda: image(1, 8, 9, 9).bfloat16(),
        ["bytes of weights for x of this dtype", "sequence.weights.join"],
    ),
}


@pytest.mark.parametrize(("make", "parts"), BAD_X.values(), ids=BAD_X)
def test_bad_x(make, parts):
    fails(["mnv2_fused::sequence", *parts], make(), WEIGHTS, LAYERS)


@pytest.mark.parametrize("layer", [stem(3, 24, 8), head(8, 20), head(8, 20, pool=True), linear(8, 20)])
def test_bad_x_to_other_layers(layer):
    weights, layers = arguments([layer], torch.float32)
    channels = 3 if layer.geometry[0] == LayerKind.STEM_AND_BLOCK else 8
    fails([f"[1, {channels}, 0, 1]"], image(1, channels, 0, 1), weights, layers)
    fails([f"[1, {channels}, 1, 0]"], image(1, channels, 1, 0), weights, layers)
    fails(["must"], image(1, channels + 1, 1, 1), weights, layers)
    fails(["[N, C_in, H, W]"], image(channels, 1, 1), weights, layers)
    fails(["x.float()"], torch.ones(1, channels, 1, 1, dtype=torch.int64), weights, layers)


def test_weights_on_another_device():
    with pytest.raises(RuntimeError, match="meta"):
        op(image(1, 8, 9, 9), WEIGHTS.to("meta"), LAYERS)


@pytest.mark.parametrize("stride", [0, 3, -1, 2**62])
def test_a_wrong_stride(stride):
    fails([f"stride must be 1 or 2, got {stride}"], image(1, 8, 9, 9), WEIGHTS, [*LAYERS[:4], stride, 0, 0])
    more = [*LAYERS[:4], stride, 0, *OTHER_LAYERS[6:]]
    fails([f"stride must be 1 or 2, got {stride}"], image(1, 8, 9, 9), OTHER_WEIGHTS, more)


OTHER = block(BlockSpec(8, 48, 8, kernel=5, padding="same", squeeze_channels=4))
OTHER_WEIGHTS, OTHER_LAYERS = arguments([OTHER], torch.float32)
BAD_FURTHER = {
    "kernel": (0, 4, "kernel must be 3, 5 or 7, got 4"),
    "dilation": (1, 0, "dilation must be 1 to 2^16, got 0"),
    "left": (2, 5, "padding must be 0 to 4, got 5"),
    "right": (3, -2, "padding must be 0 to 4, got -2"),
    "top": (4, 2**62, "padding must be 0 to 4"),
    "bottom": (5, -(2**63), "padding must be 0 to 4"),
    "activation": (6, 8, "activation must be 0 to 7 (see mnv2_fused.block), got 8"),
    "of the output": (7, -1, "out_activation must be 0 to 7"),
    "squeeze channels": (8, -1, "squeeze_channels must be at least 0, got -1"),
    "more squeeze channels": (8, 2**62, "channel counts must be at most 2^18"),
    "squeeze activation": (9, 2**62, "squeeze_activation must be 0 to 7"),
    "gate": (10, 3, "gate must be 0 to 2"),
    "of a stem": (11, 9, "stem activation must be 0 to 7"),
}


@pytest.mark.parametrize(("at", "value", "part"), BAD_FURTHER.values(), ids=BAD_FURTHER)
def test_wrong_further_values(at, value, part):
    values = [*OTHER_LAYERS[:9], 2, 2, 2, 2, *OTHER_LAYERS[13:]]
    values[7 + at] = value
    fails([part], image(1, 8, 9, 9), OTHER_WEIGHTS, values)


@pytest.mark.parametrize("count", [1, 11, -1, 2**62, -(2**63)])
def test_a_wrong_number_of_further_values(count):
    fails(["values"], image(1, 8, 9, 9), OTHER_WEIGHTS, [*OTHER_LAYERS[:6], count, *OTHER_LAYERS[7:]])
    weights, layers = arguments([head(8, 20)], torch.float32)
    fails(["0, 1 or 2 further values, got 3"], image(1, 8, 9, 9), weights, [*layers[:6], 3, 0, 0, 0])
    fails(["activation must be 0 to 7"], image(1, 8, 9, 9), weights, [*layers[:6], 1, 8])
    infinite = slope_bits(float("inf"))
    fails(["negative_slope must be finite, got inf"], image(1, 8, 9, 9), weights, [*layers[:6], 2, 5, infinite])


def test_the_number_of_squeeze_channels_is_that_of_the_weights():
    fails(["bytes of weights"], image(1, 8, 9, 9), OTHER_WEIGHTS, [*OTHER_LAYERS[:15], 20, *OTHER_LAYERS[16:]])


@pytest.mark.parametrize("layer", [stem(3, 24, 8), block(BlockSpec(8, 48, 9)), head(8, 20), linear(8, 20)])
@pytest.mark.parametrize("channels", [0, -1, 33, 2**62, 2**63 - 1, -(2**63)])
def test_wrong_channels(layer, channels):
    x = image(1, layer.geometry[1], 1, 1)
    weights, layers = arguments([layer], torch.float32)
    with pytest.raises(RuntimeError, match=r"must be|take \d+ bytes"):
        op(x, weights, [*layers[:3], channels, *layers[4:]])
    if layer.geometry[0] in (LayerKind.BLOCK, LayerKind.STEM_AND_BLOCK):
        with pytest.raises(RuntimeError, match=r"must be|take \d+ bytes"):
            op(x, weights, [*layers[:2], channels, *layers[3:]])
    fails([f"x must have {channels} channels, got {x.shape[1]}"], x, weights, [layers[0], channels, *layers[2:]])


def test_a_residual_where_none_can_be():
    fails(["residual needs stride 1"], image(1, 8, 9, 9), WEIGHTS, [*LAYERS[:4], 2, 1, 0])
    weights, layers = arguments([stem(3, 24, 3)], torch.float32)
    fails(["stem", "no residual"], image(1, 3, 9, 9), weights, [*layers[:5], 1, 0])


@pytest.mark.parametrize("before", [[], [head(8, 8)], [BLOCK]])
def test_linear_after_a_map(before):
    weights, layers = arguments([*before, linear(8, 5)], torch.float32)
    fails(["linear", "one pixel", "[1, 8, 2, 3]"], image(1, 8, 2, 3), weights, layers)


def test_layers_that_do_not_follow_each_other():
    weights, layers = arguments([head(8, 20), BLOCK], torch.float32)
    fails(["x must have 8 channels, got 20"], image(1, 8, 9, 9), weights, layers)


@by_length
def test_fake_results_look_like_real_ones(name, length):
    for dtype in (torch.float32, torch.bfloat16):
        weights, layers = arguments(CHAINS[name][:length], dtype)
        for n, height, width in ((2, 17, 12), (1, 1, 1), (3, 1, 9), (0, 5, 5)):
            for x in (image(n, 3, height, width, dtype=dtype), channels_last(n, 3, height, width, dtype=dtype)):
                real = op(x, weights, layers)
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    fake = op(mode.from_tensor(x), weights, layers)
                described = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in (real, fake)]
                assert described[0] == described[1], f"{layers} on {list(x.shape)}"


@by_length
def test_opcheck(name, length):
    weights, layers = arguments(CHAINS[name][:length], torch.float32)
    torch.library.opcheck(op.default, (image(2, 3, 12, 9), weights, layers))


def test_backward_says_that_there_is_none():
    weights, layers = arguments([head(8, 20)], torch.float32)
    with torch.enable_grad():
        y = op(image(1, 8, 5, 5).requires_grad_(), weights, layers)
        with pytest.raises(RuntimeError, match=r"sequence has no derivative.*torch\.no_grad"):
            y.sum().backward()


@by_dtype
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_layers_as_a_tensor_give_the_same_bits(flat, batch, dtype):
    x, layers = image(batch, 3, 9, 12, dtype=dtype), [stem(3, 16, 8), head(8, 16, pool=True), linear(16, 10)]
    weights, geometry = arguments(layers, dtype)
    y = torch.ops.mnv2_fused.sequence_row(x, weights, torch.tensor(geometry), flat)
    expected = op(x, weights, geometry)
    assert torch.equal(y, expected.flatten(1) if flat else expected)
    assert flat or y.is_contiguous(memory_format=torch.channels_last)


def test_flat_is_for_one_pixel_an_image():
    weights, geometry = arguments([stem(3, 16, 8), head(8, 16)], torch.float32)
    with pytest.raises(RuntimeError, match=r"flat is for a result of one pixel an image, this one is \[1, 16, 5, 6\]"):
        torch.ops.mnv2_fused.sequence_row(image(1, 3, 9, 12), weights, torch.tensor(geometry), True)


@pytest.mark.parametrize(
    "layers", [torch.zeros(7), torch.zeros(2, 7, dtype=torch.int64), torch.zeros(14, dtype=torch.int64)[::2]]
)
def test_layers_that_are_no_row_of_int64(layers):
    with pytest.raises(RuntimeError, match="layers must be one contiguous row of int64"):
        torch.ops.mnv2_fused.sequence_row(image(1, 3, 9, 12), torch.zeros(64, dtype=torch.uint8), layers, False)
