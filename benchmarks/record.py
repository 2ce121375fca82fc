"""What every bench has: checked arguments, a result on disk after every group, its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_cocktail.files import write_atomic

from machine import clocks, describe, result_name  # isort: skip - neighbours, not packages
from output import markdown, write  # isort: skip

__all__ = ["RESULTS", "Record", "failures", "known", "one_or_more", "place_of", "report", "title"]

RESULTS = Path(__file__).resolve().parent / "results"


# ---- arguments -----------------------------------------------------------------------------------


def place_of(what: str, device: str, threads: int | None = None) -> torch.device:
    """The device, which must be there; sets torch's threads where they are given."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{what}: device=cuda, but torch sees no GPU here; use --device cpu")
    if threads:
        torch.set_num_threads(threads)
    return place


def known(what: str, argument: str, given: Sequence[str], names: Sequence[str]) -> list[str]:
    """The given names, each of which must be one of `names`."""
    for name in given:
        if name not in names:
            raise ValueError(f"{what}: {argument}={name!r} is unknown; use {', '.join(names)}")
    return list(given)


def one_or_more(what: str, argument: str, given: Sequence[int], example: str) -> tuple[int, ...]:
    """The given counts, each of which must be positive."""
    for count in given:
        if count < 1:
            raise ValueError(f"{what}: {argument}={count} is not 1 or more; for example {example}")
    return tuple(given)


# ---- the result ----------------------------------------------------------------------------------


class Record:
    """The result of a run, written after every group: whatever ends the run, that much is there.

    Args:
        bench: its name, and that of its folder in benchmarks/results.
        folder: None for that folder.
        ratios: what is derived from the result's rows and kept beside them.
        suffix: of the file's name, behind cpu or the GPU's.
        saved: whether there is a file.
        head: further fields of the JSON.
    """

    def __init__(
        self,
        bench: str,
        place: torch.device,
        folder: Path | None = None,
        ratios: Callable[[dict[str, Any]], list] | None = None,
        suffix: str = "",
        saved: bool = True,
        **head: Any,
    ) -> None:
        self.place, self.ratios, self.saved = place, ratios, saved
        self.path = (folder or RESULTS / bench) / f"{result_name(place)}{suffix}.json"
        self.environment = describe(place)
        self.result = {"format": 1, "bench": bench, "environment": self.environment, **head}
        self.result |= {"ratios": []} if ratios else {}
        self.result["rows"] = self.rows = []

    def add(self, rows: Sequence[dict]) -> None:
        """More rows, and the file again."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        if self.place.type == "cuda":
            self.environment["clocks_end"] = clocks()
        if self.ratios:
            self.result["ratios"] = self.ratios(self.result)
        if self.saved:
            write(self.path, self.result)


def failures(result: dict[str, Any]) -> list[dict]:
    """Rows of ours that were wrong or broke."""
    return [r for r in result["rows"] if r["impl"].startswith("ours/") and not r["ok"]]


# ---- its report ----------------------------------------------------------------------------------


def title(subject: str, facts: dict[str, Any]) -> str:
    """What was measured, and on what."""
    return f"{subject} on {facts.get('gpu', facts['cpu'])}, {facts['threads']} threads"


def report(
    path: Path,
    result: dict[str, Any],
    subject: str,
    remarks: Sequence[str],
    cells: Sequence[Sequence[str]] = (),
    change: Callable[[str], str] = str,
) -> list[Path]:
    """Write the Markdown beside a JSON: remarks, a table of cells, then all rows.

    Returns:
        The files that there are now, of which pictures become more.
    """
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    if lines:
        lines.insert(1, "| " + " | ".join(["---"] * len(cells[0])) + " |")
    text = change(markdown(result, title(subject, result["environment"]), [*remarks, *lines]))
    table = path.with_suffix(".md")
    write_atomic(table, lambda file: file.write(text.encode()))
    return [path, table]
