"""Image and text towers of CLIP-like models, each behind its own preprocessing and its own tokenizer.

Two formats: transformers (CLIP, SigLIP, SigLIP 2) and open_clip. Importing this module does not load torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from scoring.scorers.images import Images, as_arrays
from scoring.scorers.scorer import ScoringError
from scoring.scorers.sources import first_file
from scoring.scorers.transformers_clip import (
    IMAGE_PROCESSOR,
    TOKENIZER,
    image_inputs,
    load_model,
    model_type,
    processor_files,
    projected,
    weight_files,
)

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {
    "clip": ("CLIPModel", "CLIPProcessor"),
    "siglip": ("SiglipModel", "SiglipProcessor"),
    "siglip2": ("Siglip2Model", "Siglip2Processor"),
}
"""model_type in config.json -> classes of transformers. SigLIP 2 of one fixed size calls itself "siglip"."""
OPEN_CONFIG = "open_clip_config.json"
OPEN_SAFE = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
OPEN_WEIGHTS = (*OPEN_SAFE, "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
"""In the order in which open_clip itself looks for them."""


class Encoder(Protocol):
    """What CLIPScore needs of a model; embeddings are (n, width) and not normalised."""

    preprocessing: str
    weights: list[Path]
    """The files of the weights."""
    files: list[Path]
    """The weights and all else that determines the embeddings."""

    def load(self) -> torch.nn.Module:
        """Reads processor and weights. Raises ScoringError for weights that are unsafe, damaged or unfit."""
        ...

    def embed_images(self, model: Any, images: Images, device: str) -> torch.Tensor: ...

    def embed_texts(self, model: Any, prompts: Sequence[str], device: str) -> torch.Tensor: ...


class TransformersEncoder:
    """A folder in the transformers format: config.json, model.safetensors, the files of the processor."""

    def __init__(self, folder: Path, scorer: str) -> None:
        """Raises ValueError, naming the scorer, when the folder lacks weights, image processor or tokenizer."""
        self._folder, self._kind = folder, model_type(folder)
        self.preprocessing = f"transformers-{self._kind}-processor"
        self.weights = weight_files(folder, scorer)
        for names in (IMAGE_PROCESSOR, TOKENIZER):
            first_file(folder, names, scorer)
        self.files = [*self.weights, *processor_files(folder)]

    def load(self) -> torch.nn.Module:
        import transformers

        model_class, processor_class = ARCHITECTURES[self._kind]
        processor = getattr(transformers, processor_class)
        self._processor: Any = processor.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        return load_model(self._folder, model_class)

    def embed_images(self, model: Any, images: Images, device: str) -> torch.Tensor:
        inputs = image_inputs(self._processor.image_processor, images)
        return projected(model.get_image_features(**{name: value.to(device) for name, value in inputs.items()}))

    def embed_texts(self, model: Any, prompts: Sequence[str], device: str) -> torch.Tensor:
        length = model.config.text_config.max_position_embeddings
        options: dict[str, Any] = {"truncation": True, "max_length": length, "return_tensors": "pt"}
        if self._kind == "clip":
            tokens = self._processor.tokenizer(list(prompts), padding=True, **options).to(device)
            ids, mask = tokens.input_ids, tokens.attention_mask
            return projected(model.get_text_features(input_ids=ids, attention_mask=mask))
        # SigLIP reads the embedding off the last position of texts that were padded on the right to the full
        # length and not masked. Its training lowered all texts, which not every tokenizer of SigLIP 2 does
        # (big_vision issue 187, transformers issue 43054).
        lowered = [prompt.lower() for prompt in prompts]
        tokens = self._processor.tokenizer(lowered, padding="max_length", padding_side="right", **options)
        return projected(model.get_text_features(input_ids=tokens.input_ids.to(device)))


class OpenCLIPEncoder:
    """A folder in the open_clip format: open_clip_config.json, the weights, and tokenizer files if it names one."""

    preprocessing = "open_clip-transform"

    def __init__(self, folder: Path, scorer: str) -> None:
        """Raises ValueError, naming the scorer, when the folder lacks weights."""
        self._folder = folder
        self.weights = [first_file(folder, OPEN_WEIGHTS, scorer)]
        self.files = [folder / OPEN_CONFIG, *self.weights, *processor_files(folder, TOKENIZER)]

    def load(self) -> torch.nn.Module:
        import open_clip
        from safetensors import SafetensorError

        name = f"local-dir:{self._folder}"
        try:
            self._tokenizer: Any = open_clip.get_tokenizer(name)
            model: Any
            model, self._transform = open_clip.create_model_from_pretrained(name, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ScoringError(f"{self._folder}: the weights are a pickle of more than tensors: {error}") from error
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise ScoringError(f"{self._folder}: the weights do not load: {error}") from error
        loaded: torch.nn.Module = model
        return loaded

    def embed_images(self, model: Any, images: Images, device: str) -> torch.Tensor:
        import torch
        from PIL import Image

        pixels = torch.stack([self._transform(Image.fromarray(image)) for image in as_arrays(images)])
        features: torch.Tensor = model.encode_image(pixels.to(device))
        return features

    def embed_texts(self, model: Any, prompts: Sequence[str], device: str) -> torch.Tensor:
        features: torch.Tensor = model.encode_text(self._tokenizer(list(prompts)).to(device))
        return features
