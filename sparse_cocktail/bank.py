"""MaskBank: the masks of all subnets of a list of weights, one flat int32 row per subnet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .ops.checks import as_list, check_bits, check_same_length, check_weight, whole
from .ops.rows import row_views
from .ops.unified import as_counts, as_ratio
from .reference import bits_shape

__all__ = ["MaskBank"]

_ROWS = ([False, False, False], [False, True, False])  # which of three rows may be None


class MaskBank:
    """Rows of packed masks over one list of weights.

    Every row is one flat int32 tensor; `views(row)` are its per-weight bits (out, taps, words),
    which share its memory. Rows never move: adding one leaves the others at their address.

    Selections write rows in place. After the first they allocate no tensor, and where `keep` and
    `channel_keep` are tensors on the device of the weights they do not wait for it either: a CUDA
    graph can capture them, and replays rank the values that the weights hold then.

    Args:
        weights: tensors (out, in, *taps) of one dtype and device. They are held, not copied: a
            selection ranks the values they have at that moment.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = as_list("MaskBank", "weights", weights)
        for i, weight in enumerate(self.weights):
            check_weight("MaskBank", weight, f"weights[{i}]")
        self.shapes = [bits_shape(w.shape) for w in self.weights]
        self._sizes = [out * taps * words for out, taps, words in self.shapes]
        self._rows: list[Tensor] = []
        self._views: list[list[Tensor]] = []
        self._scratches: dict[tuple, Tensor] = {}  # by what they suit

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
        self._views.append(row_views(flat, self.weights))
        row = len(self._rows) - 1
        if bits is not None:
            self.set_(row, bits)
        return row

    def flat(self, row: int) -> Tensor:
        """The row as one flat int32 tensor, on the device of the weights."""
        self._follow_weights()
        return self._rows[self._place(row)]

    def views(self, row: int) -> list[Tensor]:
        """The row's bits per weight; they share its memory."""
        self._follow_weights()
        return self._views[self._place(row)]

    def _place(self, row: int) -> int:
        row = whole("MaskBank", "row", row, "give the number that add() returned")
        if not -len(self) <= row < len(self):
            raise ValueError(
                f"MaskBank: row={row} is not there, the bank has {len(self)} rows; give the number "
                "that add() returned"
            )
        return row

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor of a row's size as bits per weight, which share its memory."""
        return row_views(flat, self.weights)

    def _follow_weights(self) -> None:
        """Move the rows when the weights have moved to another device."""
        if self.weights and self._rows and self._rows[0].device != self.weights[0].device:
            self._rows = [flat.to(self.weights[0].device) for flat in self._rows]
            self._views = [row_views(flat, self.weights) for flat in self._rows]

    def set_(self, row: int, bits: Sequence[Tensor]) -> None:
        """Overwrite a row in place with bits, one tensor per weight."""
        if bits := self.checked(bits):
            torch._foreach_copy_(self.views(row), bits)

    def checked(self, bits: Sequence[Tensor]) -> list[Tensor]:
        """Bits as a list; an error where they are not of these weights."""
        bits = as_list("MaskBank", "bits", bits, "give one tensor per weight")
        check_same_length("MaskBank", self.weights, bits, "bits")
        for i, (words, shape) in enumerate(zip(bits, self.shapes, strict=True)):
            check_bits("MaskBank", words, shape, f"bits[{i}]")
        return bits

    # ---- selections ------------------------------------------------------------------------------

    def topk_(self, row: int, keep: int | Tensor, within: int | None = None) -> None:
        """Keep the `keep` largest |w| over all weights together.

        Args:
            row: the row that is written; it may be `within` itself.
            keep: a count, or an int64 tensor () on the device, which is clamped to [0, numel].
            within: a row of candidates; where fewer are eligible, all of them are kept.
        """
        if self.weights:
            candidates = None if within is None else self.flat(within)
            keep = self._count("topk_", keep)
            ops.topk_row_(self._values(), keep, candidates, self.flat(row), self._memory())

    def nm_(self, row: int, n: int, m: int) -> None:
        """Keep n of every m along `in`; a weight with in % m != 0 is an error."""
        if self.weights:
            ops.nm_row_(self._values(), n, m, self.flat(row), self._memory())

    def unified_(
        self,
        rows: tuple[int, int | None, int],
        keep: int | Tensor,
        nm: tuple[int, int] | None,
        channel_keep: Sequence[int] | Tensor,
        beta: float = 0.8,
        within: int | None = None,
        nm_from: int | None = None,
    ) -> None:
        """Unified mask generation into the (unstructured, N:M, channel) rows.

        Args:
            rows: the rows that are written; the N:M one may be None if `nm` is None. Only `within`
                may be the unstructured row, and `nm_from` the N:M row; the others must differ.
            keep: weights that the unstructured mask keeps, as in `topk_`.
            nm: (n, m) for fresh N:M masks, where in % m == 0 (other layers keep everything).
            channel_keep: channels to keep per weight; ints, or int64 (weights,) on the device.
            beta: share of the unstructured mask in the channel score.
            within: row of candidates for the unstructured mask.
            nm_from: row that holds the N:M mask when `nm` is None; without it nothing is pruned.
        """
        if not self.weights:
            return
        if not isinstance(channel_keep, Tensor):
            channel_keep = as_counts("MaskBank.unified_", "channel_keep", channel_keep)
            check_same_length("MaskBank.unified_", self.weights, channel_keep, "channel_keep")
            for i, (count, weight) in enumerate(zip(channel_keep, self.weights, strict=True)):
                if not 0 <= count <= weight.shape[0]:
                    raise ValueError(
                        f"MaskBank.unified_: channel_keep[{i}]={count} is not in [0, "
                        f"{weight.shape[0]}], the number of output channels; give a count"
                    )
            channel_keep = torch.tensor(channel_keep, device=self.weights[0].device)
        if not isinstance(rows, (tuple, list)) or [r is None for r in rows] not in _ROWS:
            raise ValueError(
                f"MaskBank.unified_: rows={rows!r} is not (unstructured, N:M, channel); give the "
                "numbers of three rows, of which N:M alone may be None"
            )
        u, n, c = (None if row is None else self.flat(row) for row in rows)
        ops.unified_rows_(
            self._values(),
            self._count("unified_", keep),
            as_ratio("MaskBank.unified_", nm),
            channel_keep,
            beta,
            None if within is None else self.flat(within),
            None if nm_from is None else self.flat(nm_from),
            u,
            n,
            c,
            self._memory(),
        )

    def _count(self, name: str, keep: int | Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            return keep
        keep = whole(f"MaskBank.{name}", "keep", keep)
        if not 0 <= keep <= self.numel:
            raise ValueError(
                f"MaskBank.{name}: keep={keep} is not in [0, {self.numel}], the number of weights; "
                "give a count, for example round(density * bank.numel)"
            )
        return torch.tensor(keep, device=self.weights[0].device)

    def _memory(self) -> Tensor:
        """Scratch memory that suits the weights where they are now.

        Memory for another backend or number of threads is kept: a captured graph may hold it.
        """
        backend = ops.chosen("topk_row_", self.weights[0].device)
        threads = torch.get_num_threads() if backend == "cpp" else 0
        places = tuple((w.data_ptr(), w.dtype, w.stride()) for w in self.weights)
        key = (places, backend, threads)
        if key not in self._scratches:
            self._scratches = {k: held for k, held in self._scratches.items() if k[0] == places}
            self._scratches[key] = ops.workspace(self._values())
        return self._scratches[key]

    # ---- facts -----------------------------------------------------------------------------------

    def count(self, row: int) -> int:
        """Number of weights the row keeps."""
        return int(ops.mask_count(self.flat(row)))

    def digest(self, row: int) -> str:
        """SHA-256 of the row, for comparing masks between processes."""
        return hashlib.sha256(self.flat(row).cpu().numpy().tobytes()).hexdigest()

    def _values(self) -> list[Tensor]:
        return [w.detach() for w in self.weights]
