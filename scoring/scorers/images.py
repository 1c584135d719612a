"""What a scorer is given: pictures as uint8, and the checks that they are such.

Two forms are accepted everywhere: a sequence of arrays (height, width, 3) of any sizes, or one tensor
(n, 3, height, width) on any device. Both hold what an image file holds, so a score from memory is the score of
the stored file. Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

if TYPE_CHECKING:
    import torch


Images: TypeAlias = Union[Sequence[np.ndarray], "torch.Tensor"]


def is_tensor(images: object) -> bool:
    """Whether images are a torch tensor; does not load torch to find out."""
    return type(images).__module__.partition(".")[0] == "torch"


def check_inputs(images: Images, prompts: Sequence[str]) -> None:
    """Raises ValueError unless there is one str of a prompt for each picture of uint8 RGB."""
    if isinstance(prompts, str) or len(images) != len(prompts):
        count = "one string" if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"need one prompt an image, got {len(images)} images and {count} prompts")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index} must be a str, got {type(prompt).__name__}")
    if is_tensor(images):
        return _check_tensor(images)
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not _is_rgb(image.shape):
            found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image {index} must be a uint8 array (height, width, 3), got {found}")


def _check_tensor(images: Any) -> None:
    shape = tuple(images.shape)
    if str(images.dtype) != "torch.uint8" or len(shape) != 4 or shape[1] != 3 or 0 in shape[1:]:
        raise ValueError(
            f"images must be a uint8 tensor (n, 3, height, width), got {images.dtype} {shape}; "
            "of values in [0, 1] it is (255 * x).round().clamp(0, 255).to(torch.uint8)"
        )


def _is_rgb(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 0 and shape[2] == 3


def as_arrays(images: Images) -> list[np.ndarray]:
    """The pictures as arrays (height, width, 3); those of a tensor are views of its copy on the CPU."""
    if not is_tensor(images):
        return list(images)
    tensor: Any = images
    return list(tensor.permute(0, 2, 3, 1).cpu().numpy())


def by_size(images: Images) -> list[tuple[list[int], torch.Tensor]]:
    """(rows, uint8 (len(rows), 3, height, width)) for each size that occurs, on the device they are on."""
    import torch

    if isinstance(images, torch.Tensor):
        return [(list(range(len(images))), images)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    return [
        (rows, torch.from_numpy(np.stack([images[row] for row in rows])).permute(0, 3, 1, 2))
        for rows in groups.values()
    ]
