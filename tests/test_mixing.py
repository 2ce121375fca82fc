"""mixup and CutMix: shares of pictures and labels, and draws that the seed alone decides."""

import pytest
import torch
import torch.nn.functional as F
from test_engine import MODEL, SHORT, Stop, crash_before, model, same, toy, weights

from sparse_cocktail.data import Data, Split, generator_for, mix
from sparse_cocktail.engine import train
from sparse_cocktail.stepping import Stepper
from sparse_cocktail.tasks import Classification

CLASSES = 4


def batch(count=6, shape=(2, 8, 5)):
    """Pictures of one colour each, which is their position, and labels."""
    inputs = torch.arange(count).float().view(-1, *(1 for _ in shape)).expand(-1, *shape).clone()
    return inputs, torch.arange(count) % CLASSES


def mixed(number, mixup=0.0, cutmix=0.0, **kind):
    return mix(*batch(**kind), CLASSES, mixup, cutmix, generator_for(number))


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_in_the_shares_of_the_pixels(kind, number):
    inputs, targets = batch()
    before = inputs.clone()
    made, soft = mix(
        inputs, targets, CLASSES, **{"mixup": 0.0, "cutmix": 0.0, kind: 1.0},
        generator=generator_for(number),
    )  # fmt: skip
    assert torch.equal(inputs, before) and made.shape == inputs.shape
    whole, neighbour = F.one_hot(targets, CLASSES).float(), F.one_hot(targets.roll(1), CLASSES)
    first = made[1].mean()  # of 1 and its neighbour 0: the share of the picture itself
    torch.testing.assert_close(soft, first * whole + (1 - first) * neighbour)
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft)))
    values = made[1].unique()
    if kind == "mixup":
        assert values.std(correction=0) < 1e-6
    else:
        assert set(values.tolist()) <= {0.0, 1.0}


def test_a_box_is_one_rectangle_for_all_pictures_and_channels():
    made, _ = mixed(3, cutmix=1.0, shape=(2, 16, 16))
    box = made[1, 0] == 0
    assert 0 < box.sum() < 256 and box.sum() == box.any(1).sum() * box.any(0).sum()
    assert torch.equal(made[:, 0], made[:, 1])
    inputs, _ = batch(shape=(2, 16, 16))
    assert torch.equal(made, torch.where(box, inputs.roll(1, 0), inputs))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_follow_their_beta_distribution(alpha):
    draws = torch.stack([mixed(n, mixup=alpha, count=2, shape=())[1][1, 1] for n in range(2000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert draws.var().item() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.1)  # of Beta(a, a)


def test_a_box_covers_its_share_unless_the_edges_cut_it():
    boxes = [mixed(n, cutmix=1e6, shape=(1, 64, 32))[0][1, 0] == 0 for n in range(200)]
    sides = torch.tensor([(int(box.any(1).sum()), int(box.any(0).sum())) for box in boxes])
    largest, smallest = sides.max(0).values, sides.min(0).values
    assert largest.tolist() == [46, 23]  # sqrt(1/2) of 64 and 32 are 45.3 and 22.6
    assert smallest[0] < 26 and smallest[1] < 14  # half of it, where the centre is at an edge


def test_where_both_are_on_a_batch_gets_one_of_them():
    boxes = [set(mixed(n, 1.0, 1.0)[0][1].unique().tolist()) <= {0.0, 1.0} for n in range(200)]
    assert 60 < sum(boxes) < 140
    assert all(len(mixed(n, mixup=1.0)[0][1].unique()) == 1 for n in range(20))


def test_random_numbers_come_from_the_generator_alone():
    first, again, other = (mixed(n, 1.0, 1.0) for n in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mixed(5, 1.0, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mixture_of_the_losses(smoothing):
    inputs, targets = batch()
    _, soft = mixed(2, mixup=1.0)
    share = soft[1, 1]
    output = torch.randn(len(targets), CLASSES)
    task = Classification(smoothing)
    wanted = share * task.loss(output, targets) + (1 - share) * task.loss(output, targets.roll(1))
    torch.testing.assert_close(task.loss(output, soft), wanted)


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        ((4, 3, 8, 8), torch.zeros(4), TypeError, r"targets are torch.float32 of shape \(4,\)"),
        ((4, 3, 8, 8), torch.zeros(4, 2).long(), TypeError, r"of shape \(4, 2\).*set mixup=0 and"),
        ((4, 3, 8, 8), torch.zeros(4).bool(), TypeError, r"targets are torch.bool"),
        ((4, 7), torch.zeros(4).long(), ValueError, r"shape \(4, 7\), but cutmix=1.0 needs pict"),
    ],
    ids=["regression", "two labels", "bool", "no pictures"],
)
def test_what_cannot_be_mixed_is_said(inputs, targets, error, message):
    with pytest.raises(error, match=message):
        mix(torch.zeros(inputs), targets, 3, 0.0, 1.0, generator_for(0))


# ---- runs ----------------------------------------------------------------------------------------

BOTH = {"mixup": 0.2, "cutmix": 1.0}


def run(folder, **fields):
    return train("resnet8", toy(), folder, **{**SHORT, **MODEL, **BOTH, **fields})


@pytest.fixture
def batches(monkeypatch):
    """(stage, step) and (parts of the batch) of every pass that runs."""
    seen = []
    original = Stepper._run_pass

    def look(self, each, parts, *args):
        seen.append(((self.ctx.stage, self.ctx.step), each, [(x, y) for x, y in parts]))
        return original(self, each, parts, *args)

    monkeypatch.setattr(Stepper, "_run_pass", look)
    return seen


def test_every_pass_of_a_step_and_a_reused_batch_see_the_same_mixture(tmp_path, batches):
    run(tmp_path, mixup=0.0, pair_batches=True, stages=1, consolidate=0.0)
    pairs = [
        (a, b) for a, b in zip(batches, batches[1:], strict=False) if b[1].teacher == "previous"
    ]
    assert pairs
    for (_, _, before), (_, _, reused) in pairs:
        for (x, y), (v, w) in zip(before, reused, strict=True):
            assert torch.equal(x, v) and torch.equal(y, w)
    shares = [parts[0][1].max(1).values.min().item() for _, _, parts in batches]
    assert len(set(shares)) > len(shares) // 3  # every batch has its own


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_networks_learn_from_mixed_batches(tmp_path, precision):
    results = run(tmp_path, epochs=6, stages=1, precision=precision, label_smoothing=0.1)
    assert results["subnets"][0]["accuracy"] > 90


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    run(tmp_path / "whole", checkpoint_every=2)
    undo = crash_before(monkeypatch, 1, 2)
    with pytest.raises(Stop):
        run(tmp_path / "broken", checkpoint_every=2)
    undo()
    run(tmp_path / "broken", checkpoint_every=2, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_targets_that_are_no_labels_are_refused(tmp_path):
    sets = toy()
    parts = (sets.train, sets.holdout, sets.test)
    soft = [Split(s.inputs, F.one_hot(s.targets, 3).float()) for s in parts]
    with pytest.raises(TypeError, match=r"mix: targets are torch.float32 of shape \(64, 3\)"):
        train(model(), Data("soft", 3, *soft), tmp_path, **SHORT, **BOTH)
