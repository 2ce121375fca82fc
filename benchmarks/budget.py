"""One compute budget, split between the stages and consolidation: quality against the share.

    python benchmarks/budget.py --recipe digits --folds 6 --of 10 --jobs 2 --out runs/budget-digits

The budget is what the published procedure's stages cost, in forward-backward passes of a batch (a
forward alone is a third). Every point shortens the stages and spends the rest on consolidation; for
the lengths after --interpolated the greedy search comes between, and its forwards are paid from the
same budget. All is measured by cross-validation on the training part: the test set stays unread.
Finished runs are kept, so the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from sparse_cocktail import data
from sparse_cocktail.averaging import ALPHAS
from sparse_cocktail.config import apply_preset, read_recipe, split_fields
from sparse_cocktail.files import write_atomic, write_json
from sparse_cocktail.patterns import family
from sparse_cocktail.plots import PATTERNS, save_figure
from sparse_cocktail.runs import train_all

SEED = 100  # of the first fold: apart from the seeds of reported runs


def stage_passes(epochs: float, stages: int, steps: int) -> float:
    """Passes of the dense stage and `stages` others; half of their steps need a teacher."""
    return epochs * steps * (1 + stages * (1 + 0.5 / 3))


def search_passes(options, holdout: int, batch_size: int) -> float:
    """Forwards of the greedy search, statistics mixed: every factor, stage and subnet so far."""
    subnets = 0
    for stage in range(2, options.stages + 1):
        subnets += 1 + 2 * stage + sum(made <= stage for made in options.nm.values())
    return len(ALPHAS) * subnets * holdout / batch_size / 3


def points(recipe: str, lengths: list[int], interpolated: list[int], name: str) -> list[dict]:
    """Recipe fields for each length of a stage, all of one budget."""
    paper = read_recipe(recipe)
    apply_preset(paper, "paper", {})
    config, options = split_fields(paper)
    sizes = data.load(name, config.data_dir)
    steps = sizes.steps_per_epoch(config.batch_size)
    budget = stage_passes(config.epochs, options.stages, steps)
    made = []
    for epochs, search in [(e, False) for e in lengths] + [(e, True) for e in interpolated]:
        per_epoch = steps * (1 + options.consolidate_subnets)
        rest = budget - stage_passes(epochs, options.stages, steps)
        if search:
            rest -= search_passes(options, len(sizes.holdout), config.batch_size)
        length = round(rest / per_epoch)
        if length < 0:
            raise ValueError(f"budget: {epochs} epochs a stage are more than the whole budget")
        changes = {
            "epochs": epochs,
            "interpolation": search,
            "search_samples": 0,
            "consolidate": length / epochs,
            "consolidate_lr": 1.0,
        }
        fields = {k: v for k, v in read_recipe(recipe).items() if k != "paper"}
        share = length * per_epoch / budget
        name = f"epochs-{epochs}" + ("-interpolated" if search else "")
        made.append({"name": name, "share": share, "fields": {**fields, **changes}})
    return made


def accuracies(results: dict) -> dict[str, float]:
    """Mean over the subnets of each pattern."""
    groups: dict[str, list[float]] = {}
    for subnet in results["subnets"]:
        groups.setdefault(family(subnet["pattern"]), []).append(subnet["accuracy"])
    return {name: mean(values) for name, values in groups.items()}


def collect(out: Path, made: list[dict], folds: range, of: int) -> list[dict]:
    """One row per point: means over the folds and their standard errors."""
    rows = []
    for point in made:
        epochs = point["fields"]["epochs"]
        files = [_folder(out, point, f, of) / f"seed-{SEED + f}" / "results.json" for f in folds]
        runs = [json.loads(file.read_text()) for file in files]
        scores = [accuracies(run) for run in runs]
        passes = [sum(v for k, v in run["passes"].items() if k != "evaluate") for run in runs]
        accuracy = {}
        for name in scores[0]:
            values = [score[name] for score in scores]
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            accuracy[name] = {"mean": mean(values), "error": error, "by_fold": values}
        rows.append(
            {
                "epochs": epochs,
                "interpolated": point["fields"]["interpolation"],
                "consolidation_epochs": round(point["fields"]["consolidate"] * epochs),
                "share": point["share"],
                "passes": mean(passes),
                "accuracy": accuracy,
                "revision": runs[0]["environment"]["revision"],
            }
        )
    return rows


def _folder(out: Path, point: dict, fold: int, of: int) -> Path:
    return out / point["name"] / f"fold-{fold}-of-{of}"


def table(rows: list[dict], what: str) -> str:
    names = list(rows[0]["accuracy"])
    head = ["epochs a stage", "search", "consolidation, epochs", "its share", *names, "passes"]
    lines = [
        f"# Stages against consolidation at one budget: {what}",
        "",
        "Accuracy in percent on the folds, mean over the subnets of a pattern; ± standard error "
        "over folds.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        cells = [str(row["epochs"]), "yes" if row["interpolated"] else "no"]
        cells += [str(row["consolidation_epochs"]), f"{100 * row['share']:.0f} %"]
        for name in names:
            value = row["accuracy"][name]
            error = "" if value["error"] is None else f" ± {value['error']:.2f}"
            cells.append(f"{value['mean']:.2f}{error}")
        lines.append("| " + " | ".join([*cells, f"{row['passes']:,.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def draw(figure, rows: list[dict], what: str) -> None:
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: row["share"])
    plain = [row for row in rows if not row["interpolated"]]
    for key, (title, colour, marker) in PATTERNS.items():
        if key not in rows[0]["accuracy"]:
            continue
        for search, look in ((False, {"label": title}), (True, {"ls": "none", "mfc": "white"})):
            some = [row for row in rows if row["interpolated"] == search]
            values = [row["accuracy"][key] for row in some]
            y, bars = [v["mean"] for v in values], [v["error"] or 0.0 for v in values]
            x = [100 * row["share"] for row in some]
            axes.errorbar(x, y, bars, color=colour, marker=marker, lw=1.5, capsize=2, **look)
    ticks = [100 * row["share"] for row in plain]
    labels = [f"{x:.0f} %\n({row['epochs']})" for x, row in zip(ticks, plain, strict=True)]
    axes.set_xticks(ticks, labels)
    axes.set_xlabel("Share of the budget for consolidation (in brackets: epochs left per stage)")
    axes.set_ylabel("Accuracy on the folds (%)")
    hollow = "; hollow: interpolated before" if len(plain) < len(rows) else ""
    axes.set_title(f"{what}\nbars: standard error{hollow}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--epochs", type=int, nargs="+", default=[12, 8, 6, 4, 2, 1])
    parser.add_argument("--interpolated", type=int, nargs="*", default=[], help="with the search")
    parser.add_argument("--folds", type=int, default=6, help="folds that are run")
    parser.add_argument("--of", type=int, default=10, help="folds that the training part has")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folds, name = range(given.folds), read_recipe(given.recipe)["data"]
    made = points(given.recipe, given.epochs, given.interpolated, f"{name}@0/{given.of}")
    runs = {}
    for fold in folds:
        for point in made:
            fields = {**point["fields"], "data": f"{name}@{fold}/{given.of}"}
            where = _folder(given.out, point, fold, given.of)
            runs[f"{point['name']}, fold {fold}"] = (fields, where, SEED + fold)
    train_all(runs, given.jobs, lambda n, total, run: print(f"{n}/{total}: {run}", flush=True))
    rows = collect(given.out, made, folds, given.of)
    what = f"{given.recipe}, {given.folds} of {given.of} folds of the training part"
    write_json(given.out / "budget.json", {"format": 1, "recipe": given.recipe, "rows": rows})
    write_atomic(given.out / "budget.md", lambda stream: stream.write(table(rows, what).encode()))
    save_figure(given.out / "budget.png", lambda figure: draw(figure, rows, what))
    print(table(rows, what))


if __name__ == "__main__":
    main()
