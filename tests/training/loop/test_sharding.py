"""Weights divided among processes: the same training, the same files, from any number of them."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.record.recipe import read_preset
from tests.processes import run_together
from tests.training.together import train_in_two
from tests.training.worlds import make_plan
from training.adapter.lora import Lora
from training.loop.checkpoint import CheckpointRecord
from training.loop.launch import launch
from training.loop.run import Run
from training.loop.sharding import blocks, check_sharding, gather, is_sharded, put, spread_states, whole
from training.model.loading import load_network
from training.model.reference import ModelRef
from training.plan import TrainingPlan

LORA: dict[str, Any] = {"lora": Lora(4, 4.0, dora=True), "ema": 0.5, "noise_draws": 1, "refresh_reference": 0}
FULL: dict[str, Any] = {"method": "full", "refresh_reference": 3, "learning_rate": 1e-4, "gradient_checkpointing": True}
CHANGES = {"lora": LORA, "full": FULL}
SHARED: dict[str, Any] = {"heldout_share": 0.3, "heldout_every": 2, "beta": 200.0, "steps": 4, "max_grad_norm": 1e-2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    make_plan(folder)
    return folder


def plan_in(world: Path, output: Path, **changes: Any) -> TrainingPlan:
    return make_plan(world, output=str(output), **{**SHARED, **changes})


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    record = CheckpointRecord.read(output)
    assert record is not None
    return load_file(next(Path(str(record.model.adapter or record.model.network)).glob("*.safetensors")))


def told_of(output: Path) -> list[float]:
    """Loss and gradient norm of each step, the norm as it was before clipping: Adam would hide a wrong scale."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [metrics[name] for metrics in lines for name in ("loss", "grad_norm")]


def difference(one: Path, other: Path) -> float:
    """The largest of all weights."""
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize(("method", "finishing"), [("lora", 2), ("full", 1)])
def test_sharded_processes_train_what_one_does(world: Path, tmp_path: Path, method: str, finishing: int) -> None:
    """With everything that keeps state; then as many processes as `finishing` go on from the checkpoint of step 2."""
    changes = CHANGES[method]
    launch(plan_in(world, tmp_path / "one", micro_batch_size=2, **changes), 1, lambda *_: None)
    sharded = plan_in(world, tmp_path / "two", micro_batch_size=1, shard=True, **changes)
    train_in_two(sharded)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert told_of(tmp_path / "two") == pytest.approx(told_of(tmp_path / "one"), rel=1e-3)
    cut = tmp_path / "cut"
    _cut_to(tmp_path / "two", cut, 2)
    rest = plan_in(world, cut, micro_batch_size=2 // finishing, shard=True, **changes)
    launch(rest, 1, lambda *_: None) if finishing == 1 else train_in_two(rest)
    assert difference(cut, tmp_path / "two") < (1e-5 if finishing == 1 else 1e-7)
    assert told_of(cut) == pytest.approx(told_of(tmp_path / "two"), rel=1e-3)


def _cut_to(source: Path, target: Path, step: int) -> None:
    """What a training that was killed after this step has left."""
    target.mkdir()
    shutil.copytree(source / f"checkpoint-{step:06d}", target / f"checkpoint-{step:06d}")
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:step]))


def hold(plan: str, folder: str) -> None:
    """What this process holds of a network, its reference and its optimizer's states; and how it starts."""
    Run(TrainingPlan.read(Path(plan)).changed(method="lora")).step(0)  # half of its weights bfloat16
    run = Run(TrainingPlan.read(Path(plan)))
    reference = run.policy._reference
    held = {"parts": _held(run.policy.network.parameters()), "reference": _held(reference.parameters())}
    held["whole"] = sum(parameter.numel() for parameter in reference.parameters())
    metrics = run.step(0)
    held["states"] = _held(value for state in run.optimizer.state.values() for value in state.values())
    told = {**held, "sharded": is_sharded(run.accelerator), "loss": metrics["loss"], "margin": metrics["margin"]}
    Path(folder, os.environ["RANK"]).write_text(json.dumps(told))


def _held(tensors: Iterable[torch.Tensor]) -> int:
    """Elements in this process."""
    return sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_process_holds_a_part(world: Path, tmp_path: Path, by_hand: bool) -> None:
    """Of network, reference and optimizer states; also as `accelerate launch --use_fsdp` asks for it."""
    plan = plan_in(world, tmp_path / "out", method="full", shard=not by_hand, mixed_precision="bf16")
    plan.write(tmp_path / "plan.json")
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    environment = {**asked, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"} if by_hand else {}
    given = str(tmp_path / "plan.json"), str(tmp_path)
    run_together(2, hold, *given, log=tmp_path / "log.txt", environment=environment)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in ("0", "1"))
    assert first["sharded"] and second["sharded"]
    for held in (first, second):
        assert held["parts"] < 0.6 * held["whole"] and held["reference"] < 0.6 * held["whole"]
        assert held["states"] < 1.3 * held["whole"]  # two moments a weight, half of them here
        assert held["margin"] == 0.0 and held["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["parts"] + second["parts"] >= first["whole"]


@pytest.mark.parametrize(
    ("optimizer", "asked", "message"),
    [
        ("adafactor", (False, False, False), "optimizer='adafactor'.*use adamw"),
        ("adamw", (True, False, False), "offload_reference=true.*leave one"),
        ("adamw", (False, True, False), "text_encoders=true.*leave one"),
        ("adamw", (False, False, True), "compile=true.*leave one"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(optimizer: str, asked: tuple[bool, bool, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sharding(optimizer, *asked)


def test_the_documented_commands_are_accepted() -> None:
    """docs/models.md names a recipe that can be sharded, and what another one needs for it."""
    for preset, given in (("sd15-paper", {}), ("sdxl-paper", {"optimizer": "adamw"})):
        training, execution = (read_preset(preset)[name] for name in ("training", "execution"))
        optimizer = {**training, **given}["optimizer"]
        check_sharding(optimizer, execution["offload_reference"], training["text_encoders"], execution["compile"])


def test_only_blocks_that_there_are_are_named() -> None:
    """diffusers' list for UNets has kinds that the embedded one, for example, lacks."""
    unet = load_network(ModelRef("shapes/models/base"))
    assert "UpBlock2D" in unet._no_split_modules
    assert blocks(unet) == ["BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D"]
    assert blocks(torch.nn.Linear(1, 1)) == []


def test_alone_tensors_are_what_they_are() -> None:
    """One process that gathers or gives back has nothing to divide."""
    weight = torch.nn.Parameter(torch.arange(4.0))
    state = {"state": {0: {"exp_avg": torch.ones(4), "step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 1)}]}
    assert whole(weight) is weight
    assert repr(gather(state, True)) == repr(state)
    given = spread_states(state, [weight])
    assert given["param_groups"] == state["param_groups"] and given["state"][0]["step"] == 3
    assert given["state"][0]["exp_avg"].tolist() == [1, 1, 1, 1]
    assert gather({"w": weight}, False)["w"].numel() == 0
    image = torch.nn.Parameter(torch.rand(2, 3, 3, 3).to(memory_format=torch.channels_last))
    moment = spread_states({"state": {0: {"exp_avg": torch.rand(2, 3, 3, 3)}}}, [image])["state"][0]["exp_avg"]
    assert moment.stride() == image.stride()  # fused kernels go through both in the order of memory
    put(torch.zeros(4), weight)
    assert weight.tolist() == [0, 0, 0, 0]
