"""The base model: a Stable Diffusion pipeline at 32 px.

`python -m shapes.base` trains UNet and text encoder on cached latents; `python -m shapes.base export`
writes the pipeline folder. The text encoder starts from the PickScore judge's, which has read the clean
world already.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from shapes.prompts import training_scenes
from shapes.render import render
from shapes.scorers import TEXT_TOWER
from shapes.stage import (
    MODELS,
    average,
    begin,
    declare_float32,
    done,
    flat_then_linear,
    load_tensors,
    save_tensors,
    set_rate,
)
from shapes.tokenizer import build_tokenizer, vocabulary
from shapes.vae import encode_all
from shapes.vae import load as load_vae

BATCH = 64
FLAT = 0.5  # share of a schedule before the learning rate falls
PICTURES = 24576  # rendered and encoded once
SINGLE_SHARE = 0.15  # of the pictures show one thing
DROP = 0.1  # captions replaced by the empty one, so that guidance stays possible
NOISE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def build_unet() -> UNet2DConditionModel:
    """Two resolutions with cross-attention; channels last is 30 % faster on a CPU."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_TOWER["hidden_size"],
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return unet.to(memory_format=torch.channels_last)


def build_text_encoder() -> CLIPTextModel:
    """The text tower of the PickScore judge, without its projection."""
    return CLIPTextModel(CLIPTextConfig(**TEXT_TOWER, **vocabulary(), projection_dim=128))


def initial_text_encoder() -> CLIPTextModel:
    """A copy of the trained judge's text tower."""
    model = build_text_encoder()
    prefix = "clip.text_model."
    tower = {k.removeprefix(prefix): v for k, v in load_tensors("pickscore-clean.safetensors").items() if prefix in k}
    own = model.state_dict()
    strip = "text_model." if next(iter(own)).startswith("text_model.") else ""
    model.load_state_dict({strip + key: value for key, value in tower.items()})
    return model


class Denoiser(nn.Module):
    """UNet and text encoder as one trainable module."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = build_unet(), text_encoder

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """Predicts the noise: latents (n, 4, 8, 8), timesteps (n,), token ids (n, 20)."""
        return self.unet(noisy, steps, self.text(ids).last_hidden_state).sample


def cached_latents(random: Random, canonical: bool) -> tuple[Tensor, Tensor]:
    """(PICTURES, 4, 8, 8) posterior means and (PICTURES, 20) token ids."""
    single, double = training_scenes()
    scenes = [random.choice(single if random.random() < SINGLE_SHARE else double) for _ in range(PICTURES)]
    if canonical:
        scenes = [scene.canonical() for scene in scenes]
    vae = load_vae()
    latents = [encode_all(vae, render(scenes[i : i + 256], random) * 2 - 1) for i in range(0, PICTURES, 256)]
    ids = build_tokenizer()([s.caption() for s in scenes], padding="max_length", return_tensors="pt").input_ids
    return torch.cat(latents), ids


def denoising_loss(model: Denoiser, noise: DDPMScheduler, latents: Tensor, ids: Tensor, lift: float) -> Tensor:
    """Noise-prediction error weighted by (min(SNR, 5) + lift) / SNR, at least 0.02.

    Lift 0 is min-SNR weighting; a positive lift raises the noisiest steps, where captions decide layouts.
    """
    steps = torch.randint(noise.config.num_train_timesteps, (len(latents),))
    target = torch.randn_like(latents)
    noisy = noise.add_noise(latents, target, steps).to(memory_format=torch.channels_last)
    kept = noise.alphas_cumprod[steps]
    snr = kept / (1 - kept)
    weight = ((snr.clamp(max=5) + lift) / snr).clamp(min=0.02)
    error = (model(noisy, steps, ids) - target).square().mean((1, 2, 3))
    return (weight * error).mean()


@dataclass(frozen=True)
class Round:
    """One learning-rate schedule; `start` names the round it continues, None = the judge's text tower."""

    result: str
    steps: int
    rate: float
    lift: float
    seed: int
    start: str | None = None
    stop: int | None = None  # steps really taken of the schedule; None = all
    canonical: bool = False  # only captions that tell a scene from the left or from the top
    marks: dict[float, str] = field(default_factory=dict)  # share of the schedule -> unfinished result


ROUNDS = (
    Round(
        "base-1.safetensors",
        3000,
        2e-3,
        0.0,
        21,
        marks={0.4: "unet-0.4.safetensors", 0.7: "unet-0.7.safetensors"},
    ),
    Round("base-2.safetensors", 3600, 1.5e-3, 0.1, 22, start="base-1.safetensors", stop=1800),
    Round(
        "base-3.safetensors",
        2200,
        1.5e-3,
        0.1,
        23,
        start="base-2.safetensors",
        canonical=True,
        marks={0.5: "unet-2.5.safetensors"},
    ),
    Round("base.safetensors", 1700, 1.5e-3, 0.0, 24, start="base-3.safetensors", canonical=True),
)


def train(part: Round) -> None:
    """Runs one round; writes its unfinished denoisers on the way and the averaged result last."""
    random = begin(part.seed)
    latents, ids = cached_latents(random, part.canonical)
    empty = build_tokenizer()("", padding="max_length", return_tensors="pt").input_ids
    model = load_denoiser(part.start).train() if part.start else Denoiser(initial_text_encoder())
    noise = DDPMScheduler(**NOISE)
    optimizer = torch.optim.AdamW(model.parameters(), part.rate, weight_decay=1e-3, betas=(0.9, 0.99))
    shadow = {key: value.clone() for key, value in model.state_dict().items()}
    marks = {int(share * part.steps): name for share, name in part.marks.items()}
    bar = tqdm(range(part.stop or part.steps), desc=part.result, mininterval=10)
    mean = 0.0
    for step in bar:
        set_rate(optimizer, part.rate * flat_then_linear(step, part.steps, warmup=100, flat=FLAT))
        index = torch.randint(len(latents), (BATCH,))
        texts = torch.where(torch.rand(BATCH, 1) < DROP, empty, ids[index])
        loss = denoising_loss(model, noise, latents[index], texts, part.lift)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(shadow, model, step)
        mean = 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{mean / (1 - 0.99 ** (step + 1)):.4f}")
        if step in marks:
            save_tensors(shadow, marks[step])
    save_tensors(shadow, part.result)


def load_denoiser(name: str = "base.safetensors") -> Denoiser:
    """A finished or an intermediate stage."""
    model = Denoiser(build_text_encoder())
    model.load_state_dict(load_tensors(name))
    model.eval()
    return model


def pipeline(name: str = "base.safetensors", decoder: str = "decoder.safetensors") -> StableDiffusionPipeline:
    """The stock pipeline of a stage, in float32, with the default recipe's sampler."""
    denoiser = load_denoiser(name)
    return StableDiffusionPipeline(
        vae=load_vae(decoder if done(decoder) else "vae.safetensors"),
        text_encoder=denoiser.text,
        tokenizer=build_tokenizer(),
        unet=denoiser.unet,
        scheduler=DPMSolverMultistepScheduler(**NOISE, timestep_spacing="trailing", algorithm_type="dpmsolver++"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(name: str, folder: Path = MODELS / "base") -> None:
    """Writes the pipeline folder: half-precision safetensors under the names of plain from_pretrained."""
    pipe = pipeline(name)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    declare_float32(folder / "text_encoder" / "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("train", "export"), default="train")
    parser.add_argument("--name", default="base.safetensors", help="which denoiser to export")
    given = parser.parse_args()
    if given.stage == "export":
        export(given.name)
        return
    for part in ROUNDS:
        if not done(part.result):
            train(part)


if __name__ == "__main__":
    main()
