"""The card of a finished training: its header, its numbers, and that its code runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.safetensors_file import add_to_header, read_header
from data.shards import ShardError
from scoring.scorers.scorer import ScorerInfo
from scoring.verdict.gates import gate
from scoring.verdict.verdict import judge_pairs, with_holm
from tests.training.adapters import load_unet, save_adapter
from tests.training.worlds import make_plan
from training.export.model_card import KOHYA_FILE, model_card, provenance
from training.export.outputs import card_of, write_outputs
from training.loop.checkpoint import CheckpointRecord
from training.loop.header import training_metadata
from training.model.reference import ModelError, ModelRef

SCORER = ScorerInfo("pickscore", "v1", "logit", source="/home/me/weights", fingerprint="0123abcd", licence="MIT")
DATA: dict[str, Any] = {
    "sealed": {"dataset_id": "d" * 64, "config_hash": "c0ffee", "created_at": "2026-01-01", "rows": 40, "shards": 2},
    "base_model": {"id": "/home/me/models/tiny", "revision": None}, "generation": {"steps": 20, "guidance": 7.5},
    "label_rule": {"by": "pickscore", "min_margin": 0.5}, "code": {"torch": "2", "rlaif": "abc123"},
    "scorers": [{**dataclasses.asdict(SCORER), "column": "pickscore"}], "schema_version": "1.1",
}  # fmt: skip
RECORD: dict[str, Any] = {
    "model": {"base": "owner/sd", "revision": "main1", "network": None, "adapter": "/home/me/w/training/adapter"},
    "method": "lora", "loss": "dpo", "steps": 200, "pairs": 38, "beta": 500.0, "kappa": 250.0, "sha256": "ab" * 32,
    "metrics": {"loss": 0.65, "implicit_accuracy": 0.7},
}  # fmt: skip
PLAN = {"model": {}, "pairs": "/home/me/pairs", "output": "/home/me/out", "learning_rate": 2e-4, "batch_size": 16,
        "lora": {"rank": 16, "alpha": 8.0, "targets": ["to_q", "conv1"]}, "seed": 3, "device": "cpu",
        "limit": None}  # fmt: skip


def evaluation(wins: int) -> dict[str, Any]:
    """As `evaluation/results.json` holds it: one held-out judge and the labeller, over 100 prompts."""
    base, tuned, ids = np.zeros(100), np.where(np.arange(100) < wins, 1.0, -1.0), [str(i) for i in range(100)]
    verdicts = with_holm([
        judge_pairs(name, base, tuned, ids, True, held_out=name == "hpsv2") for name in ("hpsv2", "pickscore")
    ])  # fmt: skip
    control = [judge_pairs("hpsv2", base, np.where(np.arange(100) % 2, 1.0, -1.0), ids, True, held_out=True)]
    parts = {"verdicts": verdicts, "control": control}
    plain = {name: [dataclasses.asdict(verdict) for verdict in found] for name, found in parts.items()}
    return json.loads(json.dumps({**plain, "decision": dataclasses.asdict(gate(verdicts)), "labelled_by": []}))


def rows(card: str) -> dict[str, list[str]]:
    """Table rows by their first cell; of several the first, so the recipe's before the metrics'."""
    lines = [line.strip("|").split(" | ") for line in reversed(card.splitlines()) if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_header_is_what_the_hub_understands() -> None:
    header = yaml.safe_load(model_card(RECORD, PLAN, DATA).split("---")[1])
    assert header["base_model"] == "owner/sd" and header["base_model_relation"] == "adapter"
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert {"lora", "text-to-image", "diffusion-dpo"} <= set(header["tags"])
    assert "license" not in header
    full = {
        **RECORD,
        "method": "full",
        "model": {**RECORD["model"], "network": "/x/unet", "adapter": None},
        "loss": "ipo",
    }
    header = yaml.safe_load(model_card(full, PLAN, DATA).split("---")[1])
    assert header["base_model_relation"] == "finetune" and not {"lora", "diffusion-dpo"} & set(header["tags"])
    local = {**RECORD, "model": {**RECORD["model"], "base": "/home/me/models/tiny"}}
    header = yaml.safe_load(model_card(local, PLAN, DATA).split("---")[1])
    assert "base_model" not in header  # the hub has no such model


def test_recipe_and_data_are_told() -> None:
    found = rows(model_card(RECORD, PLAN, DATA))
    assert [found[name][0] for name in ("loss", "beta", "kappa", "learning rate", "steps", "batch size")] == [
        "dpo", "500.0", "250.0", "0.0002", "200", "16"
    ]  # fmt: skip
    assert found["LoRA rank"] == ["16"] and found["LoRA alpha"] == ["8.0"] and found["LoRA targets"] == ["to_q / conv1"]
    assert found["implicit_accuracy"] == ["0.7"] and found["sha256 of the weights"] == ["ab" * 32]
    assert found["pairs"] == ["40 in 2 shards, sealed 2026-01-01"] and found["config hash"] == ["c0ffee"]
    assert found["data set id"] == ["d" * 64] and found["pictures drawn by"] == ["id tiny"]
    assert found["pickscore"] == ["v1", "logit", "0123abcd", "not recorded", "MIT"]
    assert found["label rule"] == ["by pickscore, min_margin 0.5"]
    assert not {"limit", "device", "output"} & found.keys()
    bare = model_card(RECORD, PLAN, {"sealed": DATA["sealed"]})
    assert "Scorers: not recorded." in bare and rows(bare)["generation"] == ["not recorded"]


def test_the_evaluation_is_told_with_intervals_and_the_decision() -> None:
    card = model_card(RECORD, PLAN, DATA, evaluation(80))
    lines = [line for line in card.splitlines() if line.startswith("| hpsv2") or line.startswith("| pickscore")]
    judged = [line for line in lines if "80 / 0 / 20" in line]
    assert [("no (held out)" in line, "| yes |" in line) for line in judged] == [(True, False), (False, True)]
    assert "| 0.800 | 95% [0.7" in judged[0] and "e-09" in judged[0]
    assert "**accepted**" in card and "**not accepted**" not in card
    assert "| hpsv2 | 0.500 | 95% [0.4" in card  # base against base
    assert "**not accepted**" in model_card(RECORD, PLAN, DATA, evaluation(50))
    assert "Not evaluated yet." in model_card(RECORD, PLAN, DATA)


def test_a_published_card_names_no_path_of_this_machine() -> None:
    local = {**RECORD, "model": {**RECORD["model"], "base": "/home/me/models/tiny", "network": "/home/me/c/unet"}}
    data = {**DATA, "label_rule": {"by": "mean(pickscore?source=/home/me/weights/tiny,hpsv2)"}}
    plan = {**PLAN, "cache": "/home/me/cache"}
    assert "/home/me" in model_card(local, plan, data)  # in its folder it may
    card = model_card(local, plan, data, evaluation(60), repo_id="me/tuned", kohya=True)
    assert "/home/me" not in card and "by mean(pickscore?source=path/to/tiny,hpsv2)" in card
    assert 'load_lora_weights("me/tuned", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "path/to/tiny" in card and KOHYA_FILE in card


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and a sealed folder of pairs, and beside them a finished LoRA training that never ran."""
    world = tmp_path_factory.mktemp("card")
    plan = make_plan(world)
    save_adapter(world / "base", world / "out" / "adapter", ["to_q", "conv1"])
    model = ModelRef(str(world / "base"), adapter=str(world / "out" / "adapter"))
    CheckpointRecord(
        model=model, method="lora", steps=6, pairs=12, beta=2000.0, kappa=1000.0, sha256="ab", metrics={"loss": 0.6}
    ).write(world / "out")
    write_outputs(world / "out", plan, world / "pairs")
    return world


def run_code(card: str) -> dict[str, Any]:
    """Runs the card's first block of code; its names."""
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    return names


def test_the_code_on_the_card_loads_the_adapter(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained / "out")
    names = run_code((trained / "out" / "README.md").read_text())
    assert names["image"].size == (32, 32)
    layer = names["pipeline"].unet.mid_block.resnets[0].conv1
    saved = load_file(trained / "out" / "adapter" / "pytorch_lora_weights.safetensors")
    assert layer.lora_A["default_0"].weight.equal(saved["unet.mid_block.resnets.0.conv1.lora_A.weight"])
    assert layer.scaling["default_0"] == 1.5


def test_the_code_on_the_card_loads_a_tuned_network(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(trained / "base")
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01)
    unet.save_pretrained(tmp_path / "unet")
    model = ModelRef(str(trained / "base"), network=str(tmp_path / "unet"))
    CheckpointRecord(
        model=model, method="full", steps=6, pairs=12, beta=2000.0, kappa=1000.0, sha256="ab", metrics={"loss": 0.6}
    ).write(tmp_path)
    files = write_outputs(tmp_path, make_plan(trained, method="full"), trained / "pairs")
    assert [file.name for file in files] == ["card.json", "README.md"]  # nothing for kohya in a full training
    monkeypatch.chdir(tmp_path)
    names = run_code((tmp_path / "README.md").read_text())
    assert names["pipeline"].unet.conv_out.weight.equal(unet.conv_out.weight)
    assert 'subfolder="unet"' in card_of(tmp_path, "me/tuned")


def test_the_outputs_are_those_of_this_training(trained: Path, tmp_path: Path) -> None:
    card = (trained / "out" / "README.md").read_text()
    sealed = provenance(trained / "pairs")["sealed"]
    assert rows(card)["data set id"] == [sealed["dataset_id"]] and sealed["rows"] == 12
    assert rows(card)["kappa"] == ["1000.0"] and (trained / "out" / KOHYA_FILE).is_file()
    write_outputs(trained / "out", make_plan(trained), trained / "pairs", evaluation(80))
    assert "**accepted**" in (trained / "out" / "README.md").read_text()
    with pytest.raises(ShardError, match="unfinished"):
        write_outputs(trained / "out", make_plan(trained), tmp_path)
    with pytest.raises(ModelError, match=r"no card\.json"):
        card_of(tmp_path)


def test_the_header_of_the_weights_tells_their_training(trained: Path, tmp_path: Path) -> None:
    base, pairs = ModelRef(str(trained / "base")), trained / "pairs"
    file = save_adapter(trained / "base", tmp_path / "a", ["to_q"]) / "pytorch_lora_weights.safetensors"
    before, config = load_file(file), read_header(file)["lora_adapter_metadata"]
    known = training_metadata(
        model=base, loss="dpo", beta=2000.0, kappa=1000.0, steps=6, pairs=pairs, version="0.1.0"
    )  # fmt: skip
    add_to_header(file, known)
    found, after = read_header(file), load_file(file)
    assert found["rlaif.loss"] == "dpo" and found["rlaif.kappa"] == "1000.0" and found["rlaif.version"] == "0.1.0"
    assert found["rlaif.pairs"] == provenance(pairs)["sealed"]["dataset_id"] and found["format"] == "pt"
    assert found["rlaif.base_model"] == "base" and "rlaif.base_revision" not in found
    assert found["lora_adapter_metadata"] == config and before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    first = file.read_bytes()
    add_to_header(file, dict(reversed(known.items())))
    assert file.read_bytes() == first
    assert [path.name for path in file.parent.iterdir()] == [file.name]
