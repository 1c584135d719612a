"""Preference rows: what follows from what is given."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.ids import image_uid, pair_id
from data.preference_rows import Pairs, Side, preference_table
from data.schema import pair_schema
from tests.data.shard_world import SCHEMA, row, table


def pairs_of(rows: list[dict[str, Any]], **changes: Any) -> Pairs:
    """Pairs that are given what `tests.data.shard_world.row` writes out column by column."""
    sides = [
        Side(
            images=[r[f"image_{side}"]["bytes"] for r in rows],
            latents=np.array([r[f"latent_{side}"] for r in rows], np.float16),
            seeds=[r[f"seed_{side}"] for r in rows],
            models=[r[f"model_{side}"] for r in rows],
            scores={"clip": [r[f"score_clip_{side}"] for r in rows]},
        )
        for side in (0, 1)
    ]
    given: dict[str, Any] = {
        "prompt_ids": [r["prompt_id"] for r in rows],
        "captions": [r["caption"] for r in rows],
        "sides": (sides[0], sides[1]),
        "label_0": [r["label_0"] for r in rows],
        "soft_label_0": [r["soft_label_0"] for r in rows],
        "margins": [r["margin"] for r in rows],
        "config_hashes": [r["config_hash"] for r in rows],
        "prompt_embeddings": np.array([r["prompt_embedding"] for r in rows], np.float16),
    }
    return Pairs(**given | changes)


ROWS = [row(0, 1.0), row(1, 0.0), row(2, 0.5), row(3, None, score_clip_0=None, margin=None)]


def test_rows_are_those_that_are_written_out_column_by_column() -> None:
    assert preference_table(pairs_of(ROWS), SCHEMA).equals(table(*ROWS))


def test_arrow_columns_are_taken_as_they_are() -> None:
    plain = table(*ROWS)
    sides = [
        Side(
            images=plain[f"image_{side}"], latents=plain[f"latent_{side}"], seeds=plain[f"seed_{side}"],
            models=plain[f"model_{side}"], scores={"clip": plain[f"score_clip_{side}"]},
            uids=plain[f"image_{side}_uid"],
        )
        for side in (0, 1)
    ]  # fmt: skip
    names = {"prompt_ids": "prompt_id", "captions": "caption", "config_hashes": "config_hash", "margins": "margin"}
    columns = {given: plain[name] for given, name in names.items()}
    embeddings = plain["prompt_embedding"]
    built = pairs_of(ROWS, sides=(sides[0], sides[1]), prompt_embeddings=embeddings, **columns)
    assert preference_table(built, SCHEMA).equals(plain)


LABELS = st.lists(st.sampled_from([1.0, 0.0, 0.5, None]), min_size=1, max_size=9)


@given(labels=LABELS, soft=st.floats(0, 1))
def test_the_sides_complement_each_other(labels: list[float | None], soft: float) -> None:
    """And an undecided row is told to be one."""
    rows = [row(index, label) for index, label in enumerate(labels)]
    built = preference_table(pairs_of(rows, soft_label_0=[soft] * len(rows)), SCHEMA).to_pylist()
    for label, r in zip(labels, built, strict=True):
        assert (r["label_0"], r["has_label"]) == (label, label is not None)
        assert r["label_1"] == (None if label is None else 1 - label)
        assert r["soft_label_0"] + r["soft_label_1"] == pytest.approx(1)


def test_ids_and_hashes_follow_from_the_rest() -> None:
    (built,) = preference_table(pairs_of([row(0)]), SCHEMA).to_pylist()
    assert built["pair_id"] == pair_id(row(0)["prompt_id"], 0, 1, "m", "m", "c")
    assert built["image_1_uid"] == image_uid(row(0)["image_1"]["bytes"]) and built["are_different"] is True
    twice = row(0, image_1=row(0)["image_0"])
    assert preference_table(pairs_of([twice], ids=["mine"]), SCHEMA)["pair_id"].to_pylist() == ["mine"]
    assert preference_table(pairs_of([twice]), SCHEMA)["are_different"].to_pylist() == [False]


def test_what_nobody_knows_is_null() -> None:
    built = preference_table(pairs_of(ROWS, soft_label_0=None, margins=None), SCHEMA)
    for name in ("soft_label_0", "soft_label_1", "margin"):
        assert built[name].null_count == 4


def test_a_column_that_the_schema_has_must_be_given() -> None:
    schema = pair_schema(4, 2, ["clip", "other"], {}, pooled_size=3, time_ids=True)
    missing = "pooled_embedding, time_ids_0, time_ids_1, score_other_0, score_other_1"
    with pytest.raises(ValueError, match=f"pairs without {missing}; the schema"):
        preference_table(pairs_of(ROWS), schema)
    assert preference_table(pairs_of(ROWS), pair_schema(4, None, [], {})).column_names[-1] == "config_hash"


def test_no_pair_is_a_table_without_rows() -> None:
    sides = Side(images=[], latents=np.zeros((0, 4)), seeds=[], models=[], scores={"clip": []})
    empty = Pairs(
        prompt_ids=[], captions=[], sides=(sides, sides), label_0=[], config_hashes=[],
        prompt_embeddings=np.zeros((0, 2)),
    )  # fmt: skip
    built = preference_table(empty, SCHEMA)
    assert built.num_rows == 0 and built.schema.equals(SCHEMA, check_metadata=True)
    assert built["latent_0"].type == pa.list_(pa.float16(), 4)
