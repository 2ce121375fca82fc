"""The report of a run: its files read with care, and one HTML page that needs nothing else.

The page has no script, no link and no file beside it: pictures are inlined, and a content policy
in its head forbids the browser to fetch anything. Every text from a file is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from .files import write_atomic
from .patterns import parse
from .plots import (
    LEGEND,
    PATTERNS,
    choices_of,
    counted,
    family,
    pictures,
    plain,
    render,
    shown_table,
)

__all__ = ["read_run", "run_page", "write_page"]

# ---- what a run left -----------------------------------------------------------------------------

_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_RUN = {
    "method": str,
    "data": str,
    "model": str,
    "seed": int,
    "config": dict,
    "environment": dict,
    "seconds": dict,
    "subnets": list,
}
_SUBNET = {
    "name": str,
    "pattern": str,
    "sparsity": _NUMBER,
    "accuracy": _NUMBER,
    "accuracy_own": _MAYBE,
    "accuracy_interpolated": _MAYBE,
    "parameters": int,
    "flops": _MAYBE,
    "weights": (str, type(None)),
}
_REMEDY = "the file was edited or is another program's: take the original copy, or train again"


def read_run(folder: str | Path, op: str = "report") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The checked results and the log of a finished run; a log that is gone is an empty one.

    Raises ValueError, in the name of `op`, for a folder without a finished run and for files that
    are damaged or another program's.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not folder.is_dir():
        raise ValueError(f"{op}: run={folder} is no folder; give the one that train wrote (--out)")
    if not path.is_file():
        raise ValueError(
            f"{op}: run={folder} holds no finished run (no results.json); go on with: "
            f"sparse-cocktail train --resume --out {folder}"
        )
    results = _json(path.read_bytes(), f"{op}: {path}")
    _check_results(results, f"{op}: {path}")
    log, path = [], folder / "log.jsonl"
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        where = f"{op}: {path}, line {number},"
        log.append(_json(line, where))
        _check(log[-1], {"event": str}, where)
        if log[-1]["event"] in ("train", "stage"):
            _check(log[-1], {"stage": int, "step": int}, where)
        if log[-1]["event"] == "train":
            _check(log[-1], {"loss": dict}, where)
            for name in log[-1]["loss"]:
                parse(name)  # refuses what is no pattern
            _check(log[-1]["loss"], dict.fromkeys(log[-1]["loss"], _NUMBER), where)
    return results, log


def _check_results(results: Any, where: str) -> None:
    found = results.get("format") if isinstance(results, dict) else type(results).__name__
    if found != 1:
        raise ValueError(
            f"{where} has format={found!r:.80}, not 1: it is another program's or another "
            "version's; give the folder of a run of this version"
        )
    _check(results, _RUN, where)
    _check(results["seconds"], dict.fromkeys(results["seconds"], _NUMBER), where + ": seconds")
    for index, subnet in enumerate(results["subnets"]):
        place = f"{where}: subnets[{index}]"
        _check(subnet, _SUBNET, place)
        if family(subnet["pattern"]) not in PATTERNS:
            raise ValueError(
                f"{place} has pattern={subnet['pattern']!r:.80}, which is none of "
                f"{', '.join(PATTERNS)}; a later version may know it"
            )


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is no whole JSON ({error}); it was cut off or edited: take the original "
            "copy, or train again"
        ) from error


def _check(value: Any, fields: dict[str, Any], where: str) -> None:
    """Refuse what is no dict or lacks a field of the right type; a null one may be left out."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not an object; {_REMEDY}")
    for name, kinds in fields.items():
        found = value.get(name)
        if not isinstance(found, kinds) or isinstance(found, bool):
            raise ValueError(f"{where} has {name}={found!r:.80}, of the wrong type; {_REMEDY}")


# ---- the page ------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --text: #1d1f21; --quiet: #5c6166; --page: #fdfdfc;
  --line: #d9dadb; --band: #f3f4f4; --bar: #7d9cb8 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e2; --quiet: #a3a7ab; --page: #17191b;
  --line: #3a3e42; --band: #212427; --bar: #55789a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 56rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 Charter, "Bitstream Charter", Georgia, serif;
  overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; font-weight: 600 }
h2 { margin: 2.6rem 0 .7rem; font-size: 1.15rem; font-weight: 600 }
p { margin: .4rem 0 }
.quiet, figcaption { color: var(--quiet); font-size: .875rem }
table, dl { font: .875rem/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
  font-variant-numeric: tabular-nums }
.box { overflow-x: auto }
table { border-collapse: collapse; min-width: 24rem; overflow-wrap: normal }
.wide { width: 100%; min-width: 38rem }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; font-weight: inherit }
th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--page);
  text-align: left }
thead th { border-bottom: 1px solid var(--text); color: var(--quiet) }
tbody { border-bottom: 1px solid var(--line) }
.mean, .mean th:first-child { background: var(--band); font-weight: 600 }
.share { width: 40%; min-width: 8rem }
.share i { display: block; height: .6rem; background: var(--bar) }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 0 2rem;
  margin: 1rem 0 }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .2rem 0;
  border-bottom: 1px solid var(--line) }
dt { flex: none; color: var(--quiet) }
dd { margin: 0; min-width: 0; text-align: right }
figure { margin: 1.2rem 0 2rem }
figure img { display: block; width: 100%; height: auto; padding: .5rem; border-radius: 4px;
  background: #fff }
@page { margin: 1.8cm }
@media print { :root { color-scheme: light; --text: #000; --quiet: #444; --page: #fff;
    --line: #bbb; --band: #eee }
  body { max-width: none; padding: 0; font-size: 10pt }
  .box { overflow: visible } table, .wide { min-width: 0; font-size: 8.5pt }
  th:first-child { position: static; background: none }
  .share i { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  tr, figure, dl div { break-inside: avoid } h2 { break-after: avoid }
  figure img { padding: 0; max-width: 15cm } }
"""


def write_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a finished run to OUT (FOLDER/report.html); returns the file."""
    path = Path(folder) / "report.html" if out is None else Path(out)
    data = run_page(*read_run(folder)).encode()
    write_atomic(path, lambda file: file.write(data))
    return path


def run_page(results: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The page as text; `results` and `log` as `read_run` returns them."""
    title = "{method} on {data}, {model}, seed {seed}".format(**results)
    sections = [
        _section("Results", _subnets(results)),
        _section("Pictures", _pictures(results, log)),
        _section("Interpolation", _choices(results)),
        _section("Where the seconds went", _seconds(results["seconds"])),
        _section("Configuration", _pairs(results["config"])),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_text(results["data"])}: {counted(results)}</h1>
{_head(results)}
</header>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _text(value: Any) -> str:
    """Text from a file as HTML; what is no text is shown as JSON."""
    return escape(plain(value if isinstance(value, str) else json.dumps(value)))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def _pairs(facts: dict[str, Any]) -> str:
    rows = (f"<div><dt>{_text(k)}</dt><dd>{_text(v) or '–'}</dd></div>\n" for k, v in facts.items())
    return f"<dl>\n{''.join(rows)}</dl>" if facts else ""


def _head(results: dict[str, Any]) -> str:
    """What was run, by which versions, and how long it took."""
    facts = {name: results[name] for name in ("method", "data", "model", "seed")}
    if "total" in results["seconds"]:
        facts["time"] = _duration(results["seconds"]["total"])
    known = {k: "unknown" if v is None else v for k, v in results["environment"].items()}
    return _pairs({**facts, **known})


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _row(cells: Iterable[str], kind: str = "td", look: str = "") -> str:
    """A row of cells that are HTML already; the first one names a row of data."""
    first, *rest = cells
    scope = "col" if kind == "th" else "row"
    tail = "".join(f'<th scope="col">{c}</th>' if kind == "th" else f"<td>{c}</td>" for c in rest)
    return f'<tr{look}><th scope="{scope}">{first}</th>{tail}</tr>\n'


def _table(title: str, head: Iterable[str], bodies: Iterable[str], words: str, look="") -> str:
    """A table in a box of its own, which scrolls where the page is narrow, and words below it."""
    parts = "".join(f"<tbody>\n{body}</tbody>\n" for body in bodies)
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{_text(title)}">\n'
        f"<table{look}>\n<thead>\n{_row(map(_text, head), 'th')}</thead>\n{parts}</table>\n"
        f'</div>\n<p class="quiet">{_text(words)}</p>'
    )


def _subnets(results: dict[str, Any]) -> str:
    """All subnets with the columns of the table on the terminal."""
    columns, groups = shown_table(results)
    bodies = []
    for rows in groups:
        looks = [' class="mean"' if 0 < i == len(rows) - 1 else "" for i in range(len(rows))]
        pairs = zip(rows, looks, strict=True)
        bodies.append("".join(_row(map(_text, row), look=look) for row, look in pairs))
    return _table("All subnets", columns, bodies, LEGEND, ' class="wide"')


def _pictures(results: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The pictures of the run as vector graphics in the page itself."""
    parts = []
    for picture in pictures(results, log).values():
        data = base64.b64encode(render(picture.draw, picture.size, "svg")).decode()
        words = _text(picture.words)
        parts.append(
            f'<figure>\n<img alt="{words}" src="data:image/svg+xml;base64,{data}">\n'
            f"<figcaption>{words}</figcaption>\n</figure>"
        )
    return "\n".join(parts)


def _choices(results: dict[str, Any]) -> str:
    """The factor chosen for each stage and what it gained; nothing for a run without any."""
    rows = []
    for choice in choices_of(results):
        alone = dict(choice["tried"]).get(1.0)
        gain = "" if alone is None else f"{choice['score'] - alone:+.2f}"
        share = f"{choice['alpha']:g}", f"{1 - choice['alpha']:.2g}"
        rows.append(_row([str(choice["stage"]), *share, f"{choice['score']:.2f}", gain]))
    words = (
        "α: share of the weights so far; 1 − α: share of the stage's weights; score: mean hold-out "
        "accuracy of the subnets up to that stage in percent; gain: over leaving the stage out"
    )
    head = ("stage", "α", "1 − α", "score", "gain")
    return _table("Chosen factors", head, ["".join(rows)], words) if rows else ""


def _seconds(seconds: dict[str, float]) -> str:
    """Parts of the time as a table with bars; what no part was measured for is training."""
    parts = {name: value for name, value in seconds.items() if name != "total"}
    total = max(seconds.get("total", 0.0), sum(parts.values()))
    parts["training and all else"] = total - sum(parts.values())
    rows = []
    for name, value in sorted(parts.items(), key=lambda pair: -pair[1]):
        share = 100 * value / total if total else 0.0
        bar = f'<i style="width: {share:.1f}%"></i>'
        rows.append(
            f'<tr><th scope="row">{_text(name)}</th><td>{value:,.2f}</td><td>{share:.1f} %</td>'
            f'<td class="share">{bar}</td></tr>\n'
        )
    words = f"Total: {_duration(total)} ({total:,.2f} s)."
    head = ("part", "seconds", "share", "")
    return _table("Time", head, ["".join(rows)], words) if seconds else ""
