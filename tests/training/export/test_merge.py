"""A merged pipeline draws what base and adapter draw together, and needs nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.safetensors_file import read_header
from tests.rounding import of_networks
from tests.training.adapters import ATTENTION, RESNET, draw, load, load_unet, save_adapter, save_base
from training.export.merge import merge
from training.merge import main
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


def inputs(unet: Any) -> dict[str, Any]:
    torch.manual_seed(2)
    known: dict[str, Any] = {"sample": torch.randn(1, 4, 8, 8), "timestep": 500}
    known["encoder_hidden_states"] = torch.randn(1, 77, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type:
        known["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)}
    return known


def predict(unet: Any) -> torch.Tensor:
    with torch.no_grad():
        prediction: torch.Tensor = unet.eval()(**inputs(unet)).sample
    return prediction


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_the_merged_pipeline_draws_what_adapter_on_base_draws(world: Path, tmp_path: Path, kind: str) -> None:
    base = save_base(world, kind)
    adapter = save_adapter(base, tmp_path / "adapter", ATTENTION + RESNET, text=True)
    target = merge(ModelRef(str(base), adapter=str(adapter)), tmp_path / "merged")
    pipeline = load(base)
    before = draw(pipeline)
    pipeline.load_lora_weights(adapter, weight_name=ADAPTER_FILE)
    apart = draw(pipeline)
    merged = type(pipeline).from_pretrained(target)
    merged.set_progress_bar_config(disable=True)
    assert (apart - before).abs().max() > 1e-2
    torch.testing.assert_close(draw(merged), apart, rtol=0, atol=2e-5)
    for file in target.rglob("*.safetensors"):
        assert not [name for name in load_file(file) if "lora" in name or "base_layer" in name], file
    files = {path.relative_to(base) for path in base.rglob("*.json")}
    assert files == {path.relative_to(target) for path in target.rglob("*.json")}


def test_dora_and_rslora_are_merged_as_peft_computes_them(world: Path, tmp_path: Path) -> None:
    base = save_base(world, "sd")
    for name, config in (("dora", {"use_dora": True}), ("rslora", {"use_rslora": True})):
        adapter = save_adapter(base, tmp_path / name, ATTENTION + RESNET, **config)
        target = merge(ModelRef(str(base), adapter=str(adapter)), tmp_path / f"{name}-merged")
        unet = load_unet(base)
        plain = predict(unet)
        unet.load_lora_adapter(adapter, weight_name=ADAPTER_FILE, prefix="unet")
        apart = predict(unet)
        assert (apart - plain).abs().max() > 1e-2
        torch.testing.assert_close(predict(load_unet(target)), apart, rtol=1e-4, atol=2e-5)


def test_layers_under_two_naming_schemes_are_all_merged(world: Path, tmp_path: Path) -> None:
    """diffusers' `convert_state_dict_to_diffusers` renames only the attention layers of a U-Net."""
    from diffusers.utils import convert_state_dict_to_diffusers

    base = save_base(world, "sd")
    adapter = save_adapter(base, tmp_path / "adapter", ATTENTION + RESNET)
    whole = merge(ModelRef(str(base), adapter=str(adapter)), tmp_path / "whole")
    state, known = load_file(adapter / ADAPTER_FILE), read_header(adapter / ADAPTER_FILE)
    mixed = convert_state_dict_to_diffusers(state)
    assert len({"lora_A" in name for name in mixed}) == 2
    save_file(mixed, adapter / ADAPTER_FILE, known)
    again = merge(ModelRef(str(base), adapter=str(adapter)), tmp_path / "again")
    first, second = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (whole, again))
    assert all(first[key].equal(second[key]) for key in first)


def test_weights_are_added_in_float32_and_rounded_once(world: Path, tmp_path: Path) -> None:
    base = save_base(world, "sd")
    model = ModelRef(str(base), adapter=str(save_adapter(base, tmp_path / "adapter", ["to_q"])))
    exact = merge(model, tmp_path / "exact")
    for dtype in (torch.float16, torch.bfloat16):
        rounded = merge(model, tmp_path / str(dtype), str(dtype).removeprefix("torch."))
        for file in exact.rglob("*.safetensors"):
            found = load_file(rounded / file.relative_to(exact))
            for key, tensor in load_file(file).items():
                assert found[key].equal(tensor.to(dtype)), key


def test_a_tuned_network_replaces_the_bases(world: Path, tmp_path: Path) -> None:
    base = save_base(world, "sd")
    unet = load_unet(base)
    torch.nn.init.normal_(unet.conv_out.weight)
    unet.save_pretrained(tmp_path / "unet")
    adapter = save_adapter(base, tmp_path / "adapter", ["to_q"])
    target = merge(ModelRef(str(base), network=str(tmp_path / "unet"), adapter=str(adapter)), tmp_path / "merged")
    merged = load_unet(target)
    assert merged.conv_out.weight.equal(unet.conv_out.weight)
    unet.load_lora_adapter(adapter, weight_name=ADAPTER_FILE, prefix="unet")
    wanted = predict(unet)
    allowed = of_networks(wanted.abs().max().item(), 30)
    torch.testing.assert_close(predict(merged), wanted, rtol=0, atol=allowed)


def test_the_command_takes_the_base_from_the_record(world: Path, tmp_path: Path, capsys: Any) -> None:
    base = save_base(world, "sd")
    adapter = save_adapter(base, tmp_path / "training" / "adapter", ["to_q"])
    record = {"model": {"base": str(base), "adapter": str(adapter)}, "method": "lora", "steps": 1, "pairs": 1,
              "beta": 1.0, "kappa": 0.5, "sha256": "", "metrics": {}}  # fmt: skip
    (tmp_path / "training" / "checkpoint.json").write_text(json.dumps(record))
    main([str(tmp_path / "training"), "--to", str(tmp_path / "merged"), "--dtype", "float16"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    weights = load_file(next((tmp_path / "merged" / "unet").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_bad_input_is_refused_before_anything_is_written(world: Path, tmp_path: Path, capsys: Any) -> None:
    sd, xl = save_base(world, "sd"), save_base(world, "xl")
    adapter = save_adapter(xl, tmp_path / "adapter", ["to_q"], text=True)
    target = tmp_path / "merged"
    with pytest.raises(ModelError, match=r"no layer .*belongs to another base|for a text_encoder_2, which"):
        merge(ModelRef(str(sd), adapter=str(adapter)), target)
    with pytest.raises(ModelError, match="dtype='int8'; choose one of float32"):
        merge(ModelRef(str(sd)), target, "int8")
    assert main([str(adapter), "--base", "no_such", "--to", str(target)]) == 2
    assert "base_model='no_such': no such folder" in capsys.readouterr().err
    assert not target.exists()
    target.mkdir()
    with pytest.raises(ModelError, match="is there already; remove it"):
        merge(ModelRef(str(sd)), target)
