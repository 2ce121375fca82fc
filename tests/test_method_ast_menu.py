"""AST with the whole menu: fixed channels, and turns of the dense network."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_engine import model, toy
from test_method_ast import FIELDS, STEPS, bools, prepared

from sparse_cocktail import Cocktail
from sparse_cocktail.config import split_fields
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.ast import AST, without_conflict
from sparse_cocktail.methods.ast_options import interleaved
from sparse_cocktail.patterns import Channel, Dense, family, parse
from sparse_cocktail.schedules import keep_count

GROUP = "unstructured-0.5,channel-0.5,2:4"
ORDER = ["dense", "unstructured-0.5000", "channel-0.5000", "2:4"]


class Watched(AST):
    """Notes what its steps do; `run` registers it as ast."""

    notes: list

    def step(self, ctx):
        layers = [layer.weight for layer in ctx.cocktail.layers.values()]
        passes = super().step(ctx)
        self.notes.append({"name": passes[0].subnet, "updates": passes[0].dense_grad})
        self.notes[-1]["old"] = [w.detach().clone() for w in layers]
        self.notes[-1]["norms"] = norms(ctx.cocktail)
        channels = [n for n, s in ctx.cocktail.subnets.items() if isinstance(s.pattern, Channel)]
        self.notes[-1]["channels"] = {n: bools(ctx.cocktail, n) for n in channels}
        return passes

    def before_step(self, ctx):
        layers, note = [layer.weight for layer in ctx.cocktail.layers.values()], self.notes[-1]
        note["raw"] = [w.grad.clone() for w in layers]
        super().before_step(ctx)
        note["grad"] = [w.grad.clone() for w in layers]

    def after_step(self, ctx):
        layers = [layer.weight for layer in ctx.cocktail.layers.values()]
        self.notes[-1]["new"] = [w.detach().clone() for w in layers]
        super().after_step(ctx)


def norms(cocktail: Cocktail) -> dict[str, list[torch.Tensor]]:
    """Scales and shifts that subnets have of their own."""
    return {name: [t.clone() for t in s.affine or []] for name, s in cocktail.subnets.items()}


def run(folder, **fields):
    """Notes of every step of a run, and its trainer."""
    kind = type("Noted", (Watched,), {"notes": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ast", kind)
        trainer = prepared(folder, **fields)
        trainer.run()
    return kind.notes, trainer


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A run of one network of each pattern, and of the dense one."""
    return run(tmp_path_factory.mktemp("group"), patterns=GROUP, dense=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run of all ladders, and of the dense network."""
    folder = tmp_path_factory.mktemp("whole")
    ladder = "unstructured+channel+n:m"
    run(folder, patterns="", ladder=ladder, dense=True, mask_linear=True)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["subnets"]


# ---- channels ------------------------------------------------------------------------------------


def test_channel_subnets_keep_the_first_channels_from_the_first_step_to_the_last(whole):
    cocktail = Cocktail.load(whole / "cocktail.safetensors", model())
    names = [name for name in cocktail.subnets if name.startswith("channel")]
    assert len(names) == 10 and cocktail.outputs
    for name in names:
        density = parse(name).density
        for index, mask in enumerate(bools(cocktail, name)):
            out = len(mask)
            keep = out if index in cocktail.outputs else keep_count(density, out)
            assert mask[:keep].all() and not mask[keep:].any()


def test_channel_masks_never_change(group):
    notes, trainer = group
    last = bools(trainer.ctx.cocktail, "channel-0.5000")
    for note in notes:
        assert all(map(torch.equal, note["channels"]["channel-0.5000"], last))


def test_only_masks_that_can_change_are_updated(group):
    counts = Counter(note["name"] for note in group[0] if note["updates"])
    assert set(counts) == {"unstructured-0.5000", "2:4"}


@pytest.mark.parametrize("ends", [0.6875, 1.0])
def test_channels_alone_are_a_menu_too(tmp_path, ends):
    notes, trainer = run(
        tmp_path, patterns="channel-0.3,channel-0.6", ramp_end=ends, update_until=ends, epochs=1
    )
    assert not any(note["updates"] for note in notes)
    assert [row["name"] for row in rows_of(tmp_path)] == ["channel-0.3000", "channel-0.6000"]
    assert "mask" not in trainer.ctx.seconds


# ---- the dense network ---------------------------------------------------------------------------


def test_the_dense_network_has_the_first_turn_of_every_group(group):
    assert [note["name"] for note in group[0]] == [ORDER[step % 4] for step in range(2 * STEPS)]


def test_its_turn_trains_every_weight_by_its_own_gradient(group):
    for note in group[0][::4]:
        assert not note["updates"]
        for raw, used, old, new in zip(
            *(note[k] for k in ("raw", "grad", "old", "new")), strict=True
        ):
            assert torch.equal(raw, used) and raw.any()  # nothing is before it in its group
            assert not torch.equal(old, new)
    pruned = [~mask for mask in group[0][0]["channels"]["channel-0.5000"]]
    moved = [new != old for new, old in zip(group[0][0]["new"], group[0][0]["old"], strict=True)]
    assert any((m & p).any() for m, p in zip(moved, pruned, strict=True))


def test_the_subnet_behind_it_is_corrected_by_its_gradient(tmp_path):
    notes, _ = run(tmp_path, patterns="channel-0.5,channel-0.6", dense=True)
    conflicts = 0
    for dense, note in zip(notes[::3], notes[1::3], strict=False):
        masks = note["channels"]["channel-0.5000"]
        for before, raw, used, mask in zip(
            *(dense["raw"], note["raw"], note["grad"], masks), strict=True
        ):
            assert torch.equal(used, without_conflict(raw, before * mask))
            conflicts += not torch.equal(used, raw)
    assert conflicts > 3


def test_its_norms_are_its_own(group):
    notes, trainer = group
    cocktail = Cocktail.load(trainer.folder / "cocktail.safetensors", model())
    for before, note in zip(notes, notes[1:], strict=False):
        same = all(map(torch.equal, before["norms"]["dense"], note["norms"]["dense"]))
        assert same == (before["name"] != "dense")
    dense, *others = (torch.cat(cocktail.subnets[name].affine) for name in ORDER)
    assert not any(torch.equal(dense, other) for other in others)


def test_it_takes_no_turns_unless_asked(tmp_path):
    notes, _ = run(tmp_path, patterns=GROUP, epochs=1)
    assert "dense" not in {note["name"] for note in notes}
    assert [row["name"] for row in rows_of(tmp_path)] == ORDER[1:]
    _, options = split_fields({**FIELDS, "patterns": GROUP, "dense": True})
    assert options.turns() == [Dense(), *options.menu()]


# ---- the order of turns --------------------------------------------------------------------------


def test_interleaved_families_share_a_group_evenly():
    given = [f"unstructured-0.{k}000" for k in (1, 2, 3, 4)] + ["channel-0.1000", "channel-0.2000"]
    order = interleaved([parse(name) for name in [*given, "2:4"]])
    wanted = [given[0], given[4], given[1], "2:4", given[2], given[5], given[3]]
    assert [str(pattern) for pattern in order] == wanted


def test_interleaved_turns_leave_the_order_of_results(tmp_path):
    patterns = "unstructured-0.3,unstructured-0.5,channel-0.5"
    notes, trainer = run(tmp_path, patterns=patterns, dense=True, interleave=True)
    listed = ["dense", "unstructured-0.3000", "unstructured-0.5000", "channel-0.5000"]
    turns = [listed[k] for k in (0, 1, 3, 2)]
    assert [note["name"] for note in notes] == [turns[step % 4] for step in range(2 * STEPS)]
    assert (
        [row["name"] for row in rows_of(tmp_path)] == listed == list(trainer.ctx.cocktail.subnets)
    )
    size = trainer.ctx.cocktail.bank.numel
    for name in ("unstructured-0.3000", "unstructured-0.5000"):
        kept = sum(int(mask.sum()) for mask in bools(trainer.ctx.cocktail, name))
        assert kept == keep_count(parse(name).density, size)


def test_one_family_alone_has_one_order():
    _, options = split_fields({**FIELDS, "interleave": True})
    assert options.turns() == options.networks() == options.menu()


# ---- the whole menu ------------------------------------------------------------------------------


def test_a_run_leaves_all_networks_at_the_cost_of_one_pass_a_step(whole):
    results = json.loads((whole / "results.json").read_text())
    families = Counter(family(row["pattern"]) for row in results["subnets"])
    assert families == {"dense": 1, "unstructured": 10, "channel": 10, "n:m": 3}
    _, options = split_fields({**FIELDS, "patterns": "", "dense": True})
    assert results["passes"]["train"] == AST.cost(options, FIELDS["epochs"]) * STEPS
    assert {row["weights"] for row in results["subnets"]} == {None}  # one file, one weight set


@pytest.mark.parametrize("own_norms", [True, False])
def test_networks_of_the_file_have_the_accuracies_of_the_run(tmp_path, own_norms):
    run(tmp_path, patterns=GROUP, dense=True, own_norms=own_norms)
    cocktail, data = Cocktail.load(tmp_path / "cocktail.safetensors", model()), toy()
    assert [row["name"] for row in rows_of(tmp_path)] == ORDER
    for row in rows_of(tmp_path):
        found = cocktail.export(row["name"])(data.test.inputs).argmax(1)
        accuracy = 100 * (found == data.test.targets).float().mean().item()
        assert accuracy == pytest.approx(row["accuracy"], abs=1e-3)
