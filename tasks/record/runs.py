"""The runs of an experiment: what each was given, which cycles it comprises, and how it failed."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data.files import write_json
from tasks.record.plan import log
from tasks.record.recipe import Recipe
from tasks.record.workspace import Experiment


class Run(BaseModel):
    """One call of the flow: its parameters and the cycles it comprises."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipe: Recipe
    cycles: list[int]
    finished: bool = False
    failures: list[str] = []

    def given_up(self) -> bool:
        """It failed twice in the same way: a third time would as well, and block every night to come."""
        return len(self.failures) > 1 and self.failures[-1] == self.failures[-2]


def begin_run(experiment: Experiment, recipe: Recipe, cycles: int) -> tuple[Path, Run]:
    """The newest unfinished run with these very parameters, or a new one with the next cycle numbers.

    Unfinished runs with other parameters stay as they are; giving their parameters again finishes them.
    """
    for path in reversed(experiment.runs()):
        run = _read_run(path)
        if run is None or run.finished:
            continue
        if run.given_up():
            log.warning("%s failed twice with %r; it is left as it is", path, run.failures[-1])
            continue
        if run.recipe == recipe and len(run.cycles) == cycles:
            log.info("resuming %s: cycles %s", path, run.cycles)
            return path, run
        changes = difference(run.recipe.model_dump(), recipe.model_dump()) or "another number of cycles"
        log.warning("%s is unfinished, with other parameters (%s); it is left as it is", path, changes)
    first = experiment.last_cycle() + 1
    run = Run(recipe=recipe, cycles=list(range(first, first + cycles)))
    path = experiment.run(max((int(path.stem) for path in experiment.runs()), default=0) + 1)
    write_json(path, run.model_dump())
    return path, run


def _read_run(path: Path) -> Run | None:
    """None for a run whose parameters this version does not know any more."""
    try:
        return Run.model_validate_json(path.read_text())
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


def end_run(path: Path, run: Run) -> None:
    write_json(path, run.model_copy(update={"finished": True}).model_dump())


def note_failure(path: Path, run: Run, error: Exception) -> None:
    """Remember how a run failed; see `Run.given_up`."""
    failures = [*run.failures, f"{type(error).__name__}: {error}"]
    write_json(path, run.model_copy(update={"failures": failures}).model_dump())
