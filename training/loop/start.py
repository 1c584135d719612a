"""Makes the objects that a training begins with out of its plan: pairs, processes, policy, optimizer, watch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.loop.dataset import PreferencePairs
from training.loop.diagnostics import Watch
from training.loop.full_policy import FullPolicy
from training.loop.lora_policy import LoraPolicy
from training.loop.metrics import Metrics
from training.loop.optimizers import make_optimizer
from training.loop.policy import Policy
from training.loop.sharding import make_accelerator
from training.loss.table import LOSSES
from training.model.devices import resolve_device
from training.plan import TrainingPlan

if TYPE_CHECKING:
    from accelerate import Accelerator

FROZEN = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision of frozen weights under each autocast precision, unless the plan names one: a float16 network without
autocast would be trained without loss scaling."""


def open_pairs(plan: TrainingPlan) -> PreferencePairs:
    """The pairs of a plan. Raises ShardError when they lack what its loss needs."""
    training, pairs = plan.training, PreferencePairs(Path(plan.pairs), plan.training.heldout_share)
    if training.soft_labels:
        pairs.require_soft_labels()
    if training.margin_offset or training.margin_weights:
        pairs.require_margins()
    return pairs


def accelerator_of(plan: TrainingPlan) -> "Accelerator":
    """accelerate's view of this process alone, or of one of several where a launcher started them."""
    from accelerate.state import AcceleratorState

    # accelerate keeps one state a process and refuses another precision in it; a worker trains many plans.
    AcceleratorState._reset_state(reset_partial_state=False)
    device = resolve_device(plan.execution.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # the Accelerator takes the current device
    return make_accelerator(device == "cpu", plan.training.mixed_precision, plan.execution.shard)


def policy_of(plan: TrainingPlan, device: str) -> Policy:
    """The policy and its reference, loaded."""
    training, execution = plan.training, plan.execution
    if training.method == "full":
        needed = LOSSES[training.loss].reference or bool(training.refresh_reference)
        return FullPolicy(plan.model, device, execution.offload_reference, needed)
    frozen = FROZEN[training.mixed_precision] if execution.dtype == "auto" else execution.dtype
    if (frozen, training.mixed_precision) == ("float16", "no"):
        frozen = "float32"  # small gradients would vanish without loss scaling
    return LoraPolicy(
        plan.model, training.lora(), device, frozen, plan.seed,
        moving_reference=bool(training.refresh_reference), text_encoders=training.text_encoders,
    )  # fmt: skip


def optimizer_of(plan: TrainingPlan, policy: Policy) -> torch.optim.Optimizer:
    """The optimizer of the policy's trained parameters."""
    training = plan.training
    # Fused kernels skip an overflowed float16 step inside, where nobody learns of it.
    fused = training.mixed_precision != "fp16"
    return make_optimizer(training.optimizer, policy.parameters(), training.learning_rate, training.weight_decay, fused)


def watch_of(plan: TrainingPlan) -> Watch:
    """What judges the run while it goes on."""
    named = ("learning_rate", "beta", "loss", "steps", "max_grad_norm")
    context = {name: getattr(plan.training, name) for name in named}
    return Watch(context, held=LOSSES[plan.training.loss].reference)


def warnings_of(plan: TrainingPlan, history: Sequence[Metrics]) -> list[str]:
    """All that was warned of in a run: a function of its metrics, however often it was interrupted."""
    watch = watch_of(plan)
    return [warning for metrics in history for warning in watch.observe(metrics)]
