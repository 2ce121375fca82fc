"""The measured tables that choose between the kernels of masked layers."""

import json

import pytest
import torch

from sparse_cocktail import ops
from sparse_cocktail.ops import routes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "FOLDER", tmp_path)
    routes.table.cache_clear()
    yield tmp_path
    routes.table.cache_clear()


def write(folder, card, content):
    (folder / f"{card.replace(' ', '-')}.json").write_text(json.dumps({"card": card, **content}))


def test_bucket_tells_sizes_apart_by_powers_of_four():
    weight = torch.empty(64, 64, device="meta")
    keys = [routes.bucket("linear", torch.bfloat16, n, weight) for n in (1, 2, 4, 7, 8, 31, 32)]
    powers = [int(key.partition("rows-4^")[2].partition("/")[0]) for key in keys]
    assert powers == [0, 1, 1, 1, 2, 2, 3]
    assert keys[0] == "linear/bfloat16/rows-4^0/weights-4^6"
    assert routes.bucket("linear", torch.bfloat16, 0, weight.shape) == keys[0]


def test_what_nobody_measured_goes_by_layer(folder):
    assert routes.table("some card") == {} and routes.cards() == []
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    assert routes.chosen_route("linear", x, weight, 4) == "layer"


def test_a_table_is_read(folder):
    row = {"route": "fused", "ratio": 1.25}
    write(folder, "Card 1", {"format": 1, "buckets": {"linear/float32/rows-4^1/weights-4^3": row}})
    assert routes.table("Card 1") == {"linear/float32/rows-4^1/weights-4^3": row}
    assert routes.cards() == ["Card 1"]
    write(folder, "Card 2", {"format": 7, "buckets": {}})
    with pytest.raises(ValueError, match="Card-2.json has format 7, but .* reads 1; measure again"):
        routes.table("Card 2")


def test_shipped_tables_are_sound():
    for card in routes.cards():
        for bucket, row in routes.table(card).items():
            assert row["route"] in ops.ROUTES and row["ratio"] >= 1, bucket
            assert bucket.count("/") == 3


def test_a_route_can_be_forced():
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    with ops.route("fused"):
        assert routes.chosen_route("linear", x, weight, 4) == "fused"
        with ops.route("layer"):
            assert routes.chosen_route("linear", x, weight, 4) == "layer"
        assert routes.chosen_route("linear", x, weight, 4) == "fused"
    with pytest.raises(ValueError, match="ops.route: name='best' is unknown; use one of fused"):
        ops.route("best").__enter__()


def called(op, *args):
    """Which of the two a routed op takes."""
    routed = routes.routed(op, lambda *_: "fused", lambda *_: "layer")
    return routed(*args)


def test_the_fused_kernels_get_what_they_take():
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    bits = ops.pack_mask(weight > 0)
    with ops.route("fused"):
        assert called("linear", x, weight, bits, None, None, False) == "fused"
        assert called("linear", x, weight, bits, None, ops.live_rows(bits), False) == "layer"
        assert called("linear", x.double(), weight, bits, None, None, False) == "layer"
        assert called("linear_weight_grad", x, x, weight, bits, None, True) == "fused"
    assert called("linear", x, weight, bits, None, None, False) == "layer"
    assert routes.routed("linear", None, lambda: None) is None, "no Triton"
