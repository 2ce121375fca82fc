"""The measured tables that choose between ways to compute layers with N:M weights."""

import json

import pytest
import torch

from sparse_cocktail.ops import implementations, nm_routes, routes

CARD = "Some Card (80GB)"
HALF = torch.bfloat16
PAIR = {"dense": 10.0, "gemm": 5.0}
CPU = torch.empty(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "FOLDER", tmp_path)
    nm_routes._read.cache_clear()
    yield tmp_path
    nm_routes._read.cache_clear()


def key(rows, out=1024, ins=1024, dtype=HALF, n=2, m=4, mode="eager"):
    return nm_routes.bucket(dtype, n, m, rows, out, ins, mode)


def choose(rows, out=1024, ins=1024, dtype=HALF, n=2, m=4, **how):
    return nm_routes.choose(CARD, dtype, n, m, rows, out, ins, **how)


def save(measured, card=CARD):
    return nm_routes.save(card, {"torch": "x"}, measured)


# ---- buckets -------------------------------------------------------------------------------------


def test_rows_go_to_the_nearest_power_of_two():
    rows = (0, 1, 2, 3, 5, 6, 11, 12, 22, 23, 11585, 11586, 10**6)
    powers = [1, 1, 2, 4, 4, 8, 8, 16, 16, 32, 8192, 16384, 16384]
    assert [nm_routes.row_bucket(n) for n in rows] == powers


def test_bucket_names_all_that_matters():
    assert key(100) == "nm_linear/2:4/bfloat16/eager/rows-2^7/weights-4^10"
    one = key(16, 4096, 11008, torch.float32, 4, 8, "graph")
    assert one == "nm_linear/4:8/float32/graph/rows-2^4/weights-4^13"
    assert key(1, 64, 256) == key(1, 256, 64) != key(1, 256, 256)
    with pytest.raises(ValueError, match="mode='lazy' is unknown; use one of eager, graph"):
        key(1, mode="lazy")


# ---- tables --------------------------------------------------------------------------------------


def test_a_table_keeps_all_times_and_what_was_measured_before(folder):
    path = save({key(1): [{"dense": 8.0, "gemm": 4.0}, {"dense": 18.0, "gemm": 4.0}]})
    save({key(64): [{"dense": 3.0, "compressed": 3.0}]})
    assert path.name == "nm-Some-Card-80GB-.json" and nm_routes.cards() == [CARD]
    assert nm_routes.table(CARD) == {
        key(1): {
            "route": "gemm",
            "ratio": 3.0,
            "us": {"dense": 12.0, "gemm": 4.0},
            "least": {"gemm": 2.0},
            "measurements": 2,
        },
        key(64): {
            "route": "dense",
            "ratio": 1.0,
            "us": {"dense": 3.0, "compressed": 3.0},
            "least": {"compressed": 1.0},
            "measurements": 1,
        },
    }
    content = json.loads(path.read_text())
    assert content["format"] == 1 and content["environment"] == {"torch": "x"}
    save({key(1): [{"dense": 1.0, "gemm": 2.0}]})
    assert nm_routes.table(CARD)[key(1)]["route"] == "dense" and len(nm_routes.table(CARD)) == 2


def test_a_route_must_win_in_every_layer_and_clearly(folder):
    for times, route in (
        ([PAIR, {"dense": 10.0, "gemm": 10.1}], "dense"),
        ([{"dense": 10.0, "gemm": 9.8}], "dense"),
        ([{"dense": 10.0, "gemm": 9.7, "skinny": 9.5}], "skinny"),
        ([PAIR, {"dense": 10.0}], "dense"),  # not measured in the second one
        ([PAIR, {"gemm": 1.0}], "gemm"),  # the second one says nothing
    ):
        save({key(1): times})
        assert nm_routes.table(CARD)[key(1)]["route"] == choose(1) == route, times
    before = nm_routes.table(CARD)
    save({key(2): [{"gemm": 1.0}], key(4): []})
    assert nm_routes.table(CARD) == before


def test_wrong_names_and_formats_are_refused(folder):
    with pytest.raises(ValueError, match="name='fused' is unknown; use one of dense, gemm, skinny"):
        save({key(1): [{"dense": 1.0, "fused": 2.0}]})
    (folder / "nm-old.json").write_text(json.dumps({"format": 7, "card": "old", "buckets": {}}))
    with pytest.raises(ValueError, match="nm-old.json has format 7, but .* reads 1; remove it"):
        nm_routes.table("old")
    assert nm_routes.table("never seen") == {}


def test_shipped_tables_are_sound():
    for card in nm_routes.cards():
        for bucket, entry in nm_routes.table(card).items():
            kind, pattern, dtype, mode, rows, weights = bucket.split("/")
            assert kind == "nm_linear" and mode in nm_routes.MODES and ":" in pattern, bucket
            assert hasattr(torch, dtype) and rows[:7] == "rows-2^" and weights[:10] == "weights-4^"
            names = set(entry["us"])
            assert entry["route"] in names and names <= set(nm_routes.NM_ROUTES), bucket
            won = entry["ratio"] == 1 if entry["route"] == "dense" else entry["ratio"] >= 1.02
            assert won and set(entry["least"]) == names - {"dense"}, bucket


# ---- choosing ------------------------------------------------------------------------------------


def test_what_nobody_measured_is_dense(folder):
    assert choose(16) == "dense"
    save({key(16): [PAIR]})
    assert choose(16) == "gemm"
    assert choose(16, dtype=torch.float32) == choose(16, n=4, m=8) == "dense"


def test_the_nearest_bucket_counts(folder):
    save({key(16): [PAIR], key(256): [{"dense": 1.0, "gemm": 2.0}]})
    found = {rows: choose(rows) for rows in (2, 4, 16, 32, 64, 128, 1024, 2048)}
    near = dict.fromkeys((4, 16, 32, 64), "gemm")  # 64 is as near to both: fewer rows count
    assert found == {2: "dense", **near, 128: "dense", 1024: "dense", 2048: "dense"}
    assert [choose(16, 1024 * f, 1024) for f in (1, 4, 16)] == ["gemm", "gemm", "dense"]
    save({key(1, 2048, 2048): [{"dense": 1.0, "skinny": 0.5}]})
    assert choose(4) == "gemm", "as many weights come before as many rows"
    assert choose(4, 2048, 2048) == "skinny"


def test_what_cannot_run_here_is_passed_over(folder):
    save({key(16): [{"dense": 10.0, "cusparselt": 2.0, "gemm": 4.0, "compressed": 20.0}]})
    assert choose(16) == "cusparselt"
    assert choose(16, allowed=("dense", "gemm")) == "gemm"
    assert choose(16, allowed=("dense", "compressed")) == "dense"


def test_skinny_takes_sixteen_rows(folder):
    save({key(16): [{"dense": 10.0, "skinny": 2.0, "gemm": 4.0}]})
    assert choose(16) == "skinny" and choose(17) == "gemm"


def test_patterns_and_dtypes_of_one_speed(folder):
    save({key(16): [PAIR]})
    assert choose(16, n=1, m=2) == "gemm" and choose(16, dtype=torch.float16) == "gemm"
    save({key(16, n=1, m=2): [{"dense": 1.0, "gemm": 2.0}]})
    assert choose(16, n=1, m=2) == "dense" and choose(16) == "gemm"
    on_cpu = {key(16): [{"dense": 2.0, "compressed": 1.0}]}
    save(on_cpu, "cpu-x")
    at = (2, 4, 16, 1024, 1024)
    assert nm_routes.choose("cpu-x", HALF, *at) == "compressed"
    assert nm_routes.choose("cpu-x", torch.float16, *at) == "dense"


def test_graphs_have_times_of_their_own(folder):
    save({key(16): [{"dense": 10.0, "gemm": 20.0}]})
    assert choose(16, mode="graph") == "dense"
    save({key(16, mode="graph"): [PAIR]})
    assert choose(16, mode="graph") == "gemm" and choose(16) == "dense"


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_covers_every_number_of_rows(folder):
    save({key(4): [{"dense": 10.0, "skinny": 1.0, "gemm": 9.0}]})
    save({key(64): [{"dense": 10.0, "gemm": 5.0}], key(1024): [{"dense": 10.0, "gemm": 11.0}]})
    layer = (torch.empty(1, dtype=HALF), 2, 4, 1024, 1024)
    there = {"card": CARD, "allowed": nm_routes.NM_ROUTES}
    plan = nm_routes.plan(*layer, **there)
    assert plan.steps == ((16, "skinny"), (362, "gemm"), (23170, "dense"))
    found = [plan.route(rows) for rows in (0, 1, 16, 17, 362, 363, 10**9)]
    assert found == ["skinny"] * 3 + ["gemm"] * 2 + ["dense"] * 2
    assert plan.routes == ("skinny", "gemm", "dense")
    assert str(plan) == "skinny up to 16 rows, gemm up to 362 rows, dense beyond"
    for rows in (1, 7, 12, 16, 17, 100, 400, 3000, 16384):
        assert plan.route(rows) == choose(rows), rows
    few = nm_routes.plan(*layer, (1, 8), **there)
    assert few.routes == ("skinny",) and few.route(1000) == "skinny"
    with pytest.raises(ValueError, match=r"rows=\(5, 4\) is not 1 <= fewest <= most"):
        nm_routes.plan(*layer, (5, 4))


def test_a_plan_says_when_nobody_measured(folder):
    plan = nm_routes.plan(CPU, 2, 4, 64, 64)
    assert plan.routes == ("dense",) and plan.route(5) == "dense"
    assert str(plan) == f"dense (not measured on {routes.cpu_card()})"
    assert str(nm_routes.DENSE) == "dense" and nm_routes.DENSE.route(3) == "dense"


def test_a_route_can_be_forced(folder):
    save({key(16): [PAIR]})
    with nm_routes.forced("dense"):
        assert choose(16) == "dense" == nm_routes.forced_route()
        with nm_routes.forced("skinny"):
            assert choose(16) == "skinny" and choose(17) == "gemm"
            assert choose(16, allowed=("dense", "gemm")) == "gemm"
        with nm_routes.forced("compressed"):
            assert nm_routes.plan(CPU, 2, 4, 64, 64).steps == ((23170, "compressed"),)
    assert choose(16) == "gemm" and nm_routes.forced_route() is None
    with pytest.raises(ValueError, match="name='best' is unknown; use one of dense, gemm, skinny"):
        nm_routes.forced("best").__enter__()


def test_what_the_cpu_can_run():
    fast = ("compressed",) if "cpp" in implementations("nm_linear") else ()
    for dtype in (torch.float32, HALF, torch.float16):
        assert nm_routes.available("cpu", dtype, 2, 4, 64, 64) == ("dense", *fast)
    assert nm_routes.available("cpu", torch.float64, 2, 4, 64, 64) == ("dense",)
    assert nm_routes.available("cpu", HALF, 2, 4, 62, 64) == ("dense",)
    assert nm_routes.card_of("cpu") == routes.cpu_card()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_card_can_run():
    found = nm_routes.available("cuda", HALF, 2, 4, 64, 64)
    assert found[0] == "dense" and set(found) <= set(nm_routes.NM_ROUTES)
    assert set(nm_routes.available("cuda", torch.float32, 2, 4, 64, 64)) <= {"dense", "compressed"}
    assert "gemm" not in nm_routes.available("cuda", HALF, 2, 4, 68, 64)
    assert nm_routes.card_of("cuda") == torch.cuda.get_device_name()
