"""Whether preference shards fit a base model: read from configurations, before any weight is loaded."""

from typing import Any

from training.loop.dataset import PreferencePairs
from training.model.families import family_for
from training.model.family import TIME_IDS, picture_scale
from training.model.flow_models import PATCH
from training.model.reference import ModelError, ModelRef, read_config


def check_fit(pairs: PreferencePairs, ref: ModelRef, source: str) -> None:
    """Raises ModelError when latents or embeddings have another width than the model's. source: of the pairs."""
    family = family_for(ref)
    config = read_config(ref, family.network)
    found = {
        "latent channels": (pairs.latent_shape[0], int(read_config(ref, "vae")["latent_channels"])),
        "embedding width": (pairs.embedding_shape[-1], _text_width(config)),
        "pooled width": (pairs.pooled_width, _pooled_width(config) if family.pooled else None),
    }
    wrong = [f"{what} {theirs}, the model's {ours}" for what, (theirs, ours) in found.items() if theirs != ours]
    if wrong:
        raise ModelError(
            f"pairs={source!r} do not fit base_model={ref.base!r}: {'; '.join(wrong)}. Give the base model that they "
            "were made for, or pairs of this one"
        )


def _text_width(config: dict[str, Any]) -> int:
    """Of the embeddings that a network attends to."""
    width = config.get("joint_attention_dim") or config["cross_attention_dim"]
    return int(width[0] if isinstance(width, list) else width)


def _pooled_width(config: dict[str, Any]) -> int:
    """Of the pooled embedding; SDXL's input is that and the embedded time ids one after another."""
    if "pooled_projection_dim" in config:
        return int(config["pooled_projection_dim"])
    return int(config["projection_class_embeddings_input_dim"]) - TIME_IDS * int(config["addition_time_embed_dim"])


def picture_size(ref: ModelRef, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels; 0 = the model's own. Raises ModelError for what is no whole number of latents."""
    family, scale = family_for(ref), picture_scale(ref)
    own = read_config(ref, family.network).get("sample_size") or 128  # Flux names none; its pipeline has 128
    own_height, own_width = own if isinstance(own, list) else (own, own)
    size = (height or own_height * scale, width or own_width * scale)
    unit = scale * PATCH if family.flow else scale
    if any(side % unit for side in size):
        raise ModelError(
            f"generation.height={size[0]}, generation.width={size[1]}: base_model={ref.base!r} takes multiples of "
            f"{unit}"
        )
    return size
