"""Writes a LoRA for ComfyUI and others: `rlaif kohya` or `python -m training.kohya`; see `training.export.kohya`.

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
    to: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="The file to write.")],
    base: Annotated[str | None, typer.Option(help="Base model, where the training's record names none.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; default: as trained.")] = None,
) -> None:
    """Write a LoRA under the keys that ComfyUI, A1111, Forge and sd-scripts read."""
    from training.export.kohya import Base, write_kohya
    from training.trained import trained_adapter

    adapter, model = trained_adapter(source, base)
    print(write_kohya(adapter, to, Base.read(model.base, model.revision), dtype=dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m training.kohya", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
