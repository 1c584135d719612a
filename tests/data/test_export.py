"""Preference shards for the public scripts."""

from pathlib import Path

import pyarrow.parquet as pq

from data.export import PICKAPIC, export_pickapic
from tests.data.shard_world import png, row, seal


def test_the_pickapic_export_holds_bytes_and_no_ties(tmp_path: Path) -> None:
    """A public script reads label 0.5 as a win of side 0, and opens `jpg_0` from raw bytes."""
    seal(tmp_path, row(0, 1.0), row(1, 0.5), row(2, 0.0), row(3, None))
    found = pq.read_table(export_pickapic(tmp_path, tmp_path / "out" / "pairs.parquet")).to_pylist()
    assert [(r["caption"], r["label_0"], r["label_1"]) for r in found] == [
        ("prompt 0", 1, 0),
        ("prompt 2", 0, 1),
    ]
    assert found[1]["jpg_0"] == png(4) and found[1]["jpg_1"] == png(5)
    assert set(found[0]) == set(PICKAPIC.names)
    everything = pq.read_table(export_pickapic(tmp_path, tmp_path / "all.parquet", keep_ties=True))
    assert everything.column("label_0").to_pylist() == [1.0, 0.5, 0.0, None]
