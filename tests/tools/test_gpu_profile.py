"""The profile of the kernels on a GPU, without one: a made-up ncu answers."""

import sys

import pytest
from support.source_tree import BENCHMARKS, make_importable

make_importable(BENCHMARKS)

import gpu_profile  # noqa: E402
from gpu_profile import METRICS, profile, rows_of, table  # noqa: E402

HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'


def launches(*kernels):
    """What ncu prints of these launches; the n-th takes n + 1 thousand nanoseconds."""
    lines = [
        f'"{i}","7","{kernel}","{metric}","","{1 + i},000"'
        for i, kernel in enumerate(kernels)
        for metric in METRICS
        if metric != "dram__bytes.sum"
    ]
    return "==PROF== Connected to process 7\n" + HEAD + "\n".join(lines) + "\n"


def test_the_last_launch_of_each_kernel_counts():
    rows = rows_of(launches("inverted_residual_kernel", "add_splits", "inverted_residual_kernel", "add_splits"))
    assert [row["kernel"] for row in rows] == ["inverted_residual_kernel", "add_splits"]
    assert [row["gpu__time_duration.sum"] for row in rows] == ["3,000", "4,000"]
    text = table({2: rows, 5: rows[:1]})
    assert text.splitlines()[0] == "|  | block 2, block | block 2, sums of splits | block 5, block |"
    assert "| time, ns | 3,000 | 4,000 | 3,000 |" in text
    assert "| bytes of memory | not told | not told | not told |" in text


def made_up_ncu(tmp_path, monkeypatch, script):
    program = tmp_path / "ncu"
    program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_ncu_is_asked_for_one_block(tmp_path, monkeypatch):
    answer = launches("inverted_residual_kernel")
    made_up_ncu(tmp_path, monkeypatch, f"open({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv))\n"
                                       f"print({answer!r})")  # fmt: skip
    (row,) = profile(7, 256, "cuda")
    assert row["gpu__time_duration.sum"] == "1,000"
    asked = (tmp_path / "asked").read_text()
    assert "--run 7 --batch 256 --backend cuda" in asked and "--clock-control none" in asked


@pytest.mark.parametrize("script", ["sys.exit('no counters here')", "print('nothing')"])
def test_what_ncu_says_is_passed_on(tmp_path, monkeypatch, script):
    made_up_ncu(tmp_path, monkeypatch, script)
    with pytest.raises(RuntimeError, match=r"no counters here|nothing"):
        profile(1, 1, "cuda")


def test_without_a_gpu_it_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", "--output", str(tmp_path)])
    monkeypatch.setattr(gpu_profile.backends, "backend_reasons", lambda: {"cuda": "there is no CUDA GPU here"})
    assert gpu_profile.main() == 1
    assert "no profile: cuda: there is no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "profile.md").exists()
