"""The vision transformer: its size and function, what of it is masked, and training with AdamW."""

import pytest
import torch
from test_engine import Stop, crash_before, same, toy, weights

from sparse_cocktail import Cocktail, convert, models
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import train
from sparse_cocktail.preparation import prepare_model

TINY = {"classes": 3, "image": 8, "patch": 4, "width": 16, "depth": 2, "heads": 4, "mlp": 32}


def tiny(**changes):
    return models.build("vit_b16", {**TINY, **changes})


def shaken(model):
    """The model with no parameter at its initial 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_parameters_are_as_many_as_published():
    with torch.device("meta"):
        model = models.build("vit_b16")
    assert sum(p.numel() for p in model.parameters()) == 86_567_656


# Our names of torchvision's parameters.
NAMES = {
    "class_token": "token",
    "conv_proj": "patches",
    "encoder.pos_embedding": "positions",
    "encoder.ln": "norm",
    "heads.head": "head",
    "encoder.layers.encoder_layer_": "encoder.",
    "self_attention.in_proj_": "attention.qkv.",
    "self_attention.out_proj": "attention.out",
    "mlp.0": "mlp1",
    "mlp.3": "mlp2",
    "ln_": "norm",
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_computes_what_torchvisions_does_with_the_same_weights(training):
    pytest.importorskip("torchvision", reason="the twin is torchvision's (extra vision)")
    from torchvision.models.vision_transformer import VisionTransformer

    twin = VisionTransformer(8, 4, 2, 4, 16, 32, num_classes=3).double().train(training)
    state = shaken(twin).state_dict()
    for theirs, mine in NAMES.items():
        state = {name.replace(theirs, mine): value for name, value in state.items()}
    model = tiny().double().train(training)
    model.load_state_dict(state)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


def test_only_positions_tell_patches_apart():
    model = shaken(tiny()).eval()
    x = torch.randn(2, 3, 8, 8)
    turned = x.roll(4, 3)  # the left patches change places with the right ones
    assert not torch.allclose(model(x), model(turned))
    torch.nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(x), model(turned))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dropout_is_for_training(training):
    model = shaken(tiny(dropout=0.3)).train(training)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), model(x)) != training


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"image": 9}, r"image=9 is not a multiple of patch=4"),
        ({"heads": 3}, r"width=16 is not a multiple of heads=3"),
        ({"heads": 0}, r"width=16 is not a multiple of heads=0"),
        ({"layers": 2}, r"vit_b16 does not take .*'layers'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_shapes_that_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        tiny(**args)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images are \(16, 16\), but positions are for \(8, 8\)"):
        tiny()(torch.zeros(1, 3, 16, 16))


# ---- masks ---------------------------------------------------------------------------------------

ENCODER = [
    f"encoder.{block}.{layer}"
    for block in (0, 1)
    for layer in ("attention.qkv", "attention.out", "mlp1", "mlp2")
]
FIELDS = {"mask_linear": True, "mask_only": "encoder"}


def prepared(**fields):
    config, _ = split_fields(fields)
    return prepare_model(tiny(), config, torch.zeros(2, 3, 8, 8), torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "masked"),
    [
        (FIELDS, ENCODER),
        ({"mask_linear": True}, [*ENCODER, "head"]),
        ({"mask_linear": True, "mask_first": True}, ["patches", *ENCODER, "head"]),
        ({"mask_linear": True, "mask_only": r"encoder\.\d+\.mlp"}, [*ENCODER[2:4], *ENCODER[6:]]),
        ({"mask_first": True}, ["patches"]),
    ],
    ids=["encoder", "linear", "all", "expression", "patches"],
)
def test_which_layers_are_masked(fields, masked):
    assert prepared(**fields).conversion.masked == masked


@pytest.mark.parametrize("pattern", ["block-4x4-0.5", "2:4", "unstructured-0.5", "channel-0.5"])
def test_masked_projections_take_no_gradient_where_pruned(pattern):
    cocktail = Cocktail(shaken(prepared(**FIELDS)))
    name = cocktail.add(pattern).name
    cocktail.activate(name)
    cocktail.model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for layer in cocktail.layers.values():
        assert 0 < layer.mask.count_nonzero() < layer.weight.numel()
        assert not layer.weight.grad[~layer.mask].any()
        assert layer.weight.grad[layer.mask].any()
    model = cocktail.export(name)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x), cocktail.model.eval()(x), rtol=1e-4, atol=1e-4)


def test_linear_layers_alone_need_mask_linear():
    with pytest.raises(ValueError, match=r"VisionTransformer has no convolution to mask .*linear"):
        prepared()


def test_mask_only_that_matches_nothing():
    with pytest.raises(
        ValueError, match=r"mask_only='coder' matches .* no layer.*patches, encoder"
    ):
        prepared(mask_linear=True, mask_only="coder")


def test_convert_leaves_a_plain_model_alone_but_for_its_projections():
    model = convert(tiny())
    assert model.conversion.masked == [*ENCODER, "head"]
    assert model.conversion.left == {"patches": "first convolution"}


# ---- training ------------------------------------------------------------------------------------

RUN = {"epochs": 2, "stages": 1, "rewind": 0, "optimizer": "adamw", "lr": 0.003, "nm": {}}
RUN |= {"weight_decay": 0.1, "decay_norm_bias": False, "min_lr": 0.0, "restart_lr": 0.0005}
RUN |= {"threads": 1, "mixup": 0.2, "cutmix": 1.0, "clip_norm": 1.0, "checkpoint_every": 2}


def run(folder, **fields):
    args = {**TINY, "inputs": 1}
    return train("vit_b16", toy(), folder, model_args=args, **FIELDS, **RUN, **fields)


def test_it_trains_with_adamw_and_mixed_batches_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    undo = crash_before(monkeypatch, 1, 3)
    with pytest.raises(Stop):
        run(tmp_path / "broken")
    undo()
    resumed = run(tmp_path / "broken", resume=True)
    assert resumed["subnets"] == whole["subnets"]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
