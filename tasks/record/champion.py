"""The champion of an experiment: the best accepted model, which the next cycle starts from."""

import json
from typing import Any

from tasks.models import absolute
from tasks.record.plan import read_plan
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.workspace import Cycle, Experiment
from training.model.reference import ModelError, ModelRef


def current_model(experiment: Experiment, recipe: Recipe, digest: str) -> tuple[int | None, ModelRef, str, list[str]]:
    """(champion's cycle, model, its name in shards, who labelled its data): the champion, else the base.

    Raises ParameterError when the champion belongs to another base model or its adapter has another shape.
    """
    base = ModelRef(recipe.base_model, recipe.revision)
    champion: dict[str, Any] = {"cycle": None}
    if experiment.champion.is_file():
        champion = json.loads(experiment.champion.read_text())
    if champion["cycle"] is None:
        return None, base, f"{recipe.base_model}@{digest}", []
    model = ModelRef.read(champion["model"])
    if (model.base, model.revision) != (base.base, base.revision):
        raise ParameterError(
            f"base_model={recipe.base_model!r}, but the champion of {experiment.folder} was trained on {model.base!r}; "
            "give another name as experiment"
        )
    _check_adapter(experiment.cycle(champion["cycle"]), model, recipe)
    check_start(absolute(model, experiment.folder), recipe)
    return champion["cycle"], model, champion["label"], champion["labellers"]


def check_start(model: ModelRef, recipe: Recipe) -> None:
    """Refuse to train without the text encoders that the model to start from, with absolute paths, has tuned already.

    Raises ParameterError.
    """
    from training.adapter.shape import check_text_encoders

    try:
        check_text_encoders(recipe.training.method, recipe.training.text_encoders, model)
    except ModelError as error:
        raise ParameterError(str(error)) from error


def _check_adapter(cycle: Cycle, model: ModelRef, recipe: Recipe) -> None:
    """A LoRA cycle goes on with the champion's adapter, so it must have its shape."""
    if not model.adapter or recipe.training.method != "lora":
        return
    old, new = read_plan(cycle).recipe.training, recipe.training
    for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_dora"):
        if _unordered(getattr(old, name)) != _unordered(getattr(new, name)):
            raise ParameterError(
                f"training.{name}={getattr(new, name)!r}, but the champion's adapter was trained with "
                f"{getattr(old, name)!r}; keep that, or give another name as experiment to start from the base model"
            )


def _unordered(value: object) -> object:
    """Targets mean the same in any order."""
    return set(value) if isinstance(value, list) else value


def read_champion(experiment: Experiment) -> dict[str, Any]:
    """The champion's record; before the first promotion its cycle is None."""
    if not experiment.champion.is_file():
        return {"cycle": None, "model": None, "label": None, "labellers": [], "history": []}
    champion: dict[str, Any] = json.loads(experiment.champion.read_text())
    return champion
