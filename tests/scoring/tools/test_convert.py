"""Conversion of torch checkpoints: bit by bit, whole or not at all, and never running anything."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scoring.scorers.hpsv2 import HPSv2
from scoring.scorers.scorer import ScoringError
from scoring.tools import convert as module
from scoring.tools.convert import convert, main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _state() -> dict[str, torch.Tensor]:
    """Tensors of several kinds, with the values whose bits are easily lost."""
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42, 1 / 3])
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "odd": odd, "half": odd.half(), "brain": odd.bfloat16(), "double": odd.double() / 7,
        "whole": torch.arange(5), "bool": torch.tensor([True, False]), "scalar": torch.tensor(4.6052),
        "base": base, "tied": base, "view": base[1:], "transposed": base.t(), "empty": torch.zeros(0, 3),
    }  # fmt: skip


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _check_equal(path: Path, state: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert _bits(found[name]) == _bits(tensor), name


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_values_are_equal_to_the_bit(nested: bool, zipped: bool, tmp_path: Path) -> None:
    """Also out of the format before torch 1.6, and nested under "state_dict" beside other plain things."""
    checkpoint = {"epoch": 3, "name": "x", "state_dict": _state()} if nested else _state()
    torch.save(checkpoint, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    done = convert(tmp_path / "in.pt", tmp_path / "new" / "out.safetensors")
    _check_equal(tmp_path / "new" / "out.safetensors", _state())
    assert done.tensors == len(_state())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.safetensors"]


def test_the_published_checkpoint_of_hpsv2_converts(
    hpsv2_state: dict, hpsv2_folder: Path, tmp_path: Path, images: list[np.ndarray]
) -> None:
    """Nested as it was published, under its published name; the scorer takes either file and scores the same."""
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
        (folder / "open_clip_config.json").write_text((hpsv2_folder / "open_clip_config.json").read_text())
    torch.save({"epoch": 1, "state_dict": hpsv2_state}, before / "open_clip_model.pt")
    convert(before / "open_clip_model.pt", after / "open_clip_model.safetensors")
    captions = ["a red circle"] * 3
    one, other = (HPSv2(str(folder)).score(images[:3], captions) for folder in (before, after))
    np.testing.assert_array_equal(one, other)


def test_digests_and_origin_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(_state(), source)
    assert main([str(source), str(target), "--repository", "owner/name", "--revision", COMMIT]) == 0
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, target)]
    assert capsys.readouterr().out == f"{digests[0]}  {source}\n{digests[1]}  {target}\n"
    with safe_open(target, "pt") as file:
        assert file.metadata() == {
            "format": "pt", "repository": "owner/name", "revision": COMMIT, "source_file": "in.pt",
            "source_sha256": digests[0],
        }  # fmt: skip


def test_equal_conversions_are_equal_files(tmp_path: Path) -> None:
    """safetensors alone writes the metadata in another order each time."""
    torch.save(_state(), tmp_path / "in.pt")
    for i in range(6):
        convert(tmp_path / "in.pt", tmp_path / f"{i}.safetensors", 'owner/n\u00e4me "x"', COMMIT)
        _check_equal(tmp_path / f"{i}.safetensors", _state())
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)}) == 1


def test_a_poisoned_file_is_refused_and_nothing_runs(bomb: type, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i, zipped in enumerate((True, False)):
        source, ran = tmp_path / f"{i}.pt", tmp_path / "ran"
        torch.save({"state_dict": _state(), "extra": bomb(ran)}, source, _use_new_zipfile_serialization=zipped)
        assert main([str(source), str(tmp_path / "out.safetensors")]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {source}: not a checkpoint of plain tensors; refused")
        assert "save the tensors of its state dict alone" in message and "scoring.convert" in message
        assert not ran.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]
    torch.load(source, weights_only=False)
    assert ran.exists()  # so it was poison


def test_an_existing_target_is_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(_state(), source)
    target.write_text("precious")
    assert main([str(source), str(target)]) == 2
    assert capsys.readouterr().err == f"error: {target} exists; --force replaces it\n"
    assert target.read_text() == "precious"
    assert main([str(source), str(target), "--force"]) == 0
    _check_equal(target, _state())


@pytest.mark.parametrize("crash", ["save_file", "replace"])
def test_a_failure_leaves_no_half_of_a_file(crash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the disk is full or the rename fails: what was there stays, and nothing is left beside it."""
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(_state(), source)
    target.write_text("precious")

    def failing(weights: object, path: object, **_: object) -> None:
        Path(str(path)).write_text("half")
        raise OSError("disk full")

    def refused(source: Path, target: Path) -> None:
        raise OSError("disk full")

    if crash == "save_file":
        monkeypatch.setattr("safetensors.torch.save_file", failing)
    else:
        monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="disk full"):
        convert(source, target, force=True)
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.safetensors"]


def test_the_data_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    torch.save(_state(), tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert events == ["fsync", "rename", "fsync"]


def test_wrong_arguments(tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    with pytest.raises(FileNotFoundError, match=f"no file {source}"):
        convert(source, tmp_path / "out.safetensors")
    torch.save({"a": 3}, source)
    with pytest.raises(ScoringError, match="holds no state dict of tensors"):
        convert(source, tmp_path / "out.safetensors")
    source.write_bytes(b"damaged" * 100)
    with pytest.raises(ScoringError, match=str(source)):
        convert(source, tmp_path / "out.safetensors")
    torch.save(_state(), source)
    with pytest.raises(ValueError, match=r"a name that ends in \.safetensors, got .*out\.pt"):
        convert(source, tmp_path / "out.pt")
    for revision in ("main", COMMIT[:-1], COMMIT.upper()):
        with pytest.raises(ValueError, match=f"revision must be a commit of 40 hex digits, got '{revision}'"):
            convert(source, tmp_path / "out.safetensors", revision=revision)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_the_command_line(tmp_path: Path) -> None:
    """As a user types it; help needs no torch."""
    root = Path(module.__file__).parents[2]
    torch.save(_state(), tmp_path / "in.pt")
    command = [
        sys.executable,
        "-m",
        "scoring.tools.convert",
        str(tmp_path / "in.pt"),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"{len(_state())} tensors\n")
    code = "import sys, scoring.tools.convert, json; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
