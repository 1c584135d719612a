"""CLIP score: how well an image fits a prompt, as the cosine of a CLIP-like model.

The measure of Hessel et al. 2021, "CLIPScore", arXiv:2104.08718, without its decorations: the paper (section 3)
has 2.5 * max(cos, 0) and the prefix "A photo depicts" before the text. Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.hub import is_hub_id
from scoring.scorers.clip_encoders import (
    ARCHITECTURES,
    OPEN_CONFIG,
    OPEN_SAFE,
    OPEN_WEIGHTS,
    Encoder,
    OpenCLIPEncoder,
    TransformersEncoder,
)
from scoring.scorers.cosine import CosineScorer
from scoring.scorers.images import Images
from scoring.scorers.model import compute_dtype
from scoring.scorers.registry import ScorerSource
from scoring.scorers.scorer import ScorerInfo
from scoring.scorers.sources import Snapshot, check_hub, contents_digest, existing_folder, fingerprint, local_copy
from scoring.scorers.transformers_clip import CONFIG, PROCESSOR_FILES, fetch, model_type

if TYPE_CHECKING:
    import torch

NAME, DEFAULT_MODEL = "clip", "openai/clip-vit-large-patch14"
TAGGED = "open_clip/"
BACKENDS = {"transformers": TransformersEncoder, "open_clip": OpenCLIPEncoder}


class CLIPScore(CosineScorer):
    """score = cos(image, text), unit "cosine", in [-1, 1]: not scaled, not clamped, the prompt as it is.

    Scores of different models are not comparable. No CLIP-like model was trained on preferences, so there is no
    preference_scale until one is fitted.
    """

    def __init__(
        self,
        source: str | None = None,
        device: str = "cpu",
        revision: str | None = None,
        variant: str | None = None,
        backend: str | None = None,
        batch_size: int = 64,
    ) -> None:
        """`variant` or `source`: a hub id, a folder, or open_clip/ARCHITECTURE/TAG; None = `DEFAULT_MODEL`.

        A folder or repository holds config.json of a transformers CLIP, SigLIP or SigLIP 2 with weights and
        processor, or open_clip_config.json with open_clip weights. `backend`: "transformers" or "open_clip" where
        both are there; None = transformers first. open_clip/ViT-B-32/laion2b_s34b_b79k is the hub repository
        that open_clip knows under this architecture and tag.
        Raises ValueError for a model that is none of these.
        """
        super().__init__(device, batch_size)
        given = ScorerSource(source, None, revision, variant, options={"backend": backend})
        self.check(given)
        model = _model(given)
        self._encoder, found = _find(model, revision, backend)
        facts = {"preprocessing": self._encoder.preprocessing, "dtype": compute_dtype(device)}
        self.info = ScorerInfo(
            NAME, Path(model).name if Path(model).is_dir() else model, "cosine",
            source=found.origin, revision=found.revision, preprocessing=self._encoder.preprocessing,
            fingerprint=fingerprint(self._encoder.files, name=NAME, **facts),
            weights=contents_digest(self._encoder.weights), lowest=-1.0, highest=1.0,
        )  # fmt: skip

    @staticmethod
    def check(source: ScorerSource) -> None:
        """Raises ValueError when the source cannot hold a model that works; loads nothing."""
        backend = source.options.get("backend")
        if backend not in (None, *BACKENDS):
            raise ValueError(f"scorer {NAME!r}: unknown backend {backend!r}, not {' or '.join(BACKENDS)}")
        if source.source and source.variant:
            raise ValueError(f"scorer {NAME!r}: the model is given twice, {source.source!r} and {source.variant!r}")
        model = _model(source)
        if _is_tagged(model):
            return _check_tagged(model, backend)
        if is_hub_id(model):
            return check_hub(model, source.revision, [CONFIG, OPEN_CONFIG], NAME)
        folder = existing_folder(model, NAME)
        BACKENDS[_backend(folder, backend)](folder, NAME)

    def _load_model(self) -> torch.nn.Module:
        return self._encoder.load()

    def _image_features(self, images: Images) -> torch.Tensor:
        with self._autocast():
            return self._encoder.embed_images(self._model, images, self._device)

    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        with self._autocast():
            return self._encoder.embed_texts(self._model, prompts, self._device)


def _model(source: ScorerSource) -> str:
    return source.variant or source.source or DEFAULT_MODEL


def _find(model: str, revision: str | None, backend: str | None) -> tuple[Encoder, Snapshot]:
    """The encoder of a model and its files on this machine; the settings first, as they say which weights."""
    if _is_tagged(model):
        model, backend = _repository(model), "open_clip"
    found = local_copy(model, revision, ["*.json", *PROCESSOR_FILES], NAME)
    if _backend(found.folder, backend) == "transformers":
        found = fetch(model, found.revision, NAME)
        return TransformersEncoder(found.folder, NAME), found
    if is_hub_id(model):
        found = local_copy(model, found.revision, [OPEN_CONFIG, *OPEN_SAFE, *PROCESSOR_FILES], NAME)
        if not any((found.folder / name).is_file() for name in OPEN_SAFE):
            found = local_copy(model, found.revision, OPEN_WEIGHTS, NAME)
    return OpenCLIPEncoder(found.folder, NAME), found


def _backend(folder: Path, wanted: str | None) -> str:
    """Which backend reads a folder. Raises ValueError, naming what is there, when none does."""
    kind = model_type(folder) if (folder / CONFIG).is_file() else None
    if wanted != "open_clip" and kind in ARCHITECTURES:
        return "transformers"
    if wanted != "transformers" and (folder / OPEN_CONFIG).is_file():
        return "open_clip"
    there = f"has model_type {kind!r}" if kind is not None else f"has no {CONFIG}"
    raise ValueError(
        f"scorer {NAME!r}: {folder} {there}; what works{f' with backend {wanted}' if wanted else ''} is "
        f"a {CONFIG} with model_type {', '.join(ARCHITECTURES)} (backend transformers), "
        f"or an {OPEN_CONFIG} (backend open_clip)"
    )


def _is_tagged(model: str) -> bool:
    return model.startswith(TAGGED) and not Path(model).is_dir()


def _check_tagged(model: str, backend: str | None) -> None:
    if model.count("/") != 2 or not all(model.split("/")) or backend == "transformers":
        raise ValueError(f"scorer {NAME!r}: {model!r} is not of the form open_clip/ARCHITECTURE/TAG, backend open_clip")


def _repository(model: str) -> str:
    """The hub repository behind open_clip/ARCHITECTURE/TAG. Raises ValueError when open_clip knows none."""
    import open_clip

    _, architecture, tag = model.split("/")
    entry = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    if not entry.endswith("/"):  # a name of a file follows, or there is only a URL
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: no such architecture"
        raise ValueError(f"scorer {NAME!r}: open_clip knows no hub repository for {model!r}; tags: {known}")
    return str(entry.rstrip("/"))
