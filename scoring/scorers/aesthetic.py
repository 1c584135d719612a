"""LAION's aesthetic predictors: how much people would like a picture, whatever it was meant to show.

Heads on the image embedding of OpenAI's CLIP ViT-L/14. v2: github.com/christophschuhmann/improved-aesthetic-predictor
(Apache-2.0), simple_inference.py. v1: github.com/LAION-AI/aesthetic-predictor (MIT), its notebook. Importing this
module does not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import file_sha256
from data.hub import is_hub_id
from scoring.scorers.checkpoints import load_weights
from scoring.scorers.images import Images
from scoring.scorers.model import ModelScorer, compute_dtype
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
from scoring.scorers.transformers_clip import (
    CONFIG,
    IMAGE_PROCESSOR,
    check_folder,
    fetch,
    load_model,
    processed,
    processor_files,
    projected,
    weight_files,
)

if TYPE_CHECKING:
    import torch

NAME, DEFAULT_VARIANT, DEFAULT_BACKBONE = "aesthetic", "v2", "openai/clip-vit-large-patch14"
PREPROCESSING = "transformers-clip-processor"


@dataclass(frozen=True)
class Head:
    """A published head: linear layers one after the other, with nothing between them when it is used."""

    file: str
    """Name under which it was published, without the suffix .pth."""
    layers: tuple[str, ...]
    """What the names of the layers' weights begin with, in their order."""
    url: str
    licence: str
    default: str | None = None
    """Hub id of a copy. None = no copy on the hub is known well enough."""
    digest: str = ""
    """sha256 of the published file."""


HEADS = {
    # The gaps in the numbers are dropout. The digest is the one that several public programs check.
    "v2": Head(
        "sac+logos+ava1-l14-linearMSE",
        ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."),
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth",
        "Apache-2.0",
        "camenduru/improved-aesthetic-predictor",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "v1": Head(
        "sa_0_4_vit_l_14_linear",
        ("",),
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        "MIT",
    ),
}


class Aesthetic(ModelScorer):
    """score = head(image embedding of length 1), unit "points", about 1 to 10 (no bound); the prompt is ignored.

    v1 was fitted to ratings of generated pictures, v2 to those and to ratings of logos and photographs; their
    points are not comparable.
    """

    def __init__(
        self,
        source: str | None = None,
        device: str = "cpu",
        revision: str | None = None,
        variant: str | None = None,
        backbone: str | None = None,
        backbone_revision: str | None = None,
        batch_size: int = 64,
    ) -> None:
        """`variant`: "v2" (None) or "v1". `source`: folder or hub id with the head under its published name, as
        .pth or converted to .safetensors; None = for v2 a copy on the hub whose sha256 is checked, v1 has none.
        `backbone`, `backbone_revision`: folder or hub id, and commit, of the CLIP model in the transformers
        format; None = OpenAI's, the one that the heads were fitted to.
        Raises ValueError for a folder without the needed files, ScoringError for a copy that is not the original.
        """
        super().__init__(device, batch_size)
        self.check(given := ScorerSource(source, None, revision, variant, options={"backbone": backbone}))
        version = variant or DEFAULT_VARIANT
        found = _head_folder(given)
        self._head = first_file(found.folder, _names(HEADS[version]), NAME)
        self._layers = HEADS[version].layers
        if source is None:
            _check_digest(self._head, HEADS[version].digest)
        base = fetch(backbone or DEFAULT_BACKBONE, backbone_revision, NAME)
        self._backbone = base.folder
        weights = [self._head, *weight_files(base.folder, NAME)]
        facts = {"preprocessing": PREPROCESSING, "dtype": compute_dtype(device)}
        files = [*weights, *processor_files(base.folder, IMAGE_PROCESSOR)]
        self.info = ScorerInfo(
            NAME, version, "points", source=f"{found.origin} on {base.origin}", revision=found.revision,
            fingerprint=fingerprint(files, name=NAME, version=version, **facts), weights=contents_digest(weights),
            preprocessing=PREPROCESSING, licence=HEADS[version].licence, needs_prompt=False,
        )  # fmt: skip

    @staticmethod
    def check(source: ScorerSource) -> None:
        """Raises ValueError when the sources cannot hold a head and a backbone; loads nothing."""
        variant = source.variant or DEFAULT_VARIANT
        if variant not in HEADS:
            raise ValueError(f"scorer {NAME!r}: unknown variant {variant!r}, not {' or '.join(HEADS)}")
        where = source.source or HEADS[variant].default
        if where is None:
            raise ValueError(
                f"scorer {NAME!r}: {variant} needs a source, a folder that holds {HEADS[variant].file}.pth "
                f"from {HEADS[variant].url}"
            )
        if is_hub_id(where):
            check_hub(where, source.revision, _names(HEADS[variant]), NAME)
        else:
            first_file(existing_folder(where, NAME), _names(HEADS[variant]), NAME)
        backbone = source.options.get("backbone") or DEFAULT_BACKBONE
        if is_hub_id(backbone):
            return check_hub(backbone, source.options.get("backbone_revision"), [CONFIG], NAME)
        first_file(check_folder(backbone, NAME), IMAGE_PROCESSOR, NAME)

    def _load_model(self) -> torch.nn.Module:
        import torch
        from transformers import CLIPImageProcessor

        self._processor: Any = CLIPImageProcessor.from_pretrained(self._backbone, local_files_only=True)
        clip: Any = load_model(self._backbone)
        clip.text_model = clip.text_projection = None  # a third of the memory, and never asked
        head = build_head(load_weights(self._head), self._layers, clip.config.projection_dim, str(self._head))
        return torch.nn.ModuleDict({"clip": clip, "head": head})

    def _score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        import torch

        features = torch.nn.functional.normalize(self._chunks(self._image_features, images).float(), dim=-1)
        scores: torch.Tensor = self._model["head"](features).squeeze(-1)
        return scores

    def _image_features(self, images: Images) -> torch.Tensor:
        pixels = processed(self._processor, images).to(self._device)
        with self._autocast():
            return projected(self._model["clip"].get_image_features(pixel_values=pixels))


def build_head(
    state: Mapping[str, torch.Tensor], layers: Sequence[str], width: int, origin: str
) -> torch.nn.Sequential:
    """Linear layers with exactly these weights, from embeddings of `width` to one number, in float32.

    Raises ScoringError, naming `origin`, when there are other names, or the sizes do not follow one another.
    """
    import torch

    expected = [prefix + kind for prefix in layers for kind in ("weight", "bias")]
    if sorted(state) != sorted(expected):
        raise ScoringError(f"{origin}: holds {', '.join(sorted(state))} instead of {', '.join(expected)}")
    head = torch.nn.Sequential()
    for prefix in layers:
        weight, bias = state[prefix + "weight"], state[prefix + "bias"]
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ScoringError(f"{origin}: {prefix}weight has shape {tuple(weight.shape)} after a layer of {width}")
        head.append(torch.nn.Linear(width, width := len(weight)))
        head[-1].load_state_dict({"weight": weight, "bias": bias})
    if width != 1:
        raise ScoringError(f"{origin}: ends in {width} numbers instead of one")
    return head


def _names(head: Head) -> tuple[str, str]:
    return f"{head.file}.safetensors", f"{head.file}.pth"


def _head_folder(source: ScorerSource) -> Snapshot:
    """The files of the head, see `local_copy`."""
    head = HEADS[source.variant or DEFAULT_VARIANT]
    return local_copy(source.source or str(head.default), source.revision, _names(head), NAME)


def _check_digest(path: Path, expected: str) -> None:
    """Raises ScoringError unless a file is the published one: who owns the copy is not who made the head."""
    found = file_sha256(path)
    if found != expected:
        raise ScoringError(f"{path}: is not the published head, its sha256 is {found} instead of {expected}")
