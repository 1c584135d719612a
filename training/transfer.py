"""From main memory to the device."""

import torch


def to_device(each: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: only a copy from pinned memory does not wait for what is queued before."""
    if device.type == "cuda" and each.device.type == "cpu":
        return each.pin_memory().to(device, non_blocking=True)
    return each.to(device)
