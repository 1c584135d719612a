"""What Prefect's UI shows of a finished cycle: the verdicts as a table, and some pictures."""

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from scoring.verdict.verdict import Verdict
from tasks.record.plan import PlannedCycle
from tasks.record.results import Judged, Results
from tasks.report.charts import markdown, number, p_text, thumbnail_uri
from tasks.report.page import SIDES, drawn_rows, stored

ARTIFACT_PAIRS = 12
ARTIFACT_SIDE = 128
"""Pixels; 24 of the noisiest pictures of that size stay below 1 MB."""


def publish(reason: str, cycle: PlannedCycle, results: Results, judged: dict[str, Judged]) -> None:
    """The verdicts as a table and some pictures, for Prefect's UI."""
    headline = markdown(f"{cycle.experiment.folder.name}, cycle {cycle.plan.cycle}: {reason}")
    create_table_artifact([verdict_row(v) for v in results.verdicts], key="verdicts", description=headline)
    create_markdown_artifact(pictures_markdown(cycle, judged), key="pictures", description=headline)


def verdict_row(verdict: Verdict) -> dict[str, str]:
    return {
        "judge": markdown(verdict.judge),
        "kind": "held-out" if verdict.held_out else "optimised",
        "win rate": f"{verdict.win_rate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]",
        "wins / ties / losses": f"{verdict.wins} / {verdict.ties} / {verdict.losses}",
        "sign test p": p_text(verdict.p_value),
        "Holm p": p_text(verdict.p_holm),
        "mean": f"{number(verdict.mean_base)} → {number(verdict.mean_tuned)}",
    }


def pictures_markdown(cycle: PlannedCycle, judged: dict[str, Judged]) -> str:
    """A table of randomly drawn prompts with both pictures inside, below 1 MB."""
    rows = [markdown_row(cycle, judged, row) for row in drawn_rows(cycle.plan, ARTIFACT_PAIRS)]
    head = ["Held-out prompts drawn at random.", "", "| prompt | base | tuned | scores |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def markdown_row(cycle: PlannedCycle, judged: dict[str, Judged], row: int) -> str:
    (prompt, base), (_, tuned) = (stored(cycle, part, row) for part in SIDES)
    images = [f"![]({thumbnail_uri(data, ARTIFACT_SIDE)})" for data in (base, tuned)]
    scores = [f"{markdown(name)} {number(j.base[row])} → {number(j.other[row])}" for name, j in judged.items()]
    return f"| {markdown(prompt)} | {images[0]} | {images[1]} | {'<br>'.join(scores)} |"
