"""`python -m bench.agreement`: do the shipped judges rank fresh pictures of the base as the oracle does?

A pair is two pictures of one prompt with different oracle scores. A judge's exact tie counts as half a success, as in
PickScore's evaluation. Two intervals at 95 %: Wilson's, as if pairs were independent, and the one that allows for pairs
of a prompt, which share pictures (`clustered_interval`): the second is what may be claimed of other prompts.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from scoring.verdict.intervals import wilson_interval
from scoring.verdict.pair_statistics import clustered_interval
from shapes.generate import DEFAULT_GUIDANCE, DEFAULT_STEPS, sample
from shapes.oracle import check, claims, fraction, observe
from shapes.prompts import read_set
from shapes.render import to_uint8
from shapes.scorers import JUDGES, load_judge, score
from shapes.stage import MODELS, begin
from shapes.world import parse


def ranked_pairs(guess: Tensor, truth: Tensor, least_gap: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """Each pair's outcome, 1, 0.5 for a tie, or 0, and its prompt; of (prompts, k) scores, over pairs whose truth
    differs by more than `least_gap`."""
    ranked = truth[:, :, None] - truth[:, None, :] > least_gap + 1e-4
    said = (guess[:, :, None] - guess[:, None, :])[ranked]
    outcomes = (said > 0).double() + 0.5 * (said == 0).double()
    return outcomes.numpy(), [str(prompt) for prompt in ranked.nonzero()[:, 0].tolist()]


def fresh_pictures(
    prompts: Sequence[str],
    each: int,
    seed: int,
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
) -> Tensor:
    """`each` pictures a prompt by the shipped base model: (prompts * each, 3, 32, 32), rounded to bytes."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "base")
    captions = [prompt for prompt in prompts for _ in range(each)]
    images = sample(pipe, captions, torch.Generator().manual_seed(seed), steps, guidance)
    return to_uint8(images).permute(0, 3, 1, 2).float() / 255


def oracle_scores(images: Tensor, captions: Sequence[str]) -> Tensor:
    """(n,) fractions of checks passed."""
    return fraction(*check(observe(images), claims([parse(caption) for caption in captions])))


def report(name: str, guess: Tensor, truth: Tensor) -> str:
    """One line: the judge's accuracy on all ranked pairs and on those with a wide gap."""
    kinds = {"all pairs": 0.0, "oracle gap > .15": 0.15}
    return f"{name:10s} " + " | ".join(f"{kind} {share(*ranked_pairs(guess, truth, kinds[kind]))}" for kind in kinds)


def share(outcomes: np.ndarray, prompts: Sequence[str]) -> str:
    """Their mean with both intervals."""
    low, high = wilson_interval(float(outcomes.sum()), len(outcomes))
    mean, least, most = clustered_interval(outcomes, prompts)
    clustered = f"{len(set(prompts))} prompts [{least:.3f}, {most:.3f}]"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}] n={len(outcomes)}, by {clustered}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=("tuning", "heldout"), default="tuning", help="heldout: final claims only")
    parser.add_argument("--prompts", type=int, default=400, help="the first so many of the set")
    parser.add_argument("--images-per-prompt", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    given = parser.parse_args()
    begin(given.seed)
    prompts, each = read_set(given.set)[: given.prompts], given.images_per_prompt
    captions = [prompt for prompt in prompts for _ in range(each)]
    images = fresh_pictures(prompts, each, given.seed, given.steps, given.guidance)
    truth = oracle_scores(images, captions)
    print(f"{given.set}: {len(prompts)} prompts x {each}, seed {given.seed}, {given.steps} steps, g {given.guidance:g}")
    print(f"base       exact {share((truth == 1).double().numpy(), captions)} | mean score {truth.mean():.3f}")
    for name in JUDGES:
        guess = score(load_judge(name, MODELS / name), images, captions)
        print(report(name, guess.view(-1, each), truth.view(-1, each)))


if __name__ == "__main__":
    main()
