"""What a weights file says about the training that made it, in its own header."""

from pathlib import Path
from typing import TYPE_CHECKING

from data.manifest import read_manifest
from training.model.reference import ModelRef

if TYPE_CHECKING:
    pass


def training_metadata(
    *, model: ModelRef, loss: str, beta: float, kappa: float, steps: int, pairs: Path, version: str
) -> dict[str, str]:
    """How the weights came to be, for the header of their file.

    model: what training started from. pairs: the sealed preference folder. version: of this project.
    kappa: see `training.loss.errors.kappa_of`. Raises ShardError where `pairs` is not sealed.
    """
    known: dict[str, object] = {
        "base_model": Path(model.base).name if Path(model.base).is_absolute() else model.base,
        "base_revision": model.revision, "loss": loss, "beta": beta, "kappa": kappa, "steps": steps,
        "pairs": read_manifest(pairs).dataset_id, "version": version,
    }  # fmt: skip
    # Other programs look for bare names: diffusers takes a header's `alpha` for the scale of some models' adapters.
    return {"format": "pt"} | {f"rlaif.{name}": str(value) for name, value in known.items() if value is not None}
