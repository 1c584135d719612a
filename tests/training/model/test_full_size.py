"""Stable Diffusion 1.5 at its true size, with random weights: it loads, samples, trains one step, and hands over."""

from pathlib import Path

import pytest
import torch

from tests.tiny import ALL_MERGES, clip_tokenizer
from tests.training.worlds import make_plan
from training.adapter.lora import Lora
from training.loop.trainer import train
from training.model.loading import load_pipeline
from training.model.reference import ADAPTER_FILE, ModelRef
from training.model.sampling import Sampler, embed_prompts, negative_prompt, sample_images

PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
"""Of the published checkpoint."""


def save_sd15(folder: Path) -> Path:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"
    )
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(merges=ALL_MERGES),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stable_diffusion_15(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training.worlds.LATENT", (4, 64, 64))
    monkeypatch.setattr("tests.training.worlds.EMBEDDING", (77, 768))
    base = save_sd15(tmp_path / "base")
    pipeline = load_pipeline(ModelRef(str(base)))
    counts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in PARAMETERS}
    assert counts == PARAMETERS
    embeddings, negative = embed_prompts(pipeline, ["a lighthouse"]), negative_prompt(pipeline)
    assert embeddings.tokens.shape == (1, 77, 768)
    sampler = Sampler("DPMSolverMultistepScheduler", 1, 7.5)
    latents, images = sample_images(pipeline, embeddings, negative, [1], sampler, 1)
    assert latents.shape == (1, 4, 64, 64) and images.shape == (1, 512, 512, 3)
    del pipeline
    plan = make_plan(tmp_path, steps=1, batch_size=1, micro_batch_size=1, lora=Lora(8, 8.0))
    record = train(plan)
    assert record.metrics["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert record.metrics["grad_norm"] > 0
    tuned = load_pipeline(record.model)
    assert (Path(record.model.adapter or "") / ADAPTER_FILE).is_file() and tuned.unet is not None
