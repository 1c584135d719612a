"""Training on preference shards: the loop, its checkpoints and its metrics. In one process or in several."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from data.files import write_text
from training.loop.checkpoint import CheckpointRecord
from training.loop.diagnostics import TrainingDiverged
from training.loop.metrics import Metrics
from training.loop.run import Run
from training.loop.start import watch_of
from training.loop.trackers import tracking
from training.plan import TrainingPlan

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
MAX_SKIPPED = 20
"""A float16 gradient may overflow while the loss scale is being found; so many in a row mean that it never fits."""


def train(plan: TrainingPlan, on_step: Callable[[int, Metrics], None] = lambda step, metrics: None) -> CheckpointRecord:
    """Train, or finish a training that was interrupted; a finished one is returned as it is.

    on_step(steps done, metrics) is called after every optimizer step, in the first process.
    Raises ShardError for unusable pairs, ValueError for options that the loss does not take, and TrainingDiverged when
    `training.loop.diagnostics.Watch` says so; the checkpoints from before are kept.
    """
    output = Path(plan.output)
    finished = CheckpointRecord.read(output)
    if finished:
        return finished
    output.mkdir(parents=True, exist_ok=True)
    run, history = Run(plan), _read_metrics(output)
    first = run.resume(output, len(history))
    history = history[:first]  # the steps after the checkpoint are done, and written, again
    watch = watch_of(plan)
    watch.replay(history)
    with _Log(output / METRICS, history, run.first_process) as log, _tracking(plan, first) as track:
        for step in range(first, plan.training.steps):
            metrics = run.step(step)
            for warning in watch.observe(metrics):
                logger.warning(warning)
            if all(m["skipped"] for m in [*history[1 - MAX_SKIPPED :], metrics]) and step + 1 >= MAX_SKIPPED:
                raise TrainingDiverged(_overflowing(step))
            history.append(metrics)
            log.write(metrics)
            track(step + 1, metrics)
            if run.first_process:
                on_step(step + 1, metrics)
            if (step + 1) % plan.training.checkpoint_every == 0:
                log.sync()  # a checkpoint without the metrics up to it could not be resumed
                run.save(output, step + 1)
    return run.finish(output, history)


def _tracking(plan: TrainingPlan, first: int) -> AbstractContextManager[Callable[[int, Mapping[str, float]], None]]:
    output = Path(plan.output)
    return tracking(plan.execution.trackers, output, output.parent.name, plan.to_dict(), first)


def _overflowing(step: int) -> str:
    return (
        f"step {step + 1}: {MAX_SKIPPED} steps in a row overflowed float16 and were skipped; "
        "use training.mixed_precision=bf16 or no"
    )


def _read_metrics(output: Path) -> list[Metrics]:
    """The metrics written so far; a last line that a kill cut short is left out."""
    path = output / METRICS
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


class _Log:
    """The metrics file, begun with the steps that are not done again. Only the first process writes."""

    def __init__(self, path: Path, history: list[Metrics], writes: bool) -> None:
        self._file = None
        if writes:
            write_text(path, "".join(json.dumps(metrics) + "\n" for metrics in history))
            self._file = path.open("a")

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, metrics: Metrics) -> None:
        if self._file:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()

    def sync(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())
