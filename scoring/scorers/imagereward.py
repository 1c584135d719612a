"""ImageReward v1.0 (Xu et al. 2023, "ImageReward", arXiv:2304.05977): a BLIP tuned on rankings by experts.

An own port: the published package runs with old transformers only. The network and its tokenizer are in
`scoring.scorers.blip`, here are the pixels and the score. Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.hub import is_hub_id
from scoring.scorers.blip import (
    TEXT_CONFIG,
    TEXT_SIZES,
    VISION_CONFIG,
    VISION_SIZES,
    build_model,
    load_tokenizer,
    read_sizes,
)
from scoring.scorers.checkpoints import load_weights
from scoring.scorers.images import Images, as_arrays
from scoring.scorers.model import ModelScorer, compute_dtype
from scoring.scorers.registry import ScorerSource
from scoring.scorers.scorer import ScorerInfo
from scoring.scorers.sources import (
    Snapshot,
    check_hub,
    contents_digest,
    existing_folder,
    fingerprint,
    first_file,
    local_copy,
)

if TYPE_CHECKING:
    import torch

NAME, VERSION, DEFAULT_SOURCE = "imagereward", "v1.0", "THUDM/ImageReward"
DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"
"""Whose vocabulary is used when a hub repository comes without one, as the published one does."""
WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")
VOCABULARY = ("vocab.txt", "tokenizer.json")
PREPROCESSING = "shortest-side-bicubic-pil-centre-crop"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Bring the network's output near N(0, 1); the numbers are those of ImageReward/ImageReward.py in the repository."""
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Files:
    """The files of one set of weights."""

    weights: Path
    vocabulary: Path

    def all(self) -> list[Path]:
        configs = (self.weights.parent / name for name in (TEXT_CONFIG, VISION_CONFIG))
        return [self.weights, self.vocabulary, *(path for path in configs if path.is_file())]


class ImageReward(ModelScorer):
    """score = (network(image, prompt) - 0.16717) / 1.03334, unit "reward", without bounds; near N(0, 1) on its data.

    The network was trained with -log sigmoid of the difference of its outputs (equation 1 of the paper), so the
    preference probability of two images is sigmoid(1.03334 (score_a - score_b)). Only the first 33 word pieces of
    a prompt count.
    """

    def __init__(
        self,
        source: str | None = None,
        device: str = "cpu",
        revision: str | None = None,
        batch_size: int = 64,
    ) -> None:
        """`source`: folder or hub id; None = the published weights. `batch_size`: see `ModelScorer`.

        A folder holds ImageReward.safetensors or ImageReward.pt, the vocab.txt or tokenizer.json of
        bert-base-uncased and, where sizes are not the published ones, med_config.json (the text side, as
        published) and vision_config.json (the image side, the fields of `scoring.scorers.blip.VISION_SIZES`).
        Raises ValueError for a folder without the needed files.
        """
        super().__init__(device, batch_size)
        self.check(bound := ScorerSource(source, revision=revision))
        found = _weights_folder(bound)
        self._files = _files(found.folder)
        facts = {"preprocessing": PREPROCESSING, "dtype": compute_dtype(device)}
        self.info = ScorerInfo(
            NAME, VERSION, "reward", source=found.origin, revision=found.revision,
            fingerprint=fingerprint(self._files.all(), name=NAME, version=VERSION, **facts),
            weights=contents_digest([self._files.weights]), preprocessing=PREPROCESSING,
            licence="Apache-2.0", preference_scale=STD,
        )  # fmt: skip

    def _load_model(self) -> torch.nn.Module:
        weights = self._files.weights
        text = read_sizes(weights.parent, TEXT_CONFIG, TEXT_SIZES)
        vision = read_sizes(weights.parent, VISION_CONFIG, VISION_SIZES)
        self._tokenizer = load_tokenizer(self._files.vocabulary, text["vocab_size"])
        self._size = int(vision["image_size"])
        return build_model(text, vision, load_weights(weights), str(weights))

    @staticmethod
    def check(source: ScorerSource) -> None:
        """Raises ValueError when the source cannot hold ImageReward weights; loads nothing."""
        if source.variant not in (None, VERSION):
            raise ValueError(f"scorer {NAME!r}: unknown variant {source.variant!r}, not {VERSION}")
        where = source.source or DEFAULT_SOURCE
        if is_hub_id(where):
            return check_hub(where, source.revision, WEIGHTS, NAME)
        folder = existing_folder(where, NAME)
        first_file(folder, WEIGHTS, NAME)
        try:
            first_file(folder, VOCABULARY, NAME)
        except ValueError as error:
            raise ValueError(f"{error}; copy there the one of {DEFAULT_TOKENIZER}") from None

    def _score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        def rewards(rows: range) -> torch.Tensor:
            part = slice(rows.start, rows.stop)
            return self._rewards(images[part], prompts[part])

        return self._chunks(rewards, range(len(prompts)))

    def _rewards(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """The scores (n,) of images and prompts that fit the memory together."""
        pixels = normalised(resized(images, self._size).to(self._device))
        # Always padded to the full length, as in the training; so a score does not depend on the other prompts.
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        with self._autocast():
            patches = self._model["vision"](pixel_values=pixels).last_hidden_state
            hidden = self._model["text"](ids, mask, encoder_hidden_states=patches, is_decoder=False).last_hidden_state
        output: torch.Tensor = self._model["head"](hidden[:, 0].float())[:, 0]
        return (output - MEAN) / STD


def resized(images: Images, size: int) -> torch.Tensor:
    """uint8 images of any sizes -> uint8 (n, 3, size, size) on the CPU: shortest side to `size`, centre cropped.

    By Pillow, whose antialiased bicubic the network was trained with: torchvision's resize of tensors is one level
    off in some pixels.
    """
    import PIL.Image
    import torch
    from torchvision.transforms.v2 import InterpolationMode, functional

    def crop(image: np.ndarray) -> torch.Tensor:
        picture = functional.resize(PIL.Image.fromarray(image), [size], InterpolationMode.BICUBIC)
        pixels: torch.Tensor = functional.pil_to_tensor(functional.center_crop(picture, [size, size]))
        return pixels

    return torch.stack([crop(image) for image in as_arrays(images)])


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 3, height, width) -> float32 of the same shape with the mean and deviation of CLIP's training."""
    import torch

    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels.float() / 255 - mean) / std


def _weights_folder(source: ScorerSource) -> Snapshot:
    """The files of the weights; the pickle only where there is nothing safer."""
    where, (safe, pickled) = source.source or DEFAULT_SOURCE, WEIGHTS
    found = local_copy(where, source.revision, [safe, TEXT_CONFIG, VISION_CONFIG, *VOCABULARY], NAME)
    if is_hub_id(where) and not (found.folder / safe).is_file():
        return local_copy(where, found.revision, [pickled, TEXT_CONFIG, VISION_CONFIG, *VOCABULARY], NAME)
    return found


def _files(folder: Path) -> Files:
    weights = first_file(folder, WEIGHTS, NAME)
    if not any((folder / name).is_file() for name in VOCABULARY):
        return Files(weights, local_copy(DEFAULT_TOKENIZER, None, VOCABULARY[:1], NAME).folder / VOCABULARY[0])
    return Files(weights, first_file(folder, VOCABULARY, NAME))
