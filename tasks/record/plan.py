"""What a cycle will do, resolved completely, and the cycle's folder together with it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from data.ids import seed_for
from data.prompts import Prompts
from scoring.labels.expressions import Expression
from scoring.scorers.registry import ScorerSource
from tasks.record.recipe import ParameterError, Recipe
from tasks.record.workspace import CandidateSet, CycleFolder, Part, safe_name
from training.model.reference import ModelRef
from training.model.sampling import Sampler
from training.trained import TrainedModel


class Prompt(NamedTuple):
    """A prompt as a cycle draws it: its stable id and its text."""

    id: str
    text: str


class Plan(BaseModel):
    """Everything that decides a cycle's result.

    cycle_seed: all seeds of the cycle derive from it. start: the model the cycle starts from, its paths relative
    to the experiment; start_label: the same as the shards name it. labellers: fingerprints and weights of the
    scorers whose labels are in it already. base_digest: of the base model's files. prompts: how many there are on the
    training and on the evaluation side. code: versions, for the record only.
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
        """What the names of scorers are bound to."""
        return self.recipe.sources()

    def scorer_names(self, part: Part) -> list[str]:
        """Who scores a part: the labelling scorers first; the candidates' judges only on request."""
        recipe = self.recipe
        judges = recipe.judges if part != "candidates" or recipe.pairing.score_with_judges else []
        wanted = [*([recipe.scorer] if part == "candidates" else []), *judges]
        return list(dict.fromkeys(leaf for expression in wanted for leaf in expression.leaves))

    def config_hash(self) -> str:
        """Identity of how the pictures were drawn; part of every candidate's and pair's id."""
        identity = {"start": self.start_label, "generation": self.recipe.generation.model_dump()}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def sampler(self) -> Sampler:
        """How all pictures of the cycle are drawn."""
        generation = self.recipe.generation
        return Sampler(
            scheduler=generation.scheduler, steps=generation.steps, guidance=generation.guidance,
            options=generation.scheduler_options, height=generation.height or None, width=generation.width or None,
        )  # fmt: skip

    def provenance(self) -> dict[str, object]:
        """What every shard of the cycle says of its pictures, in its schema's metadata."""
        return {
            "base_model": {"id": self.recipe.base_model, "revision": self.recipe.revision},
            "config_hash": self.config_hash(),
            "generation": self.recipe.generation.model_dump(),
            "code": self.code,
        }


@dataclass(frozen=True)
class PlannedCycle(CycleFolder):
    """A cycle's folder together with its plan: every path, count, seed and model that a task needs."""

    plan: Plan

    @classmethod
    def open(cls, folder: Path) -> "PlannedCycle":
        """The planned cycle in a folder. Raises ParameterError when there is no plan."""
        where = CycleFolder(folder)
        if not where.plan_file.is_file():
            raise ParameterError(f"cycle={str(folder)!r}: there is no planned cycle ({where.plan_file} is missing)")
        return cls(folder, Plan.model_validate_json(where.plan_file.read_text()))

    def images_per_prompt(self, part: Part) -> int:
        """Pictures that are drawn of each prompt of a part."""
        return self.plan.recipe.generation.candidates if part == "candidates" else 1

    def prompts_per_shard(self, part: Part) -> int:
        """Prompts whose pictures share a shard, at least one."""
        return max(1, self.plan.recipe.execution.images_per_shard // self.images_per_prompt(part))

    def shards(self, part: Part) -> int:
        """Shards that a part is divided into."""
        return -(-self.plan.prompts[_side(part)] // self.prompts_per_shard(part))

    def part(self, part: Part) -> CandidateSet:
        """The files of one part."""
        return CandidateSet(self.folder if part == "candidates" else self.evaluation / part, self.shards(part))

    def prompts(self, part: Part) -> list[Prompt]:
        """The drawn prompts of a part, in the order of its shards."""
        drawn: dict[str, Prompts] = json.loads(self.prompts_file.read_text())
        return [Prompt(*item) for item in sorted(drawn[_side(part)].items())]

    def shard_prompts(self, part: Part, index: int) -> list[Prompt]:
        """The prompts of one shard: a function of the plan, so a shard can be made again alone."""
        count = self.prompts_per_shard(part)
        return self.prompts(part)[index * count : (index + 1) * count]

    def seeds(self, part: Part, prompts: list[Prompt]) -> list[int]:
        """A seed for each picture of some prompts.

        base and tuned share theirs; control has others (candidate index 1 instead of 0).
        """
        first = 1 if part == "control" else 0
        indices = range(first, first + self.images_per_prompt(part))
        purpose = "" if part == "candidates" else "evaluation:"
        return [seed_for(self.plan.cycle_seed, purpose + prompt.id, index) for prompt in prompts for index in indices]

    def start(self) -> ModelRef:
        """The model that the cycle starts from, with absolute paths."""
        return ModelRef.read(self.plan.start).within(self.experiment.folder)

    def trained(self) -> TrainedModel:
        """What the cycle trained. Raises FileNotFoundError before training is finished."""
        trained = TrainedModel.read(self.training)
        if trained is None:
            raise FileNotFoundError(f"{self.training}: training is not finished; run the train stage first")
        return trained

    def tuned(self) -> tuple[ModelRef, str]:
        """The model that the cycle trained, with paths relative to the experiment, and its name in the shards."""
        trained = self.trained()
        weights = trained.weights.relative_to(self.experiment.folder)
        return trained.on(ModelRef.read(self.plan.start), weights), trained.label(self.plan.recipe.base_model)

    def drawn_by(self, part: Part) -> tuple[ModelRef, str]:
        """The model that draws a part, with absolute paths, and its name in the shards."""
        if part != "tuned":
            return self.start(), self.plan.start_label
        model, label = self.tuned()
        return model.within(self.experiment.folder), label

    def relabelled(self, scorer: Expression) -> Path:
        """The folder of the pairs of these candidates by another scorer or expression."""
        return self.folder / "relabelled" / safe_name(str(scorer))


def _side(part: Part) -> str:
    """The side of the split from which a part takes its prompts, as `Plan.prompts` and prompts.json name it."""
    return "training" if part == "candidates" else "evaluation"
