"""Networks of transformers and timm, small and randomly initialised: convert, prune, save, load."""

import copy

import pytest
import torch

from sparse_cocktail import Cocktail, convert
from sparse_cocktail.modules import masked_layers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed (it needs torchvision)")

# 90 % of a network that was never trained: some layers are pruned wholly.
pytestmark = pytest.mark.filterwarnings("ignore:subnet unstructured-0.9000. no weight is left")

PATTERNS = ("unstructured-0.9000", "2:4", "channel-0.5000")
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TRANSFORMER |= {"intermediate_size": 64}
TEXT = {**TRANSFORMER, "vocab_size": 64, "max_position_embeddings": 32}


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes, num_labels=10)
    return transformers.ResNetForImageClassification(config)


def vit():
    config = transformers.ViTConfig(**TRANSFORMER, image_size=32, patch_size=8, num_labels=10)
    return transformers.ViTForImageClassification(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def of_timm(name, **arguments):
    return lambda: timm.create_model(name, num_classes=10, **arguments)


# factory, number of masked layers, and a part of what is said of each layer that is left
MODELS = {
    "transformers-resnet": (resnet, 8, {"resnet.embedder.embedder.convolution": "first"}),
    "transformers-vit": (vit, 13, {"vit.embeddings.patch_embeddings.projection": "first"}),
    "transformers-bert": (
        bert,
        13,
        {"bert.embeddings.word_embeddings": "tied", "cls.predictions.decoder": "tied"},
    ),
    "transformers-llama": (llama, 14, {"model.embed_tokens": "tied", "lm_head": "tied"}),
    "timm-resnet18": (of_timm("resnet18", channels=(16, 32, 64, 128)), 21, {"conv1": "first"}),
    "timm-vit_tiny": (
        of_timm("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2),
        9,
        {"patch_embed.proj": "first"},
    ),
    "timm-convnext_atto": (of_timm("convnext_atto", dims=(8, 16, 32, 64)), 40, {"stem.0": "first"}),
    "timm-efficientnet": (of_timm("test_efficientnet"), 17, {"conv_stem": "first"}),
    "timm-mobilenetv3": (
        of_timm("mobilenetv3_small_050"),
        52,
        {"conv_stem": "first", "classifier": "subclass Linear"},
    ),
}


def inputs(name):
    if name in ("transformers-bert", "transformers-llama"):
        return torch.randint(0, 64, (2, 7))
    return torch.randn(2, 3, 32, 32)


def logits(output):
    return getattr(output, "logits", output)


def gradients(model, output):
    model.zero_grad()
    output.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """(name, plain model, converted copy with all subnets, inputs)."""
    torch.manual_seed(0)
    factory, *_ = MODELS[request.param]
    plain, x = factory(), inputs(request.param)
    with torch.no_grad():
        plain.train()(x)  # BatchNorm statistics of its own
        for parameter in plain.parameters():  # biases and scales that are not 0 and 1
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
    plain.eval()
    cocktail = Cocktail(convert(copy.deepcopy(plain)))
    for pattern in PATTERNS:
        cocktail.add(pattern)
    return request.param, plain, cocktail, x


def test_what_is_masked_and_what_is_left(made):
    name, plain, cocktail, x = made
    _, count, left = MODELS[name]
    report = cocktail.model.conversion
    assert len(report.masked) == count and list(masked_layers(cocktail.model)) == report.masked
    norms = {n for n, m in plain.named_modules() if type(m).__name__ == "BatchNormAct2d"}
    assert report.left.keys() == left.keys() | norms  # timm's own: they are not silenced
    assert all("subclass BatchNormAct2d" in report.left[n] for n in norms)
    assert bool(norms) == (name in ("timm-efficientnet", "timm-mobilenetv3"))
    assert all(part in report.left[layer] for layer, part in left.items()), report.left
    assert list(cocktail.model.state_dict()) == list(plain.state_dict())
    with cocktail.using("dense"):
        assert torch.equal(logits(cocktail.model(x)), logits(plain(x)))


def test_tied_weights_stay_tied(made):
    name, _, cocktail, _ = made
    tied = [layer for layer, reason in cocktail.model.conversion.left.items() if "tied" in reason]
    weights = {id(cocktail.model.get_submodule(layer).weight) for layer in tied}
    assert len(weights) == bool(tied)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_subnet_is_the_plain_network_with_masked_weights(made, pattern):
    _, plain, cocktail, x = made
    pruned, model = copy.deepcopy(plain), cocktail.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks = {names[id(p)]: mask for p, mask in cocktail.kept_parameters([pattern])}
    with torch.no_grad():
        for name, mask in masks.items():
            pruned.get_parameter(name).mul_(mask)
    expected = logits(pruned(x))
    with cocktail.using(pattern):
        found = logits(model(x))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        ours = gradients(model, found)
    theirs = gradients(pruned, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        wanted = gradient * masks[name] if name in masks else gradient
        scale = max(float(wanted.abs().max()), 1e-6)
        assert float((ours[name] - wanted).abs().max()) <= 1e-4 * scale, name
        if name in masks:
            assert ours[name][~masks[name]].count_nonzero() == 0, name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_export_is_a_plain_network_that_computes_the_same(made, pattern):
    _, plain, cocktail, x = made
    exported = cocktail.export(pattern, plain=True)
    assert [type(m) for m in exported.modules()] == [type(m) for m in plain.modules()]
    with cocktail.using(pattern), torch.no_grad():
        found = logits(cocktail.model(x))
        torch.testing.assert_close(found, logits(exported(x)), atol=1e-5, rtol=1e-4)


def test_sparsity_and_figures(made):
    _, _, cocktail, x = made
    dense, unstructured, nm, channel = cocktail.summary(x[:1])
    assert abs(unstructured["sparsity"] - 0.9) < 1e-3
    assert 0.0 < nm["sparsity"] <= 0.5 and 0.3 < channel["sparsity"] < 0.6
    for row in (unstructured, nm, channel):
        assert 0 < row["flops"] < dense["flops"] and row["parameters"] < dense["parameters"]
    with cocktail.using("2:4"):
        for layer in cocktail.layers.values():
            if layer.weight.shape[1] % 4:  # depthwise and squeezing layers cannot take 2:4
                assert layer.mask.all()
            else:
                assert (layer.mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


def test_save_and_load_into_a_fresh_network(made, tmp_path):
    name, _, cocktail, x = made
    cocktail.save(tmp_path / "menu.safetensors")
    fresh = MODELS[name][0]().eval()
    loaded = Cocktail.load(tmp_path / "menu.safetensors", model=fresh)
    assert list(loaded.subnets) == ["dense", *PATTERNS]
    for subnet in cocktail.subnets:
        with cocktail.using(subnet), loaded.using(subnet), torch.no_grad():
            assert torch.equal(logits(cocktail.model(x)), logits(fresh(x))), subnet


def test_adamw_trains_all_subnets_of_a_language_model():
    model = convert(llama())
    cocktail = Cocktail(model)
    for pattern in PATTERNS:
        cocktail.add(pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.arange(24).remainder(6).view(2, 12)  # each token tells the next
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        step = []
        for name in cocktail.subnets:
            cocktail.activate(name)
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            step.append(float(loss.detach()))
        optimizer.step()
        losses.append(step)
    assert all(last < 0.5 * first for first, last in zip(losses[0], losses[-1], strict=True))
