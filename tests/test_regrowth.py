"""Prune and regrow: which weights leave and which come, in exact numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cocktail import ops
from sparse_cocktail.regrowth import prune_and_regrow, random_masks

SHAPES = [(7, 33), (5, 3, 3, 3), (1, 1), (8, 16, 1, 1)]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(density: float = 0.4) -> list[torch.Tensor]:
    counts = [max(1, round(density * w.numel())) for w in tensors(0)]
    return random_masks(tensors(0), counts, generator(9))


def bools(bits: list[torch.Tensor]) -> list[torch.Tensor]:
    return [ops.unpack_mask(b, shape) for b, shape in zip(bits, SHAPES, strict=True)]


def by_sorting(weight, mask, grow: int, gradient):
    """The definition, on one layer with distinct values."""
    stay = sorted(mask.flatten().nonzero().flatten().tolist(), key=lambda i: -abs(weight[i]))
    stay = stay[: len(stay) - grow]
    free = sorted(set(range(len(weight))) - set(stay), key=lambda i: -abs(gradient[i]))
    new = torch.zeros(len(weight), dtype=torch.bool)
    new[torch.tensor(stay + free[:grow], dtype=torch.long)] = True
    return new.view(mask.shape)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 1.0])
def test_growth_by_gradient_is_the_definition(drop):
    weights, gradients, old = tensors(1), tensors(2), masks()
    new = bools(prune_and_regrow(weights, old, drop, gradients))
    for w, g, before, after in zip(weights, gradients, bools(old), new, strict=True):
        grow = int(drop * int(before.sum()) + 0.5)
        assert torch.equal(after, by_sorting(w.flatten(), before, grow, g.flatten()))


def test_a_dropped_weight_comes_back_if_its_gradient_ranks():
    weight = torch.tensor([[0.1, 2.0, 0.0, 0.0]])
    bits = [ops.pack_mask(torch.tensor([[True, True, False, False]]))]
    back = prune_and_regrow([weight], bits, 0.5, [torch.tensor([[9.0, 0.0, 1.0, 0.5]])])
    assert torch.equal(back[0], bits[0])
    other = prune_and_regrow([weight], bits, 0.5, [torch.tensor([[0.7, 0.0, -1.0, 0.5]])])
    assert ops.unpack_mask(other[0], weight.shape).tolist() == [[False, True, True, False]]


@given(drop=st.floats(0, 1), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_layer_keeps_its_number_of_weights(drop, density, seed):
    old = masks(density)
    for new in (
        prune_and_regrow(tensors(seed), old, drop, tensors(seed + 1)),
        prune_and_regrow(tensors(seed), old, drop, generator=generator(seed)),
    ):
        assert [int(m.sum()) for m in bools(new)] == [int(m.sum()) for m in bools(old)]


def test_numbers_are_exact_where_all_gradients_are_zero():
    """As behind a dead channel: growth must not be short, or take a weight twice."""
    old = masks()
    new = prune_and_regrow(tensors(1), old, 0.5, [torch.zeros_like(w) for w in tensors(1)])
    assert [int(m.sum()) for m in bools(new)] == [int(m.sum()) for m in bools(old)]


def test_random_growth_keeps_the_largest_and_repeats_by_seed():
    weights, old = tensors(1), masks()
    new = prune_and_regrow(weights, old, 0.5, generator=generator(4))
    again = prune_and_regrow(weights, old, 0.5, generator=generator(4))
    other = prune_and_regrow(weights, old, 0.5, generator=generator(5))
    assert all(torch.equal(a, b) for a, b in zip(new, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(new, other, strict=True))
    for w, before, after in zip(weights, bools(old), bools(new), strict=True):
        stay = int(before.sum()) - int(0.5 * int(before.sum()) + 0.5)
        largest = w.abs().masked_fill(~before, -1).flatten().topk(stay).indices
        assert after.flatten()[largest].all()


def test_random_growth_is_uniform_over_what_is_free():
    weight, mask = torch.zeros(1, 100), torch.zeros(1, 100, dtype=torch.bool)
    weight[0, :20] = torch.arange(1.0, 21.0)
    mask[0, :20] = True
    hits = torch.zeros(100)
    for seed in range(400):
        new = prune_and_regrow([weight], [ops.pack_mask(mask)], 0.5, generator=generator(seed))
        hits += ops.unpack_mask(new[0], weight.shape)[0]
    assert (hits[10:20] == 400).all()  # what stays
    drawn = hits[torch.arange(100) // 10 != 1]
    expected = 400 * 10 / 90
    assert (drawn - expected).abs().max() < 5 * expected**0.5  # the dropped ten among them


def test_random_masks_have_the_counts_asked_for():
    made = bools(random_masks(tensors(0), [10, 20, 1, 0], generator()))
    assert [int(m.sum()) for m in made] == [10, 20, 1, 0]
    assert sum(int(m.sum()) for m in bools(random_masks(tensors(0), 77, generator()))) == 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": 1.5, "gradients": []}, r"drop=1.5 is not in \[0, 1\]"),
        ({"drop": 0.5}, r"either gradients .* or a generator"),
        ({"drop": 0.5, "gradients": [], "generator": generator()}, r"either gradients"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=rf"prune_and_regrow: .*{message}"):
        prune_and_regrow(tensors(0), masks(), **arguments)
