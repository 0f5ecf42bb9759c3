"""Segmentation of a 1088x1920 photograph on a MobileNetV2 encoder: time and memory before and after ``fuse``.

``python examples/segmentation_1080p.py`` enlarges one of scikit-learn's photographs, runs segmentation_models_pytorch's
Unet on it, eager channels_last and fused, checks the logits against float64, times both in turns and meters the peak of
their activations: of the whole model, and of its encoder alone. ``fuse`` finds no block in Unet's decoder, which works
at full resolution and needs what it needed before. The weights are random, their statistics fitted to photographs: the
masks show that eager and fused agree, and mean nothing else.

Needs ``pip install 'mnv2_fused[demo]' segmentation-models-pytorch``; without the latter, ``--model lraspp`` has
torchvision's LR-ASPP head (MobileNetV3 paper, arXiv 1905.02244, section 6.4) on torchvision's MobileNetV2.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused.testing import Agreement, Timing, agreement, fit_batch_norm, interleave, peak_activation_bytes, ratio

SIZE = (1088, 1920)  # one 1080p frame in multiples of 32
CLASSES = 21
SMP_MODELS = {"unet": "Unet", "deeplabv3plus": "DeepLabV3Plus"}
EAGER, FUSED = "eager channels_last", "fused"
COLOURS = {EAGER: "#7d8ba1", FUSED: "#e4572e"}
WHOLE, ENCODER = "whole model", "encoder alone"


class Comparison(NamedTuple):
    """One photograph through one model, eager and fused."""

    masks: dict[str, Tensor]  # [H, W], the class with the largest logit, by model
    true_mask: Tensor  # [H, W], the same in float64
    agreement: Agreement  # of fused's logits
    timings: dict[str, dict[str, Timing]]  # by part and model
    peaks: dict[str, dict[str, int]]  # bytes of activations, by part and model
    returned: int  # bytes of the feature maps that the encoder hands over, which its peaks contain

    @property
    def differing(self) -> int:
        """Pixels to which eager and fused give another class."""
        return int((self.masks[EAGER] != self.masks[FUSED]).sum())

    def speedup(self, part: str) -> float:
        return ratio(self.timings[part][EAGER], self.timings[part][FUSED])

    def memory_ratio(self, part: str) -> float:
        return self.peaks[part][EAGER] / self.peaks[part][FUSED]


class Lraspp(nn.Module):
    """torchvision's LR-ASPP on MobileNetV2: [N, 3, H, W] -> [N, classes, H, W]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation import LRASPP

        features = mobilenet_v2().features
        stages = nn.Sequential(OrderedDict(low=features[:7], high=features[7:]))  # to 1/8 with 32 channels, to 1/32
        self.encoder = IntermediateLayerGetter(stages, {"low": "low", "high": "high"})
        self.decoder = LRASPP(self.encoder, low_channels=32, high_channels=1280, num_classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)["out"]


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def photographs() -> list[Tensor]:
    """scikit-learn's two, as [1, 3, 427, 640], 0 to 1."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255 for p in load_sample_images().images]


def enlarged(photograph: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(photograph, size=size, mode="bilinear", antialias=True)


def normalised(photograph: Tensor) -> Tensor:
    """As encoders take it: [N, 3, H, W], channels_last."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return ((photograph - mean) / std).contiguous(memory_format=torch.channels_last)


def build(name: str) -> nn.Module:
    """The model ``name`` with an ``encoder``, in eval and channels_last, its norms fitted to the photographs."""
    from torchvision.transforms.functional import five_crop

    torch.manual_seed(0)
    if name == "lraspp":
        model: nn.Module = Lraspp(CLASSES)
    else:
        import segmentation_models_pytorch

        model = getattr(segmentation_models_pytorch, SMP_MODELS[name])(
            "mobilenet_v2", encoder_weights=None, classes=CLASSES
        )
    crops = torch.cat([crop for photograph in photographs() for crop in five_crop(photograph, 224)])
    return fit_batch_norm(model.eval().to(memory_format=torch.channels_last), normalised(crops))


def compare(model: nn.Module, x: Tensor, rounds: int) -> Comparison:
    """Runs, checks, times and meters ``model`` as it is and fused on ``x`` [1, 3, H, W].

    Raises RuntimeError where fused is outside the tolerance rule: its speed would mean nothing.
    """
    models = {EAGER: model, FUSED: mnv2_fused.fuse(model)}
    with torch.inference_mode():
        logits = {name: m(x) for name, m in models.items()}
        truth = copy.deepcopy(model).double()(x.double())
        verdict = agreement(logits[FUSED], logits[EAGER], truth)
        masks, true_mask = {name: y[0].argmax(0) for name, y in logits.items()}, truth[0].argmax(0)
        if not verdict.ok:
            raise RuntimeError(f"fused is wrong: {verdict}")
        features = model.encoder(x)
        maps = features.values() if isinstance(features, dict) else features
        returned = sum(t.nbytes for t in maps if t.data_ptr() != x.data_ptr())  # smp's begin with x itself
        del logits, truth, features, maps
        calls = {(WHOLE, name): functools.partial(m, x) for name, m in models.items()}
        calls |= {(ENCODER, name): functools.partial(m.encoder, x) for name, m in models.items()}
        timed = interleave({f"{part}/{name}": call for (part, name), call in calls.items()}, rounds=rounds, warmup=1)
        timings = {part: {name: timed[f"{part}/{name}"] for name in models} for part in (WHOLE, ENCODER)}
        peaks = {part: {n: peak_activation_bytes(calls[part, n]) for n in models} for part in (WHOLE, ENCODER)}
    return Comparison(masks, true_mask, verdict, timings, peaks, returned)


def draw(photograph: Tensor, found: Comparison, title: str, output: Path) -> None:
    """The photograph and both masks above, bars of memory and time below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic([["photo", EAGER, FUSED], ["bars"] * 3], figsize=(13, 5.4), layout="constrained")
    axes["photo"].imshow(photograph[0].permute(1, 2, 0).clamp(0, 1).numpy())
    axes["photo"].set_title("photograph")
    for name, mask in found.masks.items():
        axes[name].imshow(mask.numpy(), cmap="tab20", vmin=0, vmax=CLASSES - 1, interpolation="nearest")
    axes[EAGER].set_title(f"mask, {EAGER} (random weights)")
    same = "not a pixel differs" if found.differing == 0 else f"{found.differing} pixels differ"
    axes[FUSED].set_title(f"mask, fused: {same}")
    for name in ("photo", EAGER, FUSED):
        axes[name].set_axis_off()

    bars = axes["bars"]
    # Each group is scaled to its largest bar: ratios read true across units.
    groups = {
        f"memory, {part}": ({n: v / 1e6 for n, v in found.peaks[part].items()}, "MB", found.memory_ratio(part))
        for part in (WHOLE, ENCODER)
    } | {
        f"time, {part}": ({n: t.median * 1e3 for n, t in found.timings[part].items()}, "ms", found.speedup(part))
        for part in (WHOLE, ENCODER)
    }
    for row, (values, unit, times) in enumerate(groups.values()):
        for k, name in enumerate((EAGER, FUSED)):
            length = values[name] / max(values.values())
            bars.barh(row + (k - 0.5) * 0.36, length, 0.34, color=COLOURS[name], label=name if row == 0 else None)
            text = f"{values[name]:.0f} {unit}" + (f"  (1/{times:.2f})" if name == FUSED else "")
            bars.annotate(text, (length, row + (k - 0.5) * 0.36), (5, 0), textcoords="offset points", va="center")
    bars.set_yticks(range(len(groups)), list(groups))
    bars.invert_yaxis()
    bars.set(xlim=(0, 1.15), xticks=[])
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    bars.tick_params(axis="y", length=0)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(output, dpi=110, format="png")
    plt.close(figure)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)) or int(height) % 32 or int(width) % 32:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in multiples of 32, such as 1088x1920, got {text!r}")
    return int(height), int(width)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SMP_MODELS, "lraspp"], help="unet; lraspp where smp is not installed")
    parser.add_argument(
        "--size", type=_size, default=SIZE, metavar="HxW", help="of the enlarged photograph (1088x1920)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is timed (5)")
    parser.add_argument("--output", type=Path, default=Path("segmentation_1080p.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if not installed("torchvision"):
        parser.error("every model here needs torchvision: pip install 'mnv2_fused[demo]'")
    name = args.model or "unet"
    if name in SMP_MODELS and not installed("segmentation_models_pytorch"):
        hint = f"{name} needs segmentation_models_pytorch: pip install segmentation-models-pytorch"
        if args.model:
            parser.error(f"{hint}; or take --model lraspp")
        print(f"{hint}; taking lraspp")
        name = "lraspp"

    photograph = enlarged(photographs()[0], args.size)
    model = build(name)
    report = mnv2_fused.report(mnv2_fused.fuse(model))
    size = "x".join(map(str, args.size))
    title = f"{name} on MobileNetV2, {size}, float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"{title}\nrandom weights: the masks mean nothing, only that they agree counts")
    print(f"{len(report.fused)} blocks fused, {len(report.skipped)} not")
    for block in report.skipped:
        print(f"  {block.name}: {block.reason}")

    found = compare(model, normalised(photograph), args.rounds)
    pixels = found.true_mask.numel()
    print(f"logits: {found.agreement}\nmask: {pixels - found.differing} of {pixels} pixels are of the same class")
    for mask_of, mask in found.masks.items():
        print(f"  {mask_of}: {int((mask != found.true_mask).sum())} pixels not of the class they have in float64")
    print(f"median of {args.rounds} interleaved rounds; MB: measured peak of activations")
    print(f"{'':<13}  {'eager ms':>8}  {'fused ms':>8}  {'':>6}  {'eager MB':>8}  {'fused MB':>8}")
    for part in (WHOLE, ENCODER):
        ms = [found.timings[part][n].median * 1e3 for n in (EAGER, FUSED)]
        mb = [found.peaks[part][n] / 1e6 for n in (EAGER, FUSED)]
        faster, less = f"{found.speedup(part):.2f}x", f"{found.memory_ratio(part):.2f}x"
        print(f"{part:<13}  {ms[0]:>8.0f}  {ms[1]:>8.0f}  {faster:>6}  {mb[0]:>8.1f}  {mb[1]:>8.1f}  {less:>6}")
    print(f"the encoder's MB contain the {found.returned / 1e6:.1f} MB that it hands over to the decoder")
    if found.peaks[WHOLE][FUSED] > found.peaks[ENCODER][FUSED]:
        print("the peak of the whole model is now in the decoder")
    draw(photograph, found, title, args.output)
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
