"""Safetensors files: bytes depend on the content alone, and nobody sees half a file."""

import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data.safetensors_file import add_to_header, read_header, save_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([float("nan"), -0.0]).half(), "e": torch.zeros(0)}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=40, deadline=None)
@given(header=st.dictionaries(TEXT, TEXT, max_size=6), seed=st.integers(0, 99))
def test_equal_tensors_and_strings_are_equal_bytes(header: dict[str, str], seed: int) -> None:
    """In whatever order they come; the library alone writes strings in another order each time."""
    tensors, strings = list(TENSORS.items()), list(header.items())
    random.Random(seed).shuffle(tensors)
    random.Random(seed).shuffle(strings)
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "one.safetensors", Path(folder) / "new" / "other.safetensors"
        assert save_tensors(TENSORS, one, header) == one
        save_tensors(dict(tensors), other, dict(strings))
        assert one.read_bytes() == other.read_bytes() and read_header(one) == header
        for name, tensor in load_file(one).items():
            assert torch.equal(tensor.nan_to_num(7), TENSORS[name].nan_to_num(7))


def test_more_strings_leave_tensors_and_other_strings_alone(tmp_path: Path) -> None:
    path = save_tensors(TENSORS, tmp_path / "a.safetensors", {"x": "1", "y": "2"})
    add_to_header(path, {"y": "3", "z": "4"})
    assert read_header(path) == {"x": "1", "y": "3", "z": "4"} and load_file(path).keys() == TENSORS.keys()
    assert path.read_bytes() == save_tensors(TENSORS, tmp_path / "b.safetensors", read_header(path)).read_bytes()


def test_a_failing_library_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    path = save_tensors(TENSORS, tmp_path / "a.safetensors", {})
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("safetensors.torch.save_file", fail)
        save_tensors({}, path, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
