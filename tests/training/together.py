"""Trains in several processes at once, as `torchrun -m training plan.json` does, without its imports and its launcher.

`test_run_options` has the launcher itself.
"""

import json
import sys
from pathlib import Path

from tests.processes import run_together
from training.plan import TrainingPlan


def train_in_two(plan: TrainingPlan) -> list[dict[str, float]]:
    """The metrics of each step."""
    output = Path(plan.output)
    output.mkdir(parents=True, exist_ok=True)
    plan.write(output / "plan.json")
    run_together(2, _train, str(output / "plan.json"), log=output / "processes.log", environment={})
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _train(plan: str) -> None:
    from training.__main__ import main

    sys.argv = ["training", plan, "--quiet"]
    assert main() == 0
