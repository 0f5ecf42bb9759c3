"""README, CONTRIBUTING and docs: links resolve, names exist, code runs."""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch

import mnv2_fused
from mnv2_fused.__main__ import make_parser
from mnv2_fused.testing import random_weights

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
FOLDERS = ("benchmarks/", "csrc/", "docs/", "examples/", "mnv2_fused/", "tests/")
SOURCE = (".py", ".cpp", ".h", ".cu", ".cuh")


def prose(page):
    """The text without fenced blocks."""
    return FENCE.sub("", page.read_text())


def links(page):
    """(target without anchor, anchor) of each link and picture inside the project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page):
    """What GitHub makes of the headings."""
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks(name, language):
    return [code for kind, code in FENCE.findall((ROOT / name).read_text()) if kind == language]


@by_page
def test_links_resolve(page):
    for target, anchor in links(page):
        assert target.exists(), f"{page.name} links to {os.path.relpath(target, ROOT)}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to #{anchor} of {target.name}"


@by_page
def test_named_paths_exist(page):
    """Paths in back quotes are the repository's; NAME and * stand for any."""
    for path in re.findall(r"`([\w./-]+)`", prose(page)):
        if path.startswith(FOLDERS) and "NAME" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_architecture_has_a_line_for_each_file():
    told = {target for target, _ in links(ROOT / "docs/architecture.md")}
    packages = [ROOT / "mnv2_fused", ROOT / "csrc"]
    files = {path for folder in packages for path in folder.rglob("*") if path.suffix in SOURCE}
    missing = {str(path.relative_to(ROOT)) for path in files - told if path.name != "__init__.py"}
    assert not missing


def test_the_ways_through_the_code_name_files_and_functions():
    """Lines of architecture.md's drawings: a function, then the file that it is in."""
    lines = [line.split() for code in blocks("docs/architecture.md", "") for line in code.splitlines()]
    steps = [words for words in lines if any(word.endswith(SOURCE) for word in words)]
    assert len(steps) > 20
    for words in steps:
        at = next(i for i, word in enumerate(words) if word.endswith(SOURCE))
        path = ROOT / words[at]
        path = path if words[at].startswith("csrc/") else ROOT / "mnv2_fused" / words[at]
        assert path.exists(), words[at]
        for name in re.findall(r"\w*[_A-Z]\w*", words[0]):
            assert name in path.read_text(), f"{name} is not in {words[at]}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/extending.md", "docs/architecture.md"])
def test_names_in_a_row_are_in_its_files(name):
    """A row of a table that links to sources names what is in them."""
    page, checked = ROOT / name, 0
    for row in re.findall(r"^\|.*\|$", prose(page), re.MULTILINE):
        targets = [(page.parent / t.partition("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s]+)\)", row)]
        text = "".join(t.read_text() for t in targets if t.suffix in SOURCE and t.is_file())
        if not text:
            continue
        for identifier in re.findall(r"`([A-Za-z_]\w*)(?:\(\)|<S>|<V, S>|\(S\))?`", row):
            assert identifier in text, f"{identifier} is in no file of: {row}"
            checked += 1
    assert checked > 5


@pytest.mark.parametrize(
    ("name", "i"),
    [
        (name, i)
        for name in ("README.md", "docs/api.md", "docs/how-it-works.md", "docs/extending.md", "docs/quantize.md")
        for i in range(len(blocks(name, "python")))
    ],
)
def test_python_blocks_run(name, i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(name, "python")[i].replace('weights="DEFAULT"', "weights=None")  # nothing is downloaded here
    if "torchvision" in code:
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    exec(compile(code, f"{name}, block {i}", "exec"), {"__name__": name})


def test_readmes_equivalent_is_the_reference():
    (code,) = (code for code in blocks("README.md", "python") if "def inverted_residual" in code)
    names = {}
    exec(code, names)
    for spec in (
        mnv2_fused.BlockSpec(6, 36, 6, residual=True),
        mnv2_fused.BlockSpec(6, 36, 10, stride=2),
        mnv2_fused.BlockSpec(6, 6, 10, expand=False),
    ):
        x, weights = torch.randn(2, 6, 9, 7, dtype=torch.float64), random_weights(spec)
        weights = type(weights)(*(None if t is None else t.double() for t in weights))
        y = names["inverted_residual"](x, weights, spec.stride, spec.residual)
        expected = mnv2_fused.inverted_residual_reference(x, weights, stride=spec.stride, residual=spec.residual)
        torch.testing.assert_close(y, expected)


def test_every_public_name_is_documented():
    text = (ROOT / "docs/api.md").read_text()
    assert [name for name in mnv2_fused.__all__ if not re.search(rf"\b{name}\b", text)] == []
    options = list(inspect.signature(mnv2_fused.fuse).parameters)[1:]
    assert [name for name in options if f"| `{name}` |" not in text] == []


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name} names make {target}"
        for command in re.findall(r"python -m mnv2_fused ([^`\n#]+)", page.read_text()):
            make_parser().parse_args(command.split())


def test_every_environment_variable_is_documented():
    """Those that the package and its build read; the tests' own are theirs."""
    sources = [ROOT / "setup.py", *(ROOT / "mnv2_fused").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    read = set(re.findall(r"\"(MNV2_FUSED_[A-Z0-9]+)\"\s*[,)\]]", "".join(path.read_text() for path in sources)))
    assert {"MNV2_FUSED_BACKEND", "MNV2_FUSED_ISA", "MNV2_FUSED_CUDA"} <= read
    told = "".join(page.read_text() for page in PAGES)
    defines = {"MNV2_FUSED_ARCHITECTURES"}  # of the compiler
    assert [name for name in read - defines if name not in told] == []
