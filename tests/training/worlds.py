"""A tiny base model and a sealed preference folder of random latents, for the tests of the trainer."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from tests.tiny import save_pipeline
from training.models import ModelRef
from training.pairs import IMAGE, image_uid, latent_column, pair_id, pair_schema
from training.plan import TrainingPlan
from training.policy import Lora
from training.shards import write_manifest, write_shard

LATENT, EMBEDDING = (4, 8, 8), (77, 16)


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def save_pairs(folder: Path, count: int = 12, seed: int = 0, shards: int = 2, soft: bool = True) -> Path:
    """`count` pairs with random latents and embeddings; winners on either side. soft: whether with soft labels."""
    rng = np.random.default_rng(seed)
    metadata = {"latent": {"shape": list(LATENT)}, "embedding": {"shape": list(EMBEDDING)}}
    schema = pair_schema(int(np.prod(LATENT)), int(np.prod(EMBEDDING)), [], metadata)
    records = []
    for index in range(shards):
        columns = _columns(rng, count // shards, index)
        if not soft:
            columns |= {f"soft_label_{side}": pa.nulls(count // shards, pa.float32()) for side in (0, 1)}
        table = pa.table(columns).select(schema.names).cast(schema)
        records.append(write_shard(folder / f"{index:05d}-of-{shards:05d}.arrow", table, schema))
    write_manifest(folder, {"train": records}, "test", "2026-01-01T00:00:00+00:00")
    return folder


def _columns(rng: np.random.Generator, rows: int, shard: int) -> dict[str, object]:
    images = [[picture(rng) for _ in range(rows)] for _ in range(2)]
    winner = rng.integers(0, 2, rows)
    sure = np.linspace(0.6, 0.95, rows)  # P(winner preferred)
    columns: dict[str, object] = {
        "pair_id": [pair_id(f"{shard}-{row}", 0, 1, "m", "m", "c") for row in range(rows)],
        "prompt_id": [f"{shard}-{row}" for row in range(rows)],
        "caption": ["a picture"] * rows,
        "prompt_embedding": latent_column(rng.normal(size=(rows, *EMBEDDING))),
        "has_label": [True] * rows,
        "are_different": [True] * rows,
        "margin": pa.array(np.linspace(0.5, 3.5, rows), pa.float32()),
        "config_hash": ["c"] * rows,
    }
    for side in (0, 1):
        columns |= {
            f"image_{side}": pa.array([{"bytes": data, "path": None} for data in images[side]], IMAGE),
            f"image_{side}_uid": [image_uid(data) for data in images[side]],
            f"latent_{side}": latent_column(rng.normal(size=(rows, *LATENT))),
            f"seed_{side}": [side] * rows,
            f"model_{side}": ["m"] * rows,
            f"label_{side}": pa.array((winner == side).astype(np.float32)),
            f"soft_label_{side}": pa.array(np.where(winner == side, sure, 1 - sure).astype(np.float32)),
        }
    return columns


def make_plan(folder: Path, **changes: object) -> TrainingPlan:
    """A plan of a few quick steps on a tiny model; saves what it needs under `folder`."""
    base, pairs = folder / "base", folder / "pairs"
    if not base.is_dir():
        save_pipeline(base)
    if not pairs.is_dir():
        save_pairs(pairs)
    values: dict[str, object] = {
        "model": ModelRef(str(base)), "pairs": str(pairs), "output": str(folder / "out"), "method": "lora",
        "lora": Lora(4, 4.0), "steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3,
        "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "beta": 2000.0, "checkpoint_every": 2, "seed": 0,
        "device": "cpu",
    }  # fmt: skip
    return TrainingPlan(**{**values, **changes})  # type: ignore[arg-type]
