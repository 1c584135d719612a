"""What a run and a cycle will do, resolved completely and checked before the first picture is drawn."""

import hashlib
import importlib.metadata
import json
import logging
import subprocess
from pathlib import Path
from typing import Any, cast

from prefect import task
from pydantic import BaseModel, ConfigDict, ValidationError

from scoring.expressions import Expression, leaves, parse
from scoring.registry import ScorerSource
from tasks.models import absolute
from tasks.prompts import Prompts, draw_prompts, prompt_pools
from tasks.recipe import ParameterError, Recipe
from tasks.workspace import Cycle, Experiment, Part
from training.models import ModelError, ModelRef, model_digest
from training.pairs import seed_for
from training.shards import write_json

log = logging.getLogger(__name__)
LIBRARIES = (
    "torch", "torchvision", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "open-clip-torch",
    "pillow", "pyarrow", "prefect",
)  # fmt: skip


class Run(BaseModel):
    """One call of the flow: its parameters and the cycles it comprises."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipe: Recipe
    cycles: list[int]
    finished: bool = False
    failures: list[str] = []

    def given_up(self) -> bool:
        """It failed twice in the same way: a third time would as well, and block every night to come."""
        return len(self.failures) > 1 and self.failures[-1] == self.failures[-2]


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


def begin_run(experiment: Experiment, recipe: Recipe, cycles: int) -> tuple[Path, Run]:
    """The newest unfinished run with these very parameters, or a new one with the next cycle numbers.

    Unfinished runs with other parameters stay as they are; giving their parameters again finishes them.
    """
    for path in reversed(experiment.runs()):
        run = _read_run(path)
        if run is None or run.finished:
            continue
        if run.given_up():
            log.warning("%s failed twice with %r; it is left as it is", path, run.failures[-1])
            continue
        if run.recipe == recipe and len(run.cycles) == cycles:
            log.info("resuming %s: cycles %s", path, run.cycles)
            return path, run
        changes = difference(run.recipe.model_dump(), recipe.model_dump()) or "another number of cycles"
        log.warning("%s is unfinished, with other parameters (%s); it is left as it is", path, changes)
    first = experiment.last_cycle() + 1
    run = Run(recipe=recipe, cycles=list(range(first, first + cycles)))
    path = experiment.run(max((int(path.stem) for path in experiment.runs()), default=0) + 1)
    write_json(path, run.model_dump())
    return path, run


def _read_run(path: Path) -> Run | None:
    """None for a run whose parameters this version does not know any more."""
    try:
        return Run.model_validate_json(path.read_text())
    except ValidationError:
        log.warning("%s was made by another version of the parameters; it is left as it is", path)
        return None


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two sets of parameters, 'section.name: old -> new; ...'; empty when nothing did."""
    a, b = _flat(old), _flat(new)
    changed = [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return "; ".join(changed)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def end_run(path: Path, run: Run) -> None:
    write_json(path, run.model_copy(update={"finished": True}).model_dump())


def note_failure(path: Path, run: Run, error: Exception) -> None:
    """Remember how a run failed; see `Run.given_up`."""
    failures = [*run.failures, f"{type(error).__name__}: {error}"]
    write_json(path, run.model_copy(update={"failures": failures}).model_dump())


@task(task_run_name="plan-cycle-{number:04d}")
def plan_cycle(experiment: Experiment, run: Run, number: int) -> Plan:
    """Draw the cycle's prompts and write its plan, or read both back where they are there."""
    cycle = experiment.cycle(number)
    recipe = run.recipe
    digest = model_digest(recipe.base_model, recipe.revision)
    if cycle.plan.is_file():
        return _unchanged(read_plan(cycle), digest, cycle)
    champion, start, label, labellers = current_model(experiment, recipe, digest)
    source = source_plan(recipe, label)
    cycle_seed = source.cycle_seed if source else seed_for(recipe.seed, f"cycle-{number}", 0)
    training, evaluation = prompt_pools(recipe)
    drawn = {
        "training": draw_prompts(training, recipe.generation.prompts_per_cycle, cycle_seed),
        "evaluation": draw_prompts(evaluation, recipe.evaluation.max_prompts, cycle_seed),
    }
    if source:
        drawn["training"] = dict(read_drawn_prompts(source_cycle(recipe), "training"))
        _check_held_out(drawn, recipe)
    plan = Plan(
        labellers=labellers,
        base_digest=digest,
        cycle=number, cycle_seed=cycle_seed, champion=champion, start=start.to_dict(), start_label=label, recipe=recipe,
        prompts={side: len(prompts) for side, prompts in drawn.items()}, code=code_versions(),
    )  # fmt: skip
    write_json(cycle.prompts, drawn)
    write_json(cycle.plan, plan.model_dump())
    return plan


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


def _check_held_out(drawn: dict[str, Prompts], recipe: Recipe) -> None:
    if shared := sorted(set(drawn["training"]) & set(drawn["evaluation"])):
        raise ParameterError(
            f"evaluation.prompts={recipe.evaluation.prompts!r}: {len(shared)} of them are training prompts of "
            f"candidates_of={recipe.candidates_of!r}, for example {drawn['training'][shared[0]]!r}"
        )


def _unchanged(plan: Plan, digest: str, cycle: Cycle) -> Plan:
    if plan.base_digest != digest:
        raise ParameterError(
            f"base_model={plan.recipe.base_model!r} has changed since {cycle.plan} was made (digest {digest}, then "
            f"{plan.base_digest}); put the old files back, or give another name as experiment"
        )
    return plan


def read_plan(cycle: Cycle) -> Plan:
    return Plan.model_validate_json(cycle.plan.read_text())


def read_drawn_prompts(cycle: Cycle, part: Part) -> list[tuple[str, str]]:
    """(prompt id, text) of a part, in the order of its shards."""
    side = "training" if part == "training" else "evaluation"
    drawn = cast(dict[str, Prompts], json.loads(cycle.prompts.read_text()))
    return sorted(drawn[side].items())


def current_model(experiment: Experiment, recipe: Recipe, digest: str) -> tuple[int | None, ModelRef, str, list[str]]:
    """(champion's cycle, model, its name in shards, who labelled its data): the champion, else the base.

    Raises ParameterError when the champion belongs to another base model or its adapter has another shape.
    """
    base = ModelRef(recipe.base_model, recipe.revision)
    champion: dict[str, Any] = {"cycle": None}
    if experiment.champion.is_file():
        champion = json.loads(experiment.champion.read_text())
    if champion["cycle"] is None:
        return None, base, f"{recipe.base_model}@{digest}", []
    model = ModelRef.read(champion["model"])
    if (model.base, model.revision) != (base.base, base.revision):
        raise ParameterError(
            f"base_model={recipe.base_model!r}, but the champion of {experiment.folder} was trained on {model.base!r}; "
            "give another name as experiment"
        )
    _check_adapter(experiment.cycle(champion["cycle"]), model, recipe)
    check_start(absolute(model, experiment.folder), recipe)
    return champion["cycle"], model, champion["label"], champion["labellers"]


def check_start(model: ModelRef, recipe: Recipe) -> None:
    """Refuse to train without the text encoders that the model to start from, with absolute paths, has tuned already.

    Raises ParameterError.
    """
    from training.adapter_shape import check_text_encoders

    try:
        check_text_encoders(recipe.training.method, recipe.training.text_encoders, model)
    except ModelError as error:
        raise ParameterError(str(error)) from error


def _check_adapter(cycle: Cycle, model: ModelRef, recipe: Recipe) -> None:
    """A LoRA cycle goes on with the champion's adapter, so it must have its shape."""
    if not model.adapter or recipe.training.method != "lora":
        return
    old, new = read_plan(cycle).recipe.training, recipe.training
    for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_dora"):
        if _unordered(getattr(old, name)) != _unordered(getattr(new, name)):
            raise ParameterError(
                f"training.{name}={getattr(new, name)!r}, but the champion's adapter was trained with "
                f"{getattr(old, name)!r}; keep that, or give another name as experiment to start from the base model"
            )


def _unordered(value: object) -> object:
    """Targets mean the same in any order."""
    return set(value) if isinstance(value, list) else value


def code_versions() -> dict[str, str]:
    """Version of this code (git commit where there is one) and of the libraries that make the numbers."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return versions | {"rlaif": git.stdout.strip() or "unknown"}
