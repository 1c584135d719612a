"""What a cycle will do, resolved completely."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from data.prompts import Prompts
from scoring.labels.expressions import Expression, leaves, parse
from scoring.scorers.registry import ScorerSource
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.workspace import Cycle, Part

log = logging.getLogger(__name__)


class Plan(BaseModel):
    """Everything that decides a cycle's result.

    cycle_seed: all seeds of the cycle derive from it. start: the model the cycle starts from, its paths relative
    to the experiment; start_label: the same as the shards name it. labellers: fingerprints and weights of the
    scorers whose labels are in it already. base_digest: of the base model's files. prompts: how many in each part.
    code: versions, for the record only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    cycle: int
    cycle_seed: int
    champion: int | None
    start: dict[str, Any]
    start_label: str
    labellers: list[str]
    base_digest: str
    recipe: Recipe
    prompts: dict[str, int]
    code: dict[str, str]

    def sources(self) -> dict[str, ScorerSource]:
        return self.recipe.sources()

    def labelling(self) -> Expression:
        """What labels the pairs."""
        return parse(self.recipe.scorer)

    def scorer_names(self, part: Part) -> list[str]:
        """Who scores a part: the labelling scorers first; the training part's judges only on request."""
        recipe = self.recipe
        judges = recipe.judges if part != "training" or recipe.pairing.score_with_judges else []
        wanted = [*([recipe.scorer] if part == "training" else []), *judges]
        return list(dict.fromkeys(leaf for text in wanted for leaf in leaves(parse(text))))

    def images_per_prompt(self, part: Part) -> int:
        return self.recipe.generation.candidates if part == "training" else 1

    def prompts_per_shard(self, part: Part) -> int:
        return max(1, self.recipe.execution.images_per_shard // self.images_per_prompt(part))

    def shards(self, part: Part) -> int:
        side = "training" if part == "training" else "evaluation"
        return -(-self.prompts[side] // self.prompts_per_shard(part))

    def config_hash(self) -> str:
        """Identity of how the pictures were drawn; part of every candidate's and pair's id."""
        identity = {"start": self.start_label, "generation": self.recipe.generation.model_dump()}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def source_cycle(recipe: Recipe) -> Cycle:
    """The cycle whose candidates are to be labelled anew."""
    return Cycle(Path(str(recipe.candidates_of)).expanduser().resolve())


def source_plan(recipe: Recipe, start_label: str | None = None) -> Plan | None:
    """The plan of the cycle whose candidates are to be used, None when they are to be drawn.

    start_label: the model that this cycle starts from, where it is known. Raises ParameterError when the candidates
    are not there or would not fit.
    """
    if recipe.candidates_of is None:
        return None
    source, what = source_cycle(recipe), f"candidates_of={recipe.candidates_of!r}"
    if not source.plan.is_file():
        raise ParameterError(f"{what}: there is no cycle ({source.plan} is missing)")
    plan = read_plan(source)
    old = plan.recipe
    for name, theirs, ours in [
        ("base_model", old.base_model, recipe.base_model),
        ("generation", old.generation, recipe.generation),
        ("execution.images_per_shard", old.execution.images_per_shard, recipe.execution.images_per_shard),
        ("the model that drew them", plan.start_label, start_label or plan.start_label),
    ]:
        if theirs != ours:
            raise ParameterError(f"{what}: {name} was {theirs}, here it is {ours}; it must be the same")
    where, shards = source.part("training", plan.shards("training")), range(plan.shards("training"))
    needed = [path(index) for index in shards for path in (where.candidates, where.embeddings)]
    if missing := [path for path in needed if not path.is_file()]:
        raise ParameterError(f"{what}: {missing[0]} is missing; finish that cycle's generation first")
    return plan


def read_plan(cycle: Cycle) -> Plan:
    return Plan.model_validate_json(cycle.plan.read_text())


def read_drawn_prompts(cycle: Cycle, part: Part) -> list[tuple[str, str]]:
    """(prompt id, text) of a part, in the order of its shards."""
    side = "training" if part == "training" else "evaluation"
    drawn = cast(dict[str, Prompts], json.loads(cycle.prompts.read_text()))
    return sorted(drawn[side].items())
