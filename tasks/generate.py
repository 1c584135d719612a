"""Draws the pictures of one shard of a cycle and publishes them."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from prefect import task

from data.columns import latent_column
from data.ids import candidate_id, image_uid
from data.pictures import encode_image
from data.schema import IMAGE, candidate_schema
from data.shards import adopt_shard, write_shard
from tasks.models import pipeline_for
from tasks.pictures import keep
from tasks.progress import progress
from tasks.record.plan import PlannedCycle, Prompt
from tasks.record.workspace import Part
from training.model.family import PromptEmbeddings
from training.model.sampling import embed_prompts, negative_prompt, sample_images

log = logging.getLogger(__name__)


@task(task_run_name="generate-{part}-{index:05d}")
def generate_shard(cycle: PlannedCycle, part: Part, index: int) -> bool:
    """Publish one shard of pictures; True when it was drawn now, False when it lay there complete.

    The embeddings go first, so that a visible candidate shard always has its embeddings beside it.
    """
    plan, target = cycle.plan, cycle.part(part)
    prompts, each = cycle.shard_prompts(part, index), cycle.images_per_prompt(part)
    rows = len(prompts) * each
    if adopt_shard(target.candidates(index), None, rows):
        log.info("%s: complete, kept", target.candidates(index))
        return False
    model, label = cycle.drawn_by(part)
    execution = plan.recipe.execution
    pipeline = pipeline_for(model, execution.device, execution.dtype)
    embeddings = embed_prompts(pipeline, [prompt.text for prompt in prompts])
    negative, seeds = negative_prompt(pipeline), cycle.seeds(part, prompts)
    with progress(f"generate {part} shard {index + 1}/{target.shards}", rows, "image") as advance:
        latents, images = sample_images(
            pipeline, embeddings.repeat_interleave(each), negative, seeds, plan.sampler(), execution.batch_size, advance
        )
    if part == "candidates":
        write_embeddings(cycle, index, prompts, embeddings)
    metadata = {"latent": {"shape": list(latents.shape[1:])}, "model": label, **plan.provenance()}
    schema = candidate_schema(latents[0].numel(), metadata)
    table = candidate_table(cycle, part, prompts, seeds, label, latents.numpy(), images)
    write_shard(target.candidates(index), table.cast(schema), schema)
    keep(target.candidates(index), images, plan.recipe.generation.image_format)
    return True


def write_embeddings(cycle: PlannedCycle, index: int, prompts: Sequence[Prompt], embeddings: PromptEmbeddings) -> None:
    """One row a prompt: the text encoders' output, from which pairing copies it into the preference shards."""
    parts = {"embedding": embeddings.tokens, "pooled": embeddings.pooled}
    kept = {name: part for name, part in parts.items() if part is not None}
    schema = pa.schema(
        [("prompt_id", pa.string()), *((name, pa.list_(pa.float16(), part[0].numel())) for name, part in kept.items())],
        metadata=candidate_schema(1, {"embedding": {"shape": list(embeddings.tokens.shape[1:])}}).metadata,
    )
    vectors = [latent_column(part.cpu().numpy()) for part in kept.values()]
    columns = [pa.array([prompt.id for prompt in prompts]), *vectors]
    write_shard(cycle.part("candidates").embeddings(index), pa.table(columns, schema=schema), schema)


def candidate_table(
    cycle: PlannedCycle,
    part: Part,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    label: str,
    latents: np.ndarray,
    images: np.ndarray,
) -> pa.Table:
    """The rows of a candidate shard: every prompt's pictures one after another."""
    each, config = cycle.images_per_prompt(part), cycle.plan.config_hash()
    rows = [(prompt, index) for prompt in prompts for index in range(each)]
    encoded = [encode_image(image, cycle.plan.recipe.generation.image_format) for image in images]
    ids = [candidate_id(prompt.id, seed, label, config) for (prompt, _), seed in zip(rows, seeds, strict=True)]
    return pa.table(
        {
            "candidate_id": ids,
            "prompt_id": [prompt.id for prompt, _ in rows],
            "caption": [prompt.text for prompt, _ in rows],
            "candidate_index": pa.array([index for _, index in rows], pa.int32()),
            "image": pa.array([{"bytes": data, "path": None} for data in encoded], IMAGE),
            "image_uid": [image_uid(data) for data in encoded],
            "latent": latent_column(latents),
            "seed": pa.array(seeds, pa.int64()),
            "model": [label] * len(rows),
            "config_hash": [config] * len(rows),
        }
    )
