"""Recipes for models of other families: schedulers that fit them, and those that do not."""

import shutil
from pathlib import Path

import diffusers
import pytest

from tasks.record.checks import check
from tasks.record.recipe import Recipe, resolve
from tasks.record.settings import GivenGeneration
from tests.families import FamilyBases
from training.model.sampling import Sampler, embed_prompts, negative_prompt, sample_images
from training.model.schedulers import flow_schedulers

FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER = "FlowMatchEulerDiscreteScheduler"


def recipe(preset: Path, base: Path, scheduler: str, options: dict[str, object]) -> Recipe:
    sections = {"generation": GivenGeneration(scheduler=scheduler, scheduler_options=options)}
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
    with pytest.raises(ValueError, match=message):
        check(recipe(tiny_preset, bases.folder(name), scheduler, options), tmp_path)


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}),
        ("sd3", "SASolverScheduler", FLOW_SIGMAS),
        ("sd3", "HeliosScheduler", FLOW_SIGMAS),
        ("flux-dev", "FlowMatchHeunDiscreteScheduler", {}),
        ("flux-dev", "SASolverScheduler", FLOW_SIGMAS),
        ("flux-dev", "UniPCMultistepScheduler", FLOW_SIGMAS),
        ("flux-schnell", "UniPCMultistepScheduler", FLOW_SIGMAS),
        ("flux-schnell", "DPMSolverMultistepScheduler", FLOW_SIGMAS),
        ("flux-schnell", "DPMSolverMultistepScheduler", FLOW_SIGMAS | {"use_dynamic_shifting": True}),
    ],
)
def test_a_flow_scheduler_is_refused_just_where_the_pipeline_cannot_draw_with_it(
    tiny_preset: Path, bases: FamilyBases, tmp_path: Path, name: str, scheduler: str, options: dict[str, object]
) -> None:
    pipeline, refused = bases.ours(name), None
    try:
        check(recipe(tiny_preset, bases.folder(name), scheduler, options), tmp_path)
    except ValueError as error:
        refused = str(error)
    before = pipeline.scheduler
    try:
        embeddings, negative = embed_prompts(pipeline, ["a circle"]), negative_prompt(pipeline)
        sample_images(pipeline, embeddings, negative, [1], Sampler(scheduler, 3, 1.0, dict(options), 32, 32), 1)
        failed = False
    except Exception:
        failed = True
    finally:
        pipeline.scheduler = before
    assert failed == (refused is not None), refused
    if refused:
        assert f"generation.scheduler='{scheduler}'" in refused and f"those that can: {EULER}" in refused


def test_the_flow_schedulers_that_are_named_can_be_used(bases: FamilyBases) -> None:
    heun = "FlowMatchHeunDiscreteScheduler"
    for name in ("sd3", "flux-dev", "flux-schnell"):
        named = flow_schedulers(bases.ref(name))
        assert EULER in named and (heun in named) == (name == "sd3")
        assert any(each.startswith("UniPCMultistepScheduler with {'use_flow_sigmas': True") for each in named)
        assert any(each.startswith("DPMSolver") for each in named) == (name != "flux-schnell")


def test_models_and_schedulers_in_the_formulation_of_edm_are_refused(
    tiny_preset: Path, bases: FamilyBases, tmp_path: Path
) -> None:
    edm = "EDMDPMSolverMultistepScheduler"
    with pytest.raises(ValueError, match=rf"generation\.scheduler='{edm}'.*EDM.*DPMSolverMultistepScheduler"):
        check(recipe(tiny_preset, bases.folder("sdxl"), edm, {}), tmp_path)
    base = Path(shutil.copytree(bases.folder("sdxl"), tmp_path / "playground"))
    getattr(diffusers, edm)().save_pretrained(base / "scheduler")
    with pytest.raises(ValueError, match=rf"base_model='.*playground' has a {edm}: .*EDM.*epsilon or v"):
        check(recipe(tiny_preset, base, "DPMSolverMultistepScheduler", {}), tmp_path)


def test_the_disk_a_cycle_needs_follows_the_models_own_scale(
    tiny_preset: Path, bases: FamilyBases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 latent pixels of 4 pixels each: 32 x 32 pictures, 8 prompts x 3 candidates and 3 x 12 evaluated."""
    from tasks.record import checks as checking

    used = checking.shutil.disk_usage(tmp_path)
    for free, enough in ((60 * 32 * 32 * 3, True), (60 * 32 * 32 * 3 - 1, False)):
        monkeypatch.setattr("tasks.record.checks.shutil.disk_usage", lambda path, free=free: used._replace(free=free))
        found = None
        try:
            check(recipe(tiny_preset, bases.folder("sd3"), EULER, {}), tmp_path)
        except ValueError as error:
            found = str(error)
        assert (found is None) == enough, found
