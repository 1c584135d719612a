"""The flow `train`: preference training without the rest, on any shards or on human data."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from tasks.import_pairs import import_pairs, plan_import
from tasks.models import collect
from tasks.progress import show_logs
from tasks.record.recipe import resolve
from tasks.record.settings import GivenExecution, GivenGeneration, GivenTraining
from tasks.record.workspace import exclusive
from tasks.train_alone import (
    check_importable,
    check_not_imported,
    check_pairs,
    check_recipe,
    dataset_id,
    is_sealed,
    parameters_of,
    settle,
    start_model,
    train_pairs,
    training_folder,
)


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
    generation: GivenGeneration = GivenGeneration(),
    training: GivenTraining = GivenTraining(),
    execution: GivenExecution = GivenExecution(),
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
    sections = {"generation": generation, "training": training, "execution": execution}
    recipe = resolve(preset, seed, {"base_model": base_model}, sections)
    where = training_folder(workspace, name, output)
    check_recipe(recipe)
    model = start_model(recipe, adapter)
    if is_sealed(pairs):
        check_not_imported(pairs, max_pairs, generation)
        folder = Path(pairs).expanduser().resolve()
        check_pairs(pairs, folder, recipe)
        with exclusive(where):
            settle(where, parameters_of(recipe, model, dataset_id(folder)))
            train_pairs(recipe, model, folder, where)
    else:
        check_importable(pairs, recipe, generation)
        job = plan_import(pairs, recipe, max_pairs, Path(workspace).expanduser().resolve() / "imports")
        with exclusive(where):
            settle(where, parameters_of(recipe, model, job.config_hash))
            with exclusive(job.folder):
                folder = import_pairs(job)
            collect()
            check_pairs(pairs, folder, recipe)
            train_pairs(recipe, model, folder, where)
    collect()
    return str(where)
