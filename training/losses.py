"""Preference losses of diffusion models: pure functions of per-sample errors. The caller reduces.

Notation: l(x) = mean over latent elements of |prediction - target|^2, in float32, one number a sample;
D = [l_policy(w) - l_ref(w)] - [l_policy(l) - l_ref(l)], good when negative; h = -kappa * D.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairErrors(NamedTuple):
    """Errors of both networks on both images of each pair, with the same noise and timestep. Each (pairs,) float32."""

    policy_winner: torch.Tensor
    policy_loser: torch.Tensor
    reference_winner: torch.Tensor
    reference_loser: torch.Tensor


class LossOutput(NamedTuple):
    """loss (pairs,) and the pair's metrics, each (pairs,) and detached."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (n,) float32.

    Both sides are made float32 before the difference: rounding a half-precision error of 0.1 to 0.3 adds
    noise of 0.06 to 0.25 to the logit at beta 5000.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def kappa_of(beta: float) -> float:
    """The factor on the mean-squared-error difference: beta / 2.

    `beta` is in the convention of SalesforceAIResearch/DiffusionDPO (`-0.5 * beta * D`, errors averaged over
    elements). Other trees call other things beta; kappa is what two runs can be compared by.
    """
    return 0.5 * beta


def diffusion_dpo(errors: PairErrors, kappa: float) -> LossOutput:
    """Diffusion-DPO: -log sigmoid(-kappa * D) a pair (Wallace et al. 2023, arXiv:2311.12908, eq. 14).

    The paper's T * omega(lambda_t) * beta and its sum over elements are folded into kappa, as in the published
    code. Raises ValueError unless kappa > 0.
    """
    if not kappa > 0:
        raise ValueError(f"kappa={kappa}: must be positive; beta = 2 * kappa")
    winner = errors.policy_winner - errors.reference_winner
    loser = errors.policy_loser - errors.reference_loser
    margin = -kappa * (winner - loser)
    return LossOutput(-F.logsigmoid(margin), _metrics(margin, winner, loser))


def _metrics(margin: torch.Tensor, winner: torch.Tensor, loser: torch.Tensor) -> dict[str, torch.Tensor]:
    """implicit_accuracy counts an exactly zero margin as half right, as it is before the first step."""
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    metrics = {"implicit_accuracy": accuracy, "margin": margin}
    metrics |= {"winner_error_delta": winner, "loser_error_delta": loser}
    return {name: value.detach() for name, value in metrics.items()}
