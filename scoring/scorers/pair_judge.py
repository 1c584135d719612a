"""What a pair judge is: it says which of two images of a prompt is preferred, and gives no image a score of its own."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from typing_extensions import TypeIs

from scoring.scorers.images import Images, check_inputs
from scoring.scorers.scorer import Scorer, ScorerInfo, ScoringError, info_of


@runtime_checkable
class PairJudge(Protocol):
    """A function from two images of a prompt to the probability that the first is preferred, with weights behind it."""

    info: ScorerInfo

    def compare(self, first: Any, second: Any, prompts: Sequence[str]) -> np.ndarray:
        """P(image i of `first` is preferred to image i of `second` for prompt i): float (n,) in [0, 1].

        Images are uint8 arrays (height, width, 3) of any sizes.
        """
        ...

    def close(self) -> None:
        """Frees the memory of the weights; the judge cannot be used afterwards."""
        ...


Judge = Scorer | PairJudge


def is_pair_judge(judge: object) -> TypeIs[PairJudge]:
    """Whether a judge compares instead of scoring. One that can do both says which it does by `compares`."""
    return isinstance(judge, PairJudge) and bool(getattr(judge, "compares", not isinstance(judge, Scorer)))


def compare_images(judge: PairJudge, first: Images, second: Images, prompts: Sequence[str]) -> np.ndarray:
    """Calls a pair judge and vouches for the result: float64 (n,) in [0, 1].

    Entry i is the probability that first image i is preferred to second image i for prompt i. Raises ValueError for
    inputs that are no images and prompts of equal number, ScoringError, naming the scorer, for another result.
    """
    check_inputs(first, prompts)
    check_inputs(second, prompts)
    if not len(prompts):
        return np.zeros(0)
    try:
        values = np.asarray(judge.compare(first, second, prompts), dtype=np.float64)
    except ScoringError:
        raise
    except Exception as error:
        what = f"{len(prompts)} comparisons, first prompt {prompts[0]!r}"
        raise ScoringError(
            f"scorer {info_of(judge).name!r} failed on {what}: {type(error).__name__}: {error}"
        ) from error
    if values.shape != (len(prompts),) or not ((values >= 0) & (values <= 1)).all():
        raise ScoringError(
            f"scorer {info_of(judge).name!r} compared {len(prompts)} pairs and returned {values.shape}: {values[:8]}; "
            f"expected probabilities of shape ({len(prompts)},)"
        )
    return values
