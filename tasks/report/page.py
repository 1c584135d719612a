"""One page a cycle that says what was done and what came of it, from what lies on disk and nothing else.

The page is self-contained: no script, no external resource, so it can be mailed.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from data.columns import trainable
from data.ids import score_column
from data.manifest import read_manifest
from data.schema import read_metadata
from data.shards import read_shard
from scoring.scorers.scorer import ScorerInfo
from scoring.verdict.pair_statistics import clustered_interval
from tasks.record.champion import Champion
from tasks.record.labels import comparisons
from tasks.record.plan import Plan, PlannedCycle
from tasks.record.results import Judged, Results
from tasks.record.workspace import Part
from tasks.report.charts import (
    Picture,
    Scale,
    number,
    p_text,
    picture,
    signed,
    training_panels,
)
from training.loop.checkpoint import CheckpointRecord
from training.loop.trainer import METRICS
from training.loss.table import loss_at_start
from training.model.families import family_for
from training.model.reference import ModelRef

SIDES: tuple[Part, Part] = ("base", "tuned")
DRAWN, EXTREMES = 24, 6
"""Prompts shown on the page: drawn at random, and of either extreme."""
WINNER_DRIFT = 0.01
"""Rise of the winner's error that is called drift: 1 % of the target's unit variance, five times a healthy rise."""


@dataclass(frozen=True)
class Comparison:
    """One prompt on both sides. scores: (judge, base, tuned, gain)."""

    prompt: str
    base: Picture
    tuned: Picture
    scores: list[tuple[str, float, float, float]]


def render(values: dict[str, Any]) -> str:
    """The page. Prompts and names are foreign text: everything is escaped, and a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "p": p_text}
    return environment.get_template("report.html.j2").render(values)


def page(cycle: PlannedCycle, results: Results, judged: dict[str, Judged]) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    plan, trained = cycle.plan, cycle.trained()
    return {
        "experiment": cycle.experiment.folder.name,
        "plan": plan,
        "decision": json.loads(cycle.promotion.read_text()),
        "results": results,
        "scale": Scale.around(rate for v in [*results.verdicts, *results.control] for rate in (v.low, v.high)),
        "uneven": [v.judge for v in results.control if not v.low <= 0.5 <= v.high],
        "judged": judged,
        "scorers": {name: info for judge in judged.values() for name, info in judge.infos.items()},
        "record": trained.record,
        **training_section(cycle, trained.record),
        **picture_section(cycle, results, judged),
        **data_section(cycle),
        "history": history(cycle),
        "recipe": json.dumps(plan.recipe.model_dump(), indent=2),
        "snippet": snippet(cycle.drawn_by("tuned")[0]),
    }


def training_section(cycle: PlannedCycle, record: CheckpointRecord) -> dict[str, Any]:
    """The curves of the training and what to say of them."""
    steps = [json.loads(line) for line in (cycle.training / METRICS).read_text().splitlines()]
    values = {name: over_steps(steps, name) for name in {name: None for step in steps for name in step}}
    training = cycle.plan.recipe.training
    start = loss_at_start(record.loss, training.loss_options())
    return {
        "panels": training_panels(values, training.max_grad_norm, start),
        "pairs_per_second": float(np.median(values["pairs_per_second"])),
        "drifted": record.metrics.get("winner_error_delta", 0.0) > WINNER_DRIFT,
        "winner_drift": WINNER_DRIFT,
    }


def over_steps(steps: list[dict[str, float]], name: str) -> np.ndarray:
    """A metric at each step, (steps,); between the steps that have it on a straight line."""
    places, values = zip(*((place, step[name]) for place, step in enumerate(steps) if name in step), strict=True)
    line: np.ndarray = np.interp(np.arange(len(steps)), places, values)
    return line


def picture_section(cycle: PlannedCycle, results: Results, judged: dict[str, Judged]) -> dict[str, Any]:
    """Pictures drawn at random, and those that one held-out judge finds worst and best."""
    judge = next((v.judge for v in results.verdicts if v.held_out), results.verdicts[0].judge)
    gain = judged[judge].gain
    order = np.argsort(gain, kind="stable")
    rows = {
        "drawn": drawn_rows(cycle.plan, DRAWN),
        "worst": [int(row) for row in order[:EXTREMES] if gain[row] < 0],
        "best": [int(row) for row in order[::-1][:EXTREMES] if gain[row] > 0],
    }
    shown = {name: [comparison(cycle, judged, row) for row in chosen] for name, chosen in rows.items()}
    return {"pictures": shown, "extremes_judge": judge}


def drawn_rows(plan: Plan, count: int) -> list[int]:
    """Held-out prompts drawn by the cycle's seed, so that nobody can choose the pretty ones."""
    order = np.random.default_rng(plan.cycle_seed).permutation(plan.prompts["evaluation"])
    return [int(row) for row in order[:count]]


def comparison(cycle: PlannedCycle, judged: dict[str, Judged], row: int) -> Comparison:
    """One held-out prompt on both sides, with what the judges gave."""
    sides = [stored(cycle, part, row) for part in SIDES]
    scores = [(name, float(j.base[row]), float(j.other[row]), float(j.gain[row])) for name, j in judged.items()]
    return Comparison(sides[0][0], picture(sides[0][1]), picture(sides[1][1]), scores)


def stored(cycle: PlannedCycle, part: Part, row: int) -> tuple[str, bytes]:
    """(prompt, encoded picture) of one held-out prompt; only its row is read."""
    shard, local = divmod(row, cycle.prompts_per_shard(part))
    candidates = read_shard(cycle.part(part).candidates(shard), ["caption", "image"])
    stored_row = candidates.slice(local, 1).to_pylist()[0]
    return stored_row["caption"], stored_row["image"]["bytes"]


def data_section(cycle: PlannedCycle) -> dict[str, Any]:
    """The preference shards: how many, and who agrees with their labels."""
    manifest = read_manifest(cycle.preferences)
    return {
        "created": datetime.fromisoformat(manifest.created_at).strftime("%Y-%m-%d %H:%M %Z"),
        "manifest": manifest,
        "comparisons": comparisons(cycle),
        "candidates": cycle.plan.prompts["training"] * cycle.images_per_prompt("candidates"),
        "agreements": agreements([read_shard(cycle.preferences / shard.file) for shard in manifest.shards], cycle.plan),
    }


def agreements(tables: list[pa.Table], plan: Plan) -> list[dict[str, Any]]:
    """How often each scorer whose scores the pairs carry prefers the winner; those that labelled come first."""
    found, labelling = [], plan.recipe.scorer.leaves
    for values in read_metadata(tables[0].schema)["scorers"]:
        name = values.pop("column")
        info = ScorerInfo(**values)
        agreed, prompts = agreement_with_labels(tables, name, info.higher_is_better)
        rate, low, high = clustered_interval(agreed, prompts, plan.recipe.gate.confidence)
        numbers = {"rate": rate, "low": low, "high": high, "pairs": len(agreed)}
        found.append({"name": name, "info": info, "labelled": name in labelling, **numbers})
    return found


def agreement_with_labels(tables: list[pa.Table], scorer: str, higher_is_better: bool) -> tuple[np.ndarray, list[str]]:
    """Of each trainable pair 1 where the scorer prefers the winner, 0 where not, 0.5 for a tie; and its prompt."""
    names = [score_column(scorer, 0), score_column(scorer, 1), "label_0", "prompt_id", "has_label", "are_different"]
    pairs = pa.concat_tables([table.select(names) for table in tables])
    kept = pairs.filter(trainable(pairs))
    first, second, label = (column.to_numpy() for column in kept.columns[:3])
    preferred = np.sign(first - second) * (1 if higher_is_better else -1)
    return (1 + preferred * np.sign(label - 0.5)) / 2, kept["prompt_id"].to_pylist()


def history(cycle: PlannedCycle) -> list[dict[str, Any]]:
    """The experiment's decisions, oldest first; link: the sibling's report where there is one, relative to this one."""
    entries = []
    for decision in Champion.read(cycle.experiment).history:
        report = cycle.experiment.cycle(decision.cycle).report
        link = f"../{report.parent.name}/{report.name}" if report.is_file() else None
        entries.append({**decision.model_dump(), "link": link, "here": report == cycle.report})
    return entries


def snippet(model: ModelRef) -> str:
    """Python that loads a model, of which the paths are absolute, with diffusers alone."""
    given = f"{model.base!r}" + (f", revision={model.revision!r}" if model.revision else "")
    family = family_for(model)
    part, kind = family.network, family.network_class
    lines = ["from diffusers import DiffusionPipeline" + (f", {kind}" if model.network else "")]
    if model.network:
        lines.append(f"{part} = {kind}.from_pretrained({model.network!r})")
    lines.append(f"pipeline = DiffusionPipeline.from_pretrained({given}{f', {part}={part}' if model.network else ''})")
    if model.adapter:
        lines.append(f"pipeline.load_lora_weights({model.adapter!r})")
    return "\n".join(lines)
