"""Data, models and tasks: sizes, a batch order that only the seed decides, shapes and errors."""

import itertools
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from sparse_cocktail import data, models
from sparse_cocktail.data import Data, ShiftFlip, Split, generator_for
from sparse_cocktail.data.embedded import PICTURES
from sparse_cocktail.tasks import Classification


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def parts(digits):
    return {"train": digits.train, "holdout": digits.holdout, "test": digits.test}


# ---- digits --------------------------------------------------------------------------------------


def test_sizes_and_types(digits):
    assert {name: len(part) for name, part in parts(digits).items()} == {
        "train": 1280,
        "holdout": 67,
        "test": 450,
    }
    assert digits.sample_shape == (1, 8, 8) and digits.classes == 10
    for part in parts(digits).values():
        assert part.inputs.dtype == torch.float32 and part.targets.dtype == torch.int64
        assert part.inputs.shape == (len(part), 1, 8, 8) and part.inputs.is_contiguous()


def raw(images, mean, std):
    return (images * std + mean).round().long().view(-1, 64)


def test_parts_are_disjoint_and_complete(digits):
    images, labels = load_digits(return_X_y=True)
    # 0 is the least pixel and 16 the greatest: they give back mean and standard deviation
    values = digits.train.inputs
    std = 16 / float(values.max() - values.min())
    mean = -float(values.min()) * std
    rows = [
        tuple(image) + (int(label),)
        for part in parts(digits).values()
        for image, label in zip(raw(part.inputs, mean, std).tolist(), part.targets, strict=True)
    ]
    expected = [tuple(map(int, i)) + (int(t),) for i, t in zip(images, labels, strict=True)]
    assert sorted(rows) == sorted(expected)


def test_test_set_is_stratified(digits):
    counts = torch.bincount(digits.test.targets, minlength=10)
    total = sum(torch.bincount(part.targets, minlength=10) for part in parts(digits).values())
    assert ((counts - total / 4).abs() < 1).all(), counts


def test_standardised_by_what_is_not_the_test_set(digits):
    both = torch.cat([digits.train.inputs, digits.holdout.inputs])
    assert abs(float(both.mean())) < 1e-5 and abs(float(both.std()) - 1) < 1e-5
    assert abs(float(digits.test.inputs.mean())) > 1e-5, "the test set was standardised by itself"


def test_loading_again_gives_the_same(digits):
    again = data.digits()
    assert torch.equal(again.train.inputs, digits.train.inputs)
    assert torch.equal(again.test.targets, digits.test.targets)


# ---- digits, enlarged ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    return data.load("digits-32")


def test_enlarged_digits_are_the_digits_in_their_order(digits, large):
    assert large.name == "digits-32" and large.sample_shape == (1, 32, 32) and large.classes == 10
    for part, small in parts(digits).items():
        mine = getattr(large, part)
        assert torch.equal(mine.targets, small.targets)
        assert mine.inputs.dtype == torch.float32 and mine.inputs.is_contiguous()
        # each pixel's middle lies between those of 4x4 new ones, whose mean is near it
        means = nn.functional.avg_pool2d(mine.inputs, 4).flatten(1)
        pairs = zip(means, small.inputs.flatten(1), strict=True)
        alike = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
        assert min(alike) > 0.9, part


def test_enlarged_digits_are_interpolated_as_documented(digits, large):
    x, y = digits.train.inputs[7, 0].double(), large.train.inputs[7, 0].double()
    # new pixel i lies at (i + 0.5) / 4 - 0.5 of the old ones: 5 of 8 and 3 of 8 of two neighbours
    share = torch.tensor([0.875, 0.125], dtype=torch.float64)
    expected = share @ x[2:4, 3:5] @ share  # at (2.125, 3.125), which is new pixel (10, 14)
    other = share.flip(0) @ x[4:6, 3:5] @ share  # at (4.875, 3.125): new pixel (21, 14)
    scale = (y[10, 14] - y.min()) / (expected - x.min())  # the background is 0 in both
    assert float(y[21, 14] - y.min()) == pytest.approx(float(scale * (other - x.min())), abs=1e-5)


def test_enlarged_digits_are_standardised_by_what_is_not_the_test_set(large):
    both = torch.cat([large.train.inputs, large.holdout.inputs])
    assert abs(float(both.mean())) < 1e-5 and abs(float(both.std()) - 1) < 1e-5
    assert abs(float(large.test.inputs.mean())) > 1e-5, "the test set was standardised by itself"
    inputs, _ = next(large.epoch((0, 0, 0), 256))
    assert abs(float(inputs.min()) - float(large.train.inputs.min())) < 1e-6


# ---- order of the batches ------------------------------------------------------------------------


def numbered(count=37, augment=None):
    """Sample i holds i everywhere, so a batch tells which samples it is made of."""
    split = Split(
        torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4), torch.arange(count)
    )
    return Data("numbered", count, split, split, split, augment)


def order(batches):
    return torch.cat([targets for _, targets in batches]).tolist()


def equal(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in pairs)


def test_order_is_a_function_of_the_seed_alone():
    one, two = numbered(), numbered()
    first = order(one.epoch((1, 2, 3), 5))
    list(one.epoch((9, 9, 9), 5)), torch.manual_seed(123)
    assert order(one.epoch((1, 2, 3), 5)) == order(two.epoch((1, 2, 3), 5)) == first
    assert len(first) == 35 == len(set(first)), "35 of 37 samples, each once"


def test_every_seed_stage_and_epoch_has_its_own_order():
    seeds = list(itertools.product(range(3), repeat=3))
    orders = {tuple(order(numbered().epoch(seed, 5))) for seed in seeds}
    assert len(orders) == len(seeds)


def test_inputs_go_with_their_targets(digits):
    plain = numbered()
    for inputs, targets in plain.epoch((0, 0, 0), 4):
        assert torch.equal(inputs[:, 0, 0, 0].long(), targets)


@pytest.mark.parametrize("skip", [0, 1, 6, 19, 20])
def test_skipping_resumes_the_same_batches(digits, skip):
    whole = list(digits.epoch((4, 0, 7), 64))
    assert len(whole) == digits.steps_per_epoch(64) == 20
    assert equal(digits.epoch((4, 0, 7), 64, skip=skip), whole[skip:])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_part_the_epoch(world):
    sets = numbered()
    ranks = [list(sets.epoch((1, 0, 0), 4, rank=r, world=world)) for r in range(world)]
    steps = sets.steps_per_epoch(4, world)
    assert [len(batches) for batches in ranks] == [steps] * world
    assert len({sample for batches in ranks for sample in order(batches)}) == 4 * steps * world
    whole = sets.epoch((1, 0, 0), 4 * world)
    for step, (_, together) in enumerate(whole):  # a step is the same batch, however it is shared
        shares = torch.cat([batches[step][1] for batches in ranks])
        assert torch.equal(shares, together)


def test_batch_that_exceeds_the_data_is_an_error():
    with pytest.raises(ValueError, match="batch_size=20 on 2 ranks is more than the 37 training"):
        list(numbered().epoch((0, 0, 0), 20, world=2))


def test_split_batches_are_in_order_and_complete(digits):
    sizes = [len(targets) for _, targets in digits.test.batches(128)]
    assert sizes == [128, 128, 128, 66]
    assert order(digits.test.batches(128)) == digits.test.targets.tolist()


def test_calibration_batches_are_fixed_plain_training_inputs(digits):
    batches = digits.calibration(100, 32)
    assert [len(b) for b in batches] == [25, 25, 25, 25]
    assert all(map(torch.equal, batches, digits.calibration(100, 32)))
    known = {tuple(row) for row in digits.train.inputs.flatten(1).tolist()}
    assert all(tuple(row) in known for row in torch.cat(batches).flatten(1).tolist())


def test_generators_of_neighbouring_numbers_are_unrelated():
    draws = {
        numbers: torch.rand(1000, generator=generator_for(*numbers))
        for numbers in ((0,), (1,), (0, 0), (0, 1), (1, 0), (-1, 2**70))
    }
    for a, b in itertools.combinations(draws.values(), 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.15


# ---- augmentation --------------------------------------------------------------------------------


def by_target(batches):
    return {int(t): x for inputs, targets in batches for x, t in zip(inputs, targets, strict=True)}


def test_augmentation_does_not_depend_on_the_batch_size():
    images = torch.randn(37, 1, 4, 4)
    split = Split(images, torch.arange(37))
    sets = Data("x", 37, split, split, split, ShiftFlip(1, -5.0, 0.5))
    small = by_target(sets.epoch((1, 2, 3), 1))
    assert any(not torch.equal(small[i], images[i]) for i in small), "nothing was shifted"
    for size, rank, world in ((5, 0, 1), (12, 0, 1), (6, 1, 3)):
        for target, image in by_target(sets.epoch((1, 2, 3), size, rank=rank, world=world)).items():
            assert torch.equal(image, small[target])


@pytest.mark.parametrize("name", ["digits", "digits-32"])
def test_what_comes_in_at_the_border_of_digits_is_their_background(name):
    found = data.load(name)
    assert found.augment.fill == pytest.approx(float(found.train.inputs.min()), abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_images_shift_by_at_most_one_pixel(share):
    images = torch.randn(900, 2, 5, 7)
    shift = ShiftFlip(1, -3.0, share)
    shifted = shift.apply(images, *shift.draw(900, generator_for(1)))
    assert shifted.shape == images.shape and shifted.is_contiguous()
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-3.0)
    candidates = torch.stack(
        [padded[:, :, i : i + 5, j : j + 7] for i, j in itertools.product(range(3), repeat=2)]
    )
    found = (candidates == shifted).flatten(2).all(2)  # (9 offsets, images)
    assert found.any(0).all(), "an image is none of the nine shifts"
    counts = found.sum(1) / 900
    expected = torch.full((9,), share / 9)
    expected[4] += 1 - share
    assert (counts - expected).abs().max() < 0.05


def test_digits_shift_in_what_is_background(digits):
    inputs, _ = next(digits.epoch((0, 0, 0), 256))
    assert abs(float(inputs.min()) - float(digits.train.inputs.min())) < 1e-6


# ---- folds and names -----------------------------------------------------------------------------


def test_folds_part_the_training_set(digits):
    folds = [data.fold(digits, i, 5) for i in range(5)]
    tests = torch.cat([f.test.inputs for f in folds]).flatten(1).tolist()
    assert sorted(tests) == sorted(digits.train.inputs.flatten(1).tolist())
    for index, each in enumerate(folds):
        assert len(each.train) + len(each.test) == 1280 and len(each.test) == 256
        held = {tuple(row) for row in each.test.inputs.flatten(1).tolist()}
        assert held.isdisjoint(map(tuple, each.train.inputs.flatten(1).tolist()))
        assert each.name == f"digits-fold{index}of5" and each.holdout is digits.holdout


def test_a_fold_by_name(digits):
    named, made = data.load("digits@1/5"), data.fold(digits, 1, 5)
    assert torch.equal(named.train.inputs, made.train.inputs)
    assert torch.equal(named.test.targets, made.test.targets)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "name='mnist' is unknown; use one of digits"),
        ("", "name='' is unknown"),
        ("digits@5/5", "index=5"),
        ("digits@0/0", "count=0"),
        ("digits@0/1", "count=1"),
        ("digits@1", "'1' is not INDEX/COUNT"),
        ("digits@a/5", "'a/5' is not INDEX/COUNT"),
        ("digits@-1/5", "'-1/5' is not INDEX/COUNT"),
    ],
)
def test_names_that_do_not_load(name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name)


@pytest.mark.parametrize("name", ["digits", "cifar10", "synthetic", "imagenette", "mine:data"])
def test_randaugment_is_for_folders(name):
    with pytest.raises(ValueError, match=rf"randaugment=True is for folders.* data='{name}'"):
        data.load(name, randaugment=True)


def test_data_names():
    embedded = ["digits", "digits-32", "patches"]
    assert data.names() == [*embedded, "cifar10", "cifar100", "imagenet", "synthetic"]


def test_moving_keeps_everything(digits):
    moved = digits.to("cpu")
    assert torch.equal(moved.test.inputs, digits.test.inputs)
    assert (moved.name, moved.classes, moved.augment) == ("digits", 10, digits.augment)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("width", [8, 16])
def test_resnet8_shapes(size, width):
    model = models.build("resnet8", {"width": width, "inputs": 3, "classes": 7})
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (widths[0], max(widths), len(widths)) == (width, 4 * width, 9)
    assert {type(m) for m in model.modules()} >= {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


def test_build_remembers_how_it_was_called():
    args = {"width": 4}
    model = models.build("resnet8", args)
    args["width"] = 99
    assert model.factory == {"name": "resnet8", "args": {"width": 4}}
    assert models.build("resnet8").factory == {"name": "resnet8", "args": {}}
    known = ["resnet8", "resnet18", "resnet32", "resnet34", "resnet50", "vgg16", "vit_b16"]
    assert models.names() == known


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("os.system", {}, "name='os.system' is unknown; use one of resnet8"),
        ("ResNet", {}, "unknown"),
        ("resnet8", {"depth": 20}, "resnet8 does not take .*'depth'"),
        ("resnet8", {"width": "wide"}, "resnet8 does not take .*'wide'"),
    ],
)
def test_models_that_cannot_be_built(name, args, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, args)


# ---- tasks ---------------------------------------------------------------------------------------


def test_classification_loss_and_smoothing():
    output, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    log = output.log_softmax(1)
    hard = -log[range(6), target].mean()
    torch.testing.assert_close(Classification().loss(output, target), hard)
    smooth = 0.9 * hard - 0.1 * log.mean(1).mean()
    torch.testing.assert_close(Classification(0.1).loss(output, target), smooth)


def test_distillation_is_soft_cross_entropy():
    output, teacher = torch.randn(6, 4), torch.randn(6, 4)
    expected = -(teacher.softmax(1) * output.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Classification().distill(output, teacher), expected)


def test_metric_counts_the_right_answers():
    output = torch.eye(4)[[0, 1, 2, 2, 3]]
    right, count = Classification().metric(output, torch.tensor([0, 1, 2, 3, 0]))
    assert (int(right), count) == (3, 5)


# ---- patches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles():
    pytest.importorskip("skimage", reason="patches needs scikit-image")
    return data.load("patches")


def test_patches_are_distinct_regions_of_eighteen_pictures(tiles):
    assert tiles.classes == len(PICTURES) == 18 and tiles.sample_shape == (1, 32, 32)
    three = [tiles.train, tiles.holdout, tiles.test]
    assert [len(part) for part in three] == [1522, 80, 534]
    counts = torch.cat([part.targets for part in three]).bincount()
    assert counts.max() == 128 and counts.min() == 60  # of the smallest picture: 5 x 12 tiles
    assert (tiles.test.targets.bincount() >= 0.2 * counts).all()
    assert tiles.train.inputs.mean().abs() < 0.02 and (tiles.train.inputs.std() - 1).abs() < 0.02


def test_every_patch_lies_in_its_picture_and_none_twice(tiles):
    from skimage import data as pictures

    page = PICTURES.index("page")
    grey = torch.from_numpy(pictures.page() / 255.0)
    places = [(r, c) for r in range(0, 160, 32) for c in range(0, 384, 32)]
    known = torch.stack([grey[r : r + 32, c : c + 32] for r, c in places]).flatten(1).float()
    three = [tiles.train, tiles.holdout, tiles.test]
    mine = torch.cat([p.inputs[p.targets == page] for p in three]).flatten(1)
    scaled = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (known, mine)]
    apart = (scaled[1][:, None] - scaled[0][None]).abs().amax(2)
    nearest, index = apart.min(1)
    assert nearest.max() < 1e-3 and len(index.unique()) == len(mine) == 60


def test_patches_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"pip install 'sparse-cocktail\[patches\]'"):
        data.load("patches")
