"""What a subnet has of its own, and the menu's other changes: masks in place, subnets taken off."""

import pytest
import torch
from test_engine import Stop, crash_before, run
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_cocktail import Cocktail, convert, models, ops
from sparse_cocktail.engine import Trainer
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


def test_what_is_shared_comes_back_after_several_own_norms():
    made = cocktail()
    shared = values([*made.statistics(), *made.affine()])
    own = {}
    for name in ("unstructured-0.5", "2:4"):
        made.keep_norms(name)
        perturb(made, name)
        made.keep_norms(name)
        own[name] = values([*made.statistics(), *made.affine()])
    for name in ("2:4", "unstructured-0.5"):
        made.activate(name)
        assert same(own[name], [*made.statistics(), *made.affine()])
    made.activate("dense")
    assert same(shared, [*made.statistics(), *made.affine()])


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


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_restored_norms_are_copies_where_the_model_is(place):
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: torch sees no GPU on this machine")
    made = cocktail()
    made.keep_norms("2:4")
    made.activate("2:4")  # so that what is shared is set aside
    state = made.state()
    other = Cocktail(convert(models.build("resnet8", {"width": 4})).to(place))
    other.restore(state)
    own, kept = other.subnets["2:4"], state["subnets"][2]
    pairs = [
        (own.statistics, kept["statistics"]),
        (own.affine, kept["affine"]),
        (other._shared, state["shared"]),
        (other._shared_affine, state["shared_affine"]),
    ]
    for mine, stored in pairs:
        assert {t.device.type for t in mine} == {place}
        assert same([t.cpu() for t in mine], stored)
        assert not {t.data_ptr() for t in mine} & {t.data_ptr() for t in stored}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_momentum_lies_like_its_weight_after_a_resume(tmp_path, monkeypatch, optimizer):
    """Files keep no strides; in other ones every step of the optimizer takes the slow way."""
    fields = {"channels_last": True, "optimizer": optimizer, "checkpoint_every": 2}
    undo = crash_before(monkeypatch, 1, 2)
    with pytest.raises(Stop):
        run(tmp_path, **fields)
    undo()
    seen = []
    restore = Trainer._restore

    def look(self, tree):
        restore(self, tree)
        seen.append(self.ctx.optimizer)

    monkeypatch.setattr(Trainer, "_restore", look)
    run(tmp_path, resume=True, **fields)
    pairs = [
        (weight, value)
        for weight, state in seen[0].state.items()
        for value in state.values()
        if weight.dim() == 4 and isinstance(value, torch.Tensor) and value.shape == weight.shape
    ]
    assert len(pairs) >= 9
    assert all(value.stride() == weight.stride() for weight, value in pairs)
    assert any(not weight.is_contiguous() for weight, _ in pairs)


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


def test_recalibration_of_the_active_subnet_is_in_force_at_once():
    made = cocktail()
    made.activate("2:4")
    before = values(made.statistics())
    made.recalibrate("2:4", [torch.randn(8, 1, 8, 8)])
    assert made.active == "2:4" and same(made.subnets["2:4"].statistics, made.statistics())
    assert not same(before, made.statistics())


def test_recalibration_of_a_subnet_leaves_how_many_batches_the_model_has_seen():
    made = cocktail()
    for norm in made.norms.values():
        norm.num_batches_tracked.fill_(7)
    made.recalibrate("2:4", [torch.randn(8, 1, 8, 8)])
    assert {int(norm.num_batches_tracked) for norm in made.norms.values()} == {7}


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


class Waits(TorchDispatchMode):
    """Counts operations whose result a GPU has to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("nonzero", "_local_scalar_dense", "is_nonzero", "equal", "item")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


def test_new_masks_do_not_wait_for_every_layer():
    made = cocktail()
    made.activate("2:4")
    bits = [b.clone() for b in made.masks("2:4")]
    with Waits() as waits:
        made.set_masks("2:4", bits)
    assert waits.count <= 1 < len(bits)
    for live, rows, found in zip(
        made.subnets["2:4"].live, made.subnets["2:4"].rows, bits, strict=True
    ):
        assert torch.equal(live, found.flatten(1).ne(0).any(1))
        assert torch.equal(rows, ops.live_rows(found))


@pytest.mark.parametrize("how", ["set_masks", "remove and add"])
def test_other_masks_are_measured_anew(how):
    made, x = cocktail(), torch.randn(1, 1, 8, 8)
    for name in ("2:4", "unstructured-0.5"):
        made.subnet(name).accuracy = 50.0
        made.latency(name, x)
    if how == "set_masks":
        made.set_masks("2:4", made.masks("2:4"))
    else:
        made.remove("2:4")
        made.add("2:4")
    assert [key[0] for key in made._latencies] == ["unstructured-0.5000"]
    assert made.subnet("2:4").accuracy is None
    assert made.subnet("unstructured-0.5").accuracy == 50.0


def test_bits_beyond_the_last_input_are_refused():
    made = cocktail()
    before = [bits.clone() for bits in made.masks("2:4")]
    wrong = [torch.full_like(bits, -1) for bits in before]
    with pytest.raises(ValueError, match="Cocktail.set_masks: mask has bits set beyond in=4"):
        made.set_masks("2:4", wrong)
    assert same(before, made.masks("2:4"))


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
