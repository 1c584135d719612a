"""Optimizers by name, the learning rate of each step, and the average of the trained weights.

Loads torch and the optimizers' libraries only where one is made: a recipe is checked without them.
"""

import importlib.metadata
import importlib.util
import math
from typing import TYPE_CHECKING

from packaging.version import Version

if TYPE_CHECKING:
    import torch


OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor")


BITSANDBYTES_ON_CPU = "0.50"
"""The first version whose 8-bit optimizer was seen to train on a CPU; earlier ones were for CUDA."""


SCHEDULES = ("constant", "linear", "cosine")


def check_optimizer(name: str, device: str) -> None:
    """Raises ValueError for an optimizer that is not known, not installed, or does not run on the device."""
    if name not in OPTIMIZERS:
        raise ValueError(f"training.optimizer={name!r}: there are {', '.join(OPTIMIZERS)}")
    if name != "adamw-8bit":
        return
    kind = device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        raise ValueError(
            f"training.optimizer='adamw-8bit' runs on cuda and cpu, not {device!r}; use adamw or adafactor"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "training.optimizer='adamw-8bit' needs a package that is not installed: `pip install bitsandbytes`, or use "
            "adafactor, which keeps less state than adamw too"
        )
    version = importlib.metadata.version("bitsandbytes")
    if kind == "cpu" and Version(version) < Version(BITSANDBYTES_ON_CPU):
        raise ValueError(
            f"training.optimizer='adamw-8bit' on a CPU needs bitsandbytes {BITSANDBYTES_ON_CPU} or later, here is "
            f"{version}: `pip install 'bitsandbytes>={BITSANDBYTES_ON_CPU}'`, or use adamw or adafactor"
        )


def make_optimizer(
    name: str, parameters: "list[torch.nn.Parameter]", learning_rate: float, weight_decay: float, fused: bool
) -> "torch.optim.Optimizer":
    """adamw: 8 bytes of state a weight. adamw-8bit: 2, and 8 in tensors of fewer than 4096 weights (bitsandbytes).
    adafactor: 4 / rows + 4 / columns in a matrix (Shazeer & Stern 2018, arXiv:1804.04235).

    Adafactor as SalesforceAIResearch/DiffusionDPO trains SDXL with it: no momentum, the learning rate as given, each
    tensor's update clipped to a root mean square of 1. torch.optim.Adafactor is another one: it multiplies the learning
    rate by the tensor's root mean square (at least 1e-3), which next to stops the half of a LoRA that starts at 0.

    fused: one kernel for all tensors, adamw only. Raises ValueError as `check_optimizer` does.
    """
    import torch

    check_optimizer(name, parameters[0].device.type)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        made: torch.optim.Optimizer = Adafactor(
            parameters, lr=learning_rate, weight_decay=weight_decay, clip_threshold=1.0, scale_parameter=False,
            relative_step=False, warmup_init=False,
        )  # fmt: skip
        return made
    import bitsandbytes

    for parameter in parameters:  # its first step does so, after which a resumed run would round convolutions otherwise
        parameter.data = parameter.data.contiguous()
    small: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    return small


def learning_rate(schedule: str, step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """The rate of one optimizer step, 0 <= step < steps: a pure function, so a resumed run needs no scheduler's state.

    Warm-up: peak * (step + 1) / warmup_steps, so that the last step of it is at the peak. Then with t from 0 at the
    first step after it to 1 at the end of the run: `constant` peak, `linear` peak * (1 - t), `cosine`
    peak * (1 + cos(pi t)) / 2. These are the schedules of diffusers and transformers, except that their warm-up is one
    step later: their first step has rate 0 and changes nothing. Raises ValueError for another schedule.
    """
    check_schedule(schedule)
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # in this order the last one is the peak to the bit
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def check_schedule(schedule: str) -> None:
    """Raises ValueError for a schedule that is not known."""
    if schedule not in SCHEDULES:
        raise ValueError(f"training.schedule={schedule!r}: there are {', '.join(SCHEDULES)}")
