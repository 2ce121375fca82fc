"""Sparsity patterns as frozen value objects, and their names.

A pattern says *which shape* of sparsity a subnet has and how much of it. `str(pattern)` is the name
of the subnet (`dense`, `unstructured-0.8926`, `channel-0.6513`, `2:4`, `block-16x16-0.9000`), and
`parse` reads such a name back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex

__all__ = ["Block", "Channel", "Dense", "NM", "Pattern", "Unstructured", "family", "parse"]


def _check_sparsity(kind: str, sparsity: float) -> None:
    if not isinstance(sparsity, SupportsFloat):
        raise TypeError(
            f"{kind}: sparsity={sparsity!r} is not a number; give the share of zero weights"
        )
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"{kind}: sparsity={sparsity!r} is not in [0, 1); give the share of zero weights"
        )


def _in_name(sparsity: float) -> str:
    """Four decimals; never 1.0000, which would not be a sparsity."""
    return f"{min(abs(sparsity), 0.9999):.4f}"


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns. `sparsity` is the nominal share of zeros, `density` = 1 - sparsity."""

    @property
    def kind(self) -> str:
        """Family that results are grouped by: dense, unstructured, channel, n:m or block."""
        raise TypeError(f"{type(self).__name__} is abstract; use one of {__all__}")

    @property
    def density(self) -> float:
        return 1.0 - self.sparsity  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Dense(Pattern):
    """No mask at all."""

    kind = "dense"
    sparsity = 0.0

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights, ranked globally over all masked layers."""

    sparsity: float
    kind = "unstructured"

    def __post_init__(self) -> None:
        _check_sparsity("Unstructured", self.sparsity)

    def __str__(self) -> str:
        return f"unstructured-{_in_name(self.sparsity)}"


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output channels, the same share in every masked layer."""

    sparsity: float
    kind = "channel"

    def __post_init__(self) -> None:
        _check_sparsity("Channel", self.sparsity)

    def __str__(self) -> str:
        return f"channel-{_in_name(self.sparsity)}"


@dataclass(frozen=True)
class NM(Pattern):
    """n kept of every m consecutive weights along the reduction (input) dimension."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not all(isinstance(count, SupportsIndex) for count in (self.n, self.m)):
            raise TypeError(
                f"NM: n={self.n!r}, m={self.m!r} are not integers; for example NM(2, 4)"
            )
        if not 1 <= self.n < self.m <= 32:
            raise ValueError(
                f"NM: n={self.n}, m={self.m} breaks 1 <= n < m <= 32; for example 2:4 keeps 2 of 4"
            )

    @property
    def kind(self) -> str:
        return str(self)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Pattern):
    """Tiles of rows x cols of the (out, in) plane at every kernel tap; -1 = the whole dimension."""

    rows: int
    cols: int
    sparsity: float
    kind = "block"

    def __post_init__(self) -> None:
        _check_sparsity("Block", self.sparsity)
        if not all(isinstance(size, SupportsIndex) for size in (self.rows, self.cols)):
            raise TypeError(
                f"Block: rows={self.rows!r}, cols={self.cols!r} are not integers; for example "
                "Block(16, 16, 0.9)"
            )
        if any(size < 1 and size != -1 for size in (self.rows, self.cols)):
            raise ValueError(
                f"Block: size {self.rows}x{self.cols} is not positive; use -1 for a whole dimension"
            )

    def __str__(self) -> str:
        return f"block-{self.rows}x{self.cols}-{_in_name(self.sparsity)}"


_NUMBER = r"(\d*\.?\d+)"
_GRAMMAR = (
    (re.compile(r"dense"), lambda: Dense()),
    (re.compile(rf"unstructured-{_NUMBER}"), lambda s: Unstructured(float(s))),
    (re.compile(rf"channel-{_NUMBER}"), lambda s: Channel(float(s))),
    (re.compile(r"(\d+):(\d+)"), lambda n, m: NM(int(n), int(m))),
    (
        re.compile(rf"block-(-?\d+)x(-?\d+)-{_NUMBER}"),
        lambda r, c, s: Block(int(r), int(c), float(s)),
    ),
)


def parse(text: str | Pattern) -> Pattern:
    """Read a pattern from its name, such as "2:4" or "unstructured-0.9".

    Raises ValueError for a name of no known pattern or with numbers out of range.
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise TypeError(
            f"parse: pattern is a {type(text).__name__}, but it is a name such as '2:4', or a "
            "pattern such as NM(2, 4); write one of them"
        )
    for regex, make in _GRAMMAR:
        if found := regex.fullmatch(text):
            return make(*found.groups())
    raise ValueError(
        f"parse: pattern {text!r} is unknown; use dense, unstructured-S, channel-S, N:M or "
        "block-RxC-S, where S is the sparsity in [0, 1), as in unstructured-0.9 or 2:4"
    )


def family(pattern: str) -> str:
    """What a subnet is compared with, by its `pattern` in results: "2:4" and the like are "n:m"."""
    return "n:m" if ":" in pattern else pattern
