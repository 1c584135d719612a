"""Numbers of a training: means over the pairs of a step and of all processes, and over the end of a run."""

from collections.abc import Callable, Sequence

import torch

from training.loss.errors import LossOutput

Metrics = dict[str, float]
"""One step's numbers, as they are logged."""


def means(
    outputs: Sequence[LossOutput],
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows: int | None = None,
    norm: torch.Tensor | None = None,
) -> Metrics:
    """Means over the pairs of all processes, and the gradient's norm, in one transfer from the device.

    reduce: adds a tensor up over the processes, None = there is one. rows: how many of this process's pairs count, the
    first ones; None = all. A metric that is NaN for a pair does not concern it; a loss that is NaN is the news.
    """
    names = ["loss", *outputs[0].metrics]
    columns = [torch.cat([output.loss for output in outputs])]
    columns += [torch.cat([output.metrics[name] for output in outputs]) for name in names[1:]]
    values = torch.stack(columns).double()[:, :rows]
    concerned = ~values.isnan()
    concerned[0] = True
    sums = torch.stack([values.where(concerned, 0.0).sum(1), concerned.double().sum(1)])
    if reduce is not None:
        sums = reduce(sums)
    if norm is not None:
        names = [*names, "grad_norm"]
        sums = torch.cat([sums, torch.stack([norm, torch.ones_like(norm)])[:, None]], 1)
    totals, counts = sums.tolist()
    return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}


def final_metrics(history: Sequence[Metrics]) -> Metrics:
    """Each metric's mean over the last tenth of the steps: single steps are dominated by the timestep drawn."""
    tail = history[-max(1, len(history) // 10) :]
    names = dict.fromkeys(name for metrics in tail for name in metrics if name != "step")
    values = {name: [metrics[name] for metrics in tail if name in metrics] for name in names}
    return {name: sum(own) / len(own) for name, own in values.items()}
