"""Publishes a finished training: `rlaif hub` or `python -m training.hub`; see `training.export.hub`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from data.commands import ends_with, run
from training.export.hub import PushError, push
from training.model.reference import ModelError


@ends_with(PushError, ModelError, OSError)
def command(
    training: Annotated[Path, typer.Argument(help="Folder of a finished training with its card.")],
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
) -> None:
    """Publish a finished training on the Hugging Face hub, and print the address of the commit."""
    print(push(training, repo, private=not public))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m training.hub", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
