"""Many models against the same base, over several seeds: win rates with intervals, and one model against another.

Pure functions of scores. Outcomes are 1, 0.5 or 0 for each prompt: won, tied or lost against the base's picture of the
same seed. The prompts are the same under every seed, so a prompt is the unit of observation: its outcomes are averaged
over the seeds, and the interval is Student's over prompts, which allows for ties and for prompts that are hard under
every seed. It is about the models that these seeds made. How far another seed's would be off shows in the seeds' own
rates, and in `over_seeds`, Student's interval over their means.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scoring.verdict.intervals import mean_difference_interval

COLUMNS = ["arm", "oracle", "its seeds", "above random labels", "hpsv2", "pickscore", "finding"]
TRUTH, CONTROL = "oracle", "random-labels"
RECIPE, RECIPE_CONTROL = "recipe", "recipe-random-labels"
CONTROLS = {RECIPE: RECIPE_CONTROL, "3-cycles": RECIPE_CONTROL, "3-cycles-ungated": RECIPE_CONTROL}
"""Rows of which the random labels were trained on with other numbers than CONTROL's."""
Outcomes = Mapping[str, Mapping[str, np.ndarray]]
"""By arm and judge: (seeds, prompts)."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def outcomes(base: np.ndarray, other: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """1 where `other` is better than `base`, 0.5 where they tie, 0 where it is worse; any equal shapes."""
    gain = np.asarray(other, np.float64) - np.asarray(base, np.float64)
    better: np.ndarray = (1 + np.sign(gain if higher_is_better else -gain)) / 2
    return better


def pooled(values: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean over seeds and prompts of values (seeds, prompts >= 2), with the interval over prompts."""
    each = np.asarray(values).mean(axis=0)
    return Estimate(float(each.mean()), *mean_difference_interval(each, confidence))


def over_seeds(values: np.ndarray, confidence: float = 0.95) -> Estimate:
    """The same mean with Student's interval over the means of the seeds, (seeds >= 2, prompts)."""
    each = np.asarray(values).mean(axis=1)
    return Estimate(float(each.mean()), *mean_difference_interval(each, confidence))


def finding(oracle: Estimate, above_base: Estimate | None = None) -> str:
    """What the intervals of a win rate, and of its distance to that of the base with other noise, say in words.

    The noise of the compared pictures may have been unlucky; whatever draws others than these then wins.
    """
    if oracle.low > 0.5 and (above_base is None or above_base.low > 0):
        return "helps"
    return "**harms**" if oracle.high < 0.5 else "**does not help**"


def table(found: Outcomes) -> list[str]:
    """Markdown, one line an arm in the order given."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for arm, judges in found.items():
        rates = {judge: pooled(values) for judge, values in judges.items()}
        seeds = " ".join(f"{rate:.3f}" for rate in judges[TRUTH].mean(axis=1))
        control = CONTROLS.get(arm, CONTROL)
        trained = arm not in ("base", CONTROL, RECIPE_CONTROL)
        above = found[control][TRUTH] if control in found and trained else None
        gap = _signed(pooled(judges[TRUTH] - above)) if above is not None else ""
        cells = [arm, _text(rates[TRUTH]), seeds, gap, _text(rates["hpsv2"]), _text(rates["pickscore"])]
        beyond = pooled(judges[TRUTH] - found["base"][TRUTH]) if "base" in found else None
        word = "" if arm == "base" else finding(rates[TRUTH], beyond)
        lines.append(f"| {' | '.join([*cells, word])} |")
    return lines


def comparison(found: Outcomes, first: str, second: str) -> list[str]:
    """How much more often `first` wins against the base than `second` does, prompt by prompt, judge by judge."""
    lines = []
    for judge in found[first]:
        gap = found[first][judge] - found[second][judge]
        seeds = ", ".join(f"{value:+.3f}" for value in gap.mean(axis=1))
        spread = f"; over seeds {_signed(over_seeds(gap))}" if len(gap) > 1 else ""
        lines.append(f"{first} - {second}, {judge}: {_signed(pooled(gap))}; seeds {seeds}{spread}")
    return lines


def _text(estimate: Estimate) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*estimate)


def _signed(estimate: Estimate) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*estimate)
