"""Mutations of the CUDA kernel's source: each must be noticed when the emulation runs it."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_emulation.cases import (
    DILATED,
    FIVE,
    GELU,
    GELU_TANH,
    LEAKY,
    OUT_BLOCKS,
    PADDED,
    PRECISIONS,
    SQUEEZED,
    STEMMED,
    STRIDED,
    SUMMED,
    UNEVEN,
    UNEXPANDED,
    WIDE,
    input_of,
    noticed,
    planned,
)
from cuda_emulation.emulation import CSRC, compiled_kernel, loaded, precompiled_headers

from mnv2_fused.testing import threads

pytestmark = [pytest.mark.slow, pytest.mark.minutes, pytest.mark.usefixtures("poison")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are small: more threads wait for each other longer than they compute."""
    with threads(1):
        yield


# Source text and its replacement, by what is broken. Each text stands once in the kernel's source. Precision and block
# that must show the change are float32 and PADDED, except those of SHOWN_BY.
WAITS = "  grid_dependency_wait();\n  launch_dependents();\n"
LOAD = "  const LoadedTile tile = load_tile"
MUTATIONS = {
    "barrier before a group": ("    barrier();  // this group's weights are there", "    //"),
    "barrier after the expansion": ("      barrier();  // e is there, too", "      ;"),
    "barrier after the copy of e": ("    wait_copies();\n    barrier();\n", "    wait_copies();\n"),
    "barrier that gathers infinities": ("barrier_any(any_infinite", "bool(any_infinite"),
    "end of copies": ("    wait_copies();\n    barrier();  // this", "    barrier();  // this"),
    "end of copies of e": ("    wait_copies();\n    barrier();\n", "    barrier();\n"),
    "stages": ("= 2 * l.weights + l.stage - stage", "= stage"),
    "rows of a fragment": ("a[i][1].x, a[i][0].y, a[i][1].y}", "a[i][0].y, a[i][1].x, a[i][1].y}"),
    "weights of a fragment": ("rows, b.z, b.w)", "rows, b.w, b.z)"),
    "weights of a TF32 fragment": ("round_tf32(b.z), round_tf32(b.w)", "round_tf32(b.w), round_tf32(b.z)"),
    "weights of a float32 product": ("(2 * t + col) * 4 + from", "(2 * t + col) * 4 + 3 - from"),
    "columns of a quad": ("c[1][2 * lower], c[1][2 * lower + 1]", "c[1][2 * lower + 1], c[1][2 * lower]"),
    "order of taps": ("(kKernel * k + col) * int(kPanel)", "(kKernel * col + k) * int(kPanel)"),
    "order of taps on tensor cores": ("row * kKernel + col;", "col * kKernel + row;"),
    "diagonal": ("lane / 8 == lane % 4 ? ~0u : 0u", "~0u"),
    "rows above": ("max(t.row * stride - 1, 0)", "t.row * stride"),
    "columns to the right": ("a.tile_cols - 1) * stride + 2, a.width)", "a.tile_cols - 1) * stride + 1, a.width)"),
    "place of the halo": ("t.in_col - (t.col * stride - 1)", "t.in_col - t.col * stride"),
    "odd columns": ("(int(unsigned(e_cols) + 1) >> 1)", "(e_cols >> 1)"),
    "expand bias": ("load_shared<float4>(step.bias + (p * 4 + t) * 16)", "float4{0, 0, 0, 0}"),
    "depthwise bias": ("sum[0] = load_shared<float4>(at.bias)", "sum[0] = {0, 0, 0, 0}"),
    "project bias": ("load_floats(a.b_project + from, left)", "float4{0, 0, 0, 0}"),
    "project bias after splits": ("added(sum, load_floats(a.b_project + channel, left))", "sum"),
    "residual": ("inside && a.residual ? left : 0", "0"),
    "residual after splits": ("if (a.residual) {", "if (false) {"),
    "zeros outside the image": ("store_shared(l.e + i, uint4{0, 0, 0, 0})", ""),
    "mask of hidden channels": ("      keep(q, channels - last", "      if (false) keep(q, channels - last"),
    "mask of input channels": ("exists ? load_written", "true ? load_written"),
    "mask of output channels": ("second, channels - channel - int(kPanel))", "second, 4)"),
    "first ReLU6": ("  else\n    return C::Traits::narrow_relu6(v)", "  else\n    return C::Traits::narrow(v)"),
    "second ReLU6": ("!C::kGeneral) return C::Traits::narrow_relu6(v)", "!C::kGeneral) return C::Traits::narrow(v)"),
    "last rows": ("strip.row + o < tile.rows", "true"),
    "last columns": ("tile.rows && strip.col < tile.cols;", "tile.rows;"),
    "lanes without a strip": ("inside = strip.exists && ", "inside = "),
    "images": ("(tile.first_image + image) * a.x_image", "image * a.x_image"),
    "splits": ("blockIdx.y * pixels", "0 * pixels"),
    "out blocks": ("first_out = blockIdx.z * C::kOutPanels", "first_out = 0"),
    "exchange": ("{shuffle_xor(other.x, 1), shuffle_xor(other.y, 1)}", "{other.x, other.y}"),
    "infinities": ("found = found || ", "found = found && "),
    "padding above": ("a.pad_top, a.out_height", "a.pad_left, a.out_height"),
    "padding before": ("a.pad_left, a.out_width", "a.pad_top, a.out_width"),
    "first rows and columns of the halo": ("before < 0 ? (dilation - 1 - before) / dilation : 0", "0"),
    "last rows and columns of the halo": ("(tile - 1) * kStride + kKernel,", "(tile - 1) * kStride + kKernel - 1,"),
    "place of an uneven halo": ("max(end - start, 0), start - first}", "max(end - start, 0), 0}"),
    "dilated rows": ("row * tile.step) * a.x_row", "row) * a.x_row"),
    "dilated columns": ("col * tile.step) * a.x_col", "col) * a.x_col"),
    "dilated outputs": ("(strip.row + o) * tile.step", "(strip.row + o)"),
    "phases of a dilation": ("phase * kStride - pad, first", "-pad, first"),
    "dilated padding": ("(dilation - 1 - before) / dilation", "-before"),
    "fifth row": ("k >= 0 && k < kKernel", "k >= 0 && k < 4"),
    "fifth column": ("    float4 tap[kKernel];", "    if (col == 4) break;\n    float4 tap[kKernel];"),
    "fifth row on tensor cores": ("up[4].x, low[4].x, fifth.x", "up[3].x, low[3].x, fifth.x"),
    "fifth row's weights": ("within / 4 : within - 8", "within / 4 : 9 - within"),
    "rows three and four on tensor cores": ("third, w0.z & diagonal, w0.w", "third, w0.w & diagonal, w0.z"),
    "clip": ("return clip(v, f.low, f.high)", "return v"),
    "hardswish": ("v * (clip(v + 3, 0, 6)", "v * (clip(v + 2.9f, 0, 6)"),
    "silu": ("divide(v, 1 + exponential(-v))", "divide(v, 1 + exponential(-1.05f * v))"),
    "leaky_relu": ("v > 0 ? v : v * negative_slope", "v > 0 ? v : v * 0.01f"),
    "gelu": ("erff(v * 0.707", "erff(v * 0.72"),
    "gelu_tanh": ("-1.5957691f * v", "-1.61f * v"),
    "output's activation": ("if (C::kGeneral && biased && !a.activates_sum)", "if (false)"),
    "output's activation of one split": (
        "if (C::kGeneral && biased && !a.activates_sum)",
        "if (C::kGeneral && !a.activates_sum)",
    ),
    "output's activation after splits": ("if (kActivated && !a.activates_sum) sum", "if (false) sum"),
    "activation of the sum": ("if (C::kGeneral && biased && a.activates_sum)", "if (false)"),
    "activation of the sum, not before it": ("biased && !a.activates_sum)", "biased)"),
    "activation of the sum of one split": (
        "if (C::kGeneral && biased && a.activates_sum)",
        "if (C::kGeneral && a.activates_sum)",
    ),
    "activation of the sum after splits": ("if (kActivated && a.activates_sum) sum", "if (false) sum"),
    "activation of the expansion": ("activated(v, a.expand_activation)", "activated(v, a.activation)"),
    "infinities that activations leave": ("infinite = infinite || found", "infinite = false"),
    "barrier after an expansion with infinities": ("infinite = barrier_any(found)", "infinite = found"),
    "end of the kernel before": (f"{WAITS}{LOAD}", LOAD),
    "end of the kernel before the sum over splits": (f"{WAITS}  if (pixel >= pixels)", "  if (pixel >= pixels)"),
    "start of the next kernel": (f"{WAITS}{LOAD}", f"  launch_dependents();\n{LOAD}"),
    "cache of x": ("exists ? load_written", "exists ? load_global"),
    "cache of the residual": ("N::widen(load_written(reinterpret_cast", "N::widen(load_global(reinterpret_cast"),
    "gate": ("narrow({v.x * gate.x,", "narrow({v.x,"),
    "gate of another image": ("int64_t(tile.gate_image) * a.hidden", "int64_t(0) * a.hidden"),
    "gate of another panel": ("a.hidden_panels + g.panel + p) * kPanel + 4", "a.hidden_panels) * kPanel + 4"),
    "last rows in the pool": ("if (row < tile.outs) total", "total"),
    "last columns in the pool": ("outs = strip.exists && strip.col < tile.cols ?", "outs = strip.exists ?"),
    "lanes without a strip in the pool": ("strip.exists && strip.col < tile.cols ?", "strip.col < tile.cols ?"),
    "strips in the pool": ("apart < 32; apart *= 2", "apart < 16; apart *= 2"),
    "warps' sums": ("block_index()) * warp_count() + threadIdx.x / 32", "block_index()) * warp_count()"),
    "tiles' sums": ("block_index()) * warp_count() + threadIdx.x / 32", "0) * warp_count() + threadIdx.x / 32"),
    "rows of the mean": ("row += kParts)", "row += 2 * kParts)"),
    "parts of the mean": ("(int part = 0; part < kParts", "(int part = 1; part < kParts"),
    "mean": ("mean * a.scale", "mean"),
    "chunks of the mean": ("int64_t(first + at) * kPanel", "int64_t(at) * kPanel"),
    "barrier before a chunk": ("    barrier();  // nobody reads the chunk before\n", ""),
    "barrier after a chunk": ("    barrier();  // this chunk's sums are there\n", ""),
    "barrier after the last chunk": ("  barrier();  // nobody reads the last chunk\n", ""),
    "barrier before the last sum": ("  barrier();  // all sums are there\n", ""),
    "bias of the gate": ("load_global(a.bias + channel)", "0"),
    "activation between the gate's products": (": activated(v, a.activation);", ": v;"),
    "hardsigmoid": ("return clip(v + 3, 0, 6) * (1 / 6.f)", "return clip(v + 3, 0, 6)"),
    "sums of the gate's parts": ("part < kSums; ++part)", "part < kSums - 1; ++part)"),
    "end of the kernel before the gate's products": (f"{WAITS}  float sum = 0;", "  float sum = 0;"),
    "cache of the pool's sums": ("rows += load_written(", "rows += load_global("),
    "cache of the gate": ("gate = load_written(", "gate = load_global("),
    "image's border": (" && at_col < a.image_width", ""),
    "image's first column": ("kStemStride) - 1 + col", "kStemStride) + col"),
    "image's channels": ("from + k * a.x_channel", "from + k"),
    "images in front of a stem": ("at_image * a.x_image", "image * a.x_image"),
    "channels there are not in an image": ("inside && k < a.in_channels", "inside && k < 4"),
    "windows": ("row * int(kStemStride)) * pitch", "row) * pitch"),
    "images' windows": ("(image * a.image_rows + row * int(kStemStride))", "(row * int(kStemStride))"),
    "rows of a window": ("window[i][lower] + q * to_row", "window[i][lower]"),
    "a window's fourth column": ("window[i][lower] = t < 3 ?", "window[i][lower] = true ?"),
    "zeros of a stem": ("store_shared(a.shared.zeros, uint4{0, 0, 0, 0})", ""),
    "cache of the image": ("a.in_channels ? load_written(", "a.in_channels ? load_global("),
    "stem's activation": ("activated(v, a.expand_activation)", "activated(v, a.activation)"),
}  # fmt: skip
SHOWN_BY = {
    "barrier after the copy of e": ("float32", UNEXPANDED),
    "barrier that gathers infinities": ("float16", UNEXPANDED),
    "end of copies of e": ("float32", UNEXPANDED),
    "rows of a fragment": ("float16", PADDED),
    "weights of a fragment": ("bfloat16", PADDED),
    "weights of a TF32 fragment": ("tf32", PADDED),
    "order of taps on tensor cores": ("float16", PADDED),
    "diagonal": ("float16", PADDED),
    "odd columns": ("float32", STRIDED),
    "mask of output channels": ("float16", PADDED),
    "cache of x": ("float16", PADDED),
    "out blocks": ("float32", OUT_BLOCKS),
    "exchange": ("float16", WIDE),
    "infinities": ("float16", UNEXPANDED),
    **dict.fromkeys(
        (
            *("padding above", "padding before", "first rows and columns of the halo", "place of an uneven halo"),
            *("last rows and columns of the halo", "clip", "output's activation", "output's activation of one split"),
            "output's activation after splits",
        ),
        ("float32", UNEVEN),
    ),
    "infinities that activations leave": ("float16", UNEVEN),
    "barrier after an expansion with infinities": ("float16", UNEVEN),
    **dict.fromkeys((name for name in MUTATIONS if "dilat" in name or name == "silu"), ("float32", DILATED)),
    **dict.fromkeys((name for name in MUTATIONS if name.startswith("activation of the")), ("float32", SUMMED)),
    "leaky_relu": ("float32", LEAKY),
    "gelu": ("float32", GELU),
    "gelu_tanh": ("float32", GELU_TANH),
    **dict.fromkeys(("fifth row", "fifth column", "hardswish"), ("float32", FIVE)),
    **dict.fromkeys(
        ("fifth row on tensor cores", "fifth row's weights", "rows three and four on tensor cores"), ("float16", FIVE)
    ),
    **dict.fromkeys(list(MUTATIONS)[list(MUTATIONS).index("gate") :], ("float32", SQUEEZED)),
    **dict.fromkeys(list(MUTATIONS)[list(MUTATIONS).index("image's border") :], ("float16", STEMMED, "hardswish")),
}


def shown_by(name):
    """Precision, block, and the activation of a stem in front of it."""
    precision, spec, activation = (*SHOWN_BY.get(name, ("float32", PADDED)), None)[:3]
    return precision, spec, activation


def changed_kernel(name, folder, headers):
    """The library of a changed source, with the one kernel that small plans of the block need."""
    original, replacement = MUTATIONS[name]
    precision, spec, activation = shown_by(name)
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    for header in ("activations.h", "block.h"):
        shutil.copy(CSRC / header, folder)
    changed = [path for path in (folder / "cuda").rglob("*.cuh") if original in path.read_text()]
    assert len(changed) == 1 and changed[0].read_text().count(original) == 1, original
    changed[0].write_text(changed[0].read_text().replace(original, replacement))
    plan = planned(spec, input_of(spec, 2, (6, 7), precision), precision, tile_cols=5)
    general = spec.beyond_mobilenet_v2 or activation not in (None, "relu6")
    form = {3: "kGeneral3x3", 5: "kGeneral5x5"}[spec.kernel] if general else "kStem" if activation else "kMobileNetV2"
    only = form, spec.stride, plan.strip_rows // 2, plan.out_panels
    return loaded(compiled_kernel(folder / "kernel.so", PRECISIONS[precision][0], folder, only, headers))


@pytest.fixture(scope="module")
def changed_kernels(request, tmp_path_factory):
    """Libraries that the tests to come ask for, compiled while others run."""
    items = [item for item in request.session.items if "changed_kernels" in item.fixturenames]
    headers = precompiled_headers(tmp_path_factory.mktemp("headers"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        names = [item.callspec.params["name"] for item in items]
        yield {name: pool.submit(changed_kernel, name, tmp_path_factory.mktemp("changed"), headers) for name in names}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(changed_kernels, name):
    precision, spec, activation = shown_by(name)
    assert noticed(changed_kernels[name].result(), spec, precision, activation)
