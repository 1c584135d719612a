"""Human Preference Score v2 and v2.1 (Wu et al. 2023, "Human Preference Score v2", arXiv:2306.09341).

The model is an open_clip CLIP (ViT-H-14 for the published weights), the tokenizer open_clip's own. Images are
resized as floats and padded to a square, unlike CLIP's crop. Importing this module does not load torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoring.cosine import CosineScorer, compute_dtype
from scoring.scorer import ScorerInfo, ScorerSource, ScoringError
from scoring.sources import check_hub, existing_folder, fingerprint, first_file, is_hub_id, local_copy

if TYPE_CHECKING:
    import torch

NAME, DEFAULT_SOURCE, DEFAULT_VARIANT = "hpsv2", "xswu/HPSv2", "v2.1"
PUBLISHED = {"v2.0": "HPS_v2_compressed", "v2.1": "HPS_v2.1_compressed"}
ARCHITECTURE = "ViT-H-14"
CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_model.pt",
    "open_clip_model.bin",
    "open_clip_pytorch_model.bin",
)
PREPROCESSING = "longest-side-bicubic-antialias-float-pad0"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class WeightFiles:
    """The files of one set of weights."""

    weights: Path
    config: Path | None
    """None = the published weights, whose architecture is open_clip's ViT-H-14."""
    vocabulary: Path | None
    """BPE merges of the tokenizer. None = open_clip's."""

    def all(self) -> list[Path]:
        return [path for path in (self.weights, self.config, self.vocabulary) if path is not None]


class HPSv2(CosineScorer):
    """score = cos(image, text), unit "cosine": without logit scale and without the 100 of published tables.

    Scores of v2.0 and v2.1 are not comparable with each other.
    """

    def __init__(
        self,
        source: str | None = None,
        device: str = "cpu",
        revision: str | None = None,
        variant: str | None = None,
        batch_size: int = 64,
    ) -> None:
        """`source`: folder or hub id; None = the published weights. `variant`: "v2.0" or "v2.1" (None).

        A folder holds open_clip_config.json with open_clip_model.safetensors (or .pt, .bin) and, if the
        tokenizer has its own vocabulary, one *.txt.gz; or a published checkpoint under its published name.
        Raises ValueError for a folder without the needed files, ScoringError for weights that do not fit or
        are unsafe.
        """
        from open_clip.tokenizer import SimpleTokenizer

        self.check(bound := ScorerSource(source, revision=revision, variant=variant))
        folder, origin = _weights_folder(bound)
        version = variant or DEFAULT_VARIANT
        files = _weight_files(folder, version)
        model_config, preprocess_config = _read_config(files.config)
        model = build_model(model_config, load_weights(files.weights), str(files.weights))
        super().__init__(model, device, batch_size)
        bpe = {"bpe_path": str(files.vocabulary)} if files.vocabulary else {}
        self._tokenizer = SimpleTokenizer(context_length=self._model.context_length, **bpe)
        self._size = _square_size(model_config["vision_cfg"].get("image_size", 224))
        self._mean = tuple(preprocess_config.get("mean") or OPENAI_MEAN)
        self._std = tuple(preprocess_config.get("std") or OPENAI_STD)
        facts = {"preprocessing": PREPROCESSING, "dtype": compute_dtype(device)}
        digest = fingerprint(files.all(), name=NAME, version=version, **facts)
        self.info = ScorerInfo(NAME, version, "cosine", True, origin, digest)

    @staticmethod
    def check(source: ScorerSource) -> None:
        """Raises ValueError when the source cannot hold HPSv2 weights; loads nothing."""
        variant = source.variant or DEFAULT_VARIANT
        if variant not in PUBLISHED:
            raise ValueError(f"scorer {NAME!r}: unknown variant {variant!r}, not {' or '.join(PUBLISHED)}")
        where = source.source or DEFAULT_SOURCE
        if is_hub_id(where):
            return check_hub(where, source.revision, [CONFIG, *_published_names(variant)], NAME)
        _weight_files(existing_folder(where, NAME), variant)

    def _image_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        import torch

        pixels = torch.empty(len(images), 3, self._size, self._size, device=self._device)
        for shape in dict.fromkeys(image.shape for image in images):
            rows = [row for row, image in enumerate(images) if image.shape == shape]
            batch = torch.from_numpy(np.stack([images[row] for row in rows])).to(self._device)
            pixels[rows] = preprocess(batch.permute(0, 3, 1, 2), self._size, self._mean, self._std)
        with self._autocast():
            features: torch.Tensor = self._model.encode_image(pixels)
        return features

    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        with self._autocast():
            features: torch.Tensor = self._model.encode_text(self._tokenizer(list(prompts)).to(self._device))
        return features


def preprocess(
    images: torch.Tensor, size: int, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD
) -> torch.Tensor:
    """HPSv2's preprocessing of images of one size: uint8 (n, 3, height, width) -> float32 (n, 3, size, size).

    The longest side becomes `size` by bicubic interpolation of values in [0, 1]; the overshoot stays; the
    other side is rounded and padded with zeros on both ends BEFORE normalising, so the bars are black and not
    mean-coloured.
    """
    import torch
    from torch.nn import functional

    scale = size / float(max(images.shape[-2:]))
    inner = [max(1, round(side * scale)) for side in images.shape[-2:]]
    pixels = images.contiguous().float().div(255)
    if scale != 1.0:
        # Said outright: without antialias the same resize reorders images, and the default of torchvision,
        # which the original relies on, changed between versions.
        pixels = functional.interpolate(pixels, inner, mode="bicubic", align_corners=False, antialias=True)
    spare_y, spare_x = size - inner[0], size - inner[1]
    left, top = spare_x // 2, spare_y // 2
    pixels = functional.pad(pixels, [left, spare_x - left, top, spare_y - top])
    shift, spread = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (tuple(mean), tuple(std)))
    return (pixels - shift) / spread


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor from a safetensors file or a torch checkpoint, also one nested under "state_dict".

    Raises ScoringError for a damaged file, and for a checkpoint that holds anything but plain data:
    unpickling such a file runs its code.
    """
    import pickle
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only zip checkpoints can be mapped; without the mapping a ViT-H needs its 4 GB of memory twice.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ScoringError(
            f"{path}: not a checkpoint of plain tensors; refused, as loading it could run code: {error} "
            "If you trust the file, convert it to safetensors once on an isolated machine."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ScoringError(f"{path}: does not load: {error}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ScoringError(f"{path}: holds no state dict of tensors")
    return dict(state)


def build_model(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], origin: str) -> torch.nn.Module:
    """An open_clip CLIP of a model_cfg with exactly these weights, in float32.

    Raises ScoringError, naming `origin`, when names or shapes differ.
    """
    import open_clip
    import torch

    with torch.device("meta"):  # random initialisation of a ViT-H takes half a minute and is thrown away
        model = open_clip.CLIP(**config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ScoringError(f"{origin}: does not fit the architecture: {error}") from error
    if model.attn_mask is not None:
        # The causal mask is no part of a checkpoint, so it is still without data on the meta device.
        mask = torch.full(model.attn_mask.shape, float("-inf"), device="cpu").triu_(1)
        model.register_buffer("attn_mask", mask, persistent=False)
    return model.float()


def _weights_folder(source: ScorerSource) -> tuple[Path, str]:
    """The local folder of the weights and its name for people, see `local_copy`."""
    patterns = [CONFIG, *WEIGHTS, "*.txt.gz", *_published_names(source.variant or DEFAULT_VARIANT)]
    return local_copy(source.source or DEFAULT_SOURCE, source.revision, patterns, NAME)


def _weight_files(folder: Path, variant: str) -> WeightFiles:
    vocabularies = sorted(folder.glob("*.txt.gz"))
    if len(vocabularies) > 1:
        names = ", ".join(path.name for path in vocabularies)
        raise ValueError(f"scorer {NAME!r}: {folder} holds several vocabularies ({names}); keep one")
    config = folder / CONFIG if (folder / CONFIG).is_file() else None
    weights = first_file(folder, WEIGHTS if config else _published_names(variant), NAME)
    return WeightFiles(weights, config, vocabularies[0] if vocabularies else None)


def _published_names(variant: str) -> tuple[str, str]:
    return f"{PUBLISHED[variant]}.safetensors", f"{PUBLISHED[variant]}.pt"


def _read_config(path: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_cfg and preprocess_cfg; of the latter only mean and std count, as HPSv2 fixes how to resize."""
    if path is None:
        import open_clip

        return open_clip.get_model_config(ARCHITECTURE), {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return config["model_cfg"], config.get("preprocess_cfg") or {}


def _square_size(image_size: int | Sequence[int]) -> int:
    sides = {image_size} if isinstance(image_size, int) else set(image_size)
    if len(sides) != 1:
        raise ValueError(f"scorer {NAME!r}: image_size must be square, got {image_size}")
    return sides.pop()
