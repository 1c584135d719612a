"""The network and the tokenizer of ImageReward v1.0: parts of transformers, filled from the published files.

BLIP's image transformer and its text transformer with cross-attention to the image (Li et al. 2022,
arXiv:2201.12086) are those of transformers; the layers after them, and the names of the published tensors, are
those of github.com/THUDM/ImageReward. Importing this module does not load torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.scorers.scorer import ScoringError

if TYPE_CHECKING:
    import torch

TEXT_CONFIG, VISION_CONFIG = "med_config.json", "vision_config.json"
"""Files that override sizes below: the published one of the text side, and one for weights of other image sizes."""
TEXT_SIZES: Mapping[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# A ViT-L/16. The epsilon is timm's, which BLIP was trained with; the default of transformers is another one.
VISION_SIZES: Mapping[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
ADDED_TOKENS = ("[DEC]", "[ENC]")
"""BLIP's additions to BERT's vocabulary; they occur only in prompts that spell them out."""
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_DROPOUTS = (0.2, 0.2, 0.1)
"""Rates of training, after the first three layers; here they only decide how the published layers are numbered."""

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Published tensors without a part in the score: BLIP's heads of contrastive training, and the numbers 0 to 511."""
RENAMES = (
    ("mlp.layers.", "head."),
    ("blip.text_encoder.", "text."),
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


def read_sizes(folder: Path, name: str, published: Mapping[str, Any]) -> dict[str, Any]:
    """The published sizes, replaced by those that a file of the folder gives, where it exists.

    Other entries of the file are of no concern here (dropout rates, for example). Raises ScoringError for a file
    that is no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return dict(published)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ScoringError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ScoringError(f"{path}: must hold an object, got {type(found).__name__}")
    return {key: found.get(key, value) for key, value in published.items()}


def build_model(
    text: Mapping[str, Any], vision: Mapping[str, Any], state: Mapping[str, torch.Tensor], origin: str
) -> torch.nn.ModuleDict:
    """The network in float32, with the parts "vision", "text" and "head".

    `text`, `vision`: as `TEXT_SIZES` and `VISION_SIZES`. `state`: tensors under their published names. Raises
    ScoringError, naming `origin`, when a tensor is missing, is none of the network's, or has another shape: the
    original code ignores that, and scores with random numbers in its place.
    """
    import torch

    with torch.device("meta"):  # random initialisation takes seconds and is thrown away
        model = _empty_model(text, vision)
    try:
        model.load_state_dict(renamed(state), strict=True, assign=True)
    except RuntimeError as error:
        raise ScoringError(f"{origin}: does not fit the architecture: {error}") from error
    # The numbers of the positions are no part of a checkpoint, so they are still without data on the meta device.
    model["text"].embeddings.position_ids = torch.arange(text["max_position_embeddings"])[None]
    return model.float()


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of `build_model` from tensors under their published names, without the unused ones."""
    result = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        for old, new in RENAMES:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def load_tokenizer(path: Path, size: int) -> Any:
    """BERT's lower-casing tokenizer with BLIP's two tokens, from vocab.txt or tokenizer.json.

    `size`: number of rows of the network's embedding. Raises ScoringError for a vocabulary of another size, whose
    ids would mean other words.
    """
    from transformers import BertTokenizer

    vocabulary = _read_vocabulary(path)
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    if len(tokenizer) != size:
        raise ScoringError(
            f"{path}: {len(tokenizer)} tokens with {' and '.join(ADDED_TOKENS)}, but the network was made for {size}; "
            "take the vocabulary of bert-base-uncased"
        )
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Word piece -> id, by line number in vocab.txt."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return {token: index for index, token in enumerate(text.rstrip("\n").split("\n"))}
    try:
        return {str(token): int(index) for token, index in json.loads(text)["model"]["vocab"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScoringError(f"{path}: holds no vocabulary of word pieces: {error!r}") from error


def _empty_model(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    import torch
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    # is_decoder gives the layers their cross-attention; whether tokens see later ones is decided at each call.
    config = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True, bos_token_id=None)
    return torch.nn.ModuleDict(
        {
            "vision": BlipVisionModel(BlipVisionConfig(**vision)),
            "text": BlipTextModel(config, add_pooling_layer=False),
            "head": _head(text["hidden_size"]),
        }
    )


def _head(width: int) -> torch.nn.Module:
    """Linear layers without activations between them, as published: together they are one affine function."""
    import torch

    layers: list[torch.nn.Module] = []
    steps = itertools.pairwise((width, *HEAD_WIDTHS))
    for (inputs, outputs), rate in itertools.zip_longest(steps, HEAD_DROPOUTS):
        layers.append(torch.nn.Linear(inputs, outputs))
        layers += [torch.nn.Dropout(rate)] if rate is not None else []
    return torch.nn.Sequential(*layers)
