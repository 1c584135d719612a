"""What every command of the project does alike: how it ends, and how it tells its figures to a machine.

Its exit status is 0, or 1 when the answer is no (a scorer breaks the contract, a run failed), or 2 when it was used
wrongly or could not go on, with one line on standard error. A command is a function with Typer's annotations, so that
`python -m scoring.accuracy` and `rlaif accuracy` are the same one.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

P = ParamSpec("P")

JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="File for all figures as JSON; - prints them instead of the text."),
]


def ends_with(*errors: type[Exception]) -> Callable[[Callable[P, int | None]], Callable[P, None]]:
    """Decorates a command: the number that it returns becomes the exit status, and one of `errors` becomes 2."""

    def decorate(function: Callable[P, int | None]) -> Callable[P, None]:
        @functools.wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                status = function(*args, **kwargs)
            except errors as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2) from error
            if status:
                raise typer.Exit(status)

        return command

    return decorate


def run(command: Callable[..., None], program: str, arguments: Sequence[str] | None = None) -> int:
    """Call a command with the arguments of the command line, or with those given; returns its exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(arguments, prog_name=program)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def check_figures(json_file: str | None) -> None:
    """Raises OSError for a file that cannot be written, which is better known before hours of work than after."""
    if json_file and json_file != "-":
        Path(json_file).touch()


def tell(figures: Any, json_file: str | None, text: Callable[[], None]) -> None:
    """Write the figures where `--json` asks for them, and print the text for people unless they go to the terminal.

    figures: what `json` can write. text: prints.
    """
    if json_file == "-":
        print(json.dumps(figures, indent=2))
        return
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    text()
