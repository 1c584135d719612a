"""Loaded models, kept while a stage needs them: one load a worker for many shards."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.registry import ScorerSource, load_scorer, parse_spec
from scoring.scorer import Scorer
from training.models import ModelRef, load_pipeline, resolve_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_loaded: dict[object, Any] = {}
"""At most one model, by what it was loaded from."""


def absolute(model: ModelRef, folder: Path) -> ModelRef:
    """The model with paths that were relative to the experiment's folder made absolute."""
    network, adapter = (str(folder / path) if path else None for path in (model.network, model.adapter))
    return replace(model, network=network, adapter=adapter)


def pipeline_for(model: ModelRef, device: str, dtype: str) -> "DiffusionPipeline":
    """The sampling pipeline of a model with absolute paths."""
    return _keep((model, device, dtype), lambda: load_pipeline(model, resolve_device(device), dtype))


def scorer_for(spec: str, sources: Mapping[str, ScorerSource], device: str) -> Scorer:
    """One scorer as an expression writes it; sources: what the preset binds names to."""
    key = (spec, repr(sources.get(parse_spec(spec).name)), device)
    scorer: Scorer = _keep(key, lambda: load_scorer(spec, sources, resolve_device(device)))
    return scorer


def _keep(key: object, load: Callable[[], Any]) -> Any:
    """The model of this key; another one is dropped before it is loaded, so that two never share the memory."""
    if key not in _loaded:
        release()
        _loaded[key] = load()
    return _loaded[key]


def release() -> None:
    """Forget the loaded model, so that the next stage has the memory."""
    _loaded.clear()
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
