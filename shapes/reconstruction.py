"""`python -m shapes.reconstruction`: how often true pictures still pass the oracle after the autoencoder."""

import argparse

import torch
from diffusers import AutoencoderKL

from shapes.oracle import check, claims, fraction, observe
from shapes.prompts import read_set
from shapes.render import render, to_uint8
from shapes.stage import MODELS, begin, done
from shapes.vae import load
from shapes.world import parse


@torch.no_grad()
def reconstruction(model: AutoencoderKL, seed: int = 0) -> dict[str, float]:
    """Mean oracle score, exact share and peak signal-to-noise ratio (dB) on freshly drawn tuning prompts."""
    random = begin(seed)
    scenes = [parse(text) for text in read_set("tuning")]
    images = render(scenes, random)
    decoded = torch.cat([model(chunk * 2 - 1).sample for chunk in images.split(64)]) / 2 + 0.5
    seen = to_uint8(decoded).permute(0, 3, 1, 2).float() / 255
    passed = fraction(*check(observe(seen), claims(scenes)))
    error = (decoded.clamp(0, 1) - images).square().mean((1, 2, 3))
    return {
        "score": passed.mean().item(),
        "exact": (passed == 1).float().mean().item(),
        "psnr": (-10 * error.log10()).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=str(MODELS / "base"), help="pipeline folder, or a stage's file in BUILD")
    source = parser.parse_args().source
    model = load(source) if done(source) else AutoencoderKL.from_pretrained(source, subfolder="vae")
    print(reconstruction(model))


if __name__ == "__main__":
    main()
