"""The report of a finished cycle. The cycle is built with the project's own tasks around random pictures and scores:
no model is loaded."""

import base64
import dataclasses
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data.files import write_json
from data.ids import prompt_id
from data.pictures import encode_image
from data.schema import candidate_schema, score_schema
from data.shards import read_shard, write_shard
from scoring.labels.expressions import parse
from scoring.scorers.scorer import ScorerInfo
from tasks.evaluate import judge_models
from tasks.generate import candidate_table, write_embeddings
from tasks.pair import pair_candidates
from tasks.promote import promote
from tasks.record.plan import Plan, PlannedCycle
from tasks.record.recipe import resolve
from tasks.record.results import Judged, Results, read_judged
from tasks.record.settings import GivenEvaluation, GivenExecution, GivenGeneration
from tasks.record.workspace import Experiment, Part
from tasks.report.artifacts import ARTIFACT_PAIRS, pictures_markdown
from tasks.report.charts import Scale, markdown, panel, picture, running_mean, thumbnail_uri
from tasks.report.page import snippet
from tasks.write_report import write_report
from training.loop.checkpoint import CheckpointRecord
from training.loop.metrics import final_metrics
from training.loop.trainer import METRICS
from training.model.family import PromptEmbeddings
from training.model.reference import ModelRef

EVIL = "<script>alert(1)</script> | a \"red\" circle & 'two' squares"
PROMPTS = 40


def a_picture(seed: int, side: int) -> np.ndarray:
    return np.random.default_rng(seed % 2**32).integers(0, 256, (side, side, 3), dtype=np.uint8)


def a_plan(number: int, control: bool) -> Plan:
    given = {
        "generation": GivenGeneration(candidates=4, prompts_per_cycle=12),
        "evaluation": GivenEvaluation(null_control=control, max_prompts=PROMPTS),
        "execution": GivenExecution(images_per_shard=16),
    }
    recipe = resolve("shapes", 5, {}, given)
    return Plan(
        cycle=number, cycle_seed=2**62 + number, champion=None, start=ModelRef(recipe.base_model).to_dict(),
        start_label=recipe.base_model, labellers=[], base_digest="0123",
        recipe=recipe, prompts={"training": 12, "evaluation": PROMPTS},
        code={"rlaif": "0a1b2c3", "torch": "2.9"},
    )  # fmt: skip


def draw_part(cycle: PlannedCycle, part: Part, better: float, side: int) -> None:
    """Candidates with random pictures, and scores whose mean is `better`."""
    target = cycle.part(part)
    for index in range(target.shards):
        prompts = cycle.shard_prompts(part, index)
        seeds = cycle.seeds(part, prompts)
        images = np.stack([a_picture(seed + (part == "tuned"), side) for seed in seeds])
        latents = np.zeros((len(seeds), 4), np.float16)
        table = candidate_table(cycle, part, prompts, seeds, part, latents, images)
        schema = candidate_schema(4, {"latent": {"shape": [4, 1, 1]}, **cycle.plan.provenance()})
        write_shard(target.candidates(index), table.cast(schema), schema)
        if part == "candidates":
            write_embeddings(cycle, index, prompts, PromptEmbeddings(torch.zeros(len(prompts), 2, 3)))
        for scorer in cycle.plan.scorer_names(part):
            rng = np.random.default_rng([index, len(scorer), len(part)])
            values = rng.normal(better, 0.1, len(seeds))
            info = ScorerInfo(scorer, "v1", "logit", True, f"folder/{scorer}", f"fingerprint of {scorer}")
            scores = score_schema({"scorer": dataclasses.asdict(info)})
            columns = [table["candidate_id"].combine_chunks(), pa.array(values, pa.float32())]
            write_shard(target.scores(scorer, index), pa.table(columns, schema=scores), scores)


def train_part(cycle: PlannedCycle, winner_error: float, steps: int = 60) -> None:
    """Metrics of a run in which the winner's error drifts up to `winner_error`, and the record of its end."""
    rng, ramp = np.random.default_rng(1), np.linspace(0, 1, steps)
    columns = {
        "loss": 0.69 - 0.2 * ramp + rng.normal(0, 0.05, steps),
        "implicit_accuracy": 0.5 + 0.4 * ramp,
        "margin": ramp,
        "winner_error_delta": winner_error * np.minimum(1, 2 * ramp) + rng.normal(0, 1e-4, steps),
        "loser_error_delta": 2 * abs(winner_error) * ramp,
        "grad_norm": rng.lognormal(-1, 0.4, steps),
        "learning_rate": np.full(steps, 2e-4),
        "pairs_per_second": np.full(steps, 12.5),
    }
    history: list[dict[str, Any]] = [
        {"step": step + 1, **{name: float(values[step]) for name, values in columns.items()}} for step in range(steps)
    ]
    cycle.training.mkdir()
    (cycle.training / METRICS).write_text("".join(json.dumps(line) + "\n" for line in history))
    model = ModelRef("shapes/models/base", adapter=str(cycle.training / "adapter"))
    CheckpointRecord(
        model=model, method="lora", steps=steps, pairs=12, beta=4000.0, kappa=2000.0, sha256="c0ffee" * 10,
        metrics=final_metrics(history),
    ).write(cycle.training)  # fmt: skip


def finished_cycle(
    folder: Path,
    number: int = 1,
    effect: float = 0.2,
    winner_error: float = 0.002,
    control: bool = True,
    side: int = 32,
) -> PlannedCycle:
    """A decided cycle. effect: how much better the tuned model scores, where 0.1 is the spread of the scores."""
    plan = a_plan(number, control)
    cycle = PlannedCycle(Experiment(folder / "night").cycle(number).folder, plan)
    texts = [EVIL, *(f"a red circle left of {i} green squares" for i in range(PROMPTS - 1))]
    drawn = {
        "training": {prompt_id(text): text for text in (f"training prompt {i}" for i in range(12))},
        "evaluation": {prompt_id(text): text for text in texts},
    }
    write_json(cycle.prompts_file, drawn)
    write_json(cycle.plan_file, plan.model_dump())
    draw_part(cycle, "candidates", 0.5, 8)
    pair_candidates.fn(cycle)
    train_part(cycle, winner_error)
    draw_part(cycle, "base", 0.5, side)
    draw_part(cycle, "tuned", 0.5 + effect, side)
    if control:
        draw_part(cycle, "control", 0.5, side)
    judge_models.fn(cycle)
    promote.fn(cycle)
    return cycle


def written(cycle: PlannedCycle) -> str:
    return write_report.fn(cycle).read_text()


def words(page: str) -> str:
    """What a reader sees, in one line."""
    return html.unescape(" ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S).split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlannedCycle, str]:
    cycle = finished_cycle(tmp_path_factory.mktemp("workspace"))
    return cycle, written(cycle)


def test_the_page_is_self_contained(finished: tuple[PlannedCycle, str]) -> None:
    page = finished[1]
    links = re.findall(r"""(?:src|href|srcset|poster|action)\s*=\s*["']?([^"'\s>]+)""", page)
    assert links
    assert all(link.startswith(("data:image/", "../")) for link in links)
    assert "<script" not in page.lower()
    assert "url(" not in page and "@import" not in page


def test_headline_and_reasons(finished: tuple[PlannedCycle, str]) -> None:
    cycle, page = finished
    text = words(page)
    assert "Cycle 1 was promoted: its model is the new champion of night." in text
    for reason in json.loads(cycle.promotion.read_text())["reasons"]:
        assert reason in text
    assert "Started from the base model shapes/models/base" in text
    assert "Labelled by pickscore" in text


def test_a_rejected_cycle_says_so(tmp_path: Path) -> None:
    text = words(written(finished_cycle(tmp_path, effect=-0.2)))
    assert "Cycle 1 was not promoted: night keeps the model it had." in text
    assert "Not promoted: worse than the start model for hpsv2, oracle." in text


def test_every_verdict_and_control_number_is_on_the_page(finished: tuple[PlannedCycle, str]) -> None:
    cycle, page = finished
    results, text = Results.read(cycle), words(page)
    assert len(results.verdicts) == len(results.control) == 3
    for verdict in [*results.verdicts, *results.control]:
        assert f"{verdict.win_rate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]" in text
        assert f"{verdict.wins} / {verdict.ties} / {verdict.losses}" in text
        assert f"{verdict.mean_base:.4g} → {verdict.mean_tuned:.4g} logit" in text
        assert f"{verdict.mean_difference:+.3g} [{verdict.mean_difference_low:+.3g}" in text
    assert text.count("pickscore optimised") == text.count("oracle held-out") == 2


def test_control_says_whether_it_came_out_even(finished: tuple[PlannedCycle, str]) -> None:
    cycle, page = finished
    assert all(v.low <= 0.5 <= v.high for v in Results.read(cycle).control)
    assert "Every interval covers 0.5, as it should." in words(page)
    values = json.loads(cycle.results.read_text())
    kept = cycle.results.read_text()
    values["control"][2] |= {"low": 0.52, "high": 0.7}
    write_json(cycle.results, values)
    text = words(written(cycle))
    cycle.results.write_text(kept)
    assert "The interval of oracle does not cover 0.5." in text
    assert "one interval in 20" in text


def test_missing_control_is_named(tmp_path: Path) -> None:
    text = words(written(finished_cycle(tmp_path, control=False)))
    assert "The null control was switched off" in text
    assert "Every interval covers" not in text


def test_prompts_are_escaped(finished: tuple[PlannedCycle, str]) -> None:
    """Forty prompts and twenty-four drawn: the page is written for every seed until the evil prompt is on it."""
    cycle, page = finished
    plan, kept = cycle.plan, cycle.plan_file.read_text()
    for seed in range(20):
        if "alert(1)" in page:
            break
        page = written(PlannedCycle(cycle.folder, plan.model_copy(update={"cycle_seed": seed})))
    assert cycle.plan_file.read_text() == kept
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert EVIL in words(page)


def test_both_pictures_of_a_pair_and_their_scores_stand_together(finished: tuple[PlannedCycle, str]) -> None:
    cycle, page = finished
    plan = cycle.plan
    row = int(np.random.default_rng(plan.cycle_seed).permutation(PROMPTS)[0])
    shard, local = divmod(row, cycle.prompts_per_shard("base"))
    uris = []
    for part in ("base", "tuned"):
        image = read_shard(cycle.part(part).candidates(shard))["image"][local].as_py()["bytes"]
        uris.append("data:image/png;base64," + base64.b64encode(image).decode())
    assert uris[0] != uris[1]
    first_card = page[page.index('class="card"') : page.index("</figure>", page.index('class="card"'))]
    assert all(uri in first_card for uri in uris)
    judged = read_judged(cycle, parse("oracle"), "tuned")
    assert f"{judged.base[row]:.4g} → {judged.other[row]:.4g}" in words(first_card)
    assert first_card.count("class=tiny") == 2


def test_extremes_are_the_largest_losses_and_wins_of_the_first_held_out_judge(
    finished: tuple[PlannedCycle, str],
) -> None:
    cycle, page = finished
    assert page.count('class="card"') == 24 + 6 + 6 - max(0, 6 - int((hpsv2(cycle).gain < 0).sum()))
    worst = words(page[page.index("Largest losses under hpsv2") : page.index("Largest wins under hpsv2")])
    row = int(hpsv2(cycle).gain.argmin())
    assert f"hpsv2 {hpsv2(cycle).base[row]:.4g} → {hpsv2(cycle).other[row]:.4g} ▼" in worst


def hpsv2(cycle: PlannedCycle) -> Judged:
    return read_judged(cycle, parse("hpsv2"), "tuned")


def test_gain_follows_the_orientation_of_the_judge() -> None:
    assert Judged(np.array([2.0]), np.array([1.0]), "distance", False, {}).gain.tolist() == [1.0]
    assert Judged(np.array([2.0]), np.array([1.0]), "logit", True, {}).gain.tolist() == [-1.0]


@pytest.mark.parametrize(("winner_error", "warned"), [(0.002, False), (-0.05, False), (0.009, False), (0.03, True)])
def test_drift_is_warned_of_when_the_winners_error_rises(tmp_path: Path, winner_error: float, warned: bool) -> None:
    """The error's mean over the last tenth is `winner_error` up to noise of 1e-4; the accuracy ends near 0.9 always."""
    page = written(finished_cycle(tmp_path, winner_error=winner_error))
    assert ("The model drifts." in page) == ('class="warning"' in page) == warned


def test_training_names_beta_kappa_and_pace(finished: tuple[PlannedCycle, str]) -> None:
    text = words(finished[1])
    assert "Loss dpo with beta = 4000 (kappa = 2000" in text
    assert "60 steps of 16 pairs, 12.5 pairs a second" in text
    assert finished[1].count('<svg viewBox="0 0 460 200"') == 4


@pytest.mark.parametrize(("loss", "kept", "panels"), [
    ("dco", ["implicit_accuracy", "winner_error_delta"], ["Loss", "Implicit accuracy", "Error above the reference"]),
    ("sft", ["winner_error"], ["Loss", "Error"]),
    ("mapo", ["implicit_accuracy", "winner_error", "loser_error"], ["Loss", "Implicit accuracy", "Error"]),
])  # fmt: skip
def test_a_loss_shows_the_curves_it_has(tmp_path: Path, loss: str, kept: list[str], panels: list[str]) -> None:
    cycle = finished_cycle(tmp_path)
    history = [json.loads(line) for line in (cycle.training / METRICS).read_text().splitlines()]
    common = ("step", "loss", "grad_norm", "learning_rate", "pairs_per_second")
    history = [{name: step.get(name, 0.1) for name in (*common, *kept)} for step in history]
    (cycle.training / METRICS).write_text("".join(json.dumps(step) + "\n" for step in history))
    record = CheckpointRecord.read(cycle.training)
    assert record is not None
    dataclasses.replace(record, loss=loss, metrics=final_metrics(history)).write(cycle.training)
    page = written(cycle)
    assert f"<code>{loss}</code> with beta" in page
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == [*panels, "Gradient norm"]


def test_warnings_of_the_training_and_what_only_some_steps_measured_are_shown(tmp_path: Path) -> None:
    cycle = finished_cycle(tmp_path)
    history = [json.loads(line) for line in (cycle.training / METRICS).read_text().splitlines()]
    for number, step in enumerate(history):
        step |= {f"winner_error_delta_q{1 + number % 4}": 0.01 * number}
        step |= {"heldout_implicit_accuracy": 0.625} if number % 20 == 19 else {}
    (cycle.training / METRICS).write_text("".join(json.dumps(step) + "\n" for step in history))
    record = CheckpointRecord.read(cycle.training)
    assert record is not None
    told = ["step 90: the winners' error is 52% above the reference's"]
    dataclasses.replace(record, warnings=told, metrics=final_metrics(history)).write(cycle.training)
    page = written(cycle)
    assert html.escape(told[0], quote=True).replace("&#x27;", "&#39;") in page
    assert "Winner&#39;s error above the reference, by noise" in page and page.count('class="mean series-4"') == 1
    assert "held-out pairs" in page and "<b>0.625</b>" in page


def test_labels_agree_fully_with_the_scorer_that_gave_them(finished: tuple[PlannedCycle, str]) -> None:
    text = words(finished[1])
    pairs = json.loads((finished[0].preferences / "manifest.json").read_text())["splits"]["train"]["rows"]
    assert "12 training prompts with 4 candidates each gave 48 pictures" in text
    assert re.search(rf"pickscore gave the labels 1\.000 \[0\.\d+, 1\.000\] {pairs} ", text)
    assert re.search(rf"oracle 0\.\d+ \[0\.\d+, 0\.\d+\] {pairs} ", text)


def test_history_links_the_sibling_reports(tmp_path: Path) -> None:
    written(finished_cycle(tmp_path, number=1))
    second = finished_cycle(tmp_path, number=2, effect=-0.2)
    page = written(second)
    assert '<a href="../0001/report.html">1</a>' in page
    assert (second.folder / "../0001/report.html").is_file()
    assert re.search(r"2 this page not promoted", words(page))


def test_reproduction_shows_recipe_versions_and_how_to_load(finished: tuple[PlannedCycle, str]) -> None:
    cycle, page = finished
    text = html.unescape(page)
    assert f"pipeline.load_lora_weights('{cycle.training / 'adapter'}')" in text
    assert "DiffusionPipeline.from_pretrained('shapes/models/base')" in text
    plan = cycle.plan
    assert plan.config_hash() in text and "0a1b2c3" in text
    assert json.dumps(plan.recipe.model_dump(), indent=2) in text


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> PlannedCycle:
    """72 pictures of 512 px noise are 0.8 MB each as they lie on disk, 57 MB in all."""
    return finished_cycle(tmp_path_factory.mktemp("large"), side=512)


def test_large_pictures_are_made_small(large: PlannedCycle) -> None:
    page = written(large)
    assert len(page) < 5e6
    assert "data:image/jpeg;base64," in page and "data:image/png" not in page
    assert "class=tiny" not in page


@pytest.mark.parametrize("pictures", ["finished", "large"])
def test_picture_artifact_is_small_and_its_cells_hold(request: pytest.FixtureRequest, pictures: str) -> None:
    fixture = request.getfixturevalue(pictures)
    cycle = fixture if isinstance(fixture, PlannedCycle) else fixture[0]
    judged = {v.judge: read_judged(cycle, parse(v.judge), "tuned") for v in Results.read(cycle).verdicts}
    text = pictures_markdown(cycle, judged)
    rows = [line for line in text.splitlines() if "data:image/" in line]
    assert len(rows) == ARTIFACT_PAIRS
    assert len(text.encode()) < 1e6
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_foreign_text_is_no_markdown() -> None:
    assert markdown("a|b-c\n<b>*d*![](e)") == r"a\|b-c \<b\>\*d\*!\[\](e)"


def test_artifacts_are_published_only_under_prefect(
    finished: tuple[PlannedCycle, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(
        "tasks.report.artifacts.create_table_artifact", lambda table, key, description: sent.update({key: table})
    )
    monkeypatch.setattr(
        "tasks.report.artifacts.create_markdown_artifact", lambda text, key, description: sent.update({key: text})
    )
    written(finished[0])
    assert not sent
    monkeypatch.setattr("tasks.write_report.TaskRunContext.get", lambda: object())
    written(finished[0])
    assert set(sent) == {"verdicts", "pictures"}
    assert [row["kind"] for row in sent["verdicts"]] == ["optimised", "held-out", "held-out"]


def test_picture_keeps_small_files_and_scales_large_ones_down() -> None:
    small, large = (encode_image(a_picture(0, side), "png") for side in (32, 300))
    assert base64.b64decode(picture(small).uri.split(",")[1]) == small
    assert picture(small).tiny and not picture(large).tiny
    assert side_of(picture(large, 256).uri) == 256


def test_thumbnails_enlarge_tiny_pictures_by_a_whole_factor() -> None:
    """128 px hold 30 px four times."""
    assert side_of(thumbnail_uri(encode_image(a_picture(0, 30), "png"), 128)) == 120
    assert side_of(thumbnail_uri(encode_image(a_picture(0, 300), "png"), 128)) == 128


def side_of(uri: str) -> int:
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        return max(image.size)


def test_running_mean_is_shorter_at_the_ends() -> None:
    """Window 3 over 1, 2, 6: (1 + 2) / 2, (1 + 2 + 6) / 3, (2 + 6) / 2."""
    assert running_mean(np.array([1.0, 2.0, 6.0]), 3).tolist() == [1.5, 3.0, 4.0]


@pytest.mark.parametrize("values", [np.array([0.7]), np.zeros(50), np.arange(5000.0)])
def test_a_panel_draws_any_run(values: np.ndarray) -> None:
    drawn = panel("Loss", {"loss": values}, (0.0, "zero"))
    assert "nan" not in drawn.lines[0].mean + drawn.lines[0].dots
    assert drawn.x_ticks and drawn.y_ticks
    assert drawn.lines[0].dots.count("M") <= 400


def test_scale_holds_every_rate_and_has_one_half_in_the_middle() -> None:
    """|0.29 - 0.5| = 0.21 needs 0.25 on each side; nothing at all keeps 0.1."""
    assert Scale.around([0.29, 0.6]).half == pytest.approx(0.25)
    assert Scale.around([0.5]).half == pytest.approx(0.1)
    assert Scale.around([0.0]).half == pytest.approx(0.5)
    assert Scale(0.25).percent(0.5) == 50


def test_a_fully_tuned_unet_is_loaded_as_such(finished: tuple[PlannedCycle, str]) -> None:
    """An adapter goes on top of the base; a whole UNet replaces the base's."""
    cycle, _ = finished
    lines = snippet(ModelRef("shapes/models/base", network=str(cycle.training / "unet"))).splitlines()
    assert lines == [
        "from diffusers import DiffusionPipeline, UNet2DConditionModel",
        f"unet = UNet2DConditionModel.from_pretrained('{cycle.training / 'unet'}')",
        "pipeline = DiffusionPipeline.from_pretrained('shapes/models/base', unet=unet)",
    ]
