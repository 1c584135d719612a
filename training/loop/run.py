"""One training run: its model, optimizer and data in this process, one optimizer step at a time."""

import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.files import publish_folder
from data.safetensors_file import add_to_header
from training.adapter.shape import check_text_encoders
from training.loop.checkpoint import CheckpointRecord, Tensors, load_state, save_state, weights_sha256
from training.loop.dataset import PairBatch, positions_of_step, share_of
from training.loop.ema import Ema
from training.loop.header import training_metadata
from training.loop.metrics import Metrics, final_metrics, means
from training.loop.optimizers import learning_rate
from training.loop.pair_loss import PairLoss
from training.loop.reference_errors import ReferenceErrors
from training.loop.sharding import (
    anywhere,
    check_sharding,
    clip_gradients,
    gather,
    is_sharded,
    optimizer_parameters,
    prepare,
    shard_frozen,
    spread_states,
)
from training.loop.start import accelerator_of, open_pairs, optimizer_of, policy_of, warnings_of
from training.loss.errors import LossOutput, kappa_of
from training.loss.table import check_options
from training.model.family import TimeSampling, picture_scale, whole_picture
from training.model.loading import embed_negative
from training.model.reference import ModelRef
from training.plan import TrainingPlan

HELDOUT_DRAWS, HELDOUT_PAIRS = 4, 256
"""Held-out pairs that are looked at, and how often each."""


class Run:
    """The objects of one training run."""

    def __init__(self, plan: TrainingPlan) -> None:
        training, execution = plan.training, plan.execution
        check_options(training.loss, training.loss_options())
        check_text_encoders(training.method, training.text_encoders, plan.model)
        self.plan = plan
        self.pairs = open_pairs(plan)
        self.accelerator = accelerator_of(plan)
        self.device = self.accelerator.device
        self.first_process: bool = self.accelerator.is_main_process
        self.sharded = is_sharded(self.accelerator)
        self._check_processes()
        # What is to be divided is read into main memory: a GPU need not hold the whole.
        self.policy = policy_of(plan, "cpu" if self.sharded else str(self.device))
        if execution.gradient_checkpointing:
            self.policy.network.enable_gradient_checkpointing()
        if execution.compile:
            self.policy.compile()
        self.network, self.optimizer = prepare(self.accelerator, self.policy.network, optimizer_of(plan, self.policy))
        if self.sharded:
            self.policy.shard_reference(partial(shard_frozen, self.accelerator))
        self.ema = Ema(self.policy.weights(), training.ema) if training.ema else None
        encoders = self.policy.encoders
        self.encoders = None if encoders is None else self.accelerator.prepare(encoders)
        draws = training.noise_draws
        self.kept = ReferenceErrors(len(self.pairs), draws, self.device) if draws else None
        self.loss = self._loss()

    def _check_processes(self) -> None:
        """Raises ValueError for what does not go with so many processes, or with divided weights."""
        training, execution = self.plan.training, self.plan.execution
        if self.sharded:
            offload, encoders = execution.offload_reference, training.text_encoders
            check_sharding(training.optimizer, offload, encoders, execution.compile)
        if training.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"training.batch_size={training.batch_size}: must be a multiple of the number of processes, "
                f"{self.accelerator.num_processes}"
            )

    def _loss(self) -> PairLoss:
        plan, family, shape = self.plan, self.policy.family, self.pairs.latent_shape
        times = TimeSampling(plan.training.timestep_density, plan.training.timestep_shift)
        return PairLoss(
            plan,
            self.policy,
            network=self.network,
            process=family.process(plan.model, shape, times),
            device=self.device,
            autocast=self.accelerator.autocast,
            whole=whole_picture(shape, picture_scale(plan.model)) if family.takes_time_ids else None,
            empty=embed_negative(plan.model) if plan.training.prompt_dropout else None,
            kept=self.kept,
            encoders=self.encoders,
            anywhere=partial(anywhere, self.accelerator),
        )

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
        if self.plan.training.refresh_reference:
            tensors["reference"] = self.policy.reference_weights()
        if self.kept is not None:
            tensors["reference_errors"] = {"values": self.kept.values}
        tensors, optimizer = gather(tensors, self.first_process), gather(optimizer, self.first_process)
        if self.first_process:
            save_state(output, step, tensors, optimizer, keep=2)
        self.accelerator.wait_for_everyone()

    def step(self, step: int) -> Metrics:
        """One optimizer step over `batch_size` pairs, in forward passes of `micro_batch_size`."""
        training, started = self.plan.training, time.perf_counter()
        if training.refresh_reference and step and step % training.refresh_reference == 0:
            self._refresh_reference()
        rate = learning_rate(training.schedule, step, training.steps, training.warmup_steps, training.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._batches(step)
        outputs: list[LossOutput] = []
        for batch in batches:
            last = batch is batches[-1]
            with nullcontext() if last or self.sharded else self._no_sync():
                output = self.loss(batch)
                # The gradients of the processes are averaged, not added.
                self.accelerator.backward(output.loss.sum() * self.accelerator.num_processes / training.batch_size)
            outputs.append(LossOutput(output.loss.detach(), output.metrics))
        self._share_reference_errors()
        norm = clip_gradients(self.accelerator, self.policy.parameters(), training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = self._means(outputs, norm=norm)
        metrics["skipped"] = float(self.accelerator.optimizer_step_was_skipped)
        if metrics["skipped"]:  # by float16 overflow: nothing has changed, and an infinite norm is no divergence
            metrics["grad_norm"] = 0.0
        elif self.ema is not None:
            self.ema.update(self.policy.weights())
        if self.pairs.heldout and ((step + 1) % training.heldout_every == 0 or step + 1 == training.steps):
            metrics |= self.look_at_heldout()
        pace = training.batch_size / (time.perf_counter() - started)
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
        positions = positions_of_step(step, self.plan.training.batch_size, len(self.pairs), self.plan.seed)
        own = np.split(np.asarray(positions), processes)[self.accelerator.process_index]
        passes = -(-len(own) // self.plan.training.micro_batch_size)
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
        size = self.plan.training.micro_batch_size
        outputs = [self.loss(self.pairs.read(read[start : start + size])) for start in range(0, len(read), size)]
        return {f"heldout_{name}": value for name, value in self._means(outputs, counting).items() if "_q" not in name}

    def _means(self, outputs: list[LossOutput], rows: int | None = None, norm: torch.Tensor | None = None) -> Metrics:
        several = self.accelerator.num_processes > 1
        return means(outputs, (lambda sums: self.accelerator.reduce(sums, "sum")) if several else None, rows, norm)

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

    def _publish(self, output: Path, trained: Tensors, history: list[Metrics]) -> None:
        plan, training = self.plan, self.plan.training
        kind = "adapter" if training.method == "lora" else self.policy.family.network
        publish_folder(output / kind, partial(self._export, trained=trained))
        weights, base = sorted((output / kind).glob("*.safetensors")), plan.model
        model = ModelRef(base.base, base.revision, base.network, str(output / kind))
        if training.method == "full":
            model = ModelRef(base.base, base.revision, str(output / kind), None)
        CheckpointRecord(
            model=model, method=training.method, steps=training.steps, pairs=len(self.pairs), beta=training.beta,
            kappa=kappa_of(training.beta), sha256=weights_sha256(*weights), metrics=final_metrics(history),
            loss=training.loss, warnings=warnings_of(plan, history),
        ).write(output)  # fmt: skip

    def _export(self, folder: Path, trained: Tensors) -> None:
        """The weights, with what they are in the file's own header."""
        plan, training = self.plan, self.plan.training
        file = self.policy.export(folder, trained)
        if training.method == "lora":  # a whole network is several files, and large
            header = training_metadata(
                model=plan.model, loss=training.loss, beta=training.beta, kappa=kappa_of(training.beta),
                steps=training.steps, pairs=Path(plan.pairs), version=plan.version,
            )  # fmt: skip
            add_to_header(file, header)
