"""BatchNorm statistics estimated from batches, and the search over averages of weight sets."""

import contextlib

import pytest
import torch
from torch import nn

from sparse_cocktail import Cocktail, convert, recalibrate
from sparse_cocktail.averaging import ALPHAS, greedy_interpolation, interpolate
from sparse_cocktail.recalibrate import frozen_statistics, norm_layers


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 2),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.Linear(5 * 9, 6),
        nn.BatchNorm1d(6),
    )


def batches():
    """Three batches; the last is smaller, and still counts as much as the others."""
    return [torch.randn(size, 3, 6, 6) * scale + 1 for size, scale in ((8, 1), (8, 4), (3, 2))]


def statistics(model):
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def averages_by_hand(model, data):
    """Mean over the batches of every BatchNorm's batch mean and unbiased batch variance."""
    totals = {name: torch.zeros_like(value) for name, value in statistics(model).items()}
    for x in data:
        for name, layer in model.named_children():
            if isinstance(layer, nn.Dropout):
                continue
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                dims = [0, 2, 3][: 3 if x.dim() == 4 else 1]
                mean, unbiased = x.mean(dims), x.var(dims, unbiased=True)
                totals[f"{name}.running_mean"] += mean / len(data)
                totals[f"{name}.running_var"] += unbiased / len(data)
                shape = (1, -1, 1, 1)[: x.dim()]
                variance = x.var(dims, unbiased=False).view(shape)
                x = (x - mean.view(shape)) / torch.sqrt(variance + layer.eps)
                x = x * layer.weight.view(shape) + layer.bias.view(shape)
            else:
                x = layer(x)
    return totals


# ---- recalibrate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_statistics_are_the_plain_average_over_the_batches(converted):
    model, data = network(), batches()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        expected = averages_by_hand(model, data)
    if converted:
        convert(model)
    model(data[0] * 10)  # what it held before must not matter
    recalibrate(model, iter(data))
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)


def test_recalibrating_twice_gives_the_same():
    model, data = network(), batches()
    recalibrate(model, data)
    first = statistics(model)
    recalibrate(model, data)
    assert all(torch.equal(first[name], value) for name, value in statistics(model).items())


def modes(model):
    return [m.training for m in model.modules()]


def momenta(model):
    return [layer.momentum for layer in norm_layers(model).values()]


def mixed_modes():
    model = network().train()
    model[1].eval(), model[3].eval()
    return model


def test_modes_and_momenta_come_back():
    model = mixed_modes()
    before = modes(model)
    recalibrate(model, batches())
    assert modes(model) == before and momenta(model) == [0.3, None, 0.1]


def test_recalibration_records_no_gradients():
    model, recorded = network(), []
    model.register_forward_hook(lambda _, args, output: recorded.append(output.requires_grad))
    recalibrate(model, batches())
    assert recorded == [False] * 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_no_trace(error):
    def interrupted():
        yield batches()[0]
        raise error("midway")

    model = mixed_modes()
    model(batches()[1])
    before, state = modes(model), {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(error, match="midway"):
        recalibrate(model, interrupted())
    assert modes(model) == before and momenta(model) == [0.3, None, 0.1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} is neither the old nor the new statistic"


def test_no_batch_is_an_error_and_changes_nothing():
    model = network()
    model(batches()[0])
    before = statistics(model)
    with pytest.raises(ValueError, match="recalibrate: batches is empty"):
        recalibrate(model, [])
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())


def test_parameters_and_gradients_are_left_alone():
    model = network()
    before = [p.clone() for p in model.parameters()]
    recalibrate(model, batches())
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_model_without_statistics_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert norm_layers(model) == {}
    recalibrate(model, [])
    assert model.training


# ---- frozen_statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("failing", [False, True], ids=["returns", "raises"])
def test_frozen_statistics(converted, failing):
    model, x = network(), batches()[1]
    model[2].p = 0.0
    if converted:
        convert(model)
        model[4].set_live(torch.tensor([True, True, False, True, True]))
    model(x * 3)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with contextlib.suppress(ArithmeticError), frozen_statistics(model):
        frozen = model(x)
        if failing:
            raise ArithmeticError
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), f"{name} was touched"
    assert torch.equal(model(x), frozen), "not the output of training mode"
    assert not torch.equal(model.eval()(x), frozen)
    changed = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    assert len(changed) == 9, "outside, every mean, variance and count is updated again"


def test_frozen_statistics_leaves_untracked_layers_untracked():
    norm = nn.BatchNorm1d(3)
    norm.track_running_stats = False
    with frozen_statistics(nn.Sequential(norm)):
        pass
    assert norm.track_running_stats is False


# ---- statistics of subnets -----------------------------------------------------------------------


def menu():
    """Three networks on one set of weights, in eval mode, with statistics of their training."""
    model = network()
    model(batches()[1])
    cocktail = Cocktail(convert(model.eval()))
    cocktail.add("2:4"), cocktail.add("channel-0.5")
    return cocktail


def test_recalibrated_statistics_belong_to_their_subnet():
    cocktail, x = menu(), batches()[0]
    dense, before = cocktail.model(x), statistics(cocktail.model)
    cocktail.recalibrate("2:4", batches())
    for name, value in statistics(cocktail.model).items():
        assert torch.equal(value, before[name]), f"{name} of the dense network was lost"
    assert torch.equal(cocktail.model(x), dense) and cocktail.subnets["dense"].statistics is None
    with cocktail.using("2:4"):
        assert not torch.equal(cocktail.statistics()[0], before["1.running_mean"])
    with cocktail.using("channel-0.5000"):
        assert torch.equal(cocktail.statistics()[0], before["1.running_mean"])


def test_a_subnet_is_recalibrated_as_the_active_model_would_be():
    cocktail = menu()
    data = batches()
    cocktail.recalibrate("2:4", data)
    stored = [t.clone() for t in cocktail.subnets["2:4"].statistics]
    cocktail.activate("2:4")
    recalibrate(cocktail.model, data)
    assert all(map(torch.equal, cocktail.statistics(), stored))


@pytest.mark.parametrize("failing", [False, True], ids=["returns", "raises"])
def test_using_a_subnet_gives_the_dense_network_back(failing):
    cocktail, x = menu(), batches()[0]
    y = cocktail.model(x)
    cocktail.subnets["2:4"].statistics = [t + 1 for t in cocktail.statistics()]
    with contextlib.suppress(ArithmeticError), cocktail.using("2:4"):
        assert not torch.equal(cocktail.model(x), y)
        if failing:
            raise ArithmeticError
    assert cocktail.active == "dense" and torch.equal(cocktail.model(x), y)


def test_recalibrating_the_active_subnet_takes_effect_at_once():
    cocktail = menu()
    cocktail.activate("2:4")
    address = cocktail.statistics()[0].data_ptr()
    cocktail.recalibrate("2:4", batches())
    assert all(map(torch.equal, cocktail.statistics(), cocktail.subnets["2:4"].statistics))
    cocktail.recalibrate("dense", batches())
    assert cocktail.active == "2:4" and cocktail.statistics()[0].data_ptr() == address
    assert all(map(torch.equal, cocktail.statistics(), cocktail.subnets["2:4"].statistics))


def test_failed_recalibration_of_a_subnet_changes_nothing():
    cocktail, x = menu(), batches()[0]
    y = cocktail.model(x)
    with pytest.raises(ValueError, match="empty"):
        cocktail.recalibrate("2:4", [])
    assert cocktail.subnets["2:4"].statistics is None and cocktail.active == "dense"
    assert torch.equal(cocktail.model(x), y)


def test_preserved_statistics_undoes_everything():
    cocktail = menu()
    cocktail.recalibrate("2:4", batches())
    cocktail.activate("channel-0.5000")
    before = {name: t.clone() for name, t in cocktail.model.state_dict().items()}
    with contextlib.suppress(ArithmeticError), cocktail.preserved_statistics():
        cocktail.activate("2:4")
        cocktail.model.train()(batches()[0])
        raise ArithmeticError
    assert cocktail.active == "channel-0.5000"
    after = cocktail.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


def test_cocktail_without_batch_norm(tmp_path):
    def plain():
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    cocktail, x = Cocktail(convert(plain())), torch.randn(3, 8)
    cocktail.add("2:4")
    cocktail.recalibrate("2:4", [x])
    with cocktail.using("2:4"):
        y = cocktail.model(x)
    assert torch.equal(cocktail.export("2:4", plain=True)(x), y)
    cocktail.save(tmp_path / "menu")
    loaded = Cocktail.load(tmp_path / "menu", convert(plain()))
    assert torch.equal(loaded.model(x), cocktail.model(x))
    loaded.activate("2:4")
    assert torch.equal(loaded.model(x), y)


# ---- averaging -----------------------------------------------------------------------------------


def state(value, count):
    return {"w": torch.tensor(value), "num_batches_tracked": torch.tensor(count)}


A, B = state([1.0, 2.0], 10), state([3.0, -2.0], 99)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
def test_interpolate(alpha):
    mixed = interpolate(A, B, alpha)
    torch.testing.assert_close(mixed["w"], alpha * A["w"] + (1 - alpha) * B["w"])
    assert mixed["num_batches_tracked"] == 10 and mixed["num_batches_tracked"].dtype == torch.int64


def test_alpha_one_is_the_identity_even_beside_nan():
    mixed = interpolate(A, state([float("nan"), float("inf")], 1), 1.0)
    assert torch.equal(mixed["w"], A["w"])
    mixed["w"].zero_(), mixed["num_batches_tracked"].zero_()
    assert A["w"].any() and A["num_batches_tracked"] == 10, "the result aliases its input"


def distance_to(target):
    return lambda weights, stage: -float((weights["w"] - torch.tensor(target)).norm())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_best_factor_on_the_line_is_found(alpha):
    target = (alpha * A["w"] + (1 - alpha) * B["w"]).tolist()
    best, choices = greedy_interpolation([(3, A), (4, B)], distance_to(target))
    assert [(c.stage, c.alpha) for c in choices] == [(4, alpha)]
    torch.testing.assert_close(best["w"], torch.tensor(target))
    assert choices[0].score == pytest.approx(0.0, abs=1e-6)


def test_members_fold_in_one_after_the_other():
    pool = [(i, state([float(i == 1), float(i == 2), float(i == 3)], i)) for i in (1, 2, 3)]
    best, choices = greedy_interpolation(pool, distance_to([0.4, 0.4, 0.2]))
    first, second = (c.alpha for c in choices)
    expected = torch.tensor([first * second, (1 - first) * second, 1 - second])
    torch.testing.assert_close(best["w"], expected)
    assert (first, second) == (0.5, 0.8) and [c.stage for c in choices] == [2, 3]
    assert best["num_batches_tracked"] == 1


@pytest.mark.parametrize("score", [0.0, float("nan"), -1.0])
def test_ties_and_useless_members_keep_the_weights(score):
    best, choices = greedy_interpolation([(0, A), (1, B)], lambda *_: score)
    assert choices[0].alpha == 1.0 and torch.equal(best["w"], A["w"])


def test_an_undefined_score_is_never_chosen():
    def score(weights, stage):
        return 1.0 if torch.equal(weights["w"], A["w"]) else float("nan")

    assert greedy_interpolation([(0, A), (1, B)], score)[1][0].alpha == 1.0


def test_every_factor_is_tried_once_and_told():
    calls = []

    def score(weights, stage):
        calls.append(stage)
        return float(weights["w"][0])

    best, (choice,) = greedy_interpolation([(0, A), (7, B)], score, alphas=(0.25, 0.5, 1.0))
    assert calls == [7, 7, 7]
    assert choice.tried == [[0.25, 2.5], [0.5, 2.0], [1.0, 1.0]]
    assert (choice.alpha, choice.score, float(best["w"][0])) == (0.25, 2.5, 2.5)


def test_pool_of_one_is_itself():
    best, choices = greedy_interpolation([(5, A)], distance_to([0.0, 0.0]))
    assert choices == [] and torch.equal(best["w"], A["w"])


def test_empty_pool_is_an_error():
    with pytest.raises(ValueError, match="pool is empty"):
        greedy_interpolation([], distance_to([0.0, 0.0]))


def test_short_names_reach_the_subnet():
    cocktail = Cocktail(convert(network()))
    cocktail.add("channel-0.5")
    cocktail.activate("channel-0.5")
    assert cocktail.active == "channel-0.5000"
    cocktail.recalibrate("channel-0.5", batches())
    assert cocktail.subnets["channel-0.5000"].statistics


def test_masks_set_before_are_not_lost_silently():
    model = convert(network())
    cocktail = Cocktail(model)
    next(iter(cocktail.layers.values())).set_mask("unstructured-0.5")
    with pytest.raises(ValueError, match=r"have a mask set already.*set_mask\(None\)"):
        Cocktail(model)


def test_state_keeps_the_shared_statistics_of_an_active_subnet():
    model = convert(network())
    cocktail = Cocktail(model)
    cocktail.add("unstructured-0.5")
    shared = [t.clone() for t in cocktail.statistics()]
    cocktail.recalibrate("unstructured-0.5", batches())
    cocktail.activate("unstructured-0.5")
    state = cocktail.state()
    cocktail.activate("dense")
    for buffer in cocktail.statistics():
        buffer.zero_()  # what a resumed model would hold does not matter
    twin = Cocktail(model)
    twin.restore(state)
    twin.activate("dense")
    assert all(map(torch.equal, twin.statistics(), shared))
