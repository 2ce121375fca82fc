"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_cocktail import NMConv2d, models, ops, prune_
from sparse_cocktail.data import Data, Split
from sparse_cocktail.methods import METHODS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def given(block: str) -> dict:
    """What the README's words around the block take for granted."""
    x, y = torch.randn(96, 1, 8, 8), torch.arange(96) % 10
    weight = torch.randn(16, 512)
    names = {
        "my_model": models.build("resnet8", {"width": 16}),
        "data": Data("mine", 10, Split(x, y), Split(x, y), Split(x, y)),
        "loader": [(x[:48], y[:48]), (x[48:], y[48:])],
        "batches": [x[:48], x[48:]],
        "loss_function": nn.CrossEntropyLoss(),
        "weights": [torch.randn(1000, 1000), torch.randn(800, 1000)],
        "weight": weight,
        "nm": ops.nm_mask(weight, 2, 4),
        "model": prune_(models.build("resnet8"), "2:4"),
        "images": x,
        "labels": y,
        "x": x,
        "y": y,
        **{f"{n}_{part}": v for part in ("holdout", "test") for n, v in (("x", x), ("y", y))},
    }
    if "MaskedLinear" in block or "ops." in block:
        names["x"] = torch.randn(3, 512)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("\n")[-2].split("  #")[0][:40])
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given(block)
    monkeypatch.setitem(METHODS, "one-shot", None)  # taken out again afterwards
    exec(compile(block, "README.md", "exec"), names)
    if "small" in names:
        assert {type(m) for m in names["small"].modules()} >= {NMConv2d, nn.BatchNorm2d}
        assert (tmp_path / "menu.safetensors").stat().st_size > 1000
    if "results" in names:
        assert len(names["results"]["subnets"]) == (2 if "OneShot" in block else 24)
    if "bits" in names:
        assert sum(int(names["ops"].mask_count(b)) for b in names["bits"]) == 1_000_000


def test_there_are_blocks_for_every_user():
    assert len(BLOCKS) == 8
