"""Sends a run's metrics to experiment trackers, through accelerate's adapters. Knows nothing of what is measured."""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "rlaif"
TRACKERS = {
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio", "comet_ml": "comet-ml",
    "aim": "aim", "clearml": "clearml", "dvclive": "dvclive", "swanlab": "swanlab",
}  # fmt: skip
"""Names as accelerate knows them, which are also the names to import, and the package to install."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is not known, named twice or not installed. Loads none of them."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"execution.trackers: {name!r} is unknown; there are {', '.join(TRACKERS)}; [] is none")
        if list(names).count(name) > 1:
            raise ValueError(f"execution.trackers: {name!r} is named twice")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"execution.trackers: {name!r} needs a package that is not installed: `pip install {TRACKERS[name]}`, "
                "or leave it out; every metric is in metrics.jsonl too"
            )


@contextmanager
def tracking(
    names: Sequence[str], folder: Path, run: str, settings: Mapping[str, object], first: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Trackers of one run: what it yields is called with (steps done, metrics) after each step. Closed at the end.

    To be used after the process's Accelerator has been made. folder: of the run; TensorBoard writes to
    folder/tensorboard. run: its name where others show several. settings: what the run was given, shown beside it.
    first: steps done before, 0 for a new run. A resumed run goes on in the same curves of tensorboard, wandb and
    trackio (of steps that are done again TensorBoard shows the later, wandb the earlier values); with the others a
    second run begins at that step. Processes but the main one send nothing, nor are numbers sent that are not finite.
    """
    from accelerate.state import PartialState

    check_trackers(names)
    # Some of accelerate's adapters would open a run in each process.
    trackers = [_open(name, folder, run, first) for name in names if PartialState().is_main_process]
    if not first:
        for tracker in trackers:
            _show(tracker, settings)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if name != "step" and math.isfinite(value)}
        for tracker in trackers:
            tracker.log(finite, step=step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()


def _open(name: str, folder: Path, run: str, first: int) -> "GeneralTracker":
    """accelerate's adapter of that name, started. Its classes are used rather than `Accelerator.init_trackers`: those
    of an Accelerator can be ended only together with its process group, which a process of several runs still needs."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # Runs of the same name in two workspaces are different runs.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": first + 1 if first else 0},
        "wandb": {"run_name": PROJECT, "name": run, "id": identity, "resume": "allow", "dir": str(folder)},
        "trackio": {"run_name": PROJECT, "name": run, "resume": "allow"},
        "mlflow": {"experiment_name": PROJECT, "run_name": run},
        "aim": {"run_name": run, "logging_dir": folder},
        "dvclive": {"run_name": run, "dir": str(folder / "dvclive")},
    }
    tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](**arguments.get(name, {"run_name": PROJECT}))
    tracker.start()
    return tracker


def _show(tracker: "GeneralTracker", settings: Mapping[str, object]) -> None:
    """What the run was given. As text in TensorBoard: accelerate would add a second, empty run for its sake."""
    if tracker.name == "tensorboard":
        tracker.log({"settings": "\n".join(f"    {name} = {value!r}" for name, value in settings.items())}, step=0)
    else:
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        tracker.store_init_configuration(plain)
