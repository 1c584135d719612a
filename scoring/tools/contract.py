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

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when the scorer keeps the contract, 1 when it breaks it, 2 when it cannot be tested at all."""
    options = _parser().parse_args(arguments)
    try:
        spec = _spec(options.spec, options.source, options.option)
        images = _images(options.images) if options.images else None
        prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else None
        outcomes = check_contract(lambda: load_scorer(spec, {}, options.device), images, prompts, options.tolerance)
    except (OSError, ValueError, TypeError, ScoringError) as error:
        print(error, file=sys.stderr)
        return 2
    _print(spec, outcomes)
    return int(any(outcome.status == "fail" for outcome in outcomes))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scoring.contract", description=__doc__.splitlines()[0])
    parser.add_argument("spec", metavar="SPEC", help="name, name:variant?key=value, or package.module:Class")
    parser.add_argument("--source", metavar="FOLDER", help="weights: a folder or hub id")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="argument of the scorer")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, instead of made-up ones")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images, instead of made-up ones")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-6, help="relative difference that counts as none (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
