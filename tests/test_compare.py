"""`compare`: equal compute for every method, what is trained again, the tables and pictures."""

import json
import subprocess
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import yaml
from commands import call

from sparse_cocktail import cli, runs
from sparse_cocktail.compare import ENTRIES, check_plans, collect, compare, plan
from sparse_cocktail.compare_plots import LOOKS, plot_comparison
from sparse_cocktail.compare_tables import markdown, rungs
from sparse_cocktail.config import split_fields
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.cocktail_options import PAPER
from sparse_cocktail.patterns import family, parse

RECIPE = {
    "data": "digits",
    "model": "resnet8",
    "model_args": {"width": 4, "inputs": 1, "classes": 10},
    "epochs": 1,
    "stages": 2,
    "batch_size": 256,
    "threads": 1,
    "search_samples": 0,
    "recalibrate_samples": 256,
    "consolidate": 1.0,
    "paper": {"epochs": 2, "rewind": 1},
    "methods": {"mutualnet": {"lr": 0.05}},
}
BUDGET = 1 + 2 * 7 / 6 + 3  # the dense stage, two with a teacher every other step, three passes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def cost(fields, epochs=None):
    config, options = split_fields(fields)
    return METHODS[config.method].cost(options, epochs or config.epochs)


# ---- equal compute -------------------------------------------------------------------------------


def test_every_method_has_an_entry():
    assert {entry.method for entry in ENTRIES} == set(METHODS)
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_the_recipes_own_run_is_the_budget(recipe):
    budget, planned = plan(recipe, ["cocktail", "cocktail-paper"])
    assert budget == pytest.approx(BUDGET)
    assert cost(planned["cocktail"]) == budget
    assert planned["cocktail"]["epochs"] == 1
    paper = planned["cocktail-paper"]
    assert paper["epochs"] == 2  # the recipe's length, whatever it costs
    assert {name: paper[name] for name in PAPER} == PAPER


@pytest.mark.parametrize("name", [e.name for e in ENTRIES if e.method != "cocktail"])
@pytest.mark.parametrize("budget", [None, 400.5], ids=["recipe", "given"])
def test_epochs_are_the_largest_number_within_the_budget(name, budget):
    limit, planned = plan("digits", [name], budget=budget)
    fields = planned[name]
    assert limit == (budget or pytest.approx(4 + 40 * 7 / 6 + 34 * 3))
    assert cost(fields) <= limit < cost(fields, fields["epochs"] + 1)


def test_a_given_budget_is_for_all(recipe):
    budget, planned = plan(recipe, ["cocktail", "cocktail-paper"], budget=20)
    assert budget == 20
    assert planned["cocktail"]["epochs"] == 3  # 6.33 for each
    assert planned["cocktail-paper"]["epochs"] == 6  # 3.33 for each
    assert plan(recipe, ["cocktail"], budget=BUDGET + 1e-9)[1]["cocktail"]["epochs"] == 1


@pytest.mark.parametrize(
    ("cost_of", "epochs"),
    [
        (lambda n: 2.0 * n, 3),
        (lambda n: n + 3.0, 3),
        (lambda n: n + 1.0, 5),
        (lambda n: 6 * n, 1),
        (lambda n: n + (0 if n % 2 else 3), 5),  # rounded phases: not always dearer
    ],
    ids=["twice", "search", "one more", "dear", "uneven"],
)
def test_epochs_by_hand(recipe, monkeypatch, cost_of, epochs):
    toy = type("Toy", (METHODS["mutualnet"],), {"cost": lambda options, n: cost_of(n)})
    monkeypatch.setitem(METHODS, "mutualnet", toy)
    assert plan(recipe, ["mutualnet"])[1]["mutualnet"]["epochs"] == epochs


def test_fields_come_from_recipe_changes_and_entry(recipe):
    changes = {"stages": 1, "beta": 0.5, "weight_decay": 0.0}
    _, planned = plan(recipe, ["cocktail", "cocktail-paper", "mutualnet"], changes, 8)
    assert [fields["stages"] for fields in planned.values()] == [1, 1, 1]
    assert [fields.get("beta") for fields in planned.values()] == [0.5, 0.5, None]
    mutual = planned["mutualnet"]
    assert (mutual["lr"], mutual["ladder"], mutual["threads"]) == (0.05, "channel", 1)
    assert not {"consolidate", "paper", "methods"} & set(mutual)


def test_an_entrys_ladder_comes_before_the_recipes_patterns(tmp_path):
    path = tmp_path / "own.yaml"
    methods = {"gmp": {"patterns": "unstructured-0.9", "ladder": "n:m", "lr": 0.05}}
    path.write_text(yaml.safe_dump({**RECIPE, "methods": methods}))
    for name, kind in (("gmp-channel", "channel"), ("gmp-unstructured", "unstructured")):
        fields = plan(str(path), [name], budget=20)[1][name]
        _, options = split_fields(fields)
        assert {family(p.kind) for p in options.menu()} == {kind} and len(options.menu()) == 2
        assert fields["lr"] == 0.05


def test_every_entry_can_train_with_the_digits_recipe():
    check_plans(plan("digits")[1])


def test_what_cannot_train_is_refused_before_the_first_run(recipe, tmp_path):
    """Each of these is refused by a method's own plan, for the epochs that the budget leaves."""
    narrow = {"model_args": {"width": 3, "inputs": 1, "classes": 10}}
    for name, field, message in (
        ("imp", {"rewind": 3}, r"imp .* epochs=2: imp: rewind=3 is not in \[0, epochs=2\]"),
        ("gmp-unstructured", {"ramp_start": 4, "ramp_end": 5}, r"gmp-unst.*: gmp: ramp_start=4"),
        ("gmp-nm", narrow, r"gmp-nm .*: gmp: no masked layer of resnet8 can take 4:8"),
    ):
        with pytest.raises(ValueError, match=f"compare: {message}.*raise --budget, or"):
            compare(recipe, tmp_path, (1,), [name], field, 6)
        assert not list(tmp_path.iterdir())


def test_names_are_entries_or_methods(recipe):
    assert list(plan(recipe, ["acdc"], budget=50)[1]) == [
        "acdc-unstructured",
        "acdc-channel",
        "acdc-nm",
    ]
    assert list(plan(recipe, ["acdc-nm", "cocktail"], budget=50)[1]) == ["cocktail", "acdc-nm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "none"], "'none' is no method and no entry; use some of cocktail"),
        (["--set", "lr"], "compare: --set 'lr' is not FIELD=VALUE"),
        (["--set", "epochs=3"], "epochs=3 cannot be set; it follows from the budget"),
        (["--methods", "cocktail", "--set", "stagess=3"], "'stagess' is unknown; did you mean st"),
        (["--recipe", "none"], "recipe 'none' is neither one of"),
        (["--budget", "-1"], "budget=-1.0 is no positive number"),
        (["--budget", "nan"], "budget=nan is no positive number"),
        (
            ["--methods", "mutualnet", "--budget", "3.9"],
            "budget=3.9 is too small for mutualnet: one epoch of each of its stages or networks "
            "costs 4; raise --budget",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    code, _, error = call("compare", "--out", tmp_path, *arguments)
    assert code == 2 and message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_another_method_is_refused(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("method: mutualnet\n")
    with pytest.raises(ValueError, match="other.yaml trains mutualnet, but the budget is that"):
        plan(str(path), ["mutualnet"], budget=100)


# ---- tables --------------------------------------------------------------------------------------


def write_results(folder: Path, seed: int, method: str, names: dict[str, str | None], base: float):
    """A results.json with subnets {name, or "dense/N": weights}; accuracies fall by a point."""
    subnets = []
    for index, (name, weights) in enumerate(names.items()):
        pattern = parse(name.partition("/")[0])
        facts = {"name": str(pattern), "pattern": pattern.kind, "sparsity": pattern.sparsity}
        subnets.append({**facts, "accuracy": base - index + 0.5 * seed, "weights": weights})
    results = {
        "data": "toy",
        "model": "resnet8",
        "environment": {},
        "config": {"epochs": 7},
        "passes": {"train": 90.0, "interpolate": 6.0, "evaluate": 50.0},
        "seconds": {"total": 100.0, "evaluate": 30.0},
        "subnets": subnets,
        "method_state": {"choices": []},
    }
    path = folder / f"seed-{seed}"
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))


LADDER = [f"unstructured-{1 - 0.8**k:.4f}" for k in range(1, 11)]
CHANNELS = [f"channel-{1 - 0.9**k:.4f}" for k in range(1, 4)]


@pytest.fixture
def made(tmp_path):
    """A folder of three entries with two seeds, and its summary."""
    names = ["cocktail", "acdc-unstructured", "ast-nm"]
    together = dict.fromkeys(["dense", *LADDER, *CHANNELS, "2:4", "1:2"])
    pairs = {}
    for name in LADDER[:2]:
        pairs |= {f"dense/{name}": f"networks/dense-{name}.safetensors"}
        pairs |= {name: f"networks/{name}.safetensors"}
    for seed in (1, 2):
        write_results(tmp_path / "cocktail", seed, "cocktail", together, 90)
        write_results(tmp_path / "acdc-unstructured", seed, "acdc", pairs, 80)
        write_results(tmp_path / "ast-nm", seed, "ast", dict.fromkeys(["1:2", "2:4"]), 70)
    budget, planned = plan("digits", names)
    return tmp_path, collect(tmp_path, "digits", planned, [1, 2], {}, budget)


def row_of(text, section, *cells):
    """The one table row of a section that begins with these cells."""
    body = text.partition(f"## {section}")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in body.splitlines() if x[:1] == "|"]
    (found,) = [row for row in rows if row[: len(cells)] == list(cells)]
    return found


def test_the_summary_of_runs(made):
    _, summary = made
    rows = {row["name"]: row for row in summary["rows"]}
    pair = rows["acdc-unstructured"]
    of_seed = [mean([80 + 0.5 * seed, 78 + 0.5 * seed]) for seed in (1, 2)]
    assert pair["accuracy"]["dense"] == {
        "mean": mean(of_seed),
        "std": stdev(of_seed),
        "by_seed": of_seed,
    }
    assert pair["counts"] == {"dense": 2, "unstructured": 2}
    assert list(rows) == ["cocktail", "ast-nm", "acdc-unstructured"]
    assert [row["weight_sets"] for row in rows.values()] == [1, 1, 4]
    assert [row["parameters"] for row in rows.values()] == [1.0, 1.0, 4.0]
    assert [row["co_trains"] for row in rows.values()] == [True, False, False]
    assert {row["passes"] for row in rows.values()} == {96.0}
    assert [row["passes_per_subnet"] for row in rows.values()] == [6.0, 48.0, 24.0]
    assert pair["subnets"][1]["weights"] == f"networks/{LADDER[0]}.safetensors"
    assert [row["epochs"] for row in rows.values()] == [7, 7, 7]
    assert summary["budget"] == rows["cocktail"]["cost"] >= pair["cost"] > 0


def test_table_of_averages(made):
    text = markdown(made[1])
    assert row_of(text, "Average", "cocktail", "✓", "dense")[3:] == ["90.75 ± 0.35", "1"]
    assert row_of(text, "Average", "acdc-unstructured", "✗", "dense")[3:] == ["79.75 ± 0.35", "2"]
    assert row_of(text, "Average", "ast-nm", "✗", "n:m")[3:] == ["70.25 ± 0.35", "2"]


def test_tables_by_ratio_show_the_papers_rungs(made):
    text = markdown(made[1])
    head = row_of(text, "Unstructured", "method")
    assert head[1:] == ["0.20 (k=1)", "0.49 (k=3)", "0.74 (k=6)", "0.87 (k=9)"]
    accuracies = [f"{90.75 - k:.2f} ± 0.35" for k in (1, 3, 6, 9)]
    assert row_of(text, "Unstructured", "cocktail")[1:] == accuracies
    assert row_of(text, "Unstructured", "acdc-unstructured")[1:] == ["79.75 ± 0.35", "", "", ""]
    assert row_of(text, "Channel", "method")[1:] == ["0.10 (k=1)", "0.19 (k=2)", "0.27 (k=3)"]
    assert row_of(text, "N:M", "method")[1:] == ["1:2", "2:4"]
    assert row_of(text, "N:M", "ast-nm")[1:] == ["70.75 ± 0.35", "69.75 ± 0.35"]
    assert [k for k, _ in rungs(made[1], "unstructured")] == list(range(1, 11))


def test_tables_of_parameters_and_compute(made):
    text = markdown(made[1])
    assert row_of(text, "Parameters", "cocktail")[1:] == ["1x", "1", "16", "16"]
    assert row_of(text, "Parameters", "acdc-unstructured")[1:] == ["4x", "4", "4", "1"]
    assert row_of(text, "Compute", "acdc-unstructured")[3:] == ["96", "24.0", "70 s"]


# ---- runs ----------------------------------------------------------------------------------------

NAMES = ["cocktail-paper", "mutualnet"]


class Here:
    """A process that is none: the command runs in this one, which has Torch imported already.

    Processes of their own are what test_ablation.py has.
    """

    started: list = []

    def __init__(self, command, **_):
        self.started.append(command)
        self.command, self.returncode = command, None

    def communicate(self):
        arguments = self.command[self.command.index("sparse_cocktail.cli") + 1 :]
        cli.app(arguments, standalone_mode=False)
        self.returncode = 0
        return None, ""


HERE = SimpleNamespace(**{**vars(subprocess), "Popen": Here})


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    """Folder and summary of two entries."""
    out, told = tmp_path_factory.mktemp("compare"), []
    changes = {"lr": 0.04}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "subprocess", HERE)
        summary = compare(recipe, out, (1,), NAMES, changes, 6, 1, lambda *what: told.append(what))
    assert [(d, total) for d, total, _ in told] == [(1, 2), (2, 2)]
    return out, summary


def test_runs_cost_what_was_planned(done):
    out, summary = done
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(summary))
    assert (out / "compare.md").read_text() == markdown(summary)
    paper, mutual = summary["rows"]
    assert (paper["epochs"], mutual["epochs"]) == (1, 2)  # 3.33 and 3 for each
    for row in (paper, mutual):
        run = out / row["name"] / "seed-1"
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        steps = max(line["step"] for line in log) / row["epochs"]  # of an epoch
        passes = json.loads((run / "results.json").read_text())["passes"]
        # five steps: an odd one, and a last batch that is not full
        assert passes["train"] == pytest.approx(row["cost"] * steps, rel=0.1)
        assert row["passes"] == pytest.approx(passes["train"] + passes.get("interpolate", 0))
    assert {family(s["pattern"]) for s in mutual["subnets"]} == {"dense", "channel"}


def test_only_what_is_not_finished_is_trained(done, recipe, monkeypatch):
    out, summary = done
    monkeypatch.setattr(runs, "subprocess", HERE)
    monkeypatch.setattr(Here, "started", started := [])
    again = compare(recipe, out, (1,), NAMES, {"lr": 0.04}, 6)
    assert started == [] and again == summary
    kept = (out / "cocktail-paper/seed-1/results.json").read_bytes()
    (out / "mutualnet/seed-1/results.json").unlink()
    again = compare(recipe, out, (1,), NAMES, {"lr": 0.04}, 6)
    ((*_, folder, resume),) = started
    assert (folder, resume) == (str(out / "mutualnet/seed-1"), "--resume")
    assert [row["accuracy"] for row in again["rows"]] == [r["accuracy"] for r in summary["rows"]]
    assert (out / "cocktail-paper/seed-1/results.json").read_bytes() == kept
    with pytest.raises(ValueError, match="with other fields .*epochs.*; choose another --out"):
        compare(recipe, out, (1,), NAMES, {"lr": 0.04}, 8)


def test_the_command(recipe, done):
    out, _ = done
    arguments = ["--recipe", recipe, "--out", out, "--seeds", 1, "--methods", ",".join(NAMES)]
    arguments += ["--set", "lr=0.04", "--budget", 6, "--stages", 2]
    code, text, error = call("compare", *arguments)
    assert code == 0, error
    for name in (*NAMES, "compare.md", "curves.png", "search.png"):
        assert name in text
    assert "6.00 epochs of passes per run" in " ".join(text.split())  # as wide as the table


def test_pictures(made):
    out, summary = made
    for row in summary["rows"][:1]:  # as after a search of two stages
        choice = {"stage": 2, "alpha": 0.5, "score": 90.0, "tried": [[0.5, 90.0], [1.0, 89.0]]}
        row["choices"] = [[choice], [choice]]
    (out / "compare.json").write_text(json.dumps(summary))
    pictures = plot_comparison(out)
    assert [p.name for p in pictures] == ["curves.png", "search.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_curves_have_a_line_per_method_and_a_panel_per_pattern(made):
    from matplotlib.figure import Figure

    from sparse_cocktail.ablation_plots import draw_curves

    figure, (_, summary) = Figure(figsize=(13, 5), layout="constrained"), made
    rows = {row["name"]: row for row in summary["rows"]}
    draw_curves(figure, summary, rows, {name: LOOKS[name] for name in rows})
    figure.canvas.draw()
    lines = [len(panel.containers) for panel in figure.axes]
    assert [panel.get_title() for panel in figure.axes] == ["Unstructured", "Channel", "N:M"]
    assert lines == [2, 1, 2]
    _, acdc = figure.axes[0].containers
    xy = [(20.0, 79.75), (36.0, 77.75)]
    assert [tuple(p) for p in acdc.lines[0].get_xydata().round(2)] == xy
    assert [t.get_text() for t in figure.axes[2].get_xticklabels()] == ["1:2", "2:4"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["cocktail", "acdc", "ast"]


def test_methods_look_different():
    looks = set(LOOKS.values())
    assert set(LOOKS) == {entry.name for entry in ENTRIES}
    for part in ((0,), (2,), (1, 3)):  # label, marker, colour with line
        assert len({tuple(look[i] for i in part) for look in looks}) == len(looks)
