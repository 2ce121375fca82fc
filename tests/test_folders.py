"""Folders of pictures: what is read, an order and crops that only the seed decides, errors."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from PIL import Image
from test_engine import SHORT, Stop, crash_before, position, same, weights

from sparse_cocktail import data as data_sets
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import generator_for
from sparse_cocktail.engine import train

pytest.importorskip("torchvision", reason="folders of pictures need torchvision (extra vision)")
# The module, which the package's function of the same name hides.
folders_module = sys.modules["sparse_cocktail.data.folders"]

CLASSES = ("ant", "bee", "cat", "dog")
TRAIN, VAL = 12, 3  # pictures of each class
SEED = (4, 1, 7)
MODEL = {"width": 4, "inputs": 3, "classes": 4}


def write_tree(root, train=TRAIN, val=VAL):
    """Pictures of one colour each, of odd sizes: red counts them, green is the class."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                size = (20 + 13 * index, 61 - 4 * (index % 14))
                colour = (label * count + index, 60 * label, 200 if part == "train" else 100)
                Image.new("RGB", size, colour).save(root / part / name / f"{index:02d}.png")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """As `tree`, with noise in all pictures, so that no two crops look alike."""
    root = write_tree(tmp_path_factory.mktemp("noisy"))
    random = np.random.default_rng(0)
    for path in sorted(root.rglob("*.png")):
        height, width = np.array(Image.open(path)).shape[:2]
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def load(root, workers=0, name="imagenet-16"):
    return data_sets.load(name, root, workers)


def bytes_of(inputs):
    """Pixels (n, 3, h, w) from 0 to 255 of standardised inputs."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (folders_module._MEAN, folders_module._STD))
    return ((inputs * std + mean) * 255).round().long()


def numbers(batches):
    """Which pictures of `tree` batches of (inputs, targets) hold, from their red."""
    return torch.cat([bytes_of(x)[:, 0, 0, 0] for x, _ in batches]).tolist()


def equal(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in pairs)


# ---- what is read --------------------------------------------------------------------------------


def test_parts_sizes_and_types(tree):
    sets = load(tree)
    assert (len(sets.train), len(sets.holdout), len(sets.test)) == (46, 2, 12)
    assert (sets.name, sets.classes, sets.sample_shape) == ("imagenet-16", 4, (3, 16, 16))
    assert sets.example(2).shape == (2, 3, 16, 16)
    for part in (sets.train, sets.holdout, sets.test):
        inputs, targets = next(part.batches(5))
        assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
        assert inputs.shape == (len(targets), 3, 16, 16) and inputs.is_contiguous()


def test_the_size_is_224_unless_the_name_says_another(tree):
    sets = load(tree, name="imagenet")
    assert sets.sample_shape == (3, 224, 224) == tuple(sets.example(1).shape[1:])
    assert next(sets.epoch(SEED, 2))[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize("part", ["train", "holdout", "test"])
def test_batches_are_in_order_and_complete(tree, part):
    pictures = getattr(load(tree), part)
    batches = list(pictures.batches(5))
    assert [len(y) for _, y in batches[:-1]] == [5] * (len(batches) - 1)
    found = numbers(batches)
    assert found == sorted(set(found)) and len(found) == len(pictures)
    each = VAL if part == "test" else TRAIN
    assert torch.cat([y for _, y in batches]).tolist() == [number // each for number in found]


def test_the_holdout_is_of_several_classes_and_not_trained_on(tmp_path):
    sets = load(write_tree(tmp_path, train=30, val=1))
    held, learnt = (numbers(part.batches(200)) for part in (sets.holdout, sets.train))
    assert sorted(held + learnt) == list(range(120)) and len(held) == 6
    assert len({number // 30 for number in held}) > 1
    assert held == numbers(load(tmp_path).holdout.batches(200))


def test_test_pictures_may_lie_in_a_folder_test(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "copy")
    (tmp_path / "copy" / "val").rename(tmp_path / "copy" / "test")
    assert equal(load(tmp_path / "copy").test.batches(4), load(tree).test.batches(4))


def test_a_folder_val_comes_before_a_folder_test(tree, tmp_path):
    root = write_tree(tmp_path / "both")
    shutil.copytree(root / "train", root / "test")
    assert equal(load(root).test.batches(4), load(tree).test.batches(4))


@pytest.mark.parametrize("size", [(300, 200), (37, 90), (16, 16), (1, 5), (900, 7)])
def test_test_pictures_are_resized_cropped_and_standardised(tmp_path, size):
    from torchvision.transforms import v2

    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for part in ("train/a", "val/a"):
        (tmp_path / part).mkdir(parents=True)
        for name in ("1.png", "2.png"):
            Image.fromarray(pixels).save(tmp_path / part / name)
    steps = [v2.Resize(round(48 * 256 / 224)), v2.CenterCrop(48), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    wanted = v2.Compose(steps)(Image.fromarray(pixels))
    sets = load(tmp_path, name="imagenet-48")
    for found in (next(sets.test.batches(2))[0], next(sets.holdout.batches(1))[0]):
        torch.testing.assert_close(found[0], torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_every_kind(tmp_path, workers):
    """Grey, palette, transparent and CMYK pictures become three colours, JPEG or PNG."""
    colour = (180, 90, 30)
    kinds = {
        "rgb.jpg": Image.new("RGB", (41, 30), colour),
        "cmyk.jpg": Image.new("RGB", (41, 30), colour).convert("CMYK"),
        "rgb.png": Image.new("RGB", (29, 53), colour),
        "rgba.png": Image.new("RGBA", (29, 53), (*colour, 128)),
        "palette.png": Image.new("RGB", (29, 53), colour).quantize(4),
        "grey.jpg": Image.new("L", (30, 30), 77),
        "grey.png": Image.new("L", (31, 33), 77),
        "grey_alpha.png": Image.new("LA", (31, 33), (77, 200)),
        "bits.png": Image.new("1", (40, 40), 1),
    }
    for part in ("train", "val"):
        (tmp_path / part / "all").mkdir(parents=True)
        for name, picture in kinds.items():
            picture.save(tmp_path / part / "all" / name)
    sets = load(tmp_path, workers)
    ((inputs, _),) = sets.test.batches(20)
    for name, pixels in zip(sorted(kinds), bytes_of(inputs), strict=True):
        wanted = {"g": (77, 77, 77), "b": (255, 255, 255)}.get(name[0], colour)
        far = (pixels - torch.tensor(wanted).view(3, 1, 1)).abs().max()
        assert far <= (2 if name.endswith("jpg") else 0), name
    assert next(sets.epoch(SEED, 8))[0].isfinite().all()


# ---- order and resume ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_the_seed_alone(noisy, workers):
    sets = load(noisy, workers)
    first = list(sets.epoch(SEED, 5))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert equal(load(noisy, workers).epoch(SEED, 5), first)
    assert torch.equal(torch.get_rng_state(), before), "loading drew from the run's random numbers"
    assert len(first) == sets.steps_per_epoch(5) == 9


def test_every_seed_stage_and_epoch_has_its_own_order_and_crops(tree, noisy):
    seeds = list(itertools.product(range(2), repeat=3))
    orders = {tuple(numbers(load(tree).epoch(seed, 5))) for seed in seeds}
    assert len(orders) == len(seeds)
    pictures = load(noisy).train
    crops = [next(pictures.read([pictures.chosen[:1]], seed))[0] for seed in seeds]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(crops, 2))


def test_workers_change_no_bit(noisy):
    alone, helped = load(noisy), load(noisy, workers=2)
    assert equal(alone.epoch(SEED, 5), helped.epoch(SEED, 5))
    assert equal(alone.test.batches(5), helped.test.batches(5))
    assert all(map(torch.equal, alone.calibration(20, 8), helped.calibration(20, 8)))


@pytest.mark.parametrize("skip", [0, 1, 8, 9])
def test_skipping_resumes_the_same_batches_without_decoding_others(noisy, monkeypatch, skip):
    sets = load(noisy)
    whole = list(sets.epoch(SEED, 5))
    read, decode = [], folders_module._decode
    monkeypatch.setattr(folders_module, "_decode", lambda f: (read.append(f), decode(f))[1])
    assert equal(sets.epoch(SEED, 5, skip=skip), whole[skip:])
    assert len(read) == len(set(read)) == 5 * (9 - skip)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_part_the_epoch(tree, world):
    sets = load(tree)
    ranks = [list(sets.epoch(SEED, 4, rank=r, world=world)) for r in range(world)]
    steps = sets.steps_per_epoch(4, world)
    assert [len(batches) for batches in ranks] == [steps] * world
    assert len({n for batches in ranks for n in numbers(batches)}) == 4 * steps * world
    for step, together in enumerate(sets.epoch(SEED, 4 * world)):
        shares = [torch.cat(each) for each in zip(*(b[step] for b in ranks), strict=True)]
        assert equal([shares], [together])  # a step is the same batch, however it is shared


def test_crops_do_not_depend_on_the_batch(noisy):
    sets = load(noisy)
    place = torch.randperm(46, generator=generator_for(*SEED)).tolist()
    small = dict(zip(place, torch.cat([x for x, _ in sets.epoch(SEED, 1)]), strict=True))
    for size, rank, world in ((7, 0, 1), (5, 1, 3)):
        for step, (inputs, _) in enumerate(sets.epoch(SEED, size, rank=rank, world=world)):
            start = (step * world + rank) * size
            for index, picture in zip(place[start : start + size], inputs, strict=True):
                assert torch.equal(picture, small[index])


@pytest.mark.parametrize("workers", [0, 2])
def test_randaugment_is_a_function_of_the_seed_alone(noisy, workers):
    plain = list(load(noisy).epoch(SEED, 8))
    torch.manual_seed(workers)
    sets, state = data_sets.load("imagenet-16", noisy, workers, True), torch.get_rng_state()
    made = list(sets.epoch(SEED, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(y, w) for (_, y), (_, w) in zip(plain, made, strict=True))
    changed = [(x != v).flatten(1).any(1) for (x, _), (v, _) in zip(plain, made, strict=True)]
    assert torch.cat(changed).float().mean() > 0.8  # an operation may be none, or change nothing
    assert equal(sets.epoch(SEED, 8), made) and equal(sets.epoch(SEED, 8, skip=3), made[3:])
    alone = sets.train.read([sets.train.chosen[:1]], SEED)
    whole = sets.train.read([sets.train.chosen], SEED)
    assert torch.equal(next(alone)[0], next(whole)[0][:1])
    assert not equal(sets.epoch((*SEED[:2], 8), 8), made)


def test_randaugment_is_torchvisions_on_the_cropped_picture(noisy):
    from torchvision.transforms import v2

    plain, sets = load(noisy), data_sets.load("imagenet-16", noisy, 0, True)
    transform = v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR)
    chosen = sets.train.chosen[:12]
    (cropped, _), (made, _) = (next(s.train.read([chosen], SEED)) for s in (plain, sets))
    for place, before, after in zip(chosen.tolist(), cropped, made, strict=True):
        pixels = bytes_of(before[None])[0].byte()
        generator = generator_for(*SEED, place)
        torch.rand(folders_module._TRIES + 1, 4, generator=generator, dtype=torch.float64)
        torch.set_rng_state(generator.get_state())  # behind the crop's numbers
        wanted = transform(v2.functional.to_pil_image(pixels))
        assert torch.equal(v2.functional.pil_to_tensor(wanted).long(), bytes_of(after[None])[0])


def test_randaugment_leaves_test_pictures_and_calibration_alone(noisy):
    plain, sets = load(noisy), data_sets.load("imagenet-16@0/4", noisy, 0, True)
    assert equal(sets.holdout.batches(4), plain.holdout.batches(4))
    folded = data_sets.load("imagenet-16@0/4", noisy)
    assert equal(sets.test.batches(4), folded.test.batches(4)) and sets.train.randaugment
    for mine, theirs in zip(sets.calibration(9, 4), folded.calibration(9, 4), strict=True):
        assert torch.equal(mine, theirs)


def test_calibration_batches_are_fixed_plain_training_inputs(noisy):
    sets = load(noisy)
    batches = sets.calibration(20, 8)
    assert [len(b) for b in batches] == [7, 7, 6]
    assert all(map(torch.equal, batches, sets.calibration(20, 8)))
    plain = torch.cat([x for x, _ in sets.train.batches(50)]).flatten(1)
    rows = {tuple(row) for row in plain.tolist()}
    chosen = [tuple(row) for row in torch.cat(batches).flatten(1).tolist()]
    assert len(set(chosen)) == 20 and rows.issuperset(chosen)
    assert sum(map(len, sets.calibration(1000, 8))) == 46


def test_batch_that_exceeds_the_data_is_an_error(tree):
    with pytest.raises(ValueError, match="batch_size=24 on 2 ranks is more than the 46 training"):
        list(load(tree).epoch(SEED, 24, world=2))


def test_folds_part_the_training_set(tree):
    whole = load(tree)
    folds = [load(tree, name=f"imagenet-16@{i}/5") for i in range(5)]
    held = [numbers(fold.test.batches(50)) for fold in folds]
    assert sorted(sum(held, [])) == numbers(whole.train.batches(50))
    learnt = numbers(whole.train.batches(50))
    for index, each in enumerate(folds):
        assert held[index] == learnt[index::5]  # every fifth, as `data.fold` parts tensors
        assert set(numbers(each.epoch(SEED, 4))).isdisjoint(held[index])
        assert len(each.train) + len(each.test) == 46
        assert each.name == f"imagenet-16-fold{index}of5"
        assert equal(each.holdout.batches(5), whole.holdout.batches(5))


# ---- training crops ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (64, 300), (7, 7), (1, 1), (1, 40), (2000, 9)])
def test_crops_lie_in_the_picture_and_follow_the_published_rule(size):
    from torchvision.transforms import RandomResizedCrop

    width, height = size
    drawn = [folders_module._draw(width, height, generator_for(i)) for i in range(3000)]
    picture = Image.new("L", size)
    theirs = [RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in drawn]
    ours = torch.tensor([crop for crop, _ in drawn]).double()
    top, left, h, w = ours.unbind(1)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    # the same distribution: means within 5 standard errors, spreads within 10 %
    for mine, other in zip(ours.T, torch.tensor(theirs).double().T, strict=True):
        error = float((mine.var() + other.var()).div(3000).sqrt())
        assert abs(float(mine.mean() - other.mean())) <= 5 * error + 1e-9
        assert abs(float(mine.std() - other.std())) <= 0.1 * float(other.std()) + 1e-9
    assert abs(sum(flip for _, flip in drawn) / 3000 - 0.5) < 0.03


def test_a_training_input_is_the_crop_resized_and_perhaps_mirrored(noisy):
    from torchvision.transforms.v2 import functional

    sets = load(noisy)
    mirrored = 0
    for place in sets.train.chosen.tolist():
        inputs, _ = next(sets.train.read([torch.tensor([place])], SEED))
        picture = Image.open(os.fsdecode(sets.train.files[place]))
        crop, flip = folders_module._draw(*picture.size, generator_for(*SEED, place))
        wanted = functional.pil_to_tensor(functional.resized_crop(picture, *crop, [16, 16]))
        mirrored += flip
        assert torch.equal(bytes_of(inputs)[0], (wanted.flip(2) if flip else wanted).long())
    assert 10 < mirrored < 36


# ---- errors --------------------------------------------------------------------------------------


def empty_class(root):
    for path in (root / "train" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))


def flat_val(root):
    for path in list((root / "val").rglob("*.png")):
        path.rename(root / "val" / f"{path.parent.name}-{path.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()


LAYOUTS = {
    "no_train": (
        lambda root: (root / "train").rename(root / "training"),
        (FileNotFoundError, r"imagenet-16 needs --data-dir with .*train and val.* has 'training'"),
    ),
    "no_val": (
        lambda root: shutil.rmtree(root / "val"),
        (FileNotFoundError, r"needs --data-dir with the folders train and val .* has 'train'$"),
    ),
    "flat_val": (flat_val, (FileNotFoundError, r"val has no class folders; sort its pictures")),
    "empty_class": (empty_class, (ValueError, r"train has no picture in class 'bee'; add JPEG")),
    "class_missing_in_val": (
        lambda root: shutil.rmtree(root / "val" / "cat"),
        (ValueError, r"val has other classes than .*train \('cat' only in train, nothing only in"),
    ),
    "other_class_in_val": (
        lambda root: (root / "val" / "cat").rename(root / "val" / "cow"),
        (ValueError, r"\('cat' only in train, 'cow' only in val\); give both the same folders"),
    ),
}


@pytest.mark.parametrize("damage", LAYOUTS)
def test_trees_that_are_refused(tree, tmp_path, damage):
    change, (error, message) = LAYOUTS[damage]
    shutil.copytree(tree, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(error, match=message):
        load(tmp_path / "copy")


def test_a_single_picture_cannot_be_trained_on(tmp_path):
    for part in ("train/a", "val/a"):
        (tmp_path / part).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / part / "1.png")
    with pytest.raises(ValueError, match=r"train has 1 picture; training needs 2 or more"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("imagenet", ("",), FileNotFoundError, r"imagenet needs --data-dir .*none was given"),
        ("imagenet", ("nowhere",), FileNotFoundError, r"'nowhere' does not exist"),
        ("imagenet", ("TREE", -1), ValueError, r"workers=-1 is below 0"),
        ("imagenet-0", ("TREE",), ValueError, r"size=0 is below 1"),
        ("imagenet-x", ("TREE",), ValueError, r"name='imagenet-x' is unknown; .*imagenet"),
        ("imagenet-16@5/5", ("TREE",), ValueError, r"index=5 of count=5 is no fold"),
        ("imagenet-16@0/1", ("TREE",), ValueError, r"index=0 of count=1 is no fold"),
    ],
)
def test_arguments_that_are_refused(tree, name, arguments, error, message):
    arguments = [tree if value == "TREE" else value for value in arguments]
    with pytest.raises(error, match=message):
        data_sets.load(name, *arguments)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "damage",
    [cut, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_text("<html>")],
    ids=["cut", "gone", "empty", "html"],
)
def test_a_damaged_picture_is_named(noisy, tmp_path, damage, workers):
    shutil.copytree(noisy, tmp_path / "copy")
    sets = load(tmp_path / "copy", workers)
    path = tmp_path / "copy" / "val" / "bee" / "01.png"
    damage(path)
    with pytest.raises(ValueError, match=r"cannot be read as a picture .*replace or remove") as e:
        list(sets.test.batches(3))
    assert str(e.value).startswith(f"data: {path} ") and "\n" not in str(e.value)


def test_without_torchvision(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ValueError, match=r"missing: pip install 'sparse-cocktail\[vision\]'"):
        load(tree)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision"),
        ("from torch import no_such_name", "no_such_name"),
    ],
)
def test_a_torchvision_of_another_torch_is_said_so(tree, tmp_path, monkeypatch, program, reason):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(program)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    message = rf"is installed, but cannot be imported beside torch .*{reason}.*install the torchvis"
    with pytest.raises(ValueError, match=message):
        load(tree)


# ---- runs ----------------------------------------------------------------------------------------

RUN = {**SHORT, "epochs": 2, "stages": 1, "batch_size": 8, "model_args": MODEL}
RUN |= {"recalibrate_samples": 16, "checkpoint_every": 2, "log_every": 1}


def run(tree, folder, **fields):
    return train("resnet8", "imagenet-32", folder, data_dir=str(tree), **{**RUN, **fields})


@pytest.fixture(scope="module")
def whole(noisy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(noisy, folder), weights(folder)


@pytest.mark.parametrize("stage, step, workers, later", [(0, 3, 1, 0), (1, 7, 0, 2)])
def test_resume_is_bit_exact_with_other_workers(
    noisy, whole, tmp_path, monkeypatch, stage, step, workers, later
):
    results, expected = whole
    assert results["data"] == "imagenet-32" and len(results["subnets"]) == 3
    undo = crash_before(monkeypatch, stage, step)
    with pytest.raises(Stop):
        run(noisy, tmp_path, workers=workers)
    undo()
    assert position(tmp_path) == (stage, step - 1)
    assert run(noisy, tmp_path, workers=later, resume=True)["subnets"] == results["subnets"]
    assert same(weights(tmp_path), expected)


def test_train_and_eval_on_the_command_line(noisy, tmp_path):
    fields = {"data": "imagenet-32", "data-dir": noisy, "workers": 1, "epochs": 1, "stages": 1}
    fields |= {"batch-size": 8, "out": tmp_path / "run", "model-args": '{"inputs": 3, "classes":4}'}
    options = [text for name, value in fields.items() for text in (f"--{name}", value)]
    code, _, errors = call("train", *options)
    assert code == 0, errors
    code, output, errors = call("eval", tmp_path / "run")
    assert code == 0 and "channel-0.1" in output, errors


def test_workers_are_checked():
    with pytest.raises(ValueError, match="workers=-1 is negative"):
        split_fields({"workers": -1})


SIGNALLED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest  # makes torchvision importable
from sparse_cocktail import cli
sys.argv[:2] = ["sparse-cocktail"]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_still_ends_in_a_checkpoint(noisy, tmp_path, number):
    """As a terminal's Ctrl-C and a scheduler's end of a job: the loader's processes get it too."""
    fields = {"data": "imagenet-32", "data-dir": noisy, "workers": 2, "epochs": 5000, "rewind": 1}
    fields |= {"batch-size": 8, "out": tmp_path, "model-args": '{"inputs": 3, "classes":4}'}
    options = [str(text) for name, value in fields.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), "train", *options]
    command += ["--log-every", "1", "--threads", "1"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline, log = time.monotonic() + 120, tmp_path / "log.jsonl"
        while not (log.is_file() and '"train"' in log.read_text()):
            assert child.poll() is None and time.monotonic() < deadline, child.stderr.read()
            time.sleep(0.02)
        os.killpg(child.pid, number)
        _, errors = child.communicate(timeout=20)  # at once: no process outlives the run
    finally:
        child.kill()
    assert child.returncode == 128 + number, errors
    assert f"stopped by {number.name}" in errors and position(tmp_path)[0] == 0
