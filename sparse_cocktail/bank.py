"""MaskBank: the masks of all subnets of a list of weights, one flat int32 row per subnet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .reference import bits_shape

__all__ = ["MaskBank"]


class MaskBank:
    """Rows of packed masks over one list of weights.

    Every row is one flat int32 tensor; `views(row)` are its per-weight bits (out, taps, words),
    which share its memory. Rows never move: adding one leaves the others at their address.

    Args:
        weights: tensors (out, in, *taps) of one dtype and device. They are held, not copied: a
            selection ranks the values they have at that moment.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self.shapes = [bits_shape(w.shape) for w in self.weights]
        self._sizes = [out * taps * words for out, taps, words in self.shapes]
        self._rows: list[Tensor] = []
        self._views: list[list[Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def numel(self) -> int:
        """Number of weights that one row masks."""
        return sum(w.numel() for w in self.weights)

    def add(self, bits: Sequence[Tensor] | None = None) -> int:
        """Append a row (all pruned, or with the given bits) and return its number."""
        device = self.weights[0].device if self.weights else None
        flat = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self._follow_weights()
        self._rows.append(flat)
        self._views.append(self._split(flat))
        row = len(self._rows) - 1
        if bits is not None:
            self.set_(row, bits)
        return row

    def flat(self, row: int) -> Tensor:
        """The row as one flat int32 tensor, on the device of the weights."""
        self._follow_weights()
        return self._rows[row]

    def views(self, row: int) -> list[Tensor]:
        """The row's bits per weight; they share its memory."""
        self._follow_weights()
        return self._views[row]

    def _follow_weights(self) -> None:
        """Move the rows when the weights have moved to another device."""
        if self.weights and self._rows and self._rows[0].device != self.weights[0].device:
            self._rows = [flat.to(self.weights[0].device) for flat in self._rows]
            self._views = [self._split(flat) for flat in self._rows]

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes)
        return [p.view(s) for p, s in zip(parts, self.shapes, strict=True)]

    def set_(self, row: int, bits: Sequence[Tensor]) -> None:
        """Overwrite a row in place with bits, one tensor per weight."""
        if [tuple(b.shape) for b in bits] != self.shapes:
            raise ValueError(
                f"MaskBank: bits have shapes {[tuple(b.shape) for b in bits]}, but the weights "
                f"have mask bits of shapes {self.shapes}; make them with ops.pack_mask(mask)"
            )
        torch._foreach_copy_(self.views(row), list(bits))

    def topk_(self, row: int, keep: int | Tensor, within: int | None = None) -> None:
        """Keep the `keep` largest |w| over all weights together; `within` = a row of candidates."""
        candidates = None if within is None else self.views(within)
        self.set_(row, ops.topk_masks(self._values(), int(keep), candidates))

    def nm_(self, row: int, n: int, m: int) -> None:
        """Keep n of every m along `in`; a weight with in % m != 0 is an error."""
        self.set_(row, [ops.nm_mask(w, n, m) for w in self._values()])

    def unified_(
        self,
        rows: tuple[int, int | None, int],
        keep: int,
        nm: tuple[int, int] | None,
        channel_keep: Sequence[int],
        beta: float = 0.8,
        within: int | None = None,
        nm_from: int | None = None,
    ) -> None:
        """Unified mask generation into the (unstructured, N:M, channel) rows.

        A row None is not written. `within` = row of candidates for the unstructured mask,
        `nm_from` = row that holds the N:M mask when `nm` is None.
        """
        masks = ops.unified_masks(
            self._values(),
            keep,
            nm,
            channel_keep,
            beta,
            None if within is None else self.views(within),
            None if nm_from is None else self.views(nm_from),
        )
        for row, bits in zip(rows, masks, strict=True):
            if row is not None:
                self.set_(row, bits)

    def count(self, row: int) -> int:
        """Number of weights the row keeps."""
        return int(ops.mask_count(self.flat(row)))

    def digest(self, row: int) -> str:
        """SHA-256 of the row, for comparing masks between processes."""
        return hashlib.sha256(self.flat(row).cpu().numpy().tobytes()).hexdigest()

    def _values(self) -> list[Tensor]:
        return [w.detach() for w in self.weights]
