"""Data sets on the hub as tables. `datasets` treats a folder as it treats a repository, so no network is needed."""

import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.hub import HubTable
from data.prompts import read_prompts

ROWS = [{"caption": f"row {index}", "number": index} for index in range(10)]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of a repository, with pictures as `datasets` stores them."""
    import datasets

    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()}).arrow_schema
    schema = features.append(pa.field("number", pa.int64()))
    rows = [row | {"image": {"bytes": png(), "path": None}} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "train.parquet", row_group_size=4)
    return folder


@pytest.mark.parametrize("streamed", [True, False])
def test_rows_from_any_row_on(streamed: bool, repository: Path) -> None:
    table = HubTable(str(repository), "train", streamed=streamed)
    assert table.columns == table.text_columns == ["caption", "image", "number"] and table.folder is None
    for start in (0, 3, 4, 9, 10, 12):
        assert list(table.rows(["caption", "number"], start)) == ROWS[start:]
        ((part, first),) = table.parts(start)
        assert (part, first) == (table, start)


@pytest.mark.parametrize("streamed", [True, False])
def test_pictures_stay_encoded(streamed: bool, repository: Path) -> None:
    row = next(HubTable(str(repository), "train", streamed=streamed).rows(["image"]))
    assert row == {"image": {"bytes": png(), "path": None}}


def test_the_identity_is_name_split_and_commit(repository: Path) -> None:
    table = HubTable(str(repository), "train", "c0ffee")
    assert table.identity() == {"hub": str(repository), "split": "train", "commit": "c0ffee"}
    assert pickle.loads(pickle.dumps(table)) == table


def test_a_data_set_that_cannot_be_read_is_named(repository: Path) -> None:
    for table in (HubTable(str(repository / "nowhere"), "train"), HubTable(str(repository), "test")):
        with pytest.raises(ValueError, match=rf"{table.name}, split {table.split}: \w+: "):
            _ = table.columns
        with pytest.raises(ValueError, match=rf"{table.name}, split {table.split}: \w+: "):
            next(table.rows(["caption"]))


def test_the_commit_is_the_newest_where_the_caller_asks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = "c0ffee"

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: Info())
    assert HubTable.newest("owner/name", "test") == HubTable("owner/name", "test", "c0ffee")


def test_prompts_of_a_data_set(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.parents[1])
    for source in ("owner/name", "owner/name:caption", "owner/name:caption[train]", "owner/name[train]"):
        assert set(read_prompts(source).values()) == {row["caption"] for row in ROWS}
    with pytest.raises(ValueError, match=r"prompts='owner/name:nope': no column 'nope'; there are caption, image"):
        read_prompts("owner/name:nope")
    with pytest.raises(ValueError, match=r"prompts='owner/name\[test\]': owner/name, split test: \w+: "):
        read_prompts("owner/name[test]")
