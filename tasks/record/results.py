"""The results of an evaluation: each judge's verdict, the gate's decision, and what stands behind a verdict."""

import json
from dataclasses import asdict, dataclass

import numpy as np

from data.files import write_json
from data.shards import ShardError
from scoring.labels.combine import order
from scoring.labels.expressions import Expression, Leaf
from scoring.scorers.scorer import ScorerInfo
from scoring.verdict.gates import GateDecision
from scoring.verdict.verdict import Verdict
from tasks.record.plan import PlannedCycle
from tasks.record.scores import read_scores
from tasks.record.workspace import CycleFolder, Part


@dataclass(frozen=True)
class Results:
    """verdicts: tuned against base. control: base against base with other seeds, which must come out even.

    labelled_by: fingerprints and weights of the scorers that labelled the cycle's pairs.
    """

    verdicts: list[Verdict]
    control: list[Verdict]
    decision: GateDecision
    labelled_by: list[str]

    @classmethod
    def read(cls, cycle: CycleFolder) -> "Results":
        """The results of a judged cycle. Raises FileNotFoundError before it is judged."""
        values = json.loads(cycle.results.read_text())
        return cls(
            [Verdict(**verdict) for verdict in values["verdicts"]],
            [Verdict(**verdict) for verdict in values["control"]],
            GateDecision(**values["decision"]),
            values["labelled_by"],
        )

    def write(self, cycle: CycleFolder) -> None:
        """Make them the cycle's results."""
        write_json(cycle.results, asdict(self))


@dataclass(frozen=True)
class Judged:
    """What one judge gave every held-out prompt, in the order of the prompts, and in what terms.

    Of a combination only the difference means something: base is 0, other the margin by which it is preferred.
    """

    base: np.ndarray
    other: np.ndarray
    unit: str
    higher_is_better: bool
    infos: dict[str, ScorerInfo]

    @property
    def gain(self) -> np.ndarray:
        """How much better the other picture is; positive = better, whatever the orientation."""
        gain: np.ndarray = self.other - self.base
        return gain if self.higher_is_better else -gain


def read_judged(cycle: PlannedCycle, judge: Expression, part: Part) -> Judged:
    """One judge's view of `part` against base."""
    base, other = (read_scores(cycle, side, judge.leaves) for side in ("base", part))
    for name, info in base.infos.items():
        if info != other.infos[name]:
            raise ShardError(
                f"{cycle.evaluation}: {name} scored base and {part} with different weights or settings; delete its "
                "folders under scores to score both again"
            )
    if isinstance(judge, Leaf):
        name = str(judge)
        info = base.infos[name]
        return Judged(base.scores[name], other.scores[name], info.unit, info.higher_is_better, base.infos)
    together = {name: np.stack([base.scores[name], other.scores[name]], axis=1) for name in base.scores}
    preferred = order(judge, together, base.infos)
    margins = np.array([preferred.margins(prompt)[1, 0] for prompt in range(preferred.prompts())])
    return Judged(np.zeros_like(margins), margins, preferred.unit, True, base.infos)
