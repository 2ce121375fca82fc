"""Patterns and their names; schedules as functions of progress."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_cocktail import schedules
from sparse_cocktail.patterns import NM, Block, Channel, Dense, Pattern, Unstructured, parse

# ---- names ---------------------------------------------------------------------------------------

NAMES = {
    "dense": Dense(),
    "unstructured-0.8926": Unstructured(0.8926),
    "unstructured-0.0000": Unstructured(0.0),
    "channel-0.6513": Channel(0.6513),
    "2:4": NM(2, 4),
    "1:32": NM(1, 32),
    "31:32": NM(31, 32),
    "block-16x16-0.9000": Block(16, 16, 0.9),
    "block--1x4-0.5000": Block(-1, 4, 0.5),
    "block-1x-1-0.5000": Block(1, -1, 0.5),
}


@pytest.mark.parametrize(("name", "pattern"), NAMES.items(), ids=NAMES)
def test_name_and_pattern_are_inverse(name, pattern):
    assert str(pattern) == name
    assert parse(name) == pattern
    assert parse(pattern) is pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured-0.9", Unstructured(0.9)),
        ("channel-.5", Channel(0.5)),
        ("unstructured-0", Unstructured(0.0)),
        ("block-4x8-0.75", Block(4, 8, 0.75)),
    ],
)
def test_short_names_are_read(text, pattern):
    assert parse(text) == pattern


SPARSITIES = st.floats(0.0, 1.0, exclude_max=True)


@given(sparsity=SPARSITIES, rows=st.sampled_from([-1, 1, 16]), n=st.integers(1, 31), data=st.data())
def test_every_pattern_has_a_name_that_parses(sparsity, rows, n, data):
    nm = NM(n, data.draw(st.integers(n + 1, 32)))
    for pattern in (Unstructured(sparsity), Channel(sparsity), Block(rows, 4, sparsity), nm):
        again = parse(str(pattern))
        assert str(again) == str(pattern)
        assert again.sparsity == pytest.approx(pattern.sparsity, abs=1e-4)


@pytest.mark.parametrize("sparsity", [1 - 1e-6, 0.99996, -0.0], ids=str)
def test_names_at_the_ends_of_the_range_parse(sparsity):
    pattern = Unstructured(sparsity)
    assert str(parse(str(pattern))) == str(pattern)


@pytest.mark.parametrize(
    "text",
    ["", "Dense", "dense ", "unstructured", "unstructured-", "unstructured--0.5", "nm-2-4", "2:4:8"]
    + ["2:", "block-4-0.5", "block-4x4", "0.5", "unstructured-0.5x", "unstructured-nan"],
)
def test_unknown_names_are_refused(text):
    with pytest.raises(ValueError, match="parse: pattern .* is unknown; use dense, unstructured-S"):
        parse(text)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4), (0, 4), (-1, 4), (1, 33), (1, 1)])
def test_nm_out_of_range(n, m):
    with pytest.raises(ValueError, match=rf"NM: n={n}, m={m} breaks 1 <= n < m <= 32"):
        NM(n, m)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    "make", [Unstructured, Channel, lambda s: Block(4, 4, s)], ids=["u", "channel", "block"]
)
def test_sparsity_out_of_range(make, sparsity):
    with pytest.raises(ValueError, match=rf"sparsity={sparsity!r} is not in \[0, 1\)"):
        make(sparsity)


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (-2, 4), (4, -2)])
def test_block_size_out_of_range(rows, cols):
    with pytest.raises(ValueError, match=f"Block: size {rows}x{cols} is not positive; use -1"):
        Block(rows, cols, 0.5)


@pytest.mark.parametrize("name", ["4:4", "unstructured-1.0", "block-0x4-0.5"])
def test_parse_checks_the_numbers(name):
    with pytest.raises(ValueError, match="breaks|not in|not positive"):
        parse(name)


@pytest.mark.parametrize(
    ("pattern", "kind", "sparsity"),
    [
        (Dense(), "dense", 0.0),
        (Unstructured(0.9), "unstructured", 0.9),
        (Channel(0.25), "channel", 0.25),
        (NM(2, 4), "2:4", 0.5),
        (NM(1, 4), "1:4", 0.75),
        (Block(4, 4, 0.5), "block", 0.5),
    ],
    ids=str,
)
def test_kind_and_density(pattern, kind, sparsity):
    assert isinstance(pattern, Pattern)
    assert pattern.kind == kind
    assert pattern.sparsity == sparsity
    assert pattern.density == pytest.approx(1 - sparsity)


def test_patterns_are_frozen_values():
    assert len({NM(2, 4), parse("2:4"), NM(1, 4)}) == 2
    with pytest.raises(AttributeError):
        NM(2, 4).n = 1


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 2.0), (0.5, 1.25), (1.0, 0.5), (-1.0, 2.0), (7.0, 0.5)]
)
def test_cosine(progress, expected):
    assert schedules.cosine(2.0, 0.5, progress) == pytest.approx(expected, abs=1e-15)


CYCLE = {"first": 90, "cycle": 20, "lr": 1.0, "restart_lr": 0.3, "min_lr": 0.1}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1.0), (45, 0.55), (90, 0.3), (100, 0.2), (110, 0.3), (120, 0.2), (130, 0.3)],
)
def test_cyclic_cosine_restarts(step, expected):
    assert schedules.cyclic_cosine(step, **CYCLE) == pytest.approx(expected)


def test_cyclic_cosine_falls_within_a_cycle():
    rates = [schedules.cyclic_cosine(step, **CYCLE) for step in range(160)]
    rises = [i for i in range(1, len(rates)) if rates[i] > rates[i - 1]]
    assert rises == [90, 110, 130, 150]
    assert rates[89] == pytest.approx(0.1, abs=3e-4)
    assert rates[109] == pytest.approx(0.1, abs=3e-3)
    assert min(rates) >= 0.1


def test_cyclic_cosine_without_cycles_or_first_part():
    assert schedules.cyclic_cosine(500, 100, 0, 1.0, 0.3, 0.1) == pytest.approx(0.1)
    assert schedules.cyclic_cosine(0, 0, 20, 1.0, 0.3, 0.1) == pytest.approx(0.3)
    assert schedules.cyclic_cosine(0, 0, 0, 1.0, 0.3, 0.1) == pytest.approx(1.0)


def test_geometric_density_is_exactly_a_power():
    assert [schedules.geometric_density(0.2, k) for k in range(12)] == [0.8**k for k in range(12)]
    assert 1 - schedules.geometric_density(0.2, 10) == pytest.approx(0.8926, abs=1e-4)
    assert schedules.geometric_density(0.0, 5) == 1.0


@pytest.mark.parametrize(
    ("density", "total", "expected"),
    [
        (1.0, 64, 64),
        (0.0, 64, 1),  # at least one
        (0.5, 1, 1),
        (0.5, 5, 3),  # 2.5: half goes up ...
        (0.5, 3, 2),  # ... from 1.5 too
        (0.49, 5, 2),
        (0.25, 10, 3),
        (0.9**10, 64, 22),  # 22.3
        (0.8**10, 23454912, 2518452),  # 2518451.99926
    ],
)
def test_keep_count_rounds_half_up(density, total, expected):
    assert schedules.keep_count(density, total) == expected
    assert isinstance(schedules.keep_count(density, total), int)


@pytest.mark.parametrize(
    ("length", "expected"), [(3, 30), (0, 0), (0.5, 50), (1.0, 100), (1, 10), (0.333, 33)]
)
def test_length_counts_epochs_or_a_share(length, expected):
    assert schedules.length_in_steps(length, epochs=10, steps_per_epoch=10) == expected
