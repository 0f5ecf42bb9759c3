"""Layers in a row as one call: the op, FusedSequential, torchvision's whole model, and when they must not be used."""

import copy
import gc
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from mnv2_fused import BlockSpec, FusedInvertedResidual, fuse, inverted_residual_reference, models, ops, pack, unfuse
from mnv2_fused.block import ACTIVATIONS, GATES, TORCH_ACTIVATIONS
from mnv2_fused.fold import pack_conv
from mnv2_fused.ops import LayerKind
from mnv2_fused.sequence import FusedSequential, join
from mnv2_fused.testing import (
    agreement,
    available_instruction_sets,
    fit_batch_norm,
    instruction_set,
    perturb_batch_norm,
    random_weights,
    threads,
)

op = torch.ops.mnv2_fused.sequence
ISAS = available_instruction_sets()
by_isa = pytest.mark.parametrize("isa", ISAS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
poisoned = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def nothing_records():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# --- the op


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
    return [spec.kernel, spec.dilation, *padding, *activations, *of_squeeze, ACTIVATIONS.index(stem)]


def block(spec, seed=0):
    weights = random_weights(spec, seed=seed)
    more = [] if spec.beyond_mobilenet_v2 is None else further(spec)
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
    behind, act = block(spec, seed), TORCH_ACTIVATIONS[activation]
    more = further(spec, activation) if spec.beyond_mobilenet_v2 or activation != "relu6" else []
    return OpLayer(
        (LayerKind.STEM_AND_BLOCK, c_in, hidden, c_out, stride, 0, len(more), *more),
        lambda dtype: [*pack_conv(weight, bias, dtype), *behind.packed(dtype)],
        lambda x: behind.eager(act(F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), 2, padding=1))),
    )


def head(c_in, c_out, pool=False, seed=0, activation="relu6"):
    weight, bias = conv_weights(c_out, c_in, 1, seed)

    def eager(x):
        y = TORCH_ACTIVATIONS[activation](F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype)))
        return F.adaptive_avg_pool2d(y, 1) if pool else y

    kind = LayerKind.POOLED if pool else LayerKind.POINTWISE
    more = [] if activation == "relu6" else [ACTIVATIONS.index(activation)]
    geometry = kind, c_in, 0, c_out, 1, 0, len(more), *more
    return OpLayer(geometry, lambda dtype: list(pack_conv(weight, bias, dtype)), eager)


def linear(c_in, c_out, seed=0, activation="identity"):
    weight, bias = conv_weights(c_out, c_in, 1, seed)

    def eager(x):
        y = F.linear(x.flatten(1), weight[:, :, 0, 0].to(x.dtype), bias.to(x.dtype))
        return TORCH_ACTIVATIONS[activation](y)[:, :, None, None]

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


def check(layers, x):
    """Runs the layers and holds them to the tolerance rule."""
    before = x.clone()
    y = run(layers, x)
    found = agreement(y, eager(layers, x), eager(layers, x.double()))
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
        x = check([layer], x)
    assert torch.equal(y, x.to(y.dtype))


def image(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channels_last(*shape, dtype=torch.float32):
    return image(*shape, dtype=dtype).to(memory_format=torch.channels_last)


CHANNELS = list(itertools.product((1, 3, 4), (8, 16, 24, 32, 33, 48)))
SIZES = (1, 2, 3, 5, 8, 17, 31)


@poisoned
@by_isa
@pytest.mark.parametrize(("c_in", "hidden"), CHANNELS)
def test_stem_channels(c_in, hidden, isa):
    with instruction_set(isa):
        for c_out in (1, 8, 16, 24, 33):
            check([stem(c_in, hidden, c_out)], channels_last(2, c_in, 9, 12))
            check([stem(c_in, hidden, c_out, stride=2)], image(1, c_in, 12, 7))


@poisoned
@by_isa
@pytest.mark.parametrize("c_in", [1, 3, 4])
def test_stem_sizes(c_in, isa):
    with instruction_set(isa):
        for height, width in itertools.product(SIZES, SIZES):
            check([stem(c_in, 24, 8)], channels_last(1, c_in, height, width))
            check([stem(c_in, 33, 8, stride=2)], image(1, c_in, height, width))


@poisoned
@by_isa
@pytest.mark.parametrize("pool", [False, True])
def test_head_channels_and_sizes(pool, isa):
    with instruction_set(isa):
        for c_in, c_out in itertools.product((1, 7, 24), (1, 15, 16, 17, 40, 100)):
            check([head(c_in, c_out, pool)], channels_last(2, c_in, 5, 4))
        for height, width in ((1, 1), (1, 13), (16, 16), (16, 17), (31, 29)):
            for dtype in (torch.float32, torch.bfloat16):
                check([head(24, 40, pool)], channels_last(2, 24, height, width, dtype=dtype))


@poisoned
@by_isa
@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_linear(batch, isa):
    with instruction_set(isa):
        for c_in, c_out in ((1, 1), (33, 10), (100, 33)):
            check([linear(c_in, c_out)], image(batch, c_in, 1, 1))


@poisoned
@by_isa
def test_long_sums(isa):
    """As many terms as the classifier's and a wide network's head have round no worse than eager's."""
    with instruction_set(isa):
        for batch in (1, 4):
            check([linear(1280, 1000)], image(batch, 1280, 1, 1))
            check([head(448, 1792)], channels_last(batch, 448, 7, 7))


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
CHAINS = {"MobileNetV2": CHAIN, "others": GENERAL}
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


@poisoned
@by_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_beside_blocks(activation, isa):
    with instruction_set(isa):
        for dtype, size in itertools.product((torch.float32, torch.bfloat16), ((1, 1), (5, 4), (16, 17))):
            x = channels_last(2, 24, *size, dtype=dtype)
            for c_out in (1, 15, 16, 40, 100):
                check([head(24, c_out, activation=activation)], x)
                check([head(24, c_out, pool=True, activation=activation)], x)
                check([linear(24, c_out, activation=activation)], x[:, :, :1, :1])
            rgb = image(2, 3, *size, dtype=dtype)
            check([stem(3, 24, 8, activation=activation)], rgb)
            check([stem(3, 24, 8, 2, activation=activation, kernel=5, padding="same")], rgb)


def test_images_that_a_squeeze_and_excite_keeps_apart():
    """More than fit beside each other: the batch runs in parts, the last of them smaller."""
    layers = [block(BlockSpec(8, 160, 8, squeeze_channels=8, residual=True)), head(8, 24, pool=True)]
    x = channels_last(7, 8, 90, 90)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(check(layers, x), torch.cat([run(layers, one) for one in x.split(1)]))


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
    check([stem(3, 24, 8)], view(2, 3))
    check([stem(1, 8, 3), head(3, 20)], view(2, 1))
    check([block(BlockSpec(8, 48, 8, residual=True)), head(8, 20, pool=True)], view(2, 8))
    check([head(8, 20)], view(2, 8))
    check([linear(8, 20)], view(2, 8)[:, :, 4:5, 4:5])


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
    found = {"kernel": draw(st.sampled_from([3, 5])), "activation": draw(st.sampled_from(ACTIVATIONS))}
    found["dilation"] = draw(st.integers(1, 3)) if stride == 1 else 1
    found["out_activation"] = draw(st.sampled_from(ACTIVATIONS))
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
        fails([f"take {len(weights)} bytes", f"got {len(bytes_given)}", "sequence.join"], x, bytes_given, layers)
    with pytest.raises(RuntimeError, match=r"take \d+ bytes"):
        op(x, weights, layers * 2 if layer is BLOCK else [*layers[:3], layers[3] + 16, *layers[4:]])


def test_weights_must_be_one_row_of_bytes():
    x = image(1, 8, 9, 9)
    for wrong in (WEIGHTS[None], WEIGHTS.float(), torch.cat([WEIGHTS, WEIGHTS])[::2], WEIGHTS[0]):
        fails(["one contiguous row of bytes", "sequence.join"], x, wrong, LAYERS)


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
    "float64": (lambda: image(1, 8, 9, 9).double(), ["bytes of weights for x of this dtype", "sequence.join"]),
    "bfloat16": (lambda: image(1, 8, 9, 9).bfloat16(), ["bytes of weights for x of this dtype", "sequence.join"]),
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
    "kernel": (0, 4, "kernel must be 3 or 5, got 4"),
    "dilation": (1, 0, "dilation must be 1 to 2^16, got 0"),
    "left": (2, 5, "padding must be 0 to 4, got 5"),
    "right": (3, -2, "padding must be 0 to 4, got -2"),
    "top": (4, 2**62, "padding must be 0 to 4"),
    "bottom": (5, -(2**63), "padding must be 0 to 4"),
    "activation": (6, 5, "activation must be 0 to 4 (see mnv2_fused.block), got 5"),
    "of the output": (7, -1, "out_activation must be 0 to 4"),
    "squeeze channels": (8, -1, "squeeze_channels must be at least 0, got -1"),
    "more squeeze channels": (8, 2**62, "channel counts must be at most 2^18"),
    "squeeze activation": (9, 2**62, "squeeze_activation must be 0 to 4"),
    "gate": (10, 2, "gate must be 0 to 1"),
    "of a stem": (11, 9, "stem activation must be 0 to 4"),
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
    fails(["0 or 1 further values, got 2"], image(1, 8, 9, 9), weights, [*layers[:6], 2, 0, 0])
    fails(["activation must be 0 to 4"], image(1, 8, 9, 9), weights, [*layers[:6], 1, 5])


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


# --- FusedSequential and the whole model


@pytest.fixture
def ran(monkeypatch):
    """The kinds of layers of every call of the op."""
    calls, original = [], ops.sequence

    def counted(x, weights, geometry):
        calls.append([LayerKind(values[0]) for values, _ in ops.split_layers(geometry)])
        return original(x, weights, geometry)

    monkeypatch.setattr(ops, "sequence", counted)
    return calls


B, BW, STEM, HEAD, POOLED, LINEAR = (
    LayerKind.BLOCK,
    LayerKind.BLOCK_WITHOUT_EXPAND,
    LayerKind.STEM_AND_BLOCK,
    LayerKind.POINTWISE,
    LayerKind.POOLED,
    LayerKind.LINEAR,
)
WHOLE = [STEM, B, B, B, POOLED, LINEAR]


@cache
def fitted(width=None):
    """torchvision's model with statistics that make its result depend on its input; a small one without a width."""
    torch.manual_seed(0)
    small = {"inverted_residual_setting": [[1, 8, 1, 1], [3, 16, 2, 2], [3, 24, 1, 1]]}
    model = MobileNetV2(num_classes=10, **({"width_mult": width} if width else small))
    nn.init.normal_(model.classifier[1].bias, std=0.02)
    return fit_batch_norm(model.eval(), torch.randn(8, 3, 64, 64))


def fused_model():
    return fuse(fitted())


def make_x(batch=2, dtype=torch.float32):
    return image(batch, 3, 33, 40, dtype=dtype)


def near(y, expected):
    return y.shape == expected.shape and (y - expected).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1)


def calls_of(model, x, ran):
    """The op's calls while ``model`` runs, whose result must agree."""
    ran.clear()
    y = model(x)
    calls = list(ran)
    assert near(y, unfuse(model)(x))
    return calls


@pytest.mark.parametrize("width", [0.35, 1.0, 1.4])
def test_the_whole_model_is_one_call(width, ran):
    plain = fitted(width)
    model, wide = fuse(plain), copy.deepcopy(plain).double()
    for x in (image(2, 3, 64, 64), channels_last(1, 3, 97, 65)):
        found = agreement(model(x), plain(x), wide(x.double()))
        assert found.ok, found
    assert ran == [[STEM] + [B] * 16 + [POOLED, LINEAR]] * 2


@by_dtype
def test_precisions(dtype, ran):
    plain = copy.deepcopy(fitted()).to(dtype)
    model, x = fuse(plain), make_x(dtype=dtype)
    y = model(x)
    assert ran == [WHOLE] and y.dtype == dtype
    found = agreement(y, plain(x), copy.deepcopy(plain).double()(x.double()))
    assert found.ok, found


def test_the_result_looks_like_eagers(ran):
    model = fused_model()
    for batch in (0, 1, 3):
        x = make_x(batch)
        y, expected = model(x), fitted()(x)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert ran == [WHOLE] * 3


def test_features_give_the_whole_map(ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    y = model.features(x)
    assert ran == [[STEM, B, B, B, HEAD]]
    assert y.shape == (2, 1280, 9, 10) and y.is_contiguous(memory_format=torch.channels_last)
    assert near(y, fitted().features(x))
    assert torch.equal(model.features(input=x), y)


def test_batch_and_threads_do_not_change_a_bit_of_the_model():
    model, x = fused_model(), make_x(5)
    y = model(x)
    for count in (1, 2, 3, 4, 5):
        with threads(count):
            assert torch.equal(model(x), y)
            assert torch.equal(torch.cat([model(one) for one in x.split(1)]), y)


def test_weights_are_packed_once(monkeypatch):
    module = sys.modules["mnv2_fused.sequence"]
    packings, original = [], module.pack_conv
    monkeypatch.setattr(module, "pack_conv", lambda *args: packings.append(1) or original(*args))
    model = fused_model()
    for _ in range(4):
        model(make_x())
    assert len(packings) == 3  # stem, head, linear


# When it must not be used: context or change -> calls of the op that are still made.


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_records(context, ran):
    model = fused_model()
    with context():
        assert calls_of(model, make_x(), ran) == [WHOLE]


def test_gradients_run_the_modules(ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x()
    model(x)
    ran.clear()
    gradients = []
    with torch.enable_grad():
        for one in (model, plain):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            gradients.append([leaf.grad, *(p.grad for p in one.parameters())])
    assert not ran
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_frozen_model_is_fused_with_gradients_on(ran):
    model = fused_model().requires_grad_(False)
    with torch.enable_grad():
        assert calls_of(model, make_x(), ran) == [WHOLE]
        y = model(make_x().requires_grad_())
        assert y.requires_grad and len(ran) == 1
        model.features[0][0].weight.requires_grad_()
        assert model(make_x()).requires_grad and len(ran) == 1


def test_a_trainable_classifier_behind_frozen_features(ran):
    model = fused_model()
    model.features.requires_grad_(False)
    with torch.enable_grad():
        model(make_x()).sum().backward()
    assert ran == [[STEM, B, B, B, HEAD]]
    assert model.classifier[1].weight.grad.abs().max() > 0


def test_a_trainable_module_between_frozen_ones(ran):
    """What comes after it is called with a tensor that records."""
    model = fused_model().requires_grad_(False)
    model.features.insert(2, nn.Conv2d(8, 8, 1))
    gradients = []
    with torch.enable_grad():
        for one in (model, unfuse(model)):
            one(make_x()).square().sum().backward()
            gradients.append(one.features[2].weight.grad)
    assert ran == [[STEM]]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_an_optimizer_step_folds_each_block_once(monkeypatch, ran):
    """Not once more for runs that gradients keep from running."""
    folded = []
    for name in ("module", "watch"):
        module = sys.modules[f"mnv2_fused.{name}"]
        original = module.fold_and_pack
        monkeypatch.setattr(module, "fold_and_pack", lambda *args, f=original: folded.append(1) or f(*args))
    model = fused_model()
    blocks = sum(isinstance(m, FusedInvertedResidual) for m in model.features)
    step = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(3):
            folded.clear()
            step.zero_grad()
            model(make_x()).square().sum().backward()
            step.step()
            assert len(folded) == blocks
    assert not ran
    model(make_x())
    assert ran == [WHOLE]


def test_train_runs_the_modules(ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x(4)
    model(x)
    ran.clear()
    for one in (model, plain):
        one.train().classifier[0].eval()
        one.to(memory_format=torch.channels_last)
    assert torch.equal(model(x), plain(x))
    assert not ran
    model.eval()
    assert calls_of(model, x, ran) == [WHOLE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_the_modules(dtype, ran):
    model, x = fused_model(), make_x()
    with torch.autocast("cpu", dtype=dtype):
        y, expected = model(x), fitted()(x)
    assert not ran and y.dtype == expected.dtype
    found = agreement(y, expected, copy.deepcopy(fitted()).double()(x.double()))
    assert found.ok, found
    assert calls_of(model, x, ran) == [WHOLE]


def test_function_transforms_run_the_modules(ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    plain = fitted()
    with torch.enable_grad():
        gradients = [torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (model, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    mapped = [torch.func.vmap(m)(x[:, None]) for m in (model, plain)]
    torch.testing.assert_close(*mapped, rtol=1e-3, atol=1e-4)
    tangents = [torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (model, plain)]
    torch.testing.assert_close(*tangents, rtol=1e-3, atol=1e-4)
    assert not ran


def test_functional_call_uses_the_given_weights():
    model, x = fused_model(), make_x()
    before = model(x)
    given_weights = {name: 1.1 * p for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, given_weights, x)
    torch.testing.assert_close(y, torch.func.functional_call(fitted(), given_weights, x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(y, before)
    assert torch.equal(model(x), before)


def test_backend_from_the_environment(monkeypatch, ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    plain = unfuse(model)
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert torch.equal(model(x), plain(x)) and not ran
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MNV2_FUSED_BACKEND must be one of"):
        model(x)
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "cpu")
    assert calls_of(model, x, ran) == [WHOLE]


def test_eager_blocks_run_the_modules(ran):
    model, x = fuse(fitted(), backend="eager"), make_x()
    assert torch.equal(model(x), unfuse(model)(x))
    assert torch.equal(model.features(x), unfuse(model).features(x))
    assert not ran


def test_eager_blocks_need_no_compiled_library(monkeypatch):
    model, x = fuse(fitted(), backend="eager"), make_x()
    monkeypatch.setattr(ops, "_C", None)
    monkeypatch.setattr(ops, "_load_error", "no such file")
    assert torch.equal(model(x), unfuse(model)(x))


class Subclass(Tensor):
    pass


def test_tensor_subclasses_stay_what_they_are(ran):
    model, x = fused_model(), make_x()
    y = model(x.as_subclass(Subclass))
    assert type(y) is Subclass
    assert near(y.as_subclass(Tensor), fitted()(x))
    assert near(model(nn.Parameter(x)), fitted()(x))
    assert not ran


def subclassed(module):
    module.weight = nn.Parameter(module.weight.as_subclass(Subclass), requires_grad=False)


def test_weights_of_a_subclass_run_in_their_modules(ran):
    model, x = fused_model(), make_x()
    expected = model(x)
    for module in (model.classifier[1], model.features[-1][0]):
        subclassed(module)
        torch.testing.assert_close(model(x).as_subclass(Tensor), expected, rtol=1e-4, atol=1e-4)
    assert ran == [WHOLE, WHOLE[:-1], [STEM, B, B, B]]


def test_a_sparse_classifier_runs_as_a_module(ran):
    model, x = fused_model(), make_x()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.classifier[1].weight = nn.Parameter(model.classifier[1].weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert ran == [WHOLE, WHOLE[:-1]]


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.features], ids=["model", "features"])
def test_bad_x_to_modules(part):
    module = part(fused_model())
    for x, message in (
        (image(1, 4, 9, 9), "must have 3 channels, got 4"),
        (image(3, 9, 9), r"\[N, C_in, H, W\]"),
        (image(1, 3, 0, 9), "height and width must be at least 1|height must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module(x)
    for dtype in (torch.float64, torch.float16, torch.int64):
        with pytest.raises((RuntimeError, TypeError)):
            module(make_x().to(dtype))


def test_fx_traces_through_the_containers():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, FusedInvertedResidual) or super().is_leaf_module(module, name)

    model, x = fused_model(), make_x()
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    model, x = fused_model(), make_x()
    model(x)  # else the folding is traced, too
    traced = torch.jit.trace(model, x)
    for batch in (2, 5):
        torch.testing.assert_close(traced(make_x(batch)), model(make_x(batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("called", [False, True])
def test_compile_the_whole_model(called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    ran.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert near(compiled(x), unfuse(model)(x))
    model.features[0][0].weight.mul_(1.5)
    assert near(compiled(x), unfuse(model)(x))
    assert not ran


def test_export_the_whole_model(ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert "mnv2_fused.inverted_residual" in str(program.graph)
    for batch in (1, 5):
        assert near(program.module()(make_x(batch)), fitted()(make_x(batch)))
    assert not ran


# --- other models made of the same parts


def hooked(module):
    module.register_forward_hook(lambda module, args, y: y + 1)
    return module


CLASSIFIERS = {
    "another size": (lambda: nn.Linear(1280, 3), [[STEM, B, B, B, HEAD]]),
    "identity": (nn.Identity, [[STEM, B, B, B, HEAD]]),
    "empty": (nn.Sequential, [WHOLE[:-1]]),
    "linear alone": (lambda: nn.Sequential(nn.Linear(1280, 33)), [WHOLE]),
    "without bias": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(1280, 7, bias=False)), [WHOLE]),
    "two layers": (lambda: nn.Sequential(nn.Linear(1280, 8), nn.ReLU(), nn.Linear(8, 3)), [[*WHOLE, LINEAR]]),
    "three": (
        lambda: nn.Sequential(nn.Linear(1280, 9), nn.Linear(9, 8), nn.Hardswish(), nn.Dropout(), nn.Linear(8, 3)),
        [[*WHOLE, LINEAR, LINEAR]],
    ),
    "an activation of no kernel": (lambda: nn.Sequential(nn.Linear(1280, 8), nn.GELU(), nn.Linear(8, 3)), [WHOLE]),
    "a ReLU6 that clips elsewhere": (
        lambda: nn.Sequential(nn.Linear(1280, 8), nn.Hardtanh(0, 3), nn.Linear(8, 3)),
        [WHOLE],
    ),
    "a hooked activation": (
        lambda: nn.Sequential(nn.Linear(1280, 8), hooked(nn.ReLU()), nn.Linear(8, 3)),
        [WHOLE],
    ),
    "two dropouts": (lambda: nn.Sequential(nn.Dropout(), nn.Dropout(), nn.Linear(1280, 8)), [WHOLE[:-1]]),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm1d(1280), nn.Linear(1280, 8)), [WHOLE[:-1]]),
}


@pytest.mark.parametrize(("make", "expected"), CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("called", [False, True])
def test_a_replaced_classifier(make, expected, called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    model.classifier = make().eval()
    assert calls_of(model, x, ran) == expected
    assert calls_of(model, x, ran) == expected


def test_replaced_classifiers_can_be_put_back(ran):
    model, x = fused_model(), make_x()
    original, y = model.classifier, model(x)
    model.classifier = nn.Identity()
    model(x)
    model.classifier = original
    assert torch.equal(model(x), y)
    assert ran == [WHOLE, [STEM, B, B, B, HEAD], WHOLE]


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


CHILDREN = {
    "appended": (lambda m: m.features.append(Shift()), [[STEM, B, B, B, HEAD]]),
    "in between": (lambda m: m.features.insert(3, Shift()), [[STEM, B], [B, B, POOLED, LINEAR]]),
    "after the stem": (lambda m: m.features.insert(1, Shift()), [[BW, B, B, B, POOLED, LINEAR]]),
    "in front": (lambda m: m.features.insert(0, Shift()), [WHOLE]),
    "behind the classifier": (lambda m: m.classifier.append(nn.Softmax(1)), [WHOLE]),
    "in front of the classifier": (lambda m: m.classifier.insert(0, Shift()), [WHOLE[:-1]]),
    "nested": (
        lambda m: m.features.__setitem__(2, nn.Sequential(m.features[2], Shift())),
        [[STEM], [B, B, POOLED, LINEAR]],
    ),
    "another activation": (lambda m: m.features[-1].__setitem__(2, nn.Hardswish()), [WHOLE]),
    "an activation of no kernel": (lambda m: m.features[-1].__setitem__(2, nn.GELU()), [[STEM, B, B, B]]),
    "a stem's activation": (lambda m: m.features[0].__setitem__(2, nn.SiLU()), [WHOLE]),
    "a stem of stride 1": (lambda m: setattr(m.features[0][0], "stride", (1, 1)), [[BW, B, B, B, POOLED, LINEAR]]),
    "an unused module": (lambda m: m.add_module("extra", nn.Sequential(nn.Linear(3, 3))), [WHOLE]),
}


@pytest.mark.parametrize(("change", "expected"), CHILDREN.values(), ids=CHILDREN)
@pytest.mark.parametrize("called", [False, True])
def test_changed_children(change, expected, called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    change(model)
    assert calls_of(model, x, ran) == expected


def test_blocks_that_no_longer_fit_each_other():
    model, x = fused_model(), make_x()
    model(x)
    del model.features[2]
    with pytest.raises(RuntimeError, match="x must have 16 channels, got 8"):
        model(x)


SLICES = {
    "front": (slice(0, 5), [[STEM, B, B, B]]),
    "middle": (slice(1, 4), [[BW, B, B]]),
    "back": (slice(3, 6), [[B, B, HEAD]]),
    "stem": (slice(0, 1), []),
    "head": (slice(5, 6), []),
}


@pytest.mark.parametrize(("cut", "expected"), SLICES.values(), ids=SLICES)
def test_sliced_features(cut, expected, ran):
    model = fused_model()
    x = model.features[: cut.start](make_x())
    part = model.features[cut]
    assert near(part(x), unfuse(part)(x))  # nn.Sequential makes slices in train()
    assert calls_of(part.eval(), x, ran) == expected


def test_a_network_as_one_sequence(ran):
    plain = copy.deepcopy(fitted())
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *plain.classifier]
    flat = nn.Sequential(*plain.features, *pool).eval()
    assert calls_of(fuse(flat), make_x(), ran) == [WHOLE]
    nested = nn.Sequential(plain.features, *pool).eval()
    assert calls_of(fuse(nested), make_x(), ran) == [WHOLE]


def test_norms_of_other_kinds(ran):
    def without_affine(channels):
        return nn.BatchNorm2d(channels, affine=False)

    for norm in (FrozenBatchNorm2d, without_affine, nn.SyncBatchNorm):
        layers = (
            Conv2dNormActivation(3, 8, stride=2, norm_layer=norm, activation_layer=nn.ReLU6),
            InvertedResidual(8, 8, 1, 1, norm_layer=norm),
            InvertedResidual(8, 8, 1, 6, norm_layer=norm),
            Conv2dNormActivation(8, 20, kernel_size=1, norm_layer=norm, activation_layer=nn.ReLU6),
        )
        # The first block has a residual, so the stem stays alone.
        model = fuse(perturb_batch_norm(nn.Sequential(*layers)).eval())
        assert calls_of(model, make_x(), ran) == [[BW, B, HEAD]]


def test_convolutions_with_bias(ran):
    stem_conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
    head_conv = nn.Sequential(nn.Conv2d(4, 20, 1), nn.BatchNorm2d(20), nn.ReLU6())
    model = nn.Sequential(stem_conv, InvertedResidual(8, 4, 1, 1), head_conv)
    assert calls_of(fuse(perturb_batch_norm(model).eval()), make_x(), ran) == [[STEM, HEAD]]


POOLS = {
    "1": (nn.AdaptiveAvgPool2d(1), POOLED),
    "(1, 1)": (nn.AdaptiveAvgPool2d((1, 1)), POOLED),
    "2": (nn.AdaptiveAvgPool2d(2), HEAD),
    "(1, None)": (nn.AdaptiveAvgPool2d((1, None)), HEAD),
    "maximum": (nn.AdaptiveMaxPool2d(1), HEAD),
}


@pytest.mark.parametrize(("pool", "kind"), POOLS.values(), ids=POOLS)
def test_pools(pool, kind, ran):
    model = nn.Sequential(*fitted().features, pool).eval()
    assert calls_of(fuse(model), make_x(), ran) == [[STEM, B, B, B, kind]]


def test_mixed_precision_runs_the_modules(ran):
    model = nn.Sequential(InvertedResidual(3, 8, 1, 6), InvertedResidual(8, 8, 1, 6)).eval()
    model = fuse(perturb_batch_norm(model))
    model[1].double()
    with pytest.raises(TypeError):
        model(make_x())
    assert not ran


# --- never stale


def head_of(model):
    return model.features[-1]


def other_state():
    return perturb_batch_norm(copy.deepcopy(fitted()), seed=9).state_dict()


def rounded_twice(module):
    """Through half precision in two steps, so that the second tensor can lie where the first one lay."""
    module.weight.data = module.weight.data.half()
    module.weight.data = module.weight.data.mul_(1.3).float()


def written_unseen(module, container):
    module.weight.data.mul_(1.5)
    container.train()
    container.eval()


def half_and_back(module, conv):
    conv.weight.data.mul_(1.3)
    module.half().float()


def running_statistics(model):
    model.train()(make_x(8))
    model.eval()


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(make_x()).square().sum().backward()
    optimizer.step()


def another_block(model):
    model.features[3] = fuse(perturb_batch_norm(InvertedResidual(16, 16, 1, 6)).eval())


def another_stem(model):
    model.features[0] = Conv2dNormActivation(3, 32, stride=2, activation_layer=nn.ReLU6).eval()


def smaller_classifier(model):
    model.classifier[1].weight = nn.Parameter(torch.randn(3, 1280))
    model.classifier[1].bias = nn.Parameter(torch.randn(3))


def cut_classifier(model):
    """Both tensors start at the same addresses as before."""
    for parameter in model.classifier[1].parameters():
        parameter.data = parameter.data[:3]


def reflected(conv):
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def own_forward(module):
    original = module.forward
    module.forward = lambda x: 2 * original(x)


WITHOUT_STEM, WITHOUT_HEAD = [[BW, B, B, B, POOLED, LINEAR]], [[STEM, B, B, B]]
WITHOUT_LINEAR, WITHOUT_BLOCK = [WHOLE[:-1]], [[STEM, B], [B, POOLED, LINEAR]]
MAP_ONLY = [[STEM, B, B, B, HEAD]]

# Name: (change, the op's calls afterwards)
CHANGES = {
    "classifier bias removed": (lambda m: setattr(m.classifier[1], "bias", None), [WHOLE]),
    "classifier of another size": (smaller_classifier, [WHOLE]),
    "classifier cut": (cut_classifier, [WHOLE]),
    "classifier bias broadcast": (
        lambda m: setattr(m.classifier[1], "bias", nn.Parameter(torch.randn(1))),
        WITHOUT_LINEAR,
    ),
    "load_state_dict": (lambda m: m.load_state_dict(other_state()), [WHOLE]),
    "load_state_dict, assign": (lambda m: m.load_state_dict(other_state(), assign=True), [WHOLE]),
    "optimizer": (optimizer_step, [WHOLE]),
    "running statistics": (running_statistics, [WHOLE]),
    "half and back": (lambda m: half_and_back(m, head_of(m)[0]), [WHOLE]),
    "head half and back": (lambda m: half_and_back(head_of(m), head_of(m)[0]), [WHOLE]),
    "stem data in two steps": (lambda m: rounded_twice(m.features[0][0]), [WHOLE]),
    "block data in two steps": (lambda m: rounded_twice(m.features[3].conv[2]), [WHOLE]),
    "head data in two steps": (lambda m: rounded_twice(head_of(m)[0]), [WHOLE]),
    "classifier data in two steps": (lambda m: rounded_twice(m.classifier[1]), [WHOLE]),
    "data of the head, then model.eval()": (lambda m: written_unseen(head_of(m)[0], m), [WHOLE]),
    "data of the stem, then features.eval()": (lambda m: written_unseen(m.features[0][0], m.features), [WHOLE]),
    "data of a block, then block.eval()": (
        lambda m: written_unseen(m.features[3].conv[2], m.features[3]),
        [WHOLE],
    ),
    "stem eps": (lambda m: setattr(m.features[0][1], "eps", 0.7), [WHOLE]),
    "block eps": (lambda m: setattr(m.features[3].conv[1][1], "eps", 0.7), [WHOLE]),
    "head eps": (lambda m: setattr(head_of(m)[1], "eps", 0.7), [WHOLE]),
    "residual": (lambda m: setattr(m.features[3], "use_res_connect", False), [WHOLE]),
    "block replaced": (another_block, [WHOLE]),
    "stem replaced": (another_stem, [WHOLE]),
    "parameter replaced": (
        lambda m: setattr(m.features[3].conv[2], "weight", nn.Parameter(torch.randn(16, 48, 1, 1))),
        [WHOLE],
    ),
    "block stride": (lambda m: setattr(m.features[2].conv[1][0], "stride", (1, 1)), [WHOLE]),
    "stem stride": (lambda m: setattr(m.features[0][0], "stride", (1, 1)), WITHOUT_STEM),
    "stem padding": (lambda m: setattr(m.features[0][0], "padding", (2, 2)), WITHOUT_STEM),
    "stem padding mode": (lambda m: reflected(m.features[0][0]), WITHOUT_STEM),
    "head stride": (lambda m: setattr(head_of(m)[0], "stride", (2, 2)), WITHOUT_HEAD),
    "head padding": (lambda m: setattr(head_of(m)[0], "padding", (1, 1)), WITHOUT_HEAD),
    "stem limit": (lambda m: setattr(m.features[0][2], "max_val", 0.5), WITHOUT_STEM),
    "block limit": (lambda m: setattr(m.features[3].conv[0][2], "min_val", 0.3), WITHOUT_BLOCK),
    "head limit": (lambda m: setattr(head_of(m)[2], "max_val", 0.5), WITHOUT_HEAD),
    "forward of features": (lambda m: own_forward(m.features), MAP_ONLY),
    "forward of the classifier": (lambda m: own_forward(m.classifier), MAP_ONLY),
    "forward of the stem": (lambda m: own_forward(m.features[0]), WITHOUT_STEM),
    "forward inside a block": (lambda m: own_forward(m.features[3].conv[2]), WITHOUT_BLOCK),
    "forward of the head": (lambda m: own_forward(head_of(m)), WITHOUT_HEAD),
    "forward of the linear layer": (lambda m: own_forward(m.classifier[1]), WITHOUT_LINEAR),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m.classifier[1]), WITHOUT_LINEAR),
    "pruned head": (lambda m: prune.l1_unstructured(head_of(m)[0], "weight", amount=0.5), WITHOUT_HEAD),
    "group norm": (lambda m: head_of(m).__setitem__(1, nn.GroupNorm(4, 1280)), WITHOUT_HEAD),
}


def test_every_parameter_and_statistic_counts(ran):
    model, x = fused_model(), make_x()
    before = model(x)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(1.3).add_(0.05)
            y = model(x)
            assert near(y, unfuse(model)(x)), name
            assert not near(y, before), name
            before = y
    assert ran and all(call == WHOLE for call in ran)


@pytest.mark.filterwarnings("ignore:an inverted residual runs unfused")
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, expected, ran):
    model, x = fused_model(), make_x()
    before = model(x)
    change(model)
    ran.clear()
    y = model(x)
    assert ran == expected
    eager = unfuse(model)(x)
    assert near(y, eager)
    assert not near(before, eager), "the change changes nothing, so this test sees nothing"
    assert torch.equal(model(x), y)


def test_a_blocks_own_forward(ran):
    model, plain, x = fused_model(), copy.deepcopy(fitted()), make_x()
    model(x)
    own_forward(model.features[3])
    own_forward(plain.features[3])
    assert near(model(x), plain(x))
    assert ran == [WHOLE, *WITHOUT_BLOCK]


def test_a_pool_and_a_flatten_that_change():
    model = fuse(nn.Sequential(*fitted().features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    x = make_x()
    model(x)
    model[-1].start_dim = 2
    assert model(x).shape == (2, 1280, 1)
    model[-2].output_size = 2
    assert near(model(x), unfuse(model)(x))
    assert model(x).shape == (2, 1280, 4)


def test_dropout_that_is_switched_on(ran):
    """As Monte Carlo dropout does: the layer alone goes into train()."""
    model, x = fused_model(), make_x()
    y = model(x)
    model.classifier[0].train()
    assert not torch.equal(model(x), model(x))
    assert ran == [WHOLE, *2 * WITHOUT_LINEAR]
    model.eval()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "part", [lambda m: m.features[0][1], lambda m: m.features[3].conv[1][1], lambda m: head_of(m)[1]]
)
def test_one_norm_in_training(part):
    model, x = fused_model(), make_x()
    model(x)
    plain = unfuse(model)
    for one in (model, plain):
        part(one).train()
    assert near(model(x), plain(x))
    torch.testing.assert_close(part(model).running_mean, part(plain).running_mean, rtol=1e-4, atol=1e-5)
    model.eval(), plain.eval()
    assert near(model(x), plain(x))


def test_one_block_in_training(ran):
    model, x = fused_model(), make_x()
    y = model(x)
    model.features[3].train()
    assert not torch.allclose(model(x), y)
    assert ran[1:] == WITHOUT_BLOCK


def test_the_backend_of_a_block(ran):
    model, x = fused_model(), make_x()
    y = model(x)
    model.features[3].backend = "eager"
    assert calls_of(model, x, ran) == WITHOUT_BLOCK
    for i in (1, 2, 4):
        model.features[i].backend = "eager"
    assert calls_of(model, x, ran) == []
    for child in model.features[1:5]:
        child.backend = "auto"
    model.eval()
    assert torch.equal(model(x), y)
    assert ran == [WHOLE]


# Where a hook sits, and the op's calls while it does.
HOOKED = {
    "block": (lambda m: m.features[3], WITHOUT_BLOCK),
    "inside a block": (lambda m: m.features[3].conv[1][0], WITHOUT_BLOCK),
    "activation in a block": (lambda m: m.features[3].conv[0][2], WITHOUT_BLOCK),
    "layers of a block": (lambda m: m.features[3].conv, WITHOUT_BLOCK),
    "block behind the stem": (lambda m: m.features[1], [[B, B, B, POOLED, LINEAR]]),
    "stem": (lambda m: m.features[0], WITHOUT_STEM),
    "inside the stem": (lambda m: m.features[0][1], WITHOUT_STEM),
    "head": (head_of, WITHOUT_HEAD),
    "inside the head": (lambda m: head_of(m)[2], WITHOUT_HEAD),
    "features": (lambda m: m.features, MAP_ONLY),
    "classifier": (lambda m: m.classifier, MAP_ONLY),
    "dropout": (lambda m: m.classifier[0], WITHOUT_LINEAR),
    "linear": (lambda m: m.classifier[1], WITHOUT_LINEAR),
    "model": (lambda m: m, [WHOLE]),
}
REGISTER = {
    "forward": lambda m, f: m.register_forward_hook(lambda module, given, y: f(y)),
    "forward with kwargs": lambda m, f: m.register_forward_hook(lambda module, given, _, y: f(y), with_kwargs=True),
    "pre": lambda m, f: m.register_forward_pre_hook(lambda module, given: f(given[0])),
}


@pytest.mark.filterwarnings("ignore:an inverted residual runs unfused")
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
@pytest.mark.parametrize(("part", "expected"), HOOKED.values(), ids=HOOKED)
def test_hooks_fire_and_go_away(part, expected, register, ran):
    model, x = fused_model(), make_x()
    before = model(x)
    fired = []
    handle = register(part(model), lambda t: fired.append(1) or t * 1.5)
    for count in (1, 2):
        ran.clear()
        y = model(x)
        assert ran == expected and len(fired) == count
    eager = unfuse(model)(x)
    assert near(y, eager) and not near(before, eager)
    handle.remove()
    ran.clear()
    assert torch.equal(model(x), before)
    assert ran == [WHOLE]


@pytest.mark.parametrize("name", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks_see_every_module(name, ran):
    model, x = fused_model(), make_x()
    before, seen = model(x), []
    handle = getattr(nn.modules.module, name)(lambda module, *_: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    # A block is one module here, as where it runs alone.
    inside = {m for block in model.features[1:5] for m in block.modules()} - set(model.features[1:5])
    assert set(model.modules()) - inside == set(seen)
    assert torch.equal(model(x), before)
    assert ran == [WHOLE, WHOLE]


def test_backward_hooks_fire(ran):
    model = fused_model()
    model(make_x())
    fired = []
    model.features[3].register_full_backward_hook(lambda *_: fired.append(1))
    head_of(model).register_full_backward_pre_hook(lambda *_: fired.append(2))
    with torch.enable_grad():
        model(make_x()).sum().backward()
    assert sorted(fired) == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_another_dtype_and_back(dtype, ran):
    model, x = fused_model(), make_x()
    model(x)
    ran.clear()
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and ran == [WHOLE]
    assert near(model.float()(x), unfuse(model)(x))


# --- copies, lifetime, threads


@pytest.mark.parametrize("called", [False, True])
def test_copies(copied, called, ran):
    model, x = fused_model(), make_x()
    if called:
        model(x)
    before = model(x)
    twin = copied(model)
    assert type(twin) is type(model) and not twin.training
    assert torch.equal(twin(x), before)
    twin.features[0][0].weight.mul_(1.5)
    assert calls_of(twin, x, ran) == [WHOLE]
    assert torch.equal(model(x), before), "the copy shares something with its original"


def test_nothing_keeps_a_model_alive():
    model = fused_model()
    model(make_x())
    model.features(make_x())
    watched = [weakref.ref(t) for t in (model, model.features, model.features[3], model.classifier[1].weight)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


def test_a_removed_module_is_released_by_the_next_call():
    model, x = fused_model(), make_x()
    model(x)
    removed = weakref.ref(model.classifier[1])
    model.classifier = nn.Sequential(nn.Linear(1280, 3)).eval()
    model(x)
    gc.collect()
    assert removed() is None


def test_shared_parameters(ran):
    model, x = fused_model(), make_x()
    model.features[4] = model.features[3]  # the same block twice
    head_of(model)[0].weight, head_of(model)[0].in_channels = nn.Parameter(torch.randn(1280, 16, 1, 1)), 16
    model.features[1].conv[0][1] = model.features[0][1]  # one norm behind two convolutions
    for _ in range(2):
        ran.clear()
        assert near(model(x), unfuse(model)(x))
        assert ran == [WHOLE]
        model.features[3].conv[2].weight.mul_(1.5)
        model.features[0][1].bias.add_(0.5)


def test_inference_mode_parameters(ran):
    with torch.inference_mode():
        model, x = copy.deepcopy(fused_model()), make_x()
        assert model.classifier[1].weight.is_inference()
        for change in (lambda: None, lambda: head_of(model)[0].weight.mul_(1.5)):
            change()
            assert near(model(x), unfuse(model)(x))
    assert not ran


def test_one_inference_tensor(ran):
    model, x = fused_model(), make_x()
    model(x)
    with torch.inference_mode():
        model.classifier[1].weight = nn.Parameter(torch.randn(10, 1280), requires_grad=False)
    assert calls_of(model, x, ran) == WITHOUT_LINEAR
    with torch.inference_mode():
        model.classifier[1].weight.mul_(1.5)
    assert calls_of(model, x, ran) == WITHOUT_LINEAR


def test_ordinary_parameters_changed_under_inference_mode(ran):
    model, x = fused_model(), make_x()
    with torch.inference_mode():
        model(x)
        head_of(model)[0].weight.mul_(1.5)
        assert calls_of(model, x, ran) == [WHOLE]


def test_weights_another_process_may_change_are_not_kept(ran):
    model, x = fused_model(), make_x()
    model(x)
    head_of(model)[0].weight.share_memory_()
    assert calls_of(model, x, ran) == WITHOUT_HEAD
    head_of(model)[0].weight.data.mul_(1.5)  # as another process would: uncounted
    assert calls_of(model, x, ran) == WITHOUT_HEAD


def test_python_threads_share_a_model():
    model, inputs = fused_model(), [image(1, 3, 20 + i % 7, 25, seed=i) for i in range(24)]

    def call(x):
        with torch.no_grad():  # which is a thread's own
            return model(x)

    with threads(1), ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(call, inputs))
            assert all(near(y, unfuse(model)(x)) for x, y in zip(inputs, found, strict=True))
            head_of(model)[0].weight.mul_(1.1)
            model.classifier[1].weight.mul_(0.9)


def test_eval_in_one_thread_while_another_runs():
    model, x = fused_model(), image(1, 3, 9, 9)
    expected, interval = model(x), sys.getswitchinterval()

    def call(i):
        with torch.no_grad():
            return torch.equal((model.eval() if i % 4 == 0 else model)(x), expected)

    sys.setswitchinterval(1e-6)
    try:
        with threads(1), ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(200)))
    finally:
        sys.setswitchinterval(interval)


# --- fuse and unfuse


def test_unfuse_gives_the_classes_back():
    model = fused_model()
    model(make_x())
    assert isinstance(model, MobileNetV2) and type(model) is not MobileNetV2
    assert type(model.features) is FusedSequential
    plain, original = unfuse(model), fitted()
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in original.modules()]
    assert type(plain) is MobileNetV2 and type(plain.features) is nn.Sequential
    assert near(plain(make_x()), original(make_x()))
    assert type(model.features) is FusedSequential, "unfuse changed its argument"


def test_unfuse_in_place():
    model = fused_model()
    features = model.features
    assert unfuse(model, inplace=True) is model
    assert type(model) is MobileNetV2 and model.features is features and type(features) is nn.Sequential


def test_state_dicts_both_ways():
    model, plain = fused_model(), copy.deepcopy(fitted())
    assert list(model.state_dict()) == list(plain.state_dict())
    state = other_state()
    model.load_state_dict(state, strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), state.values(), strict=True))
    assert near(model(make_x()), plain(make_x()))


def test_fusing_twice_changes_nothing(ran):
    model = fused_model()
    twice = fuse(model)
    assert [type(m) for m in twice.modules()] == [type(m) for m in model.modules()]
    assert calls_of(twice, make_x(), ran) == [WHOLE]
    assert torch.equal(twice(make_x()), model(make_x()))


def test_fusing_in_place_keeps_every_container():
    plain = copy.deepcopy(fitted())
    features, classifier = plain.features, plain.classifier
    model = fuse(plain, inplace=True)
    assert model is plain and model.features is features and model.classifier is classifier
    assert type(features) is FusedSequential and type(classifier) is nn.Sequential


def test_models_made_of_fused_blocks(ran):
    model = torchvision.models.mobilenet_v2(block=FusedInvertedResidual, num_classes=10)
    model = fit_batch_norm(model.eval(), torch.randn(8, 3, 64, 64))
    fused = fuse(model)
    assert calls_of(fused, image(1, 3, 64, 64), ran) == [[STEM] + [B] * 16 + [POOLED, LINEAR]]


class Scaled(MobileNetV2):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_the_model_keeps_its_forward(ran):
    model = copy.deepcopy(fitted())
    model.__class__ = Scaled
    fused = fuse(model)
    assert type(fused) is Scaled
    assert calls_of(fused, make_x(), ran) == MAP_ONLY


def test_a_model_with_its_own_forward_keeps_it(ran):
    model = copy.deepcopy(fitted())
    model.forward = lambda x: x + 1
    fused = fuse(model)
    assert torch.equal(fused(make_x()), make_x() + 1)
    assert not ran


class Sequence(nn.Sequential):
    pass


def test_subclasses_of_sequential_are_left_alone(ran):
    model = fuse(Sequence(*fitted().features).eval())
    assert type(model) is Sequence
    assert calls_of(model, make_x(), ran) == []


# --- sequences within sequences, and other networks


def nested_model():
    """[stem, first block], [two blocks], [a block], [head, pooling, classifier], each in a Sequential."""
    stem_, *blocks, head_ = copy.deepcopy(fitted()).features
    rest = [head_, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *copy.deepcopy(fitted()).classifier]
    stages = [nn.Sequential(stem_, blocks[0]), nn.Sequential(*blocks[1:3]), nn.Sequential(blocks[3]), *rest]
    return fuse(nn.Sequential(*stages).eval())


NESTED = {
    "as it is": (lambda m: None, [WHOLE]),
    "a module in a stage": (lambda m: m[1].insert(1, Shift()), [[STEM, B], [B, B, POOLED, LINEAR]]),
    "a module behind a stage": (lambda m: m.insert(1, Shift()), [[STEM], [B, B, B, POOLED, LINEAR]]),
    "a block taken away": (lambda m: m[1].pop(1), [[STEM, B, B, POOLED, LINEAR]]),
    "an empty stage": (lambda m: m.insert(2, nn.Sequential()), [[STEM, B, B], [B, POOLED, LINEAR]]),
    "a hooked stage": (lambda m: hooked(m[1]), [[STEM], [B, B], [B, POOLED, LINEAR]]),
    "a stage's own forward": (
        lambda m: setattr(m[1], "forward", lambda x, f=m[1].forward: f(x) + 1),
        [[STEM], [B, B], [B, POOLED, LINEAR]],
    ),
    "a stage in train": (lambda m: m[2].train(), [[STEM, B, B], [POOLED, LINEAR]]),
    "weights": (lambda m: m[1][1].conv[0][0].weight.mul_(1.5), [WHOLE]),
}


@pytest.mark.parametrize(("change", "expected"), NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("called", [False, True])
def test_nested_sequences(change, expected, called, ran, copied):
    model, x = copied(nested_model()), make_x()
    if called:
        model(x)
    change(model)
    assert calls_of(model, x, ran) == expected


def test_a_nested_sequence_by_itself(ran):
    model, x = nested_model(), make_x()
    y = model(x)
    assert near(model[2](model[1](model[0](x))), fitted().features[:5](x))
    ran.clear()
    assert torch.equal(model(x), y) and ran == [WHOLE]
    assert [type(m) for m in model if isinstance(m, nn.Sequential)][:3] == [FusedSequential] * 3
    assert [type(m) for m in unfuse(model) if isinstance(m, nn.Sequential)][:3] == [nn.Sequential] * 3


NETWORKS = {
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, [[STEM, *[B] * 10, POOLED, LINEAR, LINEAR]]),
    # The first block adds its input to its result, which the stem therefore has to write.
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, [[BW, *[B] * 14, POOLED, LINEAR, LINEAR]]),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, [[STEM, *[B] * 15, POOLED, LINEAR]]),
    "V1": (models.mobilenet_v1, [[STEM, *[BW] * 12]]),
    "V2": (models.mobilenet_v2, [[STEM, *[B] * 16, POOLED, LINEAR]]),
    "V3 small": (models.mobilenet_v3_small, [[STEM, *[B] * 10, POOLED, LINEAR, LINEAR]]),
    "V3 large": (models.mobilenet_v3_large, [[BW, *[B] * 14, POOLED, LINEAR, LINEAR]]),
}


@pytest.mark.parametrize(("make", "expected"), NETWORKS.values(), ids=NETWORKS)
def test_other_networks_are_one_call(make, expected, ran, copied):
    plain = perturb_batch_norm(unfuse(make(num_classes=10)).eval())
    plain = fit_batch_norm(plain, torch.randn(4, 3, 64, 64)).to(memory_format=torch.channels_last)
    model, x = copied(fuse(plain)), channels_last(2, 3, 65, 64)
    assert near(model(x), plain(x))  # tests/test_real_models.py holds them to the rule
    assert ran == expected
    assert isinstance(model, type(plain)) and list(model.state_dict()) == list(plain.state_dict())
    back = unfuse(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(back(x), plain(x))
    weight = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight
    weight.mul_(1.5)
    assert near(model(x), unfuse(model)(x))
    assert ran == expected * 2


def test_a_new_network_of_this_project_is_one_call(ran):
    model = models.mobilenet_v2(num_classes=10).eval()
    assert calls_of(model, image(1, 3, 64, 64), ran) == [[STEM, *[B] * 16, POOLED, LINEAR]]


def test_stochastic_depth_keeps_a_block_out(ran):
    model, x = fuse(torchvision.models.efficientnet_b0(num_classes=10).eval()), channels_last(2, 3, 64, 64)
    model(x)
    model.features[2][1].stochastic_depth.train()
    ran.clear()
    model(x)
    assert ran == [[STEM, B], [*[B] * 13, POOLED, LINEAR]]
