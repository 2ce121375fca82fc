"""The training loop: passes, frozen weights, checkpoints, resume, signals, errors."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_cocktail import models
from sparse_cocktail.checkpoint import load_checkpoint, restore_dataclass, save_checkpoint
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import Data, Split
from sparse_cocktail.engine import Interrupted, Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, Method, Pass, Stage
from sparse_cocktail.stepping import Stepper
from sparse_cocktail.tasks import Classification

MODEL = {"model_args": {"width": 4, "classes": 3}}
SHORT = {
    "epochs": 1,
    "stages": 2,
    "threads": 1,
    "recalibrate_samples": 64,
    "interpolation": True,
    "search_samples": 0,
    "consolidate": 1.0,
}


def toy(samples: int = 320, **changes) -> Data:
    """Three noisy classes of 8x8 images, small enough for a run of a second."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(samples) % 3
    inputs = torch.randn(samples, 1, 8, 8, generator=generator) * 0.5
    inputs[torch.arange(samples), 0, targets * 2, targets] += 3.0
    cut, end = int(0.7 * samples), int(0.8 * samples)
    parts = [Split(inputs[a:b], targets[a:b]) for a, b in ((0, cut), (cut, end), (end, samples))]
    return Data("toy", 3, *parts, **changes)


def model() -> torch.nn.Module:
    return models.build("resnet8", MODEL["model_args"])


def run(folder: Path, **fields) -> dict:
    return train("resnet8", toy(), folder, **{**SHORT, **MODEL, **fields})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "cocktail.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class OneSubnet(Method):
    """A dense epoch, then an epoch of the passes that the test wants."""

    passes: list[Pass] = []

    def plan(self, ctx):
        return [Stage("dense", 1, lambda _: 0.1), Stage("sparse", 1, lambda _: 0.1)]

    def before_stage(self, ctx):
        if ctx.stage == 1:
            ctx.cocktail.add("unstructured-0.5")
            ctx.cocktail.add("channel-0.5")
            self.state.before = [w.detach().clone() for w in ctx.cocktail.bank.weights]

    def step(self, ctx):
        return [Pass("dense")] if ctx.stage == 0 else self.passes


@pytest.fixture
def one_subnet(monkeypatch):
    """`one_subnet(passes)` registers a method of these passes under the name `one`."""

    def make(*passes: Pass) -> None:
        monkeypatch.setitem(METHODS, "one", type("One", (OneSubnet,), {"passes": list(passes)}))

    return make


def trained(folder: Path, **fields) -> Trainer:
    fields = {"method": "one", "threads": 1, "recalibrate_samples": 64, **fields}
    trainer = Trainer(*split_fields(fields), folder, _quiet())
    trainer.prepare(model(), toy(), resume=False, overwrite=False)
    trainer.run()
    return trainer


def _quiet():
    from rich.console import Console

    return Console(quiet=True)


# ---- steps ---------------------------------------------------------------------------------------


def kept_and_moved(trainer: Trainer, subnet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all masked weights: which the subnet keeps, which moved in the sparse stage."""
    from sparse_cocktail import ops

    cocktail = trainer.ctx.cocktail
    views = cocktail.bank.views(cocktail.subnets[subnet].row)
    triples = zip(views, cocktail.bank.weights, trainer.method.state.before, strict=True)
    pairs = [(ops.unpack_mask(b, w.shape).flatten(), (w != old).flatten()) for b, w, old in triples]
    kept, moved = zip(*pairs, strict=True)
    return torch.cat(kept), torch.cat(moved)


@pytest.mark.parametrize("mask_update", ["freeze", "shared"])
def test_pruned_weights_and_momentum_in_sparse_steps(one_subnet, tmp_path, mask_update):
    one_subnet(Pass("unstructured-0.5000"))
    trainer = trained(tmp_path, mask_update=mask_update)
    kept, moved = kept_and_moved(trainer, "unstructured-0.5000")
    assert moved[kept].float().mean() > 0.99
    assert moved[~kept].any().item() == (mask_update == "shared")  # weight decay moves them
    optimizer, cocktail = trainer.ctx.optimizer, trainer.ctx.cocktail
    momentum = torch.cat(
        [optimizer.state[w]["momentum_buffer"].flatten() for w in cocktail.bank.weights]
    )
    assert momentum[~kept].any().item() == (mask_update == "shared")


def test_a_dense_pass_in_the_step_moves_everything(one_subnet, tmp_path):
    one_subnet(Pass("dense"), Pass("unstructured-0.5000", weight=0.5, teacher=0))
    _, moved = kept_and_moved(trained(tmp_path), "unstructured-0.5000")
    assert moved.float().mean() > 0.99


def test_dense_gradients_reach_pruned_weights(one_subnet, tmp_path):
    one_subnet(Pass("unstructured-0.5000", dense_grad=True))
    kept, moved = kept_and_moved(trained(tmp_path, weight_decay=0.0), "unstructured-0.5000")
    assert moved[~kept].float().mean() > 0.99


def test_accumulation_changes_only_rounding(one_subnet, tmp_path):
    one_subnet(Pass("dense"))
    plain = trained(tmp_path / "1", lr=0.01).ctx.model.fc.weight
    parts = trained(tmp_path / "2", lr=0.01, accumulate=2).ctx.model.fc.weight
    assert not torch.equal(plain, parts)  # BatchNorm sees half batches
    torch.testing.assert_close(plain, parts, atol=0.1, rtol=0.1)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in "12"]
    steps = [[e["loss"] for e in map(json.loads, log) if e["event"] == "train"] for log in logs]
    for one, other in zip(*steps, strict=True):  # means over the batch, in one part or in two
        assert other == pytest.approx(one, rel=0.3)


class Sums(Classification):
    """Its metric is a sum of outputs: accuracies would hide small differences."""

    def metric(self, output, target):
        return output.double().sum(), len(target)


def test_statistics_of_subnets_are_not_mixed_up(one_subnet, tmp_path):
    one_subnet(Pass("channel-0.5000"))
    ctx = trained(tmp_path, lr=0.01).ctx
    names = ["dense", "channel-0.5000", "unstructured-0.5000"]
    found = []
    ctx.task = Sums()
    for subnet in ctx.cocktail.subnets.values():
        subnet.statistics = None
    for some in (names, *([name] for name in names)):
        found.append(ctx.measure(some, "holdout"))
    together, *alone = found
    assert together == {name: score for one in alone for name, score in one.items()}
    assert len(set(together.values())) == 3
    ctx.cocktail.recalibrate("channel-0.5000", ctx.calibration())
    ctx.cocktail.activate("dense")
    dense = {k: v.clone() for k, v in ctx.model.state_dict().items()}
    with ctx.cocktail.using("channel-0.5000"):
        weights = ctx.weights()
        assert same(weights, dense)


def test_teacher_leaves_running_statistics_alone(one_subnet, tmp_path):
    one_subnet(Pass("channel-0.5000", teacher="dense"))
    trainer = trained(tmp_path / "taught")
    steps = 2 * trainer.ctx.steps_per_epoch
    trainer.ctx.cocktail.activate("dense")
    assert int(trainer.ctx.model.bn1.num_batches_tracked) != 0
    seen = load_checkpoint(tmp_path / "taught" / "checkpoint.safetensors")["model"]
    assert int(seen["bn1.num_batches_tracked"]) == steps  # one per step, none by the teacher


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_autocast_trains_and_keeps_fp32_weights(tmp_path, precision):
    results = run(tmp_path, precision=precision, epochs=2)
    assert all(t.dtype == torch.float32 for k, t in weights(tmp_path).items() if "conv" in k)
    assert results["subnets"][0]["accuracy"] > 60


def test_channels_last_weights_train(tmp_path):
    trainer = Trainer(*split_fields({**SHORT, "channels_last": True}), tmp_path, _quiet())
    trainer.prepare(model(), toy(), resume=False, overwrite=False)
    trainer.run()
    kernel = trainer.ctx.model.blocks[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_user_module_and_data(tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 3),
    )
    results = train(net, toy(), tmp_path, **SHORT)
    assert results["model"] == "custom:Sequential" and len(results["subnets"]) == 6


# ---- resume --------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run like a crash: nothing is written after it."""


def crash_before(monkeypatch, stage: int, step: int):
    """Make the engine raise Stop before one step; returns what undoes it."""
    original = Stepper.step

    def crash(self, *args):
        if (self.ctx.stage, self.ctx.step) == (stage, step):
            raise Stop
        original(self, *args)

    monkeypatch.setattr(Stepper, "step", crash)
    return lambda: monkeypatch.setattr(Stepper, "step", original)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(fields)`: the folder of a run of these fields that nothing stops."""
    folders = {}

    def folder_of(fields: dict) -> Path:
        key = json.dumps(fields)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            run(folders[key], **fields)
        return folders[key]

    return folder_of


# 224 samples make 3 steps an epoch: stages of 6 steps here, checkpoints inside and at epoch ends
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("stage, step", [(0, 4), (1, 1), (2, 5), (3, 4)])
def test_resume_is_bit_exact(undisturbed, tmp_path, monkeypatch, stage, step, every):
    fields = {"checkpoint_every": every, "epochs": 2, "log_every": 2}
    whole = undisturbed(fields)
    undo = crash_before(monkeypatch, stage, step)
    with pytest.raises(Stop):
        run(tmp_path / "broken", **fields)
    undo()
    resumed = run(tmp_path / "broken", resume=True, **fields)
    assert same(weights(whole), weights(tmp_path / "broken"))
    assert resumed["subnets"] == json.loads((whole / "results.json").read_text())["subnets"]
    lines = [(f / "log.jsonl").read_text().splitlines() for f in (whole, tmp_path / "broken")]
    losses = [[json.loads(x) for x in each if '"train"' in x] for each in lines]
    assert losses[0] == losses[1]  # no line twice, none missing


class Drawing(Classification):
    """Draws from every generator that user code may draw from."""

    def loss(self, output, target):
        drawn = random.gauss(0, 1) + np.random.randn() + float(torch.randn(()))
        return super().loss(output, target) * (1 + 0.05 * drawn)


def test_resume_repeats_what_python_numpy_and_torch_draw(tmp_path, monkeypatch):
    fields = {**SHORT, **MODEL, "epochs": 2, "checkpoint_every": 3, "task": Drawing()}
    train("resnet8", toy(), tmp_path / "whole", **fields)
    undo = crash_before(monkeypatch, 1, 5)
    with pytest.raises(Stop):
        train("resnet8", toy(), tmp_path / "broken", **fields)
    undo()
    random.random(), np.random.rand(), torch.rand(())
    train("resnet8", toy(), tmp_path / "broken", resume=True, **fields)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_engine import Stepper, run

step = Stepper.step
def hang(self, *args):
    if (self.ctx.stage, self.ctx.step) == (1, 4):
        time.sleep(600)
    step(self, *args)
Stepper.step = hang
run(Path(sys.argv[2]), checkpoint_every=1, epochs=2)
"""


def test_resume_after_a_kill_in_the_middle_of_a_stage(tmp_path):
    broken, here = tmp_path / "broken", str(Path(__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", KILLED, here, str(broken)])
    try:
        deadline = time.monotonic() + 120
        while position(broken) != (1, 4):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ValueError, match="another process is training in .*give another --out"):
            run(broken, checkpoint_every=1, epochs=2, resume=True)
    finally:
        child.kill()  # SIGKILL
        child.wait()
    assert not (broken / "results.json").exists()
    run(broken, checkpoint_every=1, epochs=2, resume=True)
    run(tmp_path / "whole", checkpoint_every=1, epochs=2)
    assert same(weights(tmp_path / "whole"), weights(broken))


def position(folder: Path) -> tuple[int, int] | None:
    """(stage, step) of a folder's checkpoint."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    tree = load_checkpoint(path)
    return tree["stage"], tree["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_checkpoint(tmp_path, monkeypatch, number):
    original = Stepper.step

    def interrupt(self, *args):
        original(self, *args)
        if (self.ctx.stage, self.ctx.step) == (1, 1):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Stepper, "step", interrupt)
    with pytest.raises(Interrupted, match=rf"{number.name} at step 2 of stage 1.*cocktail resume"):
        run(tmp_path)
    assert position(tmp_path) == (1, 2)
    monkeypatch.setattr(Stepper, "step", original)
    assert len(run(tmp_path, resume=True)["subnets"]) == 6


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path)
    before = weights(tmp_path)
    assert run(tmp_path, resume=True)["subnets"] == first["subnets"]
    assert same(before, weights(tmp_path))


def test_folders_are_guarded(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run"):
        run(tmp_path, resume=True)
    run(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run already.*--resume.*--overwrite"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"fields differ.*'lr': \(0.1, 0.05\)"):
        run(tmp_path, resume=True, lr=0.05)
    run(tmp_path, overwrite=True, lr=0.05)


def test_same_seed_same_run_and_other_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


# ---- failures ------------------------------------------------------------------------------------


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original = Stepper.step

    def poison(self, inputs, targets, lr):
        bad = (self.ctx.stage, self.ctx.step) == (1, 2)
        original(self, inputs * float("nan") if bad else inputs, targets, lr)

    monkeypatch.setattr(Stepper, "step", poison)
    with pytest.raises(FloatingPointError, match=r"loss of dense is nan at step 2 of stage 1.*lr"):
        run(tmp_path, checkpoint_every=2)
    tree = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert (tree["stage"], tree["step"]) == (1, 2)  # the two steps before the bad one
    assert all(t.isfinite().all() for t in tree["model"].values())
    monkeypatch.setattr(Stepper, "step", original)
    assert len(run(tmp_path, checkpoint_every=2, resume=True)["subnets"]) == 6


def test_weights_of_a_run_are_the_dense_networks_whatever_is_active(tmp_path, one_subnet):
    one_subnet(Pass("dense"))
    ctx = trained(tmp_path).ctx
    ctx.cocktail.activate("dense")
    before = {name: tensor.clone() for name, tensor in ctx.weights().items()}
    with ctx.cocktail.using("channel-0.5000"):  # has statistics of its own
        found, present = ctx.weights(), ctx.model.state_dict()
        means = [name for name in before if name.endswith("running_mean")]
        assert not all(torch.equal(present[name], before[name]) for name in means)
        assert same(found, before)
    assert found["fc.bias"].data_ptr() == ctx.model.fc.bias.data_ptr()  # parameters are no copies


def test_calibration_batches_are_large_and_none_for_no_samples(tmp_path, one_subnet):
    one_subnet(Pass("dense"))
    ctx = trained(tmp_path, batch_size=16).ctx
    sizes = {n: [len(batch) for batch in ctx.calibration(n)] for n in (None, 0, 1, 200)}
    assert sizes == {None: [64], 0: [], 1: [1], 200: [200]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_reach_no_file(tmp_path, one_subnet, bad):
    one_subnet(Pass("dense"))
    ctx = trained(tmp_path).ctx
    ctx.save_weights("good.safetensors")
    before = read_tensors(tmp_path / "good.safetensors")[0]
    with torch.no_grad():
        ctx.model.fc.bias[1] = bad
    with pytest.raises(
        FloatingPointError, match=r"fc.bias is not finite at step 0 of stage 2; .*lower lr"
    ):
        ctx.save_weights("good.safetensors")
    assert same(read_tensors(tmp_path / "good.safetensors")[0], before)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_checkpoint(tmp_path, cut):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"x": torch.arange(5)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is no whole safetensors file"):
        load_checkpoint(path)


def test_checkpoint_tree_round_trip(tmp_path):
    tree = {
        "numbers": [1, 2.5, True, None, "text"],
        "deep": {"tensor": torch.randn(3).bfloat16(), 7: {"int key": torch.tensor(4)}},
        "empty": [{}, []],
    }
    save_checkpoint(tmp_path / "c", tree)
    back = load_checkpoint(tmp_path / "c")
    assert back["numbers"] == tree["numbers"] and back["empty"] == tree["empty"]
    assert torch.equal(back["deep"]["tensor"], tree["deep"]["tensor"])
    assert torch.equal(back["deep"][7]["int key"], torch.tensor(4))
    with pytest.raises(TypeError, match=r"checkpoint: /bad is a set"):
        save_checkpoint(tmp_path / "c", {"bad": {1}})


def test_restore_dataclass():
    state = METHODS["cocktail"].State()
    restore_dataclass(state, {"nm_now": "2:4", "choices": [{"alpha": 0.5}]})
    assert state.nm_now == "2:4" and state.choices == [{"alpha": 0.5}]


# ---- hooks ---------------------------------------------------------------------------------------


class CountsEpochs(OneSubnet):
    """Remembers every epoch that ended."""

    @dataclass
    class State:
        epochs: list = field(default_factory=list)

    def before_stage(self, ctx):
        pass

    def step(self, ctx):
        return [Pass("dense")]

    def after_epoch(self, ctx):
        self.state.epochs.append([ctx.stage, ctx.epoch])


@pytest.mark.parametrize("moment", ["_report_stage", "_flush_losses"])
def test_an_epoch_ends_once_however_a_run_is_stopped(tmp_path, monkeypatch, moment):
    """A run that stops between an epoch's end and its stage's must not call the hook again."""
    monkeypatch.setitem(METHODS, "counts", CountsEpochs)
    fields = {"method": "counts", "threads": 1, "recalibrate_samples": 64, "checkpoint_every": 1}
    original = getattr(Trainer, moment)

    def interrupt(self, *args):
        if self.ctx.stage == 1:
            raise Interrupted(15, "now")
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, moment, interrupt)
        with pytest.raises(Interrupted):
            train(model(), toy(), tmp_path, **fields)
    results = train(model(), toy(), tmp_path, resume=True, **fields)
    assert results["method_state"]["epochs"] == [[0, 0], [1, 0]]
