"""From a batch of pairs to their losses: noise, the network's predictions, the reference's, and the errors of both."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from data.shards import ShardError
from training.loop.dataset import PairBatch
from training.loop.diagnostics import by_quartile, reference_errors
from training.loop.policy import Policy
from training.loop.reference_errors import ReferenceErrors
from training.loss.errors import LossOutput, PairErrors, PairLabels, kappa_of, residual_alignment, squared_error
from training.loss.table import LOSSES, preference_loss
from training.model.devices import to_device
from training.model.family import Conditions, Family, PromptEmbeddings
from training.model.noise import NoiseProcess, draw, generator_of
from training.plan import TrainingPlan

BY_QUARTILE = ("winner_error_delta", "loser_error_delta", "margin")


@dataclass
class _Inputs:
    """What both networks see: all winners, then (two sides) all losers, each pair with one noise, time and prompt.

    captions: one a pair; None = the empty prompt.
    """

    noisy: torch.Tensor
    times: torch.Tensor
    conditions: Conditions
    target: torch.Tensor
    factor: torch.Tensor | None
    level: torch.Tensor
    captions: list[str | None]

    def rows(self, places: list[int], sides: int) -> "_Inputs":
        """Only the rows of these pairs."""
        each_side = torch.tensor(places) + len(self.captions) * torch.arange(sides)[:, None]
        chosen = to_device(each_side.flatten(), self.noisy.device)
        sizes = self.conditions.time_ids
        conditions = self.conditions._replace(
            prompts=self.conditions.prompts.map(lambda each: each[chosen]),
            time_ids=None if sizes is None else sizes[chosen],
        )
        factor = None if self.factor is None else self.factor[chosen]
        return _Inputs(
            self.noisy[chosen], self.times[chosen], conditions, self.target[chosen], factor, self.level[chosen],
            [self.captions[place] for place in places],
        )  # fmt: skip


class PairLoss:
    """The losses of batches under one plan.

    network: the policy as it is called (wrapped, where accelerate wraps it). empty: the embedding of the empty prompt,
    one row, needed with prompt_dropout. whole: time ids of a picture at its own size, for families that take them.
    kept: where the reference's errors are kept, None = computed each time. encoders: the policy's text encoders as
    they are called, where they are trained; None = prompts are embedded as the shards say. anywhere: whether something
    is so in any of the processes that must run the networks at the same time as this one.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        policy: Policy,
        *,
        network: torch.nn.Module,
        process: NoiseProcess,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]],
        whole: list[int] | None,
        empty: PromptEmbeddings | None,
        kept: ReferenceErrors | None,
        encoders: torch.nn.Module | None = None,
        anywhere: Callable[[bool], bool] = bool,
    ) -> None:
        self.plan, self.policy, self.network, self.process = plan, policy, network, process
        self.device, self.autocast, self.empty, self.kept = device, autocast, empty, kept
        self.encoders, self.anywhere = encoders, anywhere
        self.whole = None if whole is None else torch.tensor([whole], dtype=torch.float32, device=device)
        self.family: Family = policy.family
        self.needs = LOSSES[plan.training.loss]
        self.precision = next(policy.network.parameters()).dtype

    def __call__(self, batch: PairBatch) -> LossOutput:
        """Per-pair losses and metrics, (pairs,) each."""
        sides = 2 if self.needs.loser else 1
        numbers = [self._number(epoch) for _, epoch in batch.draws]
        inputs = self._inputs(batch, numbers, sides)
        errors: dict[str, torch.Tensor] = {}
        if self.needs.reference:  # first, so that no policy graph is held meanwhile
            errors |= _by_side("reference", self._reference_errors(inputs, batch, numbers, sides))
        inputs = self._embed(self.encoders, inputs)
        predicted = self._predict(self.network, inputs)
        errors |= _by_side("policy", self._errors(predicted, inputs).view(sides, -1))
        if self.needs.alignment:
            errors["alignment"] = self._alignment(predicted, inputs)
        labels = PairLabels(to_device(batch.soft_label, self.device), to_device(batch.margin, self.device))
        of_pairs, training = PairErrors(**errors), self.plan.training
        kappa, options = kappa_of(training.beta), training.loss_options()
        loss, metrics = preference_loss(training.loss, of_pairs, kappa, options, labels)
        metrics |= reference_errors(of_pairs)
        return LossOutput(loss, metrics | by_quartile(inputs.level[: len(loss)], metrics, BY_QUARTILE))

    def _number(self, epoch: int) -> int:
        """Of the draw. Negative epochs are those of held-out pairs, which are looked at with draws of their own."""
        return epoch % self.plan.training.noise_draws if self.plan.training.noise_draws and epoch >= 0 else epoch

    def _inputs(self, batch: PairBatch, numbers: list[int], sides: int) -> _Inputs:
        images = [batch.winner, batch.loser][:sides]
        draws = [(pair, number) for (pair, _), number in zip(batch.draws, numbers, strict=True)]
        noise, times = draw(self.plan.seed, draws, tuple(batch.winner.shape[1:]), self.process.draw_time)
        noise, times = (_repeat(to_device(each, self.device), sides) for each in (noise, times))
        latents = to_device(torch.cat(images), self.device)
        noisy = self.process.add_noise(latents, noise, times)
        dropped = self._dropped(draws)
        prompts = self._prompts(batch.prompts, dropped).map(lambda each: _repeat(to_device(each, self.device), sides))
        gone = [False] * len(draws) if dropped is None or self.encoders is None else dropped.tolist()
        conditions = Conditions(
            prompts.to(self.device, self.precision), self._sizes(batch, sides), self.plan.training.guidance_input
        )
        return _Inputs(
            noisy.to(self.precision), times, conditions, self.process.target(latents, noise, times),
            self.process.error_factor(times, self.plan.training.error_space), self.process.level(times),
            [None if without else text for text, without in zip(batch.captions, gone, strict=True)],
        )  # fmt: skip

    def _dropped(self, draws: list[tuple[str, int]]) -> torch.Tensor | None:
        """Which draws see the empty prompt, (pairs,) on the CPU. None: no draw does."""
        if self.empty is None or _held_out(draws):
            return None
        keys = [generator_of(f"{self.plan.seed}:prompt:{pair}:{number}") for pair, number in draws]
        return torch.stack([torch.rand((), generator=key) for key in keys]) < self.plan.training.prompt_dropout

    def _prompts(self, prompts: PromptEmbeddings, dropped: torch.Tensor | None) -> PromptEmbeddings:
        """A share of draws sees the empty prompt; both sides of a pair see the same."""
        if self.family.pooled and prompts.pooled is None:
            raise ShardError(
                f"{self.plan.pairs}: no column pooled_embedding, which a {self.family.pipeline} takes; the pairs are "
                "another model's"
            )
        if self.empty is None or dropped is None:
            return prompts
        empty = self.empty

        def replace(each: torch.Tensor) -> torch.Tensor:
            other = empty.tokens if each.ndim == 3 else empty.pooled
            return torch.where(dropped.view(-1, *[1] * (each.ndim - 1)), known(other).to(each), each)

        return prompts.map(replace)

    def _sizes(self, batch: PairBatch, sides: int) -> torch.Tensor | None:
        """Each image's own size and crop, winners first."""
        if self.whole is None:
            return None
        if batch.time_ids is None:
            return self.whole.repeat(sides * len(batch.draws), 1)
        return to_device(batch.time_ids[:, :sides].transpose(0, 1).flatten(0, 1), self.device)

    def _reference_errors(self, inputs: _Inputs, batch: PairBatch, numbers: list[int], sides: int) -> torch.Tensor:
        """(sides, pairs); from what is kept where it is."""
        if self.kept is None or _held_out(batch.draws):
            return self._reference(inputs).view(sides, -1)
        missing = self.kept.missing(batch.indices, numbers)
        if self.anywhere(bool(missing)):
            rows = missing or [0]  # known already, but the other processes need our part of the network
            new = self._reference(inputs.rows(rows, sides)).view(sides, -1)
            if missing:
                self.kept.put([batch.indices[row] for row in rows], [numbers[row] for row in rows], new)
        return self.kept.get(batch.indices, numbers, sides)

    def _reference(self, inputs: _Inputs) -> torch.Tensor:
        with self.policy.reference() as network:
            return self._errors(self._predict(network, self._embed(self.policy.encoders, inputs)), inputs)

    def _embed(self, encoders: torch.nn.Module | None, inputs: _Inputs) -> _Inputs:
        """The same with what the encoders, as they are now, make of the captions: once a pair, for both sides."""
        if encoders is None:
            return inputs
        pairs, before = len(inputs.captions), inputs.conditions.prompts
        with self.autocast():
            found: PromptEmbeddings = encoders(inputs.captions, before[:pairs])
        prompts = found.map(lambda each: _repeat(each, len(before) // pairs)).to(self.device, self.precision)
        return replace(inputs, conditions=inputs.conditions._replace(prompts=prompts))

    def _errors(self, predicted: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
        errors = squared_error(predicted, inputs.target)
        return errors if inputs.factor is None else errors * inputs.factor

    def _alignment(self, predicted: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
        alignment = residual_alignment(predicted, inputs.target)
        return alignment if inputs.factor is None else alignment * inputs.factor[: len(alignment)]

    def _predict(self, network: torch.nn.Module, inputs: _Inputs) -> torch.Tensor:
        with self.autocast():
            return self.family.predict(network, inputs.noisy, inputs.times, inputs.conditions)


def _held_out(draws: list[tuple[str, int]]) -> bool:
    return draws[0][1] < 0


def known(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("the model takes a pooled text embedding, and the empty prompt has none")
    return value


def _by_side(network: str, errors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of `PairErrors` of one network; errors: (sides, pairs)."""
    return {f"{network}_{name}": part for name, part in zip(("winner", "loser"), errors, strict=False)}


def _repeat(each: torch.Tensor, sides: int) -> torch.Tensor:
    return each.repeat(sides, *[1] * (each.ndim - 1))
