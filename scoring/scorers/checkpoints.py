"""Reads tensors out of a safetensors file or a torch checkpoint, and never anything else.

A torch checkpoint is a pickle, and unpickling can run code; torch is told to accept plain tensors only, always.
Importing this module does not load torch.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.scorers.scorer import ScoringError

if TYPE_CHECKING:
    import torch


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor from a safetensors file or a torch checkpoint, also one nested under "state_dict".

    Memory-mapped where the format allows it. Raises ScoringError for a damaged file, and for a checkpoint that
    holds anything but plain data: unpickling such a file runs its code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return _state_dict(_unpickled(path), path)
    except (SafetensorError, RuntimeError, EOFError) as error:
        if isinstance(error, ScoringError):
            raise
        raise ScoringError(f"{path}: does not load: {error}") from error


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor, without reading the others where the format allows it. Raises ScoringError as `load_weights`."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        weights = load_weights(path)
        if name not in weights:
            raise ScoringError(f"{path}: holds no tensor {name!r}")
        return weights[name]
    try:
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except SafetensorError as error:
        raise ScoringError(f"{path}: does not load: {error}") from error


def _unpickled(path: Path) -> Any:
    import zipfile

    import torch

    try:
        # Only zip checkpoints can be mapped; without the mapping a ViT-H needs its 4 GB of memory twice.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ScoringError(
            f"{path}: not a checkpoint of plain tensors; refused, as loading it could run code. Someone who trusts "
            "the file has to load it on an isolated machine and to save the tensors of its state dict alone; "
            f"`python -m scoring.convert IN.pt OUT.safetensors` takes that, but not this file. ({error})"
        ) from error


def _state_dict(checkpoint: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ScoringError(
            f"{path}: holds no state dict of tensors, neither by itself nor under 'state_dict'; save one alone, "
            "then `python -m scoring.convert IN.pt OUT.safetensors` turns it into a safetensors file"
        )
    return dict(state)
