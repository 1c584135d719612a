"""What a finished training left behind: which weights, on which base. Reads records; loads no weights."""

import dataclasses
from pathlib import Path

from training.loop.checkpoint import RECORD, CheckpointRecord
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef


def finished_model(source: Path, base: str | None = None) -> ModelRef:
    """The model that a training folder, or the adapter or network folder in it, stands for.

    The weights are those that lie there, wherever they were when the record was written. base: instead of the one in
    the record, and needed for an adapter without one. Raises ModelError with the way out.
    """
    folder = source if (source / RECORD).is_file() else source.parent
    record = CheckpointRecord.read(folder)
    if record is None and not (base and (source / ADAPTER_FILE).is_file()):
        raise ModelError(
            f"{source}: neither it nor the folder above has a {RECORD}; give the folder of a finished training, or a "
            f"folder with {ADAPTER_FILE} and its base model (--base)"
        )
    if record is None:
        return ModelRef(str(base), adapter=str(source))
    model = record.model
    if base:
        model = dataclasses.replace(model, base=base, revision=None)
    return _as_it_lies(model, folder)


def _as_it_lies(model: ModelRef, folder: Path) -> ModelRef:
    """The record's paths, with those of the training itself replaced by where the folder is now."""
    for name in ("adapter", "network"):
        value = getattr(model, name)
        here = folder / Path(value).name if value else None
        if here is not None and here.is_dir():
            model = dataclasses.replace(model, **{name: str(here)})
    return model


def finished_adapter(source: Path, base: str | None = None) -> tuple[Path, ModelRef]:
    """The weights file of a LoRA and the model that it belongs to. Raises ModelError where none was trained."""
    model = finished_model(source, base)
    if model.adapter is None:
        raise ModelError(f"{source}: a full training has no LoRA; use `python -m training.merge` for a whole pipeline")
    return Path(model.adapter) / ADAPTER_FILE, model
