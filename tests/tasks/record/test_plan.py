"""What is refused before anything is computed, and which run a start resumes."""

from pathlib import Path
from typing import Any

import pytest

from tasks.plan_cycle import plan_cycle
from tasks.record.checks import check
from tasks.record.recipe import ParameterError, Recipe, resolve
from tasks.record.runs import begin_run
from tasks.record.settings import Given, GivenEvaluation, GivenExecution, GivenGeneration, GivenTraining, Settings
from tasks.record.workspace import experiment_at

NOTHING: dict[str, Given[Settings]] = {}


@pytest.fixture
def recipe(tiny_preset: Path) -> Recipe:
    return resolve(str(tiny_preset), 0, {}, NOTHING)


def changed(preset: Path, flat: dict[str, object] | None = None, **sections: Given[Settings]) -> Recipe:
    return resolve(str(preset), 0, flat or {}, NOTHING | sections)


def test_a_sound_recipe_passes(recipe: Recipe, tmp_path: Path) -> None:
    training, evaluation = check(recipe, tmp_path / "new" / "workspace")
    assert len(training) + len(evaluation) == 200


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"scorer": "nope"}, r"(?s)scorer='nope'.*hpsv2.*pickscore"),
        ({"judges": ["pickscore", "nope"]}, r"(?s)judges='nope'.*hpsv2.*pickscore"),
        ({"judges": ["pickscore"]}, r"none is held out"),
        ({"scorer": "hpsv2", "judges": ["hpsv2:v2.1", "hpsv2?antialias=0"]}, r"none is held out.*scorer='hpsv2'"),
        ({"scorer": "mean(pickscore,hpsv2)", "judges": ["hpsv2"]}, r"none is held out"),
        ({"judges": ["hpsv2?batch_size=0"]}, r"'hpsv2\?batch_size=0'.*batch_size must be"),
        ({"scorer": "pickscore?preference_scale=-3"}, r"would prefer the worse image"),
        ({"scorer": "hpsv2?sharpness=2"}, r"takes no 'sharpness'; it takes .*antialias"),
        ({"base_model": "no/such/model"}, r"base_model='no/such/model'.*no such folder"),
        ({"base_model": "owner/absent"}, r"base_model='owner/absent'.*hub"),
        ({"prompts": "absent.txt"}, r"prompts='absent.txt'.*no such file"),
    ],
)
def test_wrong_names_are_refused(tiny_preset: Path, tmp_path: Path, flat: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(changed(tiny_preset, flat), tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"generation": GivenGeneration(scheduler="Nope")}, r"generation\.scheduler='Nope'.*DDIMScheduler"),
        (
            {"generation": GivenGeneration(scheduler_options={"spacing": 1})},
            r"scheduler_options=\['spacing'\].*timestep_spacing",
        ),
        ({"training": GivenTraining(lora_targets=["to_q", "to_z"])}, r"lora_targets.*'to_z'.*to_q"),
        ({"training": GivenTraining(mixed_precision="fp16")}, r"mixed_precision='fp16' needs a CUDA device"),
        (
            {"training": GivenTraining(loss="hinge", label_smoothing=0.1)},
            r"training\.label_smoothing=0\.1.*'hinge'.*dpo",
        ),
        (
            {"training": GivenTraining(method="full", text_encoders=True)},
            r"training\.text_encoders=true: not with training\.method='full'.*use method='lora'",
        ),
        ({"training": GivenTraining(loss="rdpo")}, r"'rdpo' needs training\.label_smoothing"),
        (
            {"execution": GivenExecution(shard=True, offload_reference=True)},
            r"shard=true.*offload_reference=true.*leave one",
        ),
        ({"execution": GivenExecution(device="cuda:77")}, r"execution\.device='cuda:77'.*cpu"),
        ({"evaluation": GivenEvaluation(prompts="absent.csv")}, r"evaluation\.prompts='absent\.csv'.*no such file"),
        (
            {"generation": GivenGeneration(prompts_per_cycle=200, candidates=1024, height=65536)},
            r"workspace=.*GiB are free",
        ),
    ],
)
def test_wrong_settings_are_refused(tiny_preset: Path, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(changed(tiny_preset, **section), tmp_path)


def test_soft_labels_need_scorers_that_say_how_sure_they_are(tiny_preset: Path, tmp_path: Path) -> None:
    """pickscore has a scale of its own; the oracle has none."""
    soft: dict[str, Any] = {"training": GivenTraining(soft_labels=True)}
    check(changed(tiny_preset, **soft), tmp_path)
    oracle = changed(tiny_preset, {"scorer": "shapes.oracle:Oracle"}, **soft)
    with pytest.raises(ParameterError, match=r"training\.soft_labels=true.*preference_scale of shapes\.oracle:Oracle"):
        check(oracle, tmp_path)


def test_a_model_that_predicts_something_else_is_refused(tiny_preset: Path, tmp_path: Path) -> None:
    from tests.tiny import save_pipeline

    odd = save_pipeline(tmp_path / "odd", prediction_type="sample")
    with pytest.raises(ValueError, match=r"predicts 'sample'; supported: epsilon, v_prediction"):
        check(changed(tiny_preset, {"base_model": str(odd)}), tmp_path)


def test_a_base_model_that_changed_under_a_plan_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(recipe.base_model, base)
    own = recipe.model_copy(update={"base_model": str(base)})
    experiment = experiment_at(str(tmp_path), "x")
    cycle = plan_cycle.fn(experiment, own, 1)
    assert plan_cycle.fn(experiment, own, 1) == cycle
    (base / "unet" / "config.json").write_text((base / "unet" / "config.json").read_text() + " ")
    with pytest.raises(ParameterError, match=r"has changed since"):
        plan_cycle.fn(experiment, own, 1)


def test_a_folder_that_is_no_model_is_refused(tiny_preset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        check(changed(tiny_preset, {"base_model": str(tmp_path)}), tmp_path)


def test_too_few_held_out_prompts_are_refused(tiny_preset: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    few = changed(tiny_preset, evaluation=GivenEvaluation(prompts=str(tmp_path / "few.txt")))
    with pytest.raises(ParameterError, match=r"2 held-out prompts; at least 10"):
        check(few, tmp_path)


def test_an_experiment_name_stays_inside_the_workspace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experiment="):
        experiment_at(str(tmp_path), "../elsewhere")


def test_the_same_parameters_resume_and_others_begin_anew(recipe: Recipe, tmp_path: Path) -> None:
    experiment = experiment_at(str(tmp_path), "x")
    other = recipe.model_copy(update={"seed": 7})
    run = begin_run(experiment, recipe, 2)
    assert run.cycles == [1, 2]
    assert begin_run(experiment, recipe, 2) == run
    other_run = begin_run(experiment, other, 1)
    assert other_run.cycles == [3] and other_run.path != run.path
    assert begin_run(experiment, recipe, 2) == run, "the older unfinished run is found again"
    run.finish()
    assert begin_run(experiment, recipe, 2).cycles == [4, 5]
