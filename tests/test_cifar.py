"""CIFAR in its binary format, synthetic data, and the user's own data and models."""

import json

import numpy as np
import pytest
import torch
from commands import call
from test_engine import SHORT

from sparse_cocktail import Cocktail, convert, models
from sparse_cocktail import data as data_sets
from sparse_cocktail.engine import train

COUNT = 60  # records a file; the real ones have 10,000 (50,000 in CIFAR-100's train.bin)


def write_cifar10(folder, count=COUNT):
    """Files of the official layout; returns the labels and pixels of all training records."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = random.integers(0, 10, (count, 1), dtype=np.uint8)
        pixels[:, :200] = labels * 25  # something to learn
        batch = np.concatenate([labels, pixels], 1)
        batch.tofile(folder / name)
        records.append(batch)
    return np.concatenate(records[:-1])


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
    return folder, write_cifar10(folder)


@pytest.mark.parametrize("above", [False, True], ids=["inner_folder", "folder_above"])
def test_cifar10_is_read_in_the_official_order(cifar10, above):
    folder, records = cifar10
    data = data_sets.load("cifar10", folder.parent if above else folder)
    assert (len(data.train), len(data.holdout), len(data.test)) == (285, 15, COUNT)
    targets = torch.cat([data.train.targets, data.holdout.targets])
    assert torch.equal(targets, torch.from_numpy(records[:, 0].astype(np.int64)))
    pixels = torch.from_numpy(records[:, 1:].astype(np.float64) / 255).view(-1, 3, 32, 32)
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    wanted = (pixels - mean[:, None, None]) / std[:, None, None]
    inputs = torch.cat([data.train.inputs, data.holdout.inputs])
    torch.testing.assert_close(inputs.double(), wanted, atol=1e-5, rtol=1e-5)
    assert data.augment.fill == pytest.approx((-mean / std).tolist())  # black
    tested = np.fromfile(folder / "test_batch.bin", dtype=np.uint8).reshape(-1, 3073)
    assert data.test.targets.tolist() == tested[:, 0].tolist()
    pixels = torch.from_numpy(tested[:, 1:].astype(np.float64) / 255).view(-1, 3, 32, 32)
    wanted = (pixels - mean[:, None, None]) / std[:, None, None]  # by the training part's
    torch.testing.assert_close(data.test.inputs.double(), wanted, atol=1e-5, rtol=1e-5)


def test_channels_of_one_value_stay_finite(tmp_path):
    write_cifar10(tmp_path, 4)
    for path in tmp_path.iterdir():
        records = np.fromfile(path, dtype=np.uint8).reshape(-1, 3073)
        records[:, 1:1025] = 7  # red
        records.tofile(path)
    data = data_sets.load("cifar10", tmp_path)
    for part in (data.train, data.holdout, data.test):
        assert not part.inputs[:, 0].any() and part.inputs[:, 1:].any()
        assert part.inputs.isfinite().all()


def test_cifar_images_are_shifted_and_mirrored(cifar10):
    data = data_sets.load("cifar10", cifar10[0])
    plain = data.train.inputs
    black = torch.tensor(data.augment.fill).view(3, 1, 1).expand(3, 40, 40)
    order = torch.randperm(285, generator=data_sets.generator_for(1, 0, 0))
    batch, _ = next(data.epoch((1, 0, 0), 64))
    mirrored = 0
    for image, index in zip(batch, order.tolist(), strict=False):
        padded = black.clone()
        padded[:, 4:36, 4:36] = plain[index]
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        straight = (windows == image).flatten(2).all(2).any()
        flipped = (windows == image.flip(2)).flatten(2).all(2).any()
        assert straight or flipped
        mirrored += bool(flipped and not straight)
    assert 16 <= mirrored <= 48


def test_cifar100_takes_the_fine_label(tmp_path):
    random = np.random.default_rng(1)
    for name in ("train.bin", "test.bin"):
        batch = random.integers(0, 256, (40, 3074), dtype=np.uint8)
        batch[:, 0], batch[:, 1] = np.arange(40) % 20, np.arange(40) + 60
        batch.tofile(tmp_path / name)
    data = data_sets.load("cifar100", tmp_path)
    assert data.augment.pixels == 4 and data.augment.flip
    assert data.classes == 100 and data.test.targets.tolist() == list(range(60, 100))


def damage(folder, how):
    write_cifar10(folder, 4)
    if how == "missing":
        (folder / "data_batch_3.bin").unlink()
    elif how == "cut":
        path = folder / "data_batch_2.bin"
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "label":
        path = folder / "data_batch_5.bin"
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    elif how == "class":
        path = folder / "test_batch.bin"
        path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    elif how == "empty":
        (folder / "test_batch.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing", FileNotFoundError, r"data_batch_3.bin is missing"),
        ("cut", ValueError, r"data_batch_2.bin has 12291 bytes.* multiple of a record's 3073"),
        ("label", ValueError, r"label 255, but there are 10 classes"),
        ("class", ValueError, r"label 10, but there are 10 classes"),
        ("empty", ValueError, r"test_batch.bin has 0 bytes"),
    ],
)
def test_damaged_cifar(tmp_path, how, error, message):
    damage(tmp_path, how)
    with pytest.raises(error, match=message):
        data_sets.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("folder", "there"), [("", "none was given"), ("nowhere", "'nowhere' has no test_batch.bin")]
)
def test_cifar_without_its_folder(folder, there):
    with pytest.raises(FileNotFoundError, match=rf"cifar10 needs --data-dir .*{there}"):
        data_sets.load("cifar10", folder)


def test_resnet18_co_trains_on_cifar(cifar10, tmp_path):
    results = train(
        "resnet18",
        "cifar10",
        tmp_path,
        data_dir=str(cifar10[0]),
        batch_size=32,
        model_args={"width": 8},
        **{**SHORT, "stages": 1},
    )
    assert len(results["subnets"]) == 3 and results["data"] == "cifar10"


@pytest.mark.parametrize(
    ("name", "width", "size", "parameters"),
    [
        ("resnet18", 64, 32, 11_173_962),
        ("resnet32", 16, 32, 466_906),
        ("resnet34", 64, 32, 21_282_122),
        ("resnet50", 64, 64, 25_557_032),
        ("vgg16", 64, 32, 14_724_042),
    ],
)
def test_models_have_their_published_size_and_step(name, width, size, parameters):
    model = models.build(name, {"width": width})
    assert sum(p.numel() for p in model.parameters()) == parameters
    cocktail = Cocktail(convert(model))
    cocktail.add("2:4")
    cocktail.activate("2:4")
    x = torch.randn(2, 3, size, size)
    model(x).square().mean().backward()
    layer = next(iter(cocktail.layers.values()))
    assert layer.weight.grad[~layer.mask].count_nonzero() == 0
    assert layer.weight.grad[layer.mask].count_nonzero() > 0


@pytest.mark.parametrize(
    ("name", "large_images", "classes", "parameters"),
    [
        ("resnet18", True, 1000, 11_689_512),
        ("resnet34", True, 1000, 21_797_672),
        ("resnet50", False, 10, 23_520_842),
    ],
)
def test_residual_networks_have_a_form_for_each_size(name, large_images, classes, parameters):
    with torch.device("meta"):
        model = models.build(name, {"classes": classes, "large_images": large_images})
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_synthetic_shapes():
    data = data_sets.load("synthetic-3x48x40-7")
    assert data.sample_shape == (3, 48, 40) and data.classes == 7
    assert data_sets.load("synthetic").sample_shape == (3, 32, 32)


OWN = """
import torch
from sparse_cocktail.data import Data, Split

def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 4, generator=generator), torch.arange(96) % 2
    x[:, 0] += 4 * y
    return Data("own", 2, Split(x[:64], y[:64]), Split(x[64:80], y[64:80]), Split(x[80:], y[80:]))

def net(hidden):
    layers = [torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 2)]
    return torch.nn.Sequential(*layers)

nothing = lambda: 3
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    (tmp_path / "ownpackage.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_data_and_model_on_the_command_line(own_package):
    arguments = ["train", "--recipe", "digits", "--epochs", "2", "--stages", "1"]
    arguments += ["--model", "ownpackage:net", "--model-args", '{"hidden": 16}']
    arguments += ["--data", "ownpackage:data", "--mask-linear", "true", "--batch-size", "16"]
    code, _, errors = call(*arguments, "--out", "run")
    assert code == 0, errors
    results = json.loads((own_package / "run" / "results.json").read_text())
    code, output, errors = call("eval", "run", "--model", "ownpackage:net")
    assert code == 0, errors
    assert all(f"{s['accuracy']:.2f}" in output for s in results["subnets"])
    code, _, errors = call("eval", "run")
    assert code == 2 and "names no model factory" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (lambda: data_sets.load("ownpackage:missing"), ValueError, "cannot be imported"),
        (lambda: data_sets.load("no_such_package:data"), ValueError, "cannot be imported"),
        (
            lambda: data_sets.load("ownpackage:nothing"),
            TypeError,
            "returned a int, not a data.Data",
        ),
        (lambda: models.create("ownpackage:nothing"), TypeError, "returned a int, not a torch.nn"),
    ],
    ids=["function", "package", "data", "model"],
)
def test_own_objects_that_do_not_work(own_package, load, error, message):
    with pytest.raises(error, match=message):
        load()
