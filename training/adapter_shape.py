"""What a LoRA file is made of, read from its header: rank, alpha, and the layers that it trains. Loads no weights."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.lora_layers import CONFIG, name_of
from training.models import ModelError

if TYPE_CHECKING:
    from training.policy import Lora


@dataclass(frozen=True)
class AdapterShape:
    """ranks: of its layers. alpha: as the file tells it, else the rank, as diffusers takes it then. layers: names in
    the network. dora: with magnitudes."""

    ranks: frozenset[int]
    alpha: float
    layers: frozenset[str]
    dora: bool

    @classmethod
    def read(cls, file: Path, part: str) -> "AdapterShape":
        """part: the network's name in its pipeline. Raises ModelError for a file without a LoRA of it."""
        from safetensors import safe_open

        with safe_open(file, "pt") as content:
            told = json.loads((content.metadata() or {}).get(CONFIG, "{}"))
            named = {key: name_of(key) for key in content.keys()}  # noqa: SIM118 not a mapping
            own = {key: name for key, name in named.items() if name is not None and name.part == part}
            ranks = {content.get_slice(key).get_shape()[0] for key, name in own.items() if name.role == "down"}
        if not ranks:
            raise ModelError(f"adapter {file}: no tensor of it is a LoRA's of the {part}, so it trains nothing")
        alpha = float(told.get(f"{part}.lora_alpha", max(ranks)))
        layers = frozenset(name.layer for name in own.values())
        return cls(frozenset(ranks), alpha, layers, any(name.role == "magnitude" for name in own.values()))

    def endings(self) -> list[str]:
        """Of its layers' names, as `training.lora_targets` has them."""
        return sorted({_ending(layer) for layer in self.layers})


def check_adapter(file: Path, part: str, lora: "Lora", modules: Iterable[str], what: str) -> None:
    """Refuse to go on training an adapter as one of another shape.

    modules: the names of all modules of the network, which say what the targets mean. what: how the adapter is called
    in the message. Raises ModelError that says what the adapter has.
    """
    found = AdapterShape.read(file, part)
    if (found.ranks, found.alpha, found.dora) != ({lora.rank}, float(lora.alpha), lora.dora):
        raise ModelError(
            f"{what} has rank {sorted(found.ranks)} and alpha {found.alpha:g}, but training.lora_rank={lora.rank} and "
            f"training.lora_alpha={lora.alpha:g}; give its own"
            if found.dora == lora.dora
            else f"{what} is {'a' if found.dora else 'no'} DoRA, but training.lora_dora={lora.dora}; give its own"
        )
    wanted = frozenset(layers_of(lora.targets, modules))
    if found.layers != wanted:
        odd = sorted(found.layers ^ wanted)[0]
        raise ModelError(
            f"{what} has {len(found.layers)} layers with names that end in {found.endings()}, but "
            f"training.lora_targets={lora.targets} means {len(wanted)}, differing in {odd!r} among others; give its own"
        )


def layers_of(targets: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The modules that targets mean, by PEFT's rule for a list: the name itself or its end after a dot."""
    return [name for name in modules if any(name == target or name.endswith(f".{target}") for target in targets)]


def _ending(layer: str) -> str:
    """The last part of a name, with the one before where it is only a number: to_q, to_out.0."""
    parts = layer.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
