"""Files on a disk that is full: written whole or not at all, and every error is an `OSError`."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from downpour.paramserver import durable
from tests.helpers.small_files import files_of_at_most


def test_tensors_that_do_not_fit_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    small, large = {"a": torch.ones(3)}, {"a": torch.zeros(100_000)}
    durable.save_tensors(small, path, metadata={"about": "small"})
    with files_of_at_most(4096), pytest.raises(OSError, match=r"weights\.safetensors") as caught:
        durable.save_tensors(large, path)
    assert caught.value.strerror
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(safetensors.torch.load_file(path)["a"], small["a"])


def test_what_is_added_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    durable.append(path, b"first\n")
    with files_of_at_most(10), pytest.raises(OSError, match=r"\w"):
        durable.append(path, b"second, which is longer\n")
    assert path.read_bytes() == b"first\n"
    durable.append(path, b"third\n")
    durable.append(path, b"other\n", end=6)
    assert path.read_bytes() == b"first\nother\n"
