"""The drop-in for torchvision's block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import reading
from .fused_block import FusedBlock
from .reading import Parts


class FusedInvertedResidual(FusedBlock):
    """Drop-in for torchvision's ``InvertedResidual``: same constructor, same state_dict, fused in eval.

    ``torchvision.models.mobilenet_v2(block=FusedInvertedResidual)`` loads published weights and trains. In
    ``train()`` kernels of their own compute block and gradients on the CPU, with statistics of the batch and without
    the expanded tensors (``docs/behaviour.md`` says where, and what is kept). Elsewhere the ordinary modules run; with
    ``recompute`` they are run once more in backward, so that of a block only its input is kept (a compiled graph
    decides itself what to keep). In ``eval()``, and in ``train()`` with every norm in ``eval()`` or frozen, the block
    is one kernel on weights folded in float64; they are folded again whenever a parameter or statistic changes, however
    it is written (``docs/behaviour.md`` states the bound for parts of a tensor that are written behind torch's back).
    With gradients on, backward recomputes the expanded tensor instead of saving it; a second derivative is refused.
    Under ``torch.func`` transforms and forward-mode differentiation the ordinary modules run.

    ``x``: [N, inp, H, W], floating point, of the parameters' dtype unless under autocast -> [N, oup, H', W'].
    Raises ValueError for a stride other than 1 or 2 and for a ``norm_layer`` that cannot be folded.
    """

    conv: nn.Sequential

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        norm = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)

        def with_relu6(channels: int, **conv: Any) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, hidden, bias=False, **conv), norm(hidden), nn.ReLU6(inplace=True))

        layers = [] if expand_ratio == 1 else [with_relu6(inp, kernel_size=1)]
        layers.append(with_relu6(hidden, kernel_size=3, stride=stride, padding=1, groups=hidden))
        layers += [nn.Conv2d(hidden, oup, 1, bias=False), norm(oup)]
        self._adopt(nn.Sequential(*layers), stride, stride == 1 and inp == oup, backend, recompute)

    @classmethod
    def adopt(
        cls,
        conv: nn.Sequential,
        *,
        stride: int,
        residual: bool,
        backend: str = "auto",
        recompute: bool = False,
    ) -> FusedInvertedResidual:
        """A block around existing modules, laid out as torchvision's ``InvertedResidual.conv``, sharing them."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.training = conv.training
        block._adopt(conv, stride, residual, backend, recompute)
        return block

    def _adopt(self, conv: nn.Sequential, stride: int, residual: bool, backend: str, recompute: bool) -> None:
        self.conv = conv
        self.stride = stride
        self.use_res_connect = residual
        self._is_cn = stride > 1
        self._original: tuple[nn.Module, ...] = ()  # the block that fuse() replaced; a tuple, so no submodule
        self._start(backend, recompute)
        self.out_channels: int = self._pairs[-1][0].out_channels

    def _read(self) -> Parts:
        return reading.read_chain([self.conv], residual=self.use_res_connect)

    def _forward_modules(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y

    def _ordinary(self) -> nn.Module:
        return _Ordinary(self)


class _Ordinary(nn.Module):
    """torchvision's ``InvertedResidual`` around the layers of a fused block, where torchvision may be missing."""

    def __init__(self, block: FusedInvertedResidual) -> None:
        super().__init__()
        self.conv = block.conv
        self.stride = block.stride
        self.use_res_connect = block.use_res_connect
        self.out_channels = block.out_channels
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y
