"""Recipes for models of other families: schedulers that fit them, and those that do not."""

from pathlib import Path

import pytest

from tasks.check import check
from tasks.recipe import SECTIONS, ParameterError, Recipe, resolve
from tasks.settings import Generation
from tests.families import FamilyBases

FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER = "FlowMatchEulerDiscreteScheduler"


def recipe(preset: Path, base: Path, scheduler: str, options: dict[str, object]) -> Recipe:
    sections = {name: kind() for name, kind in SECTIONS.items()}
    sections["generation"] = Generation(scheduler=scheduler, scheduler_options=options)
    return resolve(str(preset), 0, {"base_model": str(base)}, sections)


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [("sdxl", "DDIMScheduler", {}), ("sd3", EULER, {}), ("flux-dev", "DPMSolverMultistepScheduler", FLOW_SIGMAS)],
)
def test_schedulers_of_the_family_pass(
    tiny_preset: Path, bases: FamilyBases, tmp_path: Path, name: str, scheduler: str, options: dict[str, object]
) -> None:
    check(recipe(tiny_preset, bases.folder(name), scheduler, options), tmp_path)


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "trained", "fitting"),
    [
        ("sdxl", EULER, {}, "diffusion", "DPMSolverMultistepScheduler"),
        ("sdxl", "DPMSolverMultistepScheduler", FLOW_SIGMAS, "diffusion", "DPMSolverMultistepScheduler"),
        ("sd3", "DDIMScheduler", {}, "flow matching", EULER),
        ("flux-dev", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow matching", EULER),
    ],
)
def test_schedulers_of_other_families_are_refused(
    tiny_preset: Path, bases: FamilyBases, tmp_path: Path,
    name: str, scheduler: str, options: dict[str, object], trained: str, fitting: str,
) -> None:  # fmt: skip
    message = rf"generation\.scheduler='{scheduler}'.*was trained by {trained}.*such as {fitting}"
    with pytest.raises(ParameterError, match=message):
        check(recipe(tiny_preset, bases.folder(name), scheduler, options), tmp_path)
