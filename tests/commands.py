"""`sparse-cocktail ...` within the process of a test, and short runs of the benchmarks."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from sparse_cocktail import cli
from sparse_cocktail.cli.base import console


def call(*arguments) -> tuple[int, str, str]:
    """Exit code, standard output and error of one command, on a wide screen."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["sparse-cocktail", *map(str, arguments)])
        patch.setattr(console, "width", 300)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code or 0, out.getvalue(), error.getvalue()


def assert_refused(message: str, *arguments) -> None:
    """The command fails with one line that has the message."""
    code, _, error = call(*arguments)
    assert code == 2 and message in error and error.count("\n") == 1, error


def short_bench(factory, bench: str, *options) -> tuple:
    """The folder, result and output of a short run of a benchmark on one thread."""
    folder, threads = factory.mktemp("bench"), torch.get_num_threads()
    given = ("--quick", "--threads", 1, "--out", folder, *options)
    code, said, error = call("bench", bench, *given)
    torch.set_num_threads(threads)
    assert code == 0, said + error
    return folder, json.loads((folder / "cpu.json").read_text()), said
