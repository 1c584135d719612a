"""The columns of shards, and in what two schemas differ."""

from typing import Any

import datasets
import pyarrow as pa
import pytest

from data.ids import score_column
from data.schema import (
    IMAGE,
    SCHEMA_VERSION,
    candidate_schema,
    check_version,
    pair_schema,
    read_metadata,
    schema_difference,
    score_schema,
)

METADATA = {"config_hash": "c0ffee", "generation": {"steps": 50, "guidance": 7.5}}


def test_pair_columns_stand_in_the_documented_order() -> None:
    schema = pair_schema(16, 6, ["pickscore"], METADATA)
    sides = [f"{name}_{side}" for name in ("image", "latent", "seed", "model") for side in (0, 1)]
    expected = ["pair_id", "prompt_id", "caption", *sides[:2], "image_0_uid", "image_1_uid", *sides[2:4]]
    expected += ["prompt_embedding", *sides[4:], "score_pickscore_0", "score_pickscore_1"]
    expected += [
        "label_0",
        "label_1",
        "soft_label_0",
        "soft_label_1",
        "has_label",
        "are_different",
        "margin",
        "config_hash",
    ]
    assert schema.names == expected
    assert schema.field("latent_1").type == pa.list_(pa.float16(), 16)
    assert schema.field("prompt_embedding").type == pa.list_(pa.float16(), 6)
    assert "prompt_embedding" not in pair_schema(16, None, [], METADATA).names


@pytest.mark.parametrize("column", ["image_0", "image_1", "image"])
def test_image_fields_equal_the_storage_of_datasets_image(column: str) -> None:
    """Only an equal field, nullability included, is decoded; any other silently reads as a dict."""
    pair, candidate = pair_schema(16, None, [], {}), candidate_schema(16, {})
    schema = candidate if column == "image" else pair
    assert schema.field(column).type == datasets.Image().pa_type
    assert isinstance(datasets.Features.from_arrow_schema(schema)[column], datasets.Image)


def test_a_non_nullable_image_field_would_not_be_decoded() -> None:
    """The guard above can fail."""
    schema = candidate_schema(16, {})
    broken = schema.set(schema.get_field_index("image"), pa.field("image", IMAGE, nullable=False))
    assert not isinstance(datasets.Features.from_arrow_schema(broken)["image"], datasets.Image)


def test_metadata_comes_back_with_the_version_of_this_code() -> None:
    schema = score_schema({"scorer": {"name": "clip"}, "schema_version": "0.3"})
    assert read_metadata(schema) == {"scorer": {"name": "clip"}, "schema_version": SCHEMA_VERSION}
    with pytest.raises(ValueError, match="no 'rlaif' metadata"):
        read_metadata(pa.schema([]))


def test_metadata_bytes_do_not_depend_on_the_order_of_keys() -> None:
    backwards = {key: METADATA[key] for key in reversed(METADATA)}
    ours, theirs = score_schema(METADATA), score_schema(backwards)
    assert ours.metadata == theirs.metadata


def test_score_columns_are_safe_names() -> None:
    assert score_column("hpsv2", 1) == "score_hpsv2_1"
    assert score_column("my-pkg.judges:Nice", 0) == "score_my_pkg_judges_nice_0"
    with pytest.raises(ValueError, match=r"\['a.b', 'a_b'\].*rename one"):
        pair_schema(16, None, ["a.b", "a_b"], {})


OTHER_STEPS = METADATA | {"generation": {"steps": 20, "guidance": 7.5}}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((8, None, ["clip"], METADATA), "column latent_0 is fixed_size_list<item: halffloat>[8], expected"),
        ((16, None, [], METADATA), "column score_clip_0 is missing, expected float"),
        ((16, 4, ["clip"], METADATA), "column prompt_embedding (fixed_size_list<item: halffloat>[4]) is not"),
        ((16, None, ["clip"], OTHER_STEPS), "metadata generation.steps is 20, expected 50"),
        ((16, None, ["clip"], METADATA | {"adapter": "x"}), 'metadata adapter is "x", expected absent'),
    ],
)
def test_a_schema_difference_names_the_column_or_the_metadata(found: tuple[Any, ...], message: str) -> None:
    schema = pair_schema(16, None, ["clip"], METADATA)
    assert schema_difference(schema, schema) is None
    assert message in str(schema_difference(pair_schema(*found), schema))


def test_order_and_nullability_are_differences_too() -> None:
    schema = score_schema({})
    backwards = pa.schema([schema.field(1), schema.field(0)], metadata=schema.metadata)
    assert "ordered ['score', 'candidate_id']" in str(schema_difference(backwards, schema))
    strict = schema.set(1, pa.field("score", pa.float32(), nullable=False))
    assert schema_difference(strict, schema) == "column score has nullable=False, expected True"


def test_an_unknown_major_version_is_refused_with_both_numbers() -> None:
    check_version("1.9")
    with pytest.raises(ValueError, match=r"schema version 2.0, this code reads 1.x"):
        check_version("2.0")
