"""What holds for every method: resume after SIGKILL, equal masks on all ranks, costs as stated.

    python tests/test_methods.py killed FOLDER METHOD ...

does the first for some methods. Runs are those of one process that forks, so that Python and torch
start once; nothing is computed before a fork.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from rich.console import Console
from test_engine import MODEL, toy

from sparse_cocktail.cocktail import Cocktail
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import generator_for
from sparse_cocktail.distributed import process_group
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, Context
from sparse_cocktail.schedules import cosine
from sparse_cocktail.stepping import Stepper

# Two ratios, or what comes closest, in runs of a second.
COMMON = {"threads": 1, "recalibrate_samples": 64, "batch_size": 16, "epochs": 2, "stages": 2}
COMMON |= {"checkpoint_every": 8, "log_every": 2}
OWN = {
    "cocktail": {"interpolation": True, "search_samples": 0, "consolidate": 1.0},
    "ast": {"ladder": "unstructured+channel+n:m", "dense": True, "interleave": True},
}
RANKS = 2
STEPS = 14  # of an epoch of 224 samples
KILLS = (0.37, 0.8)  # of a run's steps


def fields_of(method: str) -> dict:
    return {**MODEL, **COMMON, "method": method, **OWN.get(method, {})}


# ---- what the processes do -----------------------------------------------------------------------


def in_a_fork(work) -> int:
    """Exit status of a child process that does `work`; -9 when SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(method: str, folder: Path, die_at: int | None = None) -> None:
    """Train; go on where the folder holds a run; end by SIGKILL before step `die_at` of this run.

    The number of steps that were done is written into the folder.
    """
    original, done = Stepper.step, 0

    def counted(self, *args):
        nonlocal done
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args)
        done += 1

    Stepper.step = counted
    resume = (folder / "config.json").exists()
    train("resnet8", toy(), folder, resume=resume, **fields_of(method))
    (folder / "steps.txt").write_text(str(done))


def killed(folder: Path, *methods: str) -> None:
    """Each method undisturbed, then killed twice and resumed."""
    import torch._dynamo  # noqa: F401 - which the first optimizer imports: once, not in every fork

    for method in methods:
        whole, broken = folder / method / "whole", folder / method / "broken"
        assert in_a_fork(lambda m=method, f=whole: run(m, f)) == 0, method
        steps = int((whole / "steps.txt").read_text())
        first, second = (int(share * steps) for share in KILLS)
        for die_at in (first, second - first):
            status = in_a_fork(lambda m=method, f=broken, at=die_at: run(m, f, at))
            assert status == -signal.SIGKILL, (method, status)
        assert in_a_fork(lambda m=method, f=broken: run(m, f)) == 0, method


def ranks(folder: Path, *methods: str) -> None:
    """Each method on all ranks of the group, which note every mask that is made."""
    with process_group("cpu") as rank:
        for method in methods:
            seen, original = [], Cocktail._look_at

            def note(self, subnet, seen=seen, original=original):
                seen.append([subnet.name, self.bank.digest(subnet.row)])
                original(self, subnet)

            Cocktail._look_at = note
            train("resnet8", toy(), folder / method, **fields_of(method))
            Cocktail._look_at = original
            (folder / f"{method}-{rank}.json").write_text(json.dumps(seen))
    if names := processes.left_threads():
        raise SystemExit(f"threads outlive their process group: {names}")


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, __file__, "killed", str(folder), *METHODS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"capture_output": True, "text": True, "timeout": 600, "env": environment}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return folder


def left(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of all files of a run, but its checkpoint."""
    files = [f for f in sorted(folder.rglob("*.safetensors")) if f.name[:10] != "checkpoint"]
    return {str(file.relative_to(folder)): read_tensors(file)[0] for file in files}


def lines(folder: Path, event: str) -> list[dict]:
    read = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in read if line["event"] == event]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(after_kills, method):
    whole, broken = after_kills / method / "whole", after_kills / method / "broken"
    undisturbed, resumed = left(whole), left(broken)
    assert undisturbed.keys() == resumed.keys() and undisturbed
    for file, tensors in undisturbed.items():
        assert tensors.keys() == resumed[file].keys()
        differ = [name for name in tensors if not torch.equal(tensors[name], resumed[file][name])]
        assert not differ, (file, differ[:3])
    one, other = (json.loads((f / "results.json").read_text()) for f in (whole, broken))
    assert one["subnets"] == other["subnets"] and one["method_state"] == other["method_state"]
    assert lines(whole, "train") == lines(broken, "train")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_costs_what_its_method_says(after_kills, method):
    """Forward-backward passes, with forwards by thirds; the last batch of an epoch is left out."""
    config, options = split_fields(fields_of(method))
    results = json.loads((after_kills / method / "whole" / "results.json").read_text())
    passes = sum(count for what, count in results["passes"].items() if what == "train")
    stated = METHODS[method].cost(options, config.epochs) * STEPS
    assert passes == pytest.approx(stated, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_every_subnet_has_what_its_name_says(after_kills, method):
    """Exact sparsity in the files that a run leaves."""
    folder = after_kills / method / "whole"
    rows = json.loads((folder / "results.json").read_text())["subnets"]
    assert rows
    for row in rows:
        cocktail = Cocktail.load(folder / (row["weights"] or "cocktail.safetensors"))
        assert row["name"] in cocktail.subnets
        if row["pattern"] == "unstructured":
            kept = cocktail.bank.count(cocktail.subnets[row["name"]].row)
            density = cocktail.subnets[row["name"]].pattern.density
            assert kept == int(density * cocktail.bank.numel + 0.5), row["name"]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    children = processes.start(__file__, ["ranks", folder, *METHODS], RANKS)
    for status, text in processes.finish(children, 400):
        assert status == 0, text
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_identical_on_every_rank(on_ranks, method):
    first, *others = (
        json.loads((on_ranks / f"{method}-{rank}.json").read_text()) for rank in range(RANKS)
    )
    assert first and all(other == first for other in others)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])


CHANNELS = {
    **dict.fromkeys(("ast", "mutualnet", "spartan", "acdc", "gmp"), {"patterns": "channel-0.5"}),
    "sup-tickets": {"patterns": "channel-0.5", "base": "gmp"},
    "cocktail": {"prune_channel": 0.5, "interpolation": False, "consolidate": 0},
    "refilling": {"prune_channel": 0.5, "channel_allocation": "uniform"},
}


@pytest.mark.parametrize("method", CHANNELS)
def test_channels_of_the_output_layer_are_never_pruned(tmp_path, method):
    fields = {**fields_of(method), **CHANNELS[method], "mask_linear": True, "stages": 1}
    results = train("resnet8", toy(), tmp_path, **{**fields, "batch_size": 56})
    (row,) = (row for row in results["subnets"] if row["name"] == "channel-0.5000")
    cocktail = Cocktail.load(tmp_path / (row["weights"] or "cocktail.safetensors"))
    assert list(cocktail.layers)[-1] == "fc"
    *others, head = cocktail.subnets[row["name"]].live
    assert head.all() and len(head) == 3 and not all(live.all() for live in others)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "cocktail"])
def test_the_learning_rate_falls_over_a_whole_stage(tmp_path, method):
    own = {"acdc": {"finetune": 0.5}, "sup-tickets": {"cyclic_share": 0.0}}.get(method, {})
    fields = {**fields_of(method), "epochs": 4, "lr": 0.2, "lr_schedule": "cosine", **own}
    trainer = Trainer(*split_fields(fields), tmp_path, Console(quiet=True))
    trainer.prepare("resnet8", toy(), resume=False, overwrite=False)
    lengths = set()
    for stage in trainer.ctx.stages:
        steps = stage.epochs * STEPS
        rates = [cosine(0.2, 0.001, step / steps) for step in range(steps)]
        assert [stage.lr(step) for step in range(steps)] == rates
        lengths.add(stage.epochs)
    assert lengths == ({4, 2} if method == "acdc" else {4})


def test_draws_have_a_generator_of_their_own_at_every_position():
    def seeds(make) -> set[int]:
        places = itertools.product(range(2), range(3), range(9))
        return {make(*place).initial_seed() for place in places}

    def of_method(seed: int, stage: int, step: int) -> torch.Generator:
        config = SimpleNamespace(seed=seed)
        return Context.generator(SimpleNamespace(config=config, stage=stage, step=step))

    drawn, orders = seeds(of_method), seeds(generator_for)  # of (seed, stage, epoch)
    assert len(drawn) == 2 * 3 * 9 and drawn == seeds(of_method)
    assert drawn.isdisjoint(orders)
