"""Cocktail: switching subnets, their figures, export, and the file."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparse_cocktail import Cocktail, MaskedLinear, NMLinear, Unstructured, convert, models, ops
from sparse_cocktail.files import write_tensors

PATTERNS = ("unstructured-0.8", "channel-0.5", "2:4", "1:8", "block-1x4-0.5")


def network():
    """A dense first conv, then masked layers of 40 and 13 inputs and 4,745 weights (odd)."""
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 13, 3, stride=2),
        nn.BatchNorm2d(13),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(13, 5),
    )


def images(count=4, scale=1.0):
    return torch.randn(count, 3, 8, 8) * scale + 0.5


def make(patterns=PATTERNS, make_model=network):
    """A cocktail in eval mode whose BatchNorms and biases are nontrivial."""
    model = make_model().train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.2, 0.8)
    model(images(16, 3.0))
    cocktail = Cocktail(convert(model.eval()))
    for pattern in patterns:
        cocktail.add(pattern)
    return cocktail


def outputs(cocktail, x):
    """Output of every subnet; the model's own statistics are as before afterwards."""
    found = {}
    for name in cocktail.subnets:
        with cocktail.preserved_statistics():
            cocktail.activate(name)
            found[name] = cocktail.model(x)
    return found


def assert_equal(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# ---- menu and switching --------------------------------------------------------------------------


def test_menu_and_names():
    cocktail = make()
    names = ["dense", "unstructured-0.8000", "channel-0.5000", "2:4", "1:8", "block-1x4-0.5000"]
    assert list(cocktail.subnets) == names and cocktail.active == "dense"
    assert len(cocktail.bank) == 5
    added = cocktail.add(Unstructured(0.5), stage=3)
    assert (added.name, added.stage, added.row) == ("unstructured-0.5000", 3, 5)


def test_a_subnet_from_given_masks_or_a_row():
    cocktail = make(())
    masks = [ops.pack_mask(torch.rand_like(w) < 0.3) for w in cocktail.bank.weights]
    given = cocktail.add("unstructured-0.7", masks)
    assert all(map(torch.equal, cocktail.bank.views(given.row), masks))
    assert cocktail.add("unstructured-0.71", given.row).row == given.row


@pytest.mark.parametrize("masked_before", [False, True], ids=["from_dense", "from_masked"])
def test_activate_computes_with_the_masked_weights(masked_before):
    cocktail, x = make(), images()
    before = cocktail.model(x)
    addresses = [layer.mask_bits.data_ptr() for layer in cocktail.layers.values()]
    for name, subnet in cocktail.subnets.items():
        cocktail.activate("1:8" if masked_before else "dense")
        cocktail.activate(name)
        assert cocktail.active == name
        masks = [layer.mask for layer in cocktail.layers.values()]
        if name == "dense":
            assert masks == [None, None] and torch.equal(cocktail.model(x), before)
            continue
        assert not torch.equal(cocktail.model(x), before)
        views = cocktail.bank.views(subnet.row)
        assert all(torch.equal(ops.pack_mask(m), v) for m, v in zip(masks, views, strict=True))
        assert [layer.mask_bits.data_ptr() for layer in cocktail.layers.values()] == addresses


def test_subnets_together_keep_what_any_of_them_keeps():
    cocktail, names = make(()), []
    for seed in range(3):  # of every layer other weights, and other channels
        torch.manual_seed(seed)
        masks = [torch.rand_like(w) < 0.3 for w in cocktail.bank.weights]
        for mask in masks:
            mask[torch.rand(len(mask)) < 0.6] = False
        name = cocktail.add(f"unstructured-0.8{seed}", list(map(ops.pack_mask, masks))).name
        names.append(name)
    each = [cocktail.kept_parameters([name]) for name in names]
    together = cocktail.kept_parameters(names)
    assert len(together) == 6  # two weights and biases, scale and shift of a BatchNorm
    for (parameter, kept), *ones in zip(together, *each, strict=True):
        assert all(one is parameter for one, _ in ones)
        masks = [mask for _, mask in ones]
        assert torch.equal(kept, masks[0] | masks[1] | masks[2])
        assert not any(torch.equal(kept, mask) for mask in masks)
    bits = zip(*(cocktail.masks(name) for name in names), strict=True)
    alive = [sum(b.flatten(1).ne(0).any(1).int() for b in some) > 0 for some in bits]
    assert all(map(torch.equal, cocktail.live(names), alive))


def test_using_goes_back_even_after_an_error():
    cocktail, x = make(), images()
    cocktail.activate("2:4")
    y = cocktail.model(x)
    with pytest.raises(ArithmeticError), cocktail.using("1:8") as model:
        assert cocktail.active == "1:8" and model is cocktail.model
        assert not torch.equal(model(x), y)
        raise ArithmeticError
    assert cocktail.active == "2:4" and torch.equal(cocktail.model(x), y)


def test_errors():
    cocktail = make()
    with pytest.raises(ValueError, match="'2:4' is on the menu already"):
        cocktail.add("2:4")
    with pytest.raises(ValueError, match="'dense' is on the menu already"):
        cocktail.add("dense")
    with pytest.raises(ValueError, match="'2to4' is unknown"):
        cocktail.add("2to4")
    for unknown in (cocktail.activate, cocktail.export, lambda n: cocktail.recalibrate(n, [])):
        with pytest.raises(KeyError, match="subnet '3:4' is unknown.*'1:8'"):
            unknown("3:4")
    assert cocktail.active == "dense" and len(cocktail.bank) == 5
    with pytest.raises(ValueError, match=r"Sequential has no masked layers; pass convert"):
        Cocktail(network())


# ---- figures -------------------------------------------------------------------------------------


def test_summary_against_hand_computed_numbers():
    cocktail = make()
    cocktail.activate("2:4")
    state = {name: t.clone() for name, t in cocktail.model.train().state_dict().items()}
    rows = {row["name"]: row for row in cocktail.summary(images(2))}
    assert cocktail.active == "2:4" and cocktail.model.training
    assert_equal(cocktail.model.state_dict(), state)
    first, conv, fc = 40 * 3 * 9, 13 * 40 * 9, 13 * 5  # weights
    others = 13 + 5 + 2 * 40 + 2 * 13  # biases, scales and shifts
    kept = {  # weights of conv and fc, and the entries of `others` that belong to pruned channels
        "dense": (conv, fc, 0),
        "2:4": (conv // 2, fc, 0),  # the linear layer has 13 inputs: N:M and blocks leave it
        "1:8": (conv // 8, fc, 0),
        "block-1x4-0.5000": (conv // 2, fc, 0),
        "channel-0.5000": (7 * 360, fc, 6 * 3),  # 6.5 is rounded up; the outputs all stay
    }
    for name, (kept_conv, kept_fc, silent) in kept.items():
        row, nnz = rows[name], kept_conv + kept_fc
        assert row["nnz"] == nnz and row["sparsity"] == pytest.approx(1 - nnz / 4745), name
        assert row["parameters"] == first + nnz + others - silent, name
        # 8x8 images: the first conv has 6x6 outputs, the second 2x2
        assert row["flops"] == first * 36 + kept_conv * 4 + kept_fc, name
        assert row["accuracy"] is None and row["pattern"] == name.split("-")[0]
    assert rows["unstructured-0.8000"]["nnz"] == 949
    assert all(row["flops"] is None for row in cocktail.summary())


# ---- export --------------------------------------------------------------------------------------


def test_parameters_are_those_that_are_not_zero_in_the_export():
    def net():  # a convolution without and a linear layer with biases
        conv, norm = nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), conv, norm, nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 5)
        )

    cocktail = make(make_model=net)
    for row in cocktail.summary():
        plain = cocktail.export(row["name"], plain=True)
        assert row["parameters"] == sum(int(p.count_nonzero()) for p in plain.parameters()), row


@pytest.mark.parametrize("name", ["dense", *PATTERNS])
def test_export_is_plain_torch_and_equal(name):
    cocktail, x = make(), images()
    name = next(n for n in cocktail.subnets if n.startswith(name))
    cocktail.recalibrate(name, [images(), images()])
    cocktail.activate("2:4")
    cocktail.model.train()
    state = {n: t.clone() for n, t in cocktail.model.state_dict().items()}
    exported = cocktail.export(name, plain=True)
    assert_equal(cocktail.model.state_dict(), state)
    assert cocktail.active == "2:4" and cocktail.model.training and not exported.training
    assert all(type(m).__module__.startswith("torch.nn") for m in exported.modules())
    plain = network().eval()
    plain.load_state_dict(exported.state_dict(), strict=True)
    cocktail.activate(name)
    with ops.route("layer"):  # by PyTorch's products: the same bits
        expected = cocktail.model.eval()(x)
    assert torch.equal(exported(x), expected) and torch.equal(plain(x), expected)
    for ours, theirs in zip(exported.parameters(), cocktail.model.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr(), "the export shares memory with the cocktail"


def test_export_of_a_model_that_is_one_layer():
    cocktail = Cocktail(MaskedLinear(8, 4))
    cocktail.add("2:4")
    assert type(cocktail.export("2:4", plain=True)) is nn.Linear
    assert type(cocktail.export("2:4")) is NMLinear


# ---- state for checkpoints -----------------------------------------------------------------------


def test_state_and_restore():
    cocktail, x = make(), images()
    cocktail.recalibrate("2:4", [images()])
    cocktail.subnets["1:8"].accuracy, cocktail.subnets["1:8"].stage = 87.5, 2
    other = make(())
    other.model.load_state_dict(cocktail.model.state_dict())
    other.restore(copy.deepcopy(cocktail.state()))
    assert_same_menu(other, cocktail, x)


def assert_same_menu(ours, theirs, x):
    assert list(ours.subnets) == list(theirs.subnets)
    for name, subnet in theirs.subnets.items():
        mine = ours.subnets[name]
        facts = [(str(s.pattern), s.stage, s.accuracy) for s in (mine, subnet)]
        assert facts[0] == facts[1]
        if subnet.row is not None:
            assert ours.bank.digest(mine.row) == theirs.bank.digest(subnet.row), name
            assert all(map(torch.equal, mine.live, subnet.live))
        assert (mine.statistics is None) == (subnet.statistics is None)
        if subnet.statistics is not None:
            assert all(map(torch.equal, mine.statistics, subnet.statistics))
    assert_equal(outputs(ours, x), outputs(theirs, x))


# ---- the file ------------------------------------------------------------------------------------


def chain(cocktail, count, nested):
    """Unstructured subnets, one inside the other or not, added in no order."""
    masks, made = None, []
    for index in range(count):
        values = [torch.rand_like(w) for w in cocktail.bank.weights]
        keep = 4745 * (count - index) // (count + 1)
        masks = ops.topk_masks(values, keep, masks if nested else None)
        made.append((Unstructured((index + 1) / (count + 1)), masks))
    for pattern, masks in made[::-2] + made[-2::-2]:
        cocktail.add(pattern, masks)


def stored(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["sparse_cocktail"])["header"]


@pytest.mark.parametrize(
    ("count", "nested", "levels"),
    [(0, True, 0), (1, True, 0), (2, True, 2), (15, True, 15), (16, True, 0), (3, False, 0)],
    ids=["no_chain", "one", "two", "fifteen", "sixteen", "not_nested"],
)
def test_round_trip(tmp_path, count, nested, levels):
    cocktail, x = make(("2:4", "channel-0.5", "block-1x1-0.3")), images()
    chain(cocktail, count, nested)
    some = list(cocktail.subnets.items())[count % 2 :: 2]  # with or without the dense network
    for index, (name, subnet) in enumerate(some):
        cocktail.recalibrate(name, [images()])
        subnet.accuracy, subnet.stage = 100 / (index + 1), index
    cocktail.activate("2:4")
    expected, path = outputs(cocktail, x), tmp_path / "deep" / "menu.safetensors"
    cocktail.save(path, {"seed": 1, "widths": (8, 16)})
    assert_equal(outputs(cocktail, x), expected)
    tensors, header = stored(path)
    assert len(header["nested"]) == levels and ("levels" in tensors) == (levels > 0)
    assert not levels or tensors["levels"].numel() == 2373  # half of 4,745 bytes, rounded up
    loaded = Cocktail.load(path, convert(network()).eval())
    assert (cocktail.active, loaded.active) == ("2:4", "dense")
    assert loaded.extra == {"seed": 1, "widths": [8, 16]}
    assert_same_menu(loaded, cocktail, x)
    for name, weight in cocktail.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), weight)


@pytest.fixture
def file(tmp_path):
    """A saved cocktail of a model that the file itself can build."""
    cocktail = make(("2:4", "channel-0.5"), lambda: models.build("resnet8", {"inputs": 3}))
    cocktail.recalibrate("2:4", [images()])
    cocktail.save(tmp_path / "menu.safetensors")
    return cocktail, tmp_path / "menu.safetensors"


def test_file_builds_its_own_model(file):
    cocktail, path = file
    loaded = Cocktail.load(path)
    assert loaded.model.eval().factory == cocktail.model.factory
    assert_same_menu(loaded, cocktail, images())
    loaded.save(path)
    assert_same_menu(Cocktail.load(path, loaded.model), cocktail, images())


def test_file_does_not_depend_on_the_active_subnet(file, tmp_path):
    cocktail, path = file
    cocktail.recalibrate("dense", [images()])
    for name in ("dense", "2:4"):
        cocktail.activate(name)
        cocktail.save(tmp_path / name)
    first, second = (stored(tmp_path / name)[0] for name in ("dense", "2:4"))
    assert_equal(first, second)


def test_a_loaded_model_has_the_statistics_of_the_dense_network(tmp_path):
    cocktail, x = make(("2:4",)), images()
    cocktail.recalibrate("dense", [images(8, 2.0)])
    with cocktail.using("dense"):
        expected = cocktail.model(x)
    cocktail.activate("2:4")
    cocktail.save(tmp_path / "menu.safetensors")
    loaded = Cocktail.load(tmp_path / "menu.safetensors", network().eval())
    assert loaded.active == "dense" and torch.equal(loaded.model(x), expected)


def test_a_plain_model_is_converted_as_the_file_says(tmp_path):
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn_b, self.bn_a = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return self.bn_b(self.b(self.bn_a(self.a(x))))

    x = images()
    model = convert(Swapped().eval(), mask_first=True, example_input=x)
    cocktail = Cocktail(model)
    cocktail.add("channel-0.5")
    cocktail.save(tmp_path / "menu.safetensors")
    loaded = Cocktail.load(tmp_path / "menu.safetensors", Swapped().eval())
    assert list(loaded.layers) == ["a", "b"]
    assert (loaded.model.bn_a.source, loaded.model.bn_b.source) == ("a", "b")
    assert_equal(outputs(loaded, x), outputs(cocktail, x))


def test_extra_with_numbers_as_keys_loads_again(file):
    cocktail, path = file
    cocktail.save(path, {"milestones": {2: 0.1, 10: 0.01}})
    assert Cocktail.load(path).extra == {"milestones": {"2": 0.1, "10": 0.01}}


def rewrite(path, signed=False, **changes):
    """Save the file again with a changed header, whose digest is right when `signed`."""
    tensors, header = stored(path)
    header.update(changes)
    if signed:
        write_tensors(path, tensors, header)
    else:
        entry = json.dumps({"header": header, "sha256": "of the file before"})
        save_file(tensors, path, {"sparse_cocktail": entry})


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))] if share < 1 else data[:-1])


DAMAGES = {
    **{f"cut_{s}": (lambda p, s=s: cut(p, s), "no whole") for s in (0, 1e-3, 0.02, 0.5, 0.99, 1)},
    "flipped_data": (lambda p: flip(p, -1), "digest"),
    "flipped_weight": (lambda p: flip(p, -4000), "digest"),
    "text": (lambda p: p.write_text("a cocktail" * 9), "no whole"),
    "foreign": (lambda p: save_file({"w": torch.ones(3)}, p), "no cocktail file"),
    "edited_header": (lambda p: rewrite(p, extra={"seed": 2}), "edited or damaged"),
    "edited_accuracy": (lambda p: rewrite(p, subnets=[]), "edited or damaged"),
    "format": (lambda p: rewrite(p, signed=True, format=2), "format 2.*format 1"),
    "code": (
        lambda p: rewrite(p, signed=True, factory={"name": "os.system", "args": {"command": "x"}}),
        "'os.system' is unknown",
    ),
    "factory": (lambda p: rewrite(p, signed=True, factory={"name": "resnet8"}), "factory"),
    "no_factory": (lambda p: rewrite(p, signed=True, factory=None), "no model factory"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_foreign_files_are_refused(file, damage, message):
    path = file[1]
    damage(path)
    with pytest.raises(ValueError, match=message):
        Cocktail.load(path)


def test_no_flipped_bit_of_the_header_goes_unnoticed(file):
    path = file[1]
    whole = path.read_bytes()
    for position in range(0, 8 + int.from_bytes(whole[:8], "little"), 11):
        flip(path, position)
        with pytest.raises(ValueError):
            Cocktail.load(path)
        path.write_bytes(whole)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        Cocktail.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: convert(network()), "menu.safetensors holds 9 layers, the model has 2"),
        (lambda: convert(models.build("resnet8", {"inputs": 3, "width": 4})), "differ"),
        (lambda: convert(models.build("resnet8", {"inputs": 1})), "conv1"),
        (lambda: models.build("resnet8"), "does not fit the model"),
    ],
    ids=["layers", "width", "first_conv", "unconverted"],
)
def test_model_that_does_not_fit_is_refused(file, model, message):
    with pytest.raises(ValueError, match=message):
        Cocktail.load(file[1], model())


FULL = """
    import resource, sys
    from sparse_cocktail import Cocktail
    cocktail = Cocktail.load(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        cocktail.save(sys.argv[1])
    except OSError as error:
        print(error)
"""


def test_old_file_survives_a_full_disk(file):
    path = file[1]
    before = path.read_bytes()
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "was not written" in said and "unchanged" in said
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a partial file is left"
