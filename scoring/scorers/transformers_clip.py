"""CLIP-like models in the transformers format: their files, loading them safely, and their two preprocessings.

Knows nothing of what is made of the embeddings. Importing this module does not load torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.hub import is_hub_id
from scoring.scorers.images import Images, is_tensor
from scoring.scorers.scorer import ScoringError
from scoring.scorers.sources import Snapshot, existing_folder, first_file, local_copy

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
# Ordered: what comes first is what transformers would take.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SAFE_PATTERNS, PICKLE_PATTERNS = ("*.json", "*.txt", "*.model", "model*.safetensors"), ("pytorch_model*.bin",)
IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
PROCESSOR_FILES = (
    *IMAGE_PROCESSOR,
    *TOKENIZER,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def fetch(where: str, revision: str | None, scorer: str) -> Snapshot:
    """The files of a folder or a hub id; pickles only where there is nothing safer. Raises as `local_copy`."""
    found = local_copy(where, revision, SAFE_PATTERNS, scorer)
    if is_hub_id(where) and not any(found.folder.glob("model*.safetensors")):
        return local_copy(where, found.revision, (*SAFE_PATTERNS, *PICKLE_PATTERNS), scorer)
    return found


def check_folder(where: str, scorer: str) -> Path:
    """The folder, if it holds a configuration and weights. Raises ValueError, naming the scorer, if not."""
    folder = existing_folder(where, scorer)
    first_file(folder, [CONFIG], scorer)
    first_file(folder, WEIGHTS, scorer)
    return folder


def model_type(folder: Path) -> str:
    """The architecture that the configuration names, for example "clip"; "" when it names none."""
    return str(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type", ""))


def weight_files(folder: Path, scorer: str) -> list[Path]:
    """The configuration and every file of the weights that are loaded, all parts of a split checkpoint."""
    kind = first_file(folder, WEIGHTS, scorer).name
    pattern = "model*.safetensors*" if "safetensors" in kind else "pytorch_model*.bin*"
    return [folder / CONFIG, *folder.glob(pattern)]


def processor_files(folder: Path, names: Sequence[str] = PROCESSOR_FILES) -> list[Path]:
    """Which files of image processor and tokenizer a folder has."""
    return [folder / name for name in names if (folder / name).is_file()]


def has_processor(folder: Path) -> bool:
    """Whether a folder has an image processor and a tokenizer."""
    return bool(processor_files(folder, IMAGE_PROCESSOR)) and bool(processor_files(folder, TOKENIZER))


def load_model(folder: Path, kind: str = "CLIPModel") -> torch.nn.Module:
    """The model of a transformers class in float32.

    Raises ScoringError for weights that are damaged, unsafe or incomplete.
    """
    import pickle

    import torch
    import transformers
    from safetensors import SafetensorError

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    try:
        model, report = getattr(transformers, kind).from_pretrained(folder, **options)
    except pickle.UnpicklingError as error:
        raise ScoringError(f"{folder}: the weights are a pickle of more than tensors: {error}") from error
    except SafetensorError as error:
        raise ScoringError(f"{folder}: the weights do not load: {error}") from error
    # transformers fills what a checkpoint lacks with random numbers, and what comes out looks like scores.
    if missing := sorted(report["missing_keys"]):
        raise ScoringError(f"{folder}: {len(missing)} tensors of a {kind} are missing, first {missing[0]}")
    return model


def image_inputs(processor: Any, images: Images) -> dict[str, torch.Tensor]:
    """What a transformers image processor makes of images, on the CPU: "pixel_values" in float32 and what else.

    On the CPU, because there the resize of uint8 pictures rounds as the processor of the training did; on a GPU
    it would be one level off in every tenth pixel.
    """
    if is_tensor(images):
        tensors: Any = images
        return dict(processor(tensors.cpu(), return_tensors="pt", input_data_format="channels_first"))
    # Arrays out of a memory map are read-only, which torch warns about; the channel axis of a 3 x 3 image
    # is ambiguous unless it is said.
    arrays = [np.require(image, requirements=["C", "W"]) for image in images]
    return dict(processor(arrays, return_tensors="pt", input_data_format="channels_last"))


def processed(processor: Any, images: Images) -> torch.Tensor:
    """The pixels of `image_inputs`: (n, 3, height, width) in float32 on the CPU."""
    return image_inputs(processor, images)["pixel_values"]


def projected(output: Any) -> torch.Tensor:
    """The projected embedding; transformers 5 wraps what transformers 4 returned as it is."""
    import torch

    return output if isinstance(output, torch.Tensor) else output.pooler_output
