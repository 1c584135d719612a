"""The verdicts of every finished cycle of a workspace as one Markdown table: `python -m bench.summary [workspace]`.

Rows named "control" judge the base against itself with other seeds; their intervals must cover 0.5.
"""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ["experiment", "cycle", "labelled by", "judge", "prompts", "W / T / L", "win rate", "95 % interval"]
HEADER = f"| {' | '.join([*COLUMNS, 'promoted'])} |"


def row(cycle: Path, verdict: dict[str, Any], scorer: str, promoted: str) -> str:
    """One line of the table."""
    counts = f"{verdict['wins']} / {verdict['ties']} / {verdict['losses']}"
    judge = verdict["judge"] + ("" if verdict["held_out"] else " (optimised)")
    interval = f"[{verdict['low']:.3f}, {verdict['high']:.3f}]"
    cells = [cycle.parents[1].name, str(int(cycle.name)), scorer, judge, str(verdict["prompts"]), counts]
    return "| " + " | ".join([*cells, f"{verdict['win_rate']:.3f}", interval, promoted]) + " |"


def rows(cycle: Path) -> list[str]:
    """The cycle's verdicts, then its null control."""
    results = json.loads((cycle / "evaluation" / "results.json").read_text())
    scorer = json.loads((cycle / "plan.json").read_text())["recipe"]["scorer"]
    promoted = "yes" if json.loads((cycle / "finished.json").read_text())["promoted"] else "no"
    tuned = [row(cycle, verdict, scorer, promoted) for verdict in results["verdicts"]]
    control = [row(cycle, {**v, "held_out": True}, scorer, "control") for v in results["control"]]
    return tuned + control


def main(workspace: str = "workspace") -> None:
    print(HEADER)
    print("|---" * (len(COLUMNS) + 1) + "|")
    for finished in sorted(Path(workspace).glob("*/cycles/*/finished.json")):
        print("\n".join(rows(finished.parent)))


if __name__ == "__main__":
    main(*sys.argv[1:])
