"""What is learned: loss, distillation and metric. The training loop knows nothing else about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Classification", "Task"]


class Task(Protocol):
    """A task is any object with these three functions."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean training loss of a batch, a scalar."""

    def distill(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss against a teacher's detached output, a scalar."""

    def metric(self, output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """(sum of the per-sample scores in [0, 1], number of samples) of a batch."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy, soft cross-entropy at temperature 1 to the teacher, top-1 accuracy."""

    label_smoothing: float = 0.0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    def distill(self, output: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(output, torch.softmax(teacher, dim=1))

    def metric(self, output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return (output.argmax(1) == target).sum(), len(target)
