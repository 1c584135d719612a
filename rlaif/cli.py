"""The command `rlaif`: one cycle, the nightly deployment, and every tool, each also a `python -m` of its own.

The modules of the commands import neither torch nor Prefect before they are called, so `rlaif --help` and shell
completion answer at once.
"""

import typer

from flows import serve
from scoring.tools import accuracy, benchmark, contract, convert
from tasks.report import summary
from training import hub, kohya, merge

app = typer.Typer(
    name="rlaif",
    help="Aligns text-to-image diffusion models from AI feedback, night after night.",
    epilog="A command ends with 0, with 1 when the answer is no, and with 2 when it was used wrongly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command("cycle")(serve.cycle)
app.command("up")(serve.up)
app.command("down")(serve.down)
app.command("summary")(summary.command)
app.command("accuracy")(accuracy.command)
app.command("benchmark")(benchmark.command)
app.command("contract")(contract.command)
app.command("convert")(convert.command)
app.command("kohya")(kohya.command)
app.command("merge")(merge.command)
app.command("hub")(hub.command)


def main() -> None:
    """The entry point of the installed command."""
    app()
