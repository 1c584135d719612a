"""The clauses of the contract that every scorer keeps; `scoring.tools.contract` runs them and explains how.

A clause looks at a scorer through a `Trial`, returns in words what it saw, and raises `Broken` where the scorer
breaks it, or `Skipped` where it does not apply. It calls the scorer itself and not `score_images`, whose guard would
hide what is wrong. Where a clause needs sound scores and gets none it skips: another clause says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeAlias
from unittest import SkipTest

import numpy as np

from scoring.scorers.scorer import Scorer, ScorerInfo, ScoringError, info_of, score_images

Clause: TypeAlias = "Callable[[Trial], str]"
CLAUSES: list[Clause] = []


class Broken(AssertionError):
    """The scorer breaks the clause; the message says what was seen and what was expected."""


class Skipped(SkipTest):
    """The clause does not apply to the scorer, or needs what another clause finds missing; pytest skips on it."""


class Trial:
    """A scorer under test with the inputs it is tested on; loads it once, and a second one where two are needed."""

    def __init__(
        self,
        make: Callable[[], Scorer],
        images: Sequence[np.ndarray] | None = None,
        prompts: Sequence[str] | None = None,
        tolerance: float = 1e-6,
    ) -> None:
        """`make`: gives a new scorer at each call. `images`, `prompts`: None = pictures and words made up here, 6 of
        64 x 64. `tolerance`: what counts as equal, relative to the largest of |score|, spread and |bound|."""
        self.make, self.tolerance = make, tolerance
        self.scorer = make()
        self._kept: dict[Clause, bool] = {}
        self._images = list(images) if images is not None else [picture(64, 64, seed) for seed in range(6)]
        given = list(prompts) if prompts else ["a red circle", "two cats", "", "a red circle", "café", "a house " * 50]
        self.prompts = [given[row % len(given)] for row in range(len(self._images))]

    @property
    def images(self) -> list[np.ndarray]:
        """Fresh copies, so that a scorer that changes its inputs fails one clause and not all."""
        return [image.copy() for image in self._images]

    @property
    def info(self) -> ScorerInfo:
        return info_of(self.scorer)

    def score(self, images: Any, prompts: Sequence[str], scorer: Scorer | None = None) -> np.ndarray:
        """Sound scores in float64, or Skipped."""
        values = np.asarray((scorer or self.scorer).score(images, prompts))
        if _unsound(values, len(prompts)):
            raise Skipped("the scores are unsound, which another clause reports")
        return values.astype(np.float64)

    def require(self, clause: Clause) -> None:
        """Skips where another clause is broken without which the current one would say nothing; runs it once."""
        if clause not in self._kept:
            try:
                clause(self)
                self._kept[clause] = True
            except Broken:
                self._kept[clause] = False
        if not self._kept[clause]:
            raise Skipped(f"{clause.__name__} is broken")

    def compare(self, found: np.ndarray, expected: np.ndarray, what: str) -> str:
        """Says how far two sets of scores differ; Broken when it is more than the tolerance."""
        own = [getattr(getattr(self.scorer, "info", None), name, None) for name in ("lowest", "highest")]
        bounds = [abs(bound) for bound in own if isinstance(bound, int | float) and math.isfinite(bound)]
        unit = max(float(np.abs(expected).max()), float(np.ptp(expected)), *bounds) or 1.0
        worst = int(np.abs(found - expected).argmax())
        error = float(abs(found[worst] - expected[worst])) / unit
        if not error <= self.tolerance:
            moved = f"from {expected[worst]:g} to {found[worst]:g}, {error:.1e} relative"
            raise Broken(f"{what} moves score {worst} {moved}")
        return f"at most {error:.1e} relative"


def _unsound(values: np.ndarray, count: int) -> str:
    """What is wrong with scores as such, empty when nothing is."""
    if values.shape != (count,) or values.dtype.kind not in "fiu":
        return f"got {values.dtype} of shape {values.shape}, expected numbers of shape ({count},)"
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)))
    return f"score {bad[0]} is {values[bad[0]]}, which is not finite as float32" if len(bad) else ""


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A gradient with a coloured patch and noise: uint8 (height, width, 3), the same each time."""
    rng = np.random.default_rng(seed)
    image = np.linspace(0, 200, height * width).reshape(height, width, 1) * rng.random(3)
    image[: (height + 1) // 2, : (width + 1) // 2] += 200 * rng.random(3)
    return np.clip(image + rng.integers(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)


def clause(function: Clause) -> Clause:
    CLAUSES.append(function)
    return function


@clause
def info_is_complete(trial: Trial) -> str:
    """`info` has a name, a version and a unit, all of them text."""
    try:
        info = trial.info
    except TypeError as error:
        raise Skipped(f"info cannot be written, which another clause reports: {error}") from error
    except ScoringError as error:
        raise Broken(str(error)) from error
    for key in ("name", "version", "unit"):
        if not isinstance(value := getattr(info, key), str) or not value:
            raise Broken(f"info.{key} is {value!r}, expected text")
    return f"{info.name} {info.version} in {info.unit}"


@clause
def info_is_sensible(trial: Trial) -> str:
    """The bounds in `info` are in order, and scale and spread are finite numbers, with the sign that fits."""
    info = _info(trial)
    low, high = info.lowest, info.highest
    if bad := [bound for bound in (low, high) if bound is not None and not math.isfinite(bound)]:
        raise Broken(f"a bound in info is {bad[0]}, expected a number, or None for no bound")
    if low is not None and high is not None and not low < high:
        raise Broken(f"info.lowest is {low} and info.highest {high}, expected lowest < highest")
    if info.typical_spread is not None and not 0 < info.typical_spread < math.inf:
        raise Broken(f"info.typical_spread is {info.typical_spread}, expected a number > 0 or None")
    sign = 1 if info.higher_is_better else -1
    if info.preference_scale is not None and not 0 < sign * info.preference_scale < math.inf:
        expected = "> 0" if sign > 0 else "< 0, as higher_is_better is False,"
        raise Broken(f"info.preference_scale is {info.preference_scale}, expected a number {expected} or None")
    return f"scores in [{'-inf' if low is None else low}, {'inf' if high is None else high}]"


@clause
def info_is_json(trial: Trial) -> str:
    """`info` can be written as JSON, because it is stored with each score."""
    try:
        text = json.dumps(asdict(trial.info))
    except ScoringError as error:
        raise Skipped("there is no complete info, which another clause reports") from error
    except (TypeError, ValueError) as error:
        raise Broken(f"info cannot be written as JSON: {error}") from error
    return f"{len(text)} characters"


def _info(trial: Trial) -> ScorerInfo:
    try:
        return trial.info
    except (ScoringError, TypeError) as error:
        raise Skipped(f"there is no sound info, which another clause reports: {error}") from error


@clause
def no_image(trial: Trial) -> str:
    """No image gives no score: shape (0,)."""
    return _shape(trial, 0)


@clause
def one_image(trial: Trial) -> str:
    """One image gives shape (1,), not a bare number."""
    return _shape(trial, 1)


def _shape(trial: Trial, count: int) -> str:
    shape = np.asarray(trial.scorer.score(trial.images[:count], trial.prompts[:count])).shape
    if shape != (count,):
        raise Broken(f"{count} images gave shape {shape}, expected ({count},)")
    return f"shape {shape}"


@clause
def finite_numbers(trial: Trial) -> str:
    """n images give n numbers that are finite as float32."""
    values = np.asarray(trial.scorer.score(trial.images, trial.prompts))
    if problem := _unsound(values, len(trial.prompts)):
        raise Broken(problem)
    return f"{values.dtype}, {values.min():g} to {values.max():g}"


@clause
def within_bounds(trial: Trial) -> str:
    """Every score lies within info.lowest and info.highest."""
    info = _info(trial)
    if info.lowest is None and info.highest is None:
        raise Skipped("info has no bounds")
    low = -math.inf if info.lowest is None else info.lowest
    high = math.inf if info.highest is None else info.highest
    if not low < high:
        raise Skipped("the bounds are not in order, which another clause reports")
    scores = trial.score(trial.images, trial.prompts)
    slack = trial.tolerance * max(abs(bound) for bound in (low, high) if math.isfinite(bound))
    if scores.min() < low - slack or scores.max() > high + slack:
        raise Broken(f"scores from {scores.min():g} to {scores.max():g}, info says [{low:g}, {high:g}]")
    return f"{scores.min():g} to {scores.max():g}"


@clause
def repeatable(trial: Trial) -> str:
    """The same images and prompts give the same scores again."""
    first = trial.score(trial.images, trial.prompts)
    return trial.compare(trial.score(trial.images, trial.prompts), first, "asking again")


@clause
def independent_of_the_batch(trial: Trial) -> str:
    """A score does not depend on the order of the images, nor on which others are scored with it."""
    trial.require(repeatable)
    expected = trial.score(trial.images, trial.prompts)
    order = np.random.default_rng(0).permutation(len(expected))
    images = trial.images
    shuffled = np.empty_like(expected)
    shuffled[order] = trial.score([images[row] for row in order], [trial.prompts[row] for row in order])
    said = trial.compare(shuffled, expected, "shuffling the batch")
    half = len(expected) // 2
    parts = [trial.score(trial.images[cut], trial.prompts[cut]) for cut in (slice(half), slice(half, None)) if half]
    return trial.compare(np.concatenate(parts), expected, "splitting the batch") if parts else said


@clause
def mixed_sizes(trial: Trial) -> str:
    """Images of all sizes are scored in one call as they are one by one: square, portrait, landscape, very wide.

    A single pixel too, unless the scorer refuses it with a ValueError.
    """
    trial.require(independent_of_the_batch)
    sizes = ((64, 64), (96, 48), (48, 96), (16, 400))
    prompts = ["a red circle"] * len(sizes)
    try:
        together = trial.score([picture(*size) for size in sizes], prompts)
    except Exception as error:
        raise Broken(f"images of different sizes in one call: {type(error).__name__}: {error}") from error
    alone = [np.ravel(trial.scorer.score([picture(*size)], prompts[:1])) for size in sizes]
    said = trial.compare(together, np.concatenate(alone).astype(np.float64), "scoring sizes together")
    try:
        trial.scorer.score([picture(1, 1)], prompts[:1])
    except ValueError as error:
        return f"{said}; 1 x 1 refused: {error}"
    except Exception as error:
        raise Broken(f"1 x 1 image: {type(error).__name__}: {error}; expected a score or a ValueError") from error
    return f"{said}; 1 x 1 scored"


@clause
def inputs_unchanged(trial: Trial) -> str:
    """Images are left as they are; arrays that cannot be written, as out of a memory map, are scored all the same."""
    images = trial.images
    trial.scorer.score(images, trial.prompts)
    changed = [row for row, image in enumerate(trial.images) if not np.array_equal(image, images[row])]
    if changed:
        raise Broken(f"image {changed[0]} was changed by score()")
    images = trial.images
    for image in images:
        image.flags.writeable = False
    try:
        trial.scorer.score(images, trial.prompts)
    except Exception as error:
        raise Broken(f"read-only arrays: {type(error).__name__}: {error}") from error
    return f"{len(images)} arrays unchanged"


@clause
def prompt_counts_as_declared(trial: Trial) -> str:
    """The prompt changes the score exactly when info.needs_prompt is true."""
    trial.require(repeatable)
    needs = _info(trial).needs_prompt
    words = ["a red circle", "a photograph of two cats", "snow on a mountain"]
    scores = trial.score(trial.images[:1] * len(words), words)
    spread = float(np.ptp(scores)) / (float(np.abs(scores).max()) or 1.0)
    if needs != (spread > trial.tolerance):
        seen = "differ" if spread > trial.tolerance else "are equal"
        raise Broken(f"info.needs_prompt is {needs}, but the scores of one image for {len(words)} prompts {seen}")
    return f"needs_prompt is {needs}, scores differ by {spread:.1e} relative"


@clause
def tensors_like_arrays(trial: Trial) -> str:
    """A scorer with `takes_tensors` scores a uint8 tensor (n, 3, height, width) as it scores the arrays."""
    if not getattr(trial.scorer, "takes_tensors", False):
        raise Skipped("no takes_tensors: it is given arrays")
    import torch

    trial.require(repeatable)
    arrays = [picture(48, 64, seed) for seed in range(3)]  # not square: height and width must not be confused
    prompts = ["a red circle", "two cats", "a house"]
    tensor = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    expected = trial.score(arrays, prompts)
    try:
        found = trial.score(tensor, prompts)
    except Skipped:
        raise Broken("a tensor gave unsound scores where arrays gave sound ones") from None
    return trial.compare(found, expected, "giving a tensor")


@clause
def one_prompt_an_image(trial: Trial) -> str:
    """Another number of prompts than of images raises ValueError: nothing is repeated, nothing left out."""
    for images, prompts in ((trial.images[:2], trial.prompts[:1]), (trial.images[:1], trial.prompts[:2])):
        called = f"{len(images)} images with {len(prompts)} prompts"
        try:
            values = trial.scorer.score(images, prompts)
        except ValueError as error:
            said = str(error)
        except Exception as error:
            raise Broken(f"{called} raised {type(error).__name__}, expected ValueError: {error}") from error
        else:
            raise Broken(f"{called} gave {np.asarray(values).size} scores, expected ValueError")
    return f"ValueError: {said}"


@clause
def no_float_images(trial: Trial) -> str:
    """Images in [0, 1] never become scores: the scorer refuses them with ValueError or TypeError, or else the guard
    `score_images` does. An error of another kind is a crash and no refusal."""
    images = [image / np.float32(255) for image in trial.images]
    try:
        trial.scorer.score(images, trial.prompts)
    except (ValueError, TypeError) as error:
        return f"refused: {error}"
    except Exception as error:
        raise Broken(f"expected ValueError, TypeError or scores, got {type(error).__name__}: {error}") from error
    try:
        score_images(trial.scorer, images, trial.prompts)
    except ValueError:
        return "scored if asked directly; score_images refuses them"
    raise Broken("float images were scored, and score_images let them pass")


@clause
def two_instances_agree(trial: Trial) -> str:
    """Two scorers that are made alike have the same fingerprint and give the same scores."""
    trial.require(repeatable)
    expected, info, other = trial.score(trial.images, trial.prompts), _info(trial), trial.make()
    try:
        if info_of(other).fingerprint != info.fingerprint:
            raise Broken(f"fingerprints {info.fingerprint!r} and {info_of(other).fingerprint!r} of two equal scorers")
        return trial.compare(trial.score(trial.images, trial.prompts, other), expected, "making the scorer again")
    finally:
        with suppress(Exception):  # whether close works is another clause
            other.close()


@clause
def closed_is_closed(trial: Trial) -> str:
    """After close() a call of score raises, and does not load the weights again."""
    scorer = trial.make()
    scorer.close()
    try:
        scorer.score(trial.images, trial.prompts)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise Broken("score() after close() gave scores, expected an error")
