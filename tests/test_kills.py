"""A run that is killed at random moments and resumed ends with the bits of an undisturbed one.

    python tests/test_kills.py --kills 20 --epochs 4 --stages 4

prints a line for every kill and a verdict; the test suite does one of a shorter run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1200  # seconds for one undisturbed run
CONSOLIDATE = 2.0  # in stages, instead of the recipe's 8.5: no kill needs the length


def command(folder: Path, epochs: int, stages: int) -> list[str]:
    """Train on digits; go on where the folder holds a run."""
    start = [sys.executable, "-m", "sparse_cocktail.cli", "train", "--out", str(folder)]
    if (folder / "config.json").exists():
        return [*start, "--resume"]
    fields = {"epochs": epochs, "stages": stages, "checkpoint-every": 5, "log-every": 5}
    fields["consolidate"] = CONSOLIDATE
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    return [*start, "--recipe", "digits", *options]


def attempt(folder: Path, epochs: int, stages: int, moment: float | None) -> bool:
    """One start of the run, killed after `moment` seconds; whether it came to its end before."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command(folder, epochs, stages), env=environment, **pipes)
    try:
        output, _ = child.communicate(timeout=moment or LIMIT)
    except subprocess.TimeoutExpired:
        if moment is None:
            raise
        return False
    finally:
        child.kill()  # SIGKILL: nothing of the process runs any more
        child.wait()
    if child.returncode != 0:
        raise RuntimeError(f"the run ended with status {child.returncode}:\n{output}")
    return True


def difference(one: Path, other: Path) -> str | None:
    """What differs between two finished runs: tensors, accuracies, logged losses, stray files."""
    from sparse_cocktail.files import read_tensors

    a, b = (read_tensors(folder / "cocktail.safetensors")[0] for folder in (one, other))
    if a.keys() != b.keys():
        return f"the cocktails' tensors have other names: {sorted(a.keys() ^ b.keys())}"
    if wrong := [name for name in a if not torch.equal(a[name], b[name])]:
        return f"{len(wrong)} of {len(a)} tensors differ: {wrong[:5]}"
    subnets = [json.loads((f / "results.json").read_text())["subnets"] for f in (one, other)]
    if subnets[0] != subnets[1]:
        return "results.json has other subnets or accuracies"
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    losses = [[x for x in map(json.loads, log) if x["event"] == "train"] for log in logs]
    if losses[0] != losses[1]:
        return "log.jsonl has other losses"
    names = [{str(f.relative_to(folder)) for f in folder.rglob("*")} for folder in (one, other)]
    return f"the folders hold other files: {names[0] ^ names[1]}" if names[0] != names[1] else None


def position(folder: Path) -> str:
    """Where a killed run's checkpoint stands."""
    from sparse_cocktail.checkpoint import load_checkpoint

    try:
        tree = load_checkpoint(folder / "checkpoint.safetensors")
    except FileNotFoundError:
        return "before the first checkpoint"
    return f"checkpoint at stage {tree['stage']}, step {tree['step']}"


def kill_and_compare(
    folder: Path, kills: int, epochs: int, stages: int, seed: int, say: Callable[[str], None]
) -> int:
    """Kill a run `kills` times, in as many complete runs as that takes; returns their number.

    Moments are drawn from the time that an undisturbed run trains for; a start that ends before its
    moment ends the run, which is compared, and another one begins. RuntimeError at a difference.
    """
    whole, since = folder / "whole", time.monotonic()
    attempt(whole, epochs, stages, None)
    duration = time.monotonic() - since
    trained = json.loads((whole / "results.json").read_text())["seconds"]["total"]
    say(f"undisturbed: {duration:.1f} s, of which {trained:.1f} s in the loop")
    startup, draw, done, runs = duration - trained, random.Random(seed), 0, 0
    while done < kills:
        runs += 1
        broken, finished, before = folder / f"broken-{runs}", False, done
        while not finished:
            moment = draw.uniform(startup, duration) if done < kills else None
            since = time.monotonic()
            finished = attempt(broken, epochs, stages, moment)
            if not finished:
                done += 1
                say(f"kill {done:2} after {moment:5.1f} s, run {runs}: {position(broken)}")
        if found := difference(whole, broken):
            raise RuntimeError(f"run {runs} is not the undisturbed one: {found}")
        say(f"run {runs} ended: bit for bit the undisturbed one")
        if done == before:  # the machine has become faster: later moments would all miss
            faster = min(1.0, (time.monotonic() - since) / duration)
            startup, duration = startup * faster, duration * faster
    return runs


@pytest.mark.slow
def test_a_kill_at_a_random_moment(tmp_path):
    """test_methods.py does two for every method, at chosen steps."""
    lines: list[str] = []
    kill_and_compare(tmp_path, kills=1, epochs=1, stages=2, seed=1, say=lines.append)
    assert sum(line.startswith("kill") for line in lines) == 1


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    from sparse_cocktail.run_folder import RunFolder

    stray = tmp_path / ".checkpoint.safetensors.7.partial"
    stray.write_bytes(b"half")
    folder = RunFolder(tmp_path, {})
    folder.claim(resume=True)
    folder.finish({})
    assert not stray.exists() and (tmp_path / "results.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 20), ("epochs", 4), ("stages", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = kill_and_compare(Path(folder), **vars(given), say=lambda x: print(x, flush=True))
    print(f"{given.kills} kills in {runs} runs: every run ended with the undisturbed run's bits")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
