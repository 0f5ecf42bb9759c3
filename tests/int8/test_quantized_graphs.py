"""Quantised models in compiled, exported and traced graphs, and what they keep packed."""

import copy
import io
import subprocess
import sys
from functools import cache

import pytest
import torch
from support.int8 import calibration, quantized, smooth, sqnr
from support.models import ahead_of_time, fitted
from torch.utils.flop_counter import FlopCounterMode

from mnv2_fused import models, quantize, quantized_like
from mnv2_fused.int8.modules import QuantizedBlock, QuantizedLayer, QuantizedRow
from mnv2_fused.testing import fit_batch_norm


@cache
def squeezed():
    torch.manual_seed(0)
    return fit_batch_norm(models.mobilenet_v3_small(width_mult=0.35).eval(), smooth(16, 3, 64))


ORIGINALS = {"v2": fitted, "v3": squeezed, "float between rows": fitted}


@cache
def int8_of(name, rows=True):
    skip = ("features.3",) if name == "float between rows" else ()
    return quantize(ORIGINALS[name](), calibration(), rows=rows, skip=skip)


by_model = pytest.mark.parametrize("name", ORIGINALS)
by_rows = pytest.mark.parametrize("rows", [True, False], ids=["rows", "blocks"])
X = smooth(2, 3, 64, seed=5)


def calls_of(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def same(found, expected):
    """To the bit, where nothing is float between layers on integers."""
    return torch.equal(found, expected) or sqnr(expected, found) > 40


@by_model
@by_rows
def test_compiled_in_one_graph(name, rows, fresh_graphs):
    int8 = int8_of(name, rows)
    with torch.no_grad():
        compiled = torch.compile(int8, fullgraph=True, backend="aot_eager", dynamic=True)
        for x in (X, smooth(3, 3, 96, seed=6)):
            assert same(compiled(x), int8(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_by_inductor(mode, fresh_graphs):
    int8 = quantized()
    with mode():
        assert torch.equal(torch.compile(int8, fullgraph=True)(X), int8(X))


def test_a_graph_takes_the_values_that_are_loaded(fresh_graphs):
    int8 = copy.deepcopy(quantized())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    state = {name: t.clone() for name, t in int8.state_dict().items()}
    state["layers.5.project.bias"] += 1000
    with torch.no_grad():
        compiled = torch.compile(int8, fullgraph=True, backend=backend)
        before = compiled(X)
        int8.load_state_dict(state)
        after = compiled(X)
        assert torch.equal(after, int8(X)) and not torch.equal(after, before)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@by_model
@by_rows
def test_exported_for_any_size(name, rows, strict):
    int8 = int8_of(name, rows)
    sizes = {i: torch.export.Dim(side, min=2, max=96) for i, side in enumerate("ncyx") if side != "c"}
    if name == "float between rows" or not rows:  # sizes behind float layers are no whole numbers to torch
        sizes |= {2: 32 * sizes[2], 3: 32 * sizes[3]}
    with torch.no_grad():
        program = torch.export.export(int8, (X,), dynamic_shapes=(sizes,), strict=strict)
        if name == "v2" and rows:
            assert calls_of(program.graph) == ["mnv2_fused.int8_sequence.default", "aten.flatten.using_ints"]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        for x in (X, smooth(3, 3, 96, seed=6)[..., :64]):
            assert same(program.module()(x), int8(x)) and same(loaded.module()(x), int8(x))


@by_model
@by_rows
def test_traced(name, rows, recwarn):
    int8 = int8_of(name, rows)
    with torch.no_grad():
        traced = torch.jit.trace(int8, X)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for x in (X, smooth(3, 3, 96, seed=6)):
            assert same(torch.jit.load(file)(x), int8(x))
            file.seek(0)
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]


RUN_PACKAGE = """
import sys, torch
import mnv2_fused  # the operators
x, expected = torch.load(sys.argv[2])
y = torch._inductor.aoti_load_package(sys.argv[1])(x)
assert torch.equal(y, expected)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ahead_of_time_inductor(tmp_path):
    int8, x = int8_of("v3"), smooth(3, 3, 64, seed=6)
    with torch.no_grad():
        program = torch.export.export(int8, (X,), dynamic_shapes=({0: torch.export.Dim("images", min=1, max=64)},))
        package = ahead_of_time(program, tmp_path / "m.pt2")
        torch.save((x, int8(x)), tmp_path / "x.pt")
    command = [sys.executable, "-W", "ignore", "-c", RUN_PACKAGE, package, str(tmp_path / "x.pt")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@by_model
def test_flops_are_those_of_the_original(name):
    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X)
        return counter.get_total_flops()

    expected = flops(ORIGINALS[name]())
    assert flops(int8_of(name)) == flops(int8_of(name, rows=False)) == expected > 0


def test_packed_weights_are_in_no_state_dict_and_no_pickle():
    int8, x = quantized(), X
    assert int8.packed is not None and "packed" in dict(int8.named_buffers())
    assert not any("packed" in name for name in int8.state_dict())
    assert all(layer.packed is None for layer in int8.layers)  # a row is packed once
    empty = quantized_like(fitted())
    assert empty.packed is None and empty.state_dict().keys() == int8.state_dict().keys()
    assert int8.__getstate__()["_buffers"]["packed"] is None and copy.deepcopy(empty).packed is None
    assert torch.equal(copy.deepcopy(int8).packed, int8.packed) and torch.equal(copy.deepcopy(int8)(x), int8(x))


def test_blocks_are_packed_one_by_one():
    int8 = int8_of("v2", rows=False)
    layers = [m for m in int8.modules() if isinstance(m, QuantizedLayer)]
    assert layers and all(layer.packed is not None for layer in layers)
    assert not any(isinstance(m, QuantizedRow) for m in int8.modules())


@by_rows
@pytest.mark.parametrize("assign", [True, False])
def test_loading_packs_anew(rows, assign):
    int8, other = int8_of("v2", rows), quantized_like(fitted(), rows=rows)
    other.load_state_dict({name: t.clone() for name, t in int8.state_dict().items()}, assign=assign)
    assert torch.equal(other(X), int8(X))
    changed = {name: t + 1000 if name.endswith("5.project.bias") else t for name, t in int8.state_dict().items()}
    assert rows or not any(name.endswith("5.project.bias") for name in changed)
    if not rows:
        changed = {name: t + 1000 if name.endswith("2.layer.project.bias") else t for name, t in changed.items()}
    other.load_state_dict(changed, assign=assign)
    assert not torch.equal(other(X), int8(X))
    other.load_state_dict(int8.state_dict(), strict=True, assign=assign)
    assert torch.equal(other(X), int8(X))


def test_loading_in_inference_mode():
    other = quantized_like(fitted())
    with torch.inference_mode():
        other.load_state_dict(quantized().state_dict())
    assert not any(t.is_inference() for t in other.buffers())
    assert torch.equal(other(X), quantized()(X))


def test_loading_a_part_of_a_row_is_refused():
    int8 = copy.deepcopy(quantized())
    for part in (int8.layers[1], int8.layers[1].project):
        with pytest.raises(RuntimeError, match="packed with the row it is part of: load values into the row"):
            part.load_state_dict(part.state_dict())
    block = next(m for m in copy.deepcopy(int8_of("v2", rows=False)).modules() if isinstance(m, QuantizedBlock))
    block.layer.load_state_dict(block.layer.state_dict())
    int8.load_state_dict({"layers.1.project.bias": int8.layers[1].project.bias + 1000}, strict=False)
    assert not torch.equal(int8(X), quantized()(X))


def test_traces_follow_what_is_loaded():
    int8 = copy.deepcopy(quantized())
    with torch.no_grad():
        traced = torch.jit.trace(int8, X)
        int8.load_state_dict({"layers.1.project.bias": int8.layers[1].project.bias + 1000}, strict=False)
        assert torch.equal(traced(X), int8(X)) and not torch.equal(int8(X), quantized()(X))


def test_the_reference_runs_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    int8 = copy.deepcopy(quantized())
    assert int8.packed is None and torch.equal(int8(X), quantized()(X))
