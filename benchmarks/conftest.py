"""One table per benchmark file, printed after pytest-benchmark's own; with --results FILE also kept as JSON."""

import argparse
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mnv2_fused.tools import bench_results, bench_tables

_kept = bench_results.Results()
_tables: dict[str, list[dict[str, str]]] = defaultdict(list)


@pytest.fixture
def table(request):
    """Call with one row, {column: text}; rows of a file are printed together at the end."""
    return _tables[request.node.path.stem].append


@pytest.fixture
def keep() -> bench_results.Results:
    """Whole networks' results, printed at the end and written with --results."""
    return _kept


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="write all tables to this JSON file")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default=usual, help="what is timed (default here: %(default)s)"
    )
    parser.addoption("--dtypes", type=_list_of(_dtype), help="of bench_latency: fp32,bf16,fp16")
    parser.addoption("--batches", type=_list_of(int), help="of bench_latency: 1,16")
    parser.addoption("--threads", type=int, default=1, help="of bench_latency on the CPU (default: %(default)s)")


def _list_of(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def _dtype(name):
    if name not in (known := ("fp32", "bf16", "fp16")):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {name!r}")
    return name


def pytest_collection_modifyitems(config, items):
    """On a GPU only bench_latency has rows; the others time the CPU's kernels."""
    if config.getoption("--device") == "cuda":
        kept = [item for item in items if item.path.stem == "bench_latency"]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_sessionfinish(session):
    path = session.config.getoption("--results")
    if path and (_kept.rows or _tables):
        bench_results.save(Path(path), _kept, **_tables)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def pytest_terminal_summary(terminalreporter):
    if _kept.rows:
        terminalreporter.section("bench_model")
        terminalreporter.write_line("\n\n".join(bench_tables.tables(_kept)))
    for name, rows in _tables.items():
        terminalreporter.section(name)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [columns, *([row.get(column, "") for column in columns] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for row in cells:
            terminalreporter.write_line(" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
