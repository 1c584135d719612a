"""What a LoRA is made of: rank, scale and the layers that get one."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The attention of a UNet or transformer of diffusers."""
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""The attention of CLIP, which is what is trained of a text encoder, as by the LoRA scripts of diffusers."""


@dataclass(frozen=True)
class Lora:
    """rank, alpha: the update is alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

    targets: endings of the names of the layers that get one. dora: also train each output's magnitude (Liu et al. 2024,
    arXiv:2402.09353, eq. 5).
    """

    rank: int
    alpha: float
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    dora: bool = False

    def config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.targets, init_lora_weights="gaussian",
            use_dora=self.dora,
        )  # fmt: skip
