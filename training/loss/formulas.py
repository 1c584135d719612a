"""The preference losses, one formula a function. `loss_table` finds them by name.

Pure functions of per-sample errors, (pairs,) float32; the caller reduces. No loss depends on what else is in the batch,
so neither the batch size nor gradient accumulation nor the number of processes changes it. Notation: `losses`. What
kappa is and how the published numbers translate: docs/training.md.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from training.loss.errors import LossOutput, Number, PairErrors, check_kappa, known, pair_metrics

if TYPE_CHECKING:
    import torch

DESIRABLE_SHARE = 0.8
"""Share of liked images in training, as drawn for Diffusion-KTO (arXiv:2404.04465, gamma in its settings)."""
MAPO_SNR, MAPO_WEIGHT = 0.5, 0.1
"""eta, the assumed signal-to-noise ratio, and the weight of the ratio term: defaults of mapo-t2i/mapo."""


def diffusion_dpo(errors: PairErrors, kappa: float, probability: Number = 1.0, offset: Number = 0.0) -> LossOutput:
    """Diffusion-DPO: -log sigmoid(h) a pair (Wallace et al. 2023, arXiv:2311.12908, eq. 14).

    The paper's T * omega(lambda_t) * beta and its sum over elements are folded into kappa, as in the published
    code. probability: that the labelled winner is preferred, -p log sigmoid(h) - (1 - p) log sigmoid(-h); p = 1 - s is
    conservative DPO with label smoothing s (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). offset: the margin, in
    logits, that is asked for before the loss falls off: h - offset in the place of h (Amini et al. 2024,
    arXiv:2402.10571). Raises ValueError unless kappa > 0.
    """
    margin = dpo_margin(errors, kappa)
    return LossOutput(_expected(_log_loss, margin - offset, probability), pair_metrics(errors, margin))


def robust_dpo(errors: PairErrors, kappa: float, flipped: float) -> LossOutput:
    """Robust DPO: [-(1 - s) log sigmoid(h) + s log sigmoid(-h)] / (1 - 2 s), s = flipped the share of wrong labels
    (Chowdhury et al. 2024, arXiv:2403.00409).

    Its mean over labels flipped with probability s is the DPO loss of the true labels. It has no lower bound: a pair of
    ever larger margin goes on being rewarded. Raises ValueError unless kappa > 0 and 0 <= s < 1/2.
    """
    if not 0 <= flipped < 0.5:
        raise ValueError(f"label_smoothing={flipped}: robust DPO needs a share of wrong labels in [0, 0.5)")
    margin = dpo_margin(errors, kappa)
    loss = ((1 - flipped) * _log_loss(margin) - flipped * _log_loss(-margin)) / (1 - 2 * flipped)
    return LossOutput(loss, pair_metrics(errors, margin))


def hinge(errors: PairErrors, kappa: float, offset: Number = 0.0) -> LossOutput:
    """Hinge: max(0, 1 - (h - offset)) a pair (the hinge form of Liu et al. 2023, arXiv:2309.06657, on the margin h).

    A pair whose margin has reached 1 + offset pulls no more. Raises ValueError unless kappa > 0.
    """
    margin = dpo_margin(errors, kappa)
    return LossOutput((1 - (margin - offset)).relu(), pair_metrics(errors, margin))


def ipo(errors: PairErrors, kappa: float, probability: Number = 1.0) -> LossOutput:
    """IPO, scaled: (h - 1/2)^2 a pair = kappa^2 * (-D - 1 / (2 kappa))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    The minimum is the paper's. Unscaled, a target of 1e-4 and gradients as small would be ruled by AdamW's epsilon
    and the weight decay. probability: p (h - 1/2)^2 + (1 - p) (h + 1/2)^2, smallest at h = p - 1/2. Raises ValueError
    unless kappa > 0.
    """
    margin = dpo_margin(errors, kappa)
    return LossOutput(_expected(lambda h: (h - 0.5).square(), margin, probability), pair_metrics(errors, margin))


def safeguarded_dpo(errors: PairErrors, kappa: float, mu: float, offset: Number = 0.0) -> LossOutput:
    """Diffusion-SDPO: Diffusion-DPO in value, with the gradient of the loser's error scaled by lambda so that to first
    order no step raises the winner's error (Fu et al. 2025, arXiv:2511.03317; code: AIDC-AI/Diffusion-SDPO).

    lambda = clip((1 - mu) |r_w|^2 / <r_w, r_l>, 0, 1) where <r_w, r_l> > 0, else 1; r = prediction - target: the rule
    is one for steps in the space of predictions. mu in [0, 1]: the share of the winner's own descent that must remain.
    Each pair has its own lambda; the code has one for a batch, which is the same for one pair and would otherwise make
    the result depend on the batch size. Raises ValueError unless kappa > 0 and 0 <= mu <= 1.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"sdpo_mu={mu}: must be in [0, 1]")
    scale = _loser_scale(errors.policy_winner.detach(), known(errors.alignment, "alignment"), mu)
    loser = known(errors.policy_loser, "policy_loser")
    damped = errors._replace(policy_loser=loser.detach() + scale * (loser - loser.detach()))
    output = diffusion_dpo(damped, kappa, offset=offset)
    return LossOutput(output.loss, output.metrics | {"loser_scale": scale})


def sft(errors: PairErrors) -> LossOutput:
    """Supervised fine-tuning on the winners: l_policy(w), the loss of Ho et al. 2020 (arXiv:2006.11239, eq. 14).

    No reference, no loser, no kappa.
    """
    return LossOutput(errors.policy_winner, pair_metrics(errors, None))


def dco(errors: PairErrors, kappa: float) -> LossOutput:
    """Direct Consistency Optimization on the winners: -log sigmoid(-kappa * [l_policy(w) - l_ref(w)])
    (Lee et al. 2024, arXiv:2402.12004).

    The reference sees the same caption. The sigmoid is taken of each sample; the published code takes it of a batch's
    mean. Its margin is -kappa * [l_policy(w) - l_ref(w)], its accuracy the share of winners drawn better than by the
    reference. Raises ValueError unless kappa > 0.
    """
    check_kappa(kappa)
    margin = -kappa * errors.winner_delta()
    return LossOutput(_log_loss(margin), pair_metrics(errors, margin))


def mapo(errors: PairErrors, kappa: float) -> LossOutput:
    """MaPO: l_policy(w) - 0.1 * log sigmoid(T * [phi(w) - phi(l)]), phi = eta l / (exp(eta l) - 1), without a reference
    (Hong et al. 2024, arXiv:2406.06424; constants of mapo-t2i/mapo).

    T = 2 kappa / eta, which makes kappa the factor on l(l) - l(w) where errors are small, as in the other losses; the
    published T = 1000 at eta = 0.5 is kappa 250. phi falls as the error rises; the raw difference l(w) - l(l) in its
    place would reward the loser. Nothing holds the model to where it started. Raises ValueError unless kappa > 0.
    """
    check_kappa(kappa)
    loser = known(errors.policy_loser, "policy_loser")
    margin = 2 * kappa / MAPO_SNR * (_likelihood_ratio(errors.policy_winner) - _likelihood_ratio(loser))
    return LossOutput(errors.policy_winner + MAPO_WEIGHT * _log_loss(margin), pair_metrics(errors, margin))


def kto(errors: PairErrors, kappa: float) -> LossOutput:
    """Diffusion-KTO: gamma [1 - sigmoid(kappa (g_w - z))] + (1 - gamma) [1 - sigmoid(-kappa (g_l - z))],
    g = l_ref - l_policy of one image (Li et al. 2024, arXiv:2404.04465; the sigmoid as utility).

    Winners count as liked and losers as disliked, each by itself; gamma = DESIRABLE_SHARE weights them as the paper
    samples them. The reference point is z = 0: the paper's max(0, batch mean of g) depends on the batch, is 0 before
    the first step, and stays 0 while both errors rise. Raises ValueError unless kappa > 0.
    """
    winner, loser, share = errors.winner_delta(), errors.loser_delta(), DESIRABLE_SHARE
    loss = share * (kappa * winner).sigmoid() + (1 - share) * (-kappa * loser).sigmoid()
    return LossOutput(loss, pair_metrics(errors, dpo_margin(errors, kappa)))


def dpo_margin(errors: PairErrors, kappa: float) -> "torch.Tensor":
    """h = -kappa * D, (pairs,), in logits. Raises ValueError unless kappa > 0."""
    check_kappa(kappa)
    return -kappa * (errors.winner_delta() - errors.loser_delta())


def _log_loss(margin: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import logsigmoid

    return -logsigmoid(margin)


def _expected(
    loss: "Callable[[torch.Tensor], torch.Tensor]", margin: "torch.Tensor", probability: Number
) -> "torch.Tensor":
    """The loss in expectation when the labelled winner is the better image with this probability."""
    return probability * loss(margin) + (1 - probability) * loss(-margin)


def _loser_scale(winner: "torch.Tensor", alignment: "torch.Tensor", mu: float) -> "torch.Tensor":
    against = alignment > 0  # lowering the loser's quality would then lower the winner's too
    bound = (1 - mu) * winner / alignment.where(against, 1.0)
    return bound.clamp(0, 1).where(against, 1.0)


def _likelihood_ratio(error: "torch.Tensor") -> "torch.Tensor":
    """phi(x) = x / (exp(x) - 1) at x = eta * error, 1 at 0; its series where the quotient would lose its gradient."""
    x = MAPO_SNR * error
    series = 1 - x / 2 + x.square() / 12 - x.pow(4) / 720
    large = x.masked_fill(x < 0.1, 1.0)
    return series.where(x < 0.1, large * (-large).exp() / -(-large).expm1())
