"""What is shipped: a source distribution that can be built, a README without gaps."""

import shutil
import subprocess
import sys
import tarfile

import pytest
from support.source_tree import ROOT


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
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources <= packed
    assert {"mnv2_fused/py.typed", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed


def test_readme_has_no_gaps():
    assert "@@" not in (ROOT / "README.md").read_text()
