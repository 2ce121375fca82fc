"""Runs of several processes: equal masks and weights, gradients of the joint batch, resume, ends.

Real processes talk over gloo. Each is this file as a script with the environment that torchrun
would set: `test_distributed.py WORKER FOLDER WORKER FOLDER ...`. Most of a short run's time is
spent on starting, so processes do several things in turn.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from processes import LIMIT, finish, left_threads
from test_engine import SHORT, model, position, same, toy

from sparse_cocktail import models
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import Data, Split
from sparse_cocktail.distributed import process_group
from sparse_cocktail.engine import Interrupted, Trainer, train
from sparse_cocktail.files import read_tensors, write_tensors
from sparse_cocktail.methods import METHODS, Method, Pass, Stage
from sparse_cocktail.methods.cocktail import SparseCocktail
from sparse_cocktail.stepping import Stepper
from sparse_cocktail.tasks import Classification

RANKS = range(3)  # sums over two ranks are the same in any order, so two would show less
FIELDS = {**SHORT, "batch_size": 16, "checkpoint_every": 4, "log_every": 2}  # 4 steps an epoch


def quiet():
    from rich.console import Console

    return Console(quiet=True)


def start(work: dict[str, Path]) -> list[subprocess.Popen]:
    """The processes that do `work` (worker: folder) in turn; output goes to pipes."""
    for folder in work.values():
        folder.mkdir(exist_ok=True)
    return processes.start(__file__, [part for item in work.items() for part in item], len(RANKS))


def left_by(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"rank-{rank}.safetensors")[0]


# ---- what the processes do -----------------------------------------------------------------------


class RankAsScore(Classification):
    def metric(self, output, target):
        return float(torch.distributed.get_rank()), 1


class Recorded(SparseCocktail):
    """Every rank draws its own random numbers, and leaves what it holds at the end of training."""

    def before_stage(self, ctx):
        if ctx.stage == 0:
            torch.manual_seed(100 + torch.distributed.get_rank())
        super().before_stage(ctx)

    def finish(self, ctx):
        held = {f"model.{name}": t for name, t in ctx.weights().items()}
        held |= {f"mask.{i}": ctx.cocktail.bank.flat(i) for i in range(len(ctx.cocktail.bank))}
        task, ctx.task = ctx.task, RankAsScore()
        held["measured"] = torch.tensor(ctx.accuracy("holdout"))
        ctx.task = task
        scores = super().finish(ctx)
        numbers = [s[key] for s in scores.values() for key in sorted(s)]
        numbers += [x for c in self.state.choices for x in (c["alpha"], c["score"])]
        held["scores"] = torch.tensor(numbers, dtype=torch.float64)
        rank = torch.distributed.get_rank()
        write_tensors(ctx.folder / f"rank-{rank}.safetensors", held, {})
        return scores


def whole(folder: Path, rank: int, resume: bool = False) -> None:
    METHODS["cocktail"] = Recorded
    torch.manual_seed(0)
    dropping = torch.nn.Sequential(torch.nn.Dropout(0.1), model())
    train(dropping, toy(), folder, resume=resume, **FIELDS)


def resumed(folder: Path, rank: int) -> None:
    whole(folder, rank, resume=True)


def stopped(folder: Path, rank: int) -> None:
    """A signal reaches rank 1 only, in the last stage: nothing resets its own statistics later."""
    original = Stepper.step

    def interrupt(self, *args):
        original(self, *args)
        if rank == 1 and (self.ctx.stage, self.ctx.step) == (3, 0):
            os.kill(os.getpid(), signal.SIGTERM)

    Stepper.step = interrupt
    try:
        whole(folder, rank)
    except Interrupted as stop:
        print(stop, flush=True)
        raise SystemExit(128 + stop.number) from stop


def dying(folder: Path, rank: int) -> None:
    """Rank 1 ends without a word in the middle of a stage."""
    original = Stepper.step

    def die(self, *args):
        if rank == 1 and (self.ctx.stage, self.ctx.step) == (1, 3):
            os._exit(9)
        original(self, *args)

    Stepper.step = die
    whole(folder, rank)


class Perturbed(SparseCocktail):
    """Rank 1's weights are moved before the first masks are made."""

    def before_stage(self, ctx):
        if ctx.stage == 1 and torch.distributed.get_rank() == 1:
            with torch.no_grad():
                for weight in ctx.cocktail.bank.weights:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
        super().before_stage(ctx)


def perturbed(folder: Path, rank: int) -> None:
    METHODS["cocktail"] = Perturbed
    try:
        train(model(), toy(), folder, **FIELDS)
    except RuntimeError as error:
        (folder / f"rank-{rank}.txt").write_text(str(error))


class AllKindsOfSteps(Method):
    """In turn: dense; a sparse pass taught by the dense network; a consolidation step."""

    def plan(self, ctx):
        return [Stage("steps", 2, lambda _: 0.1)]

    def before_stage(self, ctx):
        for name in ("unstructured-0.5", "channel-0.5", "2:4"):
            ctx.cocktail.add(name)

    def step(self, ctx):
        pair = (Pass(name, 0.5, teacher=0) for name in ("channel-0.5000", "2:4"))
        steps = [[Pass("dense")], [Pass("unstructured-0.5000", teacher="dense")]]
        return [*steps, [Pass("dense"), *pair]][ctx.step % 3]


def without_norms() -> torch.nn.Module:
    conv, relu = torch.nn.Conv2d, torch.nn.ReLU
    layers = [conv(1, 8, 3, padding=1), relu(), conv(8, 8, 3, padding=1), relu()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8 * 64, 3)).double()


def joint_batch(folder: Path, rank: int, batch_size: int = 16) -> None:
    """Weights and momentum after 8 steps; together the ranks see 48 samples a step."""
    METHODS["kinds"] = AllKindsOfSteps
    data = toy()
    parts = (data.train, data.holdout, data.test)
    data = Data("toy", 3, *(Split(part.inputs.double(), part.targets) for part in parts))
    fields = {"method": "kinds", "batch_size": batch_size, "epochs": 2, "clip_norm": 1.0}
    trainer = Trainer(*split_fields({"threads": 1, **fields}), folder, quiet())
    torch.manual_seed(0)
    trainer.prepare(without_norms(), data)
    steps, original = [], trainer.stepper.step

    def count(*args):
        original(*args)
        steps.append({n: p.grad.norm() for n, p in trainer.ctx.model.named_parameters()})

    trainer.stepper.step = count
    trainer.run()
    held = dict(trainer.ctx.model.named_parameters())
    momentum = {
        f"momentum.{name}": trainer.ctx.optimizer.state[p]["momentum_buffer"]
        for name, p in held.items()
    }
    norms = {f"gradients.{n}": torch.stack([each[n] for each in steps]) for n in held}
    write_tensors(folder / f"rank-{rank}.safetensors", {**held, **momentum, **norms}, {})


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with what the processes leave that go through several runs; a signal ends the last.

    The processes check themselves that no thread of their group outlives it.
    """
    folder = tmp_path_factory.mktemp("distributed")
    workers = ("whole", "joint_batch", "perturbed", "stopped")
    ended = finish(start({worker: folder / worker for worker in workers}))
    for rank, (status, text) in enumerate(ended):
        assert status == 128 + signal.SIGTERM, text
        (folder / "stopped" / f"rank-{rank}.txt").write_text(text)
    return folder


def test_ranks_agree(done):
    """Masks, parameters, scores and choices are equal; statistics are each rank's own."""
    first, *others = (left_by(done / "whole", rank) for rank in RANKS)
    statistics = {n for n in first if n.endswith(("running_mean", "running_var"))}
    assert any(name.startswith("mask.") for name in first) and first["measured"] == 0
    for other in others:
        differ = {name for name in first if not torch.equal(first[name], other[name])}
        assert differ == statistics and first.keys() == other.keys()


def test_gradients_are_those_of_the_joint_batch(done, tmp_path):
    """Three ranks with b samples each take the steps of one process with 3 b.

    Everything is in double precision and without BatchNorm, so the only difference is the order of
    sums: about 2^-53 = 1e-16 each, times the few thousand terms of a gradient and 8 steps.
    """
    joint_batch(tmp_path, 0, batch_size=48)
    one = left_by(tmp_path, 0)
    assert one["gradients.0.weight"].numel() == 8 and one["gradients.0.weight"].min() > 0
    for rank in RANKS:
        shared = left_by(done / "joint_batch", rank)
        torch.testing.assert_close(shared, one, rtol=1e-11, atol=1e-12)


def test_masks_that_differ_stop_the_run(done):
    for rank in RANKS:
        message = (done / "perturbed" / f"rank-{rank}.txt").read_text()
        assert "masks differ between ranks after a mask step" in message
        assert "check that every rank starts from the same weights and seed" in message
    assert position(done / "perturbed") == (1, 0)  # before the masks


def test_a_signal_to_one_rank_stops_all_and_resume_is_bit_exact(done, tmp_path):
    again, lost = done / "stopped", tmp_path / "lost"
    for rank in RANKS:
        text = (again / f"rank-{rank}.txt").read_text()
        assert "stopped by SIGTERM at step 2 of stage 3; go on with: sparse-cocktail" in text
    assert position(again) == (3, 2)
    children = start({"resumed": again, "dying": lost})
    children[1].wait(LIMIT)
    since = time.monotonic()
    ended = finish(children)
    for rank in RANKS:
        assert same(left_by(again, rank), left_by(done / "whole", rank))
    files = [folder / "cocktail.safetensors" for folder in (again, done / "whole")]
    assert same(*(read_tensors(path)[0] for path in files))
    assert losses(again) == losses(done / "whole")
    # the second run of these processes lost rank 1 in the middle of a stage
    assert time.monotonic() - since < 20 and position(lost) == (1, 0)
    assert [status for status, _ in ended] == [1, 9, 1]
    for rank in (0, 2):
        assert f"ConnectionError: rank {rank} stops because another of the 3 p" in ended[rank][1]


def losses(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "train"]


def test_resume_with_another_number_of_processes_is_refused(done):
    dropping = torch.nn.Sequential(torch.nn.Dropout(0.1), model())
    with pytest.raises(ValueError, match=r"resume: the run in .* has 3 processes, but 1 were"):
        train(dropping, toy(), done / "whole", resume=True, **FIELDS)


def test_every_parameter_gets_a_gradient_in_every_subnet():
    """What DDP needs: it waits for the gradient of each parameter, in the last pass of a step."""
    from sparse_cocktail import Cocktail, convert

    cocktail = Cocktail(convert(models.build("resnet8", {"width": 8, "classes": 3})))
    for name in ("unstructured-0.7", "channel-0.7", "2:4"):
        cocktail.add(name)
    for name in cocktail.subnets:
        cocktail.model.zero_grad(set_to_none=True)
        cocktail.activate(name)
        cocktail.model(torch.randn(4, 1, 8, 8)).sum().backward()
        assert all(p.grad is not None for p in cocktail.model.parameters()), name


def test_torchrun(tmp_path):
    """The command line, end to end: one rank writes and prints."""
    tiny = ["--epochs", "1", "--stages", "2", "--model-args", '{"width": 4}']
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", *torchrun, "-m", "sparse_cocktail.cli", "train", "--recipe", "digits"]
    command += [*tiny, "--device", "cpu", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    options = {"capture_output": True, "text": True, "timeout": LIMIT, "env": environment}
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("networks in") == 1 and done.stdout.count("are masked on cpu") == 1
    assert "FutureWarning" not in done.stderr
    (results,) = tmp_path.rglob("results.json")
    assert len(json.loads(results.read_text())["subnets"]) == 6
    assert (tmp_path / "run" / "plots").is_dir()


if __name__ == "__main__":
    torch.set_num_threads(1)
    stop = 0
    try:
        with process_group("cpu") as own_rank:
            for worker, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
                globals()[worker](Path(folder), own_rank)
    except SystemExit as end:
        stop = end.code
    if names := left_threads():
        raise SystemExit(f"threads outlive their process group: {names}")
    raise SystemExit(stop)
