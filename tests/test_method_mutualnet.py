"""MutualNet: prefix masks, the passes of a step, their gradients, resolutions, equal draws."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_engine import MODEL, model, toy

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import Data, Split
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.mutualnet import MutualNet, prefix_masks, resized, sizes
from sparse_cocktail.patterns import Channel, parse
from sparse_cocktail.schedules import cosine, keep_count

FIELDS = {"method": "mutualnet", "threads": 1, "recalibrate_samples": 64, "epochs": 1}
FIELDS |= {"batch_size": 16, "stages": 5}
STEPS = 14  # of an epoch of 224 samples
NAMES = [f"channel-{1 - 0.9**k:.4f}" for k in range(1, 6)]


class Noted(MutualNet):
    """Notes what is drawn: per step (subnet, size of its inputs) of every pass."""

    drawn: list

    def step(self, ctx):
        passes = super().step(ctx)
        x = ctx.data.example(1)
        shapes = [x.shape if p.transform is None else p.transform(x).shape for p in passes]
        pairs = zip(passes, shapes, strict=True)
        self.drawn.append([[p.subnet, list(shape[2:])] for p, shape in pairs])
        return passes


def noted(folder: Path, **fields) -> list:
    """Draws of a run."""
    before = METHODS["mutualnet"]
    METHODS["mutualnet"] = type("Run", (Noted,), {"drawn": []})
    try:
        train("resnet8", toy(), folder, **{**FIELDS, **MODEL, **fields})
        return METHODS["mutualnet"].drawn
    finally:
        METHODS["mutualnet"] = before


def prepared(folder: Path, network=None, data=None, **fields) -> Trainer:
    from rich.console import Console

    trainer = Trainer(*split_fields({**FIELDS, **fields}), folder, Console(quiet=True))
    trainer.prepare(network or model(), data or toy(), resume=False, overwrite=False)
    return trainer


# ---- masks ---------------------------------------------------------------------------------------


def test_masks_keep_the_first_channels_and_are_nested(tmp_path):
    results = train("resnet8", toy(), tmp_path, **FIELDS, **MODEL, mask_linear=True)
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    assert [row["name"] for row in results["subnets"]] == ["dense", *NAMES]
    (last,) = cocktail.outputs
    before = None
    for name in NAMES:
        pairs = zip(cocktail.masks(name), cocktail.bank.weights, strict=True)
        masks = [ops.unpack_mask(bits, w.shape) for bits, w in pairs]
        for i, mask in enumerate(masks):
            width = len(mask) if i == last else keep_count(parse(name).density, len(mask))
            assert mask[:width].all() and not mask[width:].any()
        if before is not None:
            assert all(not (mask & ~old).any() for mask, old in zip(masks, before, strict=True))
        before = masks
    assert sum(map(torch.Tensor.numel, before)) > sum(int(mask.sum()) for mask in before)


def test_prefixes_are_not_chosen_by_magnitude():
    weight = torch.arange(12.0).view(6, 2)  # the last channels are the largest
    (bits,) = prefix_masks([weight], Channel(0.5))
    assert ops.unpack_mask(bits, weight.shape)[:, 0].tolist() == [True] * 3 + [False] * 3


# ---- steps ---------------------------------------------------------------------------------------


def test_a_step_trains_the_full_the_narrowest_and_two_more(tmp_path):
    drawn = noted(tmp_path, epochs=3)
    assert len(drawn) == 3 * STEPS
    for step in drawn:
        names = [name for name, _ in step]
        assert names[:2] == ["dense", NAMES[-1]]
        assert len(set(names)) == 4 and set(names[2:]) < set(NAMES[:-1])
        assert all(size == [8, 8] for _, size in step)
    counts = [sum(name in map(lambda p: p[0], step) for step in drawn) for name in NAMES[:-1]]
    assert sum(counts) == 6 * STEPS and min(counts) >= 12  # of 21 on average


def test_more_widths_in_training_than_on_the_menu(tmp_path):
    drawn = noted(tmp_path, epochs=3, patterns="channel-0.25,channel-0.5", grid=3)
    seen = {name for step in drawn for name, _ in step}
    grid = {"channel-0.1250", "channel-0.3750"}  # and 0.25, which is there already
    assert seen == {"dense", "channel-0.2500", "channel-0.5000"} | grid
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    assert set(cocktail.subnets) == seen - grid
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"] for row in results["subnets"]} == seen - grid
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    (stage,) = [line for line in lines if line["event"] == "stage"]
    assert set(stage["holdout"]) == seen - grid


def doubled(data: Data) -> Data:
    parts = [getattr(data, name) for name in ("train", "holdout", "test")]
    return Data("toy", 3, *(Split(part.inputs.double(), part.targets) for part in parts))


def test_gradients_are_those_of_the_loss_and_of_kl_divergence(tmp_path):
    """In float64: the full network's own and then the sum with those of the narrower ones."""
    trainer = prepared(tmp_path, model().double(), doubled(toy()), resolutions="6")
    ctx, method = trainer.ctx, trainer.method
    ctx.step = 3
    method.before_stage(ctx)
    network = copy.deepcopy(ctx.model)
    seen = []
    parameters = dict(ctx.model.named_parameters())
    method.after_pass = lambda _: seen.append({n: p.grad.clone() for n, p in parameters.items()})
    ctx.optimizer = torch.optim.SGD(ctx.model.parameters(), 0.0)
    split = ctx.data.train
    inputs, targets = split.inputs[:16], split.targets[:16]
    passes = method.step(ctx)
    trainer.stepper.step(inputs, targets, 0.0)
    assert len(seen) == len(passes) == 4

    reference = Cocktail(network.train())
    own = dict(network.named_parameters())
    full = network(inputs)
    F.cross_entropy(full, targets).backward()
    check = [{n: p.grad.clone() for n, p in own.items()}]
    teacher = full.detach().softmax(1)
    for each in passes[1:]:
        width = parse(each.subnet).density
        bits = [prefix_masks([w], Channel(1 - width))[0] for w in reference.bank.weights]
        reference.add(each.subnet, bits)
        with reference.using(each.subnet):
            small = F.interpolate(inputs, (6, 6), mode="bilinear", antialias=True)
            student = network(small).log_softmax(1)
            F.kl_div(student, teacher, reduction="batchmean").backward()
        check.append({n: p.grad.clone() for n, p in own.items()})
    for got, expected in zip(seen, check, strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)
    assert any(not torch.equal(seen[0][n], seen[-1][n]) for n in seen[0])


def test_learning_rate(tmp_path):
    (stage,) = prepared(tmp_path, epochs=10, lr=0.2).ctx.stages
    rates = [stage.lr(step) for step in range(10 * STEPS)]
    assert rates == [cosine(0.2, 0.001, step / (10 * STEPS)) for step in range(10 * STEPS)]
    assert all(a > b for a, b in pairwise(rates))


# ---- resolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "full", "expected"),
    [
        ("224,192,160,128", (224, 224), [None, (192, 192), (160, 160), (128, 128)]),
        ("1, 0.875, 0.5", (32, 32), [None, (28, 28), (16, 16)]),
        ("16", (32, 48), [(16, 24)]),
        ("0.01", (32, 32), [(1, 1)]),
    ],
)
def test_sizes(text, full, expected):
    assert sizes(text, full) == expected


@pytest.mark.parametrize("text", ["0", "-8", "33", "big", "16,", "nan", "inf"])
def test_sizes_errors(text):
    with pytest.raises(ValueError, match=r"mutualnet: resolutions=.*at most 32 pixels"):
        sizes(text, (32, 32))


def test_resolutions_need_pictures():
    with pytest.raises(ValueError, match=r"resolutions='0.5', but inputs have 0 dimensions"):
        sizes("0.5", ())


def test_a_resized_input_has_the_mean_of_the_picture():
    x = torch.rand(2, 3, 16, 16)
    small = resized((4, 4))(x)
    assert small.shape == (2, 3, 4, 4)
    # antialiased: no pixel is left out, unlike with plain bilinear interpolation
    alone = torch.zeros(1, 1, 16, 16)
    for row, column in ((0, 0), (5, 7), (15, 15)):
        alone.zero_()[0, 0, row, column] = 1.0
        assert resized((4, 4))(alone).sum() > 0.03
    assert resized(None) is None


def test_draws_are_a_function_of_the_seed(tmp_path):
    fields = {"resolutions": "8,6,4"}
    first, again, other = (
        noted(tmp_path / name, **fields, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again and first != other
    assert {tuple(size) for step in first for _, size in step[1:]} == {(8, 8), (6, 6), (4, 4)}
    assert all(step[0] == ["dense", [8, 8]] for step in first)


def test_draws_are_the_same_on_every_rank(tmp_path):
    """Ranks differ in their samples and in torch's own random state: neither counts."""
    drawn = []
    for rank in range(2):
        trainer = prepared(tmp_path / str(rank), data=toy(320 - 64 * rank), resolutions="8,6,4")
        torch.manual_seed(rank)
        for trainer.ctx.step in range(20):
            passes = trainer.method.step(trainer.ctx)
            shapes = [p.transform and p.transform.keywords["size"] for p in passes]
            drawn.append([(p.subnet, shape) for p, shape in zip(passes, shapes, strict=True)])
    assert drawn[:20] == drawn[20:]
    assert len(set(map(str, drawn))) > 15


# ---- costs, errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        pytest.param({}, 4, id="ladder"),
        pytest.param({"patterns": "channel-0.5"}, 2, id="one-width"),
        pytest.param({"patterns": "channel-0.5", "grid": 1}, 3, id="grid"),
        pytest.param({"random_widths": 0, "resolutions": "0.5"}, 2, id="narrowest-only"),
    ],
)
def test_a_run_costs_what_it_says(tmp_path, fields, passes):
    results = train("resnet8", toy(), tmp_path, **FIELDS, **MODEL, **fields)
    _, options = split_fields({**FIELDS, **fields})
    assert MutualNet.cost(options, 1) == passes
    assert results["passes"]["train"] == passes * STEPS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patterns": "2:4"}, r"2:4 cannot be trained; the method takes channel"),
        ({"ladder": "unstructured"}, r"unstructured-0.2000 cannot be trained"),
        ({"grid": -1}, r"mutualnet: grid=-1 is not 0 or more"),
        ({"random_widths": -1}, r"mutualnet: random_widths=-1 is not 0 or more"),
        ({"resolutions": "9"}, r"mutualnet: resolutions='9' .*at most 8 pixels"),
    ],
)
def test_errors(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **fields)
