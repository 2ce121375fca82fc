"""Recipes and fields: defaults, conversion, and errors that say what to write instead."""

import pytest
import torch
from test_engine import run

from sparse_cocktail import models
from sparse_cocktail.config import for_method, read_recipe, recipe_names, split_fields
from sparse_cocktail.methods import METHODS


def test_every_recipe_is_valid():
    assert "digits" in recipe_names()
    for name in recipe_names():
        recipe = read_recipe(name)
        for method in {recipe["method"], *recipe.get("methods", {})}:
            config, options = split_fields(for_method(recipe, method))
            assert config.method == method
            assert METHODS[method].cost(options, config.epochs) >= config.epochs
            with torch.device("meta"):
                models.build(config.model, config.model_args)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"epocs": 3}, r"field 'epocs' is unknown; did you mean epochs\?"),
        ({"epochs": "many"}, r"epochs='many' is a str, but the field is a int"),
        ({"epochs": 0}, r"epochs=0 is below 1"),
        ({"lr": -1.0}, r"lr=-1.0 is not positive"),
        ({"precision": "fp8"}, r"precision='fp8' is not one of fp32, bf16, fp16"),
        ({"method": "magic"}, r"method='magic' is not one of cocktail"),
        ({"optimizer": "adam"}, r"optimizer='adam' is not one of sgd, adamw"),
        ({"optimizer": "adamw", "beta2": 1.0}, r"beta2=1.0 is not in \[0, 1\)"),
        ({"optimizer": "adamw", "nesterov": True}, r"nesterov=True belongs to optimizer=sgd"),
        ({"mixup": -0.1}, r"mixup=-0.1 is negative"),
        ({"mask_only": "(encoder"}, r"mask_only='\(encoder' is no regular expression"),
        (
            {"sharpness": 3, "method": "rigl"},
            r"sharpness is a field of spartan, not of rigl; fields of rigl: .*end, allocation$",
        ),
        ({"zzz": 3}, r"field 'zzz' is unknown; .*--help' shows all; fields of cocktail: stages, "),
        ({"method": "gmp", "patterns": 124}, r"patterns=124 is a int, .* is a str; quote .*'2:4'"),
        ({"method": "gmp", "patterns": ["2:4", 1]}, r"patterns=\['2:4', 1\] is a list"),
        ({"nesterov": 1}, r"nesterov=1 is a int, but the field is a bool"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        split_fields(fields)


def test_fields_from_strings():
    config, options = split_fields(
        {"epochs": "3", "lr": "1e-2", "first_cycle": "4", "nm": '{"2:4": 1}', "compile": "true"}
    )
    assert (config.epochs, config.lr, config.compile) == (3, 0.01, True)
    assert options.first_cycle == 4 and isinstance(options.first_cycle, int)
    assert options.nm == {"2:4": 1}


def test_texts_with_commas_from_lists(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("method: gmp\npatterns: ['2:4', unstructured-0.9]")
    for fields in (read_recipe(path), {"method": "gmp", "patterns": ("2:4", "unstructured-0.9")}):
        _, options = split_fields(fields)
        assert options.patterns == "2:4,unstructured-0.9"
        assert [str(pattern) for pattern in options.menu()] == ["2:4", "unstructured-0.9000"]


@pytest.mark.parametrize("recipe", ["nothing", "missing.yaml"])
def test_unknown_recipe(recipe):
    with pytest.raises(ValueError, match=rf"recipe '{recipe}' is neither one of .*digits"):
        read_recipe(recipe)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stages": 0}, r"stages=0 is below 1"),
        ({"rewind": 2}, r"rewind=2 is not in \[0, epochs=1\]"),
        ({"nm": {"channel-0.5": 1}}, r"nm has 'channel-0.5', which is no N:M pattern"),
        ({"nm": {"4:2": 1}}, r"n=4, m=2 breaks 1 <= n < m <= 32"),
        ({"batch_size": 4096}, r"batch_size=4096 .* is more than the 224 training samples"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_cocktail_options(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **fields)


def test_a_refused_run_leaves_the_folder_alone(tmp_path):
    run(tmp_path / "run")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    for fields in ({"rewind": 9}, {"batch_size": 4096}, {"nm": {"3:1": 1}}):
        with pytest.raises(ValueError):
            run(tmp_path / "run", overwrite=True, **fields)
        with pytest.raises(ValueError):
            run(tmp_path / "new", **fields)
    assert before == {p: p.read_bytes() for p in before}
    assert not (tmp_path / "new").exists()
