"""One network of a cocktail's menu: its pattern, and what is known of its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .patterns import Pattern

__all__ = ["Subnet"]


@dataclass
class Subnet:
    """One network of the menu.

    `row` is its row in the mask bank (None = dense), `statistics` its BatchNorm statistics and
    `affine` its scales and shifts (None = it uses whatever the model holds), `stage` the pruning
    round that made it, `accuracy` in percent, `live` the channels per layer that are not wholly
    pruned, `rows` the same as indices.
    """

    name: str
    pattern: Pattern
    row: int | None = None
    stage: int | None = None
    accuracy: float | None = None
    statistics: list[Tensor] | None = field(default=None, repr=False)
    affine: list[Tensor] | None = field(default=None, repr=False)
    live: list[Tensor] | None = field(default=None, repr=False)
    rows: list[Tensor] | None = field(default=None, repr=False)

    def look_at(self, masks: Sequence[Tensor]) -> None:
        """Note which channels new masks leave; the accuracy was that of others.

        Waits for the device once, not per layer: some methods change masks at every step.
        """
        sizes = [len(bits) for bits in masks]
        live = torch.cat([bits.flatten(1).any(1) for bits in masks])
        on_host, found, start = live.cpu().numpy(), [], 0
        for size in sizes:
            found.append(np.flatnonzero(on_host[start : start + size]))
            start += size
        rows = torch.from_numpy(np.concatenate(found)).to(live.device, non_blocking=True)
        self.live = list(live.split(sizes))
        self.rows = list(rows.split([len(some) for some in found]))
        self.accuracy = None
