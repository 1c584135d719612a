"""The flow `score`, cycles labelled by expressions and by strangers' scorers, and what a broken one leaves behind."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.manifest import verify
from data.pictures import open_image
from data.schema import read_metadata
from data.shards import ShardError, read_shard
from scoring.scorers.registry import ScorerSource, load_scorer
from scoring.scorers.scorer import ScoringError
from tasks.record.recipe import ParameterError

pytestmark = pytest.mark.usefixtures("prefect_server")

PLUGIN = '''
import numpy as np
from types import SimpleNamespace

class Brightness:
    """A stranger's scorer: it knows nothing of this project."""

    def __init__(self, source=None, device="cpu", fail_at=None):
        self.info = SimpleNamespace(name="brightness", version="1", unit="level")
        self.calls, self.fail_at = 0, fail_at

    def score(self, images, prompts):
        if any(f" {self.fail_at} " in prompt for prompt in prompts):
            raise OSError("the lamp went out")
        return np.array([image.mean() for image in images], dtype=np.float32)

    def close(self):
        pass

class Shapeless(Brightness):
    def score(self, images, prompts):
        return np.zeros((len(images), 1), np.float32)

class NotANumber(Brightness):
    def score(self, images, prompts):
        return np.array([np.nan if i == 2 else 1.0 for i in range(len(images))], np.float32)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of its own, built and installed by pip into a folder of its own."""
    project, site = tmp_path_factory.mktemp("lamp"), tmp_path_factory.mktemp("site")
    (project / "lamp.py").write_text(PLUGIN)
    (project / "pyproject.toml").write_text(
        '[project]\nname = "lamp"\nversion = "1.0"\n'
        '[project.entry-points."rlaif.scorers"]\nbrightness = "lamp:Brightness"\n'
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\npy-modules = ["lamp"]\n'
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(site), str(project)], check=True, capture_output=True)
    return site


@pytest.fixture
def installed(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plugin))


def verdicts(cycle: Path) -> dict[str, bool]:
    """Judge -> whether it is held out."""
    results = json.loads((cycle / "evaluation" / "results.json").read_text())
    return {verdict["judge"]: verdict["held_out"] for verdict in results["verdicts"]}


def other_pickscore(preset: Path, folder: Path) -> Path:
    """The preset's PickScore with another mean in its preprocessing."""
    copy = Path(shutil.copytree(preset.parent / "pickscore", folder / "other"))
    name = next(name for name in ("preprocessor_config.json", "processor_config.json") if (copy / name).is_file())
    (copy / name).write_text((copy / name).read_text().replace("0.48145466", "0.5"))
    return copy


def cycle_of(preset: Path, workspace: Path, **parameters: Any) -> Path:
    from flows.full_cycle import full_cycle

    return Path(full_cycle(preset=str(preset), workspace=str(workspace), **parameters)[0]).parent


def labels(folder: Path) -> list[dict]:
    columns = ["label_0", "soft_label_0", "margin", "score_pickscore_0", "score_pickscore_1"]
    return [row for path in sorted(folder.glob("*.arrow")) for row in read_shard(path, columns).to_pylist()]


@pytest.fixture(scope="module")
def first(plugin: Path, prefect_server: None, tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cycle that the stranger's scorer labelled by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(plugin))
        return cycle_of(tiny_preset, tmp_path_factory.mktemp("ws"), scorer="brightness", judges=["pickscore"])


def test_an_installed_strangers_scorer_labels_a_cycle(first: Path) -> None:
    rule = read_metadata(read_shard(next((first / "preferences").glob("*.arrow"))).schema)["label_rule"]
    assert rule["by"] == "brightness" and rule["unit"] == "level"
    assert all(row["soft_label_0"] is None for row in labels(first / "preferences"))
    assert verdicts(first) == {"pickscore": True}


def test_scores_from_memory_are_those_of_the_stored_files(first: Path, tiny_preset: Path) -> None:
    """The run scored the pictures it had just drawn; here they are decoded from the shards, with another loading."""
    scorer = load_scorer("pickscore", {"pickscore": ScorerSource(str(tiny_preset.parent / "pickscore"))})
    for part in ("base", "tuned"):
        for path in sorted((first / "evaluation" / part / "candidates").glob("*.arrow")):
            rows = read_shard(path, ["image", "caption"]).to_pylist()
            images = [open_image(row["image"]["bytes"]) for row in rows]
            scores = read_shard(path.parents[1] / "scores" / "pickscore" / path.name)["score"].to_numpy()
            np.testing.assert_array_equal(scorer.score(images, [row["caption"] for row in rows]), scores)


def test_its_candidates_are_labelled_by_a_combination_and_nothing_is_drawn_again(
    installed: None, first: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    """hpsv2 is part of the label, so neither it nor what holds it is held out; brightness alone is."""
    judges = ["hpsv2", "mean(hpsv2,brightness)", "brightness"]
    scorer = "mean(pickscore,2*hpsv2)"
    second = cycle_of(tiny_preset, tmp_path, scorer=scorer, judges=judges, candidates_of=str(first))
    for part in ("candidates", "embeddings", "evaluation/base/candidates", "evaluation/control/candidates"):
        ours, theirs = (sorted((cycle / part).glob("*.arrow")) for cycle in (second, first))
        assert [path.stat().st_ino for path in ours] == [path.stat().st_ino for path in theirs] and ours
    assert verdicts(second) == dict(zip(judges, [False, False, True], strict=True))
    assert sorted(path.name for path in (second / "scores").iterdir()) == ["brightness", "hpsv2", "pickscore"]
    found = labels(second / "preferences")
    assert all(row["margin"] > 0 and 0 < row["soft_label_0"] < 1 for row in found) and len(found) > 3
    assert all((row["soft_label_0"] > 0.5) == (row["label_0"] == 1) for row in found)
    comparison = json.loads((second / "comparison.json").read_text())
    assert comparison["labelled_by"] == scorer and comparison["other"] == "brightness"
    assert f"[{comparison['low']:.3f}, {comparison['high']:.3f}]" in (second / "report.html").read_text()


def test_a_cycle_is_labelled_anew_by_the_flow(first: Path) -> None:
    from flows.score import score

    before = {path: path.stat().st_mtime_ns for path in first.rglob("*.arrow")}
    pairing: Any = {"rule": "all-pairs"}  # as from the command line
    for scorer in ("pickscore", "hpsv2"):
        folder = Path(score(str(first), scorer=scorer, pairing=pairing))
        verify(folder, "deep")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert (first / "report.html").read_text().count("<td>brightness<small>") == 2
    for row in labels(folder.parent / "pickscore"):  # PickScore's probability is the softmax of its two scores
        difference = row["score_pickscore_0"] - row["score_pickscore_1"]
        assert row["soft_label_0"] == pytest.approx(1 / (1 + np.exp(-difference)), abs=1e-6)
    with pytest.raises(ParameterError, match=r"(?s)scorer='nope'.*hpsv2"):
        score(str(first), scorer="nope")
    with pytest.raises(ParameterError, match="source='nowhere': there is no such folder"):
        score("nowhere")
    with pytest.raises(ParameterError, match="output='x', caption_column=None: not for a cycle"):
        score(str(first), output="x")


def test_scores_by_other_weights_are_neither_kept_nor_mixed(first: Path, tiny_preset: Path, tmp_path: Path) -> None:
    from flows.score import score

    cycle = Path(shutil.copytree(first, tmp_path / "w/cycles/0001"))
    plan = json.loads((cycle / "plan.json").read_text())
    shutil.rmtree(cycle / "relabelled", ignore_errors=True)
    plan["recipe"]["scorers"]["pickscore"]["preference_scale"] = 2.0  # of soft labels alone: scores may stay
    (cycle / "plan.json").write_text(json.dumps(plan))
    for row in labels(Path(score(str(cycle), scorer="pickscore"))):
        difference = row["score_pickscore_0"] - row["score_pickscore_1"]
        assert row["soft_label_0"] == pytest.approx(1 / (1 + np.exp(-2 * difference)), abs=1e-6)
    plan["recipe"]["scorers"]["pickscore"]["source"] = str(other_pickscore(tiny_preset, tmp_path))
    (cycle / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ShardError, match=r"was scored by other weights or settings .* delete the folder"):
        score(str(cycle), scorer="pickscore")


def test_code_that_only_a_plan_names_is_not_run(installed: None, first: Path, tmp_path: Path) -> None:
    from flows.score import score

    cycle = Path(shutil.copytree(first, tmp_path / "w/cycles/0001"))
    plan = json.loads((cycle / "plan.json").read_text())
    plan["recipe"]["scorers"]["hpsv2"]["factory"] = "lamp:Brightness"
    (cycle / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ParameterError, match=r"plan binds it to code \(lamp:Brightness\)"):
        score(str(cycle), scorer="hpsv2")


def test_candidates_that_do_not_fit_are_refused(first: Path, tiny_preset: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"candidates_of=.*generation was .*steps=2.*it must be the same"):
        cycle_of(tiny_preset, tmp_path, candidates_of=str(first), generation={"steps": 3})
    with pytest.raises(ParameterError, match="candidates_of='nowhere': there is no cycle"):
        cycle_of(tiny_preset, tmp_path, candidates_of="nowhere")
    with pytest.raises(ParameterError, match="cycles=2: with candidates_of it must be 1"):
        cycle_of(tiny_preset, tmp_path, candidates_of="nowhere", cycles=2)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("brightness?fail_at=5", r"scorer 'brightness' failed at image \d+ with prompt '.* 5 .*': OSError: the lamp"),
        ("lamp:Shapeless", r"scorer 'brightness' returned float32 of shape \(8, 1\) .* prompt '.*'"),
        ("lamp:NotANumber", r"scorer 'brightness' returned nan for image 2 with prompt '.*'"),
    ],
)
def test_a_broken_scorer_is_named_with_the_prompt_and_written_scores_stay(
    installed: None, tiny_preset: Path, tmp_path: Path, scorer: str, message: str
) -> None:
    for name, numbers in (("training", range(8)), ("heldout", range(100, 110))):
        (tmp_path / f"{name}.txt").write_text("".join(f"a picture of {i} things\n" for i in numbers))
    given = {"prompts": str(tmp_path / "training.txt"), "evaluation": {"prompts": str(tmp_path / "heldout.txt")}}
    with pytest.raises(ScoringError, match=message):
        cycle_of(tiny_preset, tmp_path, scorer=scorer, judges=["hpsv2"], **given)
    cycle = tmp_path / "default/cycles/0001"
    drawn = [text for _, text in sorted(json.loads((cycle / "prompts.json").read_text())["training"].items())]
    before = drawn.index("a picture of 5 things") // 4 if "fail_at" in scorer else 0  # four prompts a shard
    assert before == (1 if "fail_at" in scorer else 0)
    written = sorted((cycle / "scores").rglob("*.arrow"))
    assert len(written) == before and all(read_shard(path).num_rows == 12 for path in written)
    assert len(list((cycle / "candidates").glob("*.arrow"))) == 2


def test_a_folder_of_pictures_is_scored(tiny_preset: Path, tmp_path: Path) -> None:
    from flows.score import score

    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    images = [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(14)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture {index}")
    parameters: dict[str, Any] = {
        "scorer": "mean(pickscore,hpsv2)",
        "preset": str(tiny_preset),
        "output": str(tmp_path / "out"),
    }
    path = Path(score(str(folder), **parameters))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["prompt"] for row in rows] == [f"picture {i}" for i in range(14)]
    for name in ("pickscore", "hpsv2"):
        scorer = load_scorer(name, {name: ScorerSource(str(tiny_preset.parent / name))})
        expected = scorer.score(images, [row["prompt"] for row in rows])
        np.testing.assert_allclose([float(row[f"score_{name}"]) for row in rows], expected, rtol=1e-5)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.arrow")}
    assert len(written) == 2 * 2  # twelve images a shard
    next(iter(written)).unlink()  # as if a kill had come before this shard
    score(str(folder), **parameters)
    kept = [path for path, when in written.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == len(written) - 1
    other = tmp_path / "other.toml"
    weights = other_pickscore(tiny_preset, tmp_path)
    other.write_text(tiny_preset.read_text().replace(str(tiny_preset.parent / "pickscore"), str(weights)))
    with pytest.raises(ParameterError, match=r"scores of other weights or settings .* give another folder"):
        score(str(folder), **{**parameters, "preset": str(other)})
    (folder / "03.txt").write_text("another caption")
    with pytest.raises(ParameterError, match=r"scores of other images or captions .* give another folder"):
        score(str(folder), **parameters)
    (folder / "03.txt").write_text("picture 3")
    (folder / "99.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "99.txt").write_text("one more")
    (folder / "00.png").unlink()
    (folder / "00.txt").unlink()
    with pytest.raises(ParameterError, match="scores of other images or captions"):
        score(str(folder), **parameters)
