"""The flow `train`: preference training without the rest, on any shards or on human data."""

import logging
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from data.manifest import read_manifest
from flows.full_cycle import exclusive
from tasks.import_pairs import import_pairs, plan_import
from tasks.models import collect
from tasks.progress import show_logs
from tasks.record.recipe import SECTIONS, ParameterError, Recipe, resolve
from tasks.record.settings import Generation
from tasks.train_alone import (
    check_importable,
    check_pairs,
    check_recipe,
    is_sealed,
    parameters_of,
    settle,
    start_model,
    train_pairs,
    training_folder,
)
from training.model.reference import ModelRef
from training.settings import Execution, Training

log = logging.getLogger(__name__)


@flow(name="train", flow_run_name="train-{name}")
def train(
    pairs: str,
    preset: str = "shapes",
    name: str = "default",
    base_model: str | None = None,
    adapter: str | None = None,
    output: str | None = None,
    workspace: str = "workspace",
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0,
    max_pairs: Annotated[int, Field(ge=1)] | None = None,
    generation: Generation = Generation(),
    training: Training = Training(),
    execution: Execution = Execution(),
) -> str:
    """Train a model on preference pairs; nothing is generated, scored or evaluated. Returns the training's folder.

    The same parameters after a crash go on where it stopped.

    Args:
        pairs: folder of sealed preference shards (a cycle's preferences/), or human data to import: a .parquet or
            .arrow file or a folder of them with Pick-a-Pic's columns, or a hub data set "owner/name:split".
        preset: a recipe under recipes/ (or the path of a TOML file) that names everything left open here.
        name: of the training, a folder under <workspace>/trainings.
        base_model: a diffusers folder or hub id.
        adapter: folder of an adapter or of an earlier training to start from; it is then the reference.
        output: another folder for the training.
        workspace: the folder for trainings and imports.
        seed: everything random derives from it.
        max_pairs: import only the first so many pairs.
        generation: height and width of imported pictures; nothing else of it is used.
        training: the loss, Diffusion-DPO or another, and its recipe.
        execution: device, precision, batch sizes.
    """
    show_logs()
    sections = {section: kind() for section, kind in SECTIONS.items()}
    sections |= {"generation": generation, "training": training, "execution": execution}
    recipe = resolve(preset, seed, {"base_model": base_model}, sections)
    where = training_folder(workspace, name, output)
    check_recipe(recipe)
    model = start_model(recipe, adapter)
    if is_sealed(pairs):
        _check_unused(pairs, max_pairs, generation)
        return _train_sealed(pairs, recipe, model, where)
    return _train_imported(pairs, recipe, model, where, generation, max_pairs, Path(workspace).expanduser().resolve())


def _check_unused(pairs: str, max_pairs: int | None, generation: Generation) -> None:
    given = {"max_pairs": max_pairs, **{f"generation.{name}": value for name, value in generation.given().items()}}
    if unused := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
        raise ParameterError(f"{', '.join(unused)}: only for data that are imported, and pairs={pairs!r} are sealed")


def _train_sealed(pairs: str, recipe: Recipe, model: ModelRef, where: Path) -> str:
    folder = Path(pairs).expanduser().resolve()
    check_pairs(pairs, folder, recipe)
    with exclusive(where):
        settle(where, parameters_of(recipe, model, read_manifest(folder).dataset_id))
        train_pairs(recipe, model, folder, where)
    collect()
    return str(where)


def _train_imported(
    pairs: str,
    recipe: Recipe,
    model: ModelRef,
    where: Path,
    generation: Generation,
    max_pairs: int | None,
    workspace: Path,
) -> str:
    if other := sorted(set(generation.given()) - {"height", "width"}):
        raise ParameterError(f"generation.{other[0]}: nothing is generated; only height and width are used, of imports")
    check_importable(pairs, recipe)
    job = plan_import(pairs, recipe, max_pairs, workspace / "imports")
    with exclusive(where):
        settle(where, parameters_of(recipe, model, job.config_hash))
        with exclusive(job.folder):
            folder = import_pairs(job)
        collect()
        check_pairs(pairs, folder, recipe)
        train_pairs(recipe, model, folder, where)
    collect()
    return str(where)
