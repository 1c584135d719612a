"""Tests a scorer against the contract: `python -m scoring.contract SPEC`, for example `my_package.judge:Judge`.

SPEC is a scorer as in a preset (scoring/scorers/registry.py). The clauses are in scoring/tools/clauses.py, one function
each, its docstring the clause. In a test suite of a plug-in:

    import pytest
    from scoring.contract import Trial, clauses

    @pytest.mark.parametrize("clause", clauses(), ids=lambda clause: clause.__name__)
    def test_contract(clause):
        clause(Trial(MyScorer))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from data.commands import JsonFile, check_figures, ends_with, run, tell
from data.pictures import open_image
from scoring.scorers.registry import load_scorer
from scoring.scorers.scorer import Scorer, ScoringError
from scoring.tools.clauses import CLAUSES, Broken, Clause, Skipped, Trial

__all__ = ["Broken", "Outcome", "Skipped", "Trial", "check_contract", "clauses"]


@dataclass(frozen=True)
class Outcome:
    """What came of one clause."""

    clause: str
    """Name of the clause's function."""
    status: Literal["pass", "fail", "skip"]
    seen: str
    """What was seen, or why it was skipped."""
    statement: str
    """The clause in words."""


def clauses() -> list[Clause]:
    """All clauses, in the order in which they are best read: each takes a `Trial` and raises `Broken`."""
    return list(CLAUSES)


def check_contract(
    make: Callable[[], Scorer],
    images: Sequence[np.ndarray] | None = None,
    prompts: Sequence[str] | None = None,
    tolerance: float = 1e-6,
) -> list[Outcome]:
    """Runs every clause on a scorer, each whatever came of the others; arguments as for `Trial`.

    `make` is called three times, as two clauses need an instance of their own. Raises what `make` raises.
    """
    trial = Trial(make, images, prompts, tolerance)
    try:
        return [_outcome(clause, trial) for clause in clauses()]
    finally:
        with suppress(Exception):  # `closed_is_closed` has reported it
            trial.scorer.close()


def _outcome(clause: Clause, trial: Trial) -> Outcome:
    statement = " ".join((inspect.getdoc(clause) or "").split())
    try:
        return Outcome(clause.__name__, "pass", clause(trial), statement)
    except Skipped as reason:
        return Outcome(clause.__name__, "skip", str(reason), statement)
    except Broken as error:
        return Outcome(clause.__name__, "fail", str(error), statement)
    except Exception as error:
        return Outcome(clause.__name__, "fail", f"raised {type(error).__name__}: {error}", statement)


@ends_with(OSError, ValueError, TypeError, ScoringError)
def command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="name, name:variant?key=value, or package.module:Class")],
    source: Annotated[str | None, typer.Option(metavar="FOLDER", help="Weights: a folder or hub id.")] = None,
    option: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Argument of the scorer.")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="One a line, instead of made-up ones.")] = None,
    images: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Images, instead of made-up ones.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    tolerance: Annotated[float, typer.Option(help="Relative difference that counts as none.")] = 1e-6,
    json_file: JsonFile = None,
) -> int:
    """Test a scorer against the contract, clause by clause; 1 when it breaks one."""
    check_figures(json_file)
    whole = _spec(spec, source, option)
    pictures = _images(images) if images else None
    texts = prompts.read_text(encoding="utf-8").splitlines() if prompts else None
    outcomes = check_contract(lambda: load_scorer(whole, {}, device), pictures, texts, tolerance)
    tell([asdict(outcome) for outcome in outcomes], json_file, lambda: _print(whole, outcomes))
    return int(any(outcome.status == "fail" for outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m scoring.contract", arguments)


def _spec(spec: str, source: str | None, options: Sequence[str]) -> str:
    """The spec with what the command adds to it after "?"."""
    given = [*([f"source={source}"] if source else []), *options]
    return spec + "".join(f"{'&' if '?' in spec or row else '?'}{item}" for row, item in enumerate(given))


def _images(folder: Path) -> list[np.ndarray]:
    """The images of a folder, sorted by name. Raises ValueError when there is none, or a file is no image."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise ValueError(f"{folder}: holds no images")
    return [open_image(path) for path in files]


def _print(spec: str, outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("clause", "result", "seen", title=spec)
    for outcome in outcomes:
        style = {"pass": "green", "fail": "bold red", "skip": "yellow"}[outcome.status]
        table.add_row(outcome.clause, Text(outcome.status, style), Text(outcome.seen))
    console = Console()
    console.print(table)
    for outcome in outcomes:
        if outcome.status == "fail":
            said = f"{outcome.clause}: broken. {outcome.statement} Seen: {outcome.seen}"
            console.print(Text(said), soft_wrap=True)
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in ("pass", "fail", "skip")}
    console.print(f"{counts['pass']} kept, {counts['fail']} broken, {counts['skip']} not applicable")


if __name__ == "__main__":
    raise SystemExit(main())
