"""The settings of a cycle that are not the trainer's: generation, pairing, evaluation and gate."""

from typing import Annotated, Any, Literal

from scoring.labels.pairing import RULES
from training.settings import Execution, Given, OneOf, Settings, Training, setting

__all__ = ["Evaluation", "Execution", "Gate", "Generation", "Given", "Pairing", "Settings", "Training"]


class Generation(Settings):
    """How many pictures are drawn and how. The same sampler draws the evaluation."""

    prompts_per_cycle: int = setting("Training prompts drawn each cycle.", ge=1)
    candidates: int = setting("Pictures a prompt.", ge=2, le=1024)
    scheduler: str = setting("A diffusers scheduler by class name.")
    scheduler_options: dict[str, Any] = setting("Overrides of the scheduler's own config.")
    steps: int = setting("Denoising steps.", ge=1, le=1000)
    guidance: float = setting("Classifier-free guidance scale; 1 = none.", ge=1.0, le=100.0)
    height: int = setting("Pixels; 0 = the model's own size.", ge=0, multiple_of=8)
    width: int = setting("Pixels; 0 = the model's own size.", ge=0, multiple_of=8)
    image_format: Literal["png", "jpeg"] = setting("png is lossless; jpeg is quality 95 without subsampling.")


class Pairing(Settings):
    """How scores become preference pairs."""

    rule: Annotated[str, OneOf(RULES)] = setting("Which candidates of a prompt are paired.")
    min_margin: float = setting(
        "Smallest score difference that makes a pair, in pooled within-prompt standard deviations; "
        "smaller ones are ties and are dropped.",
        ge=0,
    )
    score_with_judges: bool = setting("Also store the judges' scores of the candidates (they never label).")


class Evaluation(Settings):
    """Base against tuned model on held-out prompts, with equal seeds on both sides."""

    prompts: str = setting("Held-out prompt set; never trained on. 'split' holds back a part of `prompts`.")
    max_prompts: int = setting("At most this many held-out prompts, drawn anew for each cycle.", ge=10)
    null_control: bool = setting("Also judge the base against itself with other seeds: must come out even.")


class Gate(Settings):
    """What it takes to become the champion."""

    confidence: float = setting("Confidence level of the intervals.", gt=0.5, lt=1)


GivenGeneration = Given[Generation]
GivenPairing = Given[Pairing]
GivenTraining = Given[Training]
GivenEvaluation = Given[Evaluation]
GivenGate = Given[Gate]
GivenExecution = Given[Execution]
