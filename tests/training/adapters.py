"""Tiny pipelines, and LoRAs whose random weights change their pictures, for the tests of what training hands over."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny import clip_tokenizer, save_pipeline
from training.model.loading import quiet_libraries
from training.model.reference import ADAPTER_FILE

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
RESNET = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_in", "conv_out", "linear_1", "linear_2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def save_xl(folder: Path) -> Path:
    """An SDXL shaped pipeline: its block types, two text encoders, added conditioning; 32 px pictures."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, cross_attention_dim=32, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4, 4),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "projection_dim": 16}  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**text)), tokenizer=clip_tokenizer(), unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)), tokenizer_2=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading"), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def load(base: Path) -> Any:
    """The pipeline of a folder, whichever its class."""
    from diffusers import DiffusionPipeline

    quiet_libraries()
    options = {"safety_checker": None} if base.name == "sd" else {}
    pipeline = DiffusionPipeline.from_pretrained(base, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_base(folder: Path, kind: str) -> Path:
    """`folder`/sd or `folder`/xl, made once."""
    base = folder / kind
    if not base.is_dir():
        save_pipeline(base) if kind == "sd" else save_xl(base)
    return base


def load_unet(base: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base, subfolder="unet")


def _text_encoders(base: Path) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return {name: kind.from_pretrained(base / name) for name, kind in classes.items() if (base / name).is_dir()}


def save_adapter(base: Path, folder: Path, targets: list[str], text: bool = False, **config: Any) -> Path:
    """A LoRA of rank 4 and alpha 6 (unless `config`, PEFT's, says otherwise) with random weights; its folder.

    text: on the text encoders too.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    networks = {"unet": load_unet(base)} | (_text_encoders(base) if text else {})
    layers: dict[str, Any] = {}
    torch.manual_seed(1)
    for part, network in networks.items():
        wanted = targets if part == "unet" else TEXT
        settings = LoraConfig(**{"r": 4, "lora_alpha": 6, **config, "target_modules": wanted})
        inject_adapter_in_model(settings, network, "policy")
        for name, parameter in network.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
            elif "lora_magnitude" in name:
                parameter.data = parameter.data * (1 + 0.2 * torch.rand_like(parameter))
        # PEFT's names: a file that has them for some layers and diffusers' for others loads with layers missing.
        state = get_peft_model_state_dict(network, adapter_name="policy")
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}
        layers |= {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": plain}
    pipeline = StableDiffusionXLPipeline if base.name == "xl" else StableDiffusionPipeline
    pipeline.save_lora_weights(folder, **layers)
    assert (folder / ADAPTER_FILE).is_file()
    return folder


def draw(pipeline: Any) -> torch.Tensor:
    """One picture in [0, 1], always of the same seed."""
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32} if "XL" in type(pipeline).__name__ else {}
    images = pipeline("a red thing", num_inference_steps=2, generator=generator, output_type="np", **size).images
    return torch.from_numpy(images[0])
