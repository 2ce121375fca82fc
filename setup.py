"""Builds the C++ (and, where possible, CUDA) extension; everything else is in pyproject.toml.

The extension registers its ops through torch's stable ABI and uses no Python API, so one file
`sparse_cocktail/_C.abi3.so` serves every Python >= 3.10 and every torch >= 2.10.

    pip install .                          regular install
    python setup.py build_ext --inplace    only the extension, into this checkout
    SPARSE_COCKTAIL_NO_EXT=1 pip install . pure Python: slower on the CPU, same results

CUDA kernels go into the same file where torch has CUDA and nvcc is there. Nothing of it asks for a
driver or a card: ops on the CPU work without. TORCH_CUDA_ARCH_LIST chooses the cards, in torch's
words, and SPARSE_COCKTAIL_CUDA_ARCHS="80 90a" in nvcc's, for a faster build on one machine;
SPARSE_COCKTAIL_NO_CUDA=1 leaves CUDA out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: newer features stay out of reach
# Cards that the kernels are compiled for. wgmma exists on sm_90a alone, and torch's own choice for
# such a card would be sm_90; later cards compile the PTX of sm_80 when they load it.
CUDA_ARCHS = "80+PTX 86 89 90a"
MIN_NVCC = (12, 5)  # knows mma.sp::ordered_metadata


def stop(reason: str, remedy: str) -> None:
    sys.exit(
        f"sparse-cocktail: {reason}.\n  To fix it: {remedy}\n"
        "  To do without compiled kernels: SPARSE_COCKTAIL_NO_EXT=1 pip install ."
    )


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def load_cpp_extension():
    """torch.utils.cpp_extension, once torch and a compiler are known to be usable."""
    install = "pip install torch==2.13.0 && pip install --no-build-isolation ."
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(f"torch is needed to build the C++ kernels, and cannot be imported ({error})", install)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH:
        stop(f"torch {torch.__version__} is too old, the stable ABI needs >= 2.10", install)
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        stop(
            f"no C++ compiler, `{compiler}` is not on PATH",
            "apt-get install g++ (macOS: xcode-select --install), or set CXX to your compiler",
        )
    return cpp_extension


def usable_cuda_sources(cpp_extension) -> tuple[list[str], list[str]]:
    """The CUDA kernels that can be built here and their -gencode flags; says why, if none can."""
    found, flags = sources("csrc/cuda/*.cu"), []
    reason = why_no_cuda(cpp_extension)
    if reason is None:
        flags = cuda_arch_flags()
        reason = None if flags else "none of the chosen architectures is sm_80 or later"
    if reason is None:
        return found, flags
    if found:
        names = ", ".join(Path(source).stem for source in found)
        print(f"sparse-cocktail: building without the CUDA kernels {names}: {reason}")
    return [], []


def why_no_cuda(cpp_extension) -> str | None:
    import torch

    if os.environ.get("SPARSE_COCKTAIL_NO_CUDA") == "1":
        return "SPARSE_COCKTAIL_NO_CUDA=1"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "there is no nvcc; set CUDA_HOME"
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    try:
        says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        plan = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        steps = subprocess.run(plan, capture_output=True, text=True).stderr
    except OSError as error:
        return f"nvcc does not start ({error}); set CUDA_HOME"
    # torch takes nvcc's folder for the toolkit's, but a link or wrapper on PATH lies elsewhere
    if top := re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE):
        cpp_extension.CUDA_HOME = os.path.normpath(top[1])
    found = re.search(r"release (\d+)\.(\d+)", says)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < MIN_NVCC:
        return f"{nvcc} is of CUDA {version[0]}.{version[1]}, and 12.5 is the oldest that will do"
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"{nvcc} is of CUDA {version[0]}, and torch of CUDA {torch.version.cuda}"
    return None


def cuda_arch_flags() -> list[str]:
    """One -gencode per card, or two with +PTX. Any of them keeps torch from adding its guesses."""
    ours = os.environ.get("SPARSE_COCKTAIL_CUDA_ARCHS", "")
    torchs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", "")
    flags = []
    for arch in re.split(r"[;,\s]+", ours.strip() or torchs.strip() or CUDA_ARCHS):
        parts = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
        if parts is None:
            stop(
                f"the list of CUDA architectures has {arch!r}, which is no number like 80 or 90a",
                'set TORCH_CUDA_ARCH_LIST="8.0;9.0a" or SPARSE_COCKTAIL_CUDA_ARCHS="80 90a"',
            )
        if int(parts[1]) < 80:
            print(f"sparse-cocktail: no CUDA kernels for sm_{parts[1]}: sparse MMA is of sm_80")
            continue
        # 90 and 90a are the same cards, and only the latter may use wgmma
        name = "90a" if parts[1] == "90" else parts[1] + parts[2]
        for kind in ("sm", "compute") if parts[3] else ("sm",):
            flags.append(f"-gencode=arch=compute_{name},code={kind}_{name}")
    return list(dict.fromkeys(flags))


def extension() -> dict:
    """The arguments of setup() that build the extension."""
    if os.environ.get("SPARSE_COCKTAIL_NO_EXT") == "1":
        print("sparse-cocktail: SPARSE_COCKTAIL_NO_EXT=1, installing without compiled kernels")
        return {}
    cpp_extension = load_cpp_extension()
    cuda, cuda_archs = usable_cuda_sources(cpp_extension)
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    define = f"-DTORCH_TARGET_VERSION={TARGET}"
    # No -march=native: the binary must run on machines other than the one that built it. The prefix
    # map keeps the build folder out of error messages.
    prefix = f"-fmacro-prefix-map={ROOT}/="
    cxx = ["-O3", "-std=c++17", "-Wall", "-g0", define, prefix]
    # USE_CUDA shows torch's C functions for streams; threads compile the architectures side by side
    nvcc = ["-O3", "-std=c++17", define, "-DUSE_CUDA", f"-Xcompiler={prefix}", "--threads=4"]
    module = kind(
        "sparse_cocktail._C",
        sources("csrc/cpu/*.cpp") + cuda,
        depends=sources("csrc/**/*.h"),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc + cuda_archs},
        py_limited_api=True,
    )
    ninja = cpp_extension.is_ninja_available()
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=ninja)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# The folder kernels/ is installed as sparse_cocktail.kernels, never as a package called `kernels`.
setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["sparse_cocktail*"]), "sparse_cocktail.kernels"],
    package_dir={"sparse_cocktail.kernels": "kernels"},
    **extension(),
)
