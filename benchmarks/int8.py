"""MobileNetV2 on 8-bit integers beside float, each engine by its own quantiser: writes results/int8.json and the tables
of docs/quantize.md.

Each row is one interleaved run. A result that is not the network's, by its cosine similarity with float64's, ends the
run before anything of that row is timed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mnv2_fused.tools import bench, bench_results, bench_tables
from mnv2_fused.tools.bench import HIGH_RESOLUTION, Case
from mnv2_fused.tools.bench_results import Row, int8
from mnv2_fused.tools.engines import CHANNELS_LAST, FROZEN, FUSED, EngineMissing
from mnv2_fused.tools.int8_engines import QUANTIZERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/int8.json"
PAGE = ROOT / "docs/quantize.md"
BEGIN, END = "<!-- Tables of make int8 -->", "<!-- End of the tables -->"

CASES = tuple(
    Case(
        *(size, batch, threads),
        engines=(CHANNELS_LAST, FUSED, FROZEN),
        bfloat16=("OpenVINO", FUSED, FROZEN),
        int8=tuple(QUANTIZERS),
    )
    for size, batch in (((224, 224), 1), ((224, 224), 16), (HIGH_RESOLUTION, 1))
    for threads in (1, 2)
)
# An image so small that the call itself counts.
CALL = Case((32, 32), engines=(FUSED, FROZEN), bfloat16=(), int8=(FUSED,))


def sizes() -> dict[str, int]:
    """Bytes on disk by engine: float32's state_dict, and what users of each quantiser deploy."""
    file = io.BytesIO()
    torch.save(bench.mobilenet_v2(1.0).state_dict(), file)
    found = {"float32": file.tell()}
    for name in QUANTIZERS:
        try:
            found[int8(name)] = bench.quantized(name, 1.0).bytes_on_disk
        except EngineMissing:
            continue
    return found


def size_table(found: dict[str, int]) -> str:
    """Markdown: megabytes, and how many times as large float32's is."""
    mb = [f"{count / 1e6:.2f} MB" for count in found.values()]
    less = ["", *(f", {found['float32'] / count:.2f}x less" for name, count in found.items() if name != "float32")]
    lines = ["| size on disk | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    return "\n".join([*lines, "| MobileNetV2 | " + " | ".join(map("".join, zip(mb, less, strict=True))) + " |"])


def tables(content: dict) -> str:
    """The Markdown of what was kept."""
    machine, rows = content["machine"], [Row(**row) for row in content["models"]]
    versions = (f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino", "nncf") if name in machine)
    found = [
        f"On {machine['cores']} shared cores of {machine['processor']}, {machine['instruction set']}, commit "
        f"{machine['commit']}, " + ", ".join(versions) + ":"
    ]
    if large := [row for row in rows if row.case != CALL.name]:
        found += [bench_tables.int8_table(large), bench_tables.cosine_table(large)]
        found += [bench_tables.int8_memory_table(large)]
    if small := [row for row in rows if row.case == CALL.name]:
        found += [bench_tables.int8_table(small)]
    if content["sizes"]:
        found += [size_table(content["sizes"])]
    return "\n\n".join(found)


def with_tables(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with ``text`` between two marks of it."""
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{PAGE.name} must have {begin} and below it {end}: the tables go between them")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="print cases whose name has it in it, and keep nothing")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a case, about (10)")
    options = parser.parse_args(arguments)
    cases = [case for case in (*CASES, CALL) if options.only is None or options.only in case.name]
    if not cases:
        known = dict.fromkeys(case.name for case in (*CASES, CALL))
        parser.error(f"no case's name has {options.only!r} in it; there are {', '.join(known)}")
    rows = []
    for case in cases:
        print(f"{case.name}, {case.threads} thread(s) ...", file=sys.stderr, flush=True)
        rows.append(bench.measure(case, options.seconds))
    content = {
        "machine": bench_results.machine(),
        "models": [asdict(row) for row in rows],
        "sizes": sizes() if options.only is None else {},
    }
    text = tables(content)
    print(text)
    missing = {name: reason for row in rows for name, reason in row.missing.items()}
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}", file=sys.stderr)
    if options.only is None and not missing:
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        PAGE.write_text(with_tables(PAGE.read_text(), text))
    elif options.only is None:
        print("nothing is kept: tables with engines missing say less than they seem to", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
