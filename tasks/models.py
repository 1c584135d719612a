"""Loaded models, kept while a stage needs them: one load a worker for many shards."""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from scoring.scorers.pair_judge import Judge
from scoring.scorers.registry import ScorerSource, load_judge, parse_spec
from training.model.devices import resolve_device
from training.model.loading import load_pipeline
from training.model.reference import ModelRef

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_loaded: dict[object, Any] = {}
"""At most one model, by what it was loaded from."""
SMALL = 1 << 28
"""Bytes on the devices that no model takes: work space of cuBLAS and the like, which stays."""


def pipeline_for(model: ModelRef, device: str, dtype: str) -> "DiffusionPipeline":
    """The sampling pipeline of a model with absolute paths."""
    return _keep((model, device, dtype), lambda: load_pipeline(model, resolve_device(device), dtype))


def scorer_for(spec: str, sources: Mapping[str, ScorerSource], device: str) -> Judge:
    """One scorer as an expression writes it; sources: what the preset binds names to."""
    key = (spec, repr(sources.get(parse_spec(spec).name)), device)
    scorer: Judge = _keep(key, lambda: load_judge(spec, sources, resolve_device(device)))
    return scorer


def _keep(key: object, load: Callable[[], Any]) -> Any:
    """The model of this key; another one is dropped before it is loaded, so that two never share the memory."""
    if key not in _loaded:
        release()
        _loaded[key] = load()
    return _loaded[key]


def release() -> None:
    """Forget the loaded model, so that the next stage has the memory."""
    if not _loaded:
        return
    watched = [weakref.ref(network) for model in _loaded.values() for network in _networks(model)]
    _loaded.clear()
    if any(network() is not None for network in watched) or _on_devices() > SMALL:
        gc.collect()
    _return_memory()


def collect() -> None:
    """Free what only a full collection finds: mixed precision (accelerate) ties a trained network to itself.

    Takes about a second in a process with torch, diffusers and Prefect in it, whatever there is to free.
    """
    gc.collect()
    _return_memory()


def _networks(model: object) -> list["torch.nn.Module"]:
    """The networks of a pipeline or a scorer; of a scorer without any, such as a judge over HTTP, none."""
    import torch

    return [part for part in (model, *getattr(model, "__dict__", {}).values()) if isinstance(part, torch.nn.Module)]


def _on_devices() -> int:
    """Bytes of tensors on all CUDA devices; 0 where there are none."""
    import torch

    return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))


def _return_memory() -> None:
    """Give the devices back what torch keeps for later tensors: another process may need it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
