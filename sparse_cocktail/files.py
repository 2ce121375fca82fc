"""Files that survive a crash: written beside, synced, renamed over the old one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

__all__ = ["read_json", "read_tensors", "write_atomic", "write_json", "write_tensors"]


_ENTRY = "sparse_cocktail"  # of the safetensors metadata


def write_atomic(path: str | os.PathLike, write: Callable[[Any], None]) -> None:
    """Call `write(file)` on a new binary file beside `path`, sync it and rename it to `path`.

    When anything fails (a full disk, an interrupt), the old file at `path` is untouched and the
    partial one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.partial")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            error.errno,
            f"{path} was not written ({reason}); the previous file, if any, is unchanged",
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically. NaN is refused: JSON has none."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file that holds one JSON object; ValueError names the file when it does not."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no whole JSON ({error}); it was cut off or edited: take the original copy, "
            "or train again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, not an object; it was edited or is another "
            "program's: take the original copy, or train again"
        )
    return value


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, torch.Tensor], header: dict[str, Any]
) -> None:
    """Write one safetensors file, atomically, with a JSON header and a digest over everything.

    Tensors are stored contiguous, from the CPU. Equal content gives equal bytes.
    """
    stored = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    header = json.loads(json.dumps(header))  # as it will be read back
    # one entry: the order of several would be random
    entry = json.dumps({"header": header, "sha256": _digest(stored, header)})
    data = serialize(stored, metadata={_ENTRY: entry})
    write_atomic(path, lambda file: file.write(data))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read all tensors and the header of one safetensors file, on the CPU.

    The digest of our own files is checked; a foreign file's header is its safetensors metadata.

    Raises FileNotFoundError, or ValueError for a file that is truncated, edited or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; check the path to load")
    data = Path(path).read_bytes()  # at once: the file may be replaced meanwhile
    try:
        tensors = deserialize(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); it was truncated or is of another "
            "kind: take a complete copy"
        ) from error
    if _ENTRY not in metadata:
        return tensors, metadata
    try:
        entry = json.loads(metadata[_ENTRY])
        header, expected = entry["header"], entry["sha256"]
    except (ValueError, KeyError, TypeError):
        header, expected = {}, None
    if expected != _digest(tensors, header):
        raise ValueError(
            f"{path} was edited or damaged after it was saved (its digest does not match); take "
            "the original copy"
        )
    return tensors, header


def _digest(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> str:
    """SHA-256 over the header and every tensor."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
