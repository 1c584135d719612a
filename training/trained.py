"""What a finished training left behind: which weights, on which base. Reads records; loads no weights."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from training.loop.checkpoint import RECORD, CheckpointRecord
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef


@dataclass(frozen=True)
class TrainedModel:
    """The model in the folder of a finished training, wherever the folder lies now."""

    folder: Path
    record: CheckpointRecord

    @classmethod
    def read(cls, folder: Path) -> "TrainedModel | None":
        """The model of a training's folder, None when the training is not finished."""
        record = CheckpointRecord.read(folder)
        return None if record is None else cls(folder, record)

    @property
    def weights(self) -> Path:
        """The folder of the weights that were trained."""
        return self.folder / ("adapter" if self.record.method == "lora" else Path(str(self.record.model.network)).name)

    def on(self, start: ModelRef, weights: Path | None = None) -> ModelRef:
        """The model that these weights make of the one that training started from.

        weights: how the weights' folder is to be named, None = by its full path.
        """
        made = str(weights or self.weights)
        if self.record.method == "full":
            return dataclasses.replace(start, network=made, adapter=None)
        return dataclasses.replace(start, adapter=made)

    def model(self) -> ModelRef:
        """The whole model, the base as the record names it."""
        return self.on(self.record.model)

    def label(self, base: str) -> str:
        """The model's name in shards. base: the base model as parameters name it."""
        return f"{base}+{self.record.sha256[:12]}"


def trained_model(source: Path, base: str | None = None) -> ModelRef:
    """The model that a training folder, or the adapter or network folder in it, stands for.

    base: instead of the one in the record, and needed for an adapter without one. Raises ModelError with the way out.
    """
    trained = TrainedModel.read(source if (source / RECORD).is_file() else source.parent)
    if trained is not None:
        model = trained.model()
        return dataclasses.replace(model, base=base, revision=None) if base else model
    if base and (source / ADAPTER_FILE).is_file():
        return ModelRef(base, adapter=str(source))
    raise ModelError(
        f"{source}: neither it nor the folder above has a {RECORD}; give the folder of a finished training, or a "
        f"folder with {ADAPTER_FILE} and its base model (--base)"
    )


def trained_adapter(source: Path, base: str | None = None) -> tuple[Path, ModelRef]:
    """The weights file of a LoRA and the model that it belongs to. Raises ModelError where none was trained."""
    model = trained_model(source, base)
    if model.adapter is None:
        raise ModelError(f"{source}: a full training has no LoRA; use `python -m training.merge` for a whole pipeline")
    return Path(model.adapter) / ADAPTER_FILE, model
