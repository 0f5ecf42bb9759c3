"""``python -m mnv2_fused quantize``: a folder of images in, a state_dict out that loads and gives the same bits."""

import re

import pytest
import torch
from PIL import Image
from support.images import make_photo

import mnv2_fused
from mnv2_fused.__main__ import main
from mnv2_fused.int8.reports import QuantizedReport
from mnv2_fused.tools import named_models, quantize
from mnv2_fused.tools.images import ImageError, Preprocessing, image_files, read_image, squares

torchvision = pytest.importorskip("torchvision")
SMALL = ("--resize", "72", "--crop", "64")


@pytest.fixture
def folder(tmp_path):
    """Six images, two of them in a folder of their own, and a file that is none."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for i in range(6):
        make_photo(images / ("more" if i > 3 else "") / f"{i}.{'jpg' if i % 2 else 'png'}", seed=i)
    (images / "notes.txt").write_text("no image")
    return images


@pytest.fixture
def small_model(monkeypatch):
    """Any name is a small MobileNetV2's: the command's own ways are what is tested here."""
    make = named_models.named_model

    def named(name):
        torch.manual_seed(0)
        return make(name) if name != "mobilenet_v2" else torchvision.models.mobilenet_v2(width_mult=0.35)

    monkeypatch.setattr(quantize, "named_model", named)
    return lambda: named("mobilenet_v2")


def run(folder, output, *options, model="mobilenet_v2", weights=("--weights", "random")):
    return main(["quantize", model, "--images", str(folder), "--output", str(output), *weights, *SMALL, *options])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_what_is_written_loads(small_model, folder, tmp_path, capsys, suffix):
    load = pytest.importorskip("safetensors.torch").load_file if suffix == ".safetensors" else torch.load
    output = tmp_path / f"int8{suffix}"
    assert run(folder, output) == 0
    out = capsys.readouterr().out
    assert "mobilenet_v2, random weights, whose results mean nothing\n6 of 6 images of " in out
    assert "resize 72 (bilinear), crop 64x64, mean 0.485,0.456,0.406, std 0.229,0.224,0.225" in out
    assert "these are few: 100 to 300" in out and "19 quantised, 0 float; result " in out
    written, in_float = map(float, re.search(r": ([\d.]+) MB; in float32 ([\d.]+) MB", out).groups())
    assert 2 < in_float / written < 4

    model = small_model().eval()
    expected = mnv2_fused.quantize(model, prepared(folder))
    other = mnv2_fused.quantized_like(model)
    other.load_state_dict(load(output))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(x), expected(x))


def prepared(folder):
    """What the command calibrates on, by torchvision's transforms, in the order that it draws."""
    T = torchvision.transforms
    steps = [T.Resize(72), T.CenterCrop(64), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    files = sorted([*folder.rglob("*.png"), *folder.rglob("*.jpg")])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([T.Compose(steps)(Image.open(files[i]).convert("RGB")) for i in order])


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ((), ""),
        (("--skip", "features.2", "--skip", "classifier"), ", skip=('features.2', 'classifier')"),
        (("--no-rows",), ", rows=False"),
    ],
)
def test_the_code_it_prints_runs(folder, tmp_path, capsys, options, argument):
    output = tmp_path / "int8.safetensors"
    pytest.importorskip("safetensors")
    assert run(folder, output, *options, model="mobilenet_v3_small") == 0
    out = capsys.readouterr().out
    code = out.partition("To load it:\n")[2]
    assert f"get_model('mobilenet_v3_small'){argument})" in code
    names = {}
    exec(code, names)
    report = mnv2_fused.quantized_report(names["model"])
    assert [row.name for row in report.unquantized] == [row for row in ("features.2",) if "--skip" in options] + [
        row for row in ("classifier.0", "classifier.3") if "--skip" in options
    ]
    assert names["model"](torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_limit_and_seed_draw(small_model, folder, tmp_path, monkeypatch):
    drawn = []
    real = quantize.quantize
    monkeypatch.setattr(
        quantize,
        "quantize",
        lambda model, batches, **o: drawn.append((batches, o["seed"])) or real(model, batches, **o),
    )
    for seed in ("0", "0", "5"):
        assert run(folder, tmp_path / "a.pth", "--limit", "4", "--seed", seed) == 0
    (first, _), (again, _), (other, seed) = drawn
    assert first.files == again.files != other.files and seed == 5
    assert len(first.files) == 4 and set(other.files) <= set(image_files(folder))


def test_batches_are_read_as_they_are_asked_for(folder, monkeypatch):
    files = image_files(folder)
    preparation = quantize.Preparation((72,), (64, 64), Preprocessing())
    monkeypatch.setattr(quantize, "_BATCH", 4 * 64 * 64)
    batches = quantize.Batches(files, preparation)
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 64, 64), (2, 3, 64, 64)] and len(batches) == 2
    files[-1].write_bytes(b"")
    first = iter(batches)
    assert len(next(first)) == 4
    with pytest.raises(ImageError, match=f"cannot read the image {files[-1]}.*take the file out of the folder"):
        next(first)


def test_weights_of_a_file(small_model, folder, tmp_path, capsys):
    weights = tmp_path / "mine.pth"
    torch.save(small_model().state_dict(), weights)
    assert run(folder, tmp_path / "a.pth", weights=("--weights", str(weights))) == 0
    assert "mobilenet_v2, weights of mine.pth" in capsys.readouterr().out
    assert run(folder, tmp_path / "b.pth") == 0
    first, second = (torch.load(tmp_path / name) for name in ("a.pth", "b.pth"))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_published_weights_are_asked_for(small_model, folder, tmp_path, capsys, monkeypatch):
    state = small_model().state_dict()
    weights = torchvision.models.MobileNet_V2_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *args, **options: state)
    assert run(folder, tmp_path / "a.pth", weights=()) == 0
    assert "mobilenet_v2, published weights IMAGENET1K_V2" in capsys.readouterr().out

    def unreachable(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(weights, "get_state_dict", unreachable)
    assert run(folder, tmp_path / "a.pth", weights=()) == 1
    assert (
        "weights of mobilenet_v2 cannot be had: no network; give the weights with --weights FILE, or --weights random"
        in (capsys.readouterr().err)
    )
    for model in ("mobilenet_v1", "mnasnet0_75"):
        monkeypatch.setattr(torchvision.models.MNASNet0_75_Weights, "get_state_dict", unreachable)
        assert run(folder, tmp_path / "a.pth", model=model, weights=()) == 1
        assert re.search(r"error: .*(are published|cannot be had).*--weights FILE", capsys.readouterr().err)


def test_timms_models_say_how_they_take_images():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv2_035")
    model.pretrained_cfg = {
        "input_size": (3, 160, 160),
        "crop_pct": 0.8,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.1, 0.2, 0.3),
        "interpolation": "bicubic",
    }
    found = quantize.preparation_of(model, None, None, None, None, None)
    assert str(found) == "resize 200 (bicubic), crop 160x160, mean 0.5,0.4,0.3, std 0.1,0.2,0.3"
    found = quantize.preparation_of(model, (70, 90), (64, 80), (0, 0, 0), (1, 1, 1), "nearest")
    assert str(found) == "resize 70x90 (nearest), crop 64x80, mean 0,0,0, std 1,1,1"
    assert quantize.preparation_of(torch.nn.ReLU(), None, None, None, None, None).resize == (256,)
    assert quantize.preparation_of(torch.nn.ReLU(), None, (112, 200), None, None, None).resize == (128,)


def test_images_of_any_mode(folder):
    path = folder / "grey.png"
    Image.new("LA", (90, 70), (128, 10)).save(path)
    x = quantize.Preparation((64, 80), (64, 80), Preprocessing((0.0,) * 3, (1.0,) * 3)).read(path)
    assert x.shape == (1, 3, 64, 80) and torch.allclose(x, torch.tensor(128 / 255))


def test_squares_are_of_the_images():
    images = [Image.new("RGB", (90, 60), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    x = squares(images, 5, 32, Preprocessing((0.0,) * 3, (1.0,) * 3), seed=3)
    assert x.shape == (5, 3, 32, 32) and x[:, :, 5, 5].argmax(1).tolist() == [0, 1, 0, 1, 0]
    assert read_image.__doc__ and torch.equal(x, squares(images, 5, 32, Preprocessing((0.0,) * 3, (1.0,) * 3), seed=3))


def broken_image(folder, _):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")


def cut_image(folder, _):
    data = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(data[: len(data) // 2])


def empty(folder, _):
    for path in image_files(folder):
        path.unlink()


def gone(folder, _):
    folder.rename(folder.parent / "elsewhere")


def file_instead(folder, _):
    gone(folder, _)
    folder.write_text("")


CASES = {
    "no folder": (gone, (), r"--images .*images does not exist; give a folder of images"),
    "a file": (file_instead, (), r"--images .*images is a file; give a folder of images"),
    "no images": (empty, (), r"holds no image that Pillow reads by its suffix.*100 to 300"),
    "a broken image": (broken_image, (), r"cannot read the image .*broken\.jpg: .*; take the file out of the folder"),
    "a cut image": (cut_image, (), r"cannot read the image .*0\.png: .*; take the file out of the folder"),
    "a large crop": (
        None,
        ("--crop", "80"),
        r"--crop 80x80 does not fit into .*, 96x128, which --resize 72 makes 72x96; give a smaller --crop or a larger",
    ),
    "no such module": (None, ("--skip", "features.99"), r"skip names 'features\.99', which is no module"),
    "another format": (None, ("--output", "a.onnx"), r"--output must end in .safetensors, .pth or .pt, got 'a\.onnx'"),
    "no folder to write to": (None, ("--output", "none/a.pth"), r"folder of --output none/a\.pth does not exist"),
    "no such weights": (
        None,
        ("--weights", "none.pth"),
        r"cannot use the weights none\.pth: .*No such file.*; give a st",
    ),
    "no such safetensors": (
        None,
        ("--weights", "none.safetensors"),
        r"cannot use the weights none\.safetensors: .*No such file.*; give a state_dict of mobilenet_v2",
    ),
}


@pytest.mark.parametrize(("change", "options", "message"), CASES.values(), ids=CASES)
def test_what_is_refused(small_model, folder, tmp_path, capsys, monkeypatch, change, options, message):
    monkeypatch.chdir(tmp_path)
    if change:
        change(folder, tmp_path)
    assert run(folder, tmp_path / "a.pth", *options) == 1
    err = capsys.readouterr().err
    assert re.search(f"error: .*{message}", err), err
    assert not (tmp_path / "a.pth").exists()


def test_models_that_are_refused(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "a.pth", model="mobilenet_v9") == 1
    assert "unknown model 'mobilenet_v9', close to " in capsys.readouterr().err
    assert run(folder, tmp_path / "a.pth", model="squeezenet1_1") == 1
    assert "there is nothing to quantise" in capsys.readouterr().err
    weights = tmp_path / "other.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"a": torch.ones(1)}, weights)
    assert run(folder, tmp_path / "a.pth", weights=("--weights", str(weights))) == 1
    assert re.search(r"cannot use the weights .*other\.safetensors: Error.*give a state_dict", capsys.readouterr().err)
    weights.write_bytes(b"\x01")
    assert run(folder, tmp_path / "a.pth", weights=("--weights", str(weights))) == 1
    assert "other.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "0"), "must be an integer of at least 1, got '0'"),
        (("--seed", "-1"), r"must be an integer from 0 to 2\^63 - 1, got '-1'"),
        (("--seed", "one"), "got 'one'"),
        (("--crop", "1x2x3"), "must be R or HxW, got '1x2x3'"),
        (("--resize", "0"), "at least 1, got '0'"),
        (("--mean", "0.5"), "must be R,G,B, three numbers such as 0.485,0.456,0.406, got '0.5'"),
        (("--mean", "a,b,c"), "got 'a,b,c'"),
        (("--std", "1,nan,1"), "got '1,nan,1'"),
        (("--std", "1,0,1"), "must be above 0, got '1,0,1'"),
        (("--interpolation", "magic"), "invalid choice: 'magic'"),
    ],
)
def test_bad_usage(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as left:
        run(folder, tmp_path / "a.pth", *options)
    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("missing", ["torchvision", "PIL", "safetensors"])
def test_missing_packages_are_named(folder, tmp_path, capsys, monkeypatch, missing):
    find = quantize.importlib.util.find_spec
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert run(folder, tmp_path / "a.safetensors") == 1
    assert re.search(f"needs {missing}: pip install '?(mnv2_fused|safetensors)", capsys.readouterr().err)


def test_another_state_dict_than_was_quantised_is_noticed(small_model, folder, tmp_path, capsys, monkeypatch):
    save = quantize._save

    def wrong(state, output):
        save(
            {
                name: t + 1 if name.endswith("classifier.bias") or "18.project.bias" in name else t
                for name, t in state.items()
            },
            output,
        )

    monkeypatch.setattr(quantize, "_save", wrong)
    assert run(folder, tmp_path / "a.pth") == 1
    assert "does not give what was quantised" in capsys.readouterr().err


def test_results_of_other_types_have_no_class():
    report = QuantizedReport(()).with_results(4, {"out": 1}, {"out": 1})
    assert str(report).endswith("0 quantised, 0 float, on 4 calibration images")
