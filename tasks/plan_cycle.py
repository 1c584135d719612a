"""Draws a cycle's prompts and writes its plan, before the first picture is drawn."""

import importlib.metadata
import subprocess
from pathlib import Path

from prefect import task

from data.files import write_json
from data.ids import seed_for
from data.prompts import Prompts, draw_prompts
from tasks.record.champion import current_model
from tasks.record.plan import Plan, read_drawn_prompts, read_plan, source_cycle, source_plan
from tasks.record.prompts import prompt_pools
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.runs import Run
from tasks.record.workspace import Cycle, Experiment
from training.model.reference import model_digest

LIBRARIES = (
    "torch", "torchvision", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "open-clip-torch",
    "pillow", "pyarrow", "prefect",
)  # fmt: skip


@task(task_run_name="plan-cycle-{number:04d}")
def plan_cycle(experiment: Experiment, run: Run, number: int) -> Plan:
    """Draw the cycle's prompts and write its plan, or read both back where they are there."""
    cycle = experiment.cycle(number)
    recipe = run.recipe
    digest = model_digest(recipe.base_model, recipe.revision)
    if cycle.plan.is_file():
        return _unchanged(read_plan(cycle), digest, cycle)
    champion, start, label, labellers = current_model(experiment, recipe, digest)
    source = source_plan(recipe, label)
    cycle_seed = source.cycle_seed if source else seed_for(recipe.seed, f"cycle-{number}", 0)
    training, evaluation = prompt_pools(recipe)
    drawn = {
        "training": draw_prompts(training, recipe.generation.prompts_per_cycle, cycle_seed),
        "evaluation": draw_prompts(evaluation, recipe.evaluation.max_prompts, cycle_seed),
    }
    if source:
        drawn["training"] = dict(read_drawn_prompts(source_cycle(recipe), "training"))
        _check_held_out(drawn, recipe)
    plan = Plan(
        labellers=labellers,
        base_digest=digest,
        cycle=number, cycle_seed=cycle_seed, champion=champion, start=start.to_dict(), start_label=label, recipe=recipe,
        prompts={side: len(prompts) for side, prompts in drawn.items()}, code=code_versions(),
    )  # fmt: skip
    write_json(cycle.prompts, drawn)
    write_json(cycle.plan, plan.model_dump())
    return plan


def _check_held_out(drawn: dict[str, Prompts], recipe: Recipe) -> None:
    if shared := sorted(set(drawn["training"]) & set(drawn["evaluation"])):
        raise ParameterError(
            f"evaluation.prompts={recipe.evaluation.prompts!r}: {len(shared)} of them are training prompts of "
            f"candidates_of={recipe.candidates_of!r}, for example {drawn['training'][shared[0]]!r}"
        )


def _unchanged(plan: Plan, digest: str, cycle: Cycle) -> Plan:
    if plan.base_digest != digest:
        raise ParameterError(
            f"base_model={plan.recipe.base_model!r} has changed since {cycle.plan} was made (digest {digest}, then "
            f"{plan.base_digest}); put the old files back, or give another name as experiment"
        )
    return plan


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
