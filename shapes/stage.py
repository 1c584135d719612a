"""What all training stages share: where files lie, the learning-rate schedule, atomic saving, seeds.

Knows nothing of any model. Every stage counts in steps, never in seconds, so that a rerun repeats it.
"""

import json
import os
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

PACKAGE = Path(__file__).resolve().parent
MODELS = PACKAGE / "models"
PROMPTS = PACKAGE / "prompts"
BUILD = Path(os.environ.get("SHAPES_BUILD", PACKAGE.parent / "build" / "shapes"))


def begin(seed: int, threads: int | None = None) -> Random:
    """Seeds torch, sets its threads (SHAPES_THREADS, default 1: tiny tensors gain nothing), makes BUILD."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads or int(os.environ.get("SHAPES_THREADS", "1")))
    BUILD.mkdir(parents=True, exist_ok=True)
    return Random(seed)


def flat_then_linear(step: int, steps: int, warmup: int = 50, flat: float = 0.5) -> float:
    """Learning-rate factor in (0, 1]: linear warm-up, flat until `flat`, then linear to zero."""
    rising = min(1.0, (step + 1) / warmup)
    falling = (steps - step) / (steps * (1 - flat))
    return max(min(rising, falling), 1e-3)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Writes the learning rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_tensors(tensors: dict[str, torch.Tensor], name: str) -> Path:
    """Writes BUILD/name beside its place and renames it: a visible file is a complete one."""
    path = BUILD / name
    beside = path.with_name(path.name + f".{os.getpid()}.tmp")
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, beside)
    beside.replace(path)
    return path


def load_tensors(name: str) -> dict[str, torch.Tensor]:
    """Reads what `save_tensors` wrote."""
    return load_file(BUILD / name)


def done(name: str) -> bool:
    """Whether the stage that ends by writing BUILD/name has finished."""
    return (BUILD / name).is_file()


def declare_float32(settings: Path) -> None:
    """Makes transformers load half-precision weights as float32: small on disk, but a CPU needs floats."""
    config = json.loads(settings.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    settings.write_text(json.dumps(config, indent=2) + "\n")


def average(shadow: dict[str, torch.Tensor], model: torch.nn.Module, step: int, limit: float = 0.998) -> None:
    """Exponential moving average of the weights, in place; short memory in the first steps."""
    decay = min(limit, (1 + step) / (10 + step))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            shadow[key].lerp_(value, 1 - decay)
        else:
            shadow[key].copy_(value)
