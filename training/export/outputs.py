"""What a finished training hands over, beside its weights: a copy under kohya's keys and the model card.

<training>/adapter/ or unet/         the weights, as the trainer left them
           kohya/lora.safetensors    the LoRA for ComfyUI, A1111 and Forge
           README.md                 the card; card.json: what it is made of besides checkpoint.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import write_json, write_text
from training.export.kohya import Base, write_kohya
from training.export.model_card import KOHYA_FILE, model_card, provenance
from training.loop.checkpoint import RECORD
from training.model.families import family_for
from training.model.reference import ModelError
from training.plan import TrainingPlan
from training.trained import trained_adapter, trained_model

CARD = "card.json"


def write_outputs(
    training: Path, plan: TrainingPlan, pairs: Path, evaluation: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write all of it for a finished training; what is there is replaced. Returns the files.

    pairs: the sealed preference folder. evaluation: `results.json`; called
    again with it once there is one. A family without known kohya keys gets none.
    """
    written = _kohya(training)
    write_json(training / CARD, {"plan": plan.to_dict(), "data": provenance(pairs), "evaluation": evaluation})
    write_text(training / "README.md", card_of(training))
    return [*written, training / CARD, training / "README.md"]


def _kohya(training: Path) -> list[Path]:
    model = trained_model(training)
    if model.adapter is None or family_for(model).kohya is None:
        return []
    adapter, _ = trained_adapter(training)
    title = f"{Path(model.base).name}, tuned from AI feedback"
    return [write_kohya(adapter, training / KOHYA_FILE, Base.read(model.base, model.revision), title)]


def card_of(training: Path, repo_id: str | None = None) -> str:
    """The model card, as it reads in its folder or once published as `repo_id`.

    Raises ModelError where `write_outputs` has not been.
    """
    if not (training / CARD).is_file():
        raise ModelError(f"{training}: no {CARD}; give the folder of a finished training whose card has been written")
    record, known = (json.loads((training / name).read_text()) for name in (RECORD, CARD))
    kohya = (training / KOHYA_FILE).is_file()
    return model_card(record, known["plan"], known["data"], known["evaluation"], repo_id, kohya)
