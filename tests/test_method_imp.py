"""IMP and what stands on it: tickets and their masks, Lottery Pools, Refilling."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from test_engine import MODEL, Stop, crash_before, same, toy
from test_methods import left

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.averaging import ALPHAS, greedy_pool, interpolate
from sparse_cocktail.data import Data, Split
from sparse_cocktail.engine import train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, lottery_pools
from sparse_cocktail.methods.imp import IMP
from sparse_cocktail.methods.lottery_pools import SHARES, LotteryPools, neighbours
from sparse_cocktail.methods.refilling import Refilling
from sparse_cocktail.recalibrate import recalibrate
from sparse_cocktail.schedules import keep_count

# 224 samples make 3 steps an epoch, 6 a stage
FIELDS = {"threads": 1, "recalibrate_samples": 64, "epochs": 2, "stages": 3, **MODEL}
# of the third ticket's 632 weights, the four decimals of its name would make 633
FIELDS |= {"prune_unstructured": 0.49, "lr": 0.2}
LEFT = 0.51
TICKETS = [f"unstructured-{1 - LEFT**k:.4f}" for k in (1, 2, 3)]
POOLS = {**FIELDS, "method": "lottery-pools", "neighbours": 2, "search_samples": 32}


def hard() -> Data:
    """The toy classes under so much noise that networks differ in what they get right."""
    data, generator = toy(), torch.Generator().manual_seed(4)

    def noisy(split: Split) -> Split:
        noise = torch.randn(split.inputs.shape, generator=generator)
        return Split(split.inputs + 1.2 * noise, split.targets)

    parts = {name: noisy(getattr(data, name)) for name in ("train", "holdout", "test")}
    return dataclasses.replace(data, **parts)


class Recorded:
    """A method that notes the weights before the first step of every stage, and the rewind point.

    (stage, epoch) is where they were.
    """

    states: dict = {}

    def step(self, ctx):
        if ctx.step_in_epoch == 0:
            self.states[ctx.stage, ctx.epoch] = {k: v.clone() for k, v in ctx.weights().items()}
        return super().step(ctx)


def recorded(folder, method: str, **fields):
    """(folder, results, states by (stage, epoch)) of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, method, type("Noted", (Recorded, METHODS[method]), {"states": {}}))
        results = train("resnet8", hard(), folder, method=method, **{**FIELDS, **fields})
        return folder, results, METHODS[method].states


@pytest.fixture(scope="module")
def imp(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("imp"), "imp")


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return recorded(folder, **POOLS)


@pytest.fixture(scope="module", params=["follow_unstructured", "uniform"])
def refilling(request, tmp_path_factory):
    fields = {"channel_allocation": request.param, "prune_channel": 0.3}
    return recorded(tmp_path_factory.mktemp("refilling"), "refilling", **fields)


def masks_of(folder, name: str, file: str = "") -> dict[str, torch.Tensor]:
    """Bool masks by layer of a network of a run."""
    cocktail = Cocktail.load(folder / f"networks/{file or name}.safetensors")
    bits = zip(cocktail.masks(name), cocktail.layers.items(), strict=True)
    return {n: ops.unpack_mask(b, layer.weight.shape) for b, (n, layer) in bits}


def weights_of(folder, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"pool/{name}.safetensors")[0]


# ---- IMP -----------------------------------------------------------------------------------------


def test_tickets_are_nested_with_exact_counts(imp):
    folder, results, _ = imp
    assert [row["name"] for row in results["subnets"]] == ["dense", *TICKETS]
    chain = [masks_of(folder, name) for name in TICKETS]
    total = sum(mask.numel() for mask in chain[0].values())
    for k, masks in enumerate(chain, 1):
        count = sum(int(mask.sum()) for mask in masks.values())
        assert count == keep_count(LEFT**k, total) == results["subnets"][k]["nnz"]
    assert all((b[n] <= a[n]).all() for a, b in pairwise(chain) for n in a)


def test_a_ticket_keeps_the_largest_of_the_one_before(imp):
    folder, _, _ = imp
    for before, name in pairwise(["dense", *TICKETS]):
        masks, trained = masks_of(folder, name), weights_of(folder, before)
        eligible = masks_of(folder, before) if before != "dense" else None
        size = {n: trained[f"{n}.weight"].abs() for n in masks}
        left_out = [
            s[eligible[n] & ~masks[n]] if eligible else s[~masks[n]] for n, s in size.items()
        ]
        kept = [size[n][masks[n]] for n in masks]
        assert torch.cat(kept).min() >= torch.cat(left_out).max()


def test_every_round_starts_from_the_first_epochs_end_bit_for_bit(imp):
    folder, _, states = imp
    snapshot, _ = read_tensors(folder / "rewind.safetensors")
    assert same(snapshot, states[0, 1])  # where the second epoch of stage 0 began
    assert all(same(snapshot, states[k, 0]) for k in (1, 2, 3))
    assert not same(snapshot, states[1, 1])


def test_a_stage_reports_the_network_that_it_trains(imp):
    read = map(json.loads, (imp[0] / "log.jsonl").read_text().splitlines())
    measured = [list(line["holdout"]) for line in read if line["event"] == "stage"]
    assert measured == [[name] for name in ("dense", *TICKETS)]


def test_a_tickets_file_holds_nothing_else(imp):
    for name, masks in ((n, masks_of(imp[0], n)) for n in TICKETS):
        stored = weights_of(imp[0], name)
        assert all(torch.equal(stored[f"{n}.weight"] != 0, mask) for n, mask in masks.items())


def test_accuracy_is_that_of_a_tickets_own_weights(imp):
    folder, results, _ = imp
    test = hard().test
    for row in results["subnets"]:
        network = Cocktail.load(folder / row["weights"]).export(row["name"], plain=True)
        right = (network(test.inputs).argmax(1) == test.targets).float().mean()
        assert row["accuracy"] == pytest.approx(100 * float(right))
    assert len({row["weights"] for row in results["subnets"]}) == 4


def test_without_rewinding_rounds_train_on(tmp_path):
    folder, _, states = recorded(tmp_path, "imp", rewind=0, stages=2)
    assert same(states[1, 0], weights_of(folder, "dense"))
    assert same(states[2, 0], weights_of(folder, TICKETS[0]))
    assert not (folder / "rewind.safetensors").exists()


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("imp", {"stages": 0}, r"imp: stages=0 is below 1"),
        ("imp", {"rewind": 3}, r"imp: rewind=3 is not in \[0, epochs=2\]"),
        ("imp", {"prune_unstructured": 1.0}, r"prune_unstructured=1.0 is not in \(0, 1\); 0.2 is"),
        ("imp", {"min_lr": -0.1}, r"config: min_lr=-0.1 is not 0 or more; 0 is"),
        ("imp", {"stages": 20}, r"imp: stages=20 gives two subnets the same name"),
        ("lottery-pools", {"rewind": 0}, r"lottery-pools: rewind=0 is not in \[1, epochs=2\]"),
        (
            "lottery-pools",
            {"neighbours": -1},
            r"lottery-pools: neighbours=-1 is not 0 or more; 0",
        ),
        ("lottery-pools", {"search_samples": -1}, r"search_samples=-1 is not 0 or more; 0 mixes"),
        ("refilling", {"rewind": 0}, r"refilling: rewind=0 is not in \[1, epochs=2\]"),
        ("refilling", {"criterion": "x"}, r"refilling: criterion='x' is not one of magnitude, rem"),
        ("refilling", {"prune_channel": 0.0}, r"refilling: prune_channel=0.0 is not in \(0, 1\)"),
    ],
)
def test_options_that_make_no_run(tmp_path, method, fields, message):
    with pytest.raises(ValueError, match=message):
        train("resnet8", toy(), tmp_path, method=method, **{**FIELDS, **fields})


def test_costs():
    for method in (IMP, LotteryPools):
        assert method.cost(method.Options(stages=4), 12) == 60
    assert Refilling.cost(Refilling.Options(stages=4), 12) == 108


# ---- Lottery Pools -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ticket, count, order",
    [
        (3, 0, [2, 4, 1, 5, 0]),
        (3, 2, [2, 4]),
        (0, 0, [1, 2, 3, 4, 5]),
        (5, 4, [4, 3, 2, 1]),
        (1, 3, [0, 2, 3]),
    ],
)
def test_neighbours_come_nearest_first(ticket, count, order):
    assert neighbours(ticket, 6, count) == order


def test_the_eleven_shares():
    assert sorted(SHARES) == [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert set(SHARES) == set(ALPHAS) - {1.0} and SHARES[0] == 0.95


def pooled(start: float, others: list[float], score) -> tuple[float, list]:
    """`greedy_pool` of numbers, which pruning rounds to a decimal."""

    def number(x: float) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(x, dtype=torch.float64)}

    state, choices = greedy_pool(
        number(start),
        [(i, number(x)) for i, x in enumerate(others)],
        lambda s: score(float(s["x"])),
        lambda s: {"x": (s["x"] * 10).round() / 10},
        SHARES,
    )
    return float(state["x"]), choices


def test_a_mix_is_pruned_before_it_is_scored_and_kept_so():
    seen = []
    result, choices = pooled(0.0, [1.0, 10.0], lambda x: seen.append(x) or -abs(x - 0.52))
    assert seen[0] == 0.0 and all(round(x, 1) == x for x in seen)
    assert choices[0].alpha == 0.5 and choices[0].score == pytest.approx(-0.02)
    # from 0.5: 0.95 gives 0.975, which is worse
    assert result == 0.5 and choices[1].alpha == 1.0 and choices[1].score == choices[0].score
    assert [alpha for alpha, _ in choices[1].tried] == sorted(ALPHAS)


def test_a_mix_that_scores_the_same_is_taken_and_changes_least():
    result, (choice,) = pooled(0.0, [2.0], lambda x: 7.0)
    assert choice.alpha == 0.95 and result == 0.1


def test_a_ticket_never_gets_worse_on_the_holdout(pools):
    """The chosen average's score, measured again from its file with what the search calibrates."""
    folder, results, _ = pools
    data, averages = hard(), results["method_state"]["averages"]
    (batch,) = data.calibration(32, 256)
    moved = 0
    for number, name in enumerate(["dense", *TICKETS]):
        choices = averages[name]
        assert [c["stage"] for c in choices] == neighbours(number, 4, 2)
        for c in choices:
            tried = dict(map(tuple, c["tried"]))
            best = max(score for alpha, score in tried.items() if alpha < 1)
            assert (c["alpha"] < 1) == (best >= tried[1.0])
            assert c["score"] == max(tried.values()) == tried[c["alpha"]]
            moved += c["alpha"] < 1
        cocktail = Cocktail.load(folder / f"networks/average-{name}.safetensors")
        cocktail.model.load_state_dict(weights_of(folder, f"average-{name}"))
        with cocktail.using(name):
            recalibrate(cocktail.model, [batch])
            right = cocktail.model.eval()(data.holdout.inputs).argmax(1) == data.holdout.targets
        assert 100 * float(right.float().mean()) == pytest.approx(choices[-1]["score"])
        assert choices[-1]["score"] >= dict(map(tuple, choices[0]["tried"]))[1.0]
    assert moved > 3  # the search had something to find


@pytest.mark.parametrize("name", TICKETS[1:])
def test_every_score_of_the_search_is_that_of_the_pruned_mix(pools, name):
    """Each with masks of its own, and statistics from the search's samples."""
    folder, results, _ = pools
    data, averages = hard(), results["method_state"]["averages"]
    cocktail = Cocktail.load(folder / f"networks/average-{name}.safetensors")
    layers, (batch,) = [f"{layer}.weight" for layer in cocktail.layers], data.calibration(32, 256)
    keep = keep_count(LEFT ** (1 + TICKETS.index(name)), cocktail.bank.numel)
    best = weights_of(folder, name)
    for choice in averages[name]:
        other, present = weights_of(folder, ["dense", *TICKETS][choice["stage"]]), best
        for alpha, score in choice["tried"]:
            mix = interpolate(present, other, alpha)
            bits = ops.topk_masks([mix[n] for n in layers], keep)
            mix |= {n: ops.masked_weight(mix[n], b) for n, b in zip(layers, bits, strict=True)}
            cocktail.activate("dense")
            cocktail.model.load_state_dict(mix)
            cocktail.set_masks(name, bits)
            with cocktail.using(name):
                recalibrate(cocktail.model, [batch])
                right = cocktail.model.eval()(data.holdout.inputs).argmax(1) == data.holdout.targets
            assert score == pytest.approx(100 * float(right.float().mean()))
            best = mix if alpha == choice["alpha"] else best
    assert all(torch.equal(best[n], weights_of(folder, f"average-{name}")[n]) for n in layers)


def test_the_search_leaves_the_tickets_their_masks(tmp_path):
    found = {}

    class Noted(LotteryPools):
        def finish(self, ctx):
            for name in TICKETS:
                found[name] = [bits.clone() for bits in ctx.cocktail.masks(name)]
            return super().finish(ctx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "lottery-pools", Noted)
        train("resnet8", hard(), tmp_path, **POOLS)
    differ = 0
    for name, masks in found.items():
        ticket, average = (weights_of(tmp_path, f"{kind}{name}") for kind in ("", "average-"))
        layers = [f"{layer}.weight" for layer in masks_of(tmp_path, name, f"average-{name}")]
        assert all(map(torch.equal, masks, [ops.pack_mask(ticket[n] != 0) for n in layers]))
        differ += any(((average[n] != 0) != (ticket[n] != 0)).any() for n in layers)
    assert differ


def test_averages_have_their_tickets_counts_and_masks_of_their_own(pools):
    folder, results, _ = pools
    differ = 0
    for row in results["subnets"][1:]:
        name = row["name"]
        masks, stored = (
            masks_of(folder, name, f"average-{name}"),
            weights_of(folder, f"average-{name}"),
        )
        total = sum(mask.numel() for mask in masks.values())
        density = LEFT ** (1 + TICKETS.index(name))
        assert sum(int(m.sum()) for m in masks.values()) == row["nnz"] == keep_count(density, total)
        assert all(torch.equal(stored[f"{n}.weight"] != 0, mask) for n, mask in masks.items())
        ticket = weights_of(folder, name)
        differ += any(((ticket[f"{n}.weight"] != 0) != mask).any() for n, mask in masks.items())
    assert differ


def test_own_accuracies_are_those_of_imp(imp, pools):
    rows = [{row["name"]: row for row in run[1]["subnets"]} for run in (imp, pools)]
    assert rows[0].keys() == rows[1].keys()
    for name, row in rows[1].items():
        assert row["accuracy_own"] == rows[0][name]["accuracy"]
        assert row["weights"] == f"networks/average-{name}.safetensors"
    assert all(same(weights_of(imp[0], n), weights_of(pools[0], n)) for n in rows[0])


def test_the_search_does_not_see_the_test_set(pools, tmp_path):
    data = hard()
    other = dataclasses.replace(data, test=Split(data.test.inputs * 0 + 1, data.test.targets))
    results = train("resnet8", other, tmp_path, **POOLS)
    assert results["method_state"] == pools[1]["method_state"]
    for name in ("dense", *TICKETS):
        pair = (weights_of(folder, f"average-{name}") for folder in (pools[0], tmp_path))
        assert same(*pair)
    accuracies = [[row["accuracy"] for row in r["subnets"]] for r in (results, pools[1])]
    assert accuracies[0] != accuracies[1]


def test_resume_in_a_round_and_in_the_search_is_bit_exact(pools, tmp_path, monkeypatch):
    """Averages that the search had found are not searched again, and have cost what they had."""
    fields = {**POOLS, "checkpoint_every": 2}
    undo = crash_before(monkeypatch, 2, 5)
    with pytest.raises(Stop):
        train("resnet8", hard(), tmp_path, **fields)
    undo()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at, searched, original = 2, [], LotteryPools._average

        def noted(self, ctx, ticket):
            searched.append(ticket)
            if ticket == stop_at:
                raise Stop
            return original(self, ctx, ticket)

        patch.setattr(LotteryPools, "_average", noted)
        train("resnet8", hard(), tmp_path, resume=True, **fields)
    with monkeypatch.context() as patch:
        stop_at = None
        patch.setattr(LotteryPools, "_average", noted)
        resumed = train("resnet8", hard(), tmp_path, resume=True, **fields)
    assert searched == [0, 1, 2, 2, 3]
    whole, broken = left(pools[0]), left(tmp_path)
    assert whole.keys() == broken.keys()
    for file, tensors in whole.items():
        assert all(torch.equal(tensors[k], broken[file][k]) for k in tensors), file
    assert resumed["subnets"] == pools[1]["subnets"]
    assert resumed["method_state"] == pools[1]["method_state"]
    assert resumed["passes"]["interpolate"] == pools[1]["passes"]["interpolate"] > 0


def test_a_candidate_is_ranked_once(tmp_path, monkeypatch):
    """It is pruned, and scored as it is then."""
    calls, rank = [], lottery_pools.magnitude_masks
    monkeypatch.setattr(lottery_pools, "magnitude_masks", lambda *a: calls.append(1) or rank(*a))
    fields = {**POOLS, "stages": 1, "epochs": 1, "batch_size": 224, "search_samples": 0}
    results = train("resnet8", hard(), tmp_path, **fields)
    taken = sum(c["alpha"] < 1 for a in results["method_state"]["averages"].values() for c in a)
    # of two networks: eleven mixes with the other one, that which was taken again; start, average
    # and the same average at the run's end
    assert len(calls) == 2 * (11 + 3) + taken


# ---- Refilling -----------------------------------------------------------------------------------


def channels(mask: torch.Tensor) -> torch.Tensor:
    """Which output channels a mask keeps; it must keep or prune them whole."""
    rows = mask.flatten(1)
    assert torch.equal(rows.all(1), rows.any(1))
    return rows.any(1)


def allocation(run) -> str:
    return run[1]["config"]["channel_allocation"]


def chosen_and_ticket(run):
    """(channel network, bool masks of its ticket, its own) for every round."""
    names = [row["name"] for row in run[1]["subnets"]]
    for ticket, name in zip(names[1:4], names[4:], strict=True):
        yield name, weights_of(run[0], ticket), masks_of(run[0], ticket), masks_of(run[0], name)


def test_channel_networks_are_named_by_ticket_or_ladder(refilling):
    names = [row["name"] for row in refilling[1]["subnets"]]
    rate = 0.3 if allocation(refilling) == "uniform" else 1 - LEFT
    assert names[4:] == [f"channel-{1 - (1 - rate) ** k:.4f}" for k in (1, 2, 3)]
    assert refilling[1]["passes"]["train"] == Refilling.cost(Refilling.Options(stages=3), 2) * 3


def test_channels_per_layer_follow_the_allocation(refilling):
    for k, (_, _, ticket, own) in enumerate(chosen_and_ticket(refilling), 1):
        for layer, mask in own.items():
            density = float(ticket[layer].sum()) / ticket[layer].numel()
            if allocation(refilling) == "uniform":
                density = 0.7**k
            assert int(channels(mask).sum()) == keep_count(density, len(mask))


def test_channels_with_most_of_the_ticket_left_are_refilled(refilling):
    for _, trained, ticket, own in chosen_and_ticket(refilling):
        for layer, mask in own.items():
            weight = trained[f"{layer}.weight"].double() * ticket[layer]
            scores, kept = weight.abs().flatten(1).sum(1), channels(mask)
            if not kept.all():
                assert scores[kept].min() >= scores[~kept].max()


def test_refilled_weights_are_the_rewound_ones(refilling):
    """All of them, those that the ticket had pruned too."""
    folder, _, states = refilling
    snapshot, _ = read_tensors(folder / "rewind.safetensors")
    assert all(same(snapshot, states[stage, 0]) for stage in range(1, 7))
    assert all(v.all() for n, v in snapshot.items() if "conv" in n)
    for name, _, _, own in chosen_and_ticket(refilling):
        stored = weights_of(folder, name)
        for layer, mask in own.items():
            assert not stored[f"{layer}.weight"][~mask].any()
            assert stored[f"{layer}.weight"][mask].ne(0).float().mean() > 0.99


def test_channels_by_how_many_weights_remain(tmp_path):
    fields = {"criterion": "remain", "prune_unstructured": 0.6, "stages": 1, "epochs": 1}
    folder, results, _ = recorded(tmp_path, "refilling", **fields)
    _, ticket, channel = (row["name"] for row in results["subnets"])
    left_over, own = masks_of(folder, ticket), masks_of(folder, channel)
    for layer, mask in own.items():
        counts, kept = left_over[layer].flatten(1).sum(1), channels(mask)
        order = sorted(range(len(kept)), key=lambda i: (-int(counts[i]), i))  # ties: lower index
        assert sorted(order[: int(kept.sum())]) == kept.nonzero().flatten().tolist()
