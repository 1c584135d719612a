"""Expressions: how they are read, and what each combination makes of scores, against direct evaluation."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.labels.combine import order, winner_probabilities
from scoring.labels.expressions import Combination, Expression, ExpressionError, Leaf, parse
from scoring.labels.pairing import margin_from_spread, pair_groups
from scoring.scorers.registry import Spec
from scoring.scorers.scorer import ScorerInfo

INFOS = {name: ScorerInfo(name, "1", "unit", preference_scale=1.0) for name in "abc"}
VALUES = st.integers(-6, 6).map(lambda n: n / 4)
GROUPS = st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=2, max_size=4).map(np.array)
KINDS = ["a", "mean(a,b)", "mean(2*a,b,c)", "z(a,b)", "rank(a,b)", "agree(a,b)", "agree(a,b,c)", "pareto(a,b)"]


def margins_of(text: str, scores: dict[str, np.ndarray], infos: dict[str, ScorerInfo] = INFOS) -> np.ndarray:
    """(prompts, k, k)"""
    expression = parse(text)
    found = order(expression, {name: scores[name] for name in expression.leaves}, infos)
    return np.stack([found.margins(prompt) for prompt in range(found.prompts())])


# ---- reading -----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["pickscore", "hpsv2", "my.package", "clip"])
SPECS = st.builds(
    Spec, NAMES, st.none() | st.sampled_from(["v2.0", "openai/clip-vit-base-patch32"]), st.none() | st.just("a1b2"),
    st.dictionaries(st.sampled_from(["antialias", "mode"]), st.integers(0, 9) | st.booleans() | st.just("pairwise")),
)  # fmt: skip
WEIGHTS = st.sampled_from([1.0, 2.0]) | st.floats(1e-6, 1e12)


def _combined(children: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    terms = st.lists(st.tuples(WEIGHTS, children), min_size=1, max_size=3)
    return st.builds(
        lambda kind, found: Combination(kind, tuple(w for w, _ in found), tuple(t for _, t in found)),
        st.sampled_from(["mean", "z", "rank"]), terms,
    )  # fmt: skip


VALUED = st.recursive(SPECS.map(Leaf), _combined, max_leaves=6)
ORDERED = st.builds(
    lambda kind, terms: Combination(kind, (1.0,) * len(terms), tuple(terms)),
    st.sampled_from(["agree", "pareto"]), st.lists(VALUED, min_size=2, max_size=3),
)  # fmt: skip


@given(VALUED | ORDERED)
def test_every_expression_reads_back_as_itself(expression: Expression) -> None:
    assert parse(str(expression)) == expression


def test_blanks_and_weights() -> None:
    found = parse("  mean( pickscore , 2 * hpsv2:v2.0?antialias=0 , .5*x:Y )  ")
    assert str(found) == "mean(pickscore,2*hpsv2:v2.0?antialias=0,0.5*x:Y)"
    assert found.text == "  mean( pickscore , 2 * hpsv2:v2.0?antialias=0 , .5*x:Y )  "
    assert found.leaves == ["pickscore", "hpsv2:v2.0?antialias=0", "x:Y"]
    assert parse("agree(z(a,b),a)").leaves == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "at", "why"),
    [
        ("", 1, "expected a scorer"),
        ("nope", 1, "unknown scorer 'nope'"),
        ("mean(a,nope)", 8, "unknown scorer 'nope'"),
        ("median(a,b)", 1, "unknown combination 'median'"),
        ("mean(a b)", 8, 'expected "," or ")"'),
        ("mean(a,b", 9, 'expected "," or ")"'),
        ("mean(a,)", 8, "expected a scorer"),
        ("mean()", 6, "expected a scorer"),
        ("a,b", 2, "expected the end"),
        ("mean(a,b))", 10, "expected the end"),
        ("mean(0*a,b)", 6, "a weight must be"),
        ("agree(a,2*b)", 9, "agree takes no weights"),
        ("pareto(a)", 1, "needs at least two"),
        ("mean(a,pareto(a,b))", 8, "must be outermost, not inside mean"),
        ("mean(a?x,b)", 6, "key=value"),
    ],
)
def test_errors_point_at_the_character_and_list_what_there_is(text: str, at: int, why: str) -> None:
    with pytest.raises(
        ExpressionError, match="combinations: mean, z, rank, agree, pareto; scorers: a, b, or"
    ) as caught:
        parse(text, ["b", "a"])
    message = str(caught.value)
    assert why in message and f"at character {at}\n" in message
    line, pointer = message.splitlines()[1:3]
    assert line == f"    {text}" and pointer.index("^") == 4 + at - 1


# ---- meaning -----------------------------------------------------------------------------------------------------


@given(GROUPS, st.data())
def test_one_scorer_alone_keeps_its_unit_and_its_exact_differences(scores: np.ndarray, data: st.DataObject) -> None:
    higher = data.draw(st.booleans())
    infos = {"a": replace(INFOS["a"], higher_is_better=higher)}
    found = order(parse("a"), {"a": scores}, infos)
    assert (found.unit, found.spread) == ("unit", margin_from_spread(scores))
    for prompt, group in enumerate(scores):
        expected = np.subtract.outer(group, group) * (1 if higher else -1)
        np.testing.assert_array_equal(found.margins(prompt), expected)


@settings(max_examples=60)
@given(GROUPS, GROUPS, GROUPS, st.sampled_from(KINDS))
def test_margins_are_antisymmetric_and_follow_the_candidates(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, text: str
) -> None:
    size = min(len(a), len(b), len(c))
    scores = {"a": a[:size], "b": b[:size], "c": c[:size]}
    found = margins_of(text, scores)
    np.testing.assert_array_equal(found, -found.transpose(0, 2, 1))
    for shuffle in permutations(range(3)):
        moved = margins_of(text, {name: values[:, shuffle] for name, values in scores.items()})
        np.testing.assert_allclose(moved, found[:, shuffle][:, :, shuffle], atol=1e-9)


@settings(max_examples=60)
@given(GROUPS, GROUPS, st.sampled_from([k for k in KINDS if "c" not in k and k != "a"]), st.sampled_from([1e-3, 64.0]))
def test_units_never_mix(a: np.ndarray, b: np.ndarray, text: str, scale: float) -> None:
    """Another unit and zero point of one scorer, also another of each prompt, changes no combination."""
    size = min(len(a), len(b))
    a, b = a[:size], b[:size]
    before = margins_of(text, {"a": a, "b": b})
    after = margins_of(text, {"a": a * scale + 7 * np.arange(size)[:, None], "b": b})
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_mean_by_hand() -> None:
    """a = (0, 2): spread sqrt 2; b = (10, 0): spread sqrt 50. Weights 3 : 1 -> (3 * 2 / sqrt 2 - 10 / sqrt 50) / 4."""
    found = margins_of("mean(3*a,b)", {"a": np.array([[0.0, 2.0]]), "b": np.array([[10.0, 0.0]])})
    assert found[0, 1, 0] == pytest.approx((3 * math.sqrt(2) - math.sqrt(2)) / 4)


def test_z_standardises_within_each_prompt() -> None:
    """Candidates (0, 1, 5) and (0, 10, 50) say the same; the population deviation of (0, 1, 5) is sqrt(14 / 3)."""
    found = margins_of("z(a)", {"a": np.array([[0.0, 1.0, 5.0], [0.0, 10.0, 50.0]])})
    np.testing.assert_allclose(found[0], found[1])
    assert found[0, 2, 0] == pytest.approx(5 / math.sqrt(14 / 3))


def test_with_two_candidates_z_is_a_vote_and_a_split_vote_a_tie() -> None:
    scores = {"a": np.array([[0.1, 0.7]]), "b": np.array([[3.3, -9.1]]), "c": np.array([[0.0, 1e-3]])}
    assert not margins_of("z(a,b)", scores).any()
    assert margins_of("z(a,b,c)", scores)[0, 1, 0] == pytest.approx(2 / 3)


def test_rank_counts_whom_a_candidate_beats() -> None:
    """a ranks (0, 1/2, 1), b ranks (1/4, 1/4, 1) with a tie."""
    scores = {"a": np.array([[1.0, 2.0, 9.0]]), "b": np.array([[5.0, 5.0, 6.0]])}
    found = margins_of("rank(a,b)", scores)
    assert found[0, 2, 0] == pytest.approx((1 + 0.75) / 2) and found[0, 1, 0] == pytest.approx(0.25)


@given(GROUPS, GROUPS)
def test_agree_and_pareto_by_definition(a: np.ndarray, b: np.ndarray) -> None:
    size = min(len(a), len(b))
    scores = {"a": a[:size], "b": b[:size]}
    agree, pareto = (margins_of(f"{kind}(a,b)", scores) for kind in ("agree", "pareto"))
    scaled = [v / (margin_from_spread(v) or 1) for v in scores.values()]
    for p, i, j in np.ndindex(agree.shape):
        one, two = (v[p, i] - v[p, j] for v in scaled)
        same = np.sign(one) == np.sign(two) != 0
        assert agree[p, i, j] == pytest.approx(np.sign(one) * min(abs(one), abs(two)) if same else 0)
        assert pareto[p, i, j] == pytest.approx((one + two) / 2 if one * two >= 0 else 0)


def test_lower_is_better_is_turned_round_before_it_is_combined() -> None:
    scores = {"a": np.array([[0.0, 1.0]]), "b": np.array([[5.0, 4.0]])}
    infos = {"a": INFOS["a"], "b": replace(INFOS["b"], higher_is_better=False)}
    assert margins_of("agree(a,b)", scores, infos)[0, 1, 0] > 0
    assert not margins_of("agree(a,b)", scores).any()


def test_a_scorer_that_ties_everything_has_no_say() -> None:
    scores = {"a": np.array([[0.0, 1.0]]), "b": np.array([[3.0, 3.0]])}
    assert margins_of("mean(a,b)", scores)[0, 1, 0] == pytest.approx(math.sqrt(2) / 2)
    assert not margins_of("agree(a,b)", scores).any()


def test_pairs_of_agree_are_those_on_which_both_say_the_same() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=(200, 4)) for name in "ab"}
    found = order(parse("agree(a,b)"), scores, INFOS)
    groups = pair_groups((found.margins(p) for p in range(200)), found.spread, "all-pairs", 0.5)
    kept = [(prompt, pair) for prompt, group in enumerate(groups) for pair in group]
    assert 50 < len(kept) < 600
    for prompt, pair in kept:
        for values in scores.values():
            margin = values[prompt, pair.winner] - values[prompt, pair.loser]
            assert margin / margin_from_spread(values) >= 0.5


# ---- soft labels -------------------------------------------------------------------------------------------------


def probabilities(text: str, scores: dict[str, np.ndarray], infos: dict[str, ScorerInfo]) -> np.ndarray | None:
    expression, found = parse(text), margins_of(text, scores, infos)
    rows = np.array([(p, int(np.argmax(found[p, :, 0])), 0) for p in range(len(found))])
    margins = found[rows[:, 0], rows[:, 1], 0]
    return winner_probabilities(expression, rows[:, :2], rows[:, ::2], scores, infos, margins)


def test_one_scorer_gives_the_softmax_of_its_two_scores() -> None:
    """PickScore: softmax(21, 20) = e / (e + 1); with scale 2 the logit doubles; no scale, no probability."""
    scores = {"a": np.array([[20.0, 21.0], [19.0, 19.0]])}
    assert probabilities("a", scores, INFOS) == pytest.approx([math.e / (math.e + 1), 0.5])
    twice = {"a": replace(INFOS["a"], preference_scale=2.0)}
    assert probabilities("a", scores, twice) == pytest.approx([math.e**2 / (math.e**2 + 1), 0.5])
    assert probabilities("a", scores, {"a": replace(INFOS["a"], preference_scale=None)}) is None


def test_a_scorer_whose_lower_score_is_better_has_a_negative_scale() -> None:
    infos = {"a": replace(INFOS["a"], higher_is_better=False, preference_scale=-1.0)}
    assert probabilities("a", {"a": np.array([[1.0, 0.0]])}, infos) == pytest.approx([math.e / (math.e + 1)])


def test_a_combination_is_as_sure_as_its_scorers_on_average_and_surer_with_a_larger_margin() -> None:
    rng = np.random.default_rng(1)
    scores = {"a": rng.normal(size=(400, 2)), "b": 100 * rng.normal(size=(400, 2))}
    infos = {"a": INFOS["a"], "b": replace(INFOS["b"], preference_scale=0.01)}
    found, margins = probabilities("mean(a,b)", scores, infos), margins_of("mean(a,b)", scores, infos)
    assert found is not None
    winner = np.argmax(margins[:, :, 0], axis=1)
    size = margins[np.arange(400), winner, 0]
    assert (np.diff(found[np.argsort(size)]) >= 0).all() and found.min() == 0.5 and found.max() > 0.8
    difference = {name: values[np.arange(400), winner] - values[:, 0] for name, values in scores.items()}
    said = (1 / (1 + np.exp(-difference["a"])) + 1 / (1 + np.exp(-difference["b"] / 100))) / 2
    assert (size * (found - said)).sum() == pytest.approx(0, abs=1e-6)  # where the cross-entropy is smallest
    assert probabilities("mean(a,b)", scores, {**infos, "b": replace(INFOS["b"], preference_scale=None)}) is None
