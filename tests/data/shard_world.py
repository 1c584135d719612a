"""A preference folder of three shards of seventy pairs, for the tests of shards, manifests and cards."""

import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data.columns import latent_column
from data.ids import image_uid, pair_id, prompt_id
from data.manifest import make_manifest, write_manifest
from data.schema import pair_schema
from data.shards import adopt_shard, write_shard

METADATA = {"config_hash": "c0ffee", "scorers": [{"name": "clip", "version": "1", "unit": "cosine"}]}


SCHEMA = pair_schema(4, 2, ["clip"], METADATA)


SHARDS, ROWS = 3, 70


@functools.cache
def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (index % 256, index // 256, 7)).save(file, "PNG")
    return file.getvalue()


def row(index: int, label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    prompt, data = prompt_id(f"prompt {index}"), [png(2 * index), png(2 * index + 1)]
    found: dict[str, Any] = {"pair_id": pair_id(prompt, 0, 1, "m", "m", "c"), "prompt_id": prompt}
    found |= {"caption": f"prompt {index}", "prompt_embedding": [0.5, index], "config_hash": "c"}
    for side in (0, 1):
        found |= {
            f"image_{side}": {"bytes": data[side], "path": None},
            f"seed_{side}": side,
            f"model_{side}": "m",
        }
        found |= {f"image_{side}_uid": image_uid(data[side]), f"latent_{side}": [index, side, 0, -1]}
        found |= {f"score_clip_{side}": 0.25 - side, f"label_{side}": label and abs(side - label)}
    found |= {
        "label_0": label,
        "label_1": None if label is None else 1 - label,
        "soft_label_0": None if label is None else 0.25 + label / 2,
        "soft_label_1": None if label is None else 0.75 - label / 2,
        "has_label": label is not None,
    }
    return found | {"are_different": True, "margin": 1.25} | changes


def table(*rows: dict[str, Any]) -> pa.Table:
    columns = {name: [r[name] for r in rows] for name in SCHEMA.names}
    halves = {name for name in SCHEMA.names if pa.types.is_fixed_size_list(SCHEMA.field(name).type)}
    arrays = {name: np.array(columns[name], np.float16) for name in halves}
    built = [latent_column(arrays[f.name]) if f.name in halves else pa.array(columns[f.name], f.type) for f in SCHEMA]
    return pa.Table.from_arrays(built, schema=SCHEMA)


@functools.cache
def shard_rows(index: int) -> pa.Table:
    return table(*(row(index * ROWS + i) for i in range(ROWS)))


def build(folder: Path, step: Callable[[], None] = lambda: None) -> None:
    """What a resumable stage does: adopt what is there, write the rest, seal."""
    records = []
    for index in range(SHARDS):
        path = folder / f"{index:05d}-of-{SHARDS:05d}.arrow"
        adopted = adopt_shard(path, SCHEMA, ROWS)
        records.append(adopted or write_shard(path, paced(shard_rows(index), step), SCHEMA))
    write_manifest(folder, make_manifest({"train": records}, "c0ffee", "2026-01-01T00:00:00Z"))


def paced(rows: pa.Table, step: Callable[[], None]) -> Iterator[pa.RecordBatch]:
    for batch in rows.to_batches(max_chunksize=20):
        step()
        yield batch


def seal(folder: Path, *rows: dict[str, Any]) -> Path:
    """A complete data set of one shard."""
    record = write_shard(folder / "00000-of-00001.arrow", table(*rows), SCHEMA)
    write_manifest(folder, make_manifest({"train": [record]}, "c0ffee", "2026-01-01T00:00:00Z"))
    return folder / "00000-of-00001.arrow"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FIRST = "00000-of-00003.arrow"
