"""What a LoRA file is made of, read from its header: rank, alpha, and the layers that it trains. Loads no weights.

And the refusals of an adapter that training could not go on with, or would lose a part of.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.adapter.layers import CONFIG, name_of
from training.model.families import family_for
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef

if TYPE_CHECKING:
    from training.adapter.lora import Lora
from training.adapter.lora import PROJECTIONS


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


def check_text_encoders(method: str, text_encoders: bool, ref: ModelRef) -> None:
    """Raises ModelError for text encoders without LoRA, and for tuned ones to start from that would be left behind.

    ref: what training starts from; of its adapter only the names of the tensors are read.
    """
    if text_encoders and method != "lora":
        raise ModelError(
            f"training.text_encoders=true: not with training.method={method!r}, which trains the network alone; use "
            "method='lora', or text_encoders=false"
        )
    tuned = adapted_encoders(ref.adapter) if ref.adapter else []
    if lost := sorted(set(tuned) - set(family_for(ref).text_encoders)):
        raise ModelError(
            f"the adapter {ref.adapter} also changes {' and '.join(lost)}, which no training here goes on with: that "
            "would be lost; start from another one, or from the base model"
        )
    if tuned and not text_encoders:
        raise ModelError(
            f"training.text_encoders=false with training.method={method!r}, but training starts from the adapter "
            f"{ref.adapter}, which also changes {' and '.join(tuned)}: that would be lost. Use text_encoders=true with "
            "method='lora', or start from the base model (in a cycle: under a new name as experiment)"
        )


def check_encoders(adapter: str, lora: "Lora") -> None:
    """Refuse an adapter whose part for text encoders is not such as is trained here. Raises ModelError."""
    file = Path(adapter) / ADAPTER_FILE
    for part in adapted_encoders(adapter):
        found = AdapterShape.read(file, part)
        own = (found.ranks, found.alpha, found.dora) == ({lora.rank}, float(lora.alpha), False)
        if not own or not set(found.endings()) <= set(PROJECTIONS):
            raise ModelError(
                f"the adapter {adapter} changes {part} with {'DoRA' if found.dora else 'LoRA'} of rank "
                f"{sorted(found.ranks)} and alpha {found.alpha:g} on {found.endings()}, but text encoders are trained "
                f"by LoRA of training.lora_rank={lora.rank} and training.lora_alpha={lora.alpha:g} on {PROJECTIONS}; "
                "start from another one, or from the base model"
            )


def adapted_encoders(adapter: str) -> list[str]:
    """The text encoders that an adapter changes, by their names in the pipeline; none where there is no file."""
    from safetensors import safe_open

    path = Path(adapter) / ADAPTER_FILE
    if not path.is_file():
        return []
    with safe_open(path, framework="pt") as file:
        parts = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 not a mapping
    return sorted(part for part in parts if part.startswith("text_encoder"))


def layers_of(targets: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The modules that targets mean, by PEFT's rule for a list: the name itself or its end after a dot."""
    return [name for name in modules if any(name == target or name.endswith(f".{target}") for target in targets)]


def _ending(layer: str) -> str:
    """The last part of a name, with the one before where it is only a number: to_q, to_out.0."""
    parts = layer.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
