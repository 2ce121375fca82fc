"""How many weights each layer keeps: exact totals, uniform, global and Erdos-Renyi-Kernel."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_cocktail.allocation import layer_counts
from sparse_cocktail.schedules import keep_count

# ResNet-like: small first layers, large last ones, a 1x1 convolution and a classifier
SHAPES = [(16, 16, 3, 3), (32, 16, 3, 3), (32, 16, 1, 1), (64, 64, 3, 3), (10, 64)]
SIZES = [math.prod(shape) for shape in SHAPES]

shape_lists = st.lists(
    st.lists(st.integers(1, 24), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
)


def exact_erk(shapes, keep: int) -> list[Fraction]:
    """Real-valued counts, in fractions: layers are filled one at a time, the densest first."""
    full: list[int] = []
    while True:
        rest = [i for i in range(len(shapes)) if i not in full]
        left = keep - sum(math.prod(shapes[i]) for i in full)
        scale = Fraction(left, sum(sum(shapes[i]) for i in rest)) if rest else Fraction(0)
        density = {i: scale * sum(shapes[i]) / math.prod(shapes[i]) for i in rest}
        if all(d <= 1 for d in density.values()):
            return [
                density.get(i, Fraction(1)) * math.prod(shape) for i, shape in enumerate(shapes)
            ]
        full.append(max(density, key=density.__getitem__))


@pytest.mark.parametrize("how", ["uniform", "erk"])
@given(shapes=shape_lists, density=st.floats(0.001, 1.0))
def test_totals_are_exact_and_every_layer_keeps_something(how, shapes, density):
    sizes = [math.prod(shape) for shape in shapes]
    counts = layer_counts(shapes, density, how)
    assert sum(counts) == max(keep_count(density, sum(sizes)), len(shapes))
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


@given(shapes=shape_lists, density=st.floats(0.1, 1.0))
def test_erk_counts_are_the_formula_rounded(shapes, density):
    keep = keep_count(density, sum(map(math.prod, shapes)))
    wanted = exact_erk(shapes, max(keep, len(shapes)))
    if min(wanted) >= 1:  # else layers are raised to one weight
        counts = layer_counts(shapes, density, "erk")
        assert all(abs(c - w) < 1 for c, w in zip(counts, wanted, strict=True))


def test_global_is_one_number():
    assert layer_counts(SHAPES, 0.1, "global") == keep_count(0.1, sum(SIZES))


def test_uniform_gives_the_same_density_to_each():
    counts = layer_counts(SHAPES, 0.1, "uniform")
    assert all(abs(c - 0.1 * n) < 1 for c, n in zip(counts, SIZES, strict=True))


def test_erk_by_hand():
    """Two linear layers: (4+4)/16 = 0.5 and (4+16)/64 = 0.3125 of a common factor."""
    assert layer_counts([(4, 4), (4, 16)], 0.35, "erk") == [8, 20]


def test_erk_gives_the_excess_of_full_layers_to_the_others():
    counts = layer_counts([(4, 4), (64, 64)], 0.1, "erk")
    assert counts == [16, keep_count(0.1, 16 + 4096) - 16]


def test_erk_keeps_small_layers_denser():
    counts = layer_counts(SHAPES, 0.1, "erk")
    density = [c / n for c, n in zip(counts, SIZES, strict=True)]
    assert density[0] > density[1] > density[3]
    assert density[4] > 2 * density[3]


def test_density_one_keeps_everything():
    for how in ("uniform", "erk"):
        assert layer_counts(SHAPES, 1.0, how) == SIZES


def test_starved_layers_take_from_the_largest():
    assert layer_counts([(1, 2), (100, 100)], 0.001, "uniform") == [1, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SHAPES, 0.1, "er"), r"how='er' is not one of global, uniform, erk"),
        ((SHAPES, 0.0, "erk"), r"density=0.0 is not in \(0, 1\]"),
        ((SHAPES, 1.5, "erk"), r"density=1.5 is not in \(0, 1\]"),
        (([], 0.5, "erk"), r"shapes is empty"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=rf"layer_counts: {message}"):
        layer_counts(*arguments)
