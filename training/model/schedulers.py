"""Which of diffusers' schedulers can draw from a model. Tried on a tiny picture, without loading weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from training.model.families import family_for
from training.model.reference import ModelRef, read_config

if TYPE_CHECKING:
    pass


def scheduler_names() -> list[str]:
    """The diffusers schedulers that a Sampler may name: not those that lack a library."""
    import diffusers

    names = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and name[0].isupper()]
    known = {name: getattr(diffusers, name, None) for name in names}  # some are listed but gone
    return sorted(name for name, kind in known.items() if kind is not None and not hasattr(kind, "_backends"))


def scheduler_options(name: str) -> list[str]:
    """The options that a scheduler of diffusers takes; it would silently ignore others."""
    import inspect

    import diffusers

    return [option for option in inspect.signature(getattr(diffusers, name).__init__).parameters if option != "self"]


def flow_scheduler(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a scheduler with these options draws from models trained by flow matching; else from diffusion models."""
    told = bool(options.get("use_flow_sigmas")) and options.get("prediction_type") == "flow_prediction"
    return name.startswith("FlowMatch") or told


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Options with which a solver for diffusion models draws from flow models."""


def scheduler_fault(ref: ModelRef, name: str, options: Mapping[str, Any]) -> str | None:
    """Why a scheduler with these options cannot draw from the model as its pipeline calls it, None where it can.

    Tried, without loading weights: one step of a tiny picture. What a scheduler asserts about its options cannot be
    read from its signature.
    """
    import diffusers

    config = read_config(ref, "scheduler", "scheduler_config.json")
    picture = torch.ones(1, 4, 2, 2)
    try:
        scheduler = getattr(diffusers, name).from_config(config, **options)
        family_for(ref).start_sampling(scheduler, 4)
        scheduler.step(picture, scheduler.timesteps[0], picture)
    except Exception as error:  # of whatever kind: each scheduler has its own
        return f"{type(error).__name__}: {error}".rstrip(": ")
    return None


def flow_schedulers(ref: ModelRef) -> list[str]:
    """The schedulers that can draw from a flow model; those that need FLOW_SIGMAS as options say so."""
    names = [name for name in scheduler_names() if "Inverse" not in name]  # those lead back to the noise
    own = [name for name in names if name.startswith("FlowMatch") and scheduler_fault(ref, name, {}) is None]
    told = [name for name in names if "use_flow_sigmas" in scheduler_options(name)]
    return own + [f"{name} with {FLOW_SIGMAS}" for name in told if scheduler_fault(ref, name, FLOW_SIGMAS) is None]
