"""The ids that folders on disk are keyed by."""

import numpy as np

from data.ids import candidate_id, image_uid, imported_pair_id, pair_id, prompt_id, seed_for


def test_prompt_id_ignores_outer_space_and_the_way_an_accent_is_composed() -> None:
    assert prompt_id("  cafe\u0301\n") == prompt_id("caf\u00e9")
    assert prompt_id("a red circle") != prompt_id("a red  circle")


def test_ids_never_change() -> None:
    """Folders on disk are keyed by these: another value would orphan every published shard."""
    assert prompt_id("a red circle") == "a1e4a280d27cad5b"
    assert candidate_id("p", 7, "base@1", "c") == "d5ef3853de0bf669880b5accfcbbbdbe"
    assert pair_id("p", 7, 8, "base@1", "base@1", "c") == "733a16b07d9d59a8e09beb0bbfd0fe11"
    assert imported_pair_id("p", 7, ["u", "v"], "c") == "8c792e33d488fcdc6f8daa0933996380"
    assert seed_for(1, "p", 2) == 30595517919613043
    assert image_uid(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_each_ingredient_changes_the_pair_id() -> None:
    base = ("p", 7, 8, "a", "b", "c")
    others = [("q", 7, 8, "a", "b", "c"), ("p", 9, 8, "a", "b", "c"), ("p", 7, 9, "a", "b", "c")]
    others += [("p", 7, 8, "x", "b", "c"), ("p", 7, 8, "a", "x", "c"), ("p", 7, 8, "a", "b", "x")]
    swapped = ("p", 8, 7, "b", "a", "c")
    assert len({pair_id(*key) for key in [base, swapped, *others]}) == 8


def test_numpy_integers_make_the_same_ids() -> None:
    one, two, seven = np.array([1, 2, 7], np.int64)
    assert candidate_id("p", seven, "m", "c") == candidate_id("p", 7, "m", "c")
    assert seed_for(one, "p", two) == seed_for(1, "p", 2)


def test_seeds_are_distinct_and_fit_an_int64() -> None:
    seeds = [seed_for(c, p, i) for c in range(10) for p in ("p", "q") for i in range(100)]
    assert len(set(seeds)) == 2000
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63
