"""LoRAs under kohya's keys: loaders that know them must give the pictures that diffusers gives with the original."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.safetensors_file import add_to_header, read_header
from tests.training.adapters import ATTENTION, RESNET, draw, load, load_unet, save_adapter, save_base
from training.adapter.layers import Layer
from training.export.kohya import Base, read_layers, to_kohya, write_kohya
from training.kohya import main
from training.model.families import FAMILIES
from training.model.loading import fuse_adapter
from training.model.reference import ADAPTER_FILE, ModelError

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kohya")


def converted(world: Path, kind: str, adapter: Path, **options: Any) -> Path:
    base = save_base(world, kind)
    return write_kohya(adapter / ADAPTER_FILE, adapter / "k" / "kohya.safetensors", Base.read(str(base)), **options)


def pictures(base: Path, *files: Path) -> list[torch.Tensor]:
    """Of the base, and with each LoRA file."""
    pipeline = load(base)
    drawn = [draw(pipeline)]
    for file in files:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        drawn.append(draw(pipeline))
        pipeline.unload_lora_weights()
    return drawn


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_the_same_pictures_through_kohyas_keys(world: Path, tmp_path: Path, kind: str) -> None:
    """Linear and convolution layers of every place, alpha 6 at rank 4, and the text encoders."""
    base = save_base(world, kind)
    adapter = save_adapter(base, tmp_path, ATTENTION + RESNET, text=True)
    kohya = converted(world, kind, adapter)
    plain, diffusers, ours = pictures(base, adapter / ADAPTER_FILE, kohya)
    assert (diffusers - plain).abs().max() > 1e-2, "the adapter must matter"
    torch.testing.assert_close(ours, diffusers, rtol=0, atol=2e-5)
    names = list(load_file(kohya))
    assert all(name.startswith(("lora_unet_", "lora_te")) for name in names)
    assert any("input_blocks" in name for name in names) == (kind == "xl")
    # As the keys are composed in ComfyUI's model_lora_keys_clip; diffusers would take them without `text_model`.
    for prefix in ("lora_te",) if kind == "sd" else ("lora_te1", "lora_te2"):
        for layer in ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1"):
            assert f"{prefix}_text_model_encoder_layers_0_{layer}.lora_up.weight" in names


def test_alpha_is_such_that_alpha_over_rank_is_pefts_scale(world: Path, tmp_path: Path) -> None:
    base = save_base(world, "sd")
    patterns = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 1, "ff.net.2": 8}}
    for name, config, wanted in (
        ("plain", {}, {"to_q": 6.0, "to_k": 6.0, "ff_net_2": 6.0}),
        ("rslora", {"use_rslora": True}, {"to_q": 12.0, "to_k": 12.0}),  # 6 / sqrt(4) = 12 / 4
        ("patterns", patterns, {"to_q": 1.0, "to_k": 6.0, "ff_net_2": 8.0}),
    ):
        adapter = save_adapter(base, tmp_path / name, ATTENTION, **config)
        state = load_file(converted(world, "sd", adapter))
        for ending, alpha in wanted.items():
            found = {v.item() for k, v in state.items() if k.endswith(f"{ending}.alpha")}
            assert found == {alpha}, (name, ending)


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("dora", [False, True])
def test_every_update_is_the_one_that_peft_fuses(world: Path, tmp_path: Path, kind: str, dora: bool) -> None:
    """W + alpha / rank * up @ down as all loaders compute it, DoRA with norms over the inputs (LyCORIS' wd_on_output).

    The layer is found by the original name, which is derived a second way here: by the order of the blocks.
    """
    base = save_base(world, kind)
    adapter = save_adapter(base, tmp_path, ATTENTION + RESNET, use_dora=dora)
    state = load_file(converted(world, kind, adapter))
    unet = load_unet(base)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    fuse_adapter(unet, str(adapter), "unet")
    fused = dict(unet.named_parameters())
    names = flat_names(list(before), kind)
    keys = {key.split(".")[0] for key in state}
    assert keys <= names.keys() and len(keys) > 40
    for key in keys:
        weight = before[names[key]]
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        update = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        weight = weight + state[f"{key}.alpha"] / down.shape[0] * update
        if dora:
            scale = state[f"{key}.dora_scale"]
            assert scale.shape == (weight.shape[0], *[1] * (weight.ndim - 1))
            weight = weight * scale / weight.flatten(1).norm(dim=1).view(scale.shape)
        torch.testing.assert_close(weight, fused[names[key]], rtol=1e-4, atol=1e-5)


def flat_names(parameters: list[str], kind: str) -> dict[str, str]:
    """kohya's name of each weight. XL: the blocks numbered through in the order in which the data passes them."""
    weights = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    if kind == "sd":
        return {"lora_unet_" + name.replace(".", "_"): f"{name}.weight" for name in weights}
    order = ["conv_in"]
    for level in range(3):
        order += [f"down_blocks.{level}.resnets.0 down_blocks.{level}.attentions.0"]
        order += [f"down_blocks.{level}.resnets.1 down_blocks.{level}.attentions.1"]
        order += [f"down_blocks.{level}.downsamplers.0"] * (level < 2)
    places = {part: f"input_blocks_{i}_{j}" for i, block in enumerate(order) for j, part in enumerate(block.split())}
    order = [f"up_blocks.{level}.resnets.{i} up_blocks.{level}.attentions.{i}" for level in range(3) for i in range(3)]
    order[2] += " up_blocks.0.upsamplers.0"
    order[5] += " up_blocks.1.upsamplers.0"
    places |= {part: f"output_blocks_{i}_{j}" for i, block in enumerate(order) for j, part in enumerate(block.split())}
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    places |= {part: f"middle_block_{i}" for i, part in enumerate(middle)}
    inner = {".conv1": "_in_layers_2", ".conv2": "_out_layers_3", ".time_emb_proj": "_emb_layers_1",
             ".conv_shortcut": "_skip_connection"}  # fmt: skip
    outer = {"conv_out": "out_2", "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
             "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}  # fmt: skip
    names = {}
    for name in weights:
        part = next((part for part in places if name == part or name.startswith(f"{part}.")), None)
        rest = name[len(part) :] if part else ""
        if "samplers" in name:
            rest = "_op" if "down" in name else "_conv"
        flat = outer.get(name) or f"{places.get(part or '')}{inner.get(rest, rest)}"
        names["lora_unet_" + flat.replace(".", "_")] = f"{name}.weight"
    return names


def test_transformers_keep_diffusers_names_with_the_scale_inside(tmp_path: Path) -> None:
    """ComfyUI maps `transformer.` itself, but does not read PEFT's alpha in the header."""
    torch.manual_seed(0)
    down, up, sizes = torch.randn(4, 8), torch.randn(6, 4), torch.rand(6)
    name = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_magnitude_vector": sizes}
    base = Base(FAMILIES["FluxPipeline"], {})
    found = to_kohya(read_layers(state, {"transformer.lora_alpha": 6, "transformer.r": 4}, "transformer"), base)
    assert found.keys() == {f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.dora_scale"}
    torch.testing.assert_close(found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"], 1.5 * up @ down)
    assert found[f"{name}.dora_scale"].shape == (6, 1)
    assert to_kohya(read_layers(state, {}, "transformer"), base)[f"{name}.lora_B.weight"].equal(up)


def test_diffusers_reads_the_file_of_a_transformer_as_well() -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict

    def network() -> Any:
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip

    def predict(transformer: Any) -> torch.Tensor:
        torch.manual_seed(3)
        known = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 5, 16)}
        ids = {"img_ids": torch.rand(16, 3), "txt_ids": torch.zeros(5, 3), "timestep": torch.tensor([0.5])}
        with torch.no_grad():
            prediction: torch.Tensor = transformer(**known, **ids, pooled_projections=torch.randn(1, 16)).sample
        return prediction

    tuned, config = network(), LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "ff.net.2", "proj_mlp"])
    tuned.add_adapter(config, "policy")
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(tuned, adapter_name="policy").items()}
    layers = read_layers(state, {f"transformer.{key}": value for key, value in config.to_dict().items()}, "transformer")
    loaded = network()
    state, _ = FluxPipeline.lora_state_dict(to_kohya(layers, Base(FAMILIES["FluxPipeline"], {})), return_alphas=True)
    loaded.load_lora_adapter(state, prefix="transformer")
    assert (predict(tuned) - predict(network())).abs().max() > 1e-2
    torch.testing.assert_close(predict(loaded), predict(tuned), rtol=1e-4, atol=1e-5)


def test_the_header_says_what_is_known(world: Path, tmp_path: Path) -> None:
    adapter = save_adapter(save_base(world, "xl"), tmp_path / "xl", ATTENTION)
    add_to_header(adapter / ADAPTER_FILE, {"rlaif.loss": "dpo"})
    known = read_header(converted(world, "xl", adapter, title="mine"))
    assert known["ss_network_dim"] == "4" and known["ss_network_alpha"] == "6"
    assert known["ss_base_model_version"] == "sdxl_base_v1-0" and known["ss_v2"] == "False"
    assert known["modelspec.title"] == "mine" and known["rlaif.loss"] == "dpo" and known["format"] == "pt"
    assert "lora_adapter_metadata" not in known  # its names are diffusers', and the alphas are in the file
    adapter = save_adapter(save_base(world, "sd"), tmp_path / "sd", ATTENTION, alpha_pattern={"to_q": 2})
    known = read_header(converted(world, "sd", adapter))
    assert known["ss_network_dim"] == "4" and known["ss_network_alpha"] == "Dynamic"
    assert "ss_base_model_version" not in known  # a text encoder 16 wide is of no known generation


@pytest.mark.parametrize(
    "width, prediction, version, architecture",
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_the_generation_of_the_base_is_told(width: int, prediction: str, version: str, architecture: str) -> None:
    layer = Layer("unet", "conv_in", torch.ones(2, 4, 3, 3), torch.ones(4, 2, 1, 1), None, 1.0)
    keys = FAMILIES["StableDiffusionPipeline"].kohya
    assert keys is not None
    known = keys.header([layer], {"cross_attention_dim": width}, prediction, "t")
    assert known["ss_base_model_version"] == version and known["modelspec.architecture"] == architecture
    assert known["ss_v2"] == str(width == 1024)


def test_the_command_finds_the_base_in_the_record(world: Path, tmp_path: Path, capsys: Any) -> None:
    base = save_base(world, "sd")
    adapter = save_adapter(base, tmp_path / "adapter", ATTENTION)
    assert main([str(adapter), "--to", str(tmp_path / "k.safetensors")]) == 2
    assert re.search(r"checkpoint\.json.*--base", capsys.readouterr().err, re.DOTALL)
    record = {"model": {"base": str(base), "adapter": "/moved/since/adapter"}, "method": "lora", "steps": 1, "pairs": 1,
              "beta": 1.0, "kappa": 0.5, "sha256": "", "metrics": {}}  # fmt: skip
    (tmp_path / "checkpoint.json").write_text(json.dumps(record))
    main([str(tmp_path), "--to", str(tmp_path / "k.safetensors"), "--dtype", "float16"])
    state = load_file(tmp_path / "k.safetensors")
    assert {t.dtype for k, t in state.items() if not k.endswith("alpha")} == {torch.float16}
    assert {t.dtype for k, t in state.items() if k.endswith("alpha")} == {torch.float32}
    first = (tmp_path / "k.safetensors").read_bytes()
    main([str(adapter), "--to", str(tmp_path / "k.safetensors"), "--dtype", "float16"])
    assert (tmp_path / "k.safetensors").read_bytes() == first  # equal inputs, equal bytes
    assert capsys.readouterr().out.split() == [str(tmp_path / "k.safetensors")] * 2


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    good = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(4, 2, 1, 1)}
    with pytest.raises(ModelError, match=r"unet\.conv_in\.hada_w1_a is no part"):
        read_layers({"unet.conv_in.hada_w1_a": torch.ones(1)}, {}, "unet")
    with pytest.raises(ModelError, match=r"unet\.conv_in has only \['down'\]"):
        read_layers({"unet.conv_in.lora_A.weight": torch.ones(2, 4)}, {}, "unet")
    with pytest.raises(ModelError, match=r"lora_B\.bias is no part"):
        read_layers(good | {"unet.conv_in.lora_B.bias": torch.ones(4)}, {}, "unet")
    xl = Base(FAMILIES["StableDiffusionXLPipeline"], {"layers_per_block": 2, "up_block_types": ()})
    layers = read_layers({key.replace("conv_in", "class_embedding"): value for key, value in good.items()}, {}, "unet")
    with pytest.raises(ModelError, match="class_embedding has no counterpart"):
        to_kohya(layers, xl)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ModelError, match="SanaPipeline; supported: StableDiffusionPipeline"):
        Base.read(str(tmp_path))
