"""The page of a run: well-formed, alone, complete, and safe whatever the files say."""

import base64
import copy
import json
import re
from html.parser import HTMLParser

import pytest
from commands import call

from sparse_cocktail.page import read_run, run_page, write_page

RESULTS = {
    "format": 1,
    "method": "cocktail",
    "data": "digits",
    "model": "resnet8",
    "seed": 7,
    "config": {"epochs": 12, "nm": {"1:2": 2}, "init": "", "compile": False, "note": "a & b"},
    "environment": {"sparse_cocktail": "0.1.0", "revision": None, "torch": "2.13.0"},
    "seconds": {"total": 100.0, "evaluate": 5.0, "mask": 0.5, "interpolate": 20.0},
    "subnets": [
        {
            "name": name,
            "pattern": pattern,
            "sparsity": sparsity,
            "accuracy": accuracy,
            "accuracy_own": accuracy - 1,
            "accuracy_interpolated": accuracy - 2,
            "nnz": 10,
            "parameters": 1234,
            "flops": 5678,
        }
        for name, pattern, sparsity, accuracy in (
            ("dense", "dense", 0.0, 99.25),
            ("unstructured-0.2000", "unstructured", 0.2, 98.5),
            ("unstructured-0.3600", "unstructured", 0.36, 97.0),
            ("2:4", "2:4", 0.5, 96.75),
        )
    ],
    "method_state": {
        "choices": [{"stage": 2, "alpha": 0.4, "score": 96.5, "tried": [[0.4, 96.5], [1.0, 94.0]]}]
    },
}
LOG = [{"event": "train", "stage": 0, "step": 5, "loss": {"dense": 2.0}}]
HOSTILE = (
    "<script>alert(\"x\")</script>' onload='x' &amp; <img src=http://evil.example/x> \ud800\x00"
)
VOID = {"meta", "img", "br", "hr", "link", "input", "source"}


@pytest.fixture
def results():
    return copy.deepcopy(RESULTS)


class Page(HTMLParser):
    """Elements and texts of a page; raises where elements are not nested."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.cells, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), (tag, names)
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th", "dd", "dt"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes no open element"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "dd", "dt"):
            self.cells[-1] += data
        self.text.append(data)

    def values(self, attribute):
        return [value for _, name, value in self.attributes if name == attribute]


def save(folder, results, log=LOG):
    (folder / "results.json").write_text(json.dumps(results))
    if log is not None:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_the_page_is_one_well_formed_document(results):
    text = run_page(results, LOG)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    for tag in ("html", "head", "title", "body", "main", "h1"):
        assert page.tags.count(tag) == 1
    assert not {"script", "link", "iframe", "object", "a", "base"} & set(page.tags)
    assert text == run_page(results, LOG)  # equal content gives equal bytes


def test_nothing_is_fetched_from_elsewhere(results):
    text = run_page(results, LOG)
    page = Page(text)
    assert not page.values("href") and not page.values("srcset")
    assert len(page.values("src")) == 3
    for source in page.values("src"):
        head, data = source.split(",")
        assert head == "data:image/svg+xml;base64"
        picture = base64.b64decode(data).decode()
        assert "<svg" in picture and "<script" not in picture
        links = re.findall(r'(?:href|src)="([^"]*)"', picture) + re.findall(
            r"url\(([^)]*)\)", picture
        )
        assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in text and "url(" not in text
    (policy,) = [v for v in page.values("content") if "default-src" in v]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_subnet_with_its_numbers_and_the_means(results):
    cells = Page(run_page(results, LOG)).cells
    head = cells.index("subnet")
    assert cells[head : head + 8] == [
        "subnet",
        "zeros",
        "acc.",
        "gap",
        "own",
        "interp.",
        "params",
        "FLOPs",
    ]
    for each in results["subnets"]:
        at = cells.index(each["name"])
        accuracy = each["accuracy"]
        assert cells[at + 1 : at + 8] == [
            f"{100 * each['sparsity']:.1f} %",
            f"{accuracy:.2f}",
            f"{accuracy - 99.25:+.2f}",
            f"{accuracy - 1:.2f}",
            f"{accuracy - 2:.2f}",
            "1,234",
            "5,678",
        ]
    at = cells.index("mean of 2")
    assert cells[at : at + 6] == ["mean of 2", "", "97.75", "-1.50", "96.75", "95.75"]


def test_header_config_choices_and_seconds(results):
    cells = Page(run_page(results, LOG)).cells
    pairs = set(zip(cells, cells[1:], strict=False))
    assert {
        ("method", "cocktail"),
        ("data", "digits"),
        ("model", "resnet8"),
        ("seed", "7"),
        ("time", "1 min 40 s"),
        ("revision", "unknown"),
        ("torch", "2.13.0"),
        ("epochs", "12"),
        ("nm", '{"1:2": 2}'),
        ("init", "–"),
        ("compile", "false"),
        ("note", "a & b"),
        ("interpolate", "20.00"),
        ("training and all else", "74.50"),
    } <= pairs
    at = cells.index("gain")
    assert cells[at + 1 : at + 6] == ["2", "0.4", "0.6", "96.50", "+2.50"]
    at = cells.index("training and all else")
    assert cells[at + 2] == "74.5 %"


def test_texts_from_files_are_escaped(results):
    for name in ("method", "data", "model"):
        results[name] = HOSTILE
    results["config"] = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    results["environment"] = {"revision": HOSTILE}
    results["seconds"][HOSTILE] = 1.0
    results["subnets"][1]["name"] = HOSTILE
    results["subnets"][3].update(name=HOSTILE, pattern=HOSTILE + ":")
    log = [*LOG, {"event": "stage", "stage": 0, "step": 9, "name": HOSTILE}]
    text = run_page(results, log)
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("img") == 3
    assert not page.values("onload")
    assert not [s for s in page.values("src") if not s.startswith("data:")]
    shown = HOSTILE.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    assert page.cells.count(shown) >= 6
    text.encode()


def test_a_run_with_less_to_show(results):
    del results["method_state"]
    results["seconds"], results["environment"], results["config"] = {}, {}, {}
    for each in results["subnets"]:
        each.update(accuracy_own=None, accuracy_interpolated=None, flops=None)
    text = run_page(results, [])
    page = Page(text)
    assert len(page.values("src")) == 1
    assert "Interpolation" not in page.text and "Configuration" not in page.text
    at = page.cells.index("2:4")
    assert page.cells[at + 1 : at + 5] == ["50.0 %", "96.75", "-2.50", "1,234"]
    assert not {"own", "interp.", "FLOPs"} & set(page.cells)  # columns that nothing fills


def test_pairs_of_networks_with_weights_of_their_own(results):
    dense, sparse = results["subnets"][:2]
    results["subnets"] = [
        {**dense, "weights": "networks/dense-a.safetensors"},
        {**sparse, "weights": "networks/a.safetensors"},
        {**dense, "accuracy": 97.25, "weights": f"networks/{HOSTILE}.safetensors"},
    ]
    page = Page(run_page(results, LOG))
    assert "digits: 3 networks from 3 weight sets" in page.text
    at = page.cells.index("dense (dense-a)")
    assert page.cells[at + 1 : at + 4] == ["0.0 %", "99.25", "+1.00"]
    assert page.cells[page.cells.index("unstructured-0.2000") + 3] == "+0.25"
    assert "script" not in page.tags


def test_networks_without_a_dense_one(results):
    results["subnets"] = [{**s, "weights": s["name"]} for s in results["subnets"][1:]]
    page = Page(run_page(results, LOG))
    assert "digits: 3 networks from 3 weight sets" in page.text
    assert "gap" not in page.cells and "dense" not in page.cells


def test_the_file_lies_in_the_run_or_where_one_says(results, tmp_path):
    save(tmp_path, results)
    assert write_page(tmp_path) == tmp_path / "report.html"
    other = write_page(tmp_path, tmp_path / "new" / "x.html")
    assert other.read_bytes() == (tmp_path / "report.html").read_bytes()
    assert other.read_text() == run_page(*read_run(tmp_path))


# ---- the commands --------------------------------------------------------------------------------


def test_plot_draws_and_says_where(results, tmp_path):
    save(tmp_path, results)
    code, output, errors = call("plot", tmp_path, "--out", tmp_path / "new")
    assert code == 0, errors
    names = ("accuracy", "interpolation", "training")
    assert output.split() == [str(tmp_path / "new" / f"{name}.png") for name in names]
    assert all((tmp_path / "new" / f"{n}.png").read_bytes()[:4] == b"\x89PNG" for n in names)
    assert call("plot", tmp_path)[0] == 0
    assert len(list((tmp_path / "plots").iterdir())) == 3


def test_plot_without_a_log_says_what_is_missing(results, tmp_path):
    save(tmp_path, results, log=None)
    code, output, _ = call("plot", tmp_path)
    assert code == 0 and "no log.jsonl" in output
    assert not (tmp_path / "plots" / "training.png").exists()


def test_report_writes_and_says_where(results, tmp_path):
    save(tmp_path, results)
    code, output, _ = call("report", tmp_path)
    assert code == 0 and output.split() == [str(tmp_path / "report.html")]
    code, _, errors = call("report", tmp_path, "--out", tmp_path / "x.pdf")
    assert code == 2 and "must be a file that ends in .html" in " ".join(errors.split())


def changed(**fields):
    return json.dumps({**RESULTS, **fields})


SUBNET = RESULTS["subnets"][1]


@pytest.mark.parametrize(
    ("results", "log", "message"),
    [
        (None, None, "holds no finished run (no results.json)"),
        ("", None, "results.json is no whole JSON"),
        (json.dumps(RESULTS)[:-9], None, "results.json is no whole JSON"),
        ("[" * 100_000, None, "results.json is no whole JSON"),
        ("\x00", None, "results.json is no whole JSON"),
        ("[]", None, "has format='list', not 1"),
        ('{"a": 1}', None, "has format=None, not 1"),
        (changed(format=2), None, "has format=2, not 1"),
        (changed(subnets=None), None, "has subnets=None, of the wrong type"),
        (changed(subnets=[1]), None, "subnets[0] is a int, not an object"),
        (changed(subnets=[{**SUBNET, "accuracy": None}]), None, "has accuracy=None"),
        (changed(subnets=[{**SUBNET, "flops": "x"}]), None, "subnets[0] has flops='x'"),
        (changed(subnets=[{**SUBNET, "weights": 3}]), None, "subnets[0] has weights=3"),
        (changed(subnets=[{**SUBNET, "pattern": "ring"}]), None, "has pattern='ring'"),
        (changed(seconds={"total": "1"}), None, "seconds has total='1'"),
        (changed(), "{", "log.jsonl, line 1, is no whole JSON"),
        (changed(), "{}", "log.jsonl, line 1, has event=None"),
        (changed(), '{"event": "train"}', "line 1, has stage=None"),
        (
            changed(),
            '{"event": "train", "stage": 0, "step": 1, "loss": {"dense": "x"}}',
            "line 1, has dense='x'",
        ),
        (
            changed(),
            '{"event": "train", "stage": 0, "step": 1, "loss": {"ring": 1}}',
            "pattern 'ring' is unknown",
        ),
    ],
    ids=lambda v: str(v)[:30],
)
@pytest.mark.parametrize("command", ["plot", "report"])
def test_damaged_and_foreign_runs(tmp_path, command, results, log, message):
    for name, text in (("results.json", results), ("log.jsonl", log)):
        if text is not None:
            (tmp_path / name).write_text(text)
    code, _, errors = call(command, tmp_path)
    errors = "".join(errors.split())  # lines are wrapped, also within the folder's name
    assert code == 2 and "Traceback" not in errors
    assert "".join(message.split()) in errors
    assert not (tmp_path / "plots").exists() and not (tmp_path / "report.html").exists()


def test_a_folder_that_is_none(tmp_path):
    code, _, errors = call("report", tmp_path / "none")
    assert code == 2 and "is no folder" in " ".join(errors.split())
    save(tmp_path, RESULTS)
    code, _, errors = call("plot", tmp_path, "--out", tmp_path / "results.json")
    assert code == 2 and "is a file; give a folder" in " ".join(errors.split())
