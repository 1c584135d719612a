"""SDXL at its true size, SD3 and Flux at their true widths with a few of their blocks, random weights: one step of
training each, and the adapter loads in the plain pipeline."""

import gc
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.families import clip_encoder, clip_tokenizer, flow_vae, t5_encoder, t5_tokenizer, tiny_vae
from tests.training.worlds import Shapes, make_plan
from training.adapter.lora import Lora
from training.loop.trainer import train
from training.model.reference import ADAPTER_FILE

SDXL_UNET = 2_567_463_684
"""Parameters of the published checkpoint's UNet."""
FLOW = {"shift": 3.0}


def save_sdxl(folder: Path) -> None:
    """The UNet of stable-diffusion-xl-base-1.0 under tiny text encoders of its embeddings' widths."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=768 + 1280,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=1280 + 6 * 256,
        )  # fmt: skip
    assert sum(parameter.numel() for parameter in unet.parameters()) == SDXL_UNET
    schedule = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025), text_encoder=clip_encoder(768, False), text_encoder_2=clip_encoder(1280),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=drawn(unet), scheduler=schedule,
    ).save_pretrained(folder)  # fmt: skip


def save_sd3(folder: Path) -> None:
    """Three of the 24 blocks of stable-diffusion-3-medium."""
    with torch.device("cpu"):
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=768 + 1280, pos_embed_max_size=192,
        )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        vae=flow_vae(), text_encoder=clip_encoder(768), text_encoder_2=clip_encoder(1280), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(4096), tokenizer_3=t5_tokenizer(),
        transformer=transformer.to(torch.bfloat16), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    ).save_pretrained(folder)  # fmt: skip


def save_flux(folder: Path) -> None:
    """One of the 19 double and two of the 38 single blocks of FLUX.1 dev."""
    transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)
    diffusers.FluxPipeline(
        vae=flow_vae(), text_encoder=clip_encoder(768, False), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(4096), tokenizer_2=t5_tokenizer(), transformer=transformer.to(torch.bfloat16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
    ).save_pretrained(folder)  # fmt: skip


def drawn(network: torch.nn.Module) -> torch.nn.Module:
    """A network without weights given bfloat16 ones: torch's own start would take minutes and twice the memory."""
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("save", "shapes", "smallest"),
    [
        (save_flux, Shapes((16, 32, 32), (512, 4096), 768), 6e8),
        (save_sd3, Shapes((16, 32, 32), (333, 4096), 2048), 2.4e8),
        (save_sdxl, Shapes((4, 32, 32), (77, 2048), 1280), SDXL_UNET),
    ],
    ids=["flux", "sd3", "sdxl"],
)
def test_a_step_at_true_width(
    tmp_path: Path, save: Callable[[Path], None], shapes: Shapes, smallest: float, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.perf_counter()
    save(tmp_path / "base")
    gc.collect()
    plan = make_plan(
        tmp_path, shapes, steps=1, batch_size=1, micro_batch_size=1, lora=Lora(8, 8.0), dtype="bfloat16",
        mixed_precision="bf16", gradient_checkpointing=True, learning_rate=1e-2, guidance_input=3.5,
    )  # fmt: skip
    record = train(plan)
    assert record.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6) and record.metrics["grad_norm"] > 0
    gc.collect()
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    assert sum(parameter.numel() for parameter in network.parameters()) >= smallest
    pipeline.load_lora_weights(tmp_path / "out" / "adapter", weight_name=ADAPTER_FILE)
    moved = [p for name, p in network.named_parameters() if ".lora_B." in name]
    assert moved and all(parameter.abs().max() > 0 for parameter in moved)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"\n{save.__name__}: {time.perf_counter() - started:.0f} s, peak {peak:.1f} GiB of memory")
