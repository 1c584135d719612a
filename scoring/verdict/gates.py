"""From the verdicts of all judges to one decision: whether the tuned model replaces the champion.

A gate is a rule by name: a new one is a function and an entry of `GATES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scoring.verdict.verdict import Verdict


@dataclass(frozen=True)
class GateDecision:
    """Whether the tuned model replaces the champion, and why."""

    promoted: bool
    """True when the tuned model is accepted."""
    reasons: list[str]
    """Sentences: first the rule that decided, then each held-out judge, then the judges that have no vote."""


Gate = Callable[[Sequence[Verdict]], GateDecision]
"""A rule that makes one decision out of the verdicts of all judges."""


def better_for_one_worse_for_none(verdicts: Sequence[Verdict]) -> GateDecision:
    """Accepts a tuned model that a held-out judge finds better and that no held-out judge finds worse.

    Better: the whole interval of the win rate lies above 0.5 (low > 0.5). Worse: the whole interval lies
    below it (high < 0.5). Judges that labelled training data have no vote: rising under them is what training
    does, also when the images get worse (Gao, Schulman and Hilton 2022, "Scaling laws for reward model
    overoptimization"). Without a held-out judge nothing is promoted. The rule looks at each interval by
    itself; `p_holm` says what is left after correcting for the number of judges.
    """
    voting = [verdict for verdict in verdicts if verdict.held_out]
    better = [verdict.judge for verdict in voting if verdict.low > 0.5]
    worse = [verdict.judge for verdict in voting if verdict.high < 0.5]
    spoken = [_sentence(verdict) for verdict in voting]
    silent = [verdict for verdict in verdicts if not verdict.held_out]
    spoken += [f"{_sentence(verdict)} It labelled training data and has no vote." for verdict in silent]
    return GateDecision(bool(better) and not worse, [_rule(voting, better, worse), *spoken])


def _rule(voting: Sequence[Verdict], better: Sequence[str], worse: Sequence[str]) -> str:
    """The sentence that names the rule which decided."""
    if not voting:
        return "Not promoted: no held-out judge took part, so only the training signal itself was measured."
    if worse:
        return f"Not promoted: worse than the start model for {', '.join(worse)}."
    if better:
        return f"Promoted: better than the start model for {', '.join(better)}, worse for no held-out judge."
    return "Not promoted: no held-out judge tells the tuned model from the start model."


def _sentence(verdict: Verdict) -> str:
    """The numbers of one verdict in words."""
    finding = "better" if verdict.low > 0.5 else "worse" if verdict.high < 0.5 else "no clear difference"
    kind = "Held-out" if verdict.held_out else "Optimised"
    return (
        f"{kind} judge {verdict.judge}: {finding}; win rate {verdict.win_rate:.3f} "
        f"[{verdict.low:.3f}, {verdict.high:.3f}] at {verdict.confidence:.0%} over {verdict.prompts} prompts "
        f"({verdict.wins} wins, {verdict.ties} ties, {verdict.losses} losses; sign test "
        f"p = {verdict.p_value:.3g}, Holm {verdict.p_holm:.3g})."
    )


GATES: dict[str, Gate] = {"better-for-one-worse-for-none": better_for_one_worse_for_none}
DEFAULT = "better-for-one-worse-for-none"


def gate(verdicts: Sequence[Verdict], name: str = DEFAULT) -> GateDecision:
    """The decision of the gate of that name. Raises ValueError for an unknown name."""
    if name not in GATES:
        raise ValueError(f"unknown gate {name!r}; known gates: {', '.join(sorted(GATES))}")
    return GATES[name](verdicts)
