"""What a run of the benchmark found, the machine it ran on, and the file that keeps both."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..version import __version__

V1 = "MobileNetV1"


@dataclass
class Row:
    """What was measured of a case."""

    case: str
    threads: int
    batch: int
    pixels: int
    milliseconds: dict[str, float] = field(default_factory=dict)  # median of a call, by engine
    over_fused: dict[str, float] = field(default_factory=dict)  # median over rounds of its time over fused's
    over_bfloat16: dict[str, float] = field(default_factory=dict)  # the same over fused bfloat16's
    over_int8: dict[str, float] = field(default_factory=dict)  # the same over fused int8's
    peak_bytes: dict[str, int] = field(default_factory=dict)  # activations that torch's allocator held at most
    error: dict[str, float] = field(default_factory=dict)  # largest deviation from float64, first image
    cosine: dict[str, float] = field(default_factory=dict)  # similarity of int8 engines' first result with float64's
    missing: dict[str, str] = field(default_factory=dict)  # engines that could not run, and why


@dataclass
class Results:
    """All that a run of the benchmark found."""

    rows: list[Row] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)  # bytes by engine, see measure_resident
    growth: dict[str, dict[str, float]] = field(default_factory=dict)  # ns per pixel by engine and size


def bfloat16(engine: str) -> str:
    """How a row calls an engine that runs in bfloat16."""
    return f"{engine} bfloat16"


def int8(engine: str) -> str:
    """How a row calls an engine that runs on 8-bit integers."""
    return f"{engine} int8"


def machine() -> dict[str, str]:
    """What a result was measured on: processor, instruction set, versions and commit."""
    versions = {"mnv2_fused": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("torchvision", "onnxruntime", "openvino", "nncf"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        family, model = fields.get("cpu family", "?"), fields.get("model", "?")
        processor = f"{fields.get('model name', processor)} (family {family}, model {model})"
    root = Path(__file__).parent.parent.parent
    commit = ""
    if (root / ".git").exists() and shutil.which("git"):
        asked = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = asked.stdout.strip()
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "instruction set": backends._C.instruction_set(),
        "commit": commit,
        **versions,
    }


def save(path: Path, results: Results, **tables: Any) -> None:
    """Writes results with the machine they came from, as JSON."""
    content = {
        "machine": machine(),
        "models": [asdict(row) for row in results.rows],
        "resident": results.resident,
        "growth": results.growth,
        **tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> tuple[Results, dict[str, Any]]:
    """What :func:`save` wrote: the results, and everything."""
    content = json.loads(path.read_text())
    return Results([Row(**row) for row in content["models"]], content["resident"], content["growth"]), content
