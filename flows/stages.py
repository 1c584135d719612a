"""Each stage of a cycle as a flow and a deployment of its own: a step of the full cycle, or run alone.

    prefect deployment run generate/cycle --param cycle=workspace/default/cycles/0001

A stage takes the folder of a planned cycle, holds the lock of its experiment, does what is missing, and leaves what it
makes in the workspace. Run alone they go in the order generate, score, pair, train, evaluate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import flow

from tasks.compare_labels import compare_with_source
from tasks.evaluate import judge_models
from tasks.generate import generate_shard
from tasks.link import link_candidates
from tasks.models import collect, release
from tasks.pair import pair_candidates
from tasks.pictures import forget
from tasks.progress import show_logs
from tasks.record.plan import PlannedCycle
from tasks.record.workspace import EVALUATION_PARTS, Part, exclusive
from tasks.score import score_shard
from tasks.train import train_policy


@contextmanager
def open_stage(folder: Path) -> Iterator[PlannedCycle]:
    """The planned cycle in a folder, while nobody else works in its experiment. Raises ParameterError for no plan."""
    show_logs()
    cycle = PlannedCycle.open(folder.expanduser().resolve())
    with exclusive(cycle.experiment.folder):
        yield cycle


@flow(name="generate", flow_run_name="generate-{part}")
def generate(cycle: Path, part: Part = "candidates") -> None:
    """Draw the pictures of one part of a cycle, shard by shard.

    Args:
        cycle: folder of a planned cycle.
        part: candidates, base, tuned or control.
    """
    with open_stage(cycle) as planned:
        if part == "candidates":
            link_candidates(planned)
        for index in range(planned.shards(part)):
            generate_shard(planned, part, index)
        release()


@flow(name="score-candidates", flow_run_name="score-{part}")
def score(cycle: Path, part: Part = "candidates") -> None:
    """Score the pictures of one part with every scorer that the plan names for it.

    Args:
        cycle: folder of a planned cycle.
        part: candidates, base, tuned or control.
    """
    with open_stage(cycle) as planned:
        for scorer in planned.plan.scorer_names(part):
            for index in range(planned.shards(part)):
                score_shard(planned, part, scorer, index)
        release()
        forget()


@flow(name="pair", flow_run_name="pair")
def pair(cycle: Path) -> int:
    """Make and seal the preference shards; returns the number of pairs.

    Args:
        cycle: folder of a planned cycle whose candidates are scored.
    """
    with open_stage(cycle) as planned:
        pairs = pair_candidates(planned)
        compare_with_source(planned)
        return pairs


@flow(name="train-cycle", flow_run_name="train")
def train(cycle: Path) -> str:
    """Train on the cycle's preference shards; returns the training's folder.

    Args:
        cycle: folder of a planned cycle with sealed preferences.
    """
    with open_stage(cycle) as planned:
        train_policy(planned)
        collect()
        return str(planned.training)


@flow(name="evaluate", flow_run_name="evaluate")
def evaluate(cycle: Path) -> str:
    """Judge base against tuned model on the held-out prompts; returns the file of the results.

    Args:
        cycle: folder of a planned cycle with a trained model.
    """
    with open_stage(cycle) as planned:
        control = planned.plan.recipe.evaluation.null_control
        for part in EVALUATION_PARTS:
            if part != "control" or control:
                generate(cycle, part)
                score(cycle, part)
        judge_models(planned)
        return str(planned.results)
