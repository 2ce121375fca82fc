"""Sup-tickets: the split of epochs, cycles and tickets, and a running mean that stays sparse."""

import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from test_engine import MODEL, Stop, _quiet, crash_before, same, toy
from test_method_imp import hard

from sparse_cocktail import ops
from sparse_cocktail.averaging import superpose
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.sup_tickets_options import Cycles
from sparse_cocktail.recalibrate import recalibrate
from sparse_cocktail.stepping import Stepper

# 3 steps an epoch: 2 epochs of pre-training, then 3 cycles of 2 epochs
FIELDS = {
    "method": "sup-tickets",
    "epochs": 8,
    "cyclic_share": 0.75,
    "ticket_cycle": 2,
    "base_options": {"update_every": 0.2},
    "patterns": "unstructured-0.8",
    "threads": 1,
    "recalibrate_samples": 64,
    **MODEL,
}
NAME = "unstructured-0.8000"


def mean_file(folder, number: int, name: str = NAME) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "pool" / f"{name}-mean-{number:02d}.safetensors")[0]


def recorded(monkeypatch, folder, averages: bool = True, data=None, **fields):
    """Run; tickets as they were before averaging, and (mask, gradients, masks) of every step."""
    tickets, steps = [], []

    class Recorded(METHODS["sup-tickets"]):
        def look(self, ctx):
            name = str(self.present(ctx)[0])
            weights = [layer.weight for layer in ctx.cocktail.layers.values()]
            masks = zip(ctx.cocktail.masks(name), weights, strict=True)
            return {
                "masks": [ops.unpack_mask(bits, w.shape) for bits, w in masks],
                "weights": [w.detach().clone() for w in weights],
                "gradients": [w.grad.clone() for w in weights],
                "lr": ctx.optimizer.param_groups[0]["lr"],
                "momentum": [ctx.optimizer.state[w]["momentum_buffer"].clone() for w in weights],
            }

        def after_step(self, ctx):
            super().after_step(ctx)
            steps.append(self.look(ctx))

        def after_epoch(self, ctx):
            if self.cycles.ticket(ctx.epoch) is not None:
                tickets.append({k: v.clone() for k, v in ctx.weights().items()})
            super().after_epoch(ctx)

        def _superpose(self, ctx, number):
            if averages:
                super()._superpose(ctx, number)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "sup-tickets", Recorded)
        trainer = Trainer(*split_fields({**FIELDS, **fields}), folder, _quiet())
        trainer.prepare("resnet8", data or toy())
        trainer.run()
    return trainer, tickets, steps


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder, trainer, tickets and steps of a run of `FIELDS`."""
    folder = tmp_path_factory.mktemp("sup")
    with pytest.MonkeyPatch.context() as patch:
        return folder, *recorded(patch, folder)


def layer_names(trainer) -> list[str]:
    return [f"{name}.weight" for name in trainer.ctx.cocktail.layers]


def counts(masks) -> list[int]:
    return [int(m.sum()) for m in masks]


# ---- the split of epochs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "split"),
    [
        ((250, 0.1, 8), (226, 3, 8)),  # the paper's CIFAR
        ((100, 0.08, 2), (92, 4, 2)),  # ImageNet
        ((250, 0.1, 0.032), (226, 3, 8)),
        ((30, 0.1, 0.032), (27, 3, 1)),
        ((100, 0.29, 1), (71, 29, 1)),  # 28.999999999999996 in floating point
        ((8, 0.75, 2), (2, 3, 2)),
        ((4, 0.1, 0.032), (3, 1, 1)),  # one cycle where the share has no room
        ((1, 0.1, 0.032), (1, 0, 1)),
        ((4, 0.1, 8), (4, 0, 8)),
        ((10, 0.1, 8), (10, 0, 8)),  # a length in epochs is not forced
        ((4, 0.0, 0.032), (4, 0, 1)),
    ],
)
def test_split(arguments, split):
    assert Cycles.split(*arguments) == Cycles(*split)


def test_tickets_are_taken_at_the_low_point_at_the_end_of_a_cycle():
    cycles = Cycles(2, 3, 2)
    assert [cycles.ticket(epoch) for epoch in range(8)] == [None, 0, None, 1, None, 2, None, 3]
    lr = [cycles.lr(step, 5, 0.001, 0.005) for step in range(10, 40)]
    assert [i for i in range(30) if cycles.starts(10 + i, 5)] == [0, 10, 20]
    for start in (0, 10, 20):
        assert lr[start + 9] == pytest.approx(0.001)  # the step before the ticket
        assert lr[start + 4] == pytest.approx(0.005)
        rise = [0.001 + 0.004 * min(i, 10 - i) / 5 for i in range(1, 11)]
        assert lr[start : start + 10] == pytest.approx(rise)


def test_learning_rate_of_a_run(plain):
    _, _, _, steps = plain
    lr = [s["lr"] for s in steps]
    assert lr[:6] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001])  # 50 %, 75 % of 2 epochs
    cycle = [0.001 + 0.004 * min(i, 6 - i) / 3 for i in range(1, 7)]
    assert lr[6:] == pytest.approx(3 * cycle)


# ---- masks ---------------------------------------------------------------------------------------


def test_one_large_change_at_the_start_of_every_cycle(plain):
    _, _, _, steps = plain
    for start in (6, 12, 18):
        before, changed = steps[start - 1]["masks"], steps[start]
        assert counts(before) == counts(changed["masks"])
        gone = sum(int((a & ~b).sum()) for a, b in zip(before, changed["masks"], strict=True))
        assert 0.2 * sum(counts(before)) < gone <= 0.5 * sum(counts(before)) + 9
        for old, new, gradient in zip(before, changed["masks"], changed["gradients"], strict=True):
            grown, left = (new & ~old).flatten(), (~new & ~old).flatten()
            if grown.any() and left.any():
                size = gradient.abs().flatten()
                assert size[grown].min() >= size[left].max()
        for later in steps[start + 1 : start + 6]:
            assert all(map(torch.equal, later["masks"], changed["masks"]))
    for seen in steps:
        for what in ("weights", "momentum"):
            pairs = zip(seen[what], seen["masks"], strict=True)
            assert not any(tensor[~mask].any() for tensor, mask in pairs)


def test_an_infinite_gradient_changes_no_mask(monkeypatch, tmp_path):
    """As in the steps that the scaler of fp16 leaves out."""
    original = Stepper.step

    def overflow(self, *batch_and_lr):
        scale = 2.0**40 if self.ctx.step == 6 else 2.0**8
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        original(self, *batch_and_lr)

    monkeypatch.setattr(Stepper, "step", overflow)
    fields = {"epochs": 4, "cyclic_share": 0.5, "precision": "fp16"}
    _, _, steps = recorded(monkeypatch, tmp_path, **fields)
    assert not any(g.isfinite().all() for g in steps[6]["gradients"])
    assert all(map(torch.equal, steps[5]["masks"], steps[6]["masks"]))
    assert not all(map(torch.equal, steps[1]["masks"], steps[2]["masks"]))


def test_set_explores_at_random(monkeypatch, tmp_path):
    _, _, steps = recorded(monkeypatch, tmp_path, base="set", epochs=4, cyclic_share=0.5)
    outside = [g[~m] for g, m in zip(steps[6]["gradients"], steps[5]["masks"], strict=True)]
    assert not any(g.any() for g in outside)  # no dense gradient was made
    assert counts(steps[5]["masks"]) == counts(steps[6]["masks"])
    assert not all(map(torch.equal, steps[5]["masks"], steps[6]["masks"]))


# ---- the mean ------------------------------------------------------------------------------------


def test_running_mean_counts_every_member_the_same():
    generator = torch.Generator().manual_seed(0)
    members = [{"w": torch.randn(4, 8, generator=generator).double()} for _ in range(6)]
    average = members[0]
    for number, ticket in enumerate(members[1:], start=1):
        average = superpose(average, ticket, number, lambda state: state)
    torch.testing.assert_close(average["w"], sum(m["w"] for m in members) / 6)


def test_moving_mean_counts_the_newest_by_its_share():
    a, b, c = ({"w": torch.full((2, 2), x)} for x in (0.0, 4.0, 8.0))
    average = superpose(superpose(a, b, 1, lambda s: s, 0.5), c, 2, lambda s: s, 0.5)
    assert torch.equal(average["w"], torch.full((2, 2), 5.0))


def test_a_run_of_moving_means_scores_each_on_the_holdout(monkeypatch, tmp_path):
    trainer, tickets, _ = recorded(monkeypatch, tmp_path, data=hard(), average="moving")
    ctx, average, others = trainer.ctx, tickets[0]["fc.weight"], 0
    for number, ticket in enumerate(tickets[1:], start=1):
        average = (average + ticket["fc.weight"]) / 2
        mean = mean_file(tmp_path, number)
        torch.testing.assert_close(mean["fc.weight"], average)
        ctx.cocktail.activate("dense")
        ctx.model.load_state_dict(mean)
        ctx.cocktail.set_masks(NAME, nonzero_masks(mean, ctx))
        with ctx.cocktail.using(NAME):
            recalibrate(ctx.model, ctx.calibration())
            held, tested = ctx.accuracy("holdout"), ctx.accuracy("test")
        assert trainer.method.state.tickets[number - 1]["holdout"] == held
        others += held != tested
    assert others


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_every_mean_is_pruned_to_the_density_of_the_network(plain, scope, monkeypatch, tmp_path):
    if scope == "global":
        folder, trainer, tickets, steps = plain
    else:
        folder = tmp_path
        trainer, tickets, steps = recorded(monkeypatch, folder, prune_scope=scope)
    names, kept = layer_names(trainer), counts(steps[-1]["masks"])
    assert len(tickets) == 4  # the end of pre-training, and one per cycle
    assert same(mean_file(folder, 0), tickets[0])
    average = tickets[0]
    for number, ticket in enumerate(tickets[1:], start=1):
        share = 1 / (number + 1)
        mixed = [(1 - share) * average[n] + share * ticket[n] for n in names]
        assert sum(int(w.count_nonzero()) for w in mixed) > sum(kept)  # supports differ
        keep = sum(kept) if scope == "global" else kept
        bits = ops.topk_masks(mixed, keep)
        average = mean_file(folder, number)
        for n, w, b in zip(names, mixed, bits, strict=True):
            torch.testing.assert_close(average[n], w * ops.unpack_mask(b, w.shape))
        found = [int(average[n].count_nonzero()) for n in names]
        assert sum(found) == sum(kept)
        assert (found == kept) == (scope == "layerwise")
    rest = [n for n in average if "weight" in n and n not in names]
    for n in rest:  # what is not masked is a plain mean of all
        torch.testing.assert_close(average[n], sum(t[n] for t in tickets) / 4)


def test_tickets_of_one_support_are_averaged_without_pruning(monkeypatch, tmp_path):
    trainer, tickets, _ = recorded(monkeypatch, tmp_path, ticket_drop=0.0)
    average = mean_file(tmp_path, 3)
    for n in layer_names(trainer):
        torch.testing.assert_close(average[n], sum(t[n] for t in tickets) / 4)


def test_statistics_are_estimated_for_every_mean(plain):
    folder, trainer, tickets, _ = plain
    ctx = trainer.ctx
    for number in (1, 3):
        average = mean_file(folder, number)
        ctx.cocktail.activate("dense")
        ctx.model.load_state_dict(average)
        ctx.cocktail.set_masks(NAME, nonzero_masks(average, ctx))
        with ctx.cocktail.using(NAME):
            recalibrate(ctx.model, ctx.calibration())
            found = {k: v.clone() for k, v in ctx.model.state_dict().items()}
        running = [k for k in average if "running" in k]
        assert running
        for k in running:
            torch.testing.assert_close(found[k], average[k], atol=1e-5, rtol=1e-5)
            assert not torch.equal(average[k], tickets[number][k])


def test_estimates_of_statistics_are_no_evaluation(plain):
    _, trainer, *_ = plain
    samples, ctx = trainer.ctx.samples, trainer.ctx
    assert samples["superpose forward"] == 3 * len(torch.cat(ctx.calibration()))
    held = len(ctx.data.holdout.inputs)  # the stage's report and `finish` estimate anew
    assert samples["evaluate forward"] == 4 * held + len(ctx.data.test.inputs) + 2 * 64


def nonzero_masks(state, ctx):
    return [ops.pack_mask(state[f"{name}.weight"] != 0) for name in ctx.cocktail.layers]


def test_averaging_leaves_training_alone(plain, monkeypatch, tmp_path):
    _, _, tickets, steps = plain
    _, alone, alone_steps = recorded(monkeypatch, tmp_path, averages=False)
    assert len(tickets) == len(alone) == 4
    assert all(same(a, b) for a, b in zip(tickets, alone, strict=True))
    assert all(map(torch.equal, steps[-1]["momentum"], alone_steps[-1]["momentum"]))


def test_the_last_mean_is_the_product(plain):
    folder, trainer, tickets, _ = plain
    pool = read_tensors(folder / "pool" / f"{NAME}.safetensors")[0]
    assert same(pool, mean_file(folder, 3))
    names = layer_names(trainer)
    product = read_tensors(folder / "networks" / f"{NAME}.safetensors")[0]
    assert all(torch.equal(product[f"model.{n}"], pool[n]) for n in names)
    assert any(not torch.equal(pool[n], tickets[-1][n]) for n in names)
    scores = trainer.method.state.tickets
    assert [t["ticket"] for t in scores] == [1, 2, 3]
    assert all(0 <= t["holdout"] <= 100 for t in scores)


# ---- bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "patterns"),
    [
        ("gmp", "unstructured-0.8,1:4,channel-0.5,block-2x2-0.6"),
        ("granet", "unstructured-0.8"),
        ("spartan", "unstructured-0.8,channel-0.5"),
    ],
)
def test_any_base_of_one_stage_per_network(base, patterns, tmp_path):
    fields = {**FIELDS, "base": base, "base_options": {}, "patterns": patterns, "epochs": 4}
    results = train("resnet8", toy(), tmp_path, **fields)  # 2 + 2: one ticket
    cost = METHODS["sup-tickets"].cost(split_fields(fields)[1], epochs=4)
    assert results["passes"]["train"] == pytest.approx(3 * cost)
    for subnet in results["subnets"]:
        weights = mean_file(tmp_path, 1, subnet["name"])
        masked = [w for k, w in weights.items() if w.dim() == 4 and k != "conv1.weight"]
        numel = sum(w.numel() for w in masked)
        nonzero = sum(int(w.count_nonzero()) for w in masked)
        density = {"u": 0.2, "1": 0.25, "c": 0.5, "b": 0.4}[subnet["name"][0]]
        assert nonzero == subnet["nnz"]
        assert nonzero / numel == pytest.approx(density, rel=0.05)


def test_base_options_reach_the_base(tmp_path):
    fields = {**FIELDS, "base_options": {"drop": 0.3}, "lr_schedule": "cosine"}
    kind, options = split_fields(fields)[1].base_method()
    assert kind is METHODS["rigl"]
    assert (options.drop, options.lr_schedule) == (0.3, "cosine")
    assert options.patterns == FIELDS["patterns"]


def test_a_run_too_short_for_a_cycle_says_so(tmp_path):
    text = StringIO()
    train("resnet8", toy(), tmp_path, console=Console(file=text), **{**FIELDS, "epochs": 1})
    assert "sup-tickets: epochs=1 has no room for a cycle" in text.getvalue()
    assert not list((tmp_path / "pool").glob("*-mean-01*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "cocktail"}, r"base='cocktail' is not one of .*rigl"),
        ({"base": "sup-tickets"}, r"base='sup-tickets' is not one of"),
        ({"base_options": {"dropp": 1}}, r"base_options has 'dropp', which rigl does not know"),
        ({"base_options": {"drop": 7}}, r"rigl: drop=7 is not in \[0, 1\]"),
        ({"base_options": {"drop": "0.5"}}, r"drop='0.5', a str, but the field is a float"),
        ({"base_options": {"drop": True}}, r"drop=True, a bool, but the field is a float"),
        ({"base_options": {"allocation": 1}}, r"allocation=1, a int, but the field is a str"),
        ({"base_options": {"patterns": "unstructured-0.5"}}, r"give patterns outside of base_opt"),
        ({"base_options": {"ladder": "channel"}}, r"give ladder outside of base_options"),
        ({"base_options": {"stages": 3}}, r"give stages outside of base_options"),
        ({"patterns": "2:4"}, r"2:4 cannot be trained"),
        ({"prune_scope": "all"}, r"prune_scope='all' is not one of"),
        ({"average": "median"}, r"average='median' is not one of"),
        ({"cyclic_share": 1.5}, r"cyclic_share=1.5 is not in \[0, 1\]"),
        ({"ticket_drop": -1}, r"ticket_drop=-1 is not in"),
        ({"ticket_cycle": 0}, r"ticket_cycle=0 is not positive"),
        ({"ticket_low_lr": math.nan}, r"ticket_low_lr=nan is not 0 or more"),
    ],
)
def test_bad_fields(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("resnet8", toy(), tmp_path, **{**FIELDS, **fields})


# ---- resume --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder and results of a run that nothing stops: 1 epoch, then 2 cycles of 2, for each."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, train("resnet8", toy(), folder, **RESUMED)


RESUMED = {
    **FIELDS,
    "epochs": 5,
    "cyclic_share": 0.8,
    "patterns": "unstructured-0.8,unstructured-0.6",
    "checkpoint_every": 4,
}


# right after a ticket, before the next checkpoint; inside the last cycle of the second network
@pytest.mark.parametrize(("stage", "step"), [(0, 11), (1, 14)])
def test_resume_is_bit_exact(undisturbed, stage, step, monkeypatch, tmp_path):
    folder, whole = undisturbed
    undo = crash_before(monkeypatch, stage, step)
    with pytest.raises(Stop):
        train("resnet8", toy(), tmp_path, **RESUMED)
    undo()
    resumed = train("resnet8", toy(), tmp_path, resume=True, **RESUMED)
    assert whole["subnets"] == resumed["subnets"]
    assert whole["method_state"] == resumed["method_state"]
    for part in ("pool", "networks"):
        names = {f.name for f in (folder / part).iterdir()}
        assert names == {f.name for f in (tmp_path / part).iterdir()}
        for name in names:
            files = [run / part / name for run in (folder, tmp_path)]
            assert same(*(read_tensors(file)[0] for file in files))
