"""Recipe fields of a menu and its learning rate: what is refused, and that it says why."""

import pytest
from test_engine import MODEL, toy

from sparse_cocktail.engine import train
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.menu import ScheduleOptions

FIELDS = {"epochs": 1, "threads": 1, "recalibrate_samples": 64, **MODEL}


def refused(folder, method: str, message: str, **fields) -> None:
    with pytest.raises(ValueError, match=message):
        train("resnet8", toy(), folder, method=method, **{**FIELDS, **fields})
    assert not list(folder.iterdir())


@pytest.mark.parametrize("method", ["acdc", "gmp", "ast"])
def test_a_pattern_that_no_layer_can_take_is_refused(tmp_path, method):
    """Its network would be dense under a sparse name."""
    message = f"{method}: no masked layer of resnet8 can take 1:32 .*in=4 is not a multiple of 32"
    refused(tmp_path, method, message, patterns="2:4,1:32")


def test_channels_of_the_output_layer_alone_are_no_menu(tmp_path):
    fields = {"mask_linear": True, "mask_only": "fc", "patterns": "channel-0.5"}
    refused(tmp_path, "gmp", "gmp: no masked layer .* its channels are the outputs", **fields)


def test_layers_that_stay_dense_are_logged(tmp_path):
    """Of some patterns only: the third convolution of a small network and so on are left out."""
    train("resnet8", toy(), tmp_path, method="gmp", patterns="1:8", batch_size=32, **FIELDS)
    log = (tmp_path / "log.jsonl").read_text()
    assert '"left_dense"' in log and "in=4 is not a multiple of 8" in log


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_lr": 0.3}, r"min_lr=0.3 is above lr=0.2.*; lower min_lr or raise lr"),
        ({"lr_schedule": "steps", "milestones": "30,60,90"}, r"milestones='30,60,90' has 30,"),
        ({"lr_schedule": "steps", "milestones": "0.5,1"}, r"milestones='0.5,1' has 1, .*0.5,0.75"),
        ({"lr_schedule": "steps", "milestones": "0"}, r"milestones='0' has 0, which is no share"),
        ({"lr_schedule": "steps", "milestones": "nan"}, r"milestones='nan' has nan, which is no"),
    ],
    ids=["min_lr", "epochs", "end", "start", "nan"],
)
def test_schedules_that_would_not_fall(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleOptions(**fields).learning_rate(0.2, 100)


def test_schedules_up_to_their_limits():
    assert ScheduleOptions(min_lr=0.2).learning_rate(0.2, 100)(50) == 0.2
    fields = {"lr_schedule": "steps", "milestones": "0.01,0.99"}
    steps = ScheduleOptions(**fields).learning_rate(1.0, 100)
    assert [round(steps(k), 3) for k in (0, 1, 98, 99)] == [1, 0.1, 0.1, 0.01]


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (
            "rigl",
            {"patterns": "2:4"},
            "^rigl: 2:4 cannot be trained; the method takes unstructured patterns, such as "
            r"unstructured-0.9. Methods for N:M: ast, acdc, gmp$",
        ),
        ("set", {"patterns": "block-4x4-0.5"}, "^set: .* Methods for block: spartan, acdc, gmp$"),
        ("mutualnet", {"ladder": "n:m"}, "^mutualnet: 1:2 .* channel patterns, such as channel-0."),
        ("ast", {"patterns": "block-4x4-0.5"}, "^ast: .* takes unstructured, channel and N:M "),
        ("ast", {"stages": 0}, "^ast: stages=0 is below 1; 10 is"),
        ("acdc", {"patterns": "2:4,2:4"}, "^acdc: .*2:4.* a name twice .*; name each once"),
        ("gmp", {"patterns": "dense"}, "^gmp: .*has dense.*without dense"),
    ],
)
def test_messages_name_the_method(method, fields, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method].Options(**fields).menu()
