"""A deep check names the row that is unfit."""

from pathlib import Path
from typing import Any

import pytest

from data.ids import image_uid
from data.manifest import make_manifest, verify, write_manifest
from data.shards import ShardError, write_shard
from tests.data.shard_world import png, row, seal, table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_1": {"bytes": png(9), "path": None}}, "image_1 hashes to .*, image_1_uid says"),
        ({"image_0": {"bytes": b"?", "path": None}, "image_0_uid": image_uid(b"?")}, "does not decode"),
        ({"image_0": None}, "image_0 is null"),
        ({"caption": None}, "caption is null"),
        ({"score_clip_0": float("nan")}, "score_clip_0 is not finite"),
        ({"margin": float("inf")}, "margin is not finite"),
        ({"latent_1": [0, 0, float("nan"), 0]}, "latent_1 is not finite"),
        ({"label_0": 0.75, "label_1": 0.25}, "labels are 0.75 and 0.25, expected 0, 0.5 or 1"),
        ({"label_0": 1.0, "label_1": 1.0}, "labels are 1.0 and 1.0"),
        ({"soft_label_0": 0.75, "soft_label_1": 0.5}, "soft labels are 0.75 and 0.5, expected a probability"),
        ({"soft_label_0": 1.5, "soft_label_1": -0.5}, "soft labels are 1.5 and -0.5"),
        ({"soft_label_0": 1.0, "soft_label_1": None}, "soft labels are 1.0 and None"),
        ({"label_0": None, "label_1": None}, "has_label is true but label_0 is null"),
        ({"are_different": False}, "are_different is False, the image uids say True"),
        ({"pair_id": row(0)["pair_id"]}, "occurs twice, expected unique ids"),
    ],
)
def test_a_deep_check_names_the_unfit_row(changes: dict[str, Any], message: str, folder: Path) -> None:
    path = seal(folder, row(0), row(1, **changes), row(2, label=None, score_clip_0=None))
    verify(folder, "checksum")
    with pytest.raises(ShardError, match=f"{path.name}: row 1: .*{message}"):
        verify(folder, "deep")


def test_shards_of_schema_1_0_pass_the_deep_check(folder: Path) -> None:
    """They have no soft labels."""
    old = table(row(0)).drop_columns(["soft_label_0", "soft_label_1"])
    record = write_shard(folder / "a.arrow", old, old.schema)
    write_manifest(folder, make_manifest({"train": [record]}, "c", "now"))
    verify(folder, "deep")


def test_sound_rows_of_each_label_pass_the_deep_check(folder: Path) -> None:
    seal(folder, row(0, 1.0), row(1, 0.0), row(2, 0.5), row(3, None, margin=None, score_clip_1=None))
    assert verify(folder, "deep").rows == 4
