"""The size of the pictures that a model draws: its own, or one that is asked for and possible."""

from training.model.families import family_for
from training.model.family import picture_scale
from training.model.reference import ModelError, ModelRef, read_config


def picture_size(ref: ModelRef, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels; 0 = the model's own. Raises ModelError for what is no whole number of latents."""
    family, scale = family_for(ref), picture_scale(ref)
    own = read_config(ref, family.network).get("sample_size") or family.sample_size
    own_height, own_width = own if isinstance(own, list) else (own, own)
    size, unit = (height or own_height * scale, width or own_width * scale), scale * family.patch
    if any(side % unit for side in size):
        raise ModelError(
            f"generation.height={size[0]}, generation.width={size[1]}: base_model={ref.base!r} takes multiples of "
            f"{unit}"
        )
    return size
