"""What a benchmark's numbers depend on: processor, threads, versions, source. No names."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparse_cocktail import ops
from sparse_cocktail.report import environment as versions

__all__ = ["cache_bytes", "describe", "memory_bytes", "result_name"]

ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where it cannot be read."""
    text = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    units = {"K": 2**10, "M": 2**20}
    return int(text[:-1]) * units[text[-1]] if re.fullmatch(r"\d+[KM]", text) else 2**25


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sources() -> str:
    """Digest of the code that runs: it names a state also where there is no git."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "csrc", "kernels", "sparse_cocktail"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version_of(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def clocks() -> dict[str, Any]:
    """Present clocks of the GPU in MHz, power in W, temperature in C; empty if not readable."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        values = [float(v) for v in done.stdout.strip().splitlines()[0].split(",")]
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), values, strict=True))


def describe(device: torch.device) -> dict[str, Any]:
    """Environment of a benchmark JSON."""
    level = getattr(ops, "cpu_level", lambda: "cpp")()
    facts = {
        **versions(device),
        "sources": _sources(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "last_level_cache": cache_bytes(),
        "cpu_level": level if ops.extension_path else None,
        "numpy": _version_of("numpy"),
        "triton": _version_of("triton"),
        "os": platform.system(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": card.name,
            "multiprocessors": card.multi_processor_count,
            "l2_cache": card.L2_cache_size,
            "gpu_memory": card.total_memory,
            "cuda": torch.version.cuda,
            "clocks_start": clocks(),
        }
    return facts


def result_name(device: torch.device) -> str:
    """Stem of the result files: cpu, or the GPU's name such as h200."""
    if device.type != "cuda":
        return device.type
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "-".join(w for w in words if w not in ("nvidia", "geforce", "tesla")) or "cuda"
