"""The autoencoder: 32 px pictures to 8 x 8 x 4 latents and back.

`python -m shapes.vae` trains encoder and decoder together; `python -m shapes.vae decoder` then trains the
decoder alone on the frozen latents, so that a denoiser trained on those latents stays valid.
"""

import argparse
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from shapes.render import render
from shapes.stage import average, begin, done, flat_then_linear, load_tensors, save_tensors, set_rate
from shapes.world import Scene, all_scenes

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    mid_block_add_attention=False,
    sample_size=32,
    scaling_factor=1.0,  # the latents are normalised inside the quantisation layers, see `normalise_latents`
)
STEPS, DECODER_STEPS, BATCH = 4500, 4500, 16
POOL = 16384  # pictures rendered once and revisited; layouts hardly matter to a convolutional model


def build() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)


def picture_pool(count: int, random: Random) -> Tensor:
    """(count, 3, 32, 32) in [-1, 1]: random scenes, a fifth of them with one thing."""
    scenes = all_scenes()
    single, double = [s for s in scenes if s.relation is None], [s for s in scenes if s.relation]
    picks: list[Scene] = [random.choice(single if random.random() < 0.2 else double) for _ in range(count)]
    return render(picks, random) * 2 - 1


def loss_of(model: AutoencoderKL, images: Tensor, frozen: bool) -> Tensor:
    """L1 + 2 MSE, plus a weak KL term while the encoder still learns."""
    if frozen:
        with torch.no_grad():
            posterior = model.encode(images).latent_dist
    else:
        posterior = model.encode(images).latent_dist
    error = model.decode(posterior.mode() if frozen else posterior.sample()).sample - images
    loss = error.abs().mean() + 2 * error.square().mean()
    if frozen:
        return loss
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return loss + 2e-4 * kl


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means (n, 4, 8, 8) of pictures in [-1, 1]."""
    return torch.cat([model.encode(chunk).latent_dist.mean for chunk in images.split(64)])


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Folds each latent channel's mean and deviation into the 1x1 convolutions beside the latents.

    A Stable Diffusion pipeline can scale latents but not shift them; afterwards neither is needed.
    """
    latents = encode_all(model, images)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.bias[4:] -= 2 * deviation.log()  # the log-variances follow
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= deviation[None, :, None, None]


def train(frozen: bool, steps: int, rate: float, seed: int) -> None:
    """Trains everything, or with `frozen` only what follows the latents; writes the averaged weights."""
    random = begin(seed)
    model = build()
    if frozen:
        model.load_state_dict(load_tensors("vae.safetensors"))
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    images = picture_pool(POOL, random)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=1e-4)
    shadow = {key: value.clone() for key, value in model.state_dict().items()}
    bar = tqdm(range(steps), desc="decoder" if frozen else "vae", mininterval=10)
    for step in bar:
        set_rate(optimizer, rate * flat_then_linear(step, steps, flat=0.4))
        batch = images[torch.randint(len(images), (BATCH,))].to(memory_format=torch.channels_last)
        loss = loss_of(model, batch, frozen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(shadow, model, step, limit=0.99)
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.load_state_dict(shadow)
    if not frozen:
        normalise_latents(model, images[:2048])
    save_tensors(model.state_dict(), "decoder.safetensors" if frozen else "vae.safetensors")


def load(name: str = "vae.safetensors") -> AutoencoderKL:
    """A trained stage: `vae.safetensors`, or `decoder.safetensors` (equal encoder, better decoder)."""
    model = build()
    model.load_state_dict(load_tensors(name))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("all", "decoder"), default="all")
    frozen = parser.parse_args().stage == "decoder"
    if not done("decoder.safetensors" if frozen else "vae.safetensors"):
        train(frozen, DECODER_STEPS if frozen else STEPS, 2e-3 if frozen else 4e-3, seed=2 if frozen else 1)


if __name__ == "__main__":
    main()
