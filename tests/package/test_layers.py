"""How the package is built up: imports go down, and one file alone gives an object another class."""

import ast
import subprocess
import sys

import pytest
from support.source_tree import ROOT

if not (ROOT / "mnv2_fused").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def test_no_import_goes_up():
    """The layers and the contracts between them are in pyproject.toml."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " 0 broken" in ran.stdout


def assignments_to_class(tree):
    """Lines of ``x.__class__ = ...`` and of ``setattr(x, "__class__", ...)``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="__class__", ctx=ast.Store()):
                yield node.lineno
            case ast.Call(func=ast.Name(id="setattr") | ast.Attribute(attr="__setattr__")):
                if any(isinstance(a, ast.Constant) and a.value == "__class__" for a in node.args):
                    yield node.lineno


def test_one_file_gives_objects_another_class():
    found = {
        str(path.relative_to(ROOT)): list(assignments_to_class(ast.parse(path.read_text())))
        for path in (ROOT / "mnv2_fused").rglob("*.py")
    }
    assert [name for name, lines in found.items() if lines] == ["mnv2_fused/module/in_place.py"], found


@pytest.mark.parametrize(
    "code", ["x.__class__ = C", "x.__class__: type = C", "x.y.__class__, z = C, 1", "setattr(x, '__class__', C)"]
)
def test_an_assignment_is_seen(code):
    assert list(assignments_to_class(ast.parse(code))) == [1]
    assert not list(assignments_to_class(ast.parse("type(x) is x.__class__")))


@pytest.mark.parametrize(
    ("files", "lines"), [("mnv2_fused/**/*.py", 450), ("csrc/cpu/**/*.h", 250), ("csrc/cuda/**/*.[ch]*", 500)]
)
def test_files_are_short(files, lines):
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in ROOT.glob(files)}
    assert len(lengths) > 10
    assert {name: n for name, n in lengths.items() if n > lines} == {}
