"""benchmarks/int8.py: what it times and prints, and that docs show what it kept."""

import dataclasses
import json

import pytest
import torch
from support.source_tree import BENCHMARKS, ROOT, make_importable

pytest.importorskip("torchvision")
make_importable(BENCHMARKS)

import int8 as benchmark  # noqa: E402

from mnv2_fused.tools import bench, engines  # noqa: E402
from mnv2_fused.tools.bench_results import bfloat16, int8  # noqa: E402
from mnv2_fused.tools.engines import CHANNELS_LAST, FROZEN, FUSED  # noqa: E402


def test_cases():
    names = [(case.name, case.threads) for case in benchmark.CASES]
    assert names == [(name, t) for name in ("224", "224, batch 16", "1088x1920") for t in (1, 2)]
    for case in benchmark.CASES:
        assert set(case.engines) == {CHANNELS_LAST, FUSED, FROZEN} and "OpenVINO" in case.bfloat16
        assert set(case.int8) == {"ONNX Runtime", "OpenVINO", FUSED}


def test_a_call_of_a_small_image(capsys):
    assert benchmark.main(["--only", "32", "--seconds", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "| MobileNetV2 | threads | fused | fused frozen | fused int8 |" in out and "\n| 32 | 1 | " in out
    assert f"torch {torch.__version__}" in out
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "huge"])
    assert "no case's name has 'huge' in it; there are 224, 224, batch 16, 1088x1920, 32" in capsys.readouterr().err


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Every case small and without peers; results and page go elsewhere."""
    page = tmp_path / "quantize.md"
    page.write_text(f"before\n\n{benchmark.BEGIN}\n\nold\n\n{benchmark.END}\n\nafter\n")
    case = bench.Case((64, 64), engines=(CHANNELS_LAST, FUSED, FROZEN), bfloat16=(FUSED,), int8=(FUSED,))
    monkeypatch.setattr(benchmark, "CASES", (case,))
    monkeypatch.setattr(benchmark, "PAGE", page)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "int8.json")
    monkeypatch.setattr(benchmark, "QUANTIZERS", {FUSED: None})
    return page


def test_it_keeps_what_it_measured(kept):
    assert benchmark.main(["--seconds", "0.2"]) == 0
    content = json.loads(benchmark.RESULTS.read_text())
    text = kept.read_text()
    assert text == f"before\n\n{benchmark.BEGIN}\n\n{benchmark.tables(content)}\n\n{benchmark.END}\n\nafter\n"
    assert content["models"][0]["peak_bytes"].keys() == {CHANNELS_LAST, FUSED, FROZEN, bfloat16(FUSED), int8(FUSED)}
    assert "\n| size on disk | float32 | fused int8 |\n|---|---|---|\n| MobileNetV2 | 14." in text
    assert text.count("| MobileNetV2 | threads |") == 2 and "old" not in text


def test_it_keeps_nothing_where_an_engine_is_missing(kept, capsys, monkeypatch):
    quantized = bench.quantized

    def missing(engine, width):
        if engine != FUSED:
            raise engines.EngineMissing("nncf is not installed")
        return quantized(engine, width)

    monkeypatch.setattr(bench, "quantized", missing)
    with_peer = dataclasses.replace(benchmark.CASES[0], int8=("OpenVINO", FUSED))
    monkeypatch.setattr(benchmark, "CASES", (with_peer,))
    assert benchmark.main(["--seconds", "0.1"]) == 1
    err = capsys.readouterr().err
    assert "not measured: OpenVINO int8: nncf is not installed" in err and "nothing is kept" in err
    assert not benchmark.RESULTS.exists() and "old" in kept.read_text()


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="must have"):
        benchmark.with_tables(f"text {benchmark.BEGIN} text", "tables")


def test_docs_show_the_kept_results():
    page = (ROOT / "docs/quantize.md").read_text()
    shown = page.partition(benchmark.BEGIN)[2].partition(benchmark.END)[0].strip()
    if benchmark.RESULTS.exists():
        assert shown == benchmark.tables(json.loads(benchmark.RESULTS.read_text()))
    else:
        assert "|" not in shown  # no figures without results
