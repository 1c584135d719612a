"""Whether preference shards fit a base model: read from configurations, before any weight is loaded."""

from training.loop.dataset import PreferencePairs
from training.model.families import family_for
from training.model.reference import ModelError, ModelRef, read_config


def check_fit(pairs: PreferencePairs, ref: ModelRef, source: str) -> None:
    """Raises ModelError when latents or embeddings have another width than the model's. source: of the pairs."""
    family = family_for(ref)
    config = read_config(ref, family.network)
    widths = {
        "latent channels": (pairs.latent_shape[0], int(read_config(ref, "vae")["latent_channels"])),
        "embedding width": (pairs.embedding_shape[-1], family.text_width(config)),
        "pooled width": (pairs.pooled_width, family.pooled_width(config)),
    }
    wrong = [f"{name} {theirs}, the model's {ours}" for name, (theirs, ours) in widths.items() if theirs != ours]
    if wrong:
        raise ModelError(
            f"pairs={source!r} do not fit base_model={ref.base!r}: {'; '.join(wrong)}. Give the base model that they "
            "were made for, or pairs of this one"
        )
