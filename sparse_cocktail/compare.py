"""Every training method at equal compute, over several seeds, in one table."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from . import data as data_sets
from . import models
from .cocktail import Cocktail
from .compare_tables import markdown
from .config import Config, for_method, read_recipe, split_fields
from .methods import METHODS, Context
from .methods.cocktail_options import PAPER
from .patterns import family
from .plots import choices_of
from .preparation import prepare_model
from .runs import Tell, heading, is_finished, over_runs, read_runs, told, train_all, write_summary
from .tasks import Classification

__all__ = ["ENTRIES", "Entry", "check_plans", "collect", "compare", "plan"]


@dataclass(frozen=True)
class Entry:
    """One kind of run: a method and what it trains.

    Attributes:
        name: of its folder and row.
        method: training method.
        says: what it is, in words.
        fields: recipe fields that make it what it is.
        paper: take the lengths that the recipe has for the published procedure.
    """

    name: str
    method: str
    says: str
    fields: dict[str, Any] = field(default_factory=dict)
    paper: bool = False


_KINDS = {
    "unstructured": "unstructured",
    "channel": "channel",
    "nm": "n:m",
    "both": "unstructured+n:m",
}


def _ladders(method: str, says: str, *kinds: str, **given: Any) -> list[Entry]:
    """A method once per kind of ladder; of several, each has its kind in its name."""
    return [
        Entry(
            f"{method}-{kind}" if len(kinds) > 1 else method,
            method,
            says,
            {"ladder": _KINDS[kind], **given},
        )
        for kind in kinds
    ]


ENTRIES = (
    Entry("cocktail", "cocktail", "Sparse Cocktail as the recipe has it"),
    Entry("cocktail-paper", "cocktail", "Sparse Cocktail as published", dict(PAPER), paper=True),
    *_ladders("mutualnet", "nested widths, trained together", "channel"),
    *_ladders("ast", "alternating sparse training", "unstructured", "nm", "both"),
    Entry(
        "ast-menu",
        "ast",
        "alternating sparse training of Sparse Cocktail's menu",
        {"ladder": "unstructured+channel+n:m", "dense": True, "interleave": True},
    ),
    *_ladders("acdc", "dense and sparse phases in turn", "unstructured", "channel", "nm"),
    *_ladders("spartan", "soft top-k masks", "unstructured"),
    *_ladders("sup-tickets", "averaged cheap tickets", "unstructured", base="rigl"),
    *_ladders("set", "random regrowth", "unstructured"),
    *_ladders("rigl", "regrowth by gradient", "unstructured"),
    *_ladders("granet", "gradual pruning with regrowth", "unstructured"),
    *_ladders("gmp", "gradual magnitude pruning", "unstructured", "channel", "nm"),
    Entry("imp", "imp", "iterative magnitude pruning with rewinding"),
    Entry("lottery-pools", "lottery-pools", "interpolated tickets of IMP"),
    # of the ladder's ratios: the ticket's own are those of no other channel network
    Entry("refilling", "refilling", "refilled IMP tickets", {"channel_allocation": "uniform"}),
)

# Fields that the comparison itself decides.
_DECIDED = {
    "method": "choose with --methods",
    "epochs": "it follows from the budget: give --budget",
    "seed": "give --seeds",
    "patterns": "every entry trains ladders: give --stages",
    "ladder": "every entry has its own: choose with --methods",
}


def compare(
    recipe: str,
    out: str | os.PathLike,
    seeds: Iterable[int] = range(1, 4),
    methods: Iterable[str] = (),
    changes: dict[str, Any] | None = None,
    budget: float | None = None,
    jobs: int = 1,
    tell: Tell = told,
) -> dict[str, Any]:
    """Train every entry with every seed, and write OUT/compare.json and OUT/compare.md.

    Runs lie in OUT/ENTRY/seed-S; finished ones are kept and unfinished ones resumed, so the same
    call goes on after a stop.

    Args:
        recipe: name or YAML file, of method cocktail.
        out: folder.
        seeds: one run each.
        methods: names of entries, or of methods for all entries of theirs (all by default).
        changes: recipe fields for all runs whose method knows them, such as stages.
        budget, jobs: see `plan` and `train_all`.
        tell: called after every run.

    Raises:
        ValueError: as `plan`, `check_plans` and `train_all`.
        RunFailed: as `train_all`.
    """
    seeds, out, changes = list(seeds), Path(out), changes or {}
    budget, planned = plan(recipe, methods, changes, budget)
    check_plans({n: m for n, m in planned.items() if not is_finished(out / n, seeds)})
    runs = {
        f"{name}, seed {seed}": (made, out / name, seed)
        for seed in seeds  # all entries of a seed come together
        for name, made in planned.items()
    }
    train_all(runs, jobs, tell)
    summary = collect(out, recipe, planned, seeds, changes, budget)
    write_summary(out / "compare", summary, markdown(summary))
    return summary


# ---- equal compute -------------------------------------------------------------------------------


def plan(
    recipe: str,
    methods: Iterable[str] = (),
    changes: dict[str, Any] | None = None,
    budget: float | None = None,
) -> tuple[float, dict[str, dict[str, Any]]]:
    """The budget, and the recipe fields of every chosen entry.

    An entry's epochs are the largest number whose cost is within the budget.

    Args:
        recipe, methods, changes: as in `compare`.
        budget: in forward-backward passes over the training set. None: the cost of the recipe's
            own run; Sparse Cocktail then keeps the recipe's lengths.

    Raises:
        ValueError: for an unknown name, bad fields, or a budget below an entry's first epoch.
    """
    chosen, changes = _chosen(list(methods)), changes or {}
    given = read_recipe(recipe)
    if (own := given.get("method", "cocktail")) != "cocktail":
        raise ValueError(
            f"compare: recipe {recipe} trains {own}, but the budget is that of its Sparse Cocktail "
            "run; give a recipe with method: cocktail (others have their fields under methods:)"
        )
    for name in changes:
        if name in _DECIDED:
            raise ValueError(f"compare: {name}={changes[name]!r} cannot be set; {_DECIDED[name]}")
    known = {m: _known(m) for m in {"cocktail", *(entry.method for entry in chosen)}}
    nobodys = set(changes).difference(*known.values())  # left in, for `split_fields` to refuse
    planned = {}
    for entry in (ENTRIES[0], *chosen):
        wanted = known[entry.method] | nobodys
        own = {name: value for name, value in changes.items() if name in wanted}
        planned[entry.name] = _entry_fields(given, entry, own)
    limit = _cost(planned[ENTRIES[0].name]) if budget is None else budget
    if not (limit > 0 and isfinite(limit)):
        raise ValueError(f"compare: budget={limit} is no positive number of epochs")
    for entry in chosen:
        if budget is not None or entry.method != "cocktail":
            made = planned[entry.name]
            made["epochs"] = _longest(entry, made, limit)
    return limit, {entry.name: planned[entry.name] for entry in chosen}


def _chosen(names: list[str]) -> list[Entry]:
    """Entries by name, or all of a method, in the order of ENTRIES."""
    labels = [entry.name for entry in ENTRIES]
    wanted = set()
    for name in names:
        found = {name} & set(labels) or {e.name for e in ENTRIES if e.method == name}
        if not found:
            raise ValueError(
                f"compare: {name!r} is no method and no entry; use some of {', '.join(labels)}"
            )
        wanted |= found
    return [entry for entry in ENTRIES if entry.name in wanted or not names]


def _known(method: str) -> set[str]:
    return {f.name for kind in (Config, METHODS[method].Options) for f in fields(kind)}


def _entry_fields(recipe: dict[str, Any], entry: Entry, changes: dict[str, Any]) -> dict[str, Any]:
    """The complete fields of an entry: recipe, published lengths, changes, its own."""
    made = for_method(recipe, entry.method)
    paper = made.pop("paper", {})
    if "ladder" in entry.fields:
        made.pop("patterns", None)  # they would come before the ladder
    return {**made, **(paper if entry.paper else {}), **changes, **entry.fields}


def _cost(made: dict[str, Any]) -> float:
    """Forward-backward passes over the training set of a run with these fields."""
    config, options = split_fields(made)
    return METHODS[config.method].cost(options, config.epochs)


def _longest(entry: Entry, made: dict[str, Any], budget: float) -> int:
    """The largest number of epochs within the budget. A step has a pass or more, so that a run
    costs no less than its epochs."""
    _, options = split_fields(made)
    cost = METHODS[entry.method].cost
    fitting = [n for n in range(1, int(budget) + 1) if cost(options, n) <= budget]
    if not fitting:
        raise ValueError(
            f"compare: budget={budget:.6g} is too small for {entry.name}: one epoch of each of its "
            f"stages or networks costs {cost(options, 1):.6g}; raise --budget, lower --stages, or "
            "leave it out of --methods"
        )
    return fitting[-1]


def check_plans(planned: dict[str, dict[str, Any]]) -> None:
    """Let every entry's method plan its stages, so that none is refused when its turn comes.

    Data are loaded and networks built for it, on the CPU.

    Args:
        planned: recipe fields by entry.

    Raises:
        ValueError: for fields that make no run of the entry's epochs, model and data.
    """
    load = functools.cache(data_sets.load)
    for name, made in planned.items():
        config, options = split_fields(made)
        data, cpu = load(config.data, config.data_dir), torch.device("cpu")
        with torch.random.fork_rng(devices=[]):
            plain = models.create(config.model, config.model_args)
            model = prepare_model(plain, config, data.example(2), cpu)
        ctx = Context(
            config=config,
            options=options,
            cocktail=Cocktail(model),
            data=data,
            task=Classification(),
            folder=Path(),
            device=cpu,
            network=model,
            log=lambda event, **values: None,
            steps_per_epoch=data.steps_per_epoch(config.batch_size, 1),
        )
        try:
            METHODS[config.method]().plan(ctx)
        except ValueError as error:
            raise ValueError(
                f"compare: {name} cannot train with its epochs={config.epochs}: {error}; raise "
                "--budget, or change the field, with --set or in the recipe"
            ) from error


# ---- what came out -------------------------------------------------------------------------------


def collect(
    out: str | os.PathLike,
    recipe: str,
    planned: dict[str, dict[str, Any]],
    seeds: list[int],
    changes: dict[str, Any],
    budget: float,
) -> dict[str, Any]:
    """Means and standard deviations over seeds, from the runs' results.json.

    Args:
        out, recipe, seeds, changes: as in `compare`.
        planned, budget: as `plan` returns them.
    """
    entries = {entry.name: entry for entry in ENTRIES}
    rows = []
    for name, made in planned.items():
        results = read_runs(Path(out) / name, seeds)
        rows.append(_row(entries[name], made, results))
    return {**heading(recipe, changes, seeds, results[0]), "budget": budget, "rows": rows}


def _row(entry: Entry, made: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    subnets = results[0]["subnets"]
    families = [family(s["pattern"]) for s in subnets]
    sets: dict[str | None, set[str]] = {}  # families by the weights that they share
    for subnet, kind in zip(subnets, families, strict=True):
        sets.setdefault(subnet.get("weights"), set()).add(kind)
    row = {
        "name": entry.name,
        "says": entry.says,
        "method": entry.method,
        "fields": entry.fields,
        "epochs": results[0]["config"]["epochs"],
        "cost": _cost(made),
        **over_runs(results),
        "counts": {kind: families.count(kind) for kind in dict.fromkeys(families)},
        "co_trains": any(len(kinds - {"dense"}) > 1 for kinds in sets.values()),
        "weight_sets": len(sets),
        "parameters": float(len(sets)),  # of all weight sets, in dense networks
        "evaluating": mean(r["seconds"].get("evaluate", 0.0) for r in results),
        "choices": [choices_of(r) for r in results] if entry.method == "cocktail" else [],
    }
    for subnet, source in zip(row["subnets"], subnets, strict=True):
        subnet["weights"] = source.get("weights")
    row["passes_per_subnet"] = row["passes"] / len(subnets)
    return row
