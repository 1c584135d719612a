"""Finds the family of a model: by the pipeline class that its `model_index.json` names."""

from typing import TYPE_CHECKING

from training.model.family import Family
from training.model.flow_models import Flux, StableDiffusion3
from training.model.reference import ModelError, ModelRef, model_index
from training.model.stable_diffusion import StableDiffusion, StableDiffusionXL

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES: dict[str, Family] = {
    family.pipeline: family for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())
}


def family_for(ref: ModelRef) -> Family:
    """The family of a base model, by its `model_index.json`. Loads no weights. Raises ModelError for an unknown one."""
    name = model_index(ref.base, ref.revision).get("_class_name")
    if name not in FAMILIES:
        raise ModelError(f"base_model={ref.base!r} is a {name}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """Of a loaded pipeline."""
    return FAMILIES[type(pipeline).__name__]
