"""Safetensors files whose bytes depend on their content only, and the strings in their headers.

Knows names and strings. Knows nothing of adapters, their keys, or how a file is loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.files import published_path

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


def read_header(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file; no tensor is read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def add_to_header(path: Path, strings: Mapping[str, str]) -> None:
    """Put more strings into the header of a file; its tensors and other strings stay as they are."""
    from safetensors.torch import load_file

    save_tensors(load_file(path), path, {**read_header(path), **strings})


def save_tensors(tensors: Tensors, path: Path, header: Mapping[str, str]) -> Path:
    """Publish a file: equal tensors and strings give equal bytes. A file of that name is replaced."""
    from safetensors.torch import save_file

    with published_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=dict(header))
        _sort_header(temporary)
    return path


def _sort_header(path: Path) -> None:
    """Sort the strings, which the library writes in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))  # the format allows spaces behind the header
