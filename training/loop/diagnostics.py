"""Watches preference training while it runs: what is logged by noise level, and when to warn and when to stop.

Known failures: both errors of a pair rise while the loss and the implicit accuracy look better and better
(SalesforceAIResearch/DiffusionDPO issue 17); a run is fine for hundreds of steps, then gradient and loss jump and the
pictures become noise (huggingface/diffusers issue 6565). Knows nothing of networks or files.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from training.loss.errors import PairErrors

Metrics = Mapping[str, float]
"""One step's metrics, as they are logged."""

QUARTILES = 4
WINDOW = 10
"""Steps that are judged together, since a single one shows mostly which timesteps were drawn. Without a reference the
first of them stand for the untrained model."""
SURE = 4.0
"""Standard errors by which a mean must pass its limit, so that small batches give no alarm by chance: none in 100
runs of 300 made-up steps of one pair each, whose errors vary as much as they are large; at 3 it was two."""
DRIFT_WARNING, DRIFT_LIMIT = 0.5, 2.0
"""Relative drift of the winners, see `relative_drift`. On the shapes world pictures improve until about 0.5; beyond 2
every run was worse than its base by the oracle (figures: docs/training.md)."""
GOOD_ACCURACY = 0.9
"""Implicit accuracy that looks perfect, at which half the drift is warned of: published models reach 0.61 and 0.72
(arXiv:2311.12908)."""
LOSS_LIMIT = 2.0
GRADIENT_LIMIT, GRADIENT_STEPS, GRADIENT_MEMORY = 10.0, 5, 100
"""Median gradient norm of the last steps over that of the last hundred, and of the first ones. Single steps of healthy
runs reach 20, the median of five 5."""
REPEAT = 100  # steps until the same is warned of again


class TrainingDiverged(RuntimeError):
    """Training destroys the model or is no longer finite; the last good checkpoint is kept."""


def by_quartile(level: "Tensor", metrics: "Mapping[str, Tensor]", names: Sequence[str]) -> "dict[str, Tensor]":
    """The named metrics, each (n,), for the pairs of each quartile of noise: `name_q1` (cleanest) to `name_q4`.

    level: (n,) in [0, 1], how noisy the pair's input was. NaN where a pair is of another quartile: average without NaN.
    A metric that the loss does not have is left out.
    """
    quartile = (level * QUARTILES).long().clamp(0, QUARTILES - 1)
    return {
        f"{name}_q{index + 1}": metrics[name].masked_fill(quartile != index, math.nan)
        for name in names
        if name in metrics
        for index in range(QUARTILES)
    }


def reference_errors(errors: "PairErrors") -> "dict[str, Tensor]":
    """The reference's own errors, (pairs,): what a rise is measured by. Empty where the loss needs no reference."""
    both = {"winner": errors.reference_winner, "loser": errors.reference_loser}
    return {f"reference_{side}_error": error for side, error in both.items() if error is not None}


def relative_drift(history: Sequence[Metrics], side: str = "winner") -> float | None:
    """By how much the policy's error is above the reference's, over the reference's: a ratio of means over steps.

    With prediction p, reference r and target y, l_policy - l_ref = |p - r|^2 + 2 <p - r, r - y>. Where the reference is
    as good as can be on these pictures (it drew them), its residual r - y is uncorrelated with every function of the
    input, and the drift is E|p - r|^2 / E|r - y|^2: at 1, the policy has moved as far as the reference was from the
    truth. None without a reference.
    """
    moved = [m[f"{side}_error_delta"] for m in history if f"reference_{side}_error" in m]
    errors = [m[f"reference_{side}_error"] for m in history if f"reference_{side}_error" in m]
    return sum(moved) / sum(errors) if errors and sum(errors) > 0 else None


class Watch:
    """Judges a run step by step. Its state follows from the metrics alone, so a resumed run replays its history.

    context: values of the parameters that a message names, as far as known: learning_rate, beta, loss, steps,
    max_grad_norm. held: whether the loss holds the policy to a reference, so that a larger beta would help.
    """

    def __init__(self, context: Mapping[str, object] | None = None, held: bool = True) -> None:
        self._context, self._held = dict(context or {}), held
        self._start: list[Metrics] = []
        self._recent: deque[Metrics] = deque(maxlen=WINDOW)
        self._gradients: deque[float] = deque(maxlen=GRADIENT_MEMORY)
        self._warned: dict[str, int] = {}

    def replay(self, history: Iterable[Metrics]) -> None:
        """Take in the steps that an interrupted run has done; what was warned of is not returned again."""
        for metrics in history:
            self.observe(metrics)

    def observe(self, metrics: Metrics) -> list[str]:
        """What to warn of after this step, each kind once in REPEAT steps.

        Raises TrainingDiverged when loss or gradient are not finite, and when the winners' error has surely grown by
        more than DRIFT_LIMIT times the reference's (without a reference: of its own at the start).
        """
        step = int(metrics["step"])
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise TrainingDiverged(self._stopped(step, f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"))
        self._take(metrics)
        if self._drifted(DRIFT_LIMIT):
            raise TrainingDiverged(self._stopped(step, self._drift()))
        found = {"drift": self._drift_warning(), "loss": self._loss_warning(), "gradient": self._gradient_warning()}
        return [f"step {step}: {text}" for kind, text in found.items() if text and self._due(kind, step)]

    def _take(self, metrics: Metrics) -> None:
        if len(self._start) < WINDOW:
            self._start.append(metrics)
        self._recent.append(metrics)
        if not metrics.get("skipped"):  # float16 overflowed: no gradient
            self._gradients.append(metrics["grad_norm"])

    def _due(self, kind: str, step: int) -> bool:
        due = step - self._warned.get(kind, step - REPEAT) >= REPEAT
        if due:
            self._warned[kind] = step
        return due

    def _drifted(self, limit: float) -> bool:
        """Whether the winners' mean error is surely above 1 + limit times the reference's, or that of the start."""
        if "winner_error_delta" not in self._recent[-1]:
            return self._above_start("winner_error", 1 + limit)
        excess = [m["winner_error_delta"] - limit * m["reference_winner_error"] for m in self._recent]
        return len(excess) >= WINDOW and statistics.fmean(excess) > SURE * _standard_error(excess)

    def _above_start(self, name: str, times: float) -> bool:
        start, recent = [m[name] for m in self._start], [m[name] for m in self._recent]
        if len(start) < WINDOW:
            return False
        error = math.hypot(_standard_error(recent), times * _standard_error(start))
        return statistics.fmean(recent) - times * statistics.fmean(start) > SURE * error

    def _drift_warning(self) -> str:
        perfect = self._mean("implicit_accuracy") >= GOOD_ACCURACY
        if not self._drifted(DRIFT_WARNING / 2 if perfect else DRIFT_WARNING):
            return ""
        return f"{self._drift()}. {self._advice()}"

    def _drift(self) -> str:
        drift = relative_drift(self._recent)
        if drift is None:
            start = statistics.fmean(m["winner_error"] for m in self._start)
            return f"the winners' error, {self._mean('winner_error'):.4g}, was {start:.4g} at the start"
        text = f"the winners' error is {drift:.0%} above the reference's ({self._mean('reference_winner_error'):.4g})"
        accuracy = self._mean("implicit_accuracy")
        return text + (f"; implicit accuracy, {accuracy:.2f}, does not show it" if accuracy > 0.5 else "")

    def _loss_warning(self) -> str:
        start = statistics.fmean(m["loss"] for m in self._start)
        if start <= 0 or not self._above_start("loss", LOSS_LIMIT):
            return ""
        return f"the loss, {self._mean('loss'):.4g}, was {start:.4g} at the start. {self._advice()}"

    def _gradient_warning(self) -> str:
        norms = list(self._gradients)
        if len(norms) < WINDOW + GRADIENT_STEPS:
            return ""
        latest = statistics.median(norms[-GRADIENT_STEPS:])
        usual = max(statistics.median(norms), statistics.median(m["grad_norm"] for m in self._start))
        if latest <= GRADIENT_LIMIT * usual:
            return ""
        lower = f"Lower training.learning_rate{self._now('learning_rate')}"
        return f"gradient norm {latest:.3g}, usually {usual:.3g}. {lower} or max_grad_norm{self._now('max_grad_norm')}"

    def _mean(self, name: str) -> float:
        """Over the last steps; NaN for a metric that the loss does not have."""
        return statistics.fmean(m.get(name, math.nan) for m in self._recent)

    def _stopped(self, step: int, found: str) -> str:
        return f"step {step}: {found}. Training stopped; its last checkpoint is kept. {self._advice()}"

    def _advice(self) -> str:
        lower = f"Lower training.learning_rate{self._now('learning_rate')}"
        if not self._held:
            return f"{lower} or training.steps{self._now('steps')}"
        return f"{lower} or raise training.beta{self._now('beta')}"

    def _now(self, name: str) -> str:
        return f" (now {self._context[name]})" if name in self._context else ""


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
