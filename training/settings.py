"""The settings of a training and of how work is run, defined once: for recipes, the trainer's plan and flows.

A field left out means "as the preset says": every recipe under `recipes/` names a value for every field, so a
section that a user gives holds only what is to differ. Unknown keys and values out of bounds are refused.
"""

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


def preset_value(description: str, **bounds: Any) -> Any:
    """A field whose value comes from the preset unless the user gives one."""
    text = f"{description} Left out: as the preset says."
    # The published schema names no default: `null` would contradict the field's type, and forms would send it.
    return Field(default=None, description=text, json_schema_extra=_without_default, **bounds)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class Section(BaseModel):
    """A group of parameters: frozen, unknown keys refused, `null` the same as left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _only_what_was_set(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}

    def given(self) -> dict[str, Any]:
        """Only what was set."""
        return self.model_dump()


class Training(Section):
    """Preference training. `beta` is in the convention of Diffusion-DPO's published code, whatever the loss:
    kappa = beta / 2 is the factor on the difference of squared errors. docs/training.md has each loss."""

    method: Literal["lora", "full"] = preset_value("Train an adapter, or every weight of the UNet.")
    loss: Literal["dpo", "rdpo", "hinge", "ipo", "sdpo", "sft", "dco", "mapo", "kto"] = preset_value(
        "Diffusion-DPO; robust DPO; hinge; IPO; DPO that preserves the winner (Diffusion-SDPO); fine-tuning on the "
        "winners; the same held to the reference (DCO); MaPO, without a reference; Diffusion-KTO."
    )
    label_smoothing: float = preset_value(
        "Probability that a label is wrong, for dpo (which it makes conservative DPO), rdpo and ipo; 0 = none.",
        ge=0,
        lt=0.5,
    )
    soft_labels: bool = preset_value(
        "Train on the probability that the winner is preferred instead of on certainty, with dpo and ipo. Needs "
        "scorers whose preference_scale is known."
    )
    sft_weight: float = preset_value(
        "Times the winner's squared error is added to the loss; 0 = none. Its pull equals the preference's own at the "
        "start of dpo where it is kappa / 2.",
        ge=0,
    )
    margin_offset: float = preset_value(
        "Logits by which the margin of a pair with the mean score margin must exceed 0, others in proportion; with "
        "dpo, hinge and sdpo.",
        ge=0,
        le=100,
    )
    margin_weights: bool = preset_value("Weight each pair by its score margin over the mean one, at most 4.")
    sdpo_mu: float = preset_value(
        "With sdpo: the share of the winner's own improvement that the loser's gradient must leave.", ge=0, le=1
    )
    error_space: Literal["prediction", "epsilon", "velocity"] = preset_value(
        "Errors are those of the network's own prediction, or converted to those of the noise or the velocity, so that "
        "beta means the same for models that predict different things."
    )
    steps: int = preset_value("Optimizer steps.", ge=1)
    batch_size: int = preset_value("Pairs an optimizer step, over all processes.", ge=1)
    micro_batch_size: int = preset_value("Pairs a forward pass of one process; does not change the result.", ge=1)
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = preset_value(
        "AdamW; the same with 8-bit states (bitsandbytes); Adafactor, whose states are smaller still."
    )
    learning_rate: float = preset_value("After the warm-up.", gt=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = preset_value(
        "Of the learning rate after the warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = preset_value("Steps of linear warm-up.", ge=0)
    weight_decay: float = preset_value("Of the optimizer.", ge=0)
    ema: float = preset_value(
        "Decay of the moving average of the weights that becomes the trained model; 0 = the last weights do.",
        ge=0,
        lt=1,
    )
    max_grad_norm: float = preset_value("Gradients are clipped to this norm.", gt=0)
    beta: float = preset_value("Strength of the pull to the reference.", gt=0)
    refresh_reference: int = preset_value(
        "Every so many steps the reference becomes what the policy is then; 0 = it stays what training began with.",
        ge=0,
    )
    noise_draws: int = preset_value(
        "Different noises and times that a pair is seen with: later epochs repeat them, and the reference's errors are "
        "kept instead of computed again. 0 = new ones in each epoch.",
        ge=0,
        le=1000,
    )
    prompt_dropout: float = preset_value("Share of draws in which a pair is seen with the empty prompt.", ge=0, lt=1)
    timestep_density: Literal["uniform", "logit-normal"] = preset_value("Flow models: how training times are drawn.")
    timestep_shift: float = preset_value(
        "Flow models: above 1 draws more noise, below 1 less; 0 = as the model's own scheduler says.", ge=0
    )
    guidance_input: float = preset_value("What guidance-distilled models (FLUX.1 dev) are told in training.", ge=0)
    heldout_share: float = preset_value(
        "Share of training prompts whose pairs are not trained on but looked at now and then; 0 = none.", ge=0, le=0.5
    )
    heldout_every: int = preset_value("Steps between two looks at the held-out pairs.", ge=1)
    lora_rank: int = preset_value("Rank of the adapter.", ge=1, le=1024)
    lora_alpha: float = preset_value("The adapter is scaled by alpha / rank.", gt=0)
    lora_targets: list[str] = preset_value("Endings of the names of the layers that get an adapter.", min_length=1)
    lora_dora: bool = preset_value("Also train the magnitude of each adapted layer's outputs (DoRA).")
    text_encoders: bool = preset_value(
        "With method lora: an adapter of the same rank also on the attention of the CLIP text encoders. Needs the "
        "captions to be embedded in each step."
    )
    checkpoint_every: int = preset_value("Steps between resumable checkpoints.", ge=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = preset_value("Autocast precision of the UNet.")


class Execution(Section):
    """How the work is run. Nothing here changes a result beyond rounding."""

    device: str = preset_value("'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = preset_value("Precision of the frozen weights.")
    batch_size: int = preset_value("Pictures a forward pass in generation.", ge=1)
    score_batch_size: int = preset_value("Pictures a forward pass in scoring.", ge=1)
    processes: int = preset_value("Training processes; 0 = one for each GPU of the machine.", ge=0)
    gradient_checkpointing: bool = preset_value("Training computes activations again instead of keeping them.")
    compile: bool = preset_value("Training compiles the network's blocks: slow to begin, faster afterwards.")
    offload_reference: bool = preset_value("Full training: the frozen copy waits in main memory between its passes.")
    shard: bool = preset_value(
        "Where there are several processes, divide weights, gradients and optimizer states among them (FSDP), for "
        "models that do not fit a single GPU."
    )
    trackers: list[str] = preset_value("Where training metrics also go, by accelerate's names: tensorboard, wandb ...")
    images_per_shard: int = preset_value("Pictures a shard; a killed run loses at most the shard it was in.", ge=1)
