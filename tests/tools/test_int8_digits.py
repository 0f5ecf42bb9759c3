"""benchmarks/int8_digits.py: trains, quantises, and keeps no table of a network that lost too much."""

import pytest
from support.source_tree import BENCHMARKS, make_importable

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
make_importable(BENCHMARKS)

import int8_digits as benchmark  # noqa: E402


@pytest.fixture
def page(monkeypatch, tmp_path):
    path = tmp_path / "quantize.md"
    path.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    monkeypatch.setattr(benchmark, "PAGE", path)
    return path


@pytest.mark.slow
def test_it_trains_and_keeps_a_table(page, monkeypatch, capsys):
    small = {"MobileNetV2 0.35": benchmark.NETWORKS["MobileNetV2 0.35"]}
    monkeypatch.setattr(benchmark, "NETWORKS", small)
    monkeypatch.setattr(benchmark, "SEEDS", (0,))
    monkeypatch.setattr(benchmark, "LEAST_RIGHT", 30.0)
    status = benchmark.main(["--epochs", "3"])
    out = capsys.readouterr().out
    before, after = (float(cell.strip(" %")) for cell in out.split("| MobileNetV2 0.35 | ")[1].split(" | ")[:2])
    assert before > 30 and after > 30  # three epochs teach it something, of which integers keep it
    # What few epochs teach rests on the processor: one image of 450 is 0.22 points.
    kept = before - after <= benchmark.MOST_LOST
    assert status == (0 if kept else 1)
    text = page.read_text()
    assert ("| MobileNetV2 0.35 | " in text) == kept == ("old" not in text) and text.startswith("before\n")
    assert "epoch  3/3" in out


def test_what_lost_too_much_is_not_kept(page, monkeypatch, capsys):
    found = iter([(99.0, 98.9), (98.0, 97.5), (97.0, 96.4)])
    monkeypatch.setattr(benchmark, "accuracies", lambda *_: next(found))
    monkeypatch.setattr(benchmark, "NETWORKS", {"made up": (None, 32)})
    assert benchmark.main([]) == 1
    read = capsys.readouterr()
    assert "| made up | 99.00 %, 98.00 %, 97.00 % | 98.90 %, 97.50 %, 96.40 % | 0.40 points |" in read.out
    assert "FAILED: made up lost more than 0.3 points" in read.err and "old" in page.read_text()


def test_a_network_that_learnt_nothing_is_not_kept(page, monkeypatch, capsys):
    found = iter([(99.0, 99.0), (9.56, 9.56), (97.0, 97.0)])
    monkeypatch.setattr(benchmark, "accuracies", lambda *_: next(found))
    monkeypatch.setattr(benchmark, "SEEDS", (0,))
    assert benchmark.main([]) == 1
    assert "MobileNetV3-small did not learn the digits: below 95.0 % in float" in capsys.readouterr().err
    assert "old" in page.read_text()
