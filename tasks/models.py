"""Loaded models, kept while a stage needs them: one load a worker for many shards."""

import gc
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from scoring.scorer import Scorer, ScorerSource, load_scorer
from training.models import ModelRef, load_pipeline, resolve_device

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def absolute(model: ModelRef, folder: Path) -> ModelRef:
    """The model with paths that were relative to the experiment's folder made absolute."""
    unet, adapter = (str(folder / path) if path else None for path in (model.unet, model.adapter))
    return replace(model, unet=unet, adapter=adapter)


@lru_cache(maxsize=1)
def pipeline_for(model: ModelRef, device: str, dtype: str) -> "StableDiffusionPipeline":
    """The sampling pipeline of a model with absolute paths."""
    return load_pipeline(model, resolve_device(device), dtype)


@lru_cache(maxsize=1)
def scorer_for(name: str, source: ScorerSource | None, device: str) -> Scorer:
    """A scorer by name; source as the preset binds it (None: the scorer's own default)."""
    return load_scorer(name, {name: source} if source else {}, resolve_device(device))


def release() -> None:
    """Forget the loaded models, so that the next stage has the memory."""
    pipeline_for.cache_clear()
    scorer_for.cache_clear()
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
