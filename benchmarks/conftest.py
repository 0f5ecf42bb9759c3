"""One table per benchmark file, printed after pytest-benchmark's own."""

from collections import defaultdict

import pytest
import torch

_tables: dict[str, list[dict[str, str]]] = defaultdict(list)


@pytest.fixture
def table(request):
    """Call with one row, {column: text}; rows of a file are printed together at the end."""
    return _tables[request.node.path.stem].append


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def pytest_terminal_summary(terminalreporter):
    for name, rows in _tables.items():
        terminalreporter.section(name)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [columns, *([row.get(column, "") for column in columns] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for row in cells:
            terminalreporter.write_line(" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
