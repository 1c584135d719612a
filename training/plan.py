"""Everything that decides the trained weights, and how to run: what a training is started with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from data.files import write_json
from training.model.reference import ModelRef
from training.settings import Training, TrainingExecution

BEFORE: dict[str, Any] = {
    "text_encoders": False, "loss": "dpo", "label_smoothing": 0.0, "soft_labels": False, "sft_weight": 0.0,
    "margin_offset": 0.0, "margin_weights": False, "sdpo_mu": 0.9, "optimizer": "adamw", "schedule": "constant",
    "ema": 0.0, "noise_draws": 0, "refresh_reference": 0, "prompt_dropout": 0.0, "error_space": "prediction",
    "timestep_density": "logit-normal", "timestep_shift": 0.0, "guidance_input": 1.0, "heldout_share": 0.0,
    "heldout_every": 50, "device": "auto", "dtype": "auto", "mixed_precision": "no", "gradient_checkpointing": False,
    "compile": False, "offload_reference": False, "shard": False, "trackers": [], "version": "unknown",
}  # fmt: skip
"""What a file says that does not name a field: how it was before there was one."""
LORA = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_targets": "targets", "lora_dora": "dora"}
"""Fields of `Training` that a file holds together, as `lora`."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A training: what it starts from, on which pairs, with which settings, and where it goes.

    model: what the policy starts from. pairs: a sealed preference folder. output: where checkpoints, metrics and the
    trained model go. seed: everything random derives from it. version: of this code, for the record.
    """

    model: ModelRef
    pairs: str
    output: str
    seed: int
    training: Training
    execution: TrainingExecution
    version: str = "unknown"

    def to_dict(self) -> dict[str, Any]:
        """All values by name, in one flat table, as plan.json and the model card have them."""
        training = self.training.model_dump()
        lora = {short: training.pop(name) for name, short in LORA.items()}
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        del own["training"], own["execution"]
        return {**own, "model": asdict(self.model), **training, "lora": lora, **self.execution.model_dump()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingPlan":
        """The inverse of `to_dict`; of a file of an earlier version too, see `BEFORE`."""
        flat = {**BEFORE, **values}
        flat |= {name: flat["lora"][short] for name, short in LORA.items() if short in flat["lora"]}
        training = {name: flat[name] for name in Training.model_fields if name in flat}
        return cls(
            model=ModelRef.read(flat["model"]), pairs=flat["pairs"], output=flat["output"], seed=flat["seed"],
            version=flat["version"], training=Training(**{"lora_dora": False, **training}),
            execution=TrainingExecution(**{name: flat[name] for name in TrainingExecution.model_fields}),
        )  # fmt: skip

    def changed(self, **changes: Any) -> "TrainingPlan":
        """The same plan with other values, by their names in `to_dict`; model: a ModelRef."""
        own = {field.name: changes.pop(field.name) for field in fields(self) if field.name in changes}
        return replace(self.from_dict({**self.to_dict(), **changes}), **own)

    def write(self, path: Path) -> None:
        """As JSON, for `accelerate launch -m training`."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> "TrainingPlan":
        """What `write` wrote."""
        return cls.from_dict(json.loads(path.read_text()))
