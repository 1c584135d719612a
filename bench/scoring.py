"""How fast HPSv2 scores: ours and the original package in one run, on the same random weights and images.

    python -m bench.scoring [--model ViT-B-32] [--images 16] [--repeats 5] [--device cpu]

Shows the time an image of (a) `hpsv2.score`, which loads its checkpoint at every call; (b) the original with its
model kept, still image by image; (c) our first call with the loading; (d) ours from arrays, warm; (e) ours from one
uint8 tensor; and the largest difference between the scores. The ways take turns within a repeat, so that a busy
machine slows all of them. On CUDA also images a second by batch size, as a share of what a large float16 matrix
product reaches. Needs the extra "hpsv2".
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.original_hpsv2 import original, put_model
from bench.training_device import describe
from scoring.scorers import sources
from scoring.scorers.hpsv2 import HPSv2, preprocess

PROMPTS = [
    "a red fox asleep in fresh snow, photograph",
    "portrait of an old sailor with a pipe, oil on canvas, dramatic light",
    "a city street at night in the rain, neon signs, anime key visual",
    "isometric concept art of a floating island with waterfalls and a small village, highly detailed",
]
Way = Callable[[], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip; HPSv2 is a ViT-H-14")
    parser.add_argument("--images", type=int, default=16, help="shared out among four prompts")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="*", help="batch sizes of the throughput; default: none on a CPU")
    given = parser.parse_args()
    images, prompts = inputs(given.images, given.size)
    with tempfile.TemporaryDirectory() as folder, original("img_score") as theirs:
        checkpoint = write_weights(given.model, Path(folder))
        put_model(theirs, json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"], Path(folder))
        vars(theirs)["device"] = given.device
        theirs.score([Image.fromarray(images[0])], prompts[0], cp=str(checkpoint))  # moves it and loads the weights
        ours = HPSv2(folder, given.device).load()
        ways = all_ways(theirs, checkpoint, ours, folder, images, prompts)
        print(f"{given.model}, {len(images)} images of {given.size} x {given.size}, {describe(given.device)}")
        report(*timed(ways, given.repeats), len(images))
        default = (64, 128, 256, 512) if given.device.startswith("cuda") else ()
        throughput(ours, theirs, images[0], given.batches if given.batches is not None else default)


def inputs(count: int, size: int) -> tuple[list[np.ndarray], list[str]]:
    """Images of noise over a gradient, and as many prompts: image i belongs to prompt i // (count / 4)."""
    rng = np.random.default_rng(0)
    gradient = np.linspace(0, 200, size)[None, :, None]
    images = [(gradient + rng.integers(0, 56, (size, size, 3))).astype(np.uint8) for _ in range(count)]
    images = [np.roll(image, 97 * index, axis=1) for index, image in enumerate(images)]
    return images, [PROMPTS[index * len(PROMPTS) // count] for index in range(count)]


def write_weights(architecture: str, folder: Path) -> Path:
    """Random weights as the one checkpoint that both sides read."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict()}, folder / "open_clip_model.pt")
    return folder / "open_clip_model.pt"


def all_ways(theirs: Any, checkpoint: Path, ours: HPSv2, folder: str, images: list, prompts: list[str]) -> dict:
    """Name -> what scores all the images once in that way."""
    pictures = [Image.fromarray(image) for image in images]
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(ours._device)

    def reloading() -> np.ndarray:
        pairs = zip(pictures, prompts, strict=True)
        return np.array([theirs.score(picture, prompt, cp=str(checkpoint))[0] for picture, prompt in pairs])

    def first() -> np.ndarray:
        sources._sha256.cache_clear()  # a fresh process would compute the digest of the weights
        return HPSv2(folder, ours._device).score(images, prompts)

    return {
        "a  hpsv2.score": reloading,
        "b  hpsv2, model kept": lambda: one_by_one(theirs, pictures, prompts),
        "c  ours, first call": first,
        "d  ours, arrays": lambda: forgetful(ours, images, prompts),
        "e  ours, tensor": lambda: forgetful(ours, tensor, prompts),
    }


def forgetful(ours: HPSv2, images: Any, prompts: list[str]) -> np.ndarray:
    """Scores as if these prompts had never been seen: the embeddings kept from the last repeat are dropped."""
    ours._texts.clear()
    return ours.score(images, prompts)


@torch.no_grad()
def one_by_one(theirs: Any, pictures: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """What the loop of the original's `score` does for each image, without the loading before it."""
    model, transform = theirs.model_dict["model"], theirs.model_dict["preprocess_val"]
    tokenizer, scores = theirs.get_tokenizer("ViT-H-14"), []
    for picture, prompt in zip(pictures, prompts, strict=True):
        image, text = transform(picture).unsqueeze(0).to(theirs.device), tokenizer([prompt]).to(theirs.device)
        with torch.cuda.amp.autocast():
            output = model(image, text)
            scores.append((output["image_features"] @ output["text_features"].T).cpu().numpy()[0, 0])
    return np.array(scores)


def timed(ways: Mapping[str, Way], repeats: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds of every repeat of every way, and its scores of the last repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way()  # ends with a copy to the CPU, so a GPU is done as well
            seconds[name].append(time.perf_counter() - start)
    return seconds, scores


def report(seconds: Mapping[str, list[float]], scores: Mapping[str, np.ndarray], images: int) -> None:
    """One row a way; the ratios are those of the minima, which other work on the machine disturbs least."""
    (slow, kept, *_), names = seconds.values(), list(seconds)
    print(f"{'way':<22}{'min ms':>10}{'median ms':>11}{'a / this':>10}{'b / this':>10}{'max |score - b|':>17}")
    for name in names:
        milli = [1e3 * value / images for value in seconds[name]]
        gain = [min(other) / min(seconds[name]) for other in (slow, kept)]
        apart = np.abs(scores[name].astype(np.float64) - scores[names[1]]).max()
        print(f"{name:<22}{min(milli):>10.1f}{median(milli):>11.1f}{gain[0]:>9.2f}x{gain[1]:>9.2f}x{apart:>17.1e}")
    print(f"scores spread over {np.ptp(scores[names[1]]):.1e}; times are for an image")


def throughput(ours: HPSv2, theirs: Any, image: np.ndarray, batches: Any) -> None:
    """Images a second by batch size, one prompt a batch, beside the original's loop and the peak of the device."""
    if not batches:
        return
    flops, peak = image_flops(ours), matrix_peak(ours._device)
    loop = 8 / best(lambda: one_by_one(theirs, [Image.fromarray(image)] * 8, [PROMPTS[0]] * 8))
    print(
        f"{flops / 1e9:.1f} GFLOP an image, matrix products reach {peak / 1e12:.2f} TFLOP/s, hpsv2 {loop:.1f} images/s"
    )
    print("images/s by batch size, of all and of the preprocessing alone:")
    for size in batches:
        ours._batch_size = size
        tensor = torch.from_numpy(image).permute(2, 0, 1).repeat(size, 1, 1, 1).to(ours._device)
        rate = size / best(partial(ours.score, tensor, [PROMPTS[0]] * size))
        alone = size / best(partial(_preprocessed, tensor, ours._size))
        share = rate * flops / peak
        print(f"{size:>5}{rate:>10.1f}{alone:>10.1f}   {rate / loop:.1f}x hpsv2, {share:.1%} of peak")


def _preprocessed(images: torch.Tensor, size: int) -> float:
    """One of the numbers, which cannot be told before all are computed."""
    return preprocess(images, size)[0, 0, 0, 0].item()


def image_flops(scorer: HPSv2) -> int:
    """Floating-point operations of the image tower for one image, two a multiplication with addition."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused attention block
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            scorer._model.encode_image(torch.zeros(1, 3, scorer._size, scorer._size, device=scorer._device))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops())


def matrix_peak(device: str) -> float:
    """Floating-point operations a second of a large product in the type that the scorers compute in there."""
    cuda = device.startswith("cuda")
    side = 8192 if cuda else 2048
    matrix = torch.randn(side, side, device=device, dtype=torch.float16 if cuda else torch.float32)
    return 20 * 2 * side**3 / best(lambda: [matrix @ matrix for _ in range(20)][-1][0, 0].item())


def best(call: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
