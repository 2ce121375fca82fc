"""The folder of one run: who may use it, its config, its log, its checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from .checkpoint import load_checkpoint, save_checkpoint
from .files import read_json, write_json

__all__ = ["RunFolder", "changed_fields"]

CHECKPOINT, LOG, CONFIG, RESULTS = (
    "checkpoint.safetensors",
    "log.jsonl",
    "config.json",
    "results.json",
)
LOCK = ".lock"  # of the process that trains here
# Fields that a resumed run may change: they alter nothing that is computed.
_FREE = ("checkpoint_every", "tensorboard", "workers")


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields by name as (before, now), where they differ and that matters to a resumed run."""
    return {
        name: (before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value and name not in _FREE
    }


class RunFolder:
    """Files of a run. `check` changes nothing; `claim` makes the folder this run's.

    Args:
        path: the folder; it need not exist.
        facts: all fields of the run.
        writes: whether this process writes (rank 0 does).
    """

    def __init__(self, path: Path, facts: dict[str, Any], writes: bool = True) -> None:
        self.path, self.facts, self.writes = path, facts, writes
        self.checkpoint_path = path / CHECKPOINT
        self._log: TextIO | None = None
        self._lock: TextIO | None = None
        self._early: list[str] = []  # log lines from before the folder is this run's

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that does not suit the request (ValueError)."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"train: out={self.path} is a file; give a folder for the run")
        stored = self.path / CONFIG
        if not resume:
            if stored.exists() and not overwrite:
                raise ValueError(
                    f"train: {self.path} holds a run already; use --resume to go on with it, "
                    "--overwrite to start anew, or another --out"
                )
            return
        if not stored.is_file():
            raise ValueError(f"resume: {self.path} holds no run; leave --resume out")
        before = read_json(stored)
        if changed := changed_fields(before, self.facts):
            raise ValueError(
                f"resume: fields differ from those of the run in {self.path} (run, now): "
                f"{changed}; resume with the same fields"
            )

    def claim(self, resume: bool) -> dict[str, Any] | None:
        """Start anew, or return the checkpoint to go on from (None when there is none yet).

        Raises ValueError where another process trains in the folder.
        """
        if self.writes:
            self._keep_others_out()
        tree = None
        if resume and self.checkpoint_path.is_file():
            tree = load_checkpoint(self.checkpoint_path)
        if not self.writes:
            return tree
        for stray in self.path.rglob(".*.partial"):  # of a process that was killed while writing
            stray.unlink()
        if tree is None:
            weights = [
                f"{n}.safetensors" for n in ("cocktail", "initial", "rewind", "interpolated")
            ]
            for name in (CHECKPOINT, LOG, RESULTS, "report.html", "connectivity.json", *weights):
                (self.path / name).unlink(missing_ok=True)
            for name in ("pool", "networks", "plots", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            write_json(self.path / CONFIG, self.facts)
        self._log = open(self.path / LOG, "a")  # noqa: SIM115 - open for the whole run
        if tree is None:
            self._log.writelines(self._early)
        else:
            end = min(tree["log_bytes"], self._log.tell())
            self._log.truncate(end)  # later lines are written again
        return tree

    def _keep_others_out(self) -> None:
        """Lock the folder until the run or the process ends; children do not hold the lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "w")  # noqa: SIM115 - open for the whole run
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # which of them depends on the system
            raise ValueError(
                f"train: another process is training in {self.path}; wait until it has ended, or "
                "give another --out"
            ) from error
        except OSError:  # a file system without locks
            return

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        text = json.dumps(line) + "\n"
        if self._log is None:
            self._early.append(text)
        else:
            self._log.write(text)
            self._log.flush()

    def save_checkpoint(self, tree: dict[str, Any]) -> None:
        """Replace the checkpoint, atomically; it remembers how long the log is."""
        if self._log is not None:
            os.fsync(self._log.fileno())
            save_checkpoint(self.checkpoint_path, {**tree, "log_bytes": self._log.tell()})

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json and close the log."""
        if self._log is not None:
            write_json(self.path / RESULTS, results)
            self._log.close()
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
