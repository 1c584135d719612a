"""The flow `train`: on sealed pairs and on human data, resumed, started from earlier trainings, and what it refuses."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.manifest import read_manifest, verify
from data.shards import ShardError, read_shard
from tasks.record.recipe import ParameterError, Recipe, resolve
from tasks.train_alone import check_pairs, start_model
from tests.families import save_sdxl
from tests.tasks.test_import_pairs import row, save
from tests.training.worlds import make_plan, save_pairs
from training.loop.checkpoint import CheckpointRecord
from training.loop.trainer import train as train_library
from training.model.loading import load_pipeline
from training.model.reference import ADAPTER_FILE, ModelRef
from training.plan import TrainingPlan

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("pairs") / "preferences")


def run(preset: Path, workspace: Path, pairs: Path | str, **parameters: Any) -> Path:
    from flows.train import train

    return Path(train(str(pairs), preset=str(preset), workspace=str(workspace), **parameters))


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / ADAPTER_FILE))


def preset_of(preset: Path, **flat: object) -> Recipe:
    return resolve(str(preset), 0, flat, {})


class Killed(RuntimeError):
    pass


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.fixture(scope="module")
def trained(
    prefect_server: None, tiny_preset: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    return run(tiny_preset, tmp_path_factory.mktemp("ws"), pairs, name="first", seed=3)


def test_sealed_pairs_are_trained_on(trained: Path, tiny_preset: Path, pairs: Path, tmp_path: Path) -> None:
    """What comes out is what the library makes of the preset's numbers."""
    assert trained.parts[-2:] == ("trainings", "first")
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    record = CheckpointRecord.read(trained)
    assert len(lines) == 6 and record is not None and record.steps == 6 and record.pairs == 12
    assert (trained / "checkpoint-000006").is_dir() and (trained / "adapter" / ADAPTER_FILE).is_file()
    base = str(tiny_preset.parent / "base")
    plan = make_plan(tmp_path, model=ModelRef(base), pairs=str(pairs), output=str(tmp_path / "library"), seed=3)
    train_library(plan)
    ours, theirs = adapter_of(trained), adapter_of(tmp_path / "library")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    again = TrainingPlan.read(trained / "plan.json")
    assert again.pairs == str(pairs) and again.seed == 3 and again.output == str(trained)
    load_pipeline(record.model)
    assert "Preferences come from models" in (trained / "README.md").read_text()


def test_the_same_parameters_change_nothing_and_others_are_refused(
    trained: Path, tiny_preset: Path, pairs: Path, tmp_path: Path
) -> None:
    before, workspace = stamps(trained), trained.parent.parent
    moved = shutil.copytree(pairs, tmp_path / "moved")
    for source in (pairs, moved):  # the rows count, not where they lie
        assert run(tiny_preset, workspace, source, name="first", seed=3, execution={"batch_size": 3}) == trained
    message = r"holds a training with other parameters \(seed: 3 -> 4; training\.beta: 2000\.0 -> 9\.0\)"
    with pytest.raises(ParameterError, match=message):
        run(tiny_preset, workspace, pairs, name="first", seed=4, training={"beta": 9})
    other = save_pairs(tmp_path / "other", seed=1)
    with pytest.raises(ParameterError, match=r"other parameters \(pairs: '\w+' -> '\w+'\)"):
        run(tiny_preset, workspace, other, name="first", seed=3)
    assert stamps(trained) == before


def test_a_killed_training_goes_on_at_its_checkpoint(
    trained: Path, tiny_preset: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.loop.run import Run

    step = Run.step

    def die(self: Run, number: int) -> dict[str, float]:
        if number == 3:
            raise Killed
        return step(self, number)

    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "step", die)
        run(tiny_preset, tmp_path, pairs, output=str(output), seed=3)
    assert not (output / "adapter").exists()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert run(tiny_preset, tmp_path, pairs, output=str(output), seed=3) == output
    assert (output / "metrics.jsonl").read_text().count("\n") == 6
    ours, theirs = adapter_of(output), adapter_of(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_earlier_training_is_where_it_starts_and_its_reference(
    trained: Path, tiny_preset: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = run(tiny_preset, tmp_path, pairs, name="second", adapter=str(trained), training={"steps": 1})
    assert json.loads((folder / "metrics.jsonl").read_text())["margin"] == 0.0
    model = TrainingPlan.read(folder / "plan.json").model
    assert model.adapter == str(trained / "adapter")
    assert start_model(preset_of(tiny_preset), str(trained / "adapter")) == model
    full = run(tiny_preset, tmp_path, pairs, name="full", training={"method": "full", "steps": 1})
    assert start_model(preset_of(tiny_preset), str(full)) == ModelRef(model.base, network=str(full / "unet"))
    with pytest.raises(ValueError, match=r"has rank \[4\] and alpha 4, but training\.lora_rank=8"):
        run(tiny_preset, tmp_path, pairs, name="x", adapter=str(trained), training={"lora_rank": 8})
    with pytest.raises(ValueError, match=r"has rank \[4\] and alpha 4, .* training\.lora_alpha=2"):
        run(tiny_preset, tmp_path, pairs, name="x", adapter=str(trained), training={"lora_alpha": 2})
    with pytest.raises(ValueError, match=r"adapter=.*to_k.*training\.lora_targets=\['to_q'\] means 8"):
        run(tiny_preset, tmp_path, pairs, name="x", adapter=str(trained), training={"lora_targets": ["to_q"]})
    with pytest.raises(ParameterError, match=r"adapter='nowhere': there is no pytorch_lora_weights"):
        run(tiny_preset, tmp_path, pairs, name="x", adapter="nowhere")
    tuned = run(tiny_preset, tmp_path, pairs, name="tuned", training={"text_encoders": True, "steps": 1})
    with pytest.raises(ValueError, match=r"training\.text_encoders=false.*also changes text_encoder.*would be lost"):
        run(tiny_preset, tmp_path, pairs, name="x", adapter=str(tuned))
    base = shutil.copytree(tiny_preset.parent / "base", tmp_path / "base")
    with pytest.raises(ParameterError, match=r"was trained on '.*', not on base_model="):
        run(tiny_preset, tmp_path, pairs, name="x", adapter=str(trained), base_model=str(base))


def test_human_data_are_imported_once_and_trained_on(tiny_preset: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "humans.parquet", [row(index) for index in range(10)])
    first = run(tiny_preset, tmp_path, source, name="a", training={"steps": 1})
    imported = next((tmp_path / "imports").iterdir())
    before = stamps(imported)
    second = run(tiny_preset, tmp_path, source, name="b", training={"steps": 1, "beta": 100})
    assert stamps(imported) == before and read_manifest(imported).rows == 10
    records = [CheckpointRecord.read(folder) for folder in (first, second)]
    assert [record and record.pairs for record in records] == [10, 10]
    card = (first / "README.md").read_text()
    assert "imported from the source below" in card and "humans.parquet" in card and "from models" not in card
    with pytest.raises(ParameterError, match=r"other parameters \(pairs: '\w+' -> '\w+'\)"):
        run(tiny_preset, tmp_path, source, name="a", training={"steps": 1}, max_pairs=4)


def test_sdxl_is_told_each_pictures_own_size_and_crop(
    tiny_preset: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.model.family import Conditions
    from training.model.stable_diffusion import StableDiffusionXL

    base, told = str(save_sdxl(tmp_path / "xl")), []
    predict = StableDiffusionXL.predict

    def listen(self: StableDiffusionXL, *inputs: Any) -> torch.Tensor:
        told.append(next(each for each in inputs if isinstance(each, Conditions)).time_ids)
        return predict(self, *inputs)

    monkeypatch.setattr(StableDiffusionXL, "predict", listen)
    source = save(tmp_path / "humans.parquet", [row(index, label_0=1.0, label_1=0.0) for index in range(4)])
    run(tiny_preset, tmp_path, source, base_model=base, training={"steps": 1})
    folder = next((tmp_path / "imports").iterdir())
    verify(folder, "deep")
    table = read_shard(folder / "00000.arrow")
    winner, loser = [48, 40, 3, 0, 32, 32], [36, 64, 0, 12, 32, 32]  # 40 -> 32 makes 48 -> 38; 36 -> 32 makes 64 -> 57
    assert table["time_ids_0"].to_pylist() == [winner] * 4 and table["time_ids_1"].to_pylist() == [loser] * 4
    assert table.schema.field("pooled_embedding").type.list_size == 24
    assert [each.tolist() for each in told] == [[winner] * 4 + [loser] * 4] * 2  # reference and policy
    with pytest.raises(ParameterError, match=r"embedding width 16, the model's 40; pooled width None, the model's 24"):
        run(tiny_preset, tmp_path, pairs, base_model=base)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pairs": "nowhere"}, r"pairs='nowhere': no such folder or file"),
        ({"base_model": "nowhere"}, r"base_model='nowhere': no such folder"),
        ({"name": "a/b"}, r"name='a/b': use letters"),
        ({"max_pairs": 5}, r"max_pairs=5: only for data that are imported"),
        ({"generation": {"height": 64}}, r"generation\.height=64: only for data that are imported"),
        ({"training": {"lora_targets": ["to_x"]}}, r"training\.lora_targets: no layer .* ends in 'to_x'"),
        ({"training": {"loss": "rdpo"}}, r"training\.loss='rdpo' needs training\.label_smoothing"),
        ({"training": {"method": "full", "text_encoders": True}}, r"training\.text_encoders=true: not with .*'full'"),
        ({"training": {"mixed_precision": "fp16"}}, r"training\.mixed_precision='fp16' needs a CUDA device"),
        ({"execution": {"device": "cuda:7"}}, r"execution\.device='cuda:7' is not there"),
        ({"training": {"stepz": 1}}, r"stepz"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_preset: Path, pairs: Path, tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        run(tiny_preset, tmp_path, **{"pairs": pairs, **parameters})
    assert list(tmp_path.iterdir()) == []


def test_pairs_that_lack_what_the_loss_needs_are_refused(tiny_preset: Path, tmp_path: Path) -> None:
    hard = save_pairs(tmp_path / "hard", soft=False)
    with pytest.raises(ParameterError, match=r"pairs='.*hard': .* have no soft label, which training"):
        run(tiny_preset, tmp_path, hard, training={"soft_labels": True})
    source = save(tmp_path / "humans.parquet", [row(index) for index in range(4)])
    for option in ("soft_labels", "margin_weights"):
        with pytest.raises(ParameterError, match=rf"training\.{option}=True: pairs='.*' are labelled 0 or 1, without"):
            run(tiny_preset, tmp_path, source, training={option: True})
    with pytest.raises(ParameterError, match=r"generation\.steps: nothing is generated"):
        run(tiny_preset, tmp_path, source, generation={"steps": 9})
    (tmp_path / "cycle").mkdir()
    cycle_pairs = save_pairs(tmp_path / "cycle" / "preferences")
    with pytest.raises(ParameterError, match=r"is a cycle; its pairs are pairs='.*/cycle/preferences'"):
        run(tiny_preset, tmp_path, cycle_pairs.parent)
    assert not (tmp_path / "trainings").exists() and not (tmp_path / "imports").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LATENT": (16, 8, 8)}, r"latent channels 16, the model's 4"),
        ({"EMBEDDING": (77, 24)}, r"embedding width 24, the model's 16"),
    ],
)
def test_pairs_of_another_kind_of_model_are_refused(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(f"tests.training.worlds.{name}", value)
    other = save_pairs(tmp_path / "other")
    with pytest.raises(ParameterError, match=rf"pairs='.*other' do not fit base_model='.*base': {message}\."):
        run(tiny_preset, tmp_path, other)
    assert not (tmp_path / "trainings").exists()


def test_pairs_of_another_base_model_are_warned_of(
    tiny_preset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save(tmp_path / "humans.parquet", [row(index) for index in range(4)])
    run(tiny_preset, tmp_path, source, training={"steps": 1})
    folder = next((tmp_path / "imports").iterdir())
    other = shutil.copytree(tiny_preset.parent / "base", tmp_path / "base")
    logging.getLogger("tasks").propagate = True  # show_logs has given it a handler of its own
    check_pairs("p", folder, preset_of(tiny_preset))
    assert "made with base_model" not in caplog.text
    check_pairs("p", folder, preset_of(tiny_preset, base_model=str(other)))
    assert f"made with base_model={str(tiny_preset.parent / 'base')!r}, not {str(other)!r}" in caplog.text


def test_damaged_pairs_are_not_trained_on(tiny_preset: Path, pairs: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(pairs, tmp_path / "damaged"))
    shard = next(damaged.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match="found sha256"):
        run(tiny_preset, tmp_path, damaged)
