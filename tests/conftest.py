"""What every test shares: hypothesis' profile, NaN-filled allocations, a clean environment, ways to copy a module."""

import copy
import io
import os
import pickle
from contextlib import nullcontext

# Several processes that run tests at a time would wait for each other's threads: each has one, unless a test asks for
# more. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Each process that compiles a graph would else try each instruction set in processes that import torch: 13 seconds.
if "CI" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import hypothesis
import pytest
import torch
from support.quick_interpreter import quick_interpreter

from mnv2_fused import backends, encoding, ops
from mnv2_fused.encoding import LayerKind

# So that a failed assertion in them shows its values, as one in a test does.
pytest.register_assert_rewrite("support.checks", "support.models")

# Without it cuBLAS refuses to run on a GPU once a test asks for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# MNV2_FUSED_FUZZ=2000 asks for that many examples of each fuzz test.
hypothesis.settings.register_profile(
    "mnv2_fused",
    max_examples=int(os.environ.get("MNV2_FUSED_FUZZ", "150" if "CI" in os.environ else "300")),
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("mnv2_fused")


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th test only")


def pytest_collection_modifyitems(config, items):
    """Files with tests of minutes first: at the end all but one process would wait for them."""
    every = config.getoption("every")
    left_out = [item for i, item in enumerate(items) if i % every]
    items[:] = items[::every]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    first = {item.path for item in items if item.get_closest_marker("minutes")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    """A backend exported in the developer's shell must not decide what the tests test."""
    monkeypatch.delenv("MNV2_FUSED_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Which convolutions of eager round to TF32 is a matter of cuDNN's heuristics: no measure for a kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True, scope="session")
def quick_triton():
    with quick_interpreter() if backends.triton_interpreted() else nullcontext():
        yield


@pytest.fixture
def fresh_graphs():
    """For tests that compile: none sees another's graphs."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def poison():
    """Fills every allocation of torch and of the CPU's ops with NaN: an element that an op leaves unwritten, or reads
    from scratch before it writes it, then shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if backends._C is not None:
        backends._C.poison_new_memory(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
    if backends._C is not None:
        backends._C.poison_new_memory(False)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(params=[copy.deepcopy, through_pickle, through_a_file])
def copied(request):
    """Each way to make a copy of a module: a function that does."""
    return request.param


@pytest.fixture
def nothing_records():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def ran(monkeypatch):
    """The kinds of layers of every call of the op."""
    calls, original, of_row = [], ops.sequence, ops.sequence_row

    def count(geometry):
        calls.append([LayerKind(values[0]) for values, _ in encoding.split_layers(geometry)])

    def counted(x, weights, geometry, backend="cpu"):
        count(geometry)
        return original(x, weights, geometry, backend)

    def counted_row(x, weights, layers, flat):
        count(layers.tolist())
        return of_row(x, weights, layers, flat)

    monkeypatch.setattr(ops, "sequence", counted)
    monkeypatch.setattr(ops, "sequence_row", counted_row)
    return calls
