"""Presets and what users put on top of them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.record.recipe import RECIPES, SECTIONS, ParameterError, preset_names, resolve
from tasks.record.settings import Given, GivenGeneration, GivenTraining, Settings, Training
from training.loss.table import LOSSES, LossOptions

NOTHING: dict[str, Given[Settings]] = {}


@pytest.mark.parametrize("preset", preset_names())
def test_every_shipped_preset_is_complete_and_valid(preset: str) -> None:
    recipe = resolve(preset, 0, {}, NOTHING)
    assert set(recipe.scorer.leaves) <= set(recipe.scorers)
    assert {judge.text for judge in recipe.judges} - {recipe.scorer.text}, "a preset must name a held-out judge"


def test_the_user_beats_the_preset_and_the_rest_stays() -> None:
    sections = NOTHING | {"generation": GivenGeneration(candidates=5)}
    recipe = resolve("shapes", 3, {"scorer": "hpsv2", "prompts": None}, sections)
    plain = resolve("shapes", 3, {}, NOTHING)
    assert (recipe.scorer.text, recipe.generation.candidates) == ("hpsv2", 5)
    assert recipe.generation.steps == plain.generation.steps and recipe.prompts == plain.prompts


def test_a_null_is_the_same_as_left_out() -> None:
    assert GivenGeneration(candidates=None, steps=None).values() == {}


def test_the_published_defaults_are_accepted_by_their_own_schema() -> None:
    """A form that sends back what the schema offers must not be refused."""
    from jsonschema import validate

    for kind in SECTIONS.values():
        given: Any = Given.__class_getitem__(kind)
        schema = given.model_json_schema()
        validate(given().model_dump(), schema)
        assert not any("default" in field for field in schema["properties"].values())


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"candidates": 1}, "candidates"),
        ({"steps": 0}, "steps"),
        ({"stpes": 3}, "stpes"),
        ({"guidance": 0.5}, "guidance"),
    ],
)
def test_wrong_numbers_and_unknown_keys_are_refused(values: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        GivenGeneration(**values)


def test_the_losses_on_offer_are_those_there_are() -> None:
    assert Training.model_json_schema()["properties"]["loss"]["enum"] == list(LOSSES)
    with pytest.raises(ValidationError, match=r"loss\n.*must be one of dpo, rdpo"):
        GivenTraining(loss="dop")
    assert set(LossOptions.__dataclass_fields__) < set(Training.model_fields)
    with pytest.raises(ValidationError, match="label_smoothing"):
        GivenTraining(label_smoothing=0.5)


def test_a_negative_learning_rate_is_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rate"):
        GivenTraining(learning_rate=-1e-4)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"preset='nope'.*shapes"):
        resolve("nope", 0, {}, NOTHING)


def test_a_preset_that_leaves_a_field_open_is_refused_by_name(tmp_path: Path) -> None:
    text = Path("recipes/shapes.toml").read_text().replace("steps = 4\n", "")
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ParameterError, match=r"no value for generation\.steps"):
        resolve(str(tmp_path / "mine.toml"), 0, {}, NOTHING)


@pytest.mark.parametrize("preset", preset_names())
def test_every_shipped_preset_names_things_that_there_are(preset: str) -> None:
    """Nothing here may depend on the model: hub models are not at hand."""
    from training.loss.table import check_options
    from training.model.schedulers import scheduler_names, scheduler_options

    recipe = resolve(preset, 0, {}, NOTHING)
    training, generation = recipe.training, recipe.generation
    check_options(training.loss, training.loss_options())
    assert generation.scheduler in scheduler_names()
    assert set(generation.scheduler_options) <= set(scheduler_options(generation.scheduler))
    assert training.batch_size % training.micro_batch_size == 0 and training.micro_batch_size <= 16
    assert training.warmup_steps < training.steps and training.checkpoint_every <= training.steps
    title, command = (RECIPES / f"{preset}.toml").read_text().splitlines()[:2]
    assert title.startswith("# ") and command.startswith("#   prefect deployment run ")
    assert f"preset={preset}" in command or preset == "shapes"  # which is the default


@pytest.mark.parametrize(
    ("preset", "network", "options"),
    [
        ("sd15-lora", "UNet2DConditionModel", {}),
        ("sdxl-lora", "UNet2DConditionModel", {}),
        ("sd35-medium-lora", "SD3Transformer2DModel", {"num_layers": 2, "dual_attention_layers": (0,)}),
        ("flux-dev-lora", "FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    ],
)
def test_adapters_go_where_there_are_layers(preset: str, network: str, options: dict[str, object]) -> None:
    import diffusers
    import torch

    with torch.device("meta"):
        names = [name for name, _ in getattr(diffusers, network)(**options).named_modules()]
    for target in resolve(preset, 0, {}, NOTHING).training.lora_targets:
        assert any(name.endswith(f".{target}") for name in names), target


def test_the_papers_numbers() -> None:
    """The learning rate that the code trains with is 1e-8 a pair; the one that the paper prints is not used."""
    for preset, optimizer, warmup in (("sd15-paper", "adamw", 500), ("sdxl-paper", "adafactor", 200)):
        training = resolve(preset, 0, {}, NOTHING).training
        assert training.learning_rate == pytest.approx(1e-8 * training.batch_size)
        assert (training.batch_size, training.steps, training.beta) == (2048, 2000, 5000)
        assert (training.method, training.optimizer, training.warmup_steps) == ("full", optimizer, warmup)


def test_a_recipe_extends_another_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'extends = "b.toml"\nbase_model = "mine"\n[generation]\nsteps = 9\n[scorers.hpsv2]\nsource = "here"\n'
    )
    (tmp_path / "b.toml").write_text(
        'extends = "shapes"\n[generation]\nsteps = 8\nscheduler = "DDIMScheduler"\nscheduler_options = {}\n'
    )
    ours, theirs = resolve(str(tmp_path / "a.toml"), 0, {}, NOTHING), resolve("shapes", 0, {}, NOTHING)
    assert (ours.base_model, ours.generation.steps, ours.generation.scheduler) == ("mine", 9, "DDIMScheduler")
    assert ours.generation.scheduler_options == {} != theirs.generation.scheduler_options
    assert ours.scorers["hpsv2"].source == "here" and ours.scorers["pickscore"] == theirs.scorers["pickscore"]
    assert ours.training == theirs.training and ours.prompts == theirs.prompts


def test_recipes_that_extend_one_another_in_a_circle_are_refused(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"\n')
    with pytest.raises(ParameterError, match=r"in a circle \(a -> b -> c -> b\)"):
        resolve(str(tmp_path / "a.toml"), 0, {}, NOTHING)
    (tmp_path / "d.toml").write_text('extends = "nope"\n')
    with pytest.raises(ParameterError, match=r"preset='nope': no such recipe; there are"):
        resolve(str(tmp_path / "d.toml"), 0, {}, NOTHING)


def test_settings_are_read_without_torch() -> None:
    code = "import sys, tasks.record.settings, tasks.record.recipe\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
