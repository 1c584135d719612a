"""A folder is sealed by its manifest, after its card."""

from pathlib import Path

import pytest

import data.sealing
from data.manifest import MANIFEST, read_manifest, verify
from data.sealing import seal
from data.shards import ShardError, write_shard
from tests.data.shard_world import METADATA, SCHEMA, contents, row, table


def test_card_and_manifest_tell_of_the_same_data_set(folder: Path) -> None:
    record = write_shard(folder / "0.arrow", table(row(0)), SCHEMA)
    seal(folder, {"train": [record]}, "c0ffee", METADATA)
    manifest, card = verify(folder, "deep"), (folder / "README.md").read_text()
    assert manifest.rows == 1 and manifest.config_hash == "c0ffee"
    assert f"| data set id | {manifest.dataset_id} |" in card and f"sealed {manifest.created_at}" in card


@pytest.mark.parametrize("failing", ["write_text", "write_manifest"])
def test_what_is_not_finished_is_not_sealed(failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card comes first: where the manifest is, everything is."""

    def fail(*_: object) -> None:
        raise OSError("no space left")

    record = write_shard(folder / "0.arrow", table(row(0)), SCHEMA)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(data.sealing, failing, fail)
        seal(folder, {"train": [record]}, "c0ffee", METADATA)
    assert MANIFEST not in contents(folder) and ("README.md" in contents(folder)) == (failing == "write_manifest")
    with pytest.raises(ShardError, match="the data set is unfinished"):
        read_manifest(folder)
