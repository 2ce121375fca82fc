"""The drop-in proof: models of transformers train under our masks as under torch's own prune.

Small models with random weights, converted, next to deep copies of the plain model under
`torch.nn.utils.prune.custom_from_mask` with the same masks (of biases too, where a whole channel is
pruned). Both multiply the same masked weights layer by layer, so that only the order of the sums
inside a product may differ. How far that may move a loss is read off prune itself:

* float32: prune is within 2e-6 of its own training in float64 at every step, for every model,
  pattern and optimizer here. Ours must be within 1e-5 of prune, at every step.
* bfloat16 autocast: prune is 0.5 to 3 % off float64 after six steps. Ours may be twice as far off
  as prune, plus one rounding, 2^-8.

A forgotten mask changes the logits of these models by more than half of their size.
"""

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch.nn.utils import prune

from sparse_cocktail import NMLinear, convert, to_compressed
from sparse_cocktail.modules import MaskedLinear, masked_layers
from sparse_cocktail.ops import nm_routes
from sparse_cocktail.pruning import prune_, to_dense

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96, "initializer_range": 0.2}
STEPS = 6
FP32, BF16 = 1e-5, 2.0**-8
PATTERNS = ("unstructured-0.8", "2:4", "channel-0.5")
ADAMW = {"kind": torch.optim.AdamW, "lr": 2e-3, "weight_decay": 0.1}
SGD = {"kind": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=10)
    return transformers.ViTForImageClassification(config)


def llama(tied=True):
    text = {"vocab_size": 61, "max_position_embeddings": 64, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**SIZES, **text, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


FACTORIES = {"vit": vit, "llama": llama}


def batch(name):
    if name == "vit":
        return {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.arange(6)}
    tokens = torch.randint(0, 61, (3, 11))
    return {"input_ids": tokens, "labels": tokens}


def double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def twins(name, pattern):
    """(converted with a mask on each layer, the plain model under torch's prune, in float64)."""
    torch.manual_seed(0)
    plain = FACTORIES[name]()
    ours = convert(copy.deepcopy(plain))
    for layer in masked_layers(ours).values():
        layer.set_mask(pattern)
    wide = copy.deepcopy(plain).double()
    for model in (plain, wide):
        for layer, masked in masked_layers(ours).items():
            module = model.get_submodule(layer)
            prune.custom_from_mask(module, "weight", masked.mask)
            if module.bias is not None:  # that of a wholly pruned channel is silent
                prune.custom_from_mask(module, "bias", masked.live)
    return ours.train(), plain.train(), wide.train()


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    named = {n.removesuffix("_orig"): p.grad for n, p in model.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


def train(model, inputs, kind, autocast=False, **options):
    """The loss of every step."""
    optimizer, losses = kind(model.parameters(), **options), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def assert_losses(ours, theirs):
    """Alike at every step, of a training that did something."""
    error = (ours - theirs).abs() / theirs
    assert float(error.max()) <= FP32, f"{error.tolist()} of {theirs.tolist()}"
    assert float(theirs[-1]) < 0.7 * float(theirs[0])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FACTORIES)
def test_a_forgotten_mask_would_be_seen(name, pattern):
    ours, *_ = twins(name, pattern)
    inputs = batch(name)
    with torch.no_grad():
        masked = ours(**inputs).logits
        unmasked = prune_(ours, None)(**inputs).logits
    assert float((masked - unmasked).norm()) > 0.5 * float(masked.norm())


# ---- against torch.nn.utils.prune ----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FACTORIES)
def test_every_step_of_training_as_under_prune(name, pattern, optimizer):
    ours, theirs, _ = twins(name, pattern)
    inputs = batch(name)
    masks = {n: layer.mask for n, layer in masked_layers(ours).items()}
    before = {n: layer.weight.detach().clone() for n, layer in masked_layers(ours).items()}
    found = train(ours, inputs, **optimizer)
    assert_losses(found, train(theirs, inputs, **optimizer))
    for layer, mask in masks.items():
        assert torch.equal(ours.get_submodule(layer).mask, mask)
        moved = ours.get_submodule(layer).weight.detach() != before[layer]
        if "weight_decay" not in optimizer:
            assert not moved[~mask].any(), f"{layer}: a pruned weight has moved"
        assert moved[mask].any(), f"{layer}: no kept weight has moved"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FACTORIES)
def test_gradients_are_as_exact_as_those_under_prune(name, pattern):
    ours, theirs, wide = twins(name, pattern)
    inputs = batch(name)
    found, peer = gradients(ours, inputs), gradients(theirs, inputs)
    exact = gradients(wide, double(inputs))
    assert found.keys() == peer.keys() == exact.keys()
    for key, wanted in exact.items():
        tiny = 16 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        error = float((found[key] - wanted).abs().max())
        bound = 2 * float((peer[key] - wanted).abs().max()) + tiny
        assert error <= bound, f"{key}: {error:.3g} > {bound:.3g}"
    for layer, masked in masked_layers(ours).items():
        assert found[f"{layer}.weight"][~masked.mask].count_nonzero() == 0, layer


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", FACTORIES)
def test_training_under_bf16_autocast(name, optimizer):
    ours, theirs, wide = twins(name, "2:4")
    inputs = batch(name)
    found, peer = (train(m, inputs, autocast=True, **optimizer) for m in (ours, theirs))
    exact = train(wide, double(inputs), **optimizer)
    excess = (found - exact).abs() - 2 * (peer - exact).abs()
    assert (excess <= BF16 * exact).all(), f"{found.tolist()}, {peer.tolist()}, {exact.tolist()}"
    assert float(found[-1]) < 0.7 * float(found[0])
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in ours.parameters())


# ---- what a user does with such a model ----------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FACTORIES)
def test_save_and_load_into_a_fresh_model(name, pattern, tmp_path):
    ours, *_ = twins(name, pattern)
    inputs = batch(name)
    train(ours, inputs, **ADAMW)
    save_model(ours, tmp_path / "model.safetensors")
    fresh = convert(FACTORIES[name]())
    missing, unexpected = load_model(fresh, tmp_path / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**inputs).logits, ours.eval()(**inputs).logits)
    for layer, masked in masked_layers(ours).items():
        assert torch.equal(fresh.get_submodule(layer).mask, masked.mask), layer


@pytest.mark.parametrize("name", FACTORIES)
def test_a_plain_copy_goes_the_way_of_transformers(name, tmp_path):
    ours, *_ = twins(name, "2:4")
    to_dense(ours).save_pretrained(tmp_path)
    loaded, inputs = type(ours).from_pretrained(tmp_path), batch(name)
    with torch.no_grad():
        found, wanted = (m.eval()(**inputs).logits for m in (loaded, ours))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_tied_embeddings_are_left_alone_and_reported():
    model = convert(llama(tied=True))
    left = model.conversion.left
    assert left.keys() == {"model.embed_tokens", "lm_head"}
    assert all("tied" in reason for reason in left.values())
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    free = convert(llama(tied=False))
    assert isinstance(free.lm_head, MaskedLinear) and free.conversion.left == {}
    prune_(free, "2:4")
    assert free.lm_head.masked and free.lm_head.weight is not free.model.embed_tokens.weight


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_is_that_of_the_pruned_plain_model(pattern):
    ours, *_ = twins("llama", pattern)
    prompt = torch.randint(1, 61, (2, 5))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    how["attention_mask"] = torch.ones_like(prompt)
    found = ours.eval().generate(prompt, **how)
    plain = to_dense(ours)
    assert not masked_layers(plain) and found.shape == (2, 13)
    assert torch.equal(found, plain.generate(prompt, **how))
    for layer in masked_layers(ours).values():
        layer.set_mask(None)
    assert not torch.equal(found, ours.generate(prompt, **how)), "the mask changes nothing here"


@pytest.mark.parametrize("route", ["compressed", "dense"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("name", FACTORIES)
def test_compressed_layers_serve_the_same_model(name, pattern, route):
    torch.manual_seed(0)
    ours = prune_(FACTORIES[name](), pattern).eval()
    inputs = batch(name)
    with nm_routes.forced(route), torch.no_grad():
        served = to_compressed(ours, pattern).eval()
        assert sum(isinstance(m, NMLinear) for m in served.modules()) == len(masked_layers(ours))
        found, expected = (m(**inputs) for m in (served, ours))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        if name == "llama":
            tokens = inputs["input_ids"][:, :4]
            made = (m.generate(tokens, max_new_tokens=6, do_sample=False) for m in (served, ours))
            assert torch.equal(*made)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing():
    ours, theirs, _ = twins("llama", "2:4")
    inputs = batch("llama")
    ours.gradient_checkpointing_enable()
    assert_losses(train(ours, inputs, **SGD), train(theirs, inputs, **SGD))


def test_one_graph_without_breaks():
    """aot_eager traces forward and backward as a compiled model does, without a C++ compiler."""
    ours, theirs, _ = twins("vit", "2:4")
    inputs = batch("vit")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_losses(train(compiled, inputs, **SGD), train(theirs, inputs, **SGD))
