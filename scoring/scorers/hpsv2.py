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

from data.hub import is_hub_id
from scoring.scorers.checkpoints import load_weights, read_tensor
from scoring.scorers.cosine import CosineScorer
from scoring.scorers.images import Images, by_size
from scoring.scorers.model import compute_dtype
from scoring.scorers.registry import ScorerSource
from scoring.scorers.scorer import ScorerInfo, ScoringError
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

    Scores of v2.0 and v2.1 are not comparable with each other, nor are scores with and without antialias. The
    preference probability of two images is the softmax of exp(logit_scale) * score (section 4 of the paper).
    """

    def __init__(
        self,
        source: str | None = None,
        device: str = "cpu",
        revision: str | None = None,
        variant: str | None = None,
        antialias: bool = True,
        batch_size: int = 64,
    ) -> None:
        """`source`: folder or hub id; None = the published weights. `variant`: "v2.0" or "v2.1" (None).

        A folder holds open_clip_config.json with open_clip_model.safetensors (or .pt, .bin) and, if the
        tokenizer has its own vocabulary, one *.txt.gz; or a published checkpoint under its published name.
        `antialias`: whether the resize to the model's size is antialiased. The original package leaves it to
        torchvision, whose default is True since 0.17 and was False when the published tables were made.
        Raises ValueError for a folder without the needed files, ScoringError for weights that do not fit or
        are unsafe.
        """
        super().__init__(device, batch_size)
        self.check(bound := ScorerSource(source, None, revision, variant, options={"antialias": antialias}))
        found = _weights_folder(bound)
        version = variant or DEFAULT_VARIANT
        self._files, self._antialias = _weight_files(found.folder, version), bool(antialias)
        preprocessing = PREPROCESSING if self._antialias else PREPROCESSING.replace("antialias", "no-antialias")
        facts = {"preprocessing": preprocessing, "dtype": compute_dtype(device)}
        self.info = ScorerInfo(
            NAME, version, "cosine", source=found.origin, revision=found.revision,
            fingerprint=fingerprint(self._files.all(), name=NAME, version=version, **facts),
            weights=contents_digest([self._files.weights]), preprocessing=preprocessing, lowest=-1.0, highest=1.0,
            licence="Apache-2.0", preference_scale=_logit_scale(self._files.weights),
        )  # fmt: skip

    def _load_model(self) -> torch.nn.Module:
        from open_clip.tokenizer import SimpleTokenizer

        model_config, preprocess_config = _read_config(self._files.config)
        model: Any = build_model(model_config, load_weights(self._files.weights), str(self._files.weights))
        bpe = {"bpe_path": str(self._files.vocabulary)} if self._files.vocabulary else {}
        self._tokenizer = SimpleTokenizer(context_length=model.context_length, **bpe)
        self._size = _square_size(model_config["vision_cfg"].get("image_size", 224))
        self._mean = tuple(preprocess_config.get("mean") or OPENAI_MEAN)
        self._std = tuple(preprocess_config.get("std") or OPENAI_STD)
        loaded: torch.nn.Module = model
        return loaded

    @staticmethod
    def check(source: ScorerSource) -> None:
        """Raises ValueError when the source cannot hold HPSv2 weights; loads nothing."""
        variant = source.variant or DEFAULT_VARIANT
        if variant not in PUBLISHED:
            raise ValueError(f"scorer {NAME!r}: unknown variant {variant!r}, not {' or '.join(PUBLISHED)}")
        if (antialias := source.options.get("antialias", True)) not in (0, 1):
            raise ValueError(f"scorer {NAME!r}: antialias must be 0 or 1, got {antialias!r}")
        where = source.source or DEFAULT_SOURCE
        if is_hub_id(where):
            return check_hub(where, source.revision, [CONFIG, *_published_names(variant)], NAME)
        _weight_files(existing_folder(where, NAME), variant)

    def _image_features(self, images: Images) -> torch.Tensor:
        import torch

        pixels = torch.empty(len(images), 3, self._size, self._size, device=self._device)
        step = 1 if pixels.device.type == "cpu" else len(images)  # a CPU is faster on what stays in its cache
        for rows, batch in by_size(images):
            for part in (slice(start, start + step) for start in range(0, len(rows), step)):
                raw = batch[part].to(self._device)
                pixels[rows[part]] = preprocess(raw, self._size, self._mean, self._std, self._antialias)
        with self._autocast():
            features: torch.Tensor = self._model.encode_image(pixels)
        return features

    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(list(prompts)).to(self._device)
        with self._autocast():
            return encode_text(self._model, tokens)


def preprocess(
    images: torch.Tensor,
    size: int,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    antialias: bool = True,
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
        pixels = functional.interpolate(pixels, inner, mode="bicubic", align_corners=False, antialias=antialias)
    spare_y, spare_x = size - inner[0], size - inner[1]
    left, top = spare_x // 2, spare_y // 2
    pixels = functional.pad(pixels, [left, spare_x - left, top, spare_y - top])
    shift, spread = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (tuple(mean), tuple(std)))
    return (pixels - shift) / spread


def encode_text(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings (n, width) of tokens (n, context), without the work on their padding.

    Token i of a causal tower depends on none behind it, and the tower is read out at the end-of-text token, the
    largest id. So what is behind the last of these changes nothing; it is most of the context, 77 tokens.
    """
    from torch.func import functional_call

    if model.text_pool_type != "argmax" or model.attn_mask is None:
        features: torch.Tensor = model.encode_text(tokens)
        return features
    used = int(tokens.argmax(-1).max()) + 1
    cut = {"positional_embedding": model.positional_embedding[:used], "attn_mask": model.attn_mask[:used, :used]}
    embedded: torch.Tensor = functional_call(model, cut, (None, tokens[:, :used]))[1]
    return embedded


def _logit_scale(path: Path) -> float:
    """exp(logit_scale) of a checkpoint, read without the rest of its tensors."""
    return float(read_tensor(path, "logit_scale").float().exp())


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


def _weights_folder(source: ScorerSource) -> Snapshot:
    """The files of the weights, see `local_copy`."""
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
