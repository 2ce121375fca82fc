"""Tables of a comparison of methods, in the form of Sparse Cocktail's Tables 1, 2, 3 and 11."""

from __future__ import annotations

from statistics import mean
from typing import Any

from .patterns import family
from .plots import PATTERNS
from .runs import markdown_table, over_seeds, spread

__all__ = ["markdown", "rungs"]

_SHOWN = (1, 3, 6, 9)  # rungs in the paper's Table 2


def rungs(summary: dict[str, Any], kind: str) -> list[tuple[int, dict[str, Any]]]:
    """All subnets {name, nominal} of one family that some row has, with their number from 1."""
    found = {
        s["name"]: {"name": s["name"], "nominal": s["nominal"]}
        for row in summary["rows"]
        for s in row["subnets"]
        if family(s["pattern"]) == kind
    }
    order = sorted(found.values(), key=lambda s: (s["nominal"], len(s["name"]), s["name"]))
    return list(enumerate(order, 1))


def markdown(summary: dict[str, Any]) -> str:
    """The paper's Tables 1, 2, 3 and 11 as Markdown, with what their columns mean."""
    seeds = ", ".join(map(str, summary["seeds"]))
    lines = [
        f"# Methods at equal compute: {summary['recipe']} ({summary['model']} on "
        f"{summary['data']})",
        "",
        f"Every run may spend {summary['budget']:.2f} epochs of forward-backward passes over the "
        "training set, all of its stages and networks together; its epochs are the largest number "
        f"that this allows. Test accuracy in percent, mean over the seeds {seeds}; ± is the "
        "standard deviation over seeds.",
        "",
        "## Average accuracy",
        "",
        "Mean over the sparsity ratios of a pattern. Co-trains: one weight set serves several "
        "patterns besides the dense network.",
        "",
        *markdown_table(
            ("method", "co-trains patterns", "pattern", "avg. accuracy", "sub-nets"),
            _averages(summary),
        ),
    ]
    for kind, (title, *_) in PATTERNS.items():
        if kind != "dense" and any(kind in row["accuracy"] for row in summary["rows"]):
            lines += ["", f"## {title}: accuracy by sparsity", "", *_by_ratio(summary, kind)]
    lines += [
        "",
        "## Parameters",
        "",
        "Param #: parameters of all weight sets, in dense networks (masks are not counted); "
        "networks: weight sets; sub-nets: the dense networks included.",
        "",
        *markdown_table(
            ("method", "Param #", "networks", "sub-nets", "sub-nets per network"),
            _parameters(summary),
        ),
        "",
        "## Compute",
        "",
        "Epochs: of each stage or network. Cost: what they add up to by the method's formula, in "
        "epochs of passes. Passes: counted in the run, of one batch, forward and backward; a "
        "forward alone is a third. Searches on the hold-out part come on top of the cost, and are "
        "in the passes. Neither passes nor time contain measuring for the report.",
        "",
        *markdown_table(
            ("method", "epochs", "cost", "passes", "passes per sub-net", "training time"),
            _compute(summary),
        ),
    ]
    return "\n".join(lines) + "\n"


def _averages(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [row["name"], "✓" if row["co_trains"] else "✗", kind]
        + [spread(row["accuracy"][kind]), str(count)]
        for row in summary["rows"]
        for kind, count in row["counts"].items()
    ]


def _by_ratio(summary: dict[str, Any], kind: str) -> list[str]:
    """One family: a column per ratio; of more than six, the paper's four."""
    ladder = rungs(summary, kind)
    shown = [(k, s) for k, s in ladder if len(ladder) <= 6 or k in _SHOWN]
    head = [
        f"{s['nominal']:.2f} (k={k})" if kind in ("unstructured", "channel") else s["name"]
        for k, s in shown
    ]
    rows = []
    for row in summary["rows"]:
        if kind in row["accuracy"]:
            rows.append([row["name"], *(_of_subnet(row, s["name"]) for _, s in shown)])
    return markdown_table(["method", *head], rows)


def _of_subnet(row: dict[str, Any], name: str) -> str:
    """A subnet's accuracy; the mean where it computes with several weight sets."""
    values = [s["by_seed"] for s in row["subnets"] if s["name"] == name]
    return spread(over_seeds([mean(v) for v in zip(*values, strict=True)])) if values else ""


def _parameters(summary: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in summary["rows"]:
        sets, subnets = row["weight_sets"], len(row["subnets"])
        numbers = [f"{row['parameters']:.4g}x", str(sets), str(subnets), f"{subnets / sets:.4g}"]
        rows.append([row["name"], *numbers])
    return rows


def _compute(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [
            row["name"],
            str(row["epochs"]),
            f"{row['cost']:.2f}",
            f"{row['passes']:,.0f}",
            f"{row['passes_per_subnet']:,.1f}",
            f"{row['seconds'] - row['evaluating']:,.0f} s",
        ]
        for row in summary["rows"]
    ]
