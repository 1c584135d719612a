"""What every preference loss is made of: errors of each pair, its labels, and the numbers that are logged.

Notation, here and in `formulas`: l(x) = mean over latent elements of |prediction - target|^2, in float32, one
number a sample; D = [l_policy(w) - l_ref(w)] - [l_policy(l) - l_ref(l)], good when negative; margin h = -kappa * D.
"""

from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

if TYPE_CHECKING:
    import torch

Number: TypeAlias = Union["torch.Tensor", float]
"""(pairs,), or one number for all."""


class PairErrors(NamedTuple):
    """Errors l of both networks on both images of each pair, with the same noise and timestep. Each (pairs,) float32.

    None: not computed, since the loss does not need it. alignment: see `residual_alignment`.
    """

    policy_winner: "torch.Tensor"
    policy_loser: "torch.Tensor | None" = None
    reference_winner: "torch.Tensor | None" = None
    reference_loser: "torch.Tensor | None" = None
    alignment: "torch.Tensor | None" = None

    def winner_delta(self) -> "torch.Tensor":
        """l_policy(w) - l_ref(w), (pairs,). Raises ValueError without a reference."""
        return self.policy_winner - known(self.reference_winner, "reference_winner")

    def loser_delta(self) -> "torch.Tensor":
        """l_policy(l) - l_ref(l), (pairs,). Raises ValueError without a reference or a loser."""
        return known(self.policy_loser, "policy_loser") - known(self.reference_loser, "reference_loser")


class PairLabels(NamedTuple):
    """What is known of each pair's label beyond who won. Each (pairs,) float32, None where nobody asks for it.

    soft: probability in [0, 1] that the labelled winner is preferred. margin: the scorer's margin, in units of the mean
    margin of the training set.
    """

    soft: "torch.Tensor | None" = None
    margin: "torch.Tensor | None" = None


class LossOutput(NamedTuple):
    """loss (pairs,) and the pair's metrics, each (pairs,) and detached."""

    loss: "torch.Tensor"
    metrics: "dict[str, torch.Tensor]"


def known(value: "torch.Tensor | None", name: str) -> "torch.Tensor":
    """The value, or a ValueError that says what is missing."""
    if value is None:
        raise ValueError(f"{name} is None, and the loss needs it")
    return value


def squared_error(prediction: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
    """Mean squared error of each sample, (n,) float32.

    Both sides are made float32 before the difference: rounding a half-precision error of 0.1 to 0.3 adds
    noise of 0.06 to 0.25 to the logit at beta 5000.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def residual_alignment(prediction: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
    """<r_w, r_l> / elements of each pair, (pairs,) float32, detached; r = prediction - target.

    prediction, target: (2 * pairs, ...), all winners first. Up to a factor it is the inner product of the gradients of
    the two errors with respect to the two predictions; <r_w, r_w> / elements is l(w) itself.
    """
    winner, loser = (prediction.detach().float() - target.float()).flatten(1).chunk(2)
    return (winner * loser).mean(1)


def kappa_of(beta: float) -> float:
    """The factor on the mean-squared-error difference: beta / 2, whatever the loss.

    `beta` is in the convention of SalesforceAIResearch/DiffusionDPO (`-0.5 * beta * D`, errors averaged over
    elements). Other trees call other things beta; kappa is what two runs can be compared by.
    """
    return 0.5 * beta


def check_kappa(kappa: float) -> None:
    """Raises ValueError unless kappa > 0."""
    if not kappa > 0:
        raise ValueError(f"kappa={kappa}: must be positive; beta = 2 * kappa")


def pair_metrics(errors: PairErrors, margin: "torch.Tensor | None") -> "dict[str, torch.Tensor]":
    """What is logged of each pair, detached: with a reference how far each error is from it, else the errors.

    margin (pairs,): what the loss wants to be large, None where it compares nothing. implicit_accuracy counts an
    exactly zero margin as half right, as it is before the first step.
    """
    metrics: dict[str, torch.Tensor] = {}
    if margin is not None:
        metrics["implicit_accuracy"] = (margin > 0).float() + 0.5 * (margin == 0).float()
        metrics["margin"] = margin
    for side in ("winner", "loser"):
        policy, reference = getattr(errors, f"policy_{side}"), getattr(errors, f"reference_{side}")
        if policy is not None and reference is not None:
            metrics[f"{side}_error_delta"] = policy - reference
        elif policy is not None:
            metrics[f"{side}_error"] = policy
    return {name: value.detach() for name, value in metrics.items()}
