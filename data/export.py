"""Preference shards under the names and types of Pick-a-Pic, for the public Diffusion-DPO scripts."""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data.columns import trainable
from data.files import StrPath, published
from data.manifest import verify
from data.shards import batches_of


def export_pickapic(folder_in: StrPath, path_out: StrPath, keep_ties: bool = False) -> Path:
    """A sealed data set as one Parquet file with the columns that public Diffusion-DPO scripts read.

    The images are plain bytes, because those scripts decode them themselves. Only trainable rows go out,
    because one of the scripts takes a tie for a win of side 0; `keep_ties=True` exports every row.
    """
    from pyarrow import parquet

    path, manifest = Path(path_out), verify(folder_in, "checksum")
    with published(path) as file, parquet.ParquetWriter(file, PICKAPIC) as writer:
        files = [Path(folder_in) / shard.file for shard in manifest.shards]
        for batch in itertools.chain.from_iterable(map(batches_of, files)):
            kept = batch if keep_ties else batch.filter(trainable(batch))
            if kept.num_rows:
                writer.write_batch(pickapic_rows(kept))
    return path


PICKAPIC = pa.schema(
    [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary())]
    + [("label_0", pa.float64()), ("label_1", pa.float64())]
    + [("has_label", pa.bool_()), ("are_different", pa.bool_())]
    + [(name, pa.string()) for name in ("model_0", "model_1", "image_0_uid", "image_1_uid")]
)
"""The columns of Pick-a-Pic that say something about a pair; images as plain bytes of any codec."""


def pickapic_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a preference batch under the names and types of Pick-a-Pic."""
    images = {f"jpg_{side}": pc.struct_field(batch.column(f"image_{side}"), "bytes") for side in (0, 1)}
    columns = [images[name] if name in images else batch.column(name) for name in PICKAPIC.names]
    arrays = [column.cast(field.type) for column, field in zip(columns, PICKAPIC, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=PICKAPIC)
