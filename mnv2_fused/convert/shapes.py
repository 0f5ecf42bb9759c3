"""What fused blocks are given when a model runs: by a copy on the meta device, or by the model itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..module import FusedBlock, FusedFlat
from ..spec import BlockSpec
from ..tensors import check_shape
from .find import blocks_of, computed_tensors

Shapes = dict[str, list[torch.Size]]  # of each fused block's input, by its name and call


def shapes_of_input(model: nn.Module, input_shape: Sequence[int]) -> Shapes:
    """For one input [N, C, H, W]; by a copy without values, where such a copy runs. Raises ValueError as the model."""
    shape = check_shape(input_shape)
    try:
        return _by_copy(model, shape)
    except Exception:  # whatever a forward that anybody wrote does with tensors without values
        first = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
        x = torch.zeros(shape, dtype=first.dtype, device=first.device)
        return _by_call(model, [x], {}, f"one input of shape {list(shape)}", "input_shape")


def shapes_of_call(model: nn.Module, example: Any) -> Shapes:
    """By a call of the model itself, in eval: a tensor, a list or tuple of arguments, or a mapping of named ones."""
    args, kwargs = [example], {}
    if isinstance(example, Mapping):
        args, kwargs = [], dict(example)
    elif isinstance(example, tuple | list):
        args = list(example)
    return _by_call(model, args, kwargs, "these inputs", "example_inputs")


def _by_call(model: nn.Module, args: list[Any], kwargs: dict[str, Any], what: str, argument: str) -> Shapes:
    blocks = {b: name for name, b, _ in blocks_of(model) if isinstance(b, FusedBlock)}
    names = {_entrance(b): name for b, name in blocks.items()}
    shapes: Shapes = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        name = names.get(module)
        x = next((value for value in given if isinstance(value, Tensor)), None)
        if name is not None and x is not None:
            child = getattr(module, "leading_child", None)
            shapes.setdefault(name, []).append((x if child is None else child(x)).shape)

    with _in_eval(model), torch.no_grad():
        # A hook of all modules, so that no block is touched, and rows run block by block.
        handle = register_module_forward_pre_hook(note)
        try:
            model(*args, **kwargs)
        except Exception as error:
            why = f"{what}: {error}; call report(model) without {argument}"
            raise ValueError(f"the model does not run on {why}") from error
        finally:
            handle.remove()
    return shapes


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training


def _by_copy(model: nn.Module, shape: Sequence[int]) -> Shapes:
    """Of a copy on the meta device, without hooks."""
    tensors = [*model.parameters(), *model.buffers(), *computed_tensors(model)]
    # Tensors that the copy finds in its memo are not copied: no weight is.
    memo = {id(t): t.detach().to("meta") for t in tensors}
    shapes: Shapes = {}
    meta = copy.deepcopy(model, memo)
    meta.eval()
    for module in meta.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for name, block, _ in blocks_of(meta):
        if isinstance(block, FusedFlat):
            _entrance(block).register_forward_pre_hook(_note(shapes.setdefault(name, [])))
        elif isinstance(block, FusedBlock) and block.spec is not None:
            vars(block)["forward"] = _recorder(block.spec, shapes.setdefault(name, []), block.leading_child)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    with torch.no_grad(), torch.device("meta"):
        meta(torch.empty(*shape, dtype=dtype))
    return shapes


def _entrance(block: FusedBlock) -> nn.Module:
    """What is called when ``block`` is."""
    return block.parts[0] if isinstance(block, FusedFlat) else block


def _note(shapes: list[torch.Size]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, given: shapes.append(given[0].shape)


def _recorder(spec: BlockSpec, shapes: list[torch.Size], leading_child: nn.Module | None) -> Callable[..., Tensor]:
    """Stands in for a block's forward: notes the input's shape, returns an output without values."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x = x if leading_child is None else leading_child(x)
        shapes.append(x.shape)
        return x.new_empty(x.shape[0], spec.out_channels, *spec.out_size(*x.shape[2:]))

    return forward
