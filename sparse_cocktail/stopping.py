"""SIGTERM and Ctrl-C: a run stops at the end of a step, with a checkpoint behind it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["Interrupted", "StopRequest"]


class Interrupted(Exception):
    """The run was asked to stop by signal `number`; its checkpoint is written."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Remembers that a signal asked the run to stop.

    Args:
        remedy: how to go on, the end of the message.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.where = "the start"
        self._number = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are requests. A second one, or one in `at_once`, stops immediately."""

        def remember(number, _) -> None:
            again, self._number = self._number != 0, number
            if again or self._at_once:
                self.obey()

        try:
            before = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: signals are the caller's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around long work that a checkpoint precedes: a signal ends it without waiting."""
        self._at_once = True
        try:
            self.obey()
            yield
        finally:
            self._at_once = False

    def asked(self, step: int, every: int, device: torch.device) -> bool:
        """Whether to stop after this step. Ranks agree on it, once every `every` steps."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._number != 0
        if step % every:
            return False
        number = torch.tensor(float(self._number), device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self._number = int(number)
        return self._number != 0

    def obey(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self._number:
            name = signal.Signals(self._number).name
            raise Interrupted(f"stopped by {name} at {self.where}; {self.remedy}", self._number)
