"""Which of diffusers' schedulers can draw from a model. Tried on a tiny picture, without loading weights."""

from collections.abc import Mapping
from typing import Any

import torch

from training.model.families import family_for
from training.model.reference import ModelError, ModelRef, read_config


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


def check_scheduler(ref: ModelRef, name: str, options: Mapping[str, Any]) -> None:
    """Refuse a scheduler, with these options, that the model cannot be drawn by. Loads no weights.

    Raises ModelError that names `generation.scheduler` or its options, and what would work.
    """
    if name not in (names := scheduler_names()):
        raise ModelError(f"generation.scheduler={name!r}; there are {', '.join(names)}")
    if unknown := sorted(set(options) - set(scheduler_options(name))):
        taken = ", ".join(scheduler_options(name))
        raise ModelError(f"generation.scheduler_options={unknown}: {name} knows only {taken}")
    family, given = family_for(ref), f"generation.scheduler={name!r} with scheduler_options={dict(options)}"
    if family.flow != flow_scheduler(name, options):
        trained, fitting = ("diffusion", "DPMSolverMultistepScheduler")
        if family.flow:
            trained, fitting = ("flow matching", "FlowMatchEulerDiscreteScheduler")
        raise ModelError(
            f"{given}: base_model={ref.base!r} was trained by {trained}; use a scheduler for it, such as {fitting}"
        )
    if name in family.odd_schedulers:
        raise ModelError(
            f"{given}: {family.odd_schedulers[name]}, which base_model={ref.base!r} is not; use another, such as "
            "DPMSolverMultistepScheduler"
        )
    if family.flow and (fault := scheduler_fault(ref, name, options)):
        able = ", ".join(flow_schedulers(ref))
        raise ModelError(f"{given} cannot draw from base_model={ref.base!r} ({fault}); those that can: {able}")


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
