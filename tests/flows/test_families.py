"""A whole cycle on models that are no Stable Diffusion 1.x: what their networks take besides comes along."""

from pathlib import Path

import numpy as np
import pytest

from data.columns import latents
from data.manifest import verify
from data.schema import read_metadata
from data.shards import read_shard
from tasks.record.settings import GivenEvaluation, GivenGeneration, GivenTraining
from tests.families import FamilyBases
from training.loop.checkpoint import CheckpointRecord
from training.model.sampling import embed_prompts

SCHEDULERS = {"sdxl": "EulerDiscreteScheduler", "sd3": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pooled_embeddings_reach_the_pairs_and_the_training(
    tiny_preset: Path, bases: FamilyBases, tmp_path: Path, name: str
) -> None:
    from flows.full_cycle import full_cycle

    generation = GivenGeneration(
        scheduler=SCHEDULERS[name], scheduler_options={}, prompts_per_cycle=4, candidates=2, guidance=2.0
    )
    full_cycle(
        preset=str(tiny_preset), workspace=str(tmp_path), base_model=str(bases.folder(name)), scorer="hpsv2",
        generation=generation, training=GivenTraining(steps=2),
        evaluation=GivenEvaluation(max_prompts=10, null_control=False),
    )  # fmt: skip
    cycle = tmp_path / "default" / "cycles" / "0001"
    verify(cycle / "preferences", "deep")
    table = read_shard(next((cycle / "preferences").glob("*.arrow")))
    expected = embed_prompts(bases.ours(name), table["caption"].to_pylist())
    assert expected.pooled is not None and len(set(table["caption"].to_pylist())) > 1
    tokens = latents(table["prompt_embedding"]).reshape(expected.tokens.shape).astype(np.float32)
    np.testing.assert_allclose(tokens, expected.tokens.float().numpy(), atol=2e-3)
    np.testing.assert_allclose(
        latents(table["pooled_embedding"]).astype(np.float32), expected.pooled.float(), atol=2e-3
    )
    assert read_metadata(table.schema)["embedding"]["shape"] == list(expected.tokens.shape[1:])
    record = CheckpointRecord.read(cycle / "training")
    assert record is not None and record.pairs == 4 and record.metrics["grad_norm"] > 0
    assert (cycle / "finished.json").is_file()
