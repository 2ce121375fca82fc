"""What subnets cost (bytes, milliseconds), and picking one within limits."""

import copy

import pytest
import torch
from commands import call as run_command
from safetensors.torch import load_file
from test_cocktail import network
from torch import nn

from sparse_cocktail import Cocktail, MaskedLinear, convert, models
from sparse_cocktail.costs import best

PATTERNS = ("unstructured-0.8", "channel-0.5", "2:4", "1:8")


X = torch.zeros(2, 3, 8, 8)


@pytest.fixture
def menu():
    cocktail = Cocktail(convert(network()))
    for pattern in PATTERNS:
        cocktail.add(pattern)
    return cocktail


def figures(cocktail, what, example=X):
    return {row["name"]: row[what] for row in cocktail.summary(example)}


def record(cocktail, **accuracies):
    for name, accuracy in accuracies.items():
        cocktail.subnet(name.replace("nm", "").replace("_", ":")).accuracy = accuracy


# ---- bytes ---------------------------------------------------------------------------------------


def state_size(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_against_hand_computed_numbers(dtype):
    cocktail = Cocktail(convert(network().to(dtype)))
    for pattern in PATTERNS:
        cocktail.add(pattern)
    size, found = dtype.itemsize, figures(cocktail, "bytes", None)
    conv, fc = 13 * 40 * 9, 13 * 5  # masked weights
    dense = state_size(network().to(dtype))
    assert found["dense"] == dense == state_size(cocktail.export("dense"))
    assert found["2:4"] == dense - conv // 2 * size + conv // 8  # a bit for each weight
    assert found["1:8"] == dense - conv * 7 // 8 * size + conv // 8
    # 6 rows of 360 weights, their biases, and scale, shift, mean and variance behind; no mask
    assert found["channel-0.5000"] == dense - 6 * (360 + 1 + 4) * size
    kept = [int(layer.mask.sum()) for layer in activated(cocktail, "unstructured-0.8")]
    assert sum(kept) == 949 and cocktail.layers["3"].live.all() and cocktail.layers["8"].live.all()
    assert found["unstructured-0.8000"] == dense - (conv + fc - 949) * size + conv // 8 + 9


def activated(cocktail, name):
    cocktail.activate(name)
    return cocktail.layers.values()


def test_bytes_of_half_empty_rows_with_silent_channels():
    """4 of 8 rows are gone; of the rest, 3 of 12 weights each are kept."""
    layer = MaskedLinear(12, 8)
    cocktail = Cocktail(layer)
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[::2, :3] = True
    layer.set_mask(mask)
    bits = layer.mask_bits.clone()
    layer.set_mask(None)
    cocktail.add("unstructured-0.875", [bits])
    row = cocktail.summary()[1]
    assert row["nnz"] == 12 and row["parameters"] == 12 + 4
    assert row["bytes"] == (12 + 4) * 4 + 4 * 12 // 8


def test_a_tied_tensor_is_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(10, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scratch", torch.zeros(100), persistent=False)

    cocktail = Cocktail(convert(Tied()))
    cocktail.add("2:4")
    assert figures(cocktail, "bytes", None) == {
        "dense": 4 * (80 + 64 + 8),
        "2:4": 4 * (80 + 32 + 8) + 8,
    }


def test_figures_of_resnet8_do_not_depend_on_the_active_subnet():
    cocktail = Cocktail(convert(models.build("resnet8", {"width": 8})))
    cocktail.add("channel-0.3")
    cocktail.add("2:4")
    before = cocktail.summary(torch.zeros(1, 1, 8, 8))
    cocktail.activate("channel-0.3")
    assert cocktail.summary(torch.zeros(1, 1, 8, 8)) == before
    assert cocktail.active == "channel-0.3000"
    assert before[0]["bytes"] == state_size(cocktail.export("dense"))


# ---- picking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["flops", "bytes"])
def test_without_accuracies_the_least_sparse_that_fits(menu, what):
    costs, nnz = figures(menu, what), figures(menu, "nnz")
    for limit in {*costs.values(), *(cost + 1 for cost in costs.values()), 1e9}:
        fitting = [name for name, cost in costs.items() if cost <= limit]
        picked = menu.pick(**{f"max_{what}": limit}, example_input=X)
        assert picked is menu.subnets[picked.name]
        assert picked.name in fitting and nnz[picked.name] == max(nnz[n] for n in fitting)


def test_the_most_accurate_that_fits(menu):
    record(menu, dense=90.0, nm2_4=92.0, nm1_8=91.0)
    menu.subnet("channel-0.5").accuracy = 80.0
    sizes = figures(menu, "bytes")
    assert menu.pick(max_bytes=1e9).name == "2:4"
    assert menu.pick(max_bytes=sizes["2:4"]).name == "2:4"
    assert menu.pick(max_bytes=sizes["2:4"] - 1).name == "1:8"
    assert menu.pick(max_bytes=sizes["1:8"]).name == "1:8"
    flops = figures(menu, "flops")
    assert flops["unstructured-0.8000"] < flops["channel-0.5000"]
    assert menu.pick(max_bytes=sizes["2:4"] - 1, max_flops=flops["1:8"], example_input=X).name == (
        "1:8"
    )


def test_recorded_accuracies_come_before_unrecorded(menu):
    record(menu, nm1_8=10.0)
    assert menu.pick(max_bytes=1e9).name == "1:8"
    below = figures(menu, "bytes")["1:8"] - 1
    with pytest.raises(ValueError, match=f"bytes {below + 1:,} .1:8."):
        menu.pick(max_bytes=below)


def test_equal_accuracies_take_fewer_flops_then_fewer_bytes(menu):
    for subnet in menu.subnets.values():
        subnet.accuracy = 50.0
    flops, sizes = figures(menu, "flops"), figures(menu, "bytes")
    assert menu.pick(max_flops=1e12, example_input=X).name == min(flops, key=flops.get)
    assert menu.pick(max_bytes=1e12).name == min(sizes, key=sizes.get)
    twin = menu.add("unstructured-0.9", menu.subnets["1:8"].row)  # the same cost, later: loses
    assert twin.accuracy is None
    twin.accuracy = 50.0
    menu.subnet("unstructured-0.8").accuracy = None
    assert menu.pick(max_bytes=sizes["1:8"]).name == "1:8"


def test_fewer_flops_count_before_fewer_bytes():
    rows = [
        {"name": "small", "accuracy": 90.0, "nnz": 10, "flops": 200, "bytes": 100},
        {"name": "quick", "accuracy": 90.0, "nnz": 10, "flops": 100, "bytes": 200},
        {"name": "both", "accuracy": 89.0, "nnz": 10, "flops": 50, "bytes": 50},
    ]
    for some in (rows, rows[::-1]):
        assert best(some, {"flops": 200, "bytes": 200}, None) == "quick"
        assert best(some, {"bytes": 100}, None) == "small"


def test_accuracy_zero_is_an_accuracy(menu):
    record(menu, nm1_8=0.0)
    assert menu.pick(max_bytes=1e9).name == "1:8"


def test_errors_name_the_nearest_miss(menu):
    flops, sizes = figures(menu, "flops"), figures(menu, "bytes")
    least = min(flops, key=flops.get)
    with pytest.raises(ValueError, match=rf"max_flops=10; .*flops {flops[least]:,} .{least}"):
        menu.pick(max_flops=10, example_input=X)
    smallest = min(sizes, key=sizes.get)
    both = rf"max_flops=10 and max_bytes=1e-09; .*{least}.*bytes {sizes[smallest]:,} .{smallest}"
    with pytest.raises(ValueError, match=both):
        menu.pick(max_flops=10, max_bytes=1e-9, example_input=X)
    for limit in (0, -5, float("nan")):
        with pytest.raises(ValueError, match="no subnet has max_bytes"):
            menu.pick(max_bytes=limit)
    with pytest.raises(ValueError, match="no limit is given"):
        menu.pick()
    with pytest.raises(ValueError, match="no limit is given"):
        menu.pick(example_input=X)
    for limit in ({"max_flops": 1e9}, {"max_ms": 5}, {"max_ms": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(limit))}=.* needs example_input"):
            menu.pick(**limit)
    for wrong in ("1e6", True, torch.tensor(5)):
        with pytest.raises(TypeError, match="max_bytes=.*give a number"):
            menu.pick(max_bytes=wrong)


def test_pick_leaves_the_cocktail_alone(menu):
    menu.recalibrate("2:4", [torch.randn(4, 3, 8, 8)])
    menu.activate("2:4")
    menu.model.train()
    before = {name: t.clone() for name, t in menu.model.state_dict().items()}
    menu.pick(max_flops=1e9, max_ms=1e9, max_bytes=1e9, example_input=X)
    assert menu.active == "2:4" and menu.model.training
    after = menu.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], t) for n, t in before.items())


def test_pick_after_save_and_load(menu, tmp_path):
    record(menu, dense=90.0, nm2_4=92.0)
    menu.save(tmp_path / "menu.safetensors")
    loaded = Cocktail.load(tmp_path / "menu.safetensors", network())
    assert loaded.summary(X) == menu.summary(X)
    assert loaded.pick(max_bytes=1e9).name == "2:4"


# ---- milliseconds --------------------------------------------------------------------------------


def test_latency_is_measured_once_per_kind_of_input(menu):
    first = menu.latency("channel-0.5", X)
    assert 0 < first < 1e5
    assert menu.latency("channel-0.5000", X.clone()) == first, "measured again"
    menu.latency("channel-0.5", torch.zeros(3, 3, 8, 8))
    assert len(menu._latencies) == 2
    menu.model.double()
    menu.latency("channel-0.5", X.double())
    assert len(menu._latencies) == 3
    with pytest.raises(KeyError, match="'3:4' is unknown"):
        menu.latency("3:4", X)


def test_max_ms(menu):
    record(menu, nm2_4=92.0, nm1_8=91.0)
    assert menu.pick(max_ms=1e9, example_input=X).name == "2:4"
    assert len(menu._latencies) == 1, "the first in rank fits: no other needs a measurement"
    with pytest.raises(ValueError, match=r"no subnet has max_ms=1e-09; .*: ms [\d.e-]+ \("):
        menu.pick(max_ms=1e-9, example_input=X)
    assert len(menu._latencies) == len(menu.subnets)
    times = {name: menu.latency(name, X) for name in menu.subnets}
    fitting = [name for name, ms in times.items() if ms <= times["1:8"]]
    wanted = "2:4" if "2:4" in fitting else "1:8"
    assert menu.pick(max_ms=times["1:8"], example_input=X).name == wanted
    with pytest.raises(ValueError, match="bytes"):
        menu.pick(max_ms=1e9, max_bytes=1, example_input=X)


def test_latency_runs_in_eval_mode_without_gradient_on_the_present_threads(menu):
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
            return x

    model = nn.Sequential(convert(nn.Sequential(nn.Linear(8, 8), Probe())))
    Cocktail(model.train()).latency("dense", torch.zeros(1, 8))
    assert set(seen) == {(False, False, torch.get_num_threads())} and len(seen) > 20


def test_latency_of_a_channel_subnet_is_that_without_its_channels_where_it_can_be(monkeypatch):
    monkeypatch.setattr("sparse_cocktail.costs.MEASURE_SECONDS", 1e-3)
    widths, needed = [], 4

    class Probe(nn.Module):
        def forward(self, x):
            if x.shape[1] < needed:
                raise ValueError("too few channels")
            widths.append(x.shape[1])
            return x

    cocktail = Cocktail(convert(nn.Sequential(nn.Linear(8, 8), Probe(), nn.Linear(8, 2))))
    for name, width in (("channel-0.5", 4), ("unstructured-0.5", 8), ("channel-0.75", 8)):
        cocktail.add(name)
        assert cocktail.latency(name, torch.zeros(1, 8)) > 0
        assert widths[-1] == width, name


def test_a_copied_cocktail_keeps_its_figures(menu):
    menu.latency("2:4", X)
    assert copy.deepcopy(menu).latency("2:4", X) == menu.latency("2:4", X)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """The cocktail of a saved menu; `command(verb, *arguments)` of it: (code, everything said)."""
    cocktail = Cocktail(convert(models.build("resnet8", {"width": 8})))
    for pattern, accuracy in {"2:4": 92.0, "channel-0.7": 80.0}.items():
        cocktail.add(pattern).accuracy = accuracy
    cocktail.save(tmp_path / "menu.safetensors")

    def command(verb, *arguments):
        code, said, error = run_command(verb, tmp_path / "menu.safetensors", *arguments)
        return code, " ".join((said + error).split())

    return cocktail, command


def test_export_picks_within_limits(command, tmp_path):
    cocktail, call = command
    out, shape = tmp_path / "net.safetensors", ("--sample", "1,8,8")
    sizes = figures(cocktail, "bytes", torch.zeros(1, 1, 8, 8))
    flops = figures(cocktail, "flops", torch.zeros(1, 1, 8, 8))
    for options, wanted in (
        (("--max-bytes", sizes["dense"] - 1), "2:4"),
        (("--max-flops", flops["2:4"] - 1, *shape), "channel-0.7000"),
        (("--max-ms", "1e9", "--max-bytes", sizes["2:4"], *shape), "2:4"),
    ):
        code, said = call("export", "--out", out, *options)
        assert code == 0 and said.startswith(f"{wanted} of "), said
        hint = "milliseconds are those of the compressed network: add --compressed"
        assert (hint in said) == ("--max-ms" in options)
        assert torch.equal(load_file(out)["fc.weight"], cocktail.export(wanted).fc.weight)
    least = ("--max-ms", "1e9", "--max-bytes", sizes["channel-0.7000"], *shape)
    for slim in ((), ("--slim",)):
        code, said = call("export", "--out", out, *least, *slim)
        assert code == 0 and ("network: add --slim" in said) == (not slim)
    code, said = call("info")
    assert code == 0 and f"{sizes['2:4']:,}" in said and "bytes" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either the name of a subnet or limits"),
        (("2:4", "--max-bytes", "9e9"), "give either the name of a subnet or limits"),
        (("--max-bytes", "10"), "no subnet has max_bytes=10.0; the smallest there are: bytes"),
        (("--max-flops", "10"), "shape of an input is not known"),
        (("--max-flops", "10", "--sample", "big"), "sample='big' is no shape"),
        (("--max-ms", "1e-9", "--sample", "1,8,8"), "no subnet has max_ms=1e-09"),
    ],
    ids=["neither", "both", "bytes", "no_shape", "bad_shape", "ms"],
)
def test_export_says_what_is_wrong_with_limits(command, tmp_path, options, message):
    code, said = command[1]("export", *options, "--out", tmp_path / "net.safetensors")
    assert code == 2 and message in said and "Traceback" not in said
    assert not (tmp_path / "net.safetensors").exists()
