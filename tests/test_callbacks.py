"""Callbacks that co-train a menu in the loops of transformers and Lightning."""

import copy
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparse_cocktail import Cocktail, callbacks, convert, models, recalibrate
from sparse_cocktail.modules import masked_layers


def framework(name, *needs):
    """Skip where a framework cannot be imported; says which part is missing."""
    for module in (*needs, name):
        pytest.importorskip(module, reason=f"{name} needs {module}", exc_type=ImportError)


@pytest.fixture
def callback_of():
    """`callback_of(cocktail, ...)`: the callback for transformers."""
    framework("transformers")
    return lambda *args, **options: callbacks.CocktailCallback(*args, **options)


@pytest.fixture
def resnet():
    cocktail = Cocktail(convert(models.build("resnet8", {"width": 8})))
    for pattern in ("2:4", "channel-0.5", "unstructured-0.8"):
        cocktail.add(pattern)
    return cocktail


X, Y = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(64) % 10
BATCHES = [X[:32], X[32:]]


def loop(cocktail, callback, steps, after_step=lambda step: None, micro=1, optimizer=None):
    """The hooks in the order in which transformers.Trainer calls them, around plain SGD."""
    args, state, control = SimpleNamespace(), SimpleNamespace(global_step=0), None
    model = cocktail.model.train()
    optimizer = optimizer or torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2
    )
    callback.on_train_begin(args, state, control, model=model)
    seen = []
    for step in range(steps):
        callback.on_step_begin(args, state, control)
        seen.append(cocktail.active)
        for _ in range(micro):
            nn.functional.cross_entropy(model(X), Y).backward()
            callback.on_substep_end(args, state, control)
        callback.on_pre_optimizer_step(args, state, control)
        optimizer.step()
        callback.on_optimizer_step(args, state, control)
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, control)
        assert cocktail.active == "dense"
        after_step(step)
    callback.on_train_end(args, state, control)
    return seen


# ---- whose turn it is ----------------------------------------------------------------------------


def test_turns_alternate_and_are_fair(resnet, callback_of):
    callback = callback_of(resnet)
    turns = [callback.turn(step) for step in range(60)]
    assert turns[::2] == ["dense"] * 30
    assert Counter(turns[1::2]) == {name: 10 for name in resnet.subnets if name != "dense"}
    laps = [tuple(turns[1::2][i : i + 3]) for i in range(0, 30, 3)]
    assert all(len(set(lap)) == 3 for lap in laps) and len(set(laps)) > 1


def test_turns_depend_on_seed_and_step_only(resnet, callback_of):
    torch.manual_seed(5)
    first = [callback_of(resnet, seed=1).turn(step) for step in range(100)]
    torch.manual_seed(6)
    assert [callback_of(resnet, seed=1).turn(step) for step in range(100)] == first
    assert [callback_of(resnet, seed=2).turn(step) for step in range(100)] != first
    slow = callback_of(resnet, seed=1, every=3)
    assert [slow.turn(step) for step in range(300)] == [name for name in first for _ in range(3)]


def test_names_in_any_spelling(resnet, callback_of):
    callback = callback_of(resnet, names=["channel-0.50", "dense"])
    assert callback.names == ["channel-0.5000"]


def test_errors(resnet, callback_of):
    with pytest.raises(KeyError, match="subnet '3:4' is unknown"):
        callback_of(resnet, names=["3:4"])
    with pytest.raises(ValueError, match=r"names=\['dense'\] holds no sparse subnet"):
        callback_of(resnet, names=["dense"])
    with pytest.raises(ValueError, match="every=0 is below 1"):
        callback_of(resnet, every=0)
    with pytest.raises(ValueError, match="ResNet is not in the Linear that is trained"):
        callback_of(resnet, batches=BATCHES).on_train_begin(None, None, None, model=nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="the model has BatchNorm; give batches="):
        callback_of(resnet).on_train_begin(None, None, None, model=resnet.model)
    with pytest.raises(AttributeError, match="no attribute 'KerasCallback'"):
        callbacks.KerasCallback  # noqa: B018


# ---- what a step does ----------------------------------------------------------------------------


def test_the_loop_runs_dense_and_subnets_in_turn(resnet, callback_of):
    callback = callback_of(resnet, batches=BATCHES)
    assert loop(resnet, callback, 8) == [callback.turn(step) for step in range(8)]
    assert resnet.model.training
    for name in callback.names:
        assert resnet.subnets[name].statistics is not None
    assert resnet.subnets["dense"].statistics is None


@pytest.mark.parametrize("freeze", [True, False])
def test_a_subnets_step_leaves_pruned_weights_alone(resnet, callback_of, freeze):
    callback = callback_of(resnet, names=["channel-0.5"], batches=BATCHES, freeze=freeze)
    names = dict(resnet.model.named_parameters())
    history = [{n: p.detach().clone() for n, p in names.items()}]
    loop(
        resnet,
        callback,
        4,
        lambda _: history.append({n: p.detach().clone() for n, p in names.items()}),
    )
    kept = resnet.kept_parameters(["channel-0.5"])
    for parameter, mask in kept:
        (name,) = (n for n, p in names.items() if p is parameter)
        for step, (before, after) in enumerate(zip(history, history[1:], strict=False)):
            moved = before[name] != after[name]
            assert moved[mask].any()
            if not mask.all() and parameter.dim() > 1:
                assert bool(moved[~mask].any()) == (step % 2 == 0 or not freeze), (name, step)


def test_running_statistics_are_those_of_the_dense_steps(resnet, callback_of):
    callback = callback_of(resnet, batches=BATCHES)
    history = [[t.clone() for t in resnet.statistics()]]
    loop(resnet, callback, 6, lambda _: history.append([t.clone() for t in resnet.statistics()]))
    for step, (before, after) in enumerate(zip(history, history[1:], strict=False)):
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert not any(same) if step % 2 == 0 else all(same), step


def test_subnets_get_the_statistics_that_recalibrate_gives(resnet, callback_of):
    loop(resnet, callback_of(resnet, batches=BATCHES), 4)
    with resnet.preserved_statistics():
        resnet.activate("2:4")
        recalibrate(resnet.model, BATCHES)
        expected = [t.clone() for t in resnet.statistics()]
    assert all(map(torch.equal, resnet.subnets["2:4"].statistics, expected))


def test_a_menu_beside_a_checkpoint_has_statistics_of_every_subnet(resnet, callback_of, tmp_path):
    callback = callback_of(resnet, batches=BATCHES)
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=1)
    callback.on_train_begin(args, state, None, model=resnet.model)
    callback.on_step_begin(args, state, None)
    assert resnet.active != "dense"
    for state.is_world_process_zero in (False, True):
        assert not list(tmp_path.iterdir())
        callback.on_save(args, state, None)
    loaded = Cocktail.load(tmp_path / "checkpoint-1" / "cocktail.safetensors")
    for name in callback.names:
        resnet.recalibrate(name, BATCHES)
        pairs = zip(loaded.subnets[name].statistics, resnet.subnets[name].statistics, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    assert resnet.active == "dense"


def test_a_loaded_menu_trains_on_from_its_dense_statistics(resnet, callback_of, tmp_path):
    resnet.recalibrate("dense", BATCHES)
    resnet.recalibrate("2:4", BATCHES)
    resnet.save(tmp_path / "menu.safetensors")
    loaded = Cocktail.load(tmp_path / "menu.safetensors")
    loaded.activate("2:4")
    callback = callback_of(loaded, batches=BATCHES)
    callback.on_train_begin(None, None, None, model=loaded.model)
    dense = resnet.subnets["dense"].statistics
    assert loaded.active == "dense" and all(map(torch.equal, loaded.statistics(), dense))
    history = []
    loop(loaded, callback, 4, lambda _: history.append(loaded.statistics()[0].clone()))
    assert not torch.equal(history[0], dense[0])
    assert torch.equal(history[0], history[1]) and not torch.equal(history[1], history[2])
    assert torch.equal(loaded.statistics()[0], history[-1])


def test_an_interrupted_step_is_left_behind(resnet, callback_of):
    callback = callback_of(resnet, batches=BATCHES)
    state = SimpleNamespace(global_step=1)
    callback.on_step_begin(None, state, None)
    assert resnet.active != "dense"
    callback.on_train_begin(None, state, None, model=resnet.model)
    assert resnet.active == "dense"
    assert all(norm.track_running_stats for norm in resnet.norms.values())


def test_the_menu_gets_better(resnet, callback_of):
    def losses():
        found = {}
        for name in resnet.subnets:
            with resnet.preserved_statistics(), torch.no_grad():
                resnet.activate(name)
                recalibrate(resnet.model, BATCHES)
                found[name] = nn.functional.cross_entropy(resnet.model.eval()(X), Y).item()
        return found

    before = losses()
    loop(resnet, callback_of(resnet, batches=BATCHES), 60)
    after = losses()
    assert all(after[name] < 0.9 * before[name] for name in before), (before, after)


# ---- the frameworks themselves -------------------------------------------------------------------


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        words = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": words, "labels": words[0] % 3}


def trainer(cocktail, folder, callback, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **options,
    )
    data = {"train_dataset": Words(), "eval_dataset": Words()}
    return Trainer(cocktail.model, arguments, callbacks=[callback], **data)


def bert_menu():
    torch.manual_seed(3)
    cocktail = Cocktail(convert(bert(), skip=["classifier"]))
    cocktail.add("2:4")
    cocktail.add("unstructured-0.8")
    return cocktail


def watch(cocktail):
    """Names of the active subnets of all forwards in training, and in evaluation."""
    seen = {True: [], False: []}
    cocktail.model.register_forward_pre_hook(lambda m, _: seen[m.training].append(cocktail.active))
    return seen


def test_transformers_trainer(tmp_path):
    framework("transformers", "accelerate")
    cocktail = bert_menu()
    callback, seen = callbacks.CocktailCallback(cocktail, seed=4), watch(cocktail)
    before = {n: w.detach().clone() for n, w in cocktail.model.named_parameters()}
    run = trainer(
        cocktail,
        tmp_path,
        callback,
        max_steps=8,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=4,
    )
    run.train()
    turns = [callback.turn(step) for step in range(8)]
    assert seen[True] == [name for name in turns for _ in range(2)]
    assert seen[False] and set(seen[False]) == {"dense"} and cocktail.active == "dense"
    assert any(not torch.equal(before[n], w) for n, w in cocktail.model.named_parameters())
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert not [k for k in load_file(folder / "model.safetensors") if "mask_bits" in k]
        loaded = Cocktail.load(folder / "cocktail.safetensors", convert(bert(), ["classifier"]))
        assert list(loaded.subnets) == list(cocktail.subnets)
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, cocktail.model.get_parameter(name)), name


def test_transformers_resume_goes_on_with_the_same_turns(tmp_path):
    framework("transformers", "accelerate")
    options = {"max_steps": 6, "save_steps": 3}
    whole = bert_menu()
    trainer(whole, tmp_path, callbacks.CocktailCallback(whole), **options).train()
    resumed = bert_menu()
    callback, seen = callbacks.CocktailCallback(resumed), watch(resumed)
    run = trainer(resumed, tmp_path, callback, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen[True] == [callback.turn(step) for step in range(3, 6)]
    for name, weight in resumed.model.named_parameters():
        assert torch.allclose(weight, whole.model.get_parameter(name), atol=1e-6), name


def lightning_module(cocktail, lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = cocktail.model

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)

    return Module()


def lightning_trainer(lightning, folder, callback, steps, **options):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore")  # of Lightning's own: workers, torch it does not know
def test_lightning(resnet, tmp_path):
    framework("pytorch_lightning")
    import pytorch_lightning as lightning

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
    callback = callbacks.LightningCallback(resnet, names=["channel-0.5", "2:4"], batches=BATCHES)
    seen, module = watch(resnet), lightning_module(resnet, lightning)
    pruned = []
    inner = callback.on_before_optimizer_step

    def note(*arguments):
        inner(*arguments)
        pruned.append((resnet.active, callback._held))

    callback.on_before_optimizer_step = note
    run = lightning_trainer(
        lightning, tmp_path, callback, 6, accumulate_grad_batches=2, val_check_interval=4
    )
    run.fit(module, loader, loader)
    turns = [callback.turn(step) for step in range(6)]
    assert [name for name, _ in pruned] == turns
    assert all(held == (name != "dense") for name, held in pruned)
    trained = seen[True][: 2 * len(turns)]
    assert trained == [name for name in turns for _ in range(2)]
    assert set(seen[False]) >= {"dense"} and resnet.active == "dense"
    assert all(resnet.subnets[name].statistics is not None for name in callback.names)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert not [key for key in state if key.endswith(("mask_bits", ".live"))]


@pytest.mark.filterwarnings("ignore")
def test_lightning_is_left_dense_after_an_error(resnet, tmp_path):
    framework("pytorch_lightning")
    import pytorch_lightning as lightning

    module = lightning_module(resnet, lightning)
    module.on_after_backward = lambda: 1 / 0 if resnet.active != "dense" else None
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
    callback = callbacks.LightningCallback(resnet, batches=BATCHES)
    with pytest.raises(ZeroDivisionError):
        lightning_trainer(lightning, tmp_path, callback, 4).fit(module, loader)
    assert resnet.active == "dense"
    assert not any(layer.masked for layer in masked_layers(resnet.model).values())


def test_import_brings_neither_framework_and_says_what_is_missing():
    program = """
import sys
for name in ("lightning", "pytorch_lightning"):
    sys.modules[name] = None  # not installed
from sparse_cocktail import callbacks
print([m for m in ("transformers", "accelerate") if m in sys.modules])
try:
    callbacks.LightningCallback
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "[]"
    assert "LightningCallback needs lightning.pytorch or pytorch_lightning" in second


def test_a_callback_can_be_copied(resnet, callback_of):
    callback = copy.deepcopy(callback_of(resnet, batches=BATCHES))
    assert callback.cocktail is not resnet and callback.turn(0) == "dense"
