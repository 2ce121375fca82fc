"""What users do to a cocktail and a run besides the straight path."""

import copy
import json
import tempfile
import warnings

import pytest
import torch
from test_engine import SHORT, OneSubnet, model, run, toy, trained
from torch import nn

from sparse_cocktail import (
    NM,
    Block,
    Cocktail,
    MaskedConv2d,
    NMConv2d,
    Unstructured,
    convert,
    load_slim,
    ops,
    parse,
    premasked,
    prune_,
    recalibrate,
    to_compressed,
    to_dense,
    to_slim,
)
from sparse_cocktail.callbacks import _Turns
from sparse_cocktail.checkpoint import load_checkpoint
from sparse_cocktail.data import Data, Split
from sparse_cocktail.engine import train
from sparse_cocktail.methods import METHODS, Pass
from sparse_cocktail.stepping import Stepper

CHANNEL = "channel-0.5000"


def images(count=4):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cocktail():
    made = Cocktail(convert(model()).eval())
    for pattern in (CHANNEL, "unstructured-0.5"):
        made.add(pattern)
    return made


# ---- models that move, reload, come back ---------------------------------------------------------


def moved(cocktail):
    cocktail.model._apply(torch.clone)  # what .to(device) does to buffers


def assigned(cocktail):
    state = {k: v.clone() for k, v in cocktail.model.state_dict().items()}
    cocktail.model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("happens", [moved, assigned])
def test_a_cocktail_follows_its_model(cocktail, happens):
    with torch.no_grad(), cocktail.using(CHANNEL):
        before = cocktail.model(images())
    happens(cocktail)
    with torch.no_grad(), cocktail.using(CHANNEL):
        assert torch.equal(cocktail.model(images()), before)
        assert all(m.density < 1 for n, m in cocktail.layers.items() if n != "fc")
    cocktail.add("2:4")
    fresh = ops.nm_mask(cocktail.layers["blocks.0.conv1"].weight, 2, 4)
    assert torch.equal(cocktail.bank.views(cocktail.subnets["2:4"].row)[0], fresh)


def test_a_subnet_is_made_from_weights_that_were_assigned_just_before(cocktail):
    state = {k: torch.rand_like(v.float()) for k, v in cocktail.model.state_dict().items()}
    cocktail.model.load_state_dict(state, assign=True)
    added = cocktail.add("2:4")
    fresh = ops.nm_mask(cocktail.layers["blocks.0.conv1"].weight, 2, 4)
    assert torch.equal(cocktail.bank.views(added.row)[0], fresh)


def test_a_masked_state_dict_restores_silent_norms(cocktail):
    for norm in cocktail.norms.values():
        nn.init.normal_(norm.bias)
    cocktail.activate(CHANNEL)
    other = convert(model()).eval()
    other.load_state_dict(copy.deepcopy(cocktail.model.state_dict()))
    with torch.no_grad():
        assert torch.equal(other(images()), cocktail.model(images()))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "converted"])
def test_a_file_of_an_own_model_loads_into_it(tmp_path, plain):
    def net():
        layers = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(64, 3))

    results = train(net(), toy(), tmp_path, **SHORT)
    fitting = net() if plain else convert(net(), skip=["4"])
    loaded = Cocktail.load(tmp_path / "cocktail.safetensors", fitting)
    assert list(loaded.subnets) == [s["name"] for s in results["subnets"]]
    assert loaded.norms["2"].source == "1"


# ---- the classes of a classifier -----------------------------------------------------------------


def test_channels_of_the_output_layer_are_never_pruned(cocktail):
    cocktail.activate(CHANNEL)
    assert cocktail.layers["fc"].density == 1.0
    assert (cocktail.model(images()).abs().sum(0) > 0).all()


def test_nor_by_the_method(tmp_path):
    run(tmp_path, mask_linear=True, stages=3)
    saved = Cocktail.load(tmp_path / "cocktail.safetensors")
    for name in saved.subnets:
        saved.activate(name)
        assert saved.layers["fc"].live.all()
        if name.startswith("unstructured"):
            assert saved.layers["fc"].density < 1.0


def test_a_layer_without_weights_is_told():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        net[1].weight.mul_(1e-6)
    made = Cocktail(convert(net))
    with pytest.warns(UserWarning, match=r"unstructured-0.6000: no weight is left in \['1'\]"):
        made.add("unstructured-0.6")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.add("2:4")


# ---- training ------------------------------------------------------------------------------------


def method_of(monkeypatch, *passes):
    monkeypatch.setitem(METHODS, "one", type("One", (OneSubnet,), {"passes": list(passes)}))


def test_silent_channels_keep_scale_shift_and_momentum(tmp_path, monkeypatch):
    method_of(monkeypatch, Pass(CHANNEL))
    seen = {}
    original = OneSubnet.before_stage

    def look(self, ctx):
        original(self, ctx)
        seen.update({n: m.weight.detach().clone() for n, m in ctx.cocktail.norms.items()})

    monkeypatch.setattr(OneSubnet, "before_stage", look)
    ctx = trained(tmp_path, weight_decay=0.1).ctx
    live = dict(zip(ctx.cocktail.layers, ctx.cocktail.subnets[CHANNEL].live, strict=True))
    checked = 0
    for name, norm in ctx.cocktail.norms.items():
        if norm.source in live:
            dead = ~live[norm.source]
            assert torch.equal(norm.weight[dead], seen[name][dead])
            assert (norm.weight[~dead] != seen[name][~dead]).all()
            assert not ctx.optimizer.state[norm.weight]["momentum_buffer"][dead].any()
            checked += int(dead.sum())
    assert checked > 10


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch, parts):
    method_of(monkeypatch, Pass("dense"))

    def weight(folder, **fields):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
        train(net, toy(), tmp_path / folder, method="one", threads=1, lr=0.02, **fields)
        return net[1].weight

    torch.testing.assert_close(weight("whole"), weight("parts", accumulate=parts))


def test_the_last_good_checkpoint_is_finite(tmp_path, monkeypatch):
    original = Stepper.step

    def explode(self, inputs, targets, lr):
        original(self, inputs, targets, float("inf") if self.ctx.step == 3 else lr)

    monkeypatch.setattr(Stepper, "step", explode)
    with pytest.raises(FloatingPointError, match=r"is not finite at step 4 of stage 0.*lower lr"):
        run(tmp_path, epochs=2, checkpoint_every=2)
    tree = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert tree["step"] == 2 and all(t.isfinite().all() for t in tree["model"].values())
    monkeypatch.setattr(Stepper, "step", original)
    assert len(run(tmp_path, epochs=2, checkpoint_every=2, resume=True)["subnets"]) == 6


def test_weights_that_explode_in_the_last_step_are_not_a_result(tmp_path, monkeypatch):
    original = Stepper.step

    def explode(self, inputs, targets, lr):
        last = (self.ctx.stage, self.ctx.step) == (3, 2)
        original(self, inputs, targets, float("inf") if last else lr)

    monkeypatch.setattr(Stepper, "step", explode)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_lost_log_does_not_stop_a_resume(tmp_path):
    run(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    run(tmp_path, resume=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line) for line in lines)


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path):
    run(tmp_path, stages=2)
    run(tmp_path, stages=1, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "pool").iterdir()) == [
        "stage-00.safetensors",
        "stage-01.safetensors",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nm": {"1:2": 1, "2:4": 1}}, r"nm=.* a stage of its own"),
        ({"nm": {"1:2": "2"}}, r"nm=.* whole number"),
        ({"prune_unstructured": 1.5}, r"prune_unstructured=1.5 is not in \(0, 1\)"),
        ({"prune_channel": 0.0}, r"prune_channel=0.0 is not in \(0, 1\)"),
        ({"beta": 2.0}, r"beta=2.0 is not in \[0, 1\]"),
        ({"stages": 60}, r"stages=60 gives two subnets the same name"),
        ({"warmup": -3}, r"warmup=-3 is negative"),
        ({"lr": float("inf")}, r"lr=inf is not finite"),
        ({"weight_decay": float("nan")}, r"weight_decay=nan is not finite"),
        ({"label_smoothing": 2}, r"label_smoothing=2 is not in \[0, 1\]"),
        ({"seed": -1}, r"seed=-1 is not in \[0, 2\^32\)"),
        ({"device": "gpu"}, r"device='gpu' is unknown; use auto, cpu or cuda"),
        ({"device": "cuda:7"}, r"device='cuda:7', but torch sees no GPU"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_options_are_checked_before_the_first_step(tmp_path, fields, message):
    if fields.get("device") == "cuda:7" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


# ---- data ----------------------------------------------------------------------------------------

GOOD = Split(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Split(torch.zeros(4, 2), torch.zeros(1)), ValueError, "4 inputs have 1 targets"),
        (lambda: Split(torch.zeros(0, 2), torch.zeros(0)), ValueError, "there is no sample"),
        (lambda: Split([1.0], torch.zeros(1)), TypeError, "inputs is a list"),
        (lambda: Split(torch.zeros(1, dtype=torch.uint8), torch.zeros(1)), TypeError, "uint8"),
        (lambda: Data("x", 2, GOOD, GOOD, GOOD), ValueError, "labels 0 to 2, but classes=2"),
        (lambda: Data("x", 3, (1, 2), GOOD, GOOD), TypeError, "train is a tuple, not a Split"),
    ],
    ids=["count", "empty", "list", "dtype", "classes", "tuple"],
)
def test_data_is_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, toy), r"model=None is a NoneType, but it must be an nn.Module"),
        ((model, lambda: GOOD), r"data is a Split, but it must be a name or data.Data"),
        ((model, lambda: [(1, 2)]), r"data is a list, but it must be a name or data.Data"),
        ((model, toy, "accuracy"), r"task='accuracy' is a str, .* loss, distill and metric"),
    ],
    ids=["model", "split", "list", "task"],
)
def test_a_run_of_wrong_things_does_not_begin(tmp_path, arguments, message):
    net, data, *task = arguments
    with pytest.raises(TypeError, match=f"train: {message}"):
        train(net and net(), data(), tmp_path / "run", task=next(iter(task), None), **SHORT)
    assert not (tmp_path / "run").exists()


def test_skip_takes_one_name_and_refuses_names_without_layers():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert list(convert(net, skip="2").conversion.left) == ["2"]
    with pytest.raises(ValueError, match=r"skip names \['1'\], but no linear or convolution layer"):
        convert(net, skip=["1"])


class LateStem(nn.Module):
    """The head is registered before the stem, and one BatchNorm stands under two names."""

    def __init__(self):
        super().__init__()
        self.head, self.norm = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(4)
        self.stem, self.alias = nn.Conv2d(1, 4, 3), self.norm

    def forward(self, x):
        return self.head(self.alias(self.stem(x)))


def test_the_first_convolution_is_the_one_that_runs_first():
    assert convert(LateStem()).conversion.masked == ["stem"]
    assert convert(LateStem(), example_input=images()).conversion.masked == ["head"]


def test_a_norm_under_two_names_stays_one():
    net = convert(LateStem(), example_input=images())
    assert net.norm is net.alias and hasattr(net.norm, "live")


# ---- arguments of wrong kinds --------------------------------------------------------------------

BATCH = torch.zeros(2, 1, 8, 8)
MODEL_ERRORS = {
    "convert": (lambda c: convert(c), r"convert: model is a Cocktail.*nn.Module; .*cocktail.model"),
    "skip": (lambda c: convert(model(), skip=5), r"convert: skip=5 is a int.*names of layers"),
    "skip_type": (lambda c: convert(model(), skip=nn.Linear), r"convert: skip is a type"),
    "prune": (lambda c: prune_(None, "2:4"), r"prune_: model=None is a NoneType"),
    "dense": (lambda c: to_dense(c), r"to_dense: model is a Cocktail"),
    "compressed": (lambda c: to_compressed(c, "2:4"), r"to_compressed: model is a Cocktail"),
    "slim": (lambda c: to_slim(c, BATCH), r"to_slim: model is a Cocktail"),
    "load_slim": (lambda c: load_slim(model(), model()), r"load_slim: state is a .*state_dict\(\)"),
    "cocktail": (lambda c: Cocktail(c), r"Cocktail: model is a Cocktail"),
    "load": (lambda c: loaded(c, "resnet8"), r"Cocktail.load: model='resnet8' is a str"),
    "premasked": (lambda c: premasked(c).__enter__(), r"premasked: model is a Cocktail"),
    "premasked_to": (
        lambda c: premasked(prune_(model(), "2:4"), "bf16").__enter__(),
        r"masked_weights: dtype='bf16'",
    ),
    "recalibrate": (lambda c: recalibrate(c, [BATCH]), r"recalibrate: model is a Cocktail"),
    "pairs": (
        lambda c: recalibrate(model(), [(BATCH, torch.zeros(2))]),
        r"recalibrate: a batch is a tuple, .* leave targets out",
    ),
    "one_batch": (lambda c: c.recalibrate("dense", BATCH), r"batches is a Tensor, .* list; put it"),
    "subnet": (lambda c: c.activate(c.subnets[CHANNEL]), r"name is a Subnet, .* subnet.name"),
    "masks": (lambda c: c.set_masks(CHANNEL, None), r"bits=None is a NoneType, .* list"),
    "plain": (lambda c: c.export(CHANNEL, BATCH), r"export: plain is a Tensor.* example_input=x"),
    "latency": (lambda c: c.latency(CHANNEL, (BATCH,)), r"example_input is a tuple"),
    "save": (
        lambda c: c.save("/dev/null", names=CHANNEL),
        r"names='channel-0.5000' is a str, .*list",
    ),
    "conv": (
        lambda c: MaskedConv2d.from_dense(nn.Conv1d(2, 2, 1)),
        r"layer is a Conv1d.*nn.Conv2d",
    ),
    "nm_conv": (lambda c: NMConv2d(nn.Conv1d(4, 4, 1), "2:4"), r"layer is a Conv1d.*nn.Conv2d"),
    "parse": (
        lambda c: parse((2, 4)),
        r"parse: pattern is a tuple, but it is a name such as '2:4'",
    ),
    "sparsity": (lambda c: Unstructured("0.5"), r"sparsity='0.5' is not a number"),
    "ratio": (lambda c: NM(2.0, 4), r"n=2.0, m=4 are not integers"),
    "block": (lambda c: Block(1.5, 2, 0.5), r"rows=1.5, cols=2 are not integers"),
    "turns": (lambda c: _Turns(c.model), r"_Turns: cocktail is a .*, but it must be a Cocktail"),
    "turns_name": (lambda c: _Turns(c, CHANNEL), r"names='channel-0.5000' is a str, .* list"),
    "turns_every": (lambda c: _Turns(c, every=1.5), r"every=1.5 is not an integer"),
    "turns_batches": (
        lambda c: _Turns(c, batches=BATCH),
        r"batches is a Tensor, .* more than once",
    ),
    "turns_once": (lambda c: _Turns(c, batches=iter([BATCH])), r"batches is a list_iterator, but"),
}


def loaded(cocktail, network):
    with tempfile.TemporaryDirectory() as folder:
        cocktail.save(path := f"{folder}/menu.safetensors")
        Cocktail.load(path, network)


@pytest.mark.parametrize(("call", "message"), MODEL_ERRORS.values(), ids=MODEL_ERRORS)
def test_wrong_kinds_are_named(cocktail, call, message):
    with pytest.raises(TypeError, match=message):
        call(cocktail)


def test_names_that_are_not_saved_are_told(cocktail, tmp_path):
    with pytest.raises(KeyError, match="'nope' is unknown"):
        cocktail.save(tmp_path / "a", names=["nope"])
    cocktail.save(tmp_path / "a", names=["unstructured-0.5"])  # not its canonical name
    assert list(Cocktail.load(tmp_path / "a", model()).subnets) == ["dense", "unstructured-0.5000"]


def test_a_pattern_that_no_layer_can_take_is_no_subnet(cocktail):
    with pytest.raises(ValueError, match=r"no layer can take the pattern 5:31: in="):
        cocktail.add("5:31")


# ---- damaged files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def damaged(data: bytes, number: int) -> bytes:
    """A cut, a changed byte, a run of zeros, a doubled or a missing piece, somewhere."""
    generator = torch.Generator().manual_seed(number)
    at = int(torch.randint(len(data) - 1, (1,), generator=generator))
    if number % 2:  # half of them hit the header, which is short
        at %= 2000
    size = 1 + int(torch.randint(64, (1,), generator=generator))
    other = bytes([data[at] ^ (1 << number % 8)])
    return (
        data[:at],
        data[:at] + other + data[at + 1 :],
        data[:at] + bytes(size) + data[at + size :],
        data[:at] + data[at : at + size] + data[at:],
        data[:at] + data[at + size :],
    )[number // 2 % 5]


@pytest.mark.parametrize("name", ["cocktail.safetensors", "checkpoint.safetensors"])
def test_a_hundred_damaged_files_are_a_hundred_clear_errors(whole_files, tmp_path, name):
    data = (whole_files / name).read_bytes()
    load = Cocktail.load if name.startswith("cocktail") else load_checkpoint
    for number in range(100):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(changed := damaged(data, number))
        if changed == data:
            continue
        with pytest.raises(ValueError, match=r"no whole safetensors file|edited or damaged|is no "):
            load(path)


def test_equal_cocktails_are_equal_bytes(cocktail, tmp_path):
    files = [tmp_path / str(i) for i in range(5)]
    for path in files:
        cocktail.save(path, {"note": 1})
    assert len({path.read_bytes() for path in files}) == 1
