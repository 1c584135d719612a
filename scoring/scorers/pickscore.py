"""PickScore v1 (Kirstain et al. 2023, "Pick-a-Pic", arXiv:2305.01569): a CLIP model tuned on user choices.

The model is a transformers CLIPModel with its CLIPProcessor, from a folder or from the hub. Importing this
module does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data.hub import is_hub_id
from scoring.scorers.cosine import CosineScorer
from scoring.scorers.images import Images
from scoring.scorers.model import compute_dtype
from scoring.scorers.registry import ScorerSource
from scoring.scorers.scorer import ScorerInfo
from scoring.scorers.sources import check_hub, contents_digest, fingerprint, local_copy
from scoring.scorers.transformers_clip import (
    CONFIG,
    PROCESSOR_FILES,
    check_folder,
    fetch,
    has_processor,
    load_model,
    processed,
    processor_files,
    projected,
    weight_files,
)

if TYPE_CHECKING:
    import torch

NAME, VERSION = "pickscore", "v1"
PREPROCESSING = "transformers-clip-processor"
DEFAULT_SOURCE = "yuvalkirstain/PickScore_v1"
DEFAULT_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose processor is used when the weights come without one: the model that PickScore v1 was tuned from."""


class PickScore(CosineScorer):
    """score = exp(logit_scale) cos(image, text), unit "logit"; comparable between images of one prompt only.

    The preference probability of two images of a prompt is the softmax of their two scores (section 3 of the paper).
    Any folder in this format is a scorer, also one that a user trained: `pickscore?source=/models/mine`.
    """

    def __init__(
        self,
        source: str | None = None,
        device: str = "cpu",
        revision: str | None = None,
        batch_size: int = 64,
    ) -> None:
        """`source`: folder or hub id; None = the published weights. `batch_size`: see `ModelScorer`.

        Raises ValueError for a folder without the needed files.
        """
        super().__init__(device, batch_size)
        self.check(bound := ScorerSource(source, revision=revision))
        found = fetch(bound.source or DEFAULT_SOURCE, revision, NAME)
        self._folder = self._processor_folder = found.folder
        if not has_processor(found.folder):
            self._processor_folder = local_copy(DEFAULT_PROCESSOR, None, PROCESSOR_FILES, NAME).folder
        files = [*weight_files(found.folder, NAME), *processor_files(self._processor_folder)]
        facts = {"preprocessing": PREPROCESSING, "dtype": compute_dtype(device)}
        self.info = ScorerInfo(
            NAME, VERSION, "logit", source=found.origin, revision=found.revision,
            fingerprint=fingerprint(files, name=NAME, version=VERSION, **facts),
            weights=contents_digest(weight_files(found.folder, NAME)), preprocessing=PREPROCESSING,
            licence="code MIT", preference_scale=1.0,
        )  # fmt: skip

    def _load_model(self) -> torch.nn.Module:
        from transformers import CLIPProcessor

        self._processor: Any = CLIPProcessor.from_pretrained(self._processor_folder, local_files_only=True)
        return load_model(self._folder)

    @staticmethod
    def check(source: ScorerSource) -> None:
        """Raises ValueError when the source cannot hold PickScore weights; loads nothing."""
        if source.variant not in (None, VERSION):
            raise ValueError(f"scorer {NAME!r}: unknown variant {source.variant!r}, not {VERSION}")
        where = source.source or DEFAULT_SOURCE
        if is_hub_id(where):
            return check_hub(where, source.revision, [CONFIG], NAME)
        check_folder(where, NAME)

    def _image_features(self, images: Images) -> torch.Tensor:
        pixels = processed(self._processor.image_processor, images).to(self._device)
        with self._autocast():
            return projected(self._model.get_image_features(pixel_values=pixels))

    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._processor.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self._device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        with self._autocast():
            return projected(self._model.get_text_features(input_ids=ids, attention_mask=mask))

    def _scale(self) -> torch.Tensor:
        scale: torch.Tensor = self._model.logit_scale.float().exp()
        return scale
