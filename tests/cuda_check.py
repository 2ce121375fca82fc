"""Compiles every csrc/cuda/*.cu for every target, without a GPU, and reads the machine code.

    make cuda-check                                     all targets; JSON and table in build/
    python tests/cuda_check.py --targets 80 90a --out DIR --jobs 4

Per kernel and target it prints: registers; bytes of local memory, which are spills; static shared
memory (what is dynamic is chosen at launch); sparse MMA instructions, HMMA.SP of a warp and
HGMMA.SP of a warp group; 16-byte loads from global memory into registers or, asynchronously, into
shared memory; TMA loads. It fails where a kernel uses local memory, and where one that multiplies
has no sparse MMA. Exit code 1 says that a check failed, 2 that a tool is missing.

What was read of a file is kept in build/cuda_check/ until the file, a header or a flag changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cuda_check"
TARGETS = ("80", "86", "89", "90a")  # as in setup.py
FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# Kernels that multiply end in `kernel`; others in their files, such as `finish`, need no MMA.
MULTIPLIES = re.compile(r"^nm_(gemm|skinny)\w*_kernel\b")
NUMBERS = {"int, 2139095040": "fp32", "short, 32640": "bf16", "short, 31744": "fp16"}


class Missing(RuntimeError):
    """A tool that the check needs is not there."""


class NotCompiled(RuntimeError):
    """A file does not compile."""


@dataclass
class Row:
    """What the machine code of one kernel says."""

    file: str
    target: str
    kernel: str
    registers: int = 0
    local_bytes: int = 0  # of stack: spills, and arrays that did not fit registers
    shared_bytes: int = 0
    hmma_sp: int = 0
    hgmma_sp: int = 0
    loads_16: int = 0
    tma: int = 0
    instructions: int = 0

    def complaints(self) -> list[str]:
        found = []
        name = f"{self.file} for sm_{self.target}: {self.kernel}"
        if self.local_bytes:
            found.append(f"{name} uses {self.local_bytes} bytes of local memory, so it spills")
        if MULTIPLIES.match(self.kernel):
            hopper = "sm90" in self.kernel  # elsewhere an empty kernel
            if hopper and self.target.startswith("90") and not self.hgmma_sp:
                found.append(f"{name} has no HGMMA.SP instruction")
            if not hopper and not self.hmma_sp:
                found.append(f"{name} has no HMMA.SP instruction")
        return found


# ---- tools ---------------------------------------------------------------------------------------


def _cuda_home() -> Path | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    return Path("/usr/local/cuda") if Path("/usr/local/cuda").is_dir() else None


def nvcc() -> str:
    home = _cuda_home()
    found = (home and shutil.which("nvcc", path=home / "bin")) or shutil.which("nvcc")
    if not found:
        raise Missing("nvcc is not there; install the CUDA toolkit (12.5 or later), set CUDA_HOME")
    return found


def cuobjdump() -> str:
    """From the CUDA toolkit, or else the one that Triton brings along."""
    folders = [Path(nvcc()).resolve().parent]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    for folder in (*folders, None):
        found = shutil.which("cuobjdump", path=folder)
        if found:
            return found
    raise Missing("cuobjdump is not there; install cuda-cuobjdump or Triton")


def _include_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in include_paths()]


# ---- reading -------------------------------------------------------------------------------------


def short_name(mangled: str) -> str:
    """`nm_skinny_kernel<bf16, 2, 1>` of a mangled name, or what can be had."""
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None:
        return mangled
    name = subprocess.run([filt, mangled], capture_output=True, text=True).stdout.strip()
    name = name.removeprefix("void ").replace("(short)", "").replace("sparse_cocktail::", "")
    for numbers, word in NUMBERS.items():
        name = name.replace(f"Format<{numbers}>", word)
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::", "", name)
    name = re.sub(r"\(\w+\)(\d)", r"\1", name).replace(" >", ">")  # values of enumerations
    depth = 0  # the argument list starts at the first parenthesis outside of <>
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and i:
            return name[:i].strip()
    return name


def read_resources(text: str) -> dict[str, dict[str, int]]:
    """Registers, stack and shared memory per kernel, from what `ptxas -v` prints."""
    found: dict[str, dict[str, int]] = {}
    entry = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = match[1]
            found[entry] = {"registers": 0, "local_bytes": 0, "shared_bytes": 0}
        elif entry and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", line)):
            found[entry]["local_bytes"] += max(int(match[1]), int(match[2]))
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry]["registers"] = int(match[1])
            found[entry]["shared_bytes"] = int(shared[1]) if shared else 0
    return found


COUNTED = {
    "hmma_sp": re.compile(r"\bHMMA\.SP\b"),
    "hgmma_sp": re.compile(r"\bHGMMA\.SP\b"),
    "loads_16": re.compile(r"\b(LDG|LDGSTS)\.\S*128\b"),
    "tma": re.compile(r"\bUTMALDG\b"),
    "instructions": re.compile(r";"),
}


def read_machine_code(text: str) -> dict[str, dict[str, int]]:
    """Instructions per kernel, from what `cuobjdump -sass` prints."""
    found: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            counts = found[match[1]] = dict.fromkeys(COUNTED, 0)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            for what, pattern in COUNTED.items():
                counts[what] += bool(pattern.search(line))
    return found


def compile_and_read(source: Path, target: str, flags: Sequence[str] = ()) -> list[Row]:
    """Rows of all kernels of one file; NotCompiled with nvcc's words where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc(), "-cubin", f"-arch=sm_{target}", *FLAGS, *flags, "-Xptxas=-v"]
        done = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True)
        if done.returncode:
            errors = re.findall(r".*\berror\b.*(?:\n.*){0,2}", done.stdout + done.stderr)
            words = "\n".join(errors) or done.stderr
            raise NotCompiled(f"{source.name} does not compile for sm_{target}:\n{words}")
        if slow := re.findall(r".*\(C7\d{3}\).*", done.stdout + done.stderr):  # serialised wgmma
            words = "\n".join(slow)
            raise NotCompiled(f"{source.name}: ptxas complains for sm_{target}:\n{words}")
        resources = read_resources(done.stdout + done.stderr)
        command = [cuobjdump(), "-sass", cubin]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = read_machine_code(code)
    if set(counts) != set(resources):
        raise RuntimeError(f"{source.name}: ptxas and cuobjdump name different kernels")
    rows = [
        Row(source.name, target, short_name(name), **resources[name], **counts[name])
        for name in counts
    ]
    return sorted(rows, key=lambda row: row.kernel)


def _cached(source: Path, target: str, flags: Sequence[str], stamp: bytes) -> list[Row]:
    key = hashlib.sha256(stamp + source.read_bytes() + repr((target, source.name)).encode())
    kept = CACHE / f"{source.stem}-{target}-{key.hexdigest()[:16]}.json"
    if kept.exists():
        return [Row(**row) for row in json.loads(kept.read_text())]
    rows = compile_and_read(source, target, flags)
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{source.stem}-{target}-*.json"):
        old.unlink(missing_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(row) for row in rows]))
    partial.replace(kept)
    return rows


def check(targets: Iterable[str] = TARGETS, jobs: int | None = None) -> tuple[list[Row], list[str]]:
    """Rows of all files for these targets, compiled side by side, and all complaints."""
    flags = _include_flags()
    version = subprocess.run([nvcc(), "--version"], capture_output=True).stdout
    headers = sorted([*ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/common/*.h"), Path(__file__)])
    stamp = version + repr((FLAGS, flags)).encode() + b"".join(h.read_bytes() for h in headers)
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda path: -path.stat().st_size)
    todo = [(source, target) for source in sources for target in targets]
    rows: list[Row] = []
    complaints = [] if sources else ["csrc/cuda has no kernels"]

    def one(each: tuple[Path, str]) -> list[Row] | str:
        try:
            return _cached(*each, flags, stamp)
        except NotCompiled as error:
            return str(error)

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for found in pool.map(one, todo):
            if isinstance(found, str):
                complaints.append(found)
            else:
                rows += found
    rows.sort(key=lambda row: (row.file, row.target))
    return rows, complaints + [complaint for row in rows for complaint in row.complaints()]


# ---- showing -------------------------------------------------------------------------------------

COLUMNS = {
    "target": "sm_",
    "kernel": "kernel",
    "registers": "registers",
    "local_bytes": "local B",
    "shared_bytes": "static shared B",
    "hmma_sp": "HMMA.SP",
    "hgmma_sp": "HGMMA.SP",
    "loads_16": "16-byte loads",
    "tma": "TMA",
    "instructions": "instructions",
}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table whose columns also line up as text."""
    lines = [[str(getattr(row, key)) for key in COLUMNS] for row in rows]
    lines = [list(COLUMNS.values()), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    drawn = [
        "| "
        + " | ".join(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in each)
        + " |"
        for each in ([*enumerate(zip(line, widths, strict=True))] for line in lines)
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 1 else ":") for i, w in enumerate(widths))
    return "\n".join([drawn[0], rule + "|", *drawn[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="80")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of both files")
    parser.add_argument("--jobs", type=int, help="compilations at a time (default: all cores)")
    options = parser.parse_args()
    try:
        rows, complaints = check(options.targets, options.jobs)
    except Missing as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 2
    text = table(rows)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"format": 1, "rows": [asdict(row) for row in rows], "complaints": complaints}
    (options.out / "cuda-check.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "cuda-check.md").write_text(text + "\n")
    for complaint in complaints:
        print(f"cuda-check: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
