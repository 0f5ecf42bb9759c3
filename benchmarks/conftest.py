"""One table per benchmark file, printed after pytest-benchmark's own; with --results FILE also kept as JSON."""

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
