"""Build of the compiled parts; everything else is declared in pyproject.toml.

``mnv2_fused._C`` is the CPU's kernels and all that Python asks of C++; ``mnv2_fused._cuda`` the CUDA kernel, built
where a CUDA toolkit fits torch's (no GPU is needed). ``MNV2_FUSED_CUDA=0`` leaves it out, ``MNV2_FUSED_CUDA=1``
requires it; ``TORCH_CUDA_ARCH_LIST`` names the architectures, as for any of torch's extensions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI has everything used here: one binary serves it and later ones.
TORCH_TARGET = "0x020a000000000000"  # 2.10

# Turing to Blackwell, and PTX of the last for what comes. Those below need the toolkit beside them.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
SINCE = {"10.0": (12, 8), "12.0": (12, 8)}


class Toolkit(NamedTuple):
    """An nvcc: its release, and where its headers and libraries are."""

    nvcc: str
    release: tuple[int, int]
    include_dirs: list[str]
    library_dirs: list[str]


def find_toolkit(home: str | None) -> Toolkit | None:
    """The toolkit in ``home``, else the one whose nvcc is on the path; None without either.

    nvcc is asked for its folders, since it may be a script that calls the one of another folder.
    """
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None:
        return None
    told = [["--version"], ["--dryrun", "-E", "-x", "cu", os.devnull]]
    version, folders = (
        subprocess.run([nvcc, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        for options in told
    )
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return None
    found = {kind: re.findall(rf'"-{kind}(.+?)"', folders) for kind in "IL"}
    libraries = [folder for folder in found["L"] if not folder.endswith("stubs")]
    return Toolkit(nvcc, (int(release[1]), int(release[2])), list(dict.fromkeys(found["I"])), libraries)


def default_architectures(release: tuple[int, int]) -> str:
    """All that a toolkit of this release compiles for, as TORCH_CUDA_ARCH_LIST spells it."""
    return ";".join(a for a in ARCHITECTURES if release >= SINCE.get(a, (0, 0))) + "+PTX"


def why_no_cuda(choice: str, torch_cuda: str | None, toolkit: Toolkit | None) -> str | None:
    """Why the CUDA kernel is not built, None if it is. Raises SystemExit where ``choice`` asks for what cannot be.

    ``choice`` is MNV2_FUSED_CUDA, ``torch_cuda`` the CUDA version torch is built with.
    """
    if choice not in ("", "0", "1"):
        raise SystemExit(f"MNV2_FUSED_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return "MNV2_FUSED_CUDA=0"
    missing = None
    if torch_cuda is None:
        missing = "the torch it was built with has no CUDA: install a CUDA build of torch"
    elif toolkit is None:
        missing = f"no nvcc was found: install the CUDA toolkit {torch_cuda} and set CUDA_HOME to it"
    elif toolkit.release[0] != int(torch_cuda.split(".")[0]):
        release = ".".join(map(str, toolkit.release))
        missing = f"{toolkit.nvcc} is of CUDA {release} and torch of {torch_cuda}: set CUDA_HOME to a toolkit of that"
    if missing is not None and choice == "1":
        raise SystemExit(f"MNV2_FUSED_CUDA=1, but {missing}; or unset it to build without the CUDA kernel")
    return missing


def text_define(name: str, value: str) -> str:
    """A compiler's option that defines ``name`` as a string in C++."""
    return f'-D{name}="{value}"'


def main() -> None:
    import pybind11
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension

    debug = os.environ.get("MNV2_FUSED_DEBUG", "0") == "1"
    choice = os.environ.get("MNV2_FUSED_CUDA", "")
    toolkit = find_toolkit(cpp_extension.CUDA_HOME) if torch.version.cuda else None
    missing = why_no_cuda(choice, torch.version.cuda, toolkit)

    def sources(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))

    cxx = [
        "-std=c++20",
        "-O0" if debug else "-O3",
        "-g" if debug else "-g0",
        "-Wall",
        "-Wextra",
        "-Werror=switch",  # an activation or gate that a kernel or planner does not know
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    extensions = [
        cpp_extension.CppExtension(
            "mnv2_fused._C",
            sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cpu/*/*.cpp", "csrc/python/*.cpp", "csrc/cuda/plan.cpp"),
            # pybind11's own headers, before the copy in torch, which refuses stable-ABI builds.
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[*cxx, *([text_define("MNV2_FUSED_NO_CUDA", missing)] if missing else [])],
        )
    ]
    if missing is None:
        # Without a list torch would ask the GPU, of which none need be here.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(toolkit.release))
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
        architectures = " ".join(sorted(re.findall(r",code=(\w+)", flags), key=lambda name: (len(name), name)))
        cpp_extension.CUDA_HOME = str(Path(toolkit.nvcc).parent.parent)
        extensions.append(
            cpp_extension.CppExtension(  # not CUDAExtension: it guesses folders that nvcc knows
                "mnv2_fused._cuda",
                sources("csrc/block.cpp", "csrc/layers.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
                include_dirs=toolkit.include_dirs,
                library_dirs=toolkit.library_dirs,
                libraries=["torch_cuda", "cudart"],
                extra_compile_args={
                    "cxx": [*cxx, "-DUSE_CUDA", text_define("MNV2_FUSED_ARCHITECTURES", architectures)],
                    "nvcc": [
                        "-std=c++20",
                        "-O3",
                        *(["-lineinfo", "-Xptxas", "-v"] if debug else []),
                    ],
                },
            )
        )

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Of editable installs, too, whose own would be gone afterwards: so a wheel finds their objects.
            self.build_temp = str(ROOT.absolute() / "build" / f"objects-{sys.implementation.cache_tag}")

        def run(self) -> None:
            release = toolkit and ".".join(map(str, toolkit.release))
            told = missing or f"for {architectures}, with {toolkit.nvcc} of CUDA {release}"
            print(f"mnv2_fused: building the CPU kernels{'' if missing else ' and the CUDA kernel'} ({told})")
            super().run()

    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


if __name__ == "__main__":  # as every build frontend runs it
    main()
