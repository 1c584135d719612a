"""The settings of a training and of how work is run, defined once: for recipes, the trainer's plan and flows.

`Training` and `Execution` are complete: every field has a value, unknown keys and values out of bounds are refused.
What a user gives in a flow is only what is to differ from the preset: `Given[Training]`.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from training.adapter.lora import Lora
from training.loss.table import LOSSES, LossOptions


def setting(description: str, **bounds: Any) -> Any:
    """A field of a group of parameters, with what the UI says of it."""
    return Field(description=description, **bounds)


class OneOf:
    """The values of a parameter that names an entry of a table; a new entry is all that a new value needs."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table

    def check(self, name: str) -> str:
        """The name, if the table has it. Raises ValueError that lists what there is."""
        if name not in self.table:
            raise ValueError(f"must be one of {', '.join(self.table)}")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.table), "type": "string"}


class Settings(BaseModel):
    """A complete group of parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings, covariant=True)


class Given(BaseModel, Generic[S]):
    """What a user gives of a group of parameters: any of its fields, each within the group's own bounds.

    `Given[Training]` is made out of `Training`. A field that is left out, or `null`, is as the preset says. The
    published schema names no defaults, so that a form sends nothing for a field that nobody touched.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    group: ClassVar[type[Settings]]

    if TYPE_CHECKING:  # its fields are the group's

        def __init__(self, **values: Any) -> None: ...

    def __class_getitem__(cls, group: Any) -> Any:
        return super().__class_getitem__(group) if isinstance(group, TypeVar) else _given(group)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _only_what_was_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}

    def values(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump()

    def on(self, below: Settings | Mapping[str, Any]) -> S:
        """The complete group: these fields, and for the others those of another group, or of a preset's table."""
        others = below.model_dump() if isinstance(below, Settings) else below
        complete: S = self.group(**{**others, **self.values()})  # type: ignore[assignment]
        return complete


@cache
def _given(group: type[Settings]) -> "type[Given[Any]]":
    """The class whose fields are those of a group, with the same bounds, but none of them needed."""
    fields: dict[str, Any] = {}
    for name, known in group.model_fields.items():
        text = f"{known.description} Left out: as the preset says."
        optional = Field(default=None, description=text, json_schema_extra=_without_default)
        fields[name] = (Annotated[known.annotation, *known.metadata, optional], None)
    made = create_model(group.__name__, __base__=Given, __doc__=group.__doc__, __module__=__name__, **fields)
    made.group = group
    return made


def _without_default(schema: dict[str, Any]) -> None:
    """Drop the default from a field's schema: `null` would contradict the field's type."""
    schema.pop("default", None)


class Training(Settings):
    """Preference training. `beta` is in the convention of Diffusion-DPO's published code, whatever the loss:
    kappa = beta / 2 is the factor on the difference of squared errors. docs/training.md has each loss."""

    method: Literal["lora", "full"] = setting("Train an adapter, or every weight of the UNet.")
    loss: Annotated[str, OneOf(LOSSES)] = setting(
        "Diffusion-DPO; robust DPO; hinge; IPO; DPO that preserves the winner (Diffusion-SDPO); fine-tuning on the "
        "winners; the same held to the reference (DCO); MaPO, without a reference; Diffusion-KTO."
    )
    label_smoothing: float = setting(
        "Probability that a label is wrong, for dpo (which it makes conservative DPO), rdpo and ipo; 0 = none.",
        ge=0,
        lt=0.5,
    )
    soft_labels: bool = setting(
        "Train on the probability that the winner is preferred instead of on certainty, with dpo and ipo. Needs "
        "scorers whose preference_scale is known."
    )
    sft_weight: float = setting(
        "Times the winner's squared error is added to the loss; 0 = none. Its pull equals the preference's own at the "
        "start of dpo where it is kappa / 2.",
        ge=0,
    )
    margin_offset: float = setting(
        "Logits by which the margin of a pair with the mean score margin must exceed 0, others in proportion; with "
        "dpo, hinge and sdpo.",
        ge=0,
        le=100,
    )
    margin_weights: bool = setting("Weight each pair by its score margin over the mean one, at most 4.")
    sdpo_mu: float = setting(
        "With sdpo: the share of the winner's own improvement that the loser's gradient must leave.",
        ge=0,
        le=1,
    )
    error_space: Literal["prediction", "epsilon", "velocity"] = setting(
        "Errors are those of the network's own prediction, or converted to those of the noise or the velocity, so that "
        "beta means the same for models that predict different things."
    )
    steps: int = setting("Optimizer steps.", ge=1)
    batch_size: int = setting("Pairs an optimizer step, over all processes.", ge=1)
    micro_batch_size: int = setting("Pairs a forward pass of one process; does not change the result.", ge=1)
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = setting(
        "AdamW; the same with 8-bit states (bitsandbytes); Adafactor, whose states are smaller still."
    )
    learning_rate: float = setting("After the warm-up.", gt=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "Of the learning rate after the warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = setting("Steps of linear warm-up.", ge=0)
    weight_decay: float = setting("Of the optimizer.", ge=0)
    ema: float = setting(
        "Decay of the moving average of the weights that becomes the trained model; 0 = the last weights do.",
        ge=0,
        lt=1,
    )
    max_grad_norm: float = setting("Gradients are clipped to this norm.", gt=0)
    beta: float = setting("Strength of the pull to the reference.", gt=0)
    refresh_reference: int = setting(
        "Every so many steps the reference becomes what the policy is then; 0 = it stays what training began with.",
        ge=0,
    )
    noise_draws: int = setting(
        "Different noises and times that a pair is seen with: later epochs repeat them, and the reference's errors are "
        "kept instead of computed again. 0 = new ones in each epoch.",
        ge=0,
        le=1000,
    )
    prompt_dropout: float = setting("Share of draws in which a pair is seen with the empty prompt.", ge=0, lt=1)
    timestep_density: Literal["uniform", "logit-normal"] = setting("Flow models: how training times are drawn.")
    timestep_shift: float = setting(
        "Flow models: above 1 draws more noise, below 1 less; 0 = as the model's own scheduler says.", ge=0
    )
    guidance_input: float = setting("What guidance-distilled models (FLUX.1 dev) are told in training.", ge=0)
    heldout_share: float = setting(
        "Share of training prompts whose pairs are not trained on but looked at now and then; 0 = none.",
        ge=0,
        le=0.5,
    )
    heldout_every: int = setting("Steps between two looks at the held-out pairs.", ge=1)
    lora_rank: int = setting("Rank of the adapter.", ge=1, le=1024)
    lora_alpha: float = setting("The adapter is scaled by alpha / rank.", gt=0)
    lora_targets: list[str] = setting("Endings of the names of the layers that get an adapter.", min_length=1)
    lora_dora: bool = setting("Also train the magnitude of each adapted layer's outputs (DoRA).")
    text_encoders: bool = setting(
        "With method lora: an adapter of the same rank also on the attention of the CLIP text encoders. Needs the "
        "captions to be embedded in each step."
    )
    checkpoint_every: int = setting("Steps between resumable checkpoints.", ge=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("Autocast precision of the UNet.")

    def lora(self) -> Lora:
        """The adapter that `method = "lora"` trains."""
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets, self.lora_dora)

    def loss_options(self) -> LossOptions:
        """The variants of the loss."""
        return LossOptions(**{name: getattr(self, name) for name in LossOptions.__dataclass_fields__})


class TrainingExecution(Settings):
    """How a training is run. Nothing here changes its result beyond rounding."""

    device: str = setting("'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = setting("Precision of the frozen weights.")
    gradient_checkpointing: bool = setting("Training computes activations again instead of keeping them.")
    compile: bool = setting("Training compiles the network's blocks: slow to begin, faster afterwards.")
    offload_reference: bool = setting("Full training: the frozen copy waits in main memory between its passes.")
    shard: bool = setting(
        "Where there are several processes, divide weights, gradients and optimizer states among them (FSDP), for "
        "models that do not fit a single GPU."
    )
    trackers: list[str] = setting("Where training metrics also go, by accelerate's names: tensorboard, wandb ...")


class Execution(TrainingExecution):
    """How the work is run. Nothing here changes a result beyond rounding."""

    batch_size: int = setting("Pictures a forward pass in generation.", ge=1)
    score_batch_size: int = setting("Pictures a forward pass in scoring.", ge=1)
    processes: int = setting("Training processes; 0 = one for each GPU of the machine.", ge=0)
    images_per_shard: int = setting("Pictures a shard; a killed run loses at most the shard it was in.", ge=1)

    def of_training(self) -> TrainingExecution:
        """The part of it that the trainer reads."""
        return TrainingExecution(**self.model_dump(include=set(TrainingExecution.model_fields)))
