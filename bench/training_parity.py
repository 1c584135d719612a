"""A peer's own steps done again by our loss: by how much the losses and the gradients differ."""

from typing import NamedTuple
from unittest import mock

import torch

from bench.training_peers import Step
from training.loop.dataset import PairBatch
from training.loop.run import Run
from training.model.family import PromptEmbeddings


class Difference(NamedTuple):
    """Largest over some steps. loss: absolute. gradient: |ours - theirs| / |theirs|, Euclidean over all tensors.

    losses: theirs, of each step. norms: of their gradients.
    """

    loss: float
    gradient: float
    losses: list[float]
    norms: list[float]

    def told(self) -> str:
        apart = f"largest difference of the loss {self.loss:.1e}, of the gradient {self.gradient:.1e} of its norm"
        losses, norms = (f"{min(each):.3g} to {max(each):.3g}" for each in (self.losses, self.norms))
        return f"{len(self.losses)} steps, losses {losses}, gradient norms {norms}: {apart}"


def compare(run: Run, steps: list[Step], as_theirs: bool = True) -> Difference:
    """as_theirs: in the memory layout of theirs and in training mode, where dropout of nothing still changes layouts.
    Ours are channels last and evaluation mode; sums are then rounded in another order.
    """
    for network in (run.policy.network, getattr(run.policy, "_reference", None)):
        if network is not None:
            network.to(memory_format=torch.contiguous_format if as_theirs else torch.channels_last).train(as_theirs)
    losses, gradients = zip(*(_apart(run, step) for step in steps), strict=True)
    norms = [_norm(step.gradients) for step in steps]
    return Difference(max(losses), max(gradients), [float(step.loss) for step in steps], norms)


def _apart(run: Run, step: Step) -> tuple[float, float]:
    count = len(step.latents) // 2
    run.policy.load({_ours(name): value for name, value in step.weights.items()})
    with mock.patch("training.loop.pair_loss.draw", lambda *_: (step.noise[:count], step.times[:count])):
        loss = run.loss(_batch(step, count)).loss.sum() / count
    loss.backward()
    found = {name: p.grad for name, p in run.policy.network.named_parameters() if p.grad is not None}
    apart = {name: found[_ours(name)].cpu() - value for name, value in step.gradients.items()}
    run.policy.network.zero_grad()
    return abs(loss.item() - float(step.loss)), _norm(apart) / _norm(step.gradients)


def _ours(name: str) -> str:
    """The scripts' adapter is called `default`."""
    return name.replace(".default.", ".policy.")


def _batch(step: Step, count: int) -> PairBatch:
    sizes = None if step.time_ids is None else torch.stack(step.time_ids.float().chunk(2), 1)
    pooled, unknown = None if step.pooled is None else step.pooled[:count], torch.full((count,), torch.nan)
    return PairBatch(
        winner=step.latents[:count], loser=step.latents[count:],
        prompts=PromptEmbeddings(step.tokens[:count], pooled), time_ids=sizes, soft_label=unknown, margin=unknown,
        draws=[(str(index), 0) for index in range(count)], indices=list(range(count)), captions=[""] * count,
    )  # fmt: skip


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm().item()
