"""Makes a safetensors file of a torch checkpoint: python -m scoring.convert IN.pt OUT.safetensors

A torch checkpoint is a pickle, which only has to be trusted to hold tensors; a safetensors file cannot hold
anything else, loads without a copy, and says in its header which file it came from. The scorers take the result
in place of the checkpoint, under the same name with the suffix .safetensors. Importing this module does not load
torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.commands import ends_with, run
from data.files import file_sha256
from data.safetensors_file import save_tensors
from scoring.scorers.checkpoints import load_weights
from scoring.scorers.scorer import ScoringError

if TYPE_CHECKING:
    import torch

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Conversion:
    """What came out of a conversion; digests are sha256 in hex over whole files."""

    tensors: int
    source_digest: str
    target_digest: str


def convert(
    source: Path, target: Path, repository: str | None = None, revision: str | None = None, force: bool = False
) -> Conversion:
    """Writes the tensors of a checkpoint, bit by bit, as a safetensors file.

    `source`: .pt, .pth, .bin or .ckpt, also one nested under "state_dict"; of such a one only that part is kept.
    `repository`, `revision`: where the checkpoint was published, its commit in 40 hex digits. They go into the
    metadata with the name and the sha256 of the source; that of the target cannot be in the target itself.
    `force`: whether a target that exists is replaced. The target appears whole or not at all.
    Raises ScoringError for a source that is damaged or holds more than tensors (nothing in it is run), ValueError
    for a wrong argument, FileExistsError, and FileNotFoundError.
    """
    _check(source, target, revision, force)
    digest = file_sha256(source)
    weights = _separated(load_weights(source))
    facts = {"source_file": source.name, "source_sha256": digest, "repository": repository, "revision": revision}
    save_tensors(weights, target, {"format": "pt", **{name: value for name, value in facts.items() if value}})
    return Conversion(len(weights), digest, file_sha256(target))


def _check(source: Path, target: Path, revision: str | None, force: bool) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    if source.suffix == ".safetensors" or target.suffix != ".safetensors":
        raise ValueError(f"need a torch checkpoint and a name that ends in .safetensors, got {source} and {target}")
    if revision is not None and not COMMIT.fullmatch(revision):
        raise ValueError(f"revision must be a commit of 40 hex digits, got {revision!r}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; --force replaces it")


def _separated(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, none of which shares memory with another: safetensors refuses to write such."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        memory = tensor.untyped_storage()
        whole = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and memory.data_ptr() not in seen
        result[name] = tensor if whole else tensor.clone(memory_format=_contiguous())
        seen.add(memory.data_ptr())
    return result


def _contiguous() -> torch.memory_format:
    import torch

    return torch.contiguous_format


@ends_with(ScoringError, ValueError, OSError)
def command(
    source: Annotated[Path, typer.Argument(metavar="IN.pt", help="The checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    repository: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Where it was published.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="SHA", help="Its commit there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a target that exists.")] = False,
) -> None:
    """Write the tensors of a torch checkpoint as a safetensors file, and print the sha256 of both."""
    done = convert(source, target, repository, revision, force)
    print(f"{done.source_digest}  {source}\n{done.target_digest}  {target}")
    print(f"{done.tensors} tensors", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m scoring.convert", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
