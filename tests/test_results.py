"""Committed results belong to the recipes as they are, and the README quotes them as they are."""

import json
import math
from pathlib import Path
from statistics import mean, stdev

import pytest

from sparse_cocktail.ablation import VARIANTS, markdown
from sparse_cocktail.compare import ENTRIES
from sparse_cocktail.compare_tables import markdown as compared_markdown
from sparse_cocktail.config import for_method, read_recipe
from sparse_cocktail.patterns import family

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "benchmarks/results").glob("*/ablation.json"))


def load(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_runs_were_made_with_the_recipe(folder):
    fields = for_method(read_recipe(folder.name))
    del fields["paper"]
    files = sorted(folder.glob("seed-*.json"))
    assert len(files) >= 3
    for file in files:
        results = load(file)
        differ = {k: v for k, v in fields.items() if results["config"].get(k) != v}
        assert not differ, f"{file} was made with other fields: run the recipe again"
        assert "dirty" not in results["environment"]["revision"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_the_ablation_holds_the_same_runs(folder):
    summary = load(folder / "ablation.json")
    assert (folder / "ablation.md").read_text() == markdown(summary)
    known = {v.name: v for v in VARIANTS}
    assert all(row["fields"] == known[row["name"]].fields for row in summary["rows"])
    (default,) = [row for row in summary["rows"] if row["name"] == "default"]
    for place, seed in enumerate(summary["seeds"]):
        subnets = load(folder / f"seed-{seed}.json")["subnets"]
        for name in ("dense", "unstructured", "channel", "n:m"):
            values = [s["accuracy"] for s in subnets if family(s["pattern"]) == name]
            assert math.isclose(default["accuracy"][name]["by_seed"][place], mean(values))


def test_the_readme_quotes_the_digits_runs():
    text = (ROOT / "README.md").read_text()
    runs = [load(file) for file in sorted((ROOT / "benchmarks/results/digits").glob("seed-*.json"))]
    for name in ("dense", "unstructured", "channel", "n:m"):
        of_seed = [
            mean(s["accuracy"] for s in run["subnets"] if family(s["pattern"]) == name)
            for run in runs
        ]
        assert f"**{mean(of_seed):.2f}** ± {stdev(of_seed):.2f}" in text


def test_the_budget_is_what_runs_cost(monkeypatch):
    """The curve's arithmetic against the passes that real runs counted."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import budget

    points = budget.points("digits", [12, 4, 1], [4], "digits")
    for point in points[:3]:
        fields = point["fields"]
        spent = budget.stage_passes(fields["epochs"], 10, 20) + 60 * point["share"] * 3040 / 60
        assert spent == pytest.approx(3040, abs=31)  # half an epoch of consolidation
    default = load(ROOT / "benchmarks/results/digits/seed-1.json")
    length = round(points[1]["fields"]["consolidate"] * 4)
    assert length == round(default["config"]["consolidate"] * 4) == 34
    expected = budget.stage_passes(4, 10, 20) + length * 20 * 3
    assert default["passes"]["train"] == pytest.approx(expected, abs=1)
    assert points[3]["share"] < points[1]["share"]  # the search is paid from the same budget


# ---- the comparison of methods -------------------------------------------------------------------

COMPARED = ROOT / "benchmarks/results/digits/compare.json"


def test_the_comparison_is_of_all_entries_on_one_revision():
    summary = load(COMPARED)
    assert [row["name"] for row in summary["rows"]] == [entry.name for entry in ENTRIES]
    assert len(summary["seeds"]) >= 3 and "dirty" not in summary["environment"]["revision"]
    assert COMPARED.with_suffix(".md").read_text() == compared_markdown(summary)


@pytest.mark.parametrize(
    "name, quoted",
    [("3x", "99.1 / 98.9 / 99.1 %"), ("third", "99.3 / 97.7 / 99.2 %")],
    ids=["3x", "third"],
)
def test_the_readme_quotes_other_budgets(name, quoted):
    file = COMPARED.with_name(f"compare-{name}.json")
    summary = load(file)
    assert file.with_suffix(".md").read_text() == compared_markdown(summary)
    found = {n: v["mean"] for row in summary["rows"] for n, v in row["accuracy"].items()}
    means = " / ".join(f"{found[n]:.1f}" for n in ("unstructured", "channel", "n:m"))
    assert f"{means} %" == quoted and quoted in (ROOT / "README.md").read_text()


def test_the_comparison_holds_the_recipes_own_runs():
    summary = load(COMPARED)
    (own,) = [row for row in summary["rows"] if row["name"] == "cocktail"]
    for place, seed in enumerate(summary["seeds"]):
        subnets = load(COMPARED.parent / f"seed-{seed}.json")["subnets"]
        for name in ("dense", "unstructured", "channel", "n:m"):
            values = [s["accuracy"] for s in subnets if family(s["pattern"]) == name]
            assert math.isclose(own["accuracy"][name]["by_seed"][place], mean(values))


def test_the_readme_quotes_the_comparison():
    text = (ROOT / "README.md").read_text()
    for row in load(COMPARED)["rows"]:
        for name, value in row["accuracy"].items():
            if name not in ("dense", "all"):
                assert f"{value['mean']:.2f} ± {value['std']:.2f}" in text, (row["name"], name)
