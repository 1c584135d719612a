"""Refuses, before anything is computed, a recipe that cannot work. Loads no weights, but looks at their files."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.ids import scorer_slug
from data.prompts import Prompts
from scoring.labels.expressions import Expression
from scoring.scorers.registry import ScorerSource, check_scorer, load_judge, parse_spec
from scoring.scorers.scorer import ScorerInfo, ScoringError, identities, info_of
from tasks.record.plan import Plan
from tasks.record.prompts import prompt_pools
from tasks.record.recipe import ParameterError, Recipe, Weights
from tasks.record.source import source_cycle
from training.loss.table import check_options
from training.model.devices import resolve_device
from training.model.families import family_for
from training.model.loading import check_lora_targets
from training.model.reference import ModelRef
from training.model.schedulers import check_scheduler


def check(recipe: Recipe, workspace: Path) -> tuple[Prompts, Prompts]:
    """Refuse, before anything is computed, what cannot work. Returns the (training, evaluation) prompt pools.

    Loads no weights. Raises ParameterError, or a ValueError of the library concerned, that names the parameter.
    """
    _check_scorers(recipe)
    pools = prompt_pools(recipe)
    source_cycle(recipe)
    generation, ref = recipe.generation, ModelRef(recipe.base_model, recipe.revision)
    check_scheduler(ref, generation.scheduler, generation.scheduler_options)
    check_device(recipe.execution.device)
    check_training(recipe)
    _check_soft_labels(recipe)
    _check_disk(recipe, workspace, min(len(pools[0]), recipe.generation.prompts_per_cycle))
    return pools


def _check_scorers(recipe: Recipe) -> None:
    for parameter, expressions in {"scorer": [recipe.scorer], "judges": recipe.judges}.items():
        for expression in expressions:
            check_leaves(parameter, expression, recipe.sources())
    judges = [judge.text for judge in recipe.judges]
    every = list(dict.fromkeys(leaf for each in (recipe.scorer, *recipe.judges) for leaf in each.leaves))
    if len({scorer_slug(leaf) for leaf in every}) < len(every):
        raise ParameterError(f"judges={judges}: two scorers give the same column; scorers: {every}")
    known = {leaf: identities([_info(leaf, recipe)]) for leaf in every}
    labelling = {identity for leaf in recipe.scorer.leaves for identity in known[leaf]}
    if not any(all(known[leaf].isdisjoint(labelling) for leaf in judge.leaves) for judge in recipe.judges):
        raise ParameterError(
            f"judges={judges}: none is held out, since each has the weights of one that labels the training "
            f"data (scorer={recipe.scorer.text!r}); name at least one other judge"
        )


def _info(name: str, recipe: Recipe) -> ScorerInfo:
    """Who a scorer is: built, so that wrong arguments and damaged files are found now; weights are not loaded yet."""
    try:
        scorer = load_judge(name, recipe.sources(), resolve_device(recipe.execution.device))
    except (ValueError, TypeError, OSError, ScoringError) as error:
        raise ParameterError(f"scorer or judge {name!r}: {error}") from error
    info = info_of(scorer)
    scorer.close()
    return info


def check_trusted(names: list[str], plan: Plan, preset: dict[str, Any]) -> None:
    """Refuse code that only a cycle's plan names: it may have come with a folder from somewhere else."""
    trusted = {name: Weights(**weights) for name, weights in preset.get("scorers", {}).items()}
    for name in (parse_spec(text).name for text in names):
        bound = plan.recipe.scorers.get(name, Weights())
        if (bound.factory or bound.options.get("remote_code")) and bound != trusted.get(name):
            raise ParameterError(
                f"scorer={name!r}: the cycle's plan binds it to code ({bound.factory or 'remote_code'}); if that may "
                "run, give as preset a recipe of yours that says the same"
            )


def check_leaves(parameter: str, expression: Expression, sources: Mapping[str, ScorerSource]) -> None:
    """Refuse an expression with a scorer that is not there. Raises ParameterError that names the parameter."""
    try:
        for name in expression.leaves:
            check_scorer(name, sources)
    except ValueError as error:
        raise ParameterError(f"{parameter}={expression.text!r}: {error}") from error


def check_training(recipe: Recipe) -> None:
    """What the trainer would refuse only after everything has been generated."""
    from training.adapter.shape import check_text_encoders

    training, device = recipe.training, resolve_device(recipe.execution.device)
    if training.mixed_precision == "fp16" and not device.startswith("cuda"):
        raise ParameterError(f"training.mixed_precision='fp16' needs a CUDA device, not {device!r}; use bf16 or no")
    check_options(training.loss, training.loss_options())
    _check_execution(recipe, device)
    ref = ModelRef(recipe.base_model, recipe.revision)
    family_for(ref).check(ref)
    check_text_encoders(training.method, training.text_encoders, ref)
    if training.method == "lora":
        check_lora_targets(recipe.base_model, recipe.revision, training.lora_targets)


def _check_execution(recipe: Recipe, device: str) -> None:
    """What is not installed, or does not divide among the processes."""
    from training.loop.launch import process_count
    from training.loop.optimizers import check_optimizer
    from training.loop.sharding import check_sharding
    from training.loop.trackers import check_trackers

    training, execution = recipe.training, recipe.execution
    check_optimizer(training.optimizer, device)
    check_trackers(execution.trackers)
    if execution.shard:
        offload, encoders = execution.offload_reference, training.text_encoders
        check_sharding(training.optimizer, offload, encoders, execution.compile)
    process_count(execution.processes, execution.device, training.batch_size)


def _check_soft_labels(recipe: Recipe) -> None:
    """Soft labels that no scorer can give."""
    if not recipe.training.soft_labels:
        return
    if unknown := [name for name in recipe.scorer.leaves if _info(name, recipe).preference_scale is None]:
        raise ParameterError(
            f"training.soft_labels=true: the preference_scale of {', '.join(unknown)} (scorer={recipe.scorer.text!r}) "
            "is not known, so the pairs would have no soft labels; fit one with `rlaif accuracy`, or use false"
        )


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device if device != "auto" else "cpu")
    except (RuntimeError, AssertionError) as error:
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ParameterError(f"execution.device={device!r} is not there; this machine has {['cpu', *found]}") from error


def _check_disk(recipe: Recipe, workspace: Path, prompts: int) -> None:
    from training.model.picture_size import picture_size

    generation = recipe.generation
    own = picture_size(ModelRef(recipe.base_model, recipe.revision), 0, 0)
    height, width = generation.height or own[0], generation.width or own[1]
    images = prompts * generation.candidates + 3 * recipe.evaluation.max_prompts
    needed = images * height * width * 3  # an incompressible picture; latents are smaller
    existing = next(path for path in [workspace, *workspace.parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ParameterError(
            f"workspace={str(workspace)!r}: a cycle needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
            "free; free some or lower generation.prompts_per_cycle"
        )
