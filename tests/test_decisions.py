"""Every decision of the cocktail that can be switched: what the switch does to a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_cocktail_method import plan_of
from test_engine import SHORT, model, run, same, toy, weights

from sparse_cocktail import Cocktail, convert, models, ops
from sparse_cocktail.averaging import greedy_interpolation
from sparse_cocktail.checkpoint import load_checkpoint
from sparse_cocktail.config import apply_preset, read_recipe, split_fields
from sparse_cocktail.data import ShiftFlip
from sparse_cocktail.engine import Interrupted, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, Pass
from sparse_cocktail.methods.cocktail import SparseCocktail
from sparse_cocktail.methods.cocktail_options import PARITY, CocktailOptions
from sparse_cocktail.methods.consolidation import draw_subnets
from sparse_cocktail.stepping import Stepper

U, C = "unstructured-0.2000", "channel-0.1000"


def first_stage(tmp_path, **fields):
    """Context and method at the first step of stage 1, its masks made."""
    trainer = plan_of(tmp_path, **{"epochs": 1, "stages": 2, **fields})
    trainer.ctx.stage = 1
    trainer.method._make_masks(trainer.ctx, 1)
    trainer.ctx.steps_per_epoch = 12
    return trainer.ctx, trainer.method


def steps(ctx, method, count: int = 12) -> list[Pass]:
    made = []
    for ctx.step in range(count):
        (only,) = method.step(ctx)
        made.append(only)
    return made


# ---- steps ---------------------------------------------------------------------------------------


def test_without_the_pivot_all_four_take_turns(tmp_path):
    made = steps(*first_stage(tmp_path, dense_pivot=False))
    assert [p.subnet for p in made] == ["dense", U, C, "dense"] * 3  # 1:1 before the first N:M
    assert [p.teacher for p in made[:3]] == [None, "dense", "dense"]


def test_without_distillation_no_step_has_a_teacher(tmp_path):
    ctx, method = first_stage(tmp_path, distill=False)
    assert {p.teacher for p in steps(ctx, method)} == {None}
    ctx.stage = 3
    assert {p.teacher for p in method.step(ctx)} == {None}


def test_paired_steps_share_batch_and_output(tmp_path, monkeypatch):
    """The sparse step sees the dense step's batch, and no forward serves as a teacher only."""
    forwards, original = [], Stepper.step

    def listen(self, *args):
        if not forwards:

            def hook(_, inputs, output):
                forwards.append((inputs[0], output.detach()))

            self.ctx.model.register_forward_hook(hook)
            forwards.append(None)
        taught = []
        distill = type(self.ctx.task).distill
        with monkeypatch.context() as patch:
            patch.setattr(
                type(self.ctx.task),
                "distill",
                lambda task, output, teacher: (
                    taught.append(teacher) or distill(task, output, teacher)
                ),
            )
            count = len(forwards)
            original(self, *args)
        if self.ctx.stage == 1:
            assert len(forwards) == count + 1
            if self.ctx.step % 7 % 2:  # seven steps an epoch
                (x, _), (before, output) = forwards[-1], forwards[-2]
                assert torch.equal(x, before)
                assert len(taught) == 1 and torch.equal(taught[0], output)
            else:
                assert not taught

    monkeypatch.setattr(Stepper, "step", listen)
    fields = {"stages": 1, "epochs": 2, "interpolation": False, "consolidate": 0, "batch_size": 32}
    paired = run(tmp_path / "paired", pair_batches=True, **fields)
    assert paired["passes"]["train"] == 28  # two stages of two epochs of seven steps, nothing else
    monkeypatch.undo()
    plain = run(tmp_path / "plain", **fields)
    assert plain["passes"]["train"] == pytest.approx(28 + 6 / 3, abs=0.06)  # teachers' forwards


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_paired_steps_resume_bit_for_bit_between_the_two(tmp_path, monkeypatch, channels_last):
    """Strides too: a shifted batch of one channel looks like channels_last to a convolution."""
    data = toy(augment=ShiftFlip(1))
    fields = {**SHORT, "model_args": {"width": 4, "classes": 3}, "channels_last": channels_last}
    fields |= {"pair_batches": True, "stages": 1, "batch_size": 32, "checkpoint_every": 1}
    whole = train("resnet8", data, tmp_path / "whole", **fields)
    original = Stepper.step

    def interrupt(self, *args):
        original(self, *args)
        if self.ctx.stage == 1 and self.ctx.step == 3:  # before the checkpoint of this step
            assert self.kept is None
            raise Interrupted(15, "now")

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", interrupt)
        with pytest.raises(Interrupted):
            train("resnet8", data, tmp_path / "broken", **fields)
    kept = load_checkpoint(tmp_path / "broken/checkpoint.safetensors")["ranks"][0]["kept"]
    assert kept["inputs"][0]["values"].shape == (32, 1, 8, 8)  # the dense half of a pair
    resumed = train("resnet8", data, tmp_path / "broken", resume=True, **fields)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert resumed["passes"] == whole["passes"]


def test_the_teacher_may_update_statistics(tmp_path):
    for name in ("frozen", "update"):
        run(tmp_path / name, teacher_statistics=name, consolidate=0, interpolation=False)
    a, b = (
        read_tensors(tmp_path / n / "pool/stage-01.safetensors")[0] for n in ("frozen", "update")
    )
    means = [name for name in a if name.endswith("running_mean")]
    assert means and not any(torch.equal(a[name], b[name]) for name in means)
    others = [name for name in a if "running" not in name and "tracked" not in name]
    assert all(torch.equal(a[name], b[name]) for name in others)  # training sees batches only


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({}, 12 + 120 * (1 + 1 / 6)),  # every second step has a teacher's forward: a third
        ({"dense_pivot": False}, 12 + 120 * (1 + 1 / 4)),  # three of four steps
        ({"distill": False}, 132),
        ({"pair_batches": True}, 132),
        ({"distill": False, "consolidate": 0.3, "consolidate_subnets": 3}, 132 + 4 * 4),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_costs_of_decisions(fields, passes):
    options = CocktailOptions(**{"consolidate": 0.0, **fields})
    assert SparseCocktail.cost(options, 12) == pytest.approx(passes)


# ---- masks ---------------------------------------------------------------------------------------


def test_measured_counts_drift_as_those_of_the_public_code():
    """Above the k-th largest score stay k - 1 units, and the next target starts from there."""
    converted = convert(models.resnet8(64), skip=["fc"])
    cocktail, method = Cocktail(converted), SparseCocktail()
    options = CocktailOptions(counts="measured", nm={})
    ctx = SimpleNamespace(options=options, cocktail=cocktail)
    kept = []
    for k in range(1, 11):
        method._make_masks(ctx, k)
        live = cocktail.subnets[str(options.patterns(k)[1])].live[0]  # a layer of 64 channels
        kept.append(int(live.sum()))
    assert kept[0] == 56  # int(64 * 0.9) - 1
    exact = [round(64 * 0.9**k) for k in range(1, 11)]
    assert all(a < b for a, b in zip(kept, exact, strict=True)) and kept[-1] <= exact[-1] - 3
    left = cocktail.bank.count(cocktail.subnets["unstructured-0.2000"].row)
    assert left == int(cocktail.bank.numel * 0.8) - 1


@pytest.mark.parametrize("counts", ["exact", "measured"])
def test_channels_of_the_output_layer_all_stay(counts):
    cocktail, method = Cocktail(convert(model())), SparseCocktail()
    options = CocktailOptions(counts=counts, prune_channel=0.5, nm={}, stages=2)
    ctx = SimpleNamespace(options=options, cocktail=cocktail)
    (head,) = cocktail.outputs
    for k in (1, 2):
        method._make_masks(ctx, k)
        live = cocktail.subnets[str(options.patterns(k)[1])].live
        assert live[head].all() and not any(alive.all() for alive in live[:head])


def test_without_umg_channels_go_by_their_own_weights(tmp_path):
    ctx, _ = first_stage(tmp_path, umg=False, prune_channel=0.4, prune_unstructured=0.9)
    live = ctx.cocktail.subnets["channel-0.4000"].live
    for layer, alive in zip(ctx.cocktail.layers.values(), live, strict=True):
        norms = layer.weight.detach().abs().flatten(1).sum(1)
        assert norms[alive].min() >= norms[~alive].max()


def test_loud_channels_pass_batchnorm(tmp_path):
    for silence in (True, False):
        folder = tmp_path / str(silence)
        run(folder, stages=1, silence=silence, prune_channel=0.5)
        cocktail = Cocktail.load(folder / "cocktail.safetensors")
        norm, name = cocktail.model.blocks[0].bn1, "channel-0.5000"
        seen = []
        norm.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y))
        with cocktail.using(name), torch.no_grad():
            cocktail.model.eval()(toy().test.inputs)
        dead = ~cocktail.subnets[name].live[0]
        assert dead.any() and (seen[0][:, dead] == 0).all() == silence


# ---- stages, search, statistics ------------------------------------------------------------------


def test_without_rewinding_a_stage_goes_on_from_the_last_weights(tmp_path, monkeypatch):
    starts, original = {}, Stepper.step

    def look(self, *args):
        if self.ctx.step == 0:
            starts[self.ctx.stage] = {k: v.clone() for k, v in self.ctx.weights().items()}
        original(self, *args)

    monkeypatch.setattr(Stepper, "step", look)
    run(tmp_path, rewind=0, consolidate=0)
    assert not (tmp_path / "rewind.safetensors").exists()
    for stage in (1, 2):
        assert same(
            starts[stage], read_tensors(tmp_path / f"pool/stage-{stage - 1:02d}.safetensors")[0]
        )


def test_without_interpolation_the_last_stage_serves_all(tmp_path):
    results = run(tmp_path, interpolation=False, consolidate=0)
    assert {s["accuracy_interpolated"] for s in results["subnets"]} == {None}
    assert not (tmp_path / "interpolated.safetensors").exists()
    final, last = weights(tmp_path), read_tensors(tmp_path / "pool/stage-02.safetensors")[0]
    assert all(torch.equal(final[f"model.{k}"], v) for k, v in last.items() if "running" not in k)


def test_no_samples_mean_the_models_own_statistics_for_all(tmp_path):
    run(tmp_path, recalibrate_samples=0)
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    assert all(s.statistics is None for s in cocktail.subnets.values())


def test_never_abandoning_tries_no_factor_of_one():
    states = [(k, {"w": torch.tensor(float(k))}) for k in (1, 2, 3)]
    best = lambda state, _: -abs(float(state["w"]) - 1.0)  # noqa: E731 - the first member is best
    for abandon, expected in ((True, 1.0), (False, 1.145)):  # 1 -> 1.05 -> 0.95 * 1.05 + 0.05 * 3
        state, choices = greedy_interpolation(states, best, abandon=abandon)
        assert float(state["w"]) == pytest.approx(expected, abs=1e-2)
        assert (1.0 in [a for a, _ in choices[0].tried]) == abandon


def test_objectives():
    options = CocktailOptions(nm={"1:2": 2}, dense_weight=3.0)
    names = ["dense", *(str(p) for k in (1, 2) for p in options.patterns(k)), "1:2"]
    scores = dict(zip(names, (90.0, 80.0, 70.0, 60.0, 50.0, 40.0), strict=True))
    method = SparseCocktail()
    assert method._objective(options, 2, scores) == pytest.approx((3 * 90 + 300) / 8)
    options.objective = "stages"  # (90 + 80 + 70 + 0) / 4 and (90 + 60 + 50 + 40) / 4
    assert method._objective(options, 2, scores) == pytest.approx(60.0)


# ---- consolidation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def menu():
    """A context with ten subnets of three patterns, whose generator follows the step."""
    cocktail = Cocktail(convert(model(), skip=["fc"]))
    for name in ("unstructured-0.2", "unstructured-0.9", "channel-0.1", "channel-0.6", "2:4"):
        cocktail.add(name)
    ctx = SimpleNamespace(cocktail=cocktail, step=0)
    ctx.generator = lambda: torch.Generator().manual_seed(ctx.step)
    return ctx


@pytest.mark.parametrize("how", ["uniform", "pattern", "sparsest"])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_drawn_subnets(menu, how, count):
    sparse = set(menu.cocktail.subnets) - {"dense"}
    seen, sparsest = set(), {"unstructured-0.9000", "channel-0.6000", "2:4"}
    for menu.step in range(60):
        drawn = draw_subnets(menu, count, how)
        assert len(drawn) == len(set(drawn)) == min(count, 5)
        assert drawn == draw_subnets(menu, count, how)
        seen |= set(drawn)
        kinds = {name.split("-")[0] for name in drawn}
        if how == "pattern":
            assert len(kinds) == min(count, 3)
        if how == "sparsest":
            assert drawn[0] in sparsest
    assert seen == (sparsest if how == "sparsest" and count == 1 else sparse)


def test_consolidation_options_reach_its_steps(tmp_path):
    fields = {"consolidate_subnets": 3, "consolidate_weight": 0.25, "consolidate_lr": 1.0}
    ctx, method = first_stage(tmp_path, **fields)
    ctx.stage = 2
    method._make_masks(ctx, 2)
    ctx.stage = 3
    pivot, *others = method.step(ctx)
    assert [p.weight for p in others] == [0.25] * 3
    assert ctx.stages[-1].lr(0) == pytest.approx(0.1)


@pytest.mark.parametrize("how", ["uniform", "pattern", "sparsest"])
def test_how_subnets_are_drawn_reaches_the_steps(tmp_path, how):
    ctx, method = first_stage(tmp_path, consolidate_draw=how, consolidate_subnets=3, nm={"1:2": 1})
    ctx.stage, others = 2, {"uniform", "pattern", "sparsest"} - {how}
    method._make_masks(ctx, 2)
    ctx.stage, made = 3, []
    for ctx.step in range(20):
        made.append([each.subnet for each in method.step(ctx)[1:]])
        assert made[-1] == draw_subnets(ctx, 3, how)
    for other in others:
        assert made != [draw_subnets(ctx, 3, other) for ctx.step in range(20)]


# ---- presets -------------------------------------------------------------------------------------


def test_paper_takes_the_recipes_lengths_and_switches_consolidation_off():
    fields = {"epochs": 2, "consolidate": 9.0, "paper": {"epochs": 7}}
    apply_preset(fields, "paper", {"lr": 0.3})
    assert fields == {"epochs": 7, "consolidate": 0.0, "interpolation": True}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("paper", {"consolidate": "1"}, "--paper means consolidate=0.0, but consolidate=1 was"),
        ("parity", {"silence": "true"}, "--parity means silence=False, but silence=true was"),
        ("prose", {}, "preset 'prose' is one of no method: --paper, --parity"),
        ("paper", {"method": "set"}, "preset 'paper' is one of method cocktail, not of set"),
    ],
)
def test_bad_presets(name, given, message):
    with pytest.raises(ValueError, match=message):
        apply_preset({}, name, given)


def test_parity_runs_and_differs(tmp_path):
    assert (
        PARITY.keys() - {"consolidate", "interpolation"}
        < vars(split_fields({})[0]).keys() | vars(CocktailOptions()).keys()
    )
    short = {name: value for name, value in SHORT.items() if name not in PARITY}
    results = train(model(), toy(), tmp_path, **{**short, **PARITY})
    config = json.loads((tmp_path / "config.json").read_text())
    assert all(config[name] == value for name, value in PARITY.items())
    assert len(results["subnets"]) == 6
    assert not any(name.startswith("statistics.") for name in weights(tmp_path))


@pytest.mark.parametrize(
    "name", ["digits", "digits-32", "patches", "cifar10", "cifar100", "imagenet"]
)
@pytest.mark.parametrize("preset", [None, "paper", "parity"])
def test_recipes_are_valid_with_every_preset(name, preset):
    fields = read_recipe(name)
    if preset:
        apply_preset(fields, preset, {})
    config, options = split_fields(fields)
    options.check(config.epochs)
    assert config.method in METHODS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"counts": "about"}, "counts='about' is not one of exact, measured"),
        ({"objective": "sum"}, "objective='sum' is not one of distinct, stages"),
        ({"consolidate_draw": "best"}, "consolidate_draw='best' is not one of uniform"),
        ({"consolidate_subnets": 0}, "consolidate_subnets=0 is below 1"),
        ({"consolidate": -1.0}, "consolidate=-1.0 is not 0 or more"),
        ({"search_samples": -5}, "search_samples=-5 is not 0 or more"),
        ({"min_lr": float("nan")}, "min_lr=nan is not 0 or more"),
        ({"pair_batches": True, "distill": False}, "pair_batches=True needs dense_pivot"),
        ({"pair_batches": True, "dense_pivot": False}, "pair_batches=True needs dense_pivot"),
        ({"rewind": -1}, r"rewind=-1 is not in \[0, epochs=12\]"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        CocktailOptions(**fields).check(12)


def test_masks_of_padding_stay_exact_without_umg(tmp_path):
    ctx, _ = first_stage(tmp_path, umg=False, nested_channels=True)
    for name, subnet in ctx.cocktail.subnets.items():
        if subnet.row is not None:
            rows = ctx.cocktail.bank.views(subnet.row)
            for bits, layer in zip(rows, ctx.cocktail.layers.values(), strict=True):
                mask = ops.unpack_mask(bits, layer.weight.shape)
                assert torch.equal(ops.pack_mask(mask), bits), name
