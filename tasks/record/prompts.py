"""The training and the evaluation prompts of a recipe, disjoint."""

from data.prompts import Prompts, read_prompts, split_prompts
from tasks.record.recipe import ParameterError, Recipe


def prompt_pools(recipe: Recipe) -> tuple[Prompts, Prompts]:
    """The disjoint training and evaluation pools."""
    prompts = read_prompts(recipe.prompts)
    held = recipe.evaluation.prompts
    training, evaluation = split_prompts(prompts, None if held == "split" else read_prompts(held, "evaluation.prompts"))
    if not training:
        raise ParameterError(f"prompts={recipe.prompts!r}: every prompt is held out for evaluation; give more")
    if len(evaluation) < 10:
        raise ParameterError(
            f"evaluation.prompts={held!r}: {len(evaluation)} held-out prompts; at least 10 are needed, 400 to see "
            "a win rate of 0.55. Give a larger set"
        )
    return training, evaluation
