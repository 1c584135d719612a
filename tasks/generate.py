"""Draws the candidates of one shard and publishes them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from prefect import task

from data.columns import latent_column
from data.ids import candidate_id, image_uid, seed_for
from data.pictures import encode_image
from data.schema import IMAGE, candidate_schema
from data.shards import adopt_shard, write_shard
from tasks.models import absolute, pipeline_for
from tasks.pictures import keep
from tasks.progress import progress
from tasks.record.plan import Plan, read_drawn_prompts, read_plan
from tasks.record.workspace import Cycle, Part
from training.loop.checkpoint import CheckpointRecord
from training.model.family import PromptEmbeddings
from training.model.reference import ModelRef
from training.model.sampling import Sampler, embed_prompts, negative_prompt, sample_images

log = logging.getLogger(__name__)


@task(task_run_name="generate-{part}-{index:05d}")
def generate_shard(cycle: Cycle, part: Part, index: int) -> bool:
    """Publish one shard of candidates; True when it was drawn now, False when it lay there complete.

    The embeddings go first, so that a visible candidate shard always has its embeddings beside it.
    """
    plan = read_plan(cycle)
    target = cycle.part(part, plan.shards(part))
    prompts = shard_prompts(plan, cycle, part, index)
    rows = len(prompts) * plan.images_per_prompt(part)
    if adopt_shard(target.candidates(index), None, rows):
        log.info("%s: complete, kept", target.candidates(index))
        return False
    model, label = part_model(plan, cycle, part)
    execution = plan.recipe.execution
    pipeline = pipeline_for(absolute(model, cycle.folder.parent.parent), execution.device, execution.dtype)
    embeddings = embed_prompts(pipeline, [text for _, text in prompts])
    negative = negative_prompt(pipeline)
    repeated = embeddings.repeat_interleave(plan.images_per_prompt(part))
    seeds = shard_seeds(plan, prompts, part)
    with progress(f"generate {part} shard {index + 1}/{plan.shards(part)}", rows, "image") as advance:
        latents, images = sample_images(
            pipeline, repeated, negative, seeds, plan_sampler(plan), execution.batch_size, advance
        )
    if part == "training":
        write_embeddings(cycle, plan, index, prompts, embeddings)
    metadata = {"latent": {"shape": list(latents.shape[1:])}, "model": label, **generation_metadata(plan)}
    table = candidate_table(plan, part, prompts, seeds, label, latents.numpy(), images)
    schema = candidate_schema(latents[0].numel(), metadata)
    write_shard(target.candidates(index), table.cast(schema), schema)
    keep(target.candidates(index), images, plan.recipe.generation.image_format)
    return True


def shard_prompts(plan: Plan, cycle: Cycle, part: Part, index: int) -> list[tuple[str, str]]:
    """(id, text) of the prompts of one shard: a function of the plan, so a shard can be made again alone."""
    count = plan.prompts_per_shard(part)
    return read_drawn_prompts(cycle, part)[index * count : (index + 1) * count]


def shard_seeds(plan: Plan, prompts: Sequence[tuple[str, str]], part: Part) -> list[int]:
    """A seed a picture. base and tuned share theirs; control has others (candidate index 1 instead of 0)."""
    first = 1 if part == "control" else 0
    indices = range(first, first + plan.images_per_prompt(part))
    purpose = "" if part == "training" else "evaluation:"
    return [seed_for(plan.cycle_seed, purpose + key, index) for key, _ in prompts for index in indices]


def part_model(plan: Plan, cycle: Cycle, part: Part) -> tuple[ModelRef, str]:
    """The model that draws a part, paths relative to the experiment, and its name in the shards."""
    if part != "tuned":
        return ModelRef.read(plan.start), plan.start_label
    record = CheckpointRecord.read(cycle.training)
    if record is None:
        raise FileNotFoundError(f"{cycle.training}: training is not finished; run the train stage first")
    return trained_model(plan, cycle, record)


def trained_model(plan: Plan, cycle: Cycle, record: CheckpointRecord) -> tuple[ModelRef, str]:
    """What the cycle trained, with paths relative to the experiment's folder."""
    start = ModelRef.read(plan.start)
    made = "adapter" if record.method == "lora" else Path(str(record.model.network)).name
    trained = str((cycle.training / made).relative_to(cycle.folder.parent.parent))
    model = ModelRef(start.base, start.revision, start.network, trained)
    if record.method == "full":
        model = ModelRef(start.base, start.revision, trained, None)
    return model, f"{plan.recipe.base_model}+{record.sha256[:12]}"


def plan_sampler(plan: Plan) -> Sampler:
    generation = plan.recipe.generation
    return Sampler(
        scheduler=generation.scheduler, steps=generation.steps, guidance=generation.guidance,
        options=generation.scheduler_options, height=generation.height or None, width=generation.width or None,
    )  # fmt: skip


def generation_metadata(plan: Plan) -> dict[str, object]:
    """Provenance that every shard of a cycle carries in its schema."""
    recipe = plan.recipe
    return {
        "base_model": {"id": recipe.base_model, "revision": recipe.revision},
        "config_hash": plan.config_hash(),
        "generation": recipe.generation.model_dump(),
        "code": plan.code,
    }


def write_embeddings(
    cycle: Cycle, plan: Plan, index: int, prompts: Sequence[tuple[str, str]], embeddings: PromptEmbeddings
) -> None:
    """One row a prompt: the text encoders' output, from which pairing copies it into the preference shards."""
    parts = {"embedding": embeddings.tokens, "pooled": embeddings.pooled}
    kept = {name: part for name, part in parts.items() if part is not None}
    schema = pa.schema(
        [("prompt_id", pa.string()), *((name, pa.list_(pa.float16(), part[0].numel())) for name, part in kept.items())],
        metadata=candidate_schema(1, {"embedding": {"shape": list(embeddings.tokens.shape[1:])}}).metadata,
    )
    vectors = [latent_column(part.cpu().numpy()) for part in kept.values()]
    columns = [pa.array([key for key, _ in prompts]), *vectors]
    target = cycle.part("training", plan.shards("training")).embeddings(index)
    write_shard(target, pa.table(columns, schema=schema), schema)


def candidate_table(
    plan: Plan,
    part: Part,
    prompts: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    label: str,
    latents: np.ndarray,
    images: np.ndarray,
) -> pa.Table:
    """The rows of a candidate shard: every prompt's candidates one after another."""
    each = plan.images_per_prompt(part)
    rows = [(key, text, index) for key, text in prompts for index in range(each)]
    encoded = [encode_image(image, plan.recipe.generation.image_format) for image in images]
    config = plan.config_hash()
    return pa.table(
        {
            "candidate_id": [
                candidate_id(key, seed, label, config) for (key, _, _), seed in zip(rows, seeds, strict=True)
            ],
            "prompt_id": [key for key, _, _ in rows],
            "caption": [text for _, text, _ in rows],
            "candidate_index": pa.array([index for _, _, index in rows], pa.int32()),
            "image": pa.array([{"bytes": data, "path": None} for data in encoded], IMAGE),
            "image_uid": [image_uid(data) for data in encoded],
            "latent": latent_column(latents),
            "seed": pa.array(seeds, pa.int64()),
            "model": [label] * len(rows),
            "config_hash": [config] * len(rows),
        }
    )
