"""Training outside a cycle: on any sealed preference folder, into a folder of its own."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task

from data.files import write_json
from data.manifest import MANIFEST, read_manifest
from data.schema import read_metadata
from data.shards import ShardError, open_shard
from tasks.plan_cycle import code_versions
from tasks.record.checks import check_device, check_training
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.runs import difference
from tasks.record.settings import GivenGeneration
from tasks.record.workspace import plain_name
from tasks.train import plan_training, run_training
from training.adapter.shape import check_text_encoders
from training.export.outputs import CARD, write_outputs
from training.loop.checkpoint import CheckpointRecord, weights_sha256
from training.loop.dataset import PreferencePairs
from training.loop.fit import check_fit
from training.model.families import family_for
from training.model.loading import network_outline
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef, model_digest
from training.trained import TrainedModel

log = logging.getLogger(__name__)


def training_folder(workspace: str, name: str, output: str | None) -> Path:
    """Where a training goes: `output`, else a folder of the workspace. Raises ValueError for no plain name."""
    if output:
        return Path(output).expanduser().resolve()
    return Path(workspace).expanduser().resolve() / "trainings" / plain_name("name", name)


def start_model(recipe: Recipe, adapter: str | None) -> ModelRef:
    """What training starts from and is held to: the base, or an earlier training on it.

    adapter: folder of an adapter, or of a training. Raises ParameterError when it is neither, or of another base or
    another shape.
    """
    base = ModelRef(recipe.base_model, recipe.revision)
    if adapter is None:
        return base
    folder, what = Path(adapter).expanduser().resolve(), f"adapter={adapter!r}"
    model = _trained(folder, base, what)
    check_text_encoders(recipe.training.method, recipe.training.text_encoders, model)
    if model.adapter and recipe.training.method == "lora":
        _check_shape(Path(model.adapter), recipe, what)
    return model


def _trained(folder: Path, base: ModelRef, what: str) -> ModelRef:
    """The model that an adapter's or a training's folder makes of the base."""
    if (folder / ADAPTER_FILE).is_file():
        return replace(base, adapter=str(folder))
    trained = TrainedModel.read(folder)
    if trained is None:
        raise ParameterError(f"{what}: there is no {ADAPTER_FILE} and no finished training (checkpoint.json)")
    model = trained.model()
    if model.base != base.base:
        raise ParameterError(f"{what} was trained on {model.base!r}, not on base_model={base.base!r}")
    return replace(model, revision=base.revision)


def _check_shape(folder: Path, recipe: Recipe, what: str) -> None:
    """A LoRA goes on with the adapter, so it must have its shape."""
    from training.adapter.shape import check_adapter, check_encoders

    base = ModelRef(recipe.base_model, recipe.revision)
    names = [name for name, _ in network_outline(base).named_modules()]
    check_adapter(folder / ADAPTER_FILE, family_for(base).network, recipe.training.lora(), names, what)
    check_encoders(str(folder), recipe.training.lora())


def check_recipe(recipe: Recipe) -> None:
    """Refuse, without loading weights, what the trainer would refuse. Raises ValueError that names the parameter."""
    family_for(ModelRef(recipe.base_model, recipe.revision))
    check_device(recipe.execution.device)
    check_training(recipe)


def check_pairs(source: str, folder: Path, recipe: Recipe) -> None:
    """Refuse a sealed folder that the recipe cannot be trained on. Loads no weights. Raises ParameterError."""
    training = recipe.training
    try:
        pairs = PreferencePairs(folder, training.heldout_share)
        if training.soft_labels:
            pairs.require_soft_labels()
        if training.margin_offset or training.margin_weights:
            pairs.require_margins()
        check_fit(pairs, ModelRef(recipe.base_model, recipe.revision), source)
    except (ShardError, ModelError) as error:
        raise ParameterError(f"pairs={source!r}: {error}") from error
    made_for = _base_of(folder)
    if made_for not in (None, recipe.base_model):
        log.warning(
            "pairs=%r were made with base_model=%r, not %r: the shapes fit, but latents and embeddings mean the same "
            "only if both models share their encoders", source, made_for, recipe.base_model,
        )  # fmt: skip


def _base_of(folder: Path) -> str | None:
    metadata = read_metadata(open_shard(folder / read_manifest(folder).shards[0].file).schema)
    base = metadata.get("base_model")
    return base.get("id") if isinstance(base, dict) else None


def check_not_imported(source: str, max_pairs: int | None, generation: GivenGeneration) -> None:
    """Refuse parameters that mean something for an import only, where the pairs are sealed. Raises ParameterError."""
    given = {"max_pairs": max_pairs, **{f"generation.{name}": value for name, value in generation.values().items()}}
    if unused := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
        raise ParameterError(f"{', '.join(unused)}: only for data that are imported, and pairs={source!r} are sealed")


def check_importable(source: str, recipe: Recipe, generation: GivenGeneration) -> None:
    """Refuse options that need more than people's labels say, and those of generation. Raises ParameterError."""
    if other := sorted(set(generation.values()) - {"height", "width"}):
        raise ParameterError(f"generation.{other[0]}: nothing is generated; only height and width are used, of imports")
    training = recipe.training
    wanted = [name for name in ("soft_labels", "margin_offset", "margin_weights") if getattr(training, name)]
    if wanted:
        raise ParameterError(
            f"training.{wanted[0]}={getattr(training, wanted[0])}: pairs={source!r} are labelled 0 or 1, without "
            "probabilities and margins; leave it out"
        )


def is_sealed(source: str) -> bool:
    """Whether it is a folder of preference shards of ours. Raises ParameterError for the folder of a cycle."""
    folder = Path(source).expanduser()
    if (folder / "preferences" / MANIFEST).is_file():
        raise ParameterError(f"pairs={source!r} is a cycle; its pairs are pairs={str(folder / 'preferences')!r}")
    return (folder / MANIFEST).is_file()


def dataset_id(folder: Path) -> str:
    """What identifies the rows of a sealed folder. Raises ShardError when it is not sealed."""
    return read_manifest(folder).dataset_id


def parameters_of(recipe: Recipe, model: ModelRef, pairs_id: str) -> dict[str, Any]:
    """Everything that decides the trained weights. pairs_id: of the data set, or of its import."""
    parts = [Path(part) for part in (model.network, model.adapter) if part]
    return {
        "base_model": recipe.base_model,
        "revision": recipe.revision,
        "base_digest": model_digest(recipe.base_model, recipe.revision),
        "adapter": [weights_sha256(file) for part in parts for file in sorted(part.glob("*.safetensors"))],
        "pairs": pairs_id,
        "seed": recipe.seed,
        "training": recipe.training.model_dump(),
    }


def settle(output: Path, parameters: dict[str, Any]) -> None:
    """Note the parameters of a training, or refuse others than it was begun with."""
    path = output / "parameters.json"
    if not path.is_file():
        return write_json(path, parameters)
    if changed := difference(json.loads(path.read_text()), parameters):
        raise ParameterError(
            f"output={str(output)!r} holds a training with other parameters ({changed}); give these again to finish "
            "it, or another name or output"
        )
    return None


@task(task_run_name="train-pairs")
def train_pairs(recipe: Recipe, model: ModelRef, pairs: Path, output: Path) -> CheckpointRecord:
    """Train into `output`; resumes at the last checkpoint, or returns what is finished. The model card comes last."""
    record = CheckpointRecord.read(output)
    if record and (output / CARD).is_file():
        log.info("%s: complete, kept", output)
        return record
    plan = plan_training(recipe, model, pairs, output, recipe.seed, code_versions()["rlaif"])
    plan.write(output / "plan.json")
    record = record or run_training(recipe, plan)
    write_outputs(output, plan, pairs)
    return record
