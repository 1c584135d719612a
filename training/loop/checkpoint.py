"""Training state on disk: resumable checkpoints, and the record of the finished model.

A folder that is visible under its final name is complete: it is written beside and renamed.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.files import publish_folder, write_json
from training.model.reference import ModelRef

RECORD = "checkpoint.json"


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A finished training run. model: what to load. beta and kappa: see `training.loss.errors.kappa_of`.

    sha256: see `weights_sha256`. pairs: trainable pairs. metrics: means over the last tenth of the run. loss: its name
    in `training.loss.table.LOSSES`. warnings: what `training.loop.diagnostics.Watch` found on the way.
    """

    model: ModelRef
    method: str
    steps: int
    pairs: int
    beta: float
    kappa: float
    sha256: str
    metrics: dict[str, float]
    loss: str = "dpo"
    warnings: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "CheckpointRecord | None":
        """None when the run is not finished: the record is written last."""
        path = folder / RECORD
        if not path.is_file():
            return None
        fields = json.loads(path.read_text())
        return cls(**{**fields, "model": ModelRef.read(fields["model"])})


def save_state(folder: Path, step: int, tensors: dict[str, Tensors], optimizer: dict[str, Any], keep: int) -> None:
    """Checkpoint after `step` optimizer steps; all but the newest `keep` are removed. tensors: a file each."""
    from safetensors.torch import save_file

    def write(target: Path) -> None:
        for file, named in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, target / f"{file}.safetensors")
        torch.save(optimizer, target / "optimizer.pt")

    publish_folder(folder / f"checkpoint-{step:06d}", write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-[0-9]*"))


class State(NamedTuple):
    """A checkpoint: steps done, tensors by the file that they were given to, the optimizer's state."""

    step: int
    tensors: dict[str, Tensors]
    optimizer: dict[str, Any]


def load_state(folder: Path, limit: int) -> State | None:
    """The newest checkpoint of at most `limit` steps, or None. Unpickles tensors only."""
    from safetensors.torch import load_file

    found = [path for path in checkpoints(folder) if int(path.name.split("-")[1]) <= limit]
    if not found:
        return None
    newest = found[-1]
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True, map_location="cpu")
    tensors = {file.stem: load_file(file) for file in newest.glob("*.safetensors")}
    return State(int(newest.name.split("-")[1]), tensors, optimizer)


def weights_sha256(*paths: Path) -> str:
    """Hex digest over the names, types and values of a model's safetensors files.

    Not over their bytes: the library writes the header's metadata in an order that changes from run to run.
    """
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in (item for path in paths for item in sorted(load_file(path).items())):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
