"""The measured tables that choose between ways to compute masked layers."""

import json

import pytest
import torch

from sparse_cocktail import ops
from sparse_cocktail.ops import routes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "FOLDER", tmp_path)
    for cached in (routes.table, routes._sparse_pays):
        cached.cache_clear()
    yield tmp_path
    for cached in (routes.table, routes._sparse_pays):
        cached.cache_clear()


def write(folder, card, content):
    (folder / f"{card.replace(' ', '-')}.json").write_text(json.dumps({"card": card, **content}))


def test_bucket_tells_sizes_apart_by_powers_of_four():
    weight = torch.empty(64, 64, device="meta")
    keys = [routes.bucket("linear", torch.bfloat16, n, weight) for n in (1, 2, 4, 7, 8, 31, 32)]
    powers = [int(key.partition("rows-4^")[2].partition("/")[0]) for key in keys]
    assert powers == [0, 1, 1, 1, 2, 2, 3]
    assert keys[0] == "linear/bfloat16/rows-4^0/weights-4^6"
    assert routes.bucket("linear", torch.bfloat16, 0, weight.shape) == keys[0]
    for taps, name in (((1, 1), "conv2d-1x1_input_grad"), ((3, 1), "conv2d_input_grad")):
        shape = torch.Size((64, 64, *taps))
        key = routes.bucket("conv2d_input_grad", torch.float32, 1, shape)
        assert key.partition("/")[0] == name


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
    with pytest.raises(ValueError, match="Card-2.json has format 7, but .* reads 1; remove it"):
        routes.table("Card 2")


def test_shipped_tables_are_sound():
    for card in routes.cards():
        for bucket, row in routes.table(card).items():
            sparse = bucket.startswith("sparse_")
            assert row["route"] in (routes.SPARSE_ROUTES if sparse else ops.ROUTES), bucket
            assert row["ratio"] >= 1 and bucket.count("/") == 3 + sparse, bucket


def test_a_route_can_be_forced():
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    with ops.route("fused"):
        assert routes.chosen_route("linear", x, weight, 4) == "fused"
        with ops.route("layer"):
            assert routes.chosen_route("linear", x, weight, 4) == "layer"
        assert routes.chosen_route("linear", x, weight, 4) == "fused"
    with ops.route("fused"), ops.route("dense"), ops.route("sparse"):  # of the other pair
        assert routes.chosen_route("linear", x, weight, 4) == "fused"
        assert routes.chosen_sparse("sparse_linear", 4, weight, 0.9)
        with ops.route("dense"):
            assert not routes.chosen_sparse("sparse_linear", 4, weight, 0.1)
    message = "name='best' is unknown; use one of fused, layer, sparse, dense"
    with pytest.raises(ValueError, match=message):
        ops.route("best").__enter__()


def called(op, *args):
    """Which of the two a routed op takes."""
    routed = routes.routed(op, lambda *_: "fused", lambda *_: "layer")
    return routed(*args)


def test_the_fused_kernels_get_what_they_take(folder):
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    bits = ops.pack_mask(weight > 0)
    with ops.route("fused"):
        assert called("linear", x, weight, bits, None, None, False) == "fused"
        assert called("linear", x, weight, bits, None, ops.live_rows(bits), False) == "layer"
        assert called("linear", x.double(), weight, bits, None, None, False) == "layer"
        assert called("linear_weight_grad", x, x, weight, bits, None, True) == "fused"
    assert called("linear", x, weight, bits, None, None, False) == "layer"
    assert routes.routed("linear", None, lambda: None) is None, "no Triton"


def test_a_cpu_takes_the_nearest_measurement(folder):
    """By rows first, then by weights; of its own op and dtype."""

    def row(route):
        return {"route": route, "ratio": 1.5}

    buckets = {
        "linear/float32/rows-4^0/weights-4^6": row("fused"),
        "linear/float32/rows-4^3/weights-4^6": row("fused"),
        "linear/float32/rows-4^3/weights-4^9": row("layer"),
        "linear/float32/rows-4^5/weights-4^6": row("layer"),
    }
    write(folder, routes.cpu_card(), {"format": 1, "buckets": buckets})
    small, large = torch.empty(64, 64, device="meta"), torch.empty(512, 512, device="meta")

    def chosen(rows, weight, op="linear", dtype=torch.float32):
        x = torch.empty(rows, weight.shape[1], dtype=dtype)
        assert routes.chosen_route(op, x, weight, rows) == "layer", "kernels of a GPU"
        return routes.chosen_route(op, x, weight, rows, "cpu")

    assert chosen(1, small) == chosen(1, large) == "fused"
    assert chosen(40, small) == "fused" and chosen(40, large) == "layer"
    assert chosen(1000, small) == chosen(100_000, large) == "layer"
    assert chosen(1, small, "linear_input_grad") == "layer"
    assert chosen(1, small, dtype=torch.bfloat16) == "layer"


# ---- packed weights on the CPU -------------------------------------------------------------------


def sparse_key(rows=8, density=0.13):
    return routes.sparse_bucket("sparse_linear", rows, torch.Size((64, 64)), density)


def test_sparse_buckets_tell_densities_apart_by_powers_of_two():
    assert sparse_key() == "sparse_linear/float32/rows-4^2/weights-4^6/density-2^-3"
    densities = (1.0, 0.75, 0.5, 0.25, 0.13, 0.05, 2.0**-20, 0.0)
    powers = [int(sparse_key(density=d).rpartition("^-")[2]) for d in densities]
    assert powers == [0, 0, 1, 2, 3, 4, 8, 8]


@pytest.fixture
def measured(folder):
    """8 and 512 rows measured at a density of 0.13: sparse pays with 8."""
    found = {sparse_key(8): [1.5], sparse_key(512): [0.5]}
    routes.save(routes.cpu_card(), {}, found, routes.SPARSE_ROUTES)


@pytest.mark.parametrize(
    ("rows", "shape", "density", "chosen"),
    [
        (8, (64, 64), 0.13, True),
        (512, (64, 64), 0.13, False),
        (1, (64, 64), 0.13, True),  # fewer rows than measured
        (70, (64, 64), 0.13, True),  # between both, the lower one is as near
        (128, (64, 64), 0.13, False),
        (10**6, (64, 64), 0.13, False),
        (8, (128, 128), 0.13, True),  # four times the weights
        (8, (512, 128), 0.13, False),  # sixteen times: nobody knows
        (8, (16, 16), 0.13, False),
        (8, (64, 64), 0.25, False),  # denser than measured
        (8, (64, 64), 0.01, True),  # sparser than measured
        (512, (64, 64), 0.0, False),
    ],
)
def test_the_nearest_measurement_decides(measured, rows, shape, density, chosen):
    weight = torch.empty(shape, device="meta")
    assert routes.chosen_sparse("sparse_linear", rows, weight, density) == chosen
    assert not routes.chosen_sparse("sparse_conv2d", rows, weight, density)


def test_without_a_table_layers_are_dense(folder):
    assert not routes.chosen_sparse("sparse_linear", 8, torch.empty(64, 64), 0.1)


# ---- saving --------------------------------------------------------------------------------------


def test_saved_tables_keep_what_was_not_measured_now(folder):
    path = routes.save("Card 1", {"threads": 2}, {"a": [2.0], "b": [4.0, 0.5]}, routes.ROUTES)
    assert path == folder / "Card-1.json" and routes.cards() == ["Card 1"]
    assert routes.table("Card 1")["b"] == {"route": "fused", "ratio": 1.414, "measurements": 2}
    routes.save("Card 1", {"threads": 4}, {"b": [0.5], "c": [1.0]}, routes.SPARSE_ROUTES)
    rows = routes.table("Card 1")
    assert {key: row["route"] for key, row in rows.items()} == {
        "a": "fused",
        "b": "dense",
        "c": "sparse",
    }
    assert rows["b"]["ratio"] == 2.0
    content = json.loads(path.read_text())
    assert (content["format"], content["environment"]) == (1, {"threads": 4})
    assert list(folder.iterdir()) == [path]


def test_a_saved_choice_is_taken_at_once(measured):
    weight = torch.empty(64, 64)
    assert routes.chosen_sparse("sparse_linear", 8, weight, 0.13)
    routes.save(routes.cpu_card(), {}, {sparse_key(8): [0.9]}, routes.SPARSE_ROUTES)
    assert not routes.chosen_sparse("sparse_linear", 8, weight, 0.13)
