"""The whole loop on tiny random models: what it leaves behind, what it refuses, and where it starts from."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.manifest import verify
from data.schema import read_metadata
from data.shards import read_shard
from tasks.record.champion import Champion
from tasks.record.workspace import experiment_at
from training.model.reference import ModelRef

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(preset: Path, workspace: Path, **parameters: Any) -> list[str]:
    from flows.full_cycle import full_cycle

    reports: list[str] = full_cycle(preset=str(preset), workspace=str(workspace), **parameters)
    return reports


@pytest.fixture(scope="module")
def workspace(prefect_server: None, tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one finished cycle, labelled by hpsv2."""
    folder = tmp_path_factory.mktemp("workspace")
    reports = run(tiny_preset, folder, scorer="hpsv2")
    assert reports == [str(folder / "default" / "cycles" / "0001" / "report.html")]
    return folder


@pytest.fixture
def cycle(workspace: Path) -> Path:
    return workspace / "default" / "cycles" / "0001"


def test_everything_promised_is_there(cycle: Path) -> None:
    for name in ("plan.json", "prompts.json", "preferences/README.md", "preferences/manifest.json", "report.html",
                 "training/adapter/pytorch_lora_weights.safetensors", "training/metrics.jsonl", "promotion.json",
                 "evaluation/results.json", "finished.json"):  # fmt: skip
        assert (cycle / name).is_file(), name
    verify(cycle / "preferences", "deep")


def test_the_preference_shards_say_who_labelled_them_and_how(cycle: Path) -> None:
    table = read_shard(sorted((cycle / "preferences").glob("*.arrow"))[0])
    metadata = read_metadata(table.schema)
    assert metadata["label_rule"]["by"] == "hpsv2"
    assert {scorer["name"]: scorer["unit"] for scorer in metadata["scorers"]} == {
        "hpsv2": "cosine",
        "pickscore": "logit",
    }
    for row in table.drop_columns(["latent_0", "latent_1", "prompt_embedding"]).to_pylist():
        won, lost = (0, 1) if row["label_0"] == 1.0 else (1, 0)
        difference = row[f"score_hpsv2_{won}"] - row[f"score_hpsv2_{lost}"]
        assert difference == pytest.approx(row["margin"], abs=1e-6) and difference > 0
        assert row["score_pickscore_0"] is not None


def test_common_readers_show_images_and_scores(cycle: Path, tmp_path: Path) -> None:
    import duckdb
    import polars
    from datasets import load_dataset

    files = [str(path) for path in sorted((cycle / "preferences").glob("*.arrow"))]
    rows = load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    assert rows[0]["image_0"].size == (32, 32) and isinstance(rows[0]["score_hpsv2_0"], float)
    frame = polars.concat(polars.read_ipc(file) for file in files)
    assert len(frame) == len(rows) == 8 and frame["score_pickscore_1"].null_count() == 0
    light = read_shard(Path(files[0])).drop_columns(["latent_0", "latent_1", "prompt_embedding"])
    found = duckdb.sql("select caption, score_hpsv2_0, octet_length(image_0.bytes) as size from light").fetchall()
    assert len(found) == light.num_rows and all(row[2] > 100 for row in found)


def test_each_pair_is_the_best_against_the_worst_of_its_prompt(cycle: Path) -> None:
    best: dict[str, list[float]] = {}
    for shard in sorted((cycle / "candidates").glob("*.arrow")):
        prompts = read_shard(shard, ["prompt_id"])["prompt_id"].to_pylist()
        scores = read_shard(cycle / "scores" / "hpsv2" / shard.name)["score"].to_pylist()
        for prompt, score in zip(prompts, scores, strict=True):
            best.setdefault(prompt, []).append(score)
    pairs = [row for path in (cycle / "preferences").glob("*.arrow")
             for row in read_shard(path, ["prompt_id", "margin"]).to_pylist()]  # fmt: skip
    assert {row["prompt_id"] for row in pairs} == set(best)
    for row in pairs:
        scores = best[row["prompt_id"]]
        assert row["margin"] == pytest.approx(max(scores) - min(scores), abs=1e-6)


def test_both_sides_of_the_evaluation_have_equal_seeds_and_the_control_others(cycle: Path) -> None:
    seeds = {part: [seed for shard in sorted((cycle / "evaluation" / part / "candidates").glob("*.arrow"))
                    for seed in read_shard(shard, ["seed"])["seed"].to_pylist()]
             for part in ("base", "tuned", "control")}  # fmt: skip
    assert seeds["base"] == seeds["tuned"] and not set(seeds["base"]) & set(seeds["control"])


def test_no_evaluation_prompt_was_trained_on(cycle: Path) -> None:
    drawn = json.loads((cycle / "prompts.json").read_text())
    assert not set(drawn["training"]) & set(drawn["evaluation"])
    assert len(drawn["training"]) == 8 and len(drawn["evaluation"]) == 12


def test_the_judges_are_told_apart(cycle: Path) -> None:
    results = json.loads((cycle / "evaluation" / "results.json").read_text())
    assert {verdict["judge"]: verdict["held_out"] for verdict in results["verdicts"]} == {
        "pickscore": True,
        "hpsv2": False,
    }
    assert len(results["control"]) == 2 and results["decision"]["reasons"]


def test_a_candidate_can_be_drawn_again_alone(cycle: Path) -> None:
    from data.pictures import open_image
    from tasks.record.plan import PlannedCycle
    from training.model.loading import load_pipeline
    from training.model.sampling import embed_prompts, negative_prompt, sample_images

    plan = PlannedCycle.open(cycle).plan
    row = read_shard(sorted((cycle / "candidates").glob("*.arrow"))[1], ["caption", "seed", "image"]).to_pylist()[-1]
    pipeline = load_pipeline(ModelRef.read(plan.start))
    embedding, negative = embed_prompts(pipeline, [row["caption"]]), negative_prompt(pipeline)
    image = sample_images(pipeline, embedding, negative, [row["seed"]], plan.sampler(), 1)[1][0]
    stored = open_image(row["image"]["bytes"])
    assert abs(image.astype(int) - stored).max() <= 1


def test_the_next_cycle_starts_from_the_champion_and_draws_its_own_prompts(
    workspace: Path, cycle: Path, tiny_preset: Path
) -> None:
    """The first cycle of random models is hardly ever promoted, so its acceptance is written by hand."""
    experiment = experiment_at(str(workspace), "default")
    champion = Champion.read(experiment)
    plan = json.loads((cycle / "plan.json").read_text())
    model = ModelRef(plan["start"]["base"], adapter="cycles/0001/training/adapter")
    champion.model_copy(update={"cycle": 1, "model": model, "label": "base+champion"}).write(experiment)
    run(tiny_preset, workspace, scorer="hpsv2")
    second = workspace / "default" / "cycles" / "0002"
    next_plan = json.loads((second / "plan.json").read_text())
    assert (next_plan["champion"], next_plan["start"]["adapter"]) == (1, "cycles/0001/training/adapter")
    drawn = [json.loads((folder / "prompts.json").read_text())["training"] for folder in (cycle, second)]
    assert set(drawn[0]) != set(drawn[1])
    first_step = json.loads((second / "training" / "metrics.jsonl").read_text().splitlines()[0])
    assert first_step["margin"] == 0.0, "the policy starts at the champion, which is its reference"
    models = set(read_shard(sorted((second / "candidates").glob("*.arrow"))[0], ["model"])["model"].to_pylist())
    assert models == {"base+champion"}
    history = Champion.read(experiment).history
    assert [entry.cycle for entry in history] == [1, 2]


def test_tuned_text_encoders_draw_the_evaluation_and_are_never_left_behind(tiny_preset: Path, tmp_path: Path) -> None:
    from data.pictures import open_image
    from tasks.record.plan import PlannedCycle
    from training.model.loading import load_pipeline
    from training.model.sampling import embed_prompts, negative_prompt, sample_images

    training = {"text_encoders": True, "steps": 2, "learning_rate": 0.1}
    run(tiny_preset, tmp_path, training=training, evaluation={"max_prompts": 10, "null_control": False})
    cycle = tmp_path / "default" / "cycles" / "0001"
    plan, tuned = (
        PlannedCycle.open(cycle).plan,
        ModelRef(str(tiny_preset.parent / "base"), adapter=str(cycle / "training/adapter")),
    )
    shard = sorted((cycle / "evaluation" / "tuned" / "candidates").glob("*.arrow"))[0]
    row = read_shard(shard, ["caption", "seed", "image"]).to_pylist()[0]
    stored = open_image(row["image"]["bytes"]).astype(int)
    pipeline, off = load_pipeline(tuned), []
    for encoders in (pipeline, load_pipeline(ModelRef.read(plan.start))):
        embedding, negative = embed_prompts(encoders, [row["caption"]]), negative_prompt(encoders)
        image = sample_images(pipeline, embedding, negative, [row["seed"]], plan.sampler(), 1)[1][0]
        off.append(abs(image - stored).max())
    assert off[0] <= 1 < off[1]
    experiment = experiment_at(str(tmp_path), "default")
    model = ModelRef(tuned.base, adapter="cycles/0001/training/adapter")
    champion = Champion.read(experiment)
    champion.model_copy(update={"cycle": 1, "model": model, "label": "champion"}).write(experiment)
    message = r"training\.text_encoders=false.*also changes text_encoder: that would be lost.*new name as experiment"
    with pytest.raises(ValueError, match=message):
        run(tiny_preset, tmp_path)
    assert not (tmp_path / "default" / "cycles" / "0002" / "candidates").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scorer": "nope"}, r"(?s)scorer='nope'.*hpsv2.*pickscore"),
        ({"base_model": "nope"}, r"base_model='nope'"),
        ({"prompts": "nope.txt"}, r"prompts='nope.txt'.*no such file"),
        ({"cycles": 0}, r"cycles"),
        ({"generation": {"candidates": 1}}, r"candidates"),
        ({"generation": {"candidats": 4}}, r"candidats"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_written(
    tiny_preset: Path, tmp_path: Path, parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        run(tiny_preset, tmp_path / "new", **parameters)
    assert not list((tmp_path / "new").rglob("*.arrow")) and not list((tmp_path / "new").rglob("plan.json"))
