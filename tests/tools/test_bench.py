"""The benchmark itself: what it times is right, what is missing is named, and docs show what was measured."""

import copy
import dataclasses
import importlib.util
import logging
import re

import pytest
import torch
from support.source_tree import ROOT

pytest.importorskip("torchvision")

from mnv2_fused.__main__ import main
from mnv2_fused.tools import bench, bench_results, bench_tables, engines, int8_engines
from mnv2_fused.tools.bench import Case
from mnv2_fused.tools.bench_results import V1, Results, Row, bfloat16, int8
from mnv2_fused.tools.engines import CHANNELS_LAST, FUSED, PEERS

RESULTS = ROOT / "benchmarks/results/cpu.json"
SMALL = Case((64, 64), engines=(CHANNELS_LAST, FUSED), bfloat16=(FUSED,), v1=True)


@pytest.fixture(scope="module")
def row():
    return bench.measure(SMALL, seconds=0.5)


def test_measure(row):
    assert (row.case, row.threads, row.batch, row.pixels) == ("64", 1, 1, 64 * 64)
    names = {CHANNELS_LAST, FUSED, bfloat16(FUSED), V1}
    assert row.milliseconds.keys() == row.over_fused.keys() == row.over_bfloat16.keys() == names
    assert all(ms > 0 for ms in row.milliseconds.values())
    assert row.over_fused[FUSED] == row.over_bfloat16[bfloat16(FUSED)] == 1
    assert row.over_fused[V1] * row.over_bfloat16[FUSED] == pytest.approx(row.over_bfloat16[V1], rel=0.5)
    assert row.peak_bytes[FUSED] < row.peak_bytes[CHANNELS_LAST]
    assert row.error.keys() == names - {V1}
    assert row.missing == {}


@pytest.mark.slow
def test_measure_leaves_threads_as_they_were():
    before = torch.get_num_threads()
    bench.measure(Case((32, 32), threads=before + 1, engines=(FUSED,), bfloat16=()), seconds=0.1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("engine", [FUSED, CHANNELS_LAST])
@pytest.mark.parametrize("wrong", [lambda y: y + 0.1, lambda y: y * float("nan"), lambda y: y.roll(1, 1)])
def test_wrong_results_are_not_timed(monkeypatch, engine, wrong):
    right = engines.ENGINES[engine]

    def build(*args):
        call = right(*args)
        return lambda: wrong(call())

    monkeypatch.setitem(engines.ENGINES, engine, build)
    with pytest.raises(RuntimeError, match=f"{engine} is wrong"):
        bench.measure(Case((32, 32), engines=(engine,), bfloat16=()), seconds=0.1)


def test_a_missing_engine_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openvino", "onnx") else find(name))
    row = bench.measure(Case((32, 32), engines=(*engines.PEERS, FUSED), bfloat16=("OpenVINO",)), seconds=0.1)
    assert row.milliseconds.keys() == {FUSED}
    assert row.missing.keys() == {"OpenVINO", "ONNX Runtime", bfloat16("OpenVINO")}
    assert all("pip install 'mnv2_fused[peers]'" in reason for reason in row.missing.values())


@pytest.mark.parametrize("engine", engines.PEERS)
def test_peers_refuse_what_they_cannot_run(engine):
    with pytest.raises(engines.EngineMissing, match=r"float16"):
        engines.ENGINES[engine](None, torch.ones(1, 3, 8, 8), torch.float16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_every_engine_gives_the_network(engine):
    """Where it is installed; torch.compile and the peers are slow to build, so once each."""
    model, x = bench.mobilenet_v2(0.35), torch.randn(1, 3, 32, 32)
    try:
        call = engines.ENGINES[engine](model, x, torch.float32, 1)
    except engines.EngineMissing as missing:
        pytest.skip(str(missing))
    with torch.no_grad():
        torch.testing.assert_close(engines.as_tensor(call()), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_growth_is_per_pixel():
    growth = bench.measure_growth(sizes=((32, 32), (64, 32)), rounds=1)
    assert {CHANNELS_LAST, FUSED, bfloat16(FUSED)} <= growth.keys()
    assert all(found.keys() == {"32x32", "64x32"} and min(found.values()) > 0 for found in growth.values())


def test_resident_growth_is_that_of_one_process():
    grown = bench.resident_growth(CHANNELS_LAST, torch.float32, (512, 512), 1)
    assert 20e6 < grown < 500e6  # eager's largest pair of tensors is 50 MB
    with pytest.raises(RuntimeError, match="measuring abacus failed"):
        bench.resident_growth("abacus", torch.float32, (8, 8), 1)


@pytest.fixture(scope="module")
def int8_row():
    return bench.measure(Case((64, 64), engines=(CHANNELS_LAST, FUSED), bfloat16=(FUSED,), int8=(FUSED,)), seconds=0.3)


def test_int8_is_measured_beside_the_others(int8_row):
    names = {CHANNELS_LAST, FUSED, bfloat16(FUSED), int8(FUSED)}
    assert int8_row.milliseconds.keys() == int8_row.over_int8.keys() == int8_row.error.keys() == names
    assert int8_row.over_int8[int8(FUSED)] == 1
    assert int8_row.over_fused[int8(FUSED)] * int8_row.over_int8[FUSED] == pytest.approx(1, rel=0.5)
    assert int8_row.cosine.keys() == {int8(FUSED)} and 0.95 < int8_row.cosine[int8(FUSED)] <= 1
    assert int8_row.peak_bytes[int8(FUSED)] > 0


def test_int8_tables(int8_row):
    times, cosine, memory = bench_tables.tables(Results([int8_row]))[3:6]
    assert times.splitlines()[0] == (
        "| MobileNetV2 | threads | eager channels_last | fused | fused bfloat16 | fused int8 |"
    )
    assert re.fullmatch(r"\| 64 \| 1 \| (\S+ ms, \S+x \| ){3}\*\*\S+ ms\*\* \|", times.splitlines()[2])
    assert re.fullmatch(r"\| 64 \| 0\.9\d{3} \|", cosine.splitlines()[2])
    assert memory.splitlines()[2].count(" MB |") == 4


@pytest.mark.parametrize("wrong", [lambda y: -y, lambda y: y * float("nan"), lambda y: y.roll(1, 1)])
def test_wrong_int8_results_are_not_timed(monkeypatch, wrong):
    right = bench.quantized(FUSED, 1.0)

    def build(x, threads):
        call = right.engines[int8(FUSED)](x, threads)
        return lambda: wrong(call())

    broken = int8_engines.Quantized(1, {int8(FUSED): build})
    monkeypatch.setattr(bench, "quantized", lambda engine, width: broken)
    with pytest.raises(RuntimeError, match=r"fused int8 is wrong.*below 0\.9"):
        bench.measure(Case((32, 32), engines=(FUSED,), bfloat16=(), int8=(FUSED,)), seconds=0.1)


def test_missing_quantisers_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("nncf", "onnx") else find(name))
    row = bench.measure(Case((32, 32), engines=(FUSED,), bfloat16=(), int8=engines.PEERS), seconds=0.1)
    assert row.milliseconds.keys() == {FUSED} and row.missing.keys() == set(map(int8, engines.PEERS))
    assert "nncf is not installed: pip install 'mnv2_fused[peers]'" in row.missing[int8("OpenVINO")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", int8_engines.QUANTIZERS)
def test_every_quantiser_gives_the_network(engine):
    """On other sizes than the calibration's, in batches, too."""
    model, images = bench.mobilenet_v2(0.35), torch.randn(12, 3, 64, 64)
    try:
        found = int8_engines.QUANTIZERS[engine](model, images.split(5))
    except engines.EngineMissing as missing:
        pytest.skip(str(missing))
    floats = sum(p.numel() * 4 for p in model.parameters())
    assert floats / 5 < found.bytes_on_disk < floats / 2
    for x in (torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 64)):
        expected = copy.deepcopy(model).double()(x.double())
        for name, build in found.engines.items():
            y = engines.as_tensor(build(x, 1)())
            assert y.shape == expected.shape
            bench.check_int8(name, y, expected)


def test_quantisers_leave_the_output_and_the_log_alone(capsys):
    """What they print and draw is nobody's; afterwards prints and warnings come through."""
    with int8_engines._quiet():
        print("bar")
        logging.getLogger("nncf").error("kept")
        logging.getLogger("nncf").warning("not kept")
    print("after")
    assert capsys.readouterr().out == "after\n" and logging.root.manager.disable < logging.WARNING


def test_results_come_back_as_they_were_kept(tmp_path, row):
    path = tmp_path / "new folder" / "cpu.json"
    results = Results([row], {FUSED: 10**6}, {FUSED: {"8x8": 1.5}})
    bench_results.save(path, results, bench_block=[{"block": "1"}])
    found, everything = bench_results.load(path)
    assert found == results
    assert everything["bench_block"] == [{"block": "1"}]
    assert everything["machine"]["torch"] == torch.__version__
    assert {"processor", "cores", "instruction set", "commit"} <= everything["machine"].keys()
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}", everything["machine"]["commit"])


@pytest.mark.parametrize(("ms", "shown"), [(7.254, "7.25 ms"), (10.06, "10.1 ms"), (123.4, "123 ms")])
def test_tables(row, ms, shown):
    row = dataclasses.replace(row, milliseconds=row.milliseconds | {FUSED: ms})
    results = Results([row], {FUSED: 12_000_000}, {FUSED: {"8x8": 1.0, "16x8": 1.25}, "OpenVINO": {"16x8": 3.0}})
    first, second, memory, puzzle, growth = bench_tables.tables(results)
    assert first.splitlines()[0] == (
        "| MobileNetV2 | threads | eager | eager channels_last | torch.compile | ONNX Runtime | OpenVINO | fused |"
    )
    assert first.splitlines()[2].startswith("| 64 | 1 |  | ") and first.endswith(f"x |  |  |  | **{shown}** |")
    assert "fused bfloat16" in second and "x less" in memory and "12 MB" in memory
    assert puzzle.splitlines()[2].startswith("| 64 | 1 | ")
    assert growth.splitlines()[0] == "| ns per pixel | 8x8 | 16x8 | most over least |"
    assert growth.splitlines()[2:] == ["| fused | 1.0 | 1.2 | 1.25 |", "| OpenVINO |  | 3.0 | 1.00 |"]


def test_the_command_line_shows_results(tmp_path, capsys, row):
    path, plot = tmp_path / "cpu.json", tmp_path / "bench.png"
    bench_results.save(path, Results([row, Row("224", 1, 1, 50176, missing={"OpenVINO": "not here"})], {FUSED: 10**6}))
    assert main(["bench", "--results", str(path), "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "| 64 | 1 |" in out and "not measured: OpenVINO: not here" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [[], ["--dtype", "int8", "--threads", "2"]])
def test_the_command_line_chooses_cases(options, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(bench, "run", lambda cases, **others: chosen.extend(cases) or 0)
    assert main(["bench", "--quick", "--output", str(tmp_path / "bench.png"), *options]) == 0
    [case] = chosen
    assert case.int8 == (tuple(int8_engines.QUANTIZERS) if options else ())
    assert case.threads == (2 if options else 1)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"models": [{"no": 1}], "resident": {}}'])
def test_the_command_line_refuses_other_files(tmp_path, capsys, content):
    path = tmp_path / "cpu.json"
    path.write_text(content)
    assert main(["bench", "--results", str(path), "--output", str(tmp_path / "bench.png")]) == 1
    assert "is no result of this benchmark" in capsys.readouterr().err


def test_the_command_line_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    assert main(["bench", "--results", str(tmp_path / "none.json")]) == 1
    assert "none.json is no result" in capsys.readouterr().err
    assert main(["bench", "--output", str(tmp_path / "no" / "folder.png")]) == 1
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert main(["bench", "--output", str(tmp_path / "bench.png")]) == 1
    assert "leaves nothing to measure" in capsys.readouterr().err


def tables_of(page):
    """The Markdown tables of a page, each whole."""
    return re.findall(r"(?:^\|.*\|\n)+", page.read_text() + "\n", re.MULTILINE)


def test_docs_show_the_kept_results():
    """Every table of figures in docs/benchmarks.md comes from the file of results, unchanged, and none is missing."""
    results, _ = bench_results.load(RESULTS)
    page = ROOT / "docs/benchmarks.md"
    kept = [table for text in bench_tables.tables(results) for table in text.split("\n\n")]
    assert all(table in page.read_text() for table in kept)
    shown = [table.rstrip("\n") for table in tables_of(page)]
    assert [table for table in shown if not table.startswith("| command |")] == sorted(kept, key=shown.index)


def test_readme_shows_the_kept_results():
    """The README's one table of figures: four rows of the results, unchanged."""
    results, _ = bench_results.load(RESULTS)
    rows = [row for row in results.rows if row.case in ("224", "1088x1920")]
    assert len(rows) == 4
    (shown,) = (table for table in tables_of(ROOT / "README.md") if re.search(r"\d (ms|us|MB)\b", table))
    assert shown.rstrip("\n") == bench_tables.table(rows, (CHANNELS_LAST, *PEERS, FUSED))


def test_kept_results_were_right():
    """Every engine's error was kept beside its time, and every time belongs to an engine that is known."""
    results, everything = bench_results.load(RESULTS)
    names = [*engines.ENGINES, *map(bfloat16, engines.ENGINES), V1]
    for row in results.rows:
        assert set(row.milliseconds) <= set(names)
        assert row.error.keys() == row.milliseconds.keys() - {V1}
        assert row.over_fused.keys() == row.milliseconds.keys()
        if bfloat16(FUSED) in row.milliseconds:
            assert row.error[bfloat16(FUSED)] > row.error[FUSED]
    assert set(results.resident) | set(results.growth) <= set(names)
    assert len(everything["machine"]["commit"]) >= 7
