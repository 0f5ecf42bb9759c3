"""What wheels and source distributions have in them, neither less nor more."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.source_tree import ROOT

# Paths of finished ones, from make test-sdist.
DISTRIBUTIONS = [Path(name) for name in os.environ.get("MNV2_FUSED_DISTRIBUTIONS", "").split()]
PACKAGE = {str(p.relative_to(ROOT)) for p in (ROOT / "mnv2_fused").rglob("*.py")} | {"mnv2_fused/py.typed"}


def test_a_wheel_gets_every_module_of_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("pybind11", reason="setup.py needs it, the installed wheel does not")
    tree, library = tmp_path / "tree", tmp_path / "library"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(library)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    assert {str(p.relative_to(library)) for p in library.rglob("*") if p.is_file()} == PACKAGE
    assert {"mnv2_fused/triton_backend/parts.py", "mnv2_fused/plans/cpu.py"} <= PACKAGE


@pytest.mark.skipif(not DISTRIBUTIONS, reason="make test-sdist builds them")
def test_a_finished_wheel():
    (wheel,) = (path for path in DISTRIBUTIONS if path.suffix == ".whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name and name[-1] != "/"}
    (library,) = names - PACKAGE
    assert names - {library} == PACKAGE
    assert library.startswith("mnv2_fused/_C.") and library.endswith(".so")


@pytest.mark.skipif(not DISTRIBUTIONS, reason="make test-sdist builds them")
def test_a_finished_source_distribution_has_every_file_of_the_repository():
    (archive,) = (path for path in DISTRIBUTIONS if path.name.endswith(".tar.gz"))
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    if not (ROOT / ".git").exists():
        pytest.skip("git tells which files are the repository's")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert set(listed.stdout.splitlines()) - packed == {".gitignore"}
