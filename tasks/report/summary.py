"""The verdicts of every finished cycle of a workspace as one table: `rlaif summary [workspace]`.

Rows named "control" judge the base against itself with other seeds; their intervals must cover 0.5.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data.commands import JsonFile, ends_with, run, tell

COLUMNS = ["experiment", "cycle", "labelled by", "judge", "prompts", "W / T / L", "win rate", "95 % interval"]
HEADER = f"| {' | '.join([*COLUMNS, 'promoted'])} |"


def verdicts(cycle: Path) -> list[dict[str, Any]]:
    """The cycle's verdicts, then its null control, each with where it comes from."""
    results = json.loads((cycle / "evaluation" / "results.json").read_text())
    scorer = json.loads((cycle / "plan.json").read_text())["recipe"]["scorer"]
    promoted = "yes" if json.loads((cycle / "finished.json").read_text())["promoted"] else "no"
    about = {"experiment": cycle.parents[1].name, "cycle": int(cycle.name), "scorer": scorer}
    tuned = [{**about, **verdict, "promoted": promoted} for verdict in results["verdicts"]]
    control = [{**about, **verdict, "held_out": True, "promoted": "control"} for verdict in results["control"]]
    return tuned + control


def line(verdict: Mapping[str, Any]) -> str:
    """One line of the Markdown table."""
    counts = f"{verdict['wins']} / {verdict['ties']} / {verdict['losses']}"
    judge = verdict["judge"] + ("" if verdict["held_out"] else " (optimised)")
    interval = f"[{verdict['low']:.3f}, {verdict['high']:.3f}]"
    cells = [verdict["experiment"], str(verdict["cycle"]), verdict["scorer"], judge, str(verdict["prompts"]), counts]
    return "| " + " | ".join([*cells, f"{verdict['win_rate']:.3f}", interval, verdict["promoted"]]) + " |"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of all rows."""
    return "\n".join([HEADER, "|---" * (len(COLUMNS) + 1) + "|", *map(line, rows)])


@ends_with(OSError, ValueError)
def command(
    workspace: Annotated[Path, typer.Argument(help="The folder that holds the experiments.")] = Path("workspace"),
    json_file: JsonFile = None,
) -> None:
    """Print the verdicts of every finished cycle of a workspace as one Markdown table."""
    finished = sorted(workspace.expanduser().glob("*/cycles/*/finished.json"))
    rows = [verdict for file in finished for verdict in verdicts(file.parent)]
    tell(rows, json_file, lambda: print(table(rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m bench.summary", arguments)
