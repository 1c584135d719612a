"""The rows of `bench.losses`: how each model comes to be, with what numbers, and the grid they were chosen from."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bench.loss_table import CONTROL, RECIPE, RECIPE_CONTROL

RANDOM = "bench.random_labels:RandomLabels"
CYCLES = 3


@dataclass(frozen=True)
class Arm:
    """A row of the table: how its model comes to be.

    kind: "base" is the base with other noise; "train" trains once on the pairs of the first cycle; "gated" and
    "ungated" are CYCLES cycles of the default recipe, with and without the gate. scorer: who labels, None = the
    recipe's own. training: what differs from the recipe.
    """

    kind: Literal["base", "train", "gated", "ungated"] = "train"
    training: dict[str, Any] = field(default_factory=dict)
    scorer: str | None = None

    def key(self) -> str:
        """Changes with whatever decides the model."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


NUMBERS: dict[str, Any] = {"learning_rate": 2e-4, "beta": 500, "schedule": "constant"}
"""What the losses are compared with. The recipe's own, which were chosen for DPO afterwards, are rows by themselves."""


def arm(loss: str, **changes: Any) -> Arm:
    return Arm(training={**NUMBERS, "loss": loss, **changes})


# Chosen on tuning prompts under seed 7 from GRID, by the oracle's win rate; bench/README.md has what each gave.
ARMS = {
    "base": Arm("base"),
    "sft": arm("sft", learning_rate=6e-4),
    "dpo": arm("dpo"),
    "ipo": arm("ipo", beta=50),
    "kto": arm("kto", beta=50),
    "mapo": arm("mapo", learning_rate=6e-4),
    "dco": arm("dco", learning_rate=6e-4),
    "sdpo": arm("sdpo"),
    "soft-labels": arm("dpo", soft_labels=True),
    CONTROL: Arm(training=arm("dpo").training, scorer=RANDOM),
    RECIPE: Arm(),
    RECIPE_CONTROL: Arm(scorer=RANDOM),
    "3-cycles": Arm("gated"),
    "3-cycles-ungated": Arm("ungated"),
}
RATE, BETA = NUMBERS["learning_rate"], NUMBERS["beta"]
POINTS = {
    "dpo": [(RATE, BETA)],
    "soft-labels": [(RATE, BETA)],
    "ipo": [(RATE, BETA), (RATE, 50)],
    "kto": [(RATE, BETA), (6e-4, BETA), (RATE, 50)],
    "mapo": [(RATE, BETA), (6e-4, BETA)],
    "dco": [(RATE, BETA), (6e-4, BETA)],
    "sft": [(RATE, BETA), (6e-4, BETA)],
}
GRID = {
    f"{name} lr={rate:g} beta={beta:g}": Arm(training={**ARMS[name].training, "learning_rate": rate, "beta": beta})
    for name, points in POINTS.items()
    for rate, beta in points
}

# What the recipe's own numbers were chosen from, under three seeds on all tuning prompts.
RECIPE_GRID = {
    "base": Arm("base"),
    "dpo": arm("dpo"),
    "dpo lr=0.0001": arm("dpo", learning_rate=1e-4),
    "dpo beta=2000": arm("dpo", beta=2000),
    "dpo cosine": arm("dpo", schedule="cosine"),
    "dpo cosine lr=0.0001": arm("dpo", schedule="cosine", learning_rate=1e-4),
    "dpo cosine beta=1000": arm("dpo", schedule="cosine", beta=1000),
    "dpo cosine beta=2000": arm("dpo", schedule="cosine", beta=2000),
    "dpo cosine smoothing=0.1": arm("dpo", schedule="cosine", label_smoothing=0.1),
    "ipo beta=50": arm("ipo", beta=50),
    "ipo cosine beta=50": arm("ipo", beta=50, schedule="cosine"),
}
