"""The runs of an experiment: what each was given, which cycles it comprises, and how it failed."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data.files import write_json
from tasks.record.recipe import Recipe
from tasks.record.workspace import Experiment

log = logging.getLogger(__name__)


class RunRecord(BaseModel):
    """The file of a run. failures: the errors that ended its attempts, the latest last."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipe: Recipe
    cycles: list[int]
    finished: bool = False
    failures: list[str] = []


@dataclass
class Run:
    """One call of the flow, as its file in the experiment holds it."""

    path: Path
    record: RunRecord

    @property
    def recipe(self) -> Recipe:
        """The complete parameters."""
        return self.record.recipe

    @property
    def cycles(self) -> list[int]:
        """The numbers of the cycles that the run comprises."""
        return self.record.cycles

    def given_up(self) -> bool:
        """Whether it failed twice in the same way: a third time would as well, and block every night to come."""
        failures = self.record.failures
        return len(failures) > 1 and failures[-1] == failures[-2]

    def finish(self) -> None:
        """Note that all cycles are finished."""
        self._write(finished=True)

    def note_failure(self, error: Exception) -> None:
        """Remember how an attempt ended; see `given_up`."""
        self._write(failures=[*self.record.failures, f"{type(error).__name__}: {error}"])

    def _write(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        write_json(self.path, self.record.model_dump())


def begin_run(experiment: Experiment, recipe: Recipe, cycles: int) -> Run:
    """The newest unfinished run with these very parameters, or a new one with the next cycle numbers.

    Unfinished runs with other parameters stay as they are; giving their parameters again finishes them.
    """
    for path in reversed(experiment.runs()):
        run = _read_run(path)
        if run is None or run.record.finished:
            continue
        if run.given_up():
            log.warning("%s failed twice with %r; it is left as it is", path, run.record.failures[-1])
            continue
        if run.recipe == recipe and len(run.cycles) == cycles:
            log.info("resuming %s: cycles %s", path, run.cycles)
            return run
        changes = difference(run.recipe.model_dump(), recipe.model_dump()) or "another number of cycles"
        log.warning("%s is unfinished, with other parameters (%s); it is left as it is", path, changes)
    return _new_run(experiment, recipe, cycles)


def _new_run(experiment: Experiment, recipe: Recipe, cycles: int) -> Run:
    first = experiment.last_cycle() + 1
    record = RunRecord(recipe=recipe, cycles=list(range(first, first + cycles)))
    number = max((int(path.stem) for path in experiment.runs()), default=0) + 1
    write_json(experiment.run(number), record.model_dump())
    return Run(experiment.run(number), record)


def _read_run(path: Path) -> Run | None:
    """The run of a file, None when this version does not know its parameters any more."""
    try:
        return Run(path, RunRecord.model_validate_json(path.read_text()))
    except ValidationError:
        log.warning("%s was made by another version of the parameters; it is left as it is", path)
        return None


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two sets of parameters, 'section.name: old -> new; ...'; empty when nothing did."""
    a, b = _flat(old), _flat(new)
    changed = [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return "; ".join(changed)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
