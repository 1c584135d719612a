"""Finds the family of a model: by the pipeline class that its `model_index.json` names."""

from typing import TYPE_CHECKING

from training.family import Family
from training.flow_models import Flux, StableDiffusion3
from training.stable_diffusion import StableDiffusion, StableDiffusionXL

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES: dict[str, Family] = {
    family.pipeline: family for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())
}


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """Of a loaded pipeline."""
    return FAMILIES[type(pipeline).__name__]
