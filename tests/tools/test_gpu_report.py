"""The GPU report, without a GPU: what is measured is made up here, and says so; the rest runs for real."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from support.source_tree import BENCHMARKS, ROOT, make_importable
from torch import nn

pytest.importorskip("torchvision")

from mnv2_fused import testing
from mnv2_fused.tools.bench_results import V1

make_importable(BENCHMARKS)

import gpu_report  # noqa: E402
import gpu_tables  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_report import Budget, Section, run_sections  # noqa: E402
from gpu_tables import Report, markdown  # noqa: E402
from gpu_timing import Row  # noqa: E402

FUSED, EAGER = "fused made-up, graphed", "eager channels_last, graphed"


class MadeUpGpu:
    """A device whose clock moves only by what runs on it; its events answer like torch's."""

    def __init__(self, tick=0.0):
        self.now, self.is_cold, self.waited, self.tick = 0.0, True, 0, tick

    def flush(self):
        self.now += 7.0
        self.is_cold = True

    def candidate(self, cold, warm):
        def call():
            self.now += cold if self.is_cold else warm
            self.is_cold = False

        return call

    def event(self):
        gpu = self

        class Event:
            def record(self):
                gpu.now += gpu.tick
                self.at = gpu.now

            def synchronize(self):
                gpu.waited += 1

            def elapsed_time(self, end):
                return end.at - self.at  # milliseconds

        return Event()


def timings(**seconds):
    return {name: testing.Timing(list(values)) for name, values in seconds.items()}


def made_up_row(what="MobileNetV2", shape=(256, 3, 224, 224), **options):
    row = Row(what, list(shape), "fp16", **options)
    by_name = {FUSED: testing.Timing([0.001] * 4), EAGER: testing.Timing([0.003, 0.0031, 0.003, 0.0029])}
    gpu_timing.fill(
        row, {"cold": by_name, "warm": {n: testing.Timing([s / 2 for s in t.seconds]) for n, t in by_name.items()}}
    )
    row.error = {FUSED: 1e-3, EAGER: 2e-3}
    return row


def made_up_blocks():
    options = {"bytes": 10**8, "flops": 10**10, "predicted": 500.0, "floor": 100.0}
    return [made_up_row(f"block {i + 1}: made up", (256, 32, 112, 112), **options) for i in range(17)]


LIMITS = {"copy bytes": 4e12, "fp16 product flops": 8e14, "fp32 product flops": 5e13}


def test_without_a_gpu_it_says_why_before_it_builds(tmp_path):
    """Also where there is one: the driver is told that none may be seen. Not even torch is imported until then."""
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCHMARKS)}
    for arguments in (["--output", str(tmp_path / "out")], ["--check"]):
        start = f"import sys; sys.argv = {[str(BENCHMARKS / 'gpu_report.py'), *arguments]}\n"
        ran = subprocess.run([sys.executable, "-c", start + code], env=environment, capture_output=True, text=True)
        assert ran.returncode == 1, ran.stderr
        assert ran.stderr.startswith("no GPU report: ") and "NVIDIA driver" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_make_stops_there_too(tmp_path):
    def make(*arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | {"CUDA_VISIBLE_DEVICES": ""}
        command = ["make", "-C", str(ROOT), "gpu-report", f"PYTHON={sys.executable}", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    ran = make(f"OUT={tmp_path / 'out'}")
    assert ran.returncode != 0 and "no GPU report: " in ran.stderr and "import torch" not in ran.stdout
    assert not (tmp_path / "out").exists()
    ran = make()
    assert ran.returncode != 0 and "say where to write" in ran.stderr


def test_what_is_missing_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_report, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_report, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(gpu_report, "build", lambda folder: pytest.fail("built"))
    assert gpu_report.main(["--output", str(tmp_path / "out")]) == 1
    assert "has no no_such_package; name another" in capsys.readouterr().err
    monkeypatch.setattr(gpu_report, "NEEDED", ("torch",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--output", str(tmp_path / "out")]) == 1
    assert "cannot use the GPU" in capsys.readouterr().err


def test_cold_and_warm_are_told_apart():
    gpu = MadeUpGpu()
    calls = {"a": gpu.candidate(5.0, 2.0), "b": gpu.candidate(50.0, 30.0)}
    found = gpu_timing.timed(calls, rounds=3, flush=gpu.flush, event=gpu.event, calls=4)
    assert {s: {n: t.seconds for n, t in by_name.items()} for s, by_name in found.items()} == {
        "cold": {"a": [0.005] * 3, "b": [0.05] * 3},
        "warm": {"a": [0.002] * 3, "b": [0.03] * 3},
    }
    assert gpu.waited == 6, "no time may be read before the device is done"


def test_candidates_take_turns():
    gpu, order = MadeUpGpu(), []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    gpu_timing.timed(calls, rounds=2, flush=lambda: order.append("flush"), event=gpu.event, calls=1)
    assert order == ["flush", "a", "a", "a", "flush", "b", "b", "b"] * 2


def test_fill_gives_medians_spreads_and_ratios():
    row = Row("made up", [1], "fp16")
    fused, eager = [1e-3, 2e-3, 4e-3, 2e-3], [2e-3, 8e-3, 8e-3, 6e-3]
    gpu_timing.fill(row, {"cold": timings(eager=eager, fused=fused)})
    assert row.microseconds == {"cold": {"eager": 7000.0, "fused": 2000.0}}
    assert row.over_fused["cold"] == {"eager": 2.5, "fused": 1.0}  # the median of the rounds' ratios 2, 4, 2, 3
    assert row.spread["cold"]["fused"] == testing.Timing(fused).spread > 0
    assert row.rounds == 4


def test_a_wrong_result_has_no_speed():
    row = Row("made up", [1], "fp16", wrong={"fused": "off by one"})
    gpu_timing.fill(row, {"cold": timings(eager=[0.123] * 4, fused=[0.0456] * 4)})
    assert "fused" not in row.microseconds["cold"] and row.over_fused["cold"] == {}
    # Nor does the table print one that a file holds all the same.
    row = made_up_row(what="block 1", bytes=10**8, flops=10**9, predicted=500.0, floor=100.0)
    assert "1000 ±0%" in markdown(Report(rows=[row], limits=LIMITS))
    row.wrong[FUSED] = "off by one"
    text = markdown(Report(rows=[row], limits=LIMITS))
    assert "1000 ±0%" not in text and "500 ±0%" not in text and "2.00 |" not in text
    assert "**wrong**" in text and f"- {FUSED} (block 1): off by one" in text
    assert not Report(rows=[row], tests={"ok": True}).ok


class Unwritten:
    """A graph that writes every element of its output but one."""

    def __init__(self, y):
        self.y, self.right = y.clone(), y.clone()

    def __call__(self):
        last = self.y.view(-1)[-1].clone()
        self.y.copy_(self.right)
        self.y.view(-1)[-1] = last
        return self.y


def test_every_candidate_is_checked_before_it_is_timed():
    right = torch.randn(3, 8)
    row = Row("made up", [3, 8], "fp32")

    def broken():
        raise RuntimeError("no such kernel")

    builders = {
        "fused": lambda: right.clone,
        "fused off": lambda: lambda: right + 0.01,
        "fused unwritten": lambda: Unwritten(right),
        "eager": lambda: right.clone,
        "peer off": lambda: lambda: right * 1.01,
        "peer NaN": lambda: lambda: right * float("nan"),
        "broken": broken,
        V1: lambda: lambda: torch.ones(3, 5),
    }
    calls = gpu_timing.build(builders, lambda t: t[::2], (right[::2], right[::2].double()), row)
    assert list(calls) == ["fused", "eager", V1]
    assert row.wrong.keys() == {"fused off", "fused unwritten", "peer off", "peer NaN"}
    assert row.missing == {"broken": "RuntimeError: no such kernel"}
    assert row.error == {"fused": 0.0, "eager": 0.0}


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Everything of gpu_timing but graphs and events, on CPU tensors and the CPU's kernel."""
    gpu = MadeUpGpu(tick=1.0)  # what runs on the CPU does not move its clock
    monkeypatch.setattr(gpu_timing, "runnable_backends", lambda: ["cpu"])
    monkeypatch.setattr(gpu_timing, "Graphed", lambda call: call)
    monkeypatch.setattr(gpu_timing, "cuda_event", gpu.event)
    monkeypatch.setattr(gpu_timing, "_SECONDS", 0)
    return gpu


@pytest.mark.slow
def test_whole_networks_are_built_and_checked(on_the_cpu):
    row = gpu_timing.Networks("cpu").measure(2, (64, 64), "fp32", on_the_cpu.flush)
    names = ["fused cpu, graphed", "fused cpu", "eager channels_last", EAGER, "eager", V1, V1 + ", graphed"]
    assert (row.wrong, row.missing) == ({}, {})
    assert list(row.microseconds["cold"]) == list(row.microseconds["warm"]) == names
    assert row.rounds == gpu_timing._ROUNDS[0] and row.shape == [2, 3, 64, 64]
    assert all(0 < row.error[name] < 1e-3 for name in names[:5]) and not set(names[5:]) & row.error.keys()


def test_compiled_candidates_run_beside_fused_and_eager(monkeypatch, on_the_cpu):
    asked = []
    monkeypatch.setattr(gpu_timing, "compiled", lambda model, x, mode: asked.append(mode) or (lambda: model(x)))
    x = torch.randn(1, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())
    with pytest.warns(UserWarning, match="fused nothing"):
        row = gpu_timing.measure(
            Row("made up", [1], "fp32"), gpu_timing.network_builders(model, model, x, ["max-autotune"]), model, x, int
        )
    assert list(row.microseconds["cold"]) == [
        "fused cpu, graphed",
        "eager channels_last",
        EAGER,
        "torch.compile max-autotune",
    ]
    assert asked == ["max-autotune"]


def test_a_block_has_its_prediction_beside_it(on_the_cpu):
    from triton_prediction import predictions

    found = predictions(1)[16]
    row = gpu_timing.measure_block(16, found, 1, LIMITS, on_the_cpu.flush, "cpu")
    assert list(row.microseconds["cold"]) == ["fused cpu, graphed", EAGER]
    assert (row.what, row.shape) == ("block 17: 160 -> 960 -> 320, stride 1", [1, 160, 7, 7])
    assert row.predicted == found.plan.seconds * 1e6 and row.bytes == found.plan.bytes
    assert row.flops == 2 * testing.multiply_adds(found.spec, row.shape)
    slowest = max(row.bytes / 4e12, found.products / 8e14, found.depthwise / 5e13)
    assert row.floor == pytest.approx(slowest * 1e6)


def test_files(tmp_path):
    report = Report(
        machine={"device": "a made-up GPU"},
        tests={
            "ok": False,
            "finished": True,
            "exit code": 1,
            "passed": 3,
            "failed": 1,
            "bad": ["tests/x.py::test_y"],
        },
        limits=LIMITS,
        rows=[made_up_row(missing={"torch.compile max-autotune": "out of memory"}), *made_up_blocks()],
        memory=[{"shape": [1, 3, 8, 8], "dtype": "fp16", "peak_bytes": {"fused": 10**6, "eager": 3 * 10**6}}],
        skipped={"network, bf16": "0 s left, it needs 15"},
        failed={"plot": "ValueError: none"},
        plot="matplotlib is not installed",
    )
    report.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["rows"][0]["microseconds"]["warm"] == {FUSED: 500.0, EAGER: 1500.0}
    assert kept["skipped"] == report.skipped and kept["machine"]["device"] == "a made-up GPU"
    text = (tmp_path / "gpu.md").read_text()
    for expected in (
        "**NOT PASSED** (ok: False, finished: True, exit code: 1, passed: 3, failed: 1)\n- FAILED tests/x.py::test_y",
        f"| us, cold L2 | {FUSED} | {EAGER} | torch.compile max-autotune | max error of fused |",
        "| fp16 256x3x224x224 | 1000 ±0% | 3000 ±2%, 3.00x | missing | 1.0e-03 |",
        # 10^8 bytes and 10^10 operations in a millisecond: 100 GB/s of 4000, 10 TFLOP/s of 800
        "| 100 | 2% | 10.0 | 1% | 500 | 2.00 | 100 | 10.0 | 1.0e-03 |",
        "| fp16 1x3x8x8 | 1.0 | 3.0 |",
        "- network, bf16: 0 s left, it needs 15",
        "- plot: ValueError: none",
        "- torch.compile max-autotune (MobileNetV2): out of memory",
        "No roofline plot: matplotlib is not installed.",
    ):
        assert expected in text, expected
    total = next(line for line in text.splitlines() if line.startswith("| all |"))
    assert [c.strip() for c in total.split("|") if c.strip()] == ["all", "17000", "8500", "2.00", "1700", "10.0"]
    assert not report.ok and Report(tests={"ok": True}).ok and not Report().ok


def test_no_sum_over_blocks_when_one_is_wrong():
    blocks = made_up_blocks()
    blocks[3].wrong[FUSED] = "off by one"
    assert "| all |" not in markdown(Report(rows=blocks, limits=LIMITS))


def test_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    gpu_tables.draw(Report(rows=made_up_blocks(), limits=LIMITS), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_sections_run_in_order_while_there_is_time():
    now, report, saved = [100.0], Report(), []
    budget = Budget(30, lambda: now[0])

    def takes(seconds):
        def run():
            now[0] += seconds

        return run

    def fails():
        raise ValueError("nothing here")

    found = [
        Section("first", takes(10), least=5),
        Section("second", fails),
        Section("third", takes(12), least=20),
        Section("too long", takes(1), least=9),
        Section("short", takes(1), least=5),
    ]
    run_sections(found, report, budget, lambda: saved.append((dict(report.skipped), dict(report.failed))))
    assert report.seconds == {"first": 10, "second": 0, "third": 12, "short": 1}
    assert report.failed == {"second": "ValueError: nothing here"}
    assert report.skipped == {"too long": "8 s left, it needs 9"}
    assert [(len(s), len(f)) for s, f in saved] == [(0, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert budget.left == pytest.approx(7)


STUBBORN = """
import time
from gpu_report import Budget, OutOfTime, Section, run_sections
from gpu_tables import Report

report, reached = Report(), []

def stubborn():
    end = time.monotonic() + 100
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except Exception:
            reached.append("swallowed")
    reached.append("end")

sections = [Section("stubborn", stubborn, most=0.2), Section("next", lambda: reached.append("next"))]
run_sections(sections, report, Budget(1000), lambda: None)
assert reached == ["next"] and report.skipped == {"stubborn": "stopped after 0 s"}, (reached, report.skipped)
try:
    with Budget(0).guard(60):
        time.sleep(100)
except OutOfTime:
    print("stopped")
"""


def test_a_section_is_stopped_through_whatever_catches_exceptions():
    """In a process of its own, since an alarm is a process's."""
    command = [sys.executable, "-c", STUBBORN]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


def test_counts_of_pytest():
    text = "....\nFAILED tests/x.py::test_3 passed - no\n3 failed, 12 passed, 1 skipped, 2 errors in 3.21s\n"
    assert gpu_report.counts(text) == {"failed": 3, "passed": 12, "skipped": 1, "error": 2}
    assert gpu_report.counts("nothing") == {}


@pytest.fixture
def other_tests(monkeypatch, tmp_path):
    """Puts two files of tests in place of the kernels'; returns a function that runs them."""
    for name in gpu_report.TESTS:
        assert (ROOT / name).is_file(), f"no such file of tests: {name}"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

    def run(first, second, seconds=60):
        (tmp_path / "tests/gpu/test_gpu_op.py").write_text(first)
        (tmp_path / "tests/triton_backend/test_triton.py").write_text(second)
        return gpu_report.run_tests(tmp_path, seconds)

    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return run


@pytest.mark.slow
def test_tests_are_counted(other_tests):
    passing = f"import os\ndef test_a(): assert os.environ['MNV2_FUSED_FUZZ'] == '{gpu_tables.FUZZ}'\n"
    passing += "def test_b(): assert 'TRITON_INTERPRET' not in os.environ"
    found = other_tests(passing, "def test_c(): pass")
    assert found == {"ok": True, "finished": True, "exit code": 0, "passed": 3, "bad": []}
    found = other_tests(passing, "def test_c(): assert 1 == 2, 'no'")
    assert found["passed"] == 2 and found["failed"] == 1 and not found["ok"]
    assert found["bad"] == ["tests/triton_backend/test_triton.py::test_c"]


@pytest.mark.slow
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_tests_that_take_too_long_are_interrupted(other_tests, handler, monkeypatch, tmp_path):
    began = tmp_path / "began"
    second = f"import pathlib, time\ndef test_b(): time.sleep(2), pathlib.Path({str(began)!r}).touch(), time.sleep(600)"

    class UntilItBegan(subprocess.Popen):
        """Time is up once the second test began, however long a machine takes to come so far."""

        def wait(self, timeout=None):
            while not began.exists() and self.poll() is None:
                time.sleep(0.05)
            return super().wait(0.1 if timeout == 25 else timeout)

    monkeypatch.setattr(gpu_report, "GRACE", 300)
    monkeypatch.setattr(gpu_report.subprocess, "Popen", UntilItBegan)
    monkeypatch.setattr(gpu_report.os, "cpu_count", lambda: 1)  # so that the first test ends before
    before = signal.signal(signal.SIGINT, handler)
    try:
        found = other_tests("def test_a(): pass", second, seconds=25)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not found["finished"] and not found["ok"] and found["passed"] == 1


def test_the_order_of_worth(monkeypatch, tmp_path):
    """Correctness, whole networks, blocks, memory, then the rest; each section puts its rows where they belong."""
    measured = []

    class MadeUpNetworks:
        def measure(self, batch, size, dtype, flush, modes):
            measured.append((batch, size[0], dtype, *modes))
            return made_up_row()

        def memory(self, batch, size, dtype):
            return {"shape": [batch, 3, *size], "dtype": dtype, "peak_bytes": {"fused": 1}}

    monkeypatch.setattr(gpu_timing, "flusher", lambda device: int)
    monkeypatch.setattr(gpu_timing, "Networks", MadeUpNetworks)
    monkeypatch.setattr(gpu_timing, "limits", lambda flush: LIMITS)
    monkeypatch.setattr(gpu_timing, "measure_block", lambda i, found, batch, limits, flush: made_up_blocks()[i])
    monkeypatch.setattr(gpu_report, "run_tests", lambda folder, seconds: {"ok": True, "passed": seconds})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    report, budget = Report(), Budget(1000)
    found = gpu_report.sections(report, tmp_path, budget)
    names = [section.name for section in found]
    assert len(set(names)) == len(names)
    assert [name.split(",")[0] for name in names[:6]] == ["tests", "limits", "network", "network", "blocks", "memory"]
    run_sections(found, report, budget, lambda: report.save(tmp_path))
    assert report.ok and not report.skipped and report.tests["passed"] == 400
    assert measured[:2] == [(256, 224, "fp16"), (1, 224, "fp16")]
    assert {(1, 1088, "fp16"), (256, 224, "bf16"), (256, 224, "fp32"), (256, 224, "fp16", "max-autotune")} <= {
        *measured
    }
    assert {batch for batch, *_ in measured} == {1, 8, 32, 128, 256}
    assert len(report.rows) == len(measured) + 2 * 17 and len(report.memory) == 3
    assert "## Blocks, batch 256" in (tmp_path / "gpu.md").read_text()


def test_the_driver_is_asked(monkeypatch):
    """For the number of GPUs, by a driver that answers as told."""

    def driver(init, count):
        def count_devices(pointer):
            pointer._obj.value = count
            return 0

        return lambda name: SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=count_devices)

    for init, count, expected in ((0, 2, None), (0, 0, "sees no GPU"), (100, 1, "gives error 100")):
        monkeypatch.setattr(gpu_report.ctypes, "CDLL", driver(init, count))
        why = gpu_report.no_gpu()
        assert why is None if expected is None else expected in why
