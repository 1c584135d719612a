"""Everything that decides the trained weights, and how to run: what a training is started with."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data.files import write_json
from training.adapter.lora import Lora
from training.model.noise import Density, ErrorSpace
from training.model.reference import ModelRef

Method = Literal["lora", "full"]


@dataclass(frozen=True)
class TrainingPlan:
    """A training run. The fields up to `seed` and the losses' options decide the result; the rest how it is reached.

    model: what the policy starts from. pairs: a sealed preference folder. output: where checkpoints, metrics and the
    trained model go. batch_size: pairs an optimizer step, over all processes. micro_batch_size: pairs a forward pass of
    one process (memory; does not change the result). beta: Salesforce convention, see `losses.kappa_of`. warmup_steps:
    linear from 0; then `schedule`, see `optimizers.learning_rate`. loss: a key of `loss_table.LOSSES`, with the
    options of `loss_table.LossOptions`.

    text_encoders: whether `lora` also goes on the attention of the CLIP encoders, see `training.adapter.encoders`.

    noise_draws: how many different noises and times a pair is seen with; later epochs repeat them, and the reference's
    errors are kept instead of computed again. 0 = new ones in each epoch. refresh_reference: every so many steps the
    policy becomes the reference; 0 = never. prompt_dropout: share of draws in which a pair, both sides of it, is
    seen with the empty prompt. error_space: which prediction the squared errors are those of, see
    `noise.NoiseProcess.error_factor`. timestep_density, timestep_shift: see `family.TimeSampling`; flow models only.
    guidance_input: what guidance-distilled networks are told in training. ema: decay of the moving average that is
    exported; 0 = none. heldout_share: share of prompts whose pairs are only looked at, every `heldout_every` steps.

    checkpoint_every: steps between resumable checkpoints. dtype: of frozen weights. mixed_precision: "no",
    "fp16" or "bf16". offload_reference: the frozen copy of a full training waits in main memory. shard: weights
    are divided among the processes (see `sharding`). trackers: by accelerate's names. version: of this code, for the
    record.
    """

    model: ModelRef
    pairs: str
    output: str
    method: Method
    lora: Lora
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    beta: float
    checkpoint_every: int
    seed: int
    text_encoders: bool = False
    loss: str = "dpo"
    label_smoothing: float = 0.0
    soft_labels: bool = False
    sft_weight: float = 0.0
    margin_offset: float = 0.0
    margin_weights: bool = False
    sdpo_mu: float = 0.9
    optimizer: str = "adamw"
    schedule: str = "constant"
    ema: float = 0.0
    noise_draws: int = 0
    refresh_reference: int = 0
    prompt_dropout: float = 0.0
    error_space: ErrorSpace = "prediction"
    timestep_density: Density = "logit-normal"
    timestep_shift: float = 0.0
    guidance_input: float = 1.0
    heldout_share: float = 0.0
    heldout_every: int = 50
    device: str = "auto"
    dtype: str = "auto"
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    offload_reference: bool = False
    shard: bool = False
    trackers: list[str] = field(default_factory=list)
    version: str = "unknown"

    def write(self, path: Path) -> None:
        """As JSON, for `accelerate launch -m training`."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "TrainingPlan":
        values = json.loads(path.read_text())
        return cls(**{**values, "model": ModelRef.read(values["model"]), "lora": Lora(**values["lora"])})
