"""Writes one pipeline folder: `rlaif merge` or `python -m training.merge`; see `training.export.merge`.

What needs torch is imported when the command is called, so that `rlaif --help` does not wait for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from data.commands import ends_with, run
from training.model.reference import Dtype, ModelError


@ends_with(ModelError, OSError)
def command(
    source: Annotated[Path, typer.Argument(help="Folder of a finished training, or of an adapter.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")],
    base: Annotated[str | None, typer.Option(help="Base model, where the training's record names none.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = "float32",
) -> None:
    """Write base, tuned network and adapter as one pipeline folder."""
    from training.export.merge import merge
    from training.trained import trained_model

    print(merge(trained_model(source, base), to, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m training.merge", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
