"""What a subnet has of its own, and the menu's other changes: masks in place, subnets taken off."""

import pytest
import torch

from sparse_cocktail import Cocktail, convert, models, ops
from sparse_cocktail.files import read_tensors


def cocktail() -> Cocktail:
    torch.manual_seed(0)
    made = Cocktail(convert(models.build("resnet8", {"width": 4})))
    made.add("unstructured-0.5")
    made.add("2:4")
    return made


def values(tensors):
    return [t.detach().clone() for t in tensors]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def perturb(made: Cocktail, name: str) -> None:
    """As a training step of this subnet alone: other statistics, scales and shifts."""
    made.activate(name)
    with torch.no_grad():
        for tensor in (*made.statistics(), *made.affine()):
            tensor.add_(torch.rand_like(tensor))


def test_own_norms_come_and_go_with_their_subnet():
    made = cocktail()
    shared = values([*made.statistics(), *made.affine()])
    made.activate("unstructured-0.5")
    made.keep_norms("unstructured-0.5")
    perturb(made, "unstructured-0.5")
    made.keep_norms("unstructured-0.5")
    own = values([*made.statistics(), *made.affine()])
    made.activate("2:4")
    assert same(shared, [*made.statistics(), *made.affine()])
    made.activate("unstructured-0.5")
    assert same(own, [*made.statistics(), *made.affine()])
    assert not same(own, shared)


def test_training_what_is_shared_is_not_undone():
    made = cocktail()
    made.activate("unstructured-0.5")
    made.keep_norms("unstructured-0.5")
    perturb(made, "2:4")
    after = values([*made.statistics(), *made.affine()])
    made.activate("unstructured-0.5")
    assert not same(after, [*made.statistics(), *made.affine()])
    made.activate("dense")
    assert same(after, [*made.statistics(), *made.affine()])


def test_statistics_alone_leave_shared_scales_to_the_optimizer():
    made = cocktail()
    made.recalibrate("2:4", [torch.randn(8, 1, 8, 8)])
    made.activate("2:4")
    with torch.no_grad():
        made.affine()[0].add_(1.0)
    trained = made.affine()[0].clone()
    made.activate("dense")
    assert torch.equal(made.affine()[0], trained)


def test_own_norms_survive_the_file(tmp_path):
    made = cocktail()
    made.keep_norms("2:4")
    perturb(made, "2:4")
    made.keep_norms("2:4")
    x = torch.randn(3, 1, 8, 8)
    for active in ("2:4", "dense"):  # whichever is in the model while the file is written
        made.activate(active)
        made.save(tmp_path / "menu.safetensors")
        loaded = Cocktail.load(tmp_path / "menu.safetensors")
        for name in ("dense", "2:4", "unstructured-0.5"):
            with made.using(name) as a, loaded.using(name) as b:
                assert torch.equal(a.eval()(x), b.eval()(x)), (active, name)


def test_state_and_restore_keep_own_norms():
    made = cocktail()
    made.keep_norms("2:4")
    perturb(made, "2:4")
    made.keep_norms("2:4")
    own = values([*made.statistics(), *made.affine()])
    other = Cocktail(convert(models.build("resnet8", {"width": 4})))
    other.restore(made.state())
    other.activate("2:4")
    assert same(own, [*other.statistics(), *other.affine()])


def test_recalibration_leaves_scales_in_place():
    made = cocktail()
    made.keep_norms("2:4")
    perturb(made, "2:4")
    made.keep_norms("2:4")
    made.activate("dense")
    shared = values(made.affine())
    made.recalibrate("2:4", [torch.randn(8, 1, 8, 8)])
    assert same(shared, made.affine())
    made.activate("2:4")
    assert not same(shared, made.affine())


def test_masks_change_in_place():
    made = cocktail()
    address = made.masks("2:4")[0].data_ptr()
    made.activate("2:4")
    pruned = [torch.zeros_like(bits) for bits in made.masks("2:4")]
    pruned[0] = ops.pack_mask(torch.ones_like(made.bank.weights[0], dtype=torch.bool))
    with pytest.warns(UserWarning, match="no weight is left"):
        made.set_masks("2:4", pruned)
    assert made.masks("2:4")[0].data_ptr() == address
    layers = list(made.layers.values())
    assert [layer.density for layer in layers] == [1.0] + [0.0] * (len(layers) - 1)
    assert [len(rows) for rows in made.subnets["2:4"].rows][1:] == [0] * (len(layers) - 1)


def test_dense_has_no_masks_and_stays():
    made = cocktail()
    for call in (made.masks, made.remove, lambda name: made.set_masks(name, [])):
        with pytest.raises(ValueError, match="dense"):
            call("dense")


def test_a_subnet_is_taken_off_the_menu(tmp_path):
    made = cocktail()
    made.activate("2:4")
    made.remove("2:4")
    assert (made.active, list(made.subnets)) == ("dense", ["dense", "unstructured-0.5000"])
    made.save(tmp_path / "menu.safetensors")
    assert list(Cocktail.load(tmp_path / "menu.safetensors").subnets) == list(made.subnets)


def test_a_file_of_some_subnets(tmp_path):
    made = cocktail()
    made.save(tmp_path / "one.safetensors", names=["2:4"])
    assert list(Cocktail.load(tmp_path / "one.safetensors").subnets) == ["dense", "2:4"]
    tensors, _ = read_tensors(tmp_path / "one.safetensors")
    assert not [name for name in tensors if "unstructured" in name]
