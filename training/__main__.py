"""One training by hand, in as many processes as a launcher starts: `accelerate launch -m training plan.json`.

`plan.json` is what `TrainingPlan.write` wrote; the flow leaves one beside every training. Data parallel, or with the
weights divided among the processes (`"shard": true` in the plan, or `accelerate launch --use_fsdp --fsdp_version 2`);
DeepSpeed is refused.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from training.loop.trainer import Metrics, train
from training.plan import TrainingPlan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="a plan.json")
    parser.add_argument("--parent", type=int, help="end when this process is gone")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    plan = TrainingPlan.read(given.plan)
    from tqdm import tqdm

    first_process = int(os.environ.get("RANK", "0")) == 0
    with tqdm(total=plan.training.steps, unit="step", disable=given.quiet or not first_process) as bar:

        def on_step(step: int, metrics: Metrics) -> None:
            if given.parent and not _alive(given.parent):
                raise SystemExit(f"process {given.parent}, which began this training, is gone")
            bar.set_postfix(loss=f"{metrics['loss']:.4f}")
            bar.update(step - bar.n)

        train(plan, on_step)
    return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
