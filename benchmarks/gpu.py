"""`make gpu-smoke`, `make gpu`, `make gpu-proof`: build, test and measure on a machine with a GPU.

    python3 benchmarks/gpu.py smoke            about two minutes
    python3 benchmarks/gpu.py full --out DIR   within nine
    python3 benchmarks/gpu.py full --out DIR --skip tests --benches train serve
    python3 benchmarks/gpu.py proof --out DIR  the 2:4 kernels alone, within nine: every tile, under
                                               compute-sanitizer, with ncu's counters, torch's tile

It uses the interpreter that runs it, with that interpreter's own torch, and needs no network. Every
step has a limit in seconds and the next one follows when it fails; the exit code is 1 if any did.
Results (JSON and Markdown per bench, log of the tests) go to DIR, or else to benchmarks/results/;
`sparse-cocktail bench masks --redraw FILE.json` draws the pictures of a JSON that was brought home.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds in all: each ends within nine minutes.
TOTAL = {"smoke": 240, "full": 530, "proof": 530}
LIMITS = {  # seconds of a step at most; what is left of the total cuts it too
    "smoke": {"build": 120, "tests": 150, "bench": 80},
    "full": {"build": 150, "tests": 210, "bench": 400},
    "proof": {"build": 150, "tests": 90, "memcheck": 110, "racecheck": 110, "counters": 80}
    | {"both-ways": 60},
}
# Tests that run ops, banks and modules on every device that a backend has. Patterns, because a
# family may have several files and some come later.
TESTS = {
    "smoke": ("test_masks.py", "test_bank.py", "test_triton*.py"),
    "full": (
        "test_mask*.py",
        "test_ops.py",
        "test_bank.py",
        "test_rows*.py",
        "test_channels.py",
        "test_modules.py",
        "test_live_rows.py",
        "test_premask.py",
        "test_triton*.py",
        "test_gpu*.py",
        "test_nm*.py",
    ),
    "proof": ("test_gpu_nm.py",),
}
# Of the proof's tests, those that a checker of memory and races repeats a hundred times slower.
CHECKED = "exact_for_integers and 137 or as_accurate or edges"
BENCHES = ("masks", "masked", "nm", "train", "serve")
FIRST = BENCHES[:3]  # what fits into one run; the others: --benches train serve --skip tests
MOST = {"nm": 150}  # seconds of a bench, where it is less than its share
# What of a bench fits: the whole of `masked` is some 260 groups, of `nm` some 430.
PARTS = {
    ("masks", "smoke"): ["--cases", "resnet50,1e6,1e7"],
    ("masked", "full"): ["--cases", "network,resnet50", "--passes", "train"]
    + ["--dtype", "bf16, fp32 weights"],
    ("nm", "full"): ["--cases", "llama-7b,square,compress,vit-l16"]
    + ["--rows", "1,4,16,64,256,1024,4096,8192,16384"],
}


@dataclass
class Step:
    """What one step did."""

    name: str
    code: int
    seconds: float
    says: str

    @property
    def state(self) -> str:
        return "ok" if self.code == 0 else "timed out" if self.code == 124 else "FAILED"


def run(name: str, command: Sequence[str], limit: float, log: Path | None = None) -> Step:
    """One command in the checkout, its output shown and kept; 124 when it ran past its limit."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    places = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": places, "PYTHONUNBUFFERED": "1"}
    if command[0].endswith("compute-sanitizer"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # what lies beside a tensor is nobody's
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        says = f"{command[0]} is not installed here"
        print(says, flush=True)
        return Step(name, 127, 0.0, says)
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest still says what failed
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        code = 124
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output.replace(f"{ROOT}/", ""))
    lines = output.rstrip().splitlines()
    shown = [line for line in lines if not re.fullmatch(r"[.sxFE]+\s*(\[\s*\d+%\])?", line)]
    print("\n".join(shown[-80:]), flush=True)
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Step(name, code, time.monotonic() - started, last.strip(" =")[:110])


def build_for_this_card() -> None:
    """Have the CUDA kernels compiled for the card that is here, if nobody said otherwise."""
    names = ("SPARSE_COCKTAIL_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    if any(name in os.environ for name in names):
        return
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        os.environ[names[0]] = f"{major}{minor}" + "a" * (major == 9)


def tests(kind: str) -> list[str]:
    """Test files of this checkout that say something about the GPU."""
    found = [path for name in TESTS[kind] for path in sorted((ROOT / "tests").glob(name))]
    return [str(path.relative_to(ROOT)) for path in found]


def pytest_command(kind: str) -> list[str]:
    """Tests of the GPU part, in several processes where pytest-xdist is there."""
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    if has_xdist():
        options += ["-n", str(min(14, os.cpu_count() or 1))]
    # what compilers make of kernels needs no card, and would take its minutes in every process
    options += ["-m", "not compiler" + " and not slow" * (kind == "smoke")]
    return [sys.executable, "-m", "pytest", *options, *tests(kind)]


def bench_command(bench: str, kind: str, device: str, out: Path | None) -> list[str]:
    command = [sys.executable, "-m", "sparse_cocktail.cli", "bench", bench, "--device", device]
    if kind == "smoke":
        command += ["--quick"]
    command += PARTS.get((bench, kind), []) if device == "cuda" else []
    if out is None and kind == "smoke":  # too short to be kept as results
        out = ROOT / "runs" / "gpu-smoke"
    if out is not None:  # few files: pictures are drawn from the JSON later
        command += ["--out", str(out / bench), "--no-pictures"]
    return command


def proof_commands(out: Path | None) -> dict[str, list[str]]:
    """What the proof runs besides the tests: checkers of memory and races, counters, torch's tile.

    A tool that is not installed fails its step, as one that the machine does not let run does.
    """
    out = out or ROOT / "runs" / "gpu-proof"
    out.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "benchmarks/proof.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    pytest += ["-n", "0"] if has_xdist() else []
    checker = [cuda_tool("compute-sanitizer"), "--error-exitcode", "9", "--kernel-name", "kns=nm_"]
    # calls of the driver that torch tries and that fail are no errors of kernels
    options = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    commands = {
        tool: [*checker, "--tool", tool, *some, *pytest, "-k", CHECKED, *tests("proof")]
        for tool, some in options.items()
    }
    counters = "--clock-control none -k regex:nm_ --set detailed --csv --page details"
    log = ["--log-file", str(out / "counters.csv")]
    commands["counters"] = [cuda_tool("ncu"), *counters.split(), *log, *program, "calls"]
    commands["both-ways"] = [*program, "both-ways", "--out", str(out / "both-ways.json")]
    return commands


def cuda_tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, else beside nvcc's usual place."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(usual) if usual.is_file() else name)


def has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def collect(steps: Sequence[Step]) -> str:
    """The closing table."""
    lines = ["", "step      state      seconds  last line"]
    for step in steps:
        lines.append(f"{step.name:<9} {step.state:<10} {step.seconds:7.0f}  {step.says}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 0 when every one did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=tuple(TOTAL))
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=("build", "tests", "bench"))
    parser.add_argument("--benches", nargs="*", default=FIRST, choices=BENCHES, help="only these")
    given = parser.parse_args(arguments)
    out = given.out.resolve() if given.out else None
    started, steps = time.monotonic(), []

    def left(step: str, reserve: float = 0.0) -> float:
        spent = time.monotonic() - started
        return min(LIMITS[given.kind][step], TOTAL[given.kind] - reserve - spent)

    if "build" not in given.skip:
        build_for_this_card()
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        steps.append(run("build", command, left("build")))
    if "tests" not in given.skip:
        log = out / "tests.log" if out else None
        reserve = 60 if given.kind == "smoke" else 260  # for what follows
        steps.append(run("tests", pytest_command(given.kind), left("tests", reserve), log))
    if given.kind == "proof":
        for name, command in proof_commands(out).items():
            log = out / f"{name}.log" if out else None
            steps.append(run(name, command, left(name), log))
    elif "bench" not in given.skip:
        for place, bench in enumerate(given.benches):
            share = left("bench") / (len(given.benches) - place)
            share = min(share, MOST.get(bench, share))
            command = bench_command(bench, given.kind, given.device, out)
            steps.append(run(bench, command, share))
    print(collect(steps), flush=True)
    return int(any(step.code for step in steps))


if __name__ == "__main__":
    sys.exit(main())
