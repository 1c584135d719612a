"""What a scorer is, and the guard around its numbers.

A scorer is any object with `info`, `score` and `close`; it need not import this project (docs/scorers.md has one
in ten lines). `registry` finds scorers by name, `expressions` combines them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np

from scoring.scorers.images import Images, as_arrays, check_inputs, is_tensor


class ScoringError(RuntimeError):
    """A scorer cannot be loaded from its weights, failed, or returned something that is no score."""


@dataclass(frozen=True)
class ScorerInfo:
    """What has to be known to read a score and to decide whether two scores may be compared."""

    name: str
    """Name of the scorer, for example "pickscore"."""
    version: str
    """Which weights family, for example "v2.1"; scores of different versions are not comparable."""
    unit: str
    """Unit of the score, for example "logit" or "cosine"."""
    higher_is_better: bool = True
    """Whether a larger score means a better image."""
    source: str = ""
    """Where the weights came from: a folder, or a hub id with its commit."""
    fingerprint: str = ""
    """Short hex digest of what determines the numbers: name, version, preprocessing, dtype, weights. Left out:
    of all the other fields."""
    weights: str = ""
    """Short hex digest of the weights alone: scorers with equal weights are no second opinion of one another.
    Left out: the fingerprint."""
    revision: str | None = None
    """Commit of the hub repository the weights came from; None = a local folder, or no weights."""
    preprocessing: str = ""
    """What is done to an image before the model sees it; part of the fingerprint."""
    lowest: float | None = None
    """Smallest score there can be; None = no bound."""
    highest: float | None = None
    """Largest score there can be; None = no bound."""
    licence: str = ""
    """Licence of the published weights, as an SPDX id where there is one; empty = not known."""
    typical_spread: float | None = None
    """Standard deviation between images of one prompt that was measured or published; None = not known."""
    preference_scale: float | None = None
    """P(image a is preferred to b) = sigmoid(preference_scale * (score_a - score_b)); None = not known."""
    needs_prompt: bool = True
    """Whether the score depends on the prompt."""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            facts = json.dumps({**asdict(self), "fingerprint": None, "source": None}, sort_keys=True)
            object.__setattr__(self, "fingerprint", hashlib.sha256(facts.encode()).hexdigest()[:16])
        if not self.weights:
            object.__setattr__(self, "weights", self.fingerprint)


REQUIRED_INFO = [field.name for field in fields(ScorerInfo) if field.default is MISSING]


@runtime_checkable
class Scorer(Protocol):
    """A function from (image, prompt) to a number, with weights behind it.

    A scorer may also have `takes_tensors = True`, and is then given a uint8 tensor (n, 3, height, width) as it is
    instead of arrays; and `load()`, which reads the weights that the first call of `score` would read. What compares
    two images instead is a `pair_judge.PairJudge`.
    """

    info: ScorerInfo

    def score(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
        """Scores image i against prompt i: uint8 arrays (height, width, 3) of any sizes -> float32 (n,)."""
        ...

    def close(self) -> None:
        """Frees the memory of the weights; the scorer cannot be used afterwards."""
        ...


def info_of(scorer: object) -> ScorerInfo:
    """A scorer's info; of a plug-in's own kind of info what it has, the rest as `ScorerInfo` defaults.

    Raises ScoringError when there is no info, or it lacks name, version or unit.
    """
    info = getattr(scorer, "info", None)
    if isinstance(info, ScorerInfo):
        return info
    if missing := [name for name in REQUIRED_INFO if not hasattr(info, name)]:
        raise ScoringError(f"scorer {type(scorer).__qualname__!r} lacks in its info: {', '.join(missing)}")
    return ScorerInfo(**{f.name: getattr(info, f.name) for f in fields(ScorerInfo) if hasattr(info, f.name)})


def identities(infos: Iterable[ScorerInfo]) -> set[str]:
    """What tells scorers apart: their fingerprints and those of their weights."""
    return {identity for info in infos for identity in (info.fingerprint, info.weights)}


def score_images(scorer: Scorer, images: Images, prompts: Sequence[str]) -> np.ndarray:
    """Calls a scorer and vouches for the result: float32, shape (n,), every value finite.

    `images`: arrays (height, width, 3) or one tensor (n, 3, height, width), uint8. With n = 0 the scorer is not
    called. Raises ValueError for inputs that are no images and prompts of equal number, and ScoringError, naming
    the scorer, the index and the prompt, when the scorer raises, or returns another shape, no numbers, NaN or
    infinity.
    """
    check_inputs(images, prompts)
    if not len(prompts):
        return np.zeros(0, dtype=np.float32)
    if is_tensor(images) and not getattr(scorer, "takes_tensors", False):
        images = as_arrays(images)
    name = info_of(scorer).name
    try:
        values = np.asarray(scorer.score(images, prompts))
    except ScoringError:
        raise
    except Exception as error:
        raise _blamed(scorer, name, images, prompts, error) from error
    if values.shape != (len(prompts),) or values.dtype.kind not in "fiu":
        raise ScoringError(
            f"scorer {name!r} returned {values.dtype} of shape {values.shape} for {len(prompts)} images, "
            f"the first with prompt {prompts[0]!r}; expected float32 of shape ({len(prompts)},)"
        )
    # A double beyond the float32 range becomes infinite here and is refused below, so the warning says
    # nothing new.
    with np.errstate(over="ignore"):
        scores = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ScoringError(
            f"scorer {name!r} returned {values[bad[0]]} for image {bad[0]} with prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(scores)} scores are not finite)"
        )
    return scores


def _blamed(scorer: Scorer, name: str, images: Images, prompts: Sequence[str], error: Exception) -> ScoringError:
    """The error of a call, with the first image that fails by itself; asking again costs nothing that matters."""
    kind = f"{type(error).__name__}: {error}"
    for index, prompt in enumerate(prompts):
        try:
            scorer.score(images[index : index + 1], [prompt])
        except Exception:
            return ScoringError(f"scorer {name!r} failed at image {index} with prompt {prompt!r}: {kind}")
    return ScoringError(
        f"scorer {name!r} failed on {len(prompts)} images, first prompt {prompts[0]!r}, but on none alone: {kind}"
    )
