"""Builds the C++ (and, where possible, CUDA) extension; everything else is in pyproject.toml.

The extension registers its ops through torch's stable ABI and uses no Python API, so one file
`sparse_cocktail/_C.abi3.so` serves every Python >= 3.10 and every torch >= 2.10.

    pip install .                          regular install
    python setup.py build_ext --inplace    only the extension, into this checkout
    SPARSE_COCKTAIL_NO_EXT=1 pip install . pure Python: slower on the CPU, same results
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: newer features stay out of reach


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


def usable_cuda_sources(cpp_extension) -> list[str]:
    """The CUDA kernels that can be built here; says which ones cannot, and why."""
    import torch

    found = sources("csrc/cuda/*.cu")
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    elif cpp_extension.CUDA_HOME is None:
        reason = "there is no nvcc; set CUDA_HOME"
    else:
        return found
    if found:
        names = ", ".join(Path(source).stem for source in found)
        print(f"sparse-cocktail: building without the CUDA kernels {names}: {reason}")
    return []


def extension() -> dict:
    """The arguments of setup() that build the extension."""
    if os.environ.get("SPARSE_COCKTAIL_NO_EXT") == "1":
        print("sparse-cocktail: SPARSE_COCKTAIL_NO_EXT=1, installing without compiled kernels")
        return {}
    cpp_extension = load_cpp_extension()
    cuda = usable_cuda_sources(cpp_extension)
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    define = f"-DTORCH_TARGET_VERSION={TARGET}"
    # No -march=native: the binary must run on machines other than the one that built it. The prefix
    # map keeps the build folder out of error messages.
    cxx = ["-O3", "-std=c++17", "-Wall", "-g0", define, f"-fmacro-prefix-map={ROOT}/="]
    module = kind(
        "sparse_cocktail._C",
        sources("csrc/cpu/*.cpp") + cuda,
        depends=sources("csrc/**/*.h"),
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++17", define]},
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
