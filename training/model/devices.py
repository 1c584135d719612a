"""Devices and precisions by name, and the way from main memory to a device."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

import torch


def resolve_device(device: str) -> str:
    """'auto' is the first CUDA device where there is one, else the CPU; anything else is taken as it is."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> "torch.dtype":
    """'auto' is float16 on CUDA and float32 elsewhere (CPUs have no fast half precision)."""
    import torch

    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def to_device(each: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: only a copy from pinned memory does not wait for what is queued before."""
    if device.type == "cuda" and each.device.type == "cpu":
        return each.pin_memory().to(device, non_blocking=True)
    return each.to(device)
