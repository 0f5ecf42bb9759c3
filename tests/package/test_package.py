"""What is shipped: a source distribution that can be built, a README without gaps."""

import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from support.source_tree import ROOT


@pytest.mark.slow
def test_source_distribution_has_every_source(tmp_path):
    pytest.importorskip("pybind11", reason="setup.py needs it, the installed wheel does not")
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    patterns = "csrc/**/*", "mnv2_fused/**/*.py", "tests/**/*"
    found = (path for pattern in patterns for path in tree.glob(pattern) if path.is_file())
    sources = {str(path.relative_to(tree)) for path in found if path.suffix != ".pyc"}
    assert {"mnv2_fused/module/guard.py", "tests/support/checks.py"} <= sources
    assert sources <= packed
    assert {"mnv2_fused/py.typed", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed


def test_readme_has_no_gaps():
    assert "@@" not in (ROOT / "README.md").read_text()


def test_every_test_that_the_makefile_names_is_there():
    rules = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (chosen,) = re.findall(r"^INSTALLED_TESTS := (.*)", rules, re.MULTILINE)
    names = ["tests/" + name for name in chosen.split()] + re.findall(r"tests/[\w/]+\.py", rules)
    assert len(names) >= 7
    assert [name for name in names if not (ROOT / name).exists()] == []
