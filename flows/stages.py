"""Each stage of a cycle as a flow of its own: a step of the full cycle, or run alone on a cycle's folder.

Stages run one after another and return nothing: what they make lies in the workspace.
"""

from pathlib import Path

from prefect import flow

from tasks.evaluate import Results, judge_models
from tasks.generate import generate_shard
from tasks.models import collect, release
from tasks.pair import pair_candidates
from tasks.pictures import forget
from tasks.record.plan import read_plan
from tasks.record.workspace import EVALUATION_PARTS, Cycle, Part
from tasks.relabel import compare_with_source, link_candidates
from tasks.score import score_shard
from tasks.train import train_policy
from training.loop.checkpoint import CheckpointRecord


@flow(name="generate", flow_run_name="generate-{part}")
def generate(cycle: Path, part: Part = "training") -> None:
    """Draw the candidates of one part of a cycle, shard by shard.

    Args:
        cycle: folder of a planned cycle.
        part: training, base, tuned or control.
    """
    where = Cycle(cycle)
    link_candidates(where)
    for index in range(read_plan(where).shards(part)):
        generate_shard(where, part, index)
    release()


@flow(name="score-candidates", flow_run_name="score-{part}")
def score(cycle: Path, part: Part = "training") -> None:
    """Score the candidates of one part with every scorer that the plan names for it.

    Args:
        cycle: folder of a planned cycle.
        part: training, base, tuned or control.
    """
    where = Cycle(cycle)
    plan = read_plan(where)
    for scorer in plan.scorer_names(part):
        for index in range(plan.shards(part)):
            score_shard(where, part, scorer, index)
    release()
    forget()


@flow(name="pair", flow_run_name="pair")
def pair(cycle: Path) -> int:
    """Make and seal the preference shards; returns the number of pairs.

    Args:
        cycle: folder of a planned cycle whose training part is scored.
    """
    pairs = pair_candidates(Cycle(cycle))
    compare_with_source(Cycle(cycle))
    return pairs


@flow(name="train-cycle", flow_run_name="train")
def train(cycle: Path) -> CheckpointRecord:
    """Train on the cycle's preference shards.

    Args:
        cycle: folder of a planned cycle with sealed preferences.
    """
    record = train_policy(Cycle(cycle))
    collect()
    return record


@flow(name="evaluate", flow_run_name="evaluate")
def evaluate(cycle: Path) -> Results:
    """Judge base against tuned model on the held-out prompts.

    Args:
        cycle: folder of a planned cycle with a trained model.
    """
    where = Cycle(cycle)
    control = read_plan(where).recipe.evaluation.null_control
    for part in EVALUATION_PARTS:
        if part != "control" or control:
            generate(cycle, part)
            score(cycle, part)
    return judge_models(where)
