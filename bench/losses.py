"""What each loss does to the embedded world: the same pairs, base and held-out prompts for all, in one table.

    python -m bench.losses [--seeds 0 1 2] [--arms dpo ipo ...] [--workspace workspace/losses]
    python -m bench.losses --tune          # the grid on tuning prompts that the numbers in ARMS were chosen from
    python -m bench.losses --tune-recipe   # likewise the recipe's own, on all tuning prompts under three seeds

What was computed before is not computed again; what is new is appended to results.jsonl in the workspace. After a
change of recipes/shapes.toml or of the code, start in another one.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.arms import ARMS, CYCLES, GRID, RECIPE_GRID, Arm
from bench.cycles import gate_and_promote, make_pairs, other_pairs, promote_anyway, promoted, run_cycles
from bench.loss_table import CONTROL, RECIPE, RECIPE_CONTROL, comparison, outcomes, table
from bench.pictures import judged
from data.files import write_text
from data.ids import seed_for
from data.prompts import read_prompts
from scoring.scorers.registry import load_scorer
from tasks.record.recipe import Recipe, resolve
from tasks.record.settings import Given, GivenEvaluation, GivenPairing, Settings
from tasks.record.workspace import experiment_at
from tasks.train import training_plan
from training.loop.trainer import train
from training.model.loading import load_pipeline
from training.model.reference import ModelRef

START = "start"
"""The base's pictures that all arms are compared with."""
TUNE_SEED, RECIPE_SEEDS = 7, [7, 8, 9]
TUNE_PROMPTS: dict[str, Any] = {"prompts": "shapes/prompts/tuning.jsonl", "max_prompts": 256}
Scores = dict[str, list[float]]


class World:
    """The default recipe under one seed: its cycles, and held-out pictures that are not those the gate looks at."""

    def __init__(self, workspace: Path, recipe: Recipe) -> None:
        self.workspace, self.recipe = workspace, recipe
        self.experiment = experiment_at(str(workspace), f"seed-{recipe.seed}")
        prompts = list(read_prompts(recipe.evaluation.prompts).items())[: recipe.evaluation.max_prompts]
        self.ids, self.texts = [key for key, _ in prompts], [text for _, text in prompts]
        self.judges = {judge.text: load_scorer(judge.text, recipe.sources()) for judge in recipe.judges}

    def model(self, arm: Arm) -> ModelRef:
        """Make an arm's model, or find it finished."""
        if arm.kind == "base":
            return ModelRef(self.recipe.base_model, self.recipe.revision)
        if arm.kind == "gated":
            return run_cycles(self.experiment, self.recipe, CYCLES, gate_and_promote)
        if arm.kind == "ungated":
            line = experiment_at(str(self.workspace), f"seed-{self.recipe.seed}-ungated")
            return run_cycles(line, self.recipe, CYCLES, promote_anyway, twin=self.experiment)
        cycle = make_pairs(self.experiment, self.recipe, 1)
        plan = training_plan(cycle)
        if arm != Arm():  # the recipe's own training is that of the first cycle
            pairs = str(other_pairs(cycle, arm.scorer)) if arm.scorer else plan.pairs
            output = str(self.experiment.folder / "arms" / arm.key())
            plan = plan.changed(**arm.training, pairs=pairs, output=output)
        with tqdm(total=plan.training.steps, unit="step", leave=False) as bar:

            def advance(step: int, metrics: dict[str, float]) -> None:
                bar.update(step - bar.n)

            return train(plan, advance).model

    def scores(self, model: ModelRef, side: int) -> Scores:
        """What each judge gives the model's pictures of the held-out prompts; side: which noise."""
        seeds = [seed_for(self.recipe.seed, f"losses:{key}", side) for key in self.ids]
        scores = judged(load_pipeline(model), self.recipe, self.judges, self.texts, seeds)
        return {name: values.tolist() for name, values in scores.items()}


class Results:
    """What is known, in a file that only grows: one line for each seed and model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # a kill may have cut the last one short
        self.scores: dict[tuple[int, str], Scores] = {}
        for line in map(json.loads, lines):
            self.scores[line["seed"], line["key"]] = line["scores"]
        write_text(path, "".join(line + "\n" for line in lines))

    def add(self, seed: int, key: str, name: str, scores: Scores, **facts: Any) -> None:
        self.scores[seed, key] = scores
        with self.path.open("a") as file:
            file.write(json.dumps({"seed": seed, "key": key, "arm": name, **facts, "scores": scores}) + "\n")


def default_recipe(seed: int, **evaluation: Any) -> Recipe:
    """The shapes recipe without what decides nothing: scores of judges who never label, null controls of cycles."""
    sections: dict[str, Given[Settings]] = {
        "evaluation": GivenEvaluation(null_control=False, **evaluation),
        "pairing": GivenPairing(score_with_judges=False),
    }
    return resolve("shapes", seed, {}, sections)


def run(
    workspace: Path, seeds: list[int], arms: Mapping[str, Arm], recipe_of: Callable[[int], Recipe]
) -> dict[str, dict[str, np.ndarray]]:
    """The outcomes of every arm against the base, by judge: (seeds, prompts)."""
    results = Results(workspace / "results.jsonl")
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in arms}
    worlds = [World(workspace, recipe_of(seed)) for seed in seeds]
    jobs = [(name, world) for name in arms for world in worlds]
    for name, world in (bar := tqdm(jobs, unit="arm")):
        seed, each = world.recipe.seed, arms[name]
        bar.set_postfix_str(f"seed {seed}, {name}")
        if (seed, START) not in results.scores:
            results.add(seed, START, START, world.scores(world.model(Arm("base")), 0))
        if (seed, each.key()) not in results.scores:
            scores = world.scores(world.model(each), int(each.kind == "base"))
            accepted = promoted(world.experiment) if each.kind == "gated" else None
            results.add(seed, each.key(), name, scores, training=each.training, promoted=accepted)
        for judge, scorer in world.judges.items():
            base, other = (np.array(results.scores[seed, key][judge]) for key in (START, each.key()))
            better = outcomes(base, other, scorer.info.higher_is_better)
            found[name].setdefault(judge, []).append(better)
    return {name: {judge: np.stack(rows) for judge, rows in judges.items()} for name, judges in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--workspace", type=Path, default=Path("workspace/losses"))
    parser.add_argument("--tune", action="store_true", help="the grid instead, on tuning prompts")
    parser.add_argument("--tune-recipe", action="store_true", help="the recipe's grid instead, on tuning prompts")
    given = parser.parse_args()
    if given.tune:
        tuning = partial(default_recipe, **TUNE_PROMPTS)
        print("\n".join(table(run(given.workspace / "tuning", [TUNE_SEED], GRID, tuning))))
        return
    if given.tune_recipe:
        tuning = partial(default_recipe, **{**TUNE_PROMPTS, "max_prompts": 400})
        print("\n".join(table(run(given.workspace / "recipe", RECIPE_SEEDS, RECIPE_GRID, tuning))))
        return
    found = run(given.workspace, given.seeds, {name: ARMS[name] for name in given.arms}, default_recipe)
    print("\n".join(table(found)))
    for pair in (("dpo", "base"), ("dpo", CONTROL), (RECIPE, "base"), (RECIPE, RECIPE_CONTROL)):
        if set(pair) <= set(found):
            print("\n" + "  \n".join(comparison(found, *pair)))


if __name__ == "__main__":
    main()
