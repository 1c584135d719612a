"""The cycle whose candidates another one labels anew (`candidates_of`)."""

from pathlib import Path

from tasks.record.plan import PlannedCycle
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.workspace import CycleFolder


def source_cycle(recipe: Recipe, start_label: str | None = None) -> PlannedCycle | None:
    """The cycle whose candidates are to be used, None when they are to be drawn.

    start_label: the model that the new cycle starts from, where it is known. Raises ParameterError when the candidates
    are not there or would not fit.
    """
    if recipe.candidates_of is None:
        return None
    parameter = f"candidates_of={recipe.candidates_of!r}"
    folder = CycleFolder(Path(recipe.candidates_of).expanduser().resolve())
    if not folder.plan_file.is_file():
        raise ParameterError(f"{parameter}: there is no cycle ({folder.plan_file} is missing)")
    source = PlannedCycle.open(folder.folder)
    _check_same(source, recipe, start_label or source.plan.start_label, parameter)
    candidates = source.part("candidates")
    needed = [
        path(index) for index in range(candidates.shards) for path in (candidates.candidates, candidates.embeddings)
    ]
    if missing := [path for path in needed if not path.is_file()]:
        raise ParameterError(f"{parameter}: {missing[0]} is missing; finish that cycle's generation first")
    return source


def _check_same(source: PlannedCycle, recipe: Recipe, start_label: str, parameter: str) -> None:
    """Refuse candidates that this recipe would have drawn otherwise."""
    old = source.plan.recipe
    for name, theirs, ours in [
        ("base_model", old.base_model, recipe.base_model),
        ("generation", old.generation, recipe.generation),
        ("execution.images_per_shard", old.execution.images_per_shard, recipe.execution.images_per_shard),
        ("the model that drew them", source.plan.start_label, start_label),
    ]:
        if theirs != ours:
            raise ParameterError(f"{parameter}: {name} was {theirs}, here it is {ours}; it must be the same")
