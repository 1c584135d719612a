"""A tiny base model and a sealed preference folder of random latents, for the tests of the trainer."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from data.columns import latent_column
from data.ids import image_uid, pair_id
from data.manifest import make_manifest, write_manifest
from data.schema import IMAGE, pair_schema
from data.shards import write_shard
from tests.tiny import save_pipeline
from training.adapter.lora import Lora
from training.model.reference import ModelRef
from training.plan import TrainingPlan

LATENT, EMBEDDING = (4, 8, 8), (77, 16)


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Shapes(NamedTuple):
    """Of what the pairs hold: latents, embeddings, pooled embeddings (None: without), and whether time ids are told."""

    latent: tuple[int, ...]
    embedding: tuple[int, int]
    pooled: int | None = None
    time_ids: bool = False


def save_pairs(
    folder: Path, count: int = 12, seed: int = 0, shards: int = 2, soft: bool = True, shapes: Shapes | None = None
) -> Path:
    """`count` pairs with random latents and embeddings; winners on either side. soft: whether with soft labels."""
    rng = np.random.default_rng(seed)
    shapes = shapes or Shapes(LATENT, EMBEDDING)
    metadata = {"latent": {"shape": list(shapes.latent)}, "embedding": {"shape": list(shapes.embedding)}}
    schema = pair_schema(
        int(np.prod(shapes.latent)), int(np.prod(shapes.embedding)), [], metadata, shapes.pooled, shapes.time_ids
    )
    records = []
    for index in range(shards):
        columns = _columns(rng, count // shards, index, shapes)
        if not soft:
            columns |= {f"soft_label_{side}": pa.nulls(count // shards, pa.float32()) for side in (0, 1)}
        table = pa.table(columns).select(schema.names).cast(schema)
        records.append(write_shard(folder / f"{index:05d}-of-{shards:05d}.arrow", table, schema))
    write_manifest(folder, make_manifest({"train": records}, "test", "2026-01-01T00:00:00+00:00"))
    return folder


def _columns(rng: np.random.Generator, rows: int, shard: int, shapes: Shapes) -> dict[str, object]:
    images = [[picture(rng) for _ in range(rows)] for _ in range(2)]
    winner = rng.integers(0, 2, rows)
    sure = np.linspace(0.6, 0.95, rows)  # P(winner preferred)
    columns: dict[str, object] = {
        "pair_id": [pair_id(f"{shard}-{row}", 0, 1, "m", "m", "c") for row in range(rows)],
        "prompt_id": [f"{shard}-{row}" for row in range(rows)],
        "caption": [f"a picture of {shard} {row} things" for row in range(rows)],
        "prompt_embedding": latent_column(rng.normal(size=(rows, *shapes.embedding))),
        "has_label": [True] * rows,
        "are_different": [True] * rows,
        "margin": pa.array(np.linspace(0.5, 3.5, rows), pa.float32()),
        "config_hash": ["c"] * rows,
    }
    for side in (0, 1):
        columns |= {
            f"image_{side}": pa.array([{"bytes": data, "path": None} for data in images[side]], IMAGE),
            f"image_{side}_uid": [image_uid(data) for data in images[side]],
            f"latent_{side}": latent_column(rng.normal(size=(rows, *shapes.latent))),
            f"seed_{side}": [side] * rows,
            f"model_{side}": ["m"] * rows,
            f"label_{side}": pa.array((winner == side).astype(np.float32)),
            f"soft_label_{side}": pa.array(np.where(winner == side, sure, 1 - sure).astype(np.float32)),
        }
    if shapes.pooled:
        columns["pooled_embedding"] = latent_column(rng.normal(size=(rows, shapes.pooled)))
    if shapes.time_ids:
        columns |= {f"time_ids_{side}": _time_ids(rng, rows) for side in (0, 1)}
    return columns


def _time_ids(rng: np.random.Generator, rows: int) -> pa.Array:
    """Some size and crop for each picture."""
    return pa.array(rng.integers(0, 1024, (rows, 6)).tolist(), pa.list_(pa.int32(), 6))


def make_plan(folder: Path, shapes: Shapes | None = None, **changes: object) -> TrainingPlan:
    """A plan of a few quick steps on a tiny model; saves what it needs, and is not there, under `folder`."""
    base, pairs = folder / "base", folder / "pairs"
    if not base.is_dir():
        save_pipeline(base)
    if not pairs.is_dir():
        save_pairs(pairs, shapes=shapes)
    values: dict[str, object] = {
        "model": ModelRef(str(base)), "pairs": str(pairs), "output": str(folder / "out"), "method": "lora",
        "lora": Lora(4, 4.0), "steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3,
        "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "beta": 2000.0, "checkpoint_every": 2, "seed": 0,
        "device": "cpu", **changes,
    }  # fmt: skip
    plain = {name: asdict(value) if isinstance(value, ModelRef | Lora) else value for name, value in values.items()}
    return TrainingPlan.from_dict(plain)
