"""The champion of an experiment: the best accepted model, which the next cycle starts from."""

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator

from data.files import write_json
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.workspace import Experiment
from training.adapter.shape import check_text_encoders
from training.model.reference import ModelRef


class Decision(BaseModel):
    """What became of a cycle's model, and why. sha256: of its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cycle: int
    promoted: bool
    reasons: list[str]
    sha256: str


class Champion(BaseModel):
    """The best accepted model of an experiment and the history of all decisions.

    cycle: the one that trained it, None before the first promotion, when the base model stands in its place. model: its
    paths are relative to the experiment. label: its name in shards. labellers: fingerprints and weights of the scorers
    whose labels are in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    cycle: int | None = None
    model: ModelRef | None = None
    label: str | None = None
    labellers: list[str] = []
    history: list[Decision] = []

    @field_validator("model", mode="before")
    @classmethod
    def _of_any_version(cls, value: Any) -> Any:
        return ModelRef.read(value) if isinstance(value, dict) else value

    @classmethod
    def read(cls, experiment: Experiment) -> "Champion":
        """The experiment's champion; of an experiment in which nothing has been decided, the one without a cycle."""
        if not experiment.champion.is_file():
            return cls()
        return cls.model_validate_json(experiment.champion.read_text())

    def write(self, experiment: Experiment) -> None:
        """Make it the experiment's champion."""
        write_json(experiment.champion, self.model_dump())

    def decision(self, cycle: int) -> Decision | None:
        """What was decided of a cycle, None before it was."""
        return next((decision for decision in self.history if decision.cycle == cycle), None)

    def decided(self, decision: Decision, **promoted: Any) -> "Champion":
        """The champion after one more decision. promoted: the fields that a promotion replaces."""
        return self.model_copy(update={**promoted, "history": [*self.history, decision]})


class Start(NamedTuple):
    """What a cycle starts from, as `Plan` keeps it."""

    champion: int | None
    model: ModelRef
    label: str
    labellers: list[str]


def starting_model(experiment: Experiment, recipe: Recipe, digest: str) -> Start:
    """The champion, else the base model.

    digest: of the base model's files. Raises ParameterError when the champion belongs to another base model or its
    adapter has another shape, and ModelError when it has tuned text encoders that the recipe would leave behind.
    """
    base, champion = ModelRef(recipe.base_model, recipe.revision), Champion.read(experiment)
    if champion.cycle is None or champion.model is None:
        return Start(None, base, f"{recipe.base_model}@{digest}", [])
    if (champion.model.base, champion.model.revision) != (base.base, base.revision):
        raise ParameterError(
            f"base_model={recipe.base_model!r}, but the champion of {experiment.folder} was trained on "
            f"{champion.model.base!r}; give another name as experiment"
        )
    _check_adapter(PlannedCycle.open(experiment.cycle(champion.cycle).folder), champion.model, recipe)
    training = recipe.training
    check_text_encoders(training.method, training.text_encoders, champion.model.within(experiment.folder))
    return Start(champion.cycle, champion.model, str(champion.label), champion.labellers)


def _check_adapter(cycle: PlannedCycle, model: ModelRef, recipe: Recipe) -> None:
    """A LoRA cycle goes on with the champion's adapter, so it must have its shape."""
    if not model.adapter or recipe.training.method != "lora":
        return
    old, new = cycle.plan.recipe.training, recipe.training
    for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_dora"):
        if _unordered(getattr(old, name)) != _unordered(getattr(new, name)):
            raise ParameterError(
                f"training.{name}={getattr(new, name)!r}, but the champion's adapter was trained with "
                f"{getattr(old, name)!r}; keep that, or give another name as experiment to start from the base model"
            )


def _unordered(value: object) -> object:
    """Targets mean the same in any order."""
    return set(value) if isinstance(value, list) else value
