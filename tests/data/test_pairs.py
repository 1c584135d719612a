"""The ids, the schemas, and what makes a row trainable or unfit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from data.columns import latent_column, latents, trainable
from data.ids import candidate_id, image_uid, pair_id, prompt_id, score_column, seed_for
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


def labels(*rows: tuple[bool, bool, float | None]) -> pa.Table:
    has_label, different, label = zip(*rows, strict=True)
    columns = {"has_label": has_label, "are_different": different, "label_0": pa.array(label, pa.float32())}
    return pa.table(columns)


def test_prompt_id_ignores_outer_space_and_the_way_an_accent_is_composed() -> None:
    assert prompt_id("  cafe\u0301\n") == prompt_id("caf\u00e9")
    assert prompt_id("a red circle") != prompt_id("a red  circle")


def test_ids_never_change() -> None:
    """Folders on disk are keyed by these: another value would orphan every published shard."""
    assert prompt_id("a red circle") == "a1e4a280d27cad5b"
    assert candidate_id("p", 7, "base@1", "c") == "d5ef3853de0bf669880b5accfcbbbdbe"
    assert pair_id("p", 7, 8, "base@1", "base@1", "c") == "733a16b07d9d59a8e09beb0bbfd0fe11"
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


def test_trainable_rows_have_a_decision_between_different_images_that_is_no_tie() -> None:
    rows = [(True, True, 1.0), (True, True, 0.0), (True, True, 0.5), (True, False, 1.0)]
    table = labels(*rows, (False, True, 1.0), (True, True, None), (False, True, None))
    assert trainable(table).to_pylist() == [True, True, False, False, False, False, False]
    assert table.filter(trainable(table)).column("label_0").to_pylist() == [1.0, 0.0]
    batch = table.to_batches()[0]
    assert batch.filter(trainable(batch)).num_rows == 2


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


def test_latents_of_a_slice_are_the_rows_of_the_slice_and_a_view() -> None:
    """`FixedSizeListArray.values` ignores the offset and would return row 0 for row 2."""
    values = np.arange(20, dtype=np.float16).reshape(5, 4)
    column = latent_column(values)
    assert np.array_equal(latents(column), values)
    assert np.array_equal(latents(column.slice(2, 2)), values[2:4])
    assert latents(column.slice(2)).ctypes.data == latents(column).ctypes.data + 2 * 4 * 2
    assert np.array_equal(latents(pa.chunked_array([column.slice(3), column.slice(0, 1)])), values[[3, 4, 0]])
    assert latents(column.slice(5)).shape == (0, 4)
    assert latents(pa.chunked_array([], column.type)).shape == (0, 4)


def test_null_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="found null among 2 latents"):
        latents(pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)))


def test_importing_the_contract_loads_no_heavy_module() -> None:
    heavy = {"torch", "prefect", "PIL", "pandas"}
    code = f"import sys, data.card; print(sorted({heavy} & sys.modules.keys()))"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout == "[]\n"
