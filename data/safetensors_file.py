"""Safetensors files whose bytes depend on their content only, and what a LoRA file says about its training.

Knows names and strings. Knows nothing of adapters, their keys, or how a file is loaded.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.files import fsync_path

if TYPE_CHECKING:
    import torch


Tensors = dict[str, "torch.Tensor"]


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Put more strings into the header of a file; its tensors and other strings stay as they are."""
    from safetensors.torch import load_file

    save_tensors(load_file(path), path, {**read_metadata(path), **metadata})


def save_tensors(tensors: Tensors, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write beside, flush, rename: equal tensors and strings give equal bytes. A file of that name is replaced."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, hidden, dict(metadata))
        _sort_metadata(hidden)
        fsync_path(hidden)
        os.replace(hidden, path)
        fsync_path(path.parent)
    finally:
        hidden.unlink(missing_ok=True)
    return path


def _sort_metadata(path: Path) -> None:
    """The library writes these strings in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))  # the format allows spaces behind the header
