"""Batch-norm folding, and the packed weight layout that every backend reads.

Packed layout (``P = 16``, the panel; ``E16 = ceil(E / 16)``; padding holds zeros; ``kk`` is 9 or 25, the taps)::

    w_expand     [E16, C_in, 16]           w_expand[p, i, l]    = W_e[16 p + l, i]
    b_expand     [16 E16]
    w_depthwise  [E16, kk, 16]             w_depthwise[p, i, l] = W_d[16 p + l, i // k, i % k]
    b_depthwise  [16 E16]
    w_project    [ceil(C_out/16), E, 16]   w_project[q, e, l]   = W_p[16 q + l, e]
    b_project    [C_out]

and with a squeeze-and-excite of S channels, whatever the backend, in the dtype of sums (float32 for half precision)::

    w_squeeze    [ceil(S/16), E, 16]       b_squeeze  [16 ceil(S/16)]
    w_excite     [E16, S, 16]              b_excite   [16 E16]

For bfloat16 activations on the CPU, ``w_expand`` and ``w_project`` are bfloat16 and hold pairs of channels, which one
dot-product instruction multiplies; the rest stays float32::

    w_expand     [E16, ceil(C_in/2), 16, 2]       w_expand[p, i, l, h]  = W_e[16 p + l, 2 i + h]
    w_project    [ceil(C_out/16), E/2, 16, 2]     w_project[q, e, l, h] = W_p[16 q + l, 2 e + h]

For Triton, ``w_expand`` and ``w_project`` are of the activations' dtype, without pairs, and the rest is float32.

A group of expanded channels is one contiguous block of ``w_expand`` and ``w_depthwise`` and one run of rows in
each panel of ``w_project``; a kernel's inner loop reads 16 neighbouring output channels per multiplied value.
``w_project`` and ``b_project`` are not padded along E and C_out, so the packed shapes alone carry the geometry. (For
the same reason a block with an odd E is packed for float32, whatever its activations.)

For the CUDA kernel (backend ``"cuda"``) both products come in fragments, as the lanes of a warp hold them, padded with
zeros to 16 x 16 weights each; ``C16`` and ``O16`` count the panels of C_in and C_out::

    w_expand     [E16, C16, 256]           w_expand[p, i]  = fragment of W_e[16 p :, 16 i :]
    b_expand     [16 E16 + C_in]
    w_depthwise  [E16, kk, 16]
    b_depthwise  [E + 16]
    w_project    [E16, O16, 256]           w_project[p, q] = fragment of W_p[16 q :, 16 p :]
    b_project    [C_out]

A fragment of a weight W [16, 16], rows being output channels, is held by 32 lanes: lane ``4 g + t`` (g of 8, t of 4)
has ``W[4 (g // 2) + 2 j + g % 2, 4 t : 4 t + 4]`` for j = 0 and 1, so that four neighbouring channels of an activation,
one load, are what it multiplies. In memory ``[lane, j, 4]`` where an element has two bytes, ``[j, lane, 4]`` where it
has more: 16 bytes of each lane side by side. A network's stem in front of a block takes the place of ``w_expand`` and
``b_expand``, see :func:`pack_stem`. Both biases end in zeros, C_in and 16 of them, so that their lengths tell
C_in and E, which padded shapes do not, and a kernel may read whole panels of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import gpu_backend

PANEL = 16
FRAGMENT = PANEL * PANEL


class Layout(enum.Enum):
    """How the weights of both 1x1 products lie in memory, in the words of this module's docstring."""

    PANELS = "panels"  # the CPU's kernels, but for bfloat16 products; Triton's
    PAIRS = "panels of pairs"  # the CPU's kernels for bfloat16 products
    FRAGMENTS = "fragments"  # the CUDA kernel

    @staticmethod
    def of(product: Tensor) -> Layout:
        """That of one packed weight, the one place that tells it by its shape."""
        if product.dim() == 3 and product.shape[2] == FRAGMENT:
            return Layout.FRAGMENTS
        return Layout.PAIRS if product.dim() == 4 and product.shape[3] == 2 else Layout.PANELS

    @staticmethod
    def needed(backend: str, dtype: torch.dtype) -> Layout:
        """What the kernel of ``backend`` reads, where its products' packed weights are of ``dtype``."""
        if backend == "cuda":
            return Layout.FRAGMENTS
        return Layout.PAIRS if backend == "cpu" and dtype == torch.bfloat16 else Layout.PANELS


class BlockWeights(NamedTuple):
    """Weights of one block with batch norm folded in. ``w_expand`` and ``b_expand`` are None when t = 1."""

    w_expand: Tensor | None  # [E, C_in, 1, 1]
    b_expand: Tensor | None  # [E]
    w_depthwise: Tensor  # [E, 1, k, k]
    b_depthwise: Tensor  # [E]
    w_project: Tensor  # [C_out, E, 1, 1]
    b_project: Tensor  # [C_out]
    w_squeeze: Tensor | None = None  # [S, E, 1, 1]; the four of a squeeze-and-excite are None without one
    b_squeeze: Tensor | None = None  # [S]
    w_excite: Tensor | None = None  # [E, S, 1, 1]
    b_excite: Tensor | None = None  # [E]


class PackedWeights(NamedTuple):
    """The same weights in the layout of this module's docstring."""

    w_expand: Tensor | None
    b_expand: Tensor | None
    w_depthwise: Tensor
    b_depthwise: Tensor
    w_project: Tensor
    b_project: Tensor
    w_squeeze: Tensor | None = None
    b_squeeze: Tensor | None = None
    w_excite: Tensor | None = None
    b_excite: Tensor | None = None

    @property
    def layout(self) -> Layout:
        return Layout.of(self.w_project)

    def check_layout(self, backend: str) -> None:
        """Raises ValueError, naming both layouts, where the kernel of ``backend`` reads another one than this."""
        needed = Layout.needed(backend, self.w_project.dtype)
        if self.layout is not needed:
            raise ValueError(
                f"the weights are packed for another backend than {backend!r}, which runs here: they are in "
                f"{self.layout.value}, it reads {needed.value}; pack the folded weights with "
                f"mnv2_fused.pack(weights, x.dtype, {backend!r})"
            )


_EPS = 1e-5  # of frozen norms that keep none


def eps_of(norm: Any) -> float:
    """What a norm adds to its variance."""
    return getattr(norm, "eps", _EPS)


# As torchvision, detectron2 and models of transformers call theirs, of no base class.
_FROZEN = "FrozenBatchNorm2d"
_frozen: dict[tuple[type[nn.Module], float], bool] = {}


def _is_frozen_norm(norm: nn.Module) -> bool:
    """Whether one of that name, with four buffers and no parameter, computes what :func:`fold_conv_bn` folds."""
    key = type(norm), eps_of(norm)
    names = ("weight", "bias", "running_mean", "running_var")
    if key not in _frozen:
        found = type(norm).__name__.endswith(_FROZEN) and not list(norm.parameters())
        _frozen[key] = found and set(norm._buffers) >= set(names) and _normalises(norm, names)
    return _frozen[key]


def _normalises(norm: nn.Module, names: Sequence[str]) -> bool:
    drawn = torch.Generator().manual_seed(0)  # not the user's
    values = [torch.rand(4, generator=drawn, dtype=torch.float64) + 0.5 for _ in names]
    weight, bias, mean, variance = values
    other = type(norm).__new__(type(norm))
    vars(other).update(vars(norm))
    other._buffers = dict(zip(names, values, strict=True))
    x = torch.randn(2, 4, 3, 3, generator=drawn, dtype=torch.float64)
    expected = F.batch_norm(x, mean, variance, weight, bias, eps=eps_of(norm))
    try:
        with torch.no_grad():
            return bool(torch.allclose(other(x), expected, rtol=1e-9, atol=1e-9))
    except Exception:  # of a forward that anybody wrote
        return False


def unfoldable(norm: nn.Module) -> str | None:
    """Why this normalisation cannot be folded into the convolution before it, or None when it can."""
    name = type(norm).__name__
    # A subclass may count, log or start otherwise, as long as it computes the same.
    known = any(isinstance(norm, c) and type(norm).forward is c.forward for c in (nn.BatchNorm2d, nn.SyncBatchNorm))
    if not known and not _is_frozen_norm(norm):
        if name.endswith(_FROZEN):
            return (
                f"{name} of {type(norm).__module__} computes something else than a batch norm with eps {eps_of(norm)}"
            )
        return f"{name} cannot be folded into a convolution, only BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d"
    if norm.running_mean is None or norm.running_var is None:
        return f"{name} has no running statistics, so it normalises by the batch even in eval"
    return None


def fold_conv_bn(
    weight: Tensor,  # [C_out, C_in / groups, k, k]
    bias: Tensor | None,  # [C_out], the convolution's
    norm_weight: Tensor | None,  # [C_out] each; a missing affine counts as weight 1, bias 0
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of the one convolution equal to ``norm(conv(x))`` in eval.

    Every value is widened on its own before any arithmetic, so half-precision parameters fold as exactly as
    float32 ones. Differentiable in every tensor.
    """
    scale = torch.rsqrt(variance.double() + eps)
    if norm_weight is not None:
        scale = scale * norm_weight.double()
    folded = (-mean.double() if bias is None else bias.double() - mean.double()) * scale
    if norm_bias is not None:
        folded = folded + norm_bias.double()
    return weight.double() * scale[:, None, None, None], folded


class ConvNorm(NamedTuple):
    """The tensors of a convolution and of the norm behind it; the last four are None without a norm."""

    weight: Tensor  # [C_out, C_in / groups, k, k]
    bias: Tensor | None  # [C_out], and so are the others
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None

    def folded(self, eps: float) -> tuple[Tensor, Tensor]:
        """Weight and bias, in float64, of the one convolution that computes the same in eval."""
        if self.mean is not None and self.variance is not None:
            return fold_conv_bn(self.weight, self.bias, self.norm_weight, self.norm_bias, self.mean, self.variance, eps)
        bias = self.weight.new_zeros(self.weight.shape[0], dtype=torch.float64) if self.bias is None else self.bias
        return self.weight.double(), bias.double()


def conv_norms(tensors: Sequence[Tensor | None], stages: int) -> tuple[list[ConvNorm], list[ConvNorm]]:
    """A block's convolutions among its tensors in a row: those of its stages, and the two of a squeeze-and-excite.

    The row is what ops of compiled graphs take: six tensors of each stage (:class:`ConvNorm`), then weight and bias of
    each product of a squeeze-and-excite.
    """
    width = len(ConvNorm._fields)
    squeeze = tensors[width * stages :]
    return (
        [_conv_norm(tensors[width * i : width * (i + 1)]) for i in range(stages)],
        [_conv_norm(squeeze[i : i + 2]) for i in range(0, len(squeeze), 2)],
    )


def _conv_norm(tensors: Sequence[Tensor | None]) -> ConvNorm:
    weight, *others = tensors
    assert weight is not None  # a convolution has one
    return ConvNorm(weight if weight.dim() > 2 else weight[:, :, None, None], *others)  # of a Linear


def _panels(t: Tensor) -> Tensor:
    """[C, K] -> [ceil(C/16), K, 16], zeros past C."""
    t = F.pad(t, (0, 0, 0, -t.shape[0] % PANEL))
    return t.reshape(-1, PANEL, t.shape[1]).transpose(1, 2).contiguous()


def _pairs(panels: Tensor) -> Tensor:
    """[P, K, 16] -> [P, ceil(K/2), 16, 2], a zero past K."""
    panels = F.pad(panels, (0, 0, 0, panels.shape[1] % 2))
    return panels.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def _fragments(t: Tensor) -> Tensor:
    """[N, K] -> [ceil(N/16), ceil(K/16), 256], zeros past N and K."""
    t = F.pad(t, (0, -t.shape[1] % PANEL, 0, -t.shape[0] % PANEL))
    rows, columns = t.shape[0] // PANEL, t.shape[1] // PANEL
    split = t.reshape(rows, 4, 2, 2, columns, 4, 4)  # g // 2, j, g % 2, and t
    lanes = split.permute(0, 4, 1, 3, 5, 2, 6).reshape(rows, columns, 32, 2, 4)
    return (lanes if t.itemsize == 2 else lanes.transpose(2, 3)).reshape(rows, columns, FRAGMENT)


def _of_fragments(t: Tensor) -> Tensor:
    """The inverse of :func:`_fragments`, padding included."""
    lanes = t.unflatten(2, (32, 2, 4)) if t.itemsize == 2 else t.unflatten(2, (2, 32, 4)).transpose(2, 3)
    split = lanes.unflatten(2, (4, 2, 4))
    return split.permute(0, 2, 5, 3, 1, 4, 6).reshape(PANEL * t.shape[0], PANEL * t.shape[1])


def cast_product(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A product's packed weights in another dtype, fragments in the order that belongs to it."""
    if Layout.of(t) is Layout.FRAGMENTS and (t.itemsize == 2) != (dtype.itemsize == 2):
        lanes = t.unflatten(2, (32, 2, 4) if t.itemsize == 2 else (2, 32, 4))
        t = lanes.transpose(2, 3).flatten(2)
    return t.to(dtype)


def fragment_channels(packed: PackedWeights) -> int:
    """C_in of weights packed in fragments."""
    if packed.w_expand is None or packed.b_expand is None:
        return hidden_channels(packed)
    return packed.b_expand.shape[0] - PANEL * packed.w_expand.shape[0]


def packed_dtypes(dtype: torch.dtype, device: torch.device, hidden: int = 0) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a product's packed weights and of all others, for activations of ``dtype``.

    Half precision is summed in float32, to which biases and depthwise weights belong. CPU kernels multiply float32,
    float64 and pairs of bfloat16, which an odd number of ``hidden`` channels does not come in; float16 activations
    are widened to float32.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype, dtype
    if device.type != "cpu":
        return dtype, torch.float32
    return torch.bfloat16 if dtype == torch.bfloat16 and hidden % 2 == 0 else torch.float32, torch.float32


def _pack_product(weight: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, K] -> panels of ``dtype``, those of bfloat16 on the CPU in pairs."""
    panels = _panels(weight.to(dtype))
    return _pairs(panels) if dtype == torch.bfloat16 and device.type == "cpu" else panels


def pack_block(weights: BlockWeights, dtype: torch.dtype, backend: str) -> PackedWeights:
    """:func:`mnv2_fused.pack` of weights whose shapes are known to fit."""
    device = weights.w_project.device
    if device.type == "cuda" and backend == "auto":
        backend = gpu_backend(device)
    if backend in ("cuda", "triton"):  # neither rests on where the weights are now
        device = torch.device("cuda")
    products, others = packed_dtypes(dtype, device, weights.w_project.shape[1])

    def padded(t: Tensor) -> Tensor:
        return F.pad(t.to(others), (0, -t.shape[0] % PANEL))

    def product(weight: Tensor) -> Tensor:
        weight = weight.flatten(1)
        return _fragments(weight.to(products)) if backend == "cuda" else _pack_product(weight, products, device)

    w_expand = b_expand = None
    if weights.w_expand is not None and weights.b_expand is not None:
        w_expand, b_expand = product(weights.w_expand), padded(weights.b_expand)
    w_project, b_depthwise = product(weights.w_project), padded(weights.b_depthwise)
    if backend == "cuda":
        w_project = w_project.transpose(0, 1).contiguous()
        b_depthwise = F.pad(weights.b_depthwise.to(others), (0, PANEL))
        if weights.w_expand is not None and b_expand is not None:
            b_expand = F.pad(b_expand, (0, weights.w_expand.shape[1]))
    squeeze: list[Tensor] = []
    if weights.w_squeeze is not None:
        pairs: Any = weights[6:8], weights[8:10]
        for weight, bias in pairs:
            squeeze += [_panels(weight.to(others).flatten(1)), padded(bias)]
    return PackedWeights(
        w_expand,
        b_expand,
        _panels(weights.w_depthwise.to(others).flatten(1)),
        b_depthwise,
        w_project,
        weights.b_project.to(others).contiguous(),
        *squeeze,
    )


def pack_conv(weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """[C_out, C_in, k, k] and [C_out] -> [ceil(C_out/16), k * k * C_in, 16] and [16 ceil(C_out/16)].

    A pixel's values under the kernel come row by row, each pixel's C_in channels together, as a channels_last image
    holds them; an odd C_in gets a zero more where bfloat16 comes in pairs. Used for the stem (k = 3) and the head
    (k = 1).
    """
    products, others = packed_dtypes(dtype, weight.device)
    taps = weight.permute(0, 2, 3, 1)
    if products == torch.bfloat16 and weight.device.type == "cpu":
        taps = F.pad(taps, (0, weight.shape[1] % 2))
    return (
        _pack_product(taps.flatten(1), products, weight.device),
        F.pad(bias.to(others), (0, -bias.shape[0] % PANEL)),
    )


def pack_stem(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[E, C, 3, 3] and [E] -> [E16, 3, 256] and [16 E16 + C], as the CUDA kernel takes a network's stem.

    A panel is a row of the window: four pixels of four channels, of which the last pixel, and the channels past C, have
    zero weights.
    """
    products, others = packed_dtypes(dtype, torch.device("cuda"))
    channels = weight.shape[1]
    rows = F.pad(weight.to(products).permute(0, 2, 3, 1), (0, 4 - channels, 0, 1))  # [E, 3, 4, 4]
    return _fragments(rows.flatten(1)), F.pad(bias.to(others), (0, -bias.shape[0] % PANEL + channels))


def hidden_channels(packed: PackedWeights) -> int:
    """E of packed weights."""
    if packed.layout is Layout.FRAGMENTS:
        return packed.b_depthwise.shape[0] - PANEL
    return packed.w_project.shape[1] * (2 if packed.layout is Layout.PAIRS else 1)


def unpack(packed: PackedWeights, in_channels: int | None = None) -> BlockWeights:
    """The inverse of :func:`pack`. Differentiable. ``in_channels``, if odd, cannot be told from packed pairs."""
    out_channels = packed.b_project.shape[0]

    def rows(t: Tensor, count: int) -> Tensor:
        layout = Layout.of(t)
        if layout is Layout.FRAGMENTS:
            return _of_fragments(t)[:count]
        if layout is Layout.PAIRS:
            t = t.transpose(2, 3).flatten(1, 2)
        return t.transpose(1, 2).reshape(-1, t.shape[1])[:count]

    hidden, w_project = hidden_channels(packed), packed.w_project
    if packed.layout is Layout.FRAGMENTS:
        in_channels, w_project = fragment_channels(packed), w_project.transpose(0, 1)
    w_expand = b_expand = None
    if packed.w_expand is not None and packed.b_expand is not None:
        w_expand = rows(packed.w_expand, hidden)[:, :in_channels, None, None]
        b_expand = packed.b_expand[:hidden]
    squeeze: list[Tensor] = []
    if packed.w_squeeze is not None:
        given: Any = packed[6:]
        w_squeeze, b_squeeze, w_excite, b_excite = given
        channels = w_excite.shape[1]
        squeeze = [
            rows(w_squeeze, channels)[:, :, None, None],
            b_squeeze[:channels],
            rows(w_excite, hidden)[:, :, None, None],
            b_excite[:hidden],
        ]
    kernel = math.isqrt(packed.w_depthwise.shape[1])
    return BlockWeights(
        w_expand,
        b_expand,
        rows(packed.w_depthwise, hidden).reshape(hidden, 1, kernel, kernel),
        packed.b_depthwise[:hidden],
        rows(w_project, out_channels)[:, :hidden, None, None],
        packed.b_project,
        *squeeze,
    )
