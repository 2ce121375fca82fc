"""Augmentation whose random numbers are drawn for a whole epoch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ShiftFlip"]


@dataclass(frozen=True)
class ShiftFlip:
    """Shift images by up to `pixels` each way, and mirror them half of the time if `flip`.

    A `share` of the images is shifted; `fill` (a number, or one per channel) comes in at the
    border. `draw` takes the random numbers of a whole epoch, so that an image's do not depend on
    its batch.
    """

    pixels: int
    fill: float | tuple[float, ...] = 0.0
    share: float = 1.0
    flip: bool = False

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        offset = torch.randint(2 * self.pixels + 1, (2, count, 1), generator=generator)
        moved = torch.rand(count, 1, generator=generator) < self.share
        rows, cols = torch.where(moved, offset, self.pixels)  # `pixels` = in place
        if not self.flip:
            return rows, cols, torch.zeros(count, 1, dtype=torch.bool)
        return rows, cols, torch.rand(count, 1, generator=generator) < 0.5

    def apply(self, images: Tensor, rows: Tensor, cols: Tensor, flip: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        device, p = images.device, self.pixels
        across = torch.arange(width, device=device)
        across = torch.where(flip.to(device), width - 1 - across, across)
        down = rows.to(device) + torch.arange(height, device=device)
        across = cols.to(device) + across
        fill = torch.tensor(self.fill, dtype=images.dtype, device=device).view(1, -1, 1, 1)
        padded = fill.expand(count, channels, height + 2 * p, width + 2 * p).clone()
        padded[..., p : p + height, p : p + width] = images
        index = torch.arange(count, device=device)[:, None, None]
        taken = padded.movedim(1, 3)[index, down[:, :, None], across[:, None, :]]
        return taken.movedim(3, 1).contiguous()
