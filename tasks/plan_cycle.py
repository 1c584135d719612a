"""Draws a cycle's prompts and writes its plan, before the first picture is drawn."""

import importlib.metadata
import subprocess
from pathlib import Path

from prefect import task

from data.files import write_json
from data.ids import seed_for
from data.prompts import Prompts, draw_prompts
from tasks.record.champion import starting_model
from tasks.record.plan import Plan, PlannedCycle
from tasks.record.prompts import prompt_pools
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.source import source_cycle
from tasks.record.workspace import Experiment
from training.model.reference import model_digest

LIBRARIES = (
    "torch", "torchvision", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "open-clip-torch",
    "pillow", "pyarrow", "prefect",
)  # fmt: skip


@task(task_run_name="plan-cycle-{number:04d}")
def plan_cycle(experiment: Experiment, recipe: Recipe, number: int) -> PlannedCycle:
    """Draw the cycle's prompts and write its plan, or read both back where they are there."""
    folder, digest = experiment.cycle(number), model_digest(recipe.base_model, recipe.revision)
    if folder.plan_file.is_file():
        return _unchanged(PlannedCycle.open(folder.folder), digest)
    start = starting_model(experiment, recipe, digest)
    source = source_cycle(recipe, start.label)
    cycle_seed = source.plan.cycle_seed if source else seed_for(recipe.seed, f"cycle-{number}", 0)
    drawn = _draw(recipe, cycle_seed, source)
    plan = Plan(
        cycle=number, cycle_seed=cycle_seed, recipe=recipe, base_digest=digest, code=code_versions(),
        champion=start.champion, start=start.model.to_dict(), start_label=start.label, labellers=start.labellers,
        prompts={side: len(prompts) for side, prompts in drawn.items()},
    )  # fmt: skip
    write_json(folder.prompts_file, drawn)
    write_json(folder.plan_file, plan.model_dump())
    return PlannedCycle(folder.folder, plan)


def _draw(recipe: Recipe, cycle_seed: int, source: PlannedCycle | None) -> dict[str, Prompts]:
    """The prompts of the training and of the evaluation side; those of the candidates are the source's if there is one.

    Raises ParameterError when an evaluation prompt is among those of the source.
    """
    training, evaluation = prompt_pools(recipe)
    drawn = {
        "training": draw_prompts(training, recipe.generation.prompts_per_cycle, cycle_seed),
        "evaluation": draw_prompts(evaluation, recipe.evaluation.max_prompts, cycle_seed),
    }
    if source is None:
        return drawn
    drawn["training"] = dict(source.prompts("candidates"))
    if shared := sorted(set(drawn["training"]) & set(drawn["evaluation"])):
        raise ParameterError(
            f"evaluation.prompts={recipe.evaluation.prompts!r}: {len(shared)} of them are training prompts of "
            f"candidates_of={recipe.candidates_of!r}, for example {drawn['training'][shared[0]]!r}"
        )
    return drawn


def _unchanged(cycle: PlannedCycle, digest: str) -> PlannedCycle:
    """The cycle, if its base model is still the one that it was planned for. Raises ParameterError."""
    plan = cycle.plan
    if plan.base_digest != digest:
        raise ParameterError(
            f"base_model={plan.recipe.base_model!r} has changed since {cycle.plan_file} was made (digest {digest}, "
            f"then {plan.base_digest}); put the old files back, or give another name as experiment"
        )
    return cycle


def code_versions() -> dict[str, str]:
    """Version of this code (git commit where there is one) and of the libraries that make the numbers."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return versions | {"rlaif": git.stdout.strip() or "unknown"}
