"""Files: an old file survives every failed write, and a damaged file is refused by name."""

import errno
import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from sparse_cocktail.files import read_tensors, write_atomic, write_json, write_tensors

OLD = b"the old content"


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    return path


def assert_old_and_alone(path):
    assert path.read_bytes() == OLD
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a partial file is left"


# ---- atomic writes -------------------------------------------------------------------------------


def test_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    for content in (b"first", b"the second"):
        write_atomic(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_is_there_until_the_end(old):
    write_atomic(old, lambda file: file.write(old.read_bytes() + b" and more"))
    assert old.read_bytes() == OLD + b" and more"


def test_full_disk_keeps_the_old_file(old):
    def write(file):
        file.write(b"half of the n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        OSError, match="file.bin was not written .No space left.*unchanged"
    ) as error:
        write_atomic(old, write)
    assert error.value.errno == errno.ENOSPC
    assert_old_and_alone(old)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError], ids=str)
def test_any_interruption_keeps_the_old_file(old, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomic(old, write)
    assert_old_and_alone(old)


def test_failed_first_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(tmp_path / "new", _fail)
    assert list(tmp_path.iterdir()) == []


def _fail(file):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder was not written"):
        write_atomic(tmp_path / "folder", lambda file: file.write(b"x"))
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_content_is_synced_before_the_rename(old, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        log = lambda *a, name=name, real=real: calls.append(name) or real(*a)  # noqa: E731
        monkeypatch.setattr(os, name, log)
    write_atomic(old, lambda file: file.write(b"new"))
    assert calls == ["fsync", "replace", "fsync"], "file, rename, folder"


def run(program, *arguments):
    program = textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )


def test_real_file_size_limit_keeps_the_old_file(old):
    """The kernel itself refuses to write more, as on a full disk."""
    result = run(
        """
        import resource, sys
        import torch
        from sparse_cocktail.files import write_tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_tensors(sys.argv[1], {"w": torch.ones(100_000)}, {})
        except OSError as error:
            sys.exit(f"errno {error.errno}: {error}")
        """,
        old,
    )
    assert f"errno {errno.EFBIG}" in result.stderr, result.stderr
    assert "file.bin was not written" in result.stderr
    assert_old_and_alone(old)


def test_killed_writer_keeps_the_old_file(old):
    result = run(
        """
        import os, signal, sys
        from sparse_cocktail.files import write_atomic
        def write(file):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomic(sys.argv[1], write)
        """,
        old,
    )
    assert result.returncode == -9, result.stderr
    assert old.read_bytes() == OLD


# ---- JSON ----------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    value = {"format": 1, "rows": [1, 2.5, None, "ü"], "nested": {"ok": True}}
    write_json(tmp_path / "results.json", value)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]], ids=str)
def test_json_refuses_what_json_has_not(old, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(old, {"accuracy": value})
    assert_old_and_alone(old)


# ---- tensors -------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


def test_tensors_and_header_round_trip(tmp_path):
    path = tmp_path / "cocktail.safetensors"
    tensors = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in DTYPES}
    tensors |= {
        "bool": torch.rand(7) < 0.5,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "expanded": torch.randn(1, 5).expand(4, 5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "special": torch.tensor([math.nan, -math.inf, -0.0, 1e-45]),
    }
    tensors["shared"] = tensors["transposed"]
    header = {"format": "1", "config": '{"ü": [1, 2]}', "empty": ""}
    write_tensors(path, tensors, header)
    read, read_header = read_tensors(path)
    assert read_header == header
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].is_contiguous(), name
        torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(read["special"][2]), "-0.0 lost its sign"


def test_no_tensors_and_no_header(tmp_path):
    write_tensors(tmp_path / "empty", {}, {})
    assert read_tensors(tmp_path / "empty") == ({}, {})


def test_what_was_read_is_independent_of_the_file(tmp_path):
    path = tmp_path / "t"
    write_tensors(path, {"w": torch.zeros(1000)}, {})
    first, _ = read_tensors(path)
    write_tensors(path, {"w": torch.ones(1000)}, {})
    second, _ = read_tensors(path)
    second["w"].add_(5)
    assert not first["w"].any()
    assert (read_tensors(path)[0]["w"] == 1).all()


def whole_file(tmp_path):
    path = tmp_path / "whole"
    write_tensors(path, {"w": torch.randn(10, 10), "b": torch.randn(10)}, {"format": "1"})
    return path.read_bytes()


DAMAGE = {
    "empty": lambda data: b"",
    "length_cut": lambda data: data[:5],
    "header_only_length": lambda data: data[:8],
    "header_cut": lambda data: data[:40],
    "tensors_cut": lambda data: data[:-100],
    "one_byte_short": lambda data: data[:-1],
    "one_byte_more": lambda data: data + b"x",
    "garbage": lambda data: bytes(range(256)) * 4,
    "text": lambda data: b"accuracy: 93.1\n" * 20,
    "header_garbled": lambda data: data[:10] + b"\xff\xfe" + data[12:],
    "huge_header": lambda data: (2**60).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(whole_file(tmp_path)))
    with pytest.raises(ValueError, match=r"damaged.safetensors is no whole safetensors file"):
        read_tensors(path)


def test_pickled_checkpoints_are_refused(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt is no whole safetensors file"):
        read_tensors(tmp_path / "model.pt")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist or is no file"):
        read_tensors(tmp_path / "nowhere")


def test_failed_tensors_keep_the_old_file(old):
    with pytest.raises(TypeError):
        write_tensors(old, {"w": torch.zeros(3)}, {"format": object()})
    assert_old_and_alone(old)
