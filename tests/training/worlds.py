"""A tiny base model and a sealed preference folder of random latents, for the tests of the trainer."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.manifest import make_manifest, write_manifest
from data.preference_rows import Pairs, Side, preference_table
from data.schema import pair_schema
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
        rows = preference_table(_pairs(rng, count // shards, index, shapes, soft), schema)
        records.append(write_shard(folder / f"{index:05d}-of-{shards:05d}.arrow", rows, schema))
    write_manifest(folder, make_manifest({"train": records}, "test", "2026-01-01T00:00:00+00:00"))
    return folder


def _pairs(rng: np.random.Generator, rows: int, shard: int, shapes: Shapes, soft: bool) -> Pairs:
    images = [[picture(rng) for _ in range(rows)] for _ in range(2)]
    winner = rng.integers(0, 2, rows)
    sure = np.linspace(0.6, 0.95, rows)  # P(winner preferred)
    embeddings = rng.normal(size=(rows, *shapes.embedding))
    latents = [rng.normal(size=(rows, *shapes.latent)) for _ in range(2)]
    pooled = rng.normal(size=(rows, shapes.pooled)) if shapes.pooled else None
    time_ids = [rng.integers(0, 1024, (rows, 6)).tolist() if shapes.time_ids else None for _ in range(2)]
    sides = [
        Side(
            images=images[side],
            latents=latents[side],
            seeds=[side] * rows,
            models=["m"] * rows,
            time_ids=time_ids[side],
        )
        for side in (0, 1)
    ]
    return Pairs(
        prompt_ids=[f"{shard}-{row}" for row in range(rows)],
        captions=[f"a picture of {shard} {row} things" for row in range(rows)],
        sides=(sides[0], sides[1]),
        label_0=[float(side == 0) for side in winner],
        soft_label_0=np.where(winner == 0, sure, 1 - sure).tolist() if soft else None,
        margins=np.linspace(0.5, 3.5, rows),
        config_hashes=["c"] * rows,
        prompt_embeddings=embeddings,
        pooled_embeddings=pooled,
    )


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
