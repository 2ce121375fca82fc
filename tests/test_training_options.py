"""Recipe fields of the engine do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine import MODEL, SHORT, OneSubnet, Stop, crash_before, model, run, same, toy, weights

from sparse_cocktail import Cocktail, models, stepping
from sparse_cocktail.checkpoint import load_checkpoint
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors, write_tensors
from sparse_cocktail.methods import METHODS, Pass
from sparse_cocktail.stepping import Stepper


@pytest.fixture
def rates(monkeypatch):
    """Learning rates and gradient norms of all steps, as the optimizer saw them."""
    seen = []
    original = torch.optim.SGD.step

    def look(self, *args, **kwargs):
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        seen.append((self.param_groups[0]["lr"], float(norm), self.param_groups))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", look)
    return seen


def test_warmup_rises_linearly(tmp_path, rates):
    run(tmp_path / "plain", epochs=2)
    plain = [lr for lr, *_ in rates]
    rates.clear()
    run(tmp_path / "warm", epochs=2, warmup=1)
    warm = [lr for lr, *_ in rates]
    assert warm[:3] == pytest.approx([plain[0] / 3, plain[1] * 2 / 3, plain[2]])
    assert warm[3:6] == plain[3:6]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(tmp_path, rates, precision):
    run(tmp_path, clip_norm=0.05, precision=precision)
    norms = [norm for _, norm, _ in rates]
    assert max(norms) == pytest.approx(0.05, rel=1e-3)  # of gradients without fp16's scale


def test_norm_and_bias_without_weight_decay(tmp_path, rates):
    run(tmp_path, decay_norm_bias=False, weight_decay=0.01)
    decayed, plain = rates[0][2]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in plain["params"]} == {1}
    of_stage = [lr for lr, _, groups in rates if groups is rates[0][2]]
    assert decayed["lr"] == plain["lr"] == of_stage[-1] < of_stage[0]


def test_nesterov_reaches_the_optimizer(tmp_path, rates):
    run(tmp_path, nesterov=True)
    assert all(group["nesterov"] for group in rates[0][2])


# ---- AdamW ---------------------------------------------------------------------------------------

ADAMW = {"optimizer": "adamw", "lr": 0.01, "min_lr": 0.0, "restart_lr": 0.001}


def test_adamw_takes_its_fields(tmp_path, monkeypatch):
    seen = []
    original = torch.optim.AdamW.step

    def look(self, *args, **kwargs):
        seen.append([{k: v for k, v in g.items() if k != "params"} for g in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    run(tmp_path, **ADAMW, momentum=0.8, beta2=0.98, weight_decay=0.3, decay_norm_bias=False)
    assert all(group["betas"] == (0.8, 0.98) for groups in seen for group in groups)
    assert [group["weight_decay"] for group in seen[0]] == [0.3, 0.0]
    assert seen[0][0]["lr"] == 0.01 and not seen[0][0]["amsgrad"]


def test_resume_with_adamw_is_bit_exact(tmp_path, monkeypatch):
    fields = {**ADAMW, "checkpoint_every": 2, "epochs": 2}
    run(tmp_path / "whole", **fields)
    undo = crash_before(monkeypatch, 1, 5)
    with pytest.raises(Stop):
        run(tmp_path / "broken", **fields)
    undo()
    run(tmp_path / "broken", resume=True, **fields)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


class DenseThenSparse(OneSubnet):
    """In its second stage a dense step, then sparse ones, so that the moments are not 0."""

    def step(self, ctx):
        sparse = ctx.stage == 1 and ctx.step > 0
        return [Pass("channel-0.5000" if sparse else "dense")]


@pytest.mark.parametrize("mask_update", ["freeze", "shared"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_sparse_step_leaves_pruned_weights_and_their_moments(
    tmp_path, monkeypatch, optimizer, mask_update
):
    monkeypatch.setitem(METHODS, "mixed", DenseThenSparse)
    original, moved = Stepper.step, {}

    def tensors(stepper, parameter):
        state = stepper.ctx.optimizer.state[parameter]
        moments = {k: v for k, v in state.items() if v.shape == parameter.shape}
        return {k: v.detach().clone() for k, v in {"weight": parameter, **moments}.items()}

    def look(self, *args):
        if (self.ctx.stage, self.ctx.step) != (1, 1):
            return original(self, *args)
        pairs = self.ctx.cocktail.kept_parameters(["channel-0.5000"])
        before = [tensors(self, p) for p, _ in pairs]
        original(self, *args)
        for (parameter, kept), old in zip(pairs, before, strict=True):
            for name, now in tensors(self, parameter).items():
                changed = now != old[name]
                moved.setdefault(name, []).append((changed[~kept].any(), changed[kept].any()))
        return None

    monkeypatch.setattr(Stepper, "step", look)
    fields = {"method": "mixed", "threads": 1, "recalibrate_samples": 64, "weight_decay": 0.1}
    train(model(), toy(), tmp_path, optimizer=optimizer, mask_update=mask_update, **fields)
    moments = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}[optimizer]
    assert moved.keys() == {"weight", *moments}
    for pairs in moved.values():
        assert all(kept for _, kept in pairs)
        assert all(bool(pruned) == (mask_update == "shared") for pruned, _ in pairs)


# ---- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"mask_first": True}, {"conv1", "blocks"}),
        ({"mask_first": True, "mask_linear": True}, {"conv1", "blocks", "fc"}),
        ({"mask_only": "blocks.2"}, {"blocks"}),
        ({"mask_only": "fc|conv1", "mask_first": True, "mask_linear": True}, {"conv1", "fc"}),
    ],
    ids=["first", "first and last", "one block", "ends"],
)
def test_masks_lie_where_the_fields_say(tmp_path, fields, names):
    run(tmp_path, **fields)
    report = (tmp_path / "log.jsonl").read_text().splitlines()
    masked = next(json.loads(line)["masked"] for line in report if '"conversion"' in line)
    assert {name.partition(".")[0] for name in masked} == names
    if "mask_only" in fields and "blocks" in names:
        assert all(name.startswith("blocks.2.") for name in masked) and masked
    loaded = Cocktail.load(tmp_path / "cocktail.safetensors")
    assert list(loaded.layers) == masked


# ---- precision, weights to start from, logs ------------------------------------------------------


def test_fp16_scales_its_loss_and_trains(tmp_path):
    results = run(tmp_path, precision="fp16", epochs=3)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["scaler"]["scale"] > 1
    assert results["subnets"][0]["accuracy"] > 90


def test_init_is_where_training_starts(tmp_path, monkeypatch):
    state = models.build("resnet8", MODEL["model_args"]).state_dict()
    write_tensors(tmp_path / "start.safetensors", state, {})
    seen = {}
    original = Stepper.step

    def look(self, *args):
        if not seen:
            seen.update({k: v.clone() for k, v in self.ctx.model.state_dict().items()})
        original(self, *args)

    monkeypatch.setattr(Stepper, "step", look)
    run(tmp_path / "run", init=str(tmp_path / "start.safetensors"))
    assert all(torch.equal(seen[name], value) for name, value in state.items())


def test_init_that_does_not_fit(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"w": torch.ones(2)}, {})
    with pytest.raises(ValueError, match=r"init='.*other.safetensors' does not fit"):
        run(tmp_path / "run", init=str(tmp_path / "other.safetensors"))


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra [log] is not installed")
    run(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert events.stat().st_size > 500


def test_label_smoothing_changes_the_training(tmp_path):
    for name, amount in (("sharp", 0.0), ("smooth", 0.2)):
        run(tmp_path / name, label_smoothing=amount)
    sharp, smooth = (
        read_tensors(tmp_path / n / "cocktail.safetensors")[0]["model.fc.weight"]
        for n in ("sharp", "smooth")
    )
    assert not torch.equal(sharp, smooth)


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_engine import Stepper, run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
step = Stepper.step
def fill(self, *args):
    if self.ctx.stage == 0 and self.ctx.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    step(self, *args)
Stepper.step = fill
run(Path(sys.argv[2]), checkpoint_every=2, epochs=2, log_every=100)
"""


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", FULL_DISK, here, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "checkpoint.safetensors was not written" in done.stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["step"] == 2
    assert not list((tmp_path / "run").glob(".*partial"))
    resumed = run(tmp_path / "run", checkpoint_every=2, epochs=2, log_every=100, resume=True)
    assert len(resumed["subnets"]) == 6


def test_a_silent_channel_keeps_its_convolution_bias(tmp_path):
    from sparse_cocktail.config import split_fields
    from sparse_cocktail.engine import Console

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten()
    ).append(torch.nn.Linear(128, 3))
    fields = {**SHORT, "weight_decay": 0.1}
    trainer = Trainer(*split_fields(fields), tmp_path, Console(quiet=True))
    trainer.prepare(net, toy())
    cocktail = trainer.ctx.cocktail
    cocktail.add("channel-0.5")
    masks = {id(p): mask for p, mask in cocktail.kept_parameters(["channel-0.5"])}
    assert masks[id(net[1].bias)].sum() == 4 and masks[id(net[1].weight)].sum() == 4 * 36
    assert id(net[3].weight) not in masks and id(net[0].bias) not in masks


@pytest.mark.parametrize("small", [True, False], ids=["kept for small networks", "layer by layer"])
def test_masked_weights_of_a_pass_are_made_in_one_call(tmp_path, monkeypatch, small):
    """Networks of up to 4 MB of masked weights keep them in a pass; the training is the same."""
    monkeypatch.setattr(stepping, "_SMALL", 2**22 if small else 0)
    original, made = Stepper._run_pass, set()

    def note(layer, _):
        if layer.training and torch.is_grad_enabled():  # no evaluation
            made.add((layer.masked, layer.premasked is not None))

    def look(self, *args):
        if not hasattr(self, "watched"):
            layer = next(iter(self.ctx.cocktail.layers.values()))
            self.watched = layer.register_forward_pre_hook(note)
        return original(self, *args)

    monkeypatch.setattr(Stepper, "_run_pass", look)
    run(tmp_path / "one", epochs=2)
    assert (True, small) in made and (True, not small) not in made and (False, True) not in made
    monkeypatch.setattr(stepping, "_SMALL", 0)
    run(tmp_path / "two", epochs=2)
    one, two = (read_tensors(tmp_path / n / "cocktail.safetensors")[0] for n in ("one", "two"))
    weights = [name for name in one if name.startswith("model.") and one[name].is_floating_point()]
    assert weights
    for name in weights:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
