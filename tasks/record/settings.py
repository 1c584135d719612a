"""The settings of a cycle that are not the trainer's: generation, pairing, evaluation and gate."""

from typing import Any, Literal

from training.settings import Execution, Section, Training, preset_value

__all__ = ["Evaluation", "Execution", "Gate", "Generation", "Pairing", "Section", "Training"]


class Generation(Section):
    """How many pictures are drawn and how. The same sampler draws the evaluation."""

    prompts_per_cycle: int = preset_value("Training prompts drawn each cycle.", ge=1)
    candidates: int = preset_value("Pictures a prompt.", ge=2, le=1024)
    scheduler: str = preset_value("A diffusers scheduler by class name.")
    scheduler_options: dict[str, Any] = preset_value("Overrides of the scheduler's own config.")
    steps: int = preset_value("Denoising steps.", ge=1, le=1000)
    guidance: float = preset_value("Classifier-free guidance scale; 1 = none.", ge=1.0, le=100.0)
    height: int = preset_value("Pixels; 0 = the model's own size.", ge=0, multiple_of=8)
    width: int = preset_value("Pixels; 0 = the model's own size.", ge=0, multiple_of=8)
    image_format: Literal["png", "jpeg"] = preset_value("png is lossless; jpeg is quality 95 without subsampling.")


class Pairing(Section):
    """How scores become preference pairs."""

    rule: Literal["best-vs-worst", "all-pairs"] = preset_value("Which candidates of a prompt are paired.")
    min_margin: float = preset_value(
        "Smallest score difference that makes a pair, in pooled within-prompt standard deviations; "
        "smaller ones are ties and are dropped.",
        ge=0,
    )
    score_with_judges: bool = preset_value("Also store the judges' scores of the candidates (they never label).")


class Evaluation(Section):
    """Base against tuned model on held-out prompts, with equal seeds on both sides."""

    prompts: str = preset_value("Held-out prompt set; never trained on. 'split' holds back a part of `prompts`.")
    max_prompts: int = preset_value("At most this many held-out prompts, drawn anew for each cycle.", ge=10)
    null_control: bool = preset_value("Also judge the base against itself with other seeds: must come out even.")


class Gate(Section):
    """What it takes to become the champion."""

    confidence: float = preset_value("Confidence level of the intervals.", gt=0.5, lt=1)
