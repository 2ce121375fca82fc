"""Pictures of a run: what is drawn equals what results.json and log.jsonl say."""

import copy
import json
import math

import pytest
from matplotlib.figure import Figure

from sparse_cocktail import plots


def subnet(name, pattern, sparsity, accuracy, own=None, mixed=None, flops=100):
    return {
        "name": name,
        "pattern": pattern,
        "sparsity": sparsity,
        "accuracy": accuracy,
        "accuracy_own": own,
        "accuracy_interpolated": mixed,
        "nnz": 10,
        "parameters": 1000,
        "flops": flops,
    }


SUBNETS = [
    subnet("dense", "dense", 0.0, 99.0, 98.0, 97.0),
    subnet("unstructured-0.3600", "unstructured", 0.36, 98.0, 97.5, 97.0),
    subnet("unstructured-0.2000", "unstructured", 0.2, 98.5, 97.75, 97.25),
    subnet("channel-0.1000", "channel", 0.1, 96.0, 95.0, 90.0),
    subnet("2:4", "2:4", 0.5, 97.0, 96.0, 95.0),
    subnet("1:2", "1:2", 0.5, 97.0, 96.5, 95.5),
    subnet("4:8", "4:8", 0.5, 97.0, 96.5, 95.25),
]
CHOICES = [
    {"stage": 2, "alpha": 0.4, "score": 96.0, "tried": [[0.4, 96.0], [0.9, 95.0], [1.0, 94.0]]},
    {"stage": 3, "alpha": 1.0, "score": 95.0, "tried": [[0.5, 93.0], [1.0, 95.0]]},
]
LOG = [
    {"event": "conversion", "stage": 0},
    {"event": "train", "stage": 0, "step": 5, "loss": {"dense": 2.0}},
    {"event": "train", "stage": 0, "step": 10, "loss": {"dense": 1.0}},
    {"event": "stage", "stage": 0, "step": 12, "name": "dense"},
    {"event": "train", "stage": 1, "step": 5, "loss": {"dense": 0.5, "1:2": 0.75, "2:4": 0.25}},
    {"event": "stage", "stage": 1, "step": 12, "name": "stage 1"},
    {"event": "train", "stage": 2, "step": 5, "loss": {"dense": 0.25}},
    {"event": "finished", "stage": 3, "step": 0},
]


@pytest.fixture
def results():
    return {
        "format": 1,
        "method": "cocktail",
        "data": "digits",
        "model": "resnet8",
        "seed": 1,
        "config": {},
        "environment": {},
        "seconds": {"total": 2.0},
        "subnets": copy.deepcopy(SUBNETS),
        "method_state": {"choices": copy.deepcopy(CHOICES)},
    }


def drawn(results, log, name) -> Figure:
    """The figure of one picture, laid out as it would be saved."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    plots.pictures(results, log)[name].draw(figure)
    figure.canvas.draw()
    return figure


def points(axes, filled):
    """{colour: [(x, y)]} of the lines with filled or with hollow markers."""
    return {
        line.get_color(): [(round(x, 6), y) for x, y in zip(*line.get_data(), strict=True)]
        for line in axes.lines
        if line.get_marker() != "None" and (line.get_markerfacecolor() != "white") == filled
    }


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def colour(key):
    return plots.PATTERNS[key][1]


def test_final_accuracies_are_filled_and_sorted_by_sparsity(results):
    main, side = drawn(results, LOG, "accuracy").axes
    assert points(main, filled=True) == {
        colour("unstructured"): [(20.0, 98.5), (36.0, 98.0)],
        colour("channel"): [(10.0, 96.0)],
    }
    assert [y for _, y in points(side, filled=True)[colour("n:m")]] == [97.0, 97.0, 97.0]
    for panel in (main, side):
        assert [line.get_ydata()[0] for line in panel.lines if line.get_ls() == ":"] == [99.0]


def test_interpolated_accuracies_are_hollow(results):
    figure = drawn(results, LOG, "accuracy")
    hollow = points(figure.axes[0], filled=False)
    assert sorted(hollow.values()) == [[(10.0, 90.0)], [(20.0, 97.25), (36.0, 97.0)]]
    (side,) = points(figure.axes[1], filled=False).values()
    assert [y for _, y in side] == [95.5, 95.0, 95.25]
    assert legend(figure)[-2:] == ["final", "interpolated, before consolidation"]


def test_every_nm_pattern_has_a_name_and_a_place_of_its_own(results):
    side = drawn(results, LOG, "accuracy").axes[1]
    labels = side.get_xticklabels()
    assert [label.get_text() for label in labels] == ["1:2", "2:4", "4:8"]
    assert side.get_xlabel() == "N:M (50 % zeros)"
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    places = [x for kind in (True, False) for p in points(side, kind).values() for x, _ in p]
    assert len(set(places)) == 6


def test_nm_patterns_of_several_sparsities_say_which(results):
    results["subnets"].append(subnet("1:4", "1:4", 0.75, 90.0))
    side = drawn(results, LOG, "accuracy").axes[1]
    names = [label.get_text() for label in side.get_xticklabels()]
    assert names == ["1:2\n50 %", "2:4\n50 %", "4:8\n50 %", "1:4\n75 %"]


def test_without_consolidation_own_weights_are_compared(results):
    for each in results["subnets"]:
        each["accuracy_interpolated"] = each["accuracy"]
    figure = drawn(results, LOG, "accuracy")
    assert legend(figure)[-1] == "the stage's own weights"
    assert [(10.0, 95.0)] in points(figure.axes[0], filled=False).values()


def test_without_other_accuracies_nothing_is_hollow(results):
    for each in results["subnets"]:
        each.update(accuracy_own=None, accuracy_interpolated=None, flops=None)
    figure = drawn(results, LOG, "accuracy")
    assert not points(figure.axes[0], filled=False) and not points(figure.axes[1], filled=False)
    assert legend(figure) == ["Dense", "Unstructured", "Channel", "N:M"]


def test_one_missing_accuracy_hides_no_other(results):
    results["subnets"][2]["accuracy_interpolated"] = None
    lines = points(drawn(results, LOG, "accuracy").axes[0], filled=False).values()
    (line,) = [line for line in lines if len(line) == 2]
    assert math.isnan(line[0][1]) and line[1] == (36.0, 97.0)


@pytest.mark.parametrize("kept", [["dense"], ["2:4"], ["channel-0.1000"]])
def test_few_subnets_are_enough(results, kept):
    results["subnets"] = [s for s in results["subnets"] if s["name"] in kept]
    figure = drawn(results, LOG, "accuracy")
    assert len(figure.axes) == (2 if kept == ["2:4"] else 1)
    assert figure.get_suptitle() == "1 network from one weight set: digits"


def test_all_factors_and_the_chosen_ones(results):
    scores, factors = drawn(results, LOG, "interpolation").axes
    tried = [line for line in scores.lines if line.get_marker() == "."]
    chosen = [line for line in scores.lines if line.get_marker() == "o"]
    assert [list(map(tuple, line.get_xydata().round(6))) for line in tried] == [
        [(2.0, 94.0), (2.1, 95.0), (2.6, 96.0)],
        [(3.0, 95.0), (3.5, 93.0)],
    ]
    assert [tuple(line.get_xydata()[0]) for line in chosen] == [(2.6, 96.0), (3.0, 95.0)]
    bars = [bar for bar in factors.patches if bar.get_width() < 1]  # a band is 1 wide
    heights = [round(bar.get_height(), 6) for bar in bars]
    assert heights == [0.4, 0.6, 1.0, 0.0]
    assert [bar.get_y() for bar in bars] == [0.0, 0.4, 0.0, 1.0]
    assert [text.get_text() for text in factors.texts] == ["0.4", "1"]
    assert [t.get_text() for t in factors.get_xticklabels()] == ["2", "3"]


def test_many_stages_keep_their_labels_apart(results):
    results["method_state"]["choices"] = [{**CHOICES[0], "stage": k} for k in range(2, 41)]
    factors = drawn(results, LOG, "interpolation").axes[1]
    boxes = [label.get_window_extent() for label in factors.get_xticklabels()]
    assert 10 <= len(boxes) <= 14 and not factors.texts
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_losses_are_means_per_pattern_and_end_with_their_stage(results):
    (axes,) = drawn(results, LOG, "training").axes
    lines = {line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"}
    assert set(lines) == {"Dense", "N:M"}
    dense = [tuple(p) for p in lines["Dense"].get_xydata() if p[1] == p[1]]
    assert dense == [(5, 2.0), (10, 1.0), (17, 0.5), (29, 0.25)]
    assert sum(y != y for y in lines["Dense"].get_ydata()) == 2  # a gap before stages 1 and 2
    assert [tuple(p) for p in lines["N:M"].get_xydata() if p[1] == p[1]] == [(17, 0.5)]
    top = axes.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == ["dense", "1", "2"]
    assert [line.get_xdata()[0] for line in axes.lines if line not in lines.values()] == [12, 24]
    assert axes.get_yscale() == "log" and axes.get_xlim()[0] == 0


def test_losses_that_are_not_positive_need_a_linear_axis(results):
    log = [{"event": "train", "stage": 0, "step": 5, "loss": {"dense": 0.0}}]
    assert drawn(results, log, "training").axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("name", ["accuracy", "interpolation", "training"])
def test_nothing_is_cut_off(results, name):
    figure = drawn(results, LOG, name)
    box, page = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= page.width + 0.01 and box.y1 <= page.height + 0.01
    for axes in figure.axes:  # every axis is named, but for those that share a neighbour's
        assert axes.get_ylabel() or axes is not figure.axes[0]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{"stage": 2}]},
        {"choices": [{**CHOICES[0], "tried": [[1, 2, 3]]}]},
        {"choices": "all"},
        None,
    ],
    ids=str,
)
def test_runs_without_choices_have_no_picture_of_them(results, state):
    results["method_state"] = state
    assert set(plots.pictures(results, LOG)) == {"accuracy", "training"}


def test_a_run_without_a_log_has_no_picture_of_the_training(results):
    assert set(plots.pictures(results, [])) == {"accuracy", "interpolation"}


def test_the_pictures_of_a_folder(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    files = plots.plot_run(tmp_path)
    wanted = [tmp_path / "plots" / f"{n}.png" for n in ("accuracy", "interpolation", "training")]
    assert files == wanted
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_figure_is_saved_by_its_ending_and_equal_content_gives_equal_bytes(tmp_path):
    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4])

    path = plots.save_figure(tmp_path / "deep" / "x.svg", draw, (3, 2))
    assert b"<svg" in path.read_bytes() and b'width="216pt"' in path.read_bytes()
    assert path.read_bytes() == plots.render(draw, (3, 2), "svg")
    assert plots.render(draw) == plots.render(draw)


def test_hostile_names_are_drawn_as_they_are(results):
    results["data"] = "$\\frac{$\ud800\n\x00"
    figure = drawn(results, LOG, "accuracy")
    assert figure.get_suptitle().endswith("$\\frac{$\ufffd\ufffd\ufffd")


def test_rows_of_the_table(results):
    rows = plots.table_groups(results)
    assert list(rows) == ["dense", "unstructured", "channel", "n:m"]
    assert rows["dense"] == [["dense", "0.0 %", "99.00", "+0.00", "98.00", "97.00", "1,000", "100"]]
    assert rows["unstructured"][-1] == ["mean of 2", "", "98.25", "-0.75", "97.62", "97.12", "", ""]
    assert len(plots.results_table(results).rows) == 1 + 3 + 1 + 4


def test_rows_without_dense_and_with_missing_values(results):
    results["subnets"] = results["subnets"][1:]
    results["subnets"][0].update(accuracy_own=None, accuracy_interpolated=None, flops=None)
    first, _, means = plots.table_groups(results)["unstructured"]
    assert first[3:6] == ["", "", ""] and first[7] == ""
    assert means == ["mean of 2", "", "98.25", "", "", "", "", ""]


# ---- several weight sets -------------------------------------------------------------------------


@pytest.fixture
def pairs(results):
    """Two pairs of a dense and a sparse network, each with weights of its own."""
    dense, sparse, sparser = results["subnets"][0], results["subnets"][2], results["subnets"][1]
    results["subnets"] = [
        {**dense, "accuracy": 99.0, "weights": "networks/dense-unstructured-0.2000.safetensors"},
        {**sparse, "weights": "networks/unstructured-0.2000.safetensors"},
        {**dense, "accuracy": 97.0, "weights": "networks/dense-unstructured-0.3600.safetensors"},
        {**sparser, "weights": "networks/unstructured-0.3600.safetensors"},
    ]
    return results


def test_weight_sets_are_counted(results, pairs):
    assert plots.counted(pairs) == "4 networks from 4 weight sets"
    assert plots.counted({"subnets": SUBNETS}) == "7 networks from one weight set"
    mixed = [{**s, "weights": w} for s, w in zip(SUBNETS[:3], (None, None, "x"), strict=True)]
    assert plots.counted({"subnets": mixed}) == "3 networks from 2 weight sets"
    assert plots.results_table(pairs).title.endswith(": 4 networks from 4 weight sets")
    title = drawn(pairs, LOG, "accuracy").get_suptitle()
    assert title == "4 networks from 4 weight sets: digits"


def test_several_dense_networks_in_the_table(pairs):
    rows = plots.table_groups(pairs)
    assert [row[0] for row in rows["dense"]] == [
        "dense (dense-unstructured-0.2000)",
        "dense (dense-unstructured-0.3600)",
        "mean of 2",
    ]
    assert [row[3] for row in rows["dense"]] == ["+1.00", "-1.00", "+0.00"]
    assert [row[0] for row in rows["unstructured"][:2]] == [
        "unstructured-0.2000",
        "unstructured-0.3600",
    ]
    assert [row[3] for row in rows["unstructured"]] == ["+0.50", "+0.00", "+0.25"]  # to 98


def test_several_dense_networks_are_a_line_and_a_band(pairs):
    (axes,) = drawn(pairs, LOG, "accuracy").axes
    assert [line.get_ydata()[0] for line in axes.lines if line.get_ls() == ":"] == [98.0]
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == (97.0, 99.0)


def test_no_dense_network_is_no_line(pairs):
    pairs["subnets"] = pairs["subnets"][1::2]
    figure = drawn(pairs, LOG, "accuracy")
    assert not [line for line in figure.axes[0].lines if line.get_ls() == ":"]
    assert not figure.axes[0].patches and "Dense" not in legend(figure)
    assert [row[3] for row in plots.table_groups(pairs)["unstructured"]] == ["", "", ""]
