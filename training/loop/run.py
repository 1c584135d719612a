"""One training run: its model, optimizer and data in this process, one optimizer step at a time."""

import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.files import publish_folder
from data.safetensors_file import add_to_header
from training.adapter.shape import check_text_encoders
from training.loop.checkpoint import CheckpointRecord, Tensors, load_state, save_state, weights_sha256
from training.loop.dataset import PairBatch, PreferencePairs, positions_of_step, share_of
from training.loop.diagnostics import Watch
from training.loop.ema import Ema
from training.loop.header import training_metadata
from training.loop.optimizers import learning_rate, make_optimizer
from training.loop.pair_loss import PairLoss
from training.loop.policy import FullPolicy, LoraPolicy, Policy
from training.loop.reference_errors import ReferenceErrors
from training.loop.sharding import (
    anywhere,
    check_sharding,
    clip_gradients,
    gather,
    is_sharded,
    make_accelerator,
    optimizer_parameters,
    prepare,
    shard_frozen,
    spread_states,
)
from training.loss.errors import LossOutput, kappa_of
from training.loss.table import LOSSES, LossOptions, check_options
from training.model.devices import resolve_device
from training.model.family import PromptEmbeddings, TimeSampling, picture_scale, whole_picture
from training.model.loading import embed_negative
from training.model.reference import ModelRef
from training.plan import TrainingPlan

if TYPE_CHECKING:
    from accelerate import Accelerator

FROZEN = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision of frozen weights under each autocast precision, unless the plan names one: a float16 network without
autocast would be trained without loss scaling."""
HELDOUT_DRAWS, HELDOUT_PAIRS = 4, 256
Metrics = dict[str, float]


class Run:
    """The objects of one training run."""

    def __init__(self, plan: TrainingPlan) -> None:
        check_options(plan.loss, LossOptions.of(plan))
        check_text_encoders(plan.method, plan.text_encoders, plan.model)
        self.plan = plan
        self.pairs = _pairs(plan)
        self.accelerator = _accelerator(plan)
        self.device = self.accelerator.device
        self.first_process: bool = self.accelerator.is_main_process
        if is_sharded(self.accelerator):
            check_sharding(plan.optimizer, plan.offload_reference, plan.text_encoders, plan.compile)
        if plan.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"training.batch_size={plan.batch_size}: must be a multiple of the number of processes, "
                f"{self.accelerator.num_processes}"
            )
        # What is to be divided is read into main memory: a GPU need not hold the whole.
        self.policy = _policy(plan, "cpu" if is_sharded(self.accelerator) else str(self.device))
        if plan.gradient_checkpointing:
            self.policy.network.enable_gradient_checkpointing()
        if plan.compile:
            self.policy.compile()
        self.optimizer: torch.optim.Optimizer
        # Fused kernels skip an overflowed float16 step inside, where nobody learns of it.
        fused = plan.mixed_precision != "fp16"
        optimizer = make_optimizer(
            plan.optimizer, self.policy.parameters(), plan.learning_rate, plan.weight_decay, fused
        )
        self.network, self.optimizer = prepare(self.accelerator, self.policy.network, optimizer)
        if is_sharded(self.accelerator):
            self.policy.shard_reference(partial(shard_frozen, self.accelerator))
        self.ema = Ema(self.policy.weights(), plan.ema) if plan.ema else None
        encoders = self.policy.encoders
        self.encoders = None if encoders is None else self.accelerator.prepare(encoders)
        draws = plan.noise_draws
        self.kept = ReferenceErrors(len(self.pairs), draws, self.device) if draws else None
        self.loss = self._loss()

    def _loss(self) -> PairLoss:
        plan, family = self.plan, self.policy.family
        times = TimeSampling(plan.timestep_density, plan.timestep_shift)
        process = family.process(plan.model, self.pairs.latent_shape, times)
        size = whole_picture(self.pairs.latent_shape, picture_scale(plan.model)) if family.takes_time_ids else None
        empty: PromptEmbeddings | None = embed_negative(plan.model) if plan.prompt_dropout else None
        return PairLoss(
            plan, self.policy, self.network, process, self.device, self.accelerator.autocast, size, empty, self.kept,
            self.encoders, partial(anywhere, self.accelerator),
        )  # fmt: skip

    def resume(self, output: Path, recorded: int) -> int:
        """Load the newest checkpoint whose steps are all recorded; returns the number of steps it has done.

        The reference is rebuilt from the plan; only one that was refreshed comes from the checkpoint.
        """
        state = load_state(output, recorded)
        if state is None:
            return 0
        self.policy.load(state.tensors["weights"])
        if "reference" in state.tensors:
            self.policy.load_reference(state.tensors["reference"])
        if self.kept is not None:
            self.kept.load(state.tensors["reference_errors"]["values"])
        averaged = state.optimizer.pop("ema", None)
        if self.ema is not None:
            self.ema.load(averaged)
        scaler = state.optimizer.pop("scaler", None)
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self.optimizer.load_state_dict(spread_states(state.optimizer, optimizer_parameters(self.optimizer)))
        return state.step

    def save(self, output: Path, step: int) -> None:
        """Everything that the next steps depend on. The order of pairs and their noise are functions of the step."""
        scaler = self.accelerator.scaler
        optimizer = self.optimizer.state_dict() | ({"scaler": scaler.state_dict()} if scaler is not None else {})
        optimizer |= {"ema": self.ema.state()} if self.ema is not None else {}
        tensors: dict[str, Tensors] = {"weights": self.policy.weights()}
        if self.plan.refresh_reference:
            tensors["reference"] = self.policy.reference_weights()
        if self.kept is not None:
            tensors["reference_errors"] = {"values": self.kept.values}
        tensors, optimizer = gather(tensors, self.first_process), gather(optimizer, self.first_process)
        if self.first_process:
            save_state(output, step, tensors, optimizer, keep=2)
        self.accelerator.wait_for_everyone()

    def step(self, step: int) -> Metrics:
        """One optimizer step over `batch_size` pairs, in forward passes of `micro_batch_size`."""
        plan, started = self.plan, time.perf_counter()
        if plan.refresh_reference and step and step % plan.refresh_reference == 0:
            self._refresh_reference()
        rate = learning_rate(plan.schedule, step, plan.steps, plan.warmup_steps, plan.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._batches(step)
        outputs: list[LossOutput] = []
        for batch in batches:
            last = batch is batches[-1]
            with nullcontext() if last or is_sharded(self.accelerator) else self._no_sync():
                output = self.loss(batch)
                # The gradients of the processes are averaged, not added.
                self.accelerator.backward(output.loss.sum() * self.accelerator.num_processes / plan.batch_size)
            outputs.append(LossOutput(output.loss.detach(), output.metrics))
        self._share_reference_errors()
        norm = clip_gradients(self.accelerator, self.policy.parameters(), plan.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = self._means(outputs, norm=norm)
        metrics["skipped"] = float(self.accelerator.optimizer_step_was_skipped)
        if metrics["skipped"]:  # by float16 overflow: nothing has changed, and an infinite norm is no divergence
            metrics["grad_norm"] = 0.0
        elif self.ema is not None:
            self.ema.update(self.policy.weights())
        if self.pairs.heldout and ((step + 1) % plan.heldout_every == 0 or step + 1 == plan.steps):
            metrics |= self.look_at_heldout()
        pace = plan.batch_size / (time.perf_counter() - started)
        return {"step": step + 1, **metrics, "learning_rate": rate, "pairs_per_second": pace}

    def _no_sync(self) -> ExitStack:
        """Gradients stay in this process, inside."""
        with ExitStack() as stack:
            for module in (self.network, self.encoders):
                if module is not None:
                    stack.enter_context(self.accelerator.no_sync(module))
            return stack.pop_all()

    def _batches(self, step: int) -> list[PairBatch]:
        """This process's part of the step's pairs, in as many forward passes as every other process does."""
        processes = self.accelerator.num_processes
        positions = positions_of_step(step, self.plan.batch_size, len(self.pairs), self.plan.seed)
        own = np.split(np.asarray(positions), processes)[self.accelerator.process_index]
        passes = -(-len(own) // self.plan.micro_batch_size)
        return [self.pairs.read([(epoch, index) for epoch, index in part]) for part in np.array_split(own, passes)]

    def _share_reference_errors(self) -> None:
        """What one process asked of the reference is known to all: the next epoch divides the pairs otherwise."""
        if self.kept is None:
            return
        from accelerate.utils import gather_object

        new = self.kept.take_new()
        if self.accelerator.num_processes > 1:
            for indices, draws, errors in gather_object([(*place, errors.cpu()) for *place, errors in new]):
                self.kept.put(indices, draws, errors.to(self.device))
            self.kept.take_new()

    def _refresh_reference(self) -> None:
        self.policy.refresh_reference()
        if self.kept is not None:
            self.kept.clear()

    @torch.no_grad()
    def look_at_heldout(self) -> Metrics:
        """The metrics of the first HELDOUT_PAIRS held-out pairs, each with HELDOUT_DRAWS draws, always the same."""
        first, count = len(self.pairs), min(self.pairs.heldout, HELDOUT_PAIRS)
        places = [(-1 - number, first + index) for index in range(count) for number in range(HELDOUT_DRAWS)]
        read, counting = share_of(places, self.accelerator.process_index, self.accelerator.num_processes)
        size = self.plan.micro_batch_size
        outputs = [self.loss(self.pairs.read(read[start : start + size])) for start in range(0, len(read), size)]
        return {f"heldout_{name}": value for name, value in self._means(outputs, counting).items() if "_q" not in name}

    def _means(self, outputs: list[LossOutput], rows: int | None = None, norm: torch.Tensor | None = None) -> Metrics:
        """Means over the pairs of all processes, and the gradient's norm, in one transfer from the device.

        rows: how many of this process's pairs count, the first ones; None = all. A metric that is NaN for a pair does
        not concern it; a loss that is NaN is the news.
        """
        names = ["loss", *outputs[0].metrics]
        columns = [torch.cat([output.loss for output in outputs])]
        columns += [torch.cat([output.metrics[name] for output in outputs]) for name in names[1:]]
        values = torch.stack(columns).double()[:, :rows]
        concerned = ~values.isnan()
        concerned[0] = True
        sums = torch.stack([values.where(concerned, 0.0).sum(1), concerned.double().sum(1)])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        if norm is not None:
            names, sums = (
                [*names, "grad_norm"],
                torch.cat([sums, torch.stack([norm, torch.ones_like(norm)])[:, None]], 1),
            )
        totals, counts = sums.tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}

    def finish(self, output: Path, history: list[Metrics]) -> CheckpointRecord:
        """Export the trained weights, then the record that says the run is complete."""
        weights = gather(self.ema.weights() if self.ema else self.policy.weights(), self.first_process)
        if self.first_process:
            self._publish(output, weights, history)
        self.accelerator.wait_for_everyone()
        record = CheckpointRecord.read(output)
        if record is None:
            raise FileNotFoundError(f"{output}: the first process has not finished")
        return record

    def _export(self, folder: Path, trained: Tensors) -> None:
        """The weights, with what they are in the file's own header."""
        plan, file = self.plan, self.policy.export(folder, trained)
        if plan.method == "lora":  # a whole network is several files, and large
            told = training_metadata(
                model=plan.model, loss=plan.loss, beta=plan.beta, kappa=kappa_of(plan.beta), steps=plan.steps,
                pairs=Path(plan.pairs), version=plan.version,
            )  # fmt: skip
            add_to_header(file, told)

    def _publish(self, output: Path, trained: Tensors, history: list[Metrics]) -> None:
        plan = self.plan
        kind = "adapter" if plan.method == "lora" else self.policy.family.network
        publish_folder(output / kind, partial(self._export, trained=trained))
        weights = sorted((output / kind).glob("*.safetensors"))
        model = ModelRef(plan.model.base, plan.model.revision, plan.model.network, str(output / kind))
        if plan.method == "full":
            model = ModelRef(plan.model.base, plan.model.revision, str(output / kind), None)
        record = CheckpointRecord(
            model, plan.method, plan.steps, len(self.pairs), plan.beta, kappa_of(plan.beta),
            weights_sha256(*weights), final_metrics(history), plan.loss, warnings_of(plan, history),
        )  # fmt: skip
        record.write(output)


def _pairs(plan: TrainingPlan) -> PreferencePairs:
    pairs = PreferencePairs(Path(plan.pairs), plan.heldout_share)
    if plan.soft_labels:
        pairs.require_soft_labels()
    if plan.margin_offset or plan.margin_weights:
        pairs.require_margins()
    return pairs


def _accelerator(plan: TrainingPlan) -> "Accelerator":
    """Of this process alone, or one of several where a launcher started them."""
    from accelerate.state import AcceleratorState

    # accelerate keeps one state a process and refuses another precision in it; a worker trains many plans.
    AcceleratorState._reset_state(reset_partial_state=False)
    device = resolve_device(plan.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # the Accelerator takes the current device
    return make_accelerator(device == "cpu", plan.mixed_precision, plan.shard)


def _policy(plan: TrainingPlan, device: str) -> Policy:
    if plan.method == "full":
        needed = LOSSES[plan.loss].reference or bool(plan.refresh_reference)
        return FullPolicy(plan.model, device, plan.offload_reference, needed)
    frozen = FROZEN[plan.mixed_precision] if plan.dtype == "auto" else plan.dtype
    if (frozen, plan.mixed_precision) == ("float16", "no"):
        frozen = "float32"  # small gradients would vanish without loss scaling
    return LoraPolicy(
        plan.model, plan.lora, device, frozen, plan.seed, bool(plan.refresh_reference), plan.text_encoders
    )


def watch_of(plan: TrainingPlan) -> Watch:
    """What judges the run while it goes on."""
    named = ("learning_rate", "beta", "loss", "steps", "max_grad_norm")
    return Watch({name: getattr(plan, name) for name in named})


def warnings_of(plan: TrainingPlan, history: list[Metrics]) -> list[str]:
    """All that was warned of in a run: a function of its metrics, however often it was interrupted."""
    watch = watch_of(plan)
    return [warning for metrics in history for warning in watch.observe(metrics)]


def final_metrics(history: list[Metrics]) -> Metrics:
    """Each metric's mean over the last tenth of the steps: single steps are dominated by the timestep drawn."""
    tail = history[-max(1, len(history) // 10) :]
    names = dict.fromkeys(name for metrics in tail for name in metrics if name != "step")
    means = {name: [metrics[name] for metrics in tail if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in means.items()}
