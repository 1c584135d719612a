"""Pictures that a model draws as a recipe says, and what the recipe's judges give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scoring.scorers.scorer import Scorer, score_images
from tasks.record.recipe import Recipe
from training.model.sampling import Sampler, embed_prompts, negative_prompt, sample_images


def judged(
    pipeline: Any, recipe: Recipe, judges: Mapping[str, Scorer], prompts: Sequence[str], seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """By judge the score (prompts,) of one picture a prompt, drawn from its seed."""
    generation = recipe.generation
    sampler = Sampler(generation.scheduler, generation.steps, generation.guidance, generation.scheduler_options)
    embeddings, negative = embed_prompts(pipeline, prompts), negative_prompt(pipeline)
    size = recipe.execution.batch_size
    images = list(sample_images(pipeline, embeddings, negative, list(seeds), sampler, size)[1])
    return {name: score_images(judge, images, prompts) for name, judge in judges.items()}
