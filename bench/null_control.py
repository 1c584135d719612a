"""Is the measurement honest? The embedded base judged against itself with other seeds, many times over.

    python -m bench.null_control [--repeats 20] [--prompts 512]

Each repeat draws the held-out prompts twice with fresh seeds and asks every judge, exactly as an evaluation does. Of
the 95 % intervals of the win rate about one in twenty may miss 0.5; more would mean that the intervals are too narrow.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from bench.pictures import judged
from data.ids import seed_for
from data.prompts import Prompts, read_prompts
from scoring.scorers.registry import load_scorer
from scoring.verdict.verdict import Verdict, judge_pairs
from tasks.record.recipe import Recipe, resolve
from training.model.loading import load_pipeline
from training.model.reference import ModelRef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=512)
    given = parser.parse_args()
    recipe = resolve("shapes", 0, {}, {})
    prompts = dict(list(read_prompts(recipe.evaluation.prompts).items())[: given.prompts])
    verdicts = repeat(recipe, prompts, given.repeats)
    for judge in recipe.judges:
        own = [verdict for verdict in verdicts if verdict.judge == judge.text]
        missed = sum(not verdict.low <= 0.5 <= verdict.high for verdict in own)
        mean = sum(verdict.win_rate for verdict in own) / len(own)
        print(f"{judge.text}: mean win rate {mean:.3f}; {missed} of {len(own)} intervals miss 0.5")


def repeat(recipe: Recipe, prompts: Prompts, repeats: int) -> list[Verdict]:
    """One verdict a judge and repeat."""
    pipeline = load_pipeline(ModelRef(str(Path(recipe.base_model))))
    judges = {judge.text: load_scorer(judge.text, recipe.sources()) for judge in recipe.judges}
    verdicts = []
    for number in tqdm(range(repeats), unit="repeat"):
        scores = []
        for side in (0, 1):
            seeds = [seed_for(2 * number + side, key, 0) for key in prompts]
            scores.append(judged(pipeline, recipe, judges, list(prompts.values()), seeds))
        for name, judge in judges.items():
            sides = (scores[0][name], scores[1][name])
            verdicts.append(judge_pairs(name, *sides, list(prompts), judge.info.higher_is_better, held_out=True))
    return verdicts


if __name__ == "__main__":
    main()
