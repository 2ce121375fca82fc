"""Compiles a driver of tests/cuda_host with the host compiler and loads it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # pragma unroll
    "-ffp-contract=off",  # a product and a sum are two roundings, as written
    "-fPIC",
    "-shared",
    "-DSC_EMULATE",
]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def compile_driver(name: str, folder: Path) -> subprocess.Popen:
    """Starts the compilation of NAME.cpp; several can run side by side."""
    command = [compiler(), *FLAGS, f"-I{CUDA}", f"-I{HERE}", str(HERE / f"{name}.cpp")]
    return subprocess.Popen(
        [*command, "-o", str(folder / f"{name}.so")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def load_driver(name: str, folder: Path, process: subprocess.Popen) -> ctypes.CDLL:
    output, _ = process.communicate()
    assert process.returncode == 0, f"{name}.cpp does not compile:\n{output}"
    library = ctypes.CDLL(str(folder / f"{name}.so"))
    library.last_error.restype = ctypes.c_char_p
    return library


class Driver:
    """Calls a driver whose integers are all int64_t; tensors are passed by address."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def __call__(self, name: str, *arguments):
        def converted(argument):
            if argument is None:
                return ctypes.c_void_p(0)
            if isinstance(argument, torch.Tensor):
                return ctypes.c_void_p(argument.data_ptr())
            return ctypes.c_int64(argument)

        return getattr(self.library, name)(*map(converted, arguments))

    def prepare(self, *arrays: torch.Tensor | None, order: int = 0, shared_limit: int = 0) -> None:
        """Only these arrays may be touched from now on; counts start at 0."""
        self("reset")
        self.library.set_options(order, ctypes.c_int64(shared_limit))
        for array in arrays:
            if array is not None:
                self("register_array", array, array.numel() * array.itemsize)

    def run(self, name: str, *arguments) -> None:
        failed = self(name, *arguments)
        assert not failed, self.error()

    def error(self) -> str:
        return self.library.last_error().decode()

    def statistics(self) -> dict[str, int]:
        counts = torch.zeros(5, dtype=torch.int64)
        self("read_statistics", counts)
        names = ("sparse_mmas", "matrix_loads", "matrix_conflicts", "async_copies", "async_bytes")
        return dict(zip(names, counts.tolist(), strict=True))
