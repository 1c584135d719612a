"""From paired scores to verdicts, and from verdicts to the gate's decision."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoring.verdict.gates import gate
from scoring.verdict.verdict import (
    Verdict,
    holm,
    judge_pairs,
    mean_difference_interval,
    sign_test,
    win_rate_interval,
    with_holm,
)

IDS = ["a", "b", "c", "d", "e"]
SIDES = st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=2, max_size=12)


def test_verdict_by_hand() -> None:
    """Differences +1 +1 +1 0 -2 of five prompts: 3 wins, 1 tie, 1 loss, rate 3.5 / 5, mean 0.2."""
    base = np.array([1.0, 2.0, 3.0, 4.0, 5.0], dtype=np.float32)
    tuned = np.array([2.0, 3.0, 4.0, 4.0, 3.0], dtype=np.float32)
    verdict = judge_pairs("oracle", base, tuned, IDS, True, True)
    assert (verdict.judge, verdict.held_out, verdict.confidence) == ("oracle", True, 0.95)
    assert (verdict.prompts, verdict.wins, verdict.ties, verdict.losses) == (5, 3, 1, 1)
    assert verdict.win_rate == pytest.approx(0.7)
    assert (verdict.low, verdict.high) == win_rate_interval(3, 1, 1)
    assert verdict.p_value == verdict.p_holm == sign_test(3, 1) == pytest.approx(0.625)  # 2 (1 + 4) / 16
    assert verdict.mean_difference == pytest.approx(0.2)
    interval = mean_difference_interval([1, 1, 1, 0, -2], 0.95)
    assert (verdict.mean_difference_low, verdict.mean_difference_high) == pytest.approx(interval)
    assert (verdict.mean_base, verdict.mean_tuned) == pytest.approx((3.0, 3.2))


def test_images_of_one_prompt_count_once() -> None:
    """Prompt a: +3 -1 -1 (mean +1/3, two of three images lose); prompt b: -1 -1 -1. One win and one loss."""
    ids = ["a", "b", "a", "b", "a", "b"]
    verdict = judge_pairs("j", np.zeros(6), np.array([3.0, -1, -1, -1, -1, -1]), ids, True, True)
    assert (verdict.prompts, verdict.wins, verdict.ties, verdict.losses) == (2, 1, 0, 1)
    assert verdict.mean_difference == pytest.approx((1 / 3 - 1) / 2)


def test_repeating_every_image_adds_no_evidence() -> None:
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=20), rng.normal(size=20)
    ids = [str(i) for i in range(20)]
    once = judge_pairs("j", base, tuned, ids, True, True)
    assert judge_pairs("j", np.tile(base, 2), np.tile(tuned, 2), ids * 2, True, True) == once


@given(SIDES)
def test_lower_is_better_turns_the_win_rate_but_not_the_units(sides: list[tuple[int, int]]) -> None:
    base, tuned = (np.array([pair[i] for pair in sides]) for i in range(2))
    ids = [str(i) for i in range(len(sides))]
    high, low = (judge_pairs("j", base, tuned, ids, better, True) for better in (True, False))
    assert (low.wins, low.ties, low.losses) == (high.losses, high.ties, high.wins)
    assert low.win_rate == pytest.approx(1 - high.win_rate)
    assert low.mean_difference == high.mean_difference == pytest.approx(tuned.mean() - base.mean())


@given(SIDES)
def test_swapping_the_sides_mirrors_the_verdict(sides: list[tuple[int, int]]) -> None:
    base, tuned = (np.array([pair[i] for pair in sides]) for i in range(2))
    ids = [str(i) for i in range(len(sides))]
    one, other = (
        judge_pairs("j", base, tuned, ids, True, True),
        judge_pairs("j", tuned, base, ids, True, True),
    )
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))
    assert one.mean_difference == -other.mean_difference
    assert one.p_value == other.p_value


def test_tie_tolerance_is_inclusive() -> None:
    base, tuned = np.zeros(3), np.array([0.5, -0.5, 0.75])
    verdict = judge_pairs("j", base, tuned, ["a", "b", "c"], True, True, tie_tolerance=0.5)
    assert (verdict.wins, verdict.ties, verdict.losses) == (1, 2, 0)


def test_judge_pairs_refuses_what_it_cannot_judge() -> None:
    scores, ids = np.zeros(2), ["a", "b"]
    with pytest.raises(ValueError, match=r"clip: scores at 1 \('b'\) are 0.0 and nan"):
        judge_pairs("clip", scores, np.array([0, np.nan]), ids, True, True)
    with pytest.raises(ValueError, match="lengths differ"):
        judge_pairs("clip", scores, scores, ["a"], True, True)
    with pytest.raises(ValueError, match="'clip': needs at least two different prompts, got 1"):
        judge_pairs("clip", scores, scores, ["a", "a"], True, True)
    with pytest.raises(ValueError, match="tie_tolerance must be >= 0"):
        judge_pairs("clip", scores, scores, ids, True, True, tie_tolerance=-1)


def _verdict(judge: str, held_out: bool, low: float, high: float, p: float = 0.5) -> Verdict:
    middle = (low + high) / 2
    return Verdict(
        judge=judge, held_out=held_out, prompts=100, wins=50, ties=0, losses=50, win_rate=middle, low=low, high=high,
        confidence=0.95, p_value=p, p_holm=p, mean_difference=0.0, mean_difference_low=-1.0, mean_difference_high=1.0,
        mean_base=0.0, mean_tuned=0.0,
    )  # fmt: skip


def test_with_holm_adjusts_over_all_judges() -> None:
    verdicts = [_verdict(str(p), True, 0.4, 0.6, p) for p in (0.03, 0.01, 0.02)]
    adjusted = with_holm(verdicts)
    assert [v.p_holm for v in adjusted] == holm([0.03, 0.01, 0.02])
    assert [replace(v, p_holm=v.p_value) for v in adjusted] == verdicts


BETTER, WORSE, UNCLEAR = (0.51, 0.7), (0.3, 0.49), (0.4, 0.6)


@pytest.mark.parametrize(
    ("held_out", "optimised", "promoted"),
    [
        ([BETTER], [], True),
        ([UNCLEAR], [], False),
        ([WORSE], [], False),
        ([BETTER, UNCLEAR], [], True),
        ([BETTER, WORSE], [], False),
        ([WORSE, BETTER], [], False),
        ([UNCLEAR, UNCLEAR], [BETTER], False),
        ([BETTER], [WORSE], True),
        ([WORSE], [BETTER], False),
        ([], [BETTER], False),
        ([], [], False),
        ([(0.5, 0.7)], [], False),
        ([BETTER, (0.2, 0.5)], [], True),
    ],
)
def test_gate_truth_table(held_out: list, optimised: list, promoted: bool) -> None:
    """Only held-out judges decide: one entirely above 0.5, none entirely below; 0.5 is neither."""
    verdicts = [_verdict(f"held{i}", True, *ends) for i, ends in enumerate(held_out)]
    verdicts += [_verdict(f"opt{i}", False, *ends) for i, ends in enumerate(optimised)]
    decision = gate(verdicts)
    assert decision.promoted is promoted
    assert decision.reasons[0].startswith("Promoted" if promoted else "Not promoted")
    assert len(decision.reasons) == 1 + len(verdicts)


def test_gate_reasons_carry_the_numbers() -> None:
    verdict = replace(_verdict("clip", True, 0.512, 0.688, 0.0123), wins=55, ties=10, losses=35, win_rate=0.6)
    decision = gate([verdict, _verdict("pickscore", False, *BETTER)])
    assert decision.reasons == [
        "Promoted: better than the start model for clip, worse for no held-out judge.",
        "Held-out judge clip: better; win rate 0.600 [0.512, 0.688] at 95% over 100 prompts "
        "(55 wins, 10 ties, 35 losses; sign test p = 0.0123, Holm 0.0123).",
        "Optimised judge pickscore: better; win rate 0.605 [0.510, 0.700] at 95% over 100 prompts "
        "(50 wins, 0 ties, 50 losses; sign test p = 0.5, Holm 0.5). "
        "It labelled training data and has no vote.",
    ]
    assert "no held-out judge took part" in gate([_verdict("pickscore", False, *BETTER)]).reasons[0]
