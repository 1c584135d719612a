"""Finds a preference loss by its name, with its options, and knows what it needs: reference, loser, labels.

A new loss is a formula and an entry of `LOSSES`. Importing this module does not load torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from training.loss.errors import LossOutput, Number, PairErrors, PairLabels, known
from training.loss.formulas import dco, diffusion_dpo, hinge, ipo, kto, mapo, robust_dpo, safeguarded_dpo, sft

LARGEST_WEIGHT = 4.0
"""No pair counts more than four pairs of the mean margin do: a scorer's outliers are often its mistakes."""


@dataclass(frozen=True)
class LossOptions:
    """Variants of a loss. Which loss takes which: `LOSSES`.

    label_smoothing: probability in [0, 0.5) that a label is wrong. soft_labels: use `PairLabels.soft`. sft_weight: how
    often the winner's error is added. margin_offset: logits asked of a pair of the mean margin, else in proportion.
    margin_weights: weight each pair by its margin over the mean one, at most LARGEST_WEIGHT. sdpo_mu: see
    `safeguarded_dpo`.
    """

    label_smoothing: float = 0.0
    soft_labels: bool = False
    sft_weight: float = 0.0
    margin_offset: float = 0.0
    margin_weights: bool = False
    sdpo_mu: float = 0.9

    def probability(self, labels: PairLabels) -> Number:
        """That the labelled winner is the better image, after smoothing: (pairs,), or one number for all."""
        sure: Number = known(labels.soft, "soft") if self.soft_labels else 1.0
        return (1 - self.label_smoothing) * sure + self.label_smoothing * (1 - sure)

    def offset(self, labels: PairLabels) -> Number:
        return self.margin_offset * known(labels.margin, "margin") if self.margin_offset else 0.0


@dataclass(frozen=True)
class Loss:
    """A preference loss and what it needs.

    compute: the loss from errors, kappa, options and labels. takes: the options that mean something for it
    (margin_weights does for all, sdpo_mu for sdpo alone). at_zero: the loss of an untrained policy, None where it
    depends on the errors. loser, reference, alignment: whether it needs the loser's errors, the reference's, and
    `PairErrors.alignment`; what it does not need is not computed. Without a reference nothing holds the policy to where
    it started. demands: options without which it is another loss, and what they are.
    """

    compute: Callable[[PairErrors, float, LossOptions, PairLabels], LossOutput]
    takes: tuple[str, ...]
    at_zero: float | None
    loser: bool = True
    reference: bool = True
    alignment: bool = False
    demands: Mapping[str, str] = field(default_factory=dict)


LN_2 = math.log(2)
LOSSES = {
    "dpo": Loss(
        lambda errors, kappa, options, labels: diffusion_dpo(
            errors, kappa, options.probability(labels), options.offset(labels)
        ),
        ("label_smoothing", "soft_labels", "margin_offset", "sft_weight"), LN_2,
    ),
    "rdpo": Loss(
        lambda errors, kappa, options, labels: robust_dpo(errors, kappa, options.label_smoothing),
        ("label_smoothing", "sft_weight"), LN_2, demands={"label_smoothing": "the share of labels that are wrong"},
    ),
    "hinge": Loss(
        lambda errors, kappa, options, labels: hinge(errors, kappa, options.offset(labels)),
        ("margin_offset", "sft_weight"), 1.0,
    ),
    "ipo": Loss(
        lambda errors, kappa, options, labels: ipo(errors, kappa, options.probability(labels)),
        ("label_smoothing", "soft_labels", "sft_weight"), 0.25,
    ),
    "sdpo": Loss(
        lambda errors, kappa, options, labels: safeguarded_dpo(
            errors, kappa, options.sdpo_mu, options.offset(labels)
        ),
        ("margin_offset", "sft_weight"), LN_2, alignment=True,
    ),
    "sft": Loss(
        lambda errors, kappa, options, labels: sft(errors), (), None, loser=False, reference=False
    ),
    "dco": Loss(
        lambda errors, kappa, options, labels: dco(errors, kappa), ("sft_weight",), LN_2, loser=False
    ),
    "mapo": Loss(
        lambda errors, kappa, options, labels: mapo(errors, kappa), (), None, reference=False
    ),
    "kto": Loss(
        lambda errors, kappa, options, labels: kto(errors, kappa), ("sft_weight",), 0.5
    ),
}  # fmt: skip


def preference_loss(
    name: str, errors: PairErrors, kappa: float, options: LossOptions, labels: PairLabels
) -> LossOutput:
    """The loss of each pair (pairs,) and its metrics. Raises ValueError for errors or labels that the loss lacks."""
    loss, metrics = LOSSES[name].compute(errors, kappa, options, labels)
    if options.margin_weights:
        loss = loss * known(labels.margin, "margin").clamp(max=LARGEST_WEIGHT)
    if options.sft_weight:
        loss = loss + options.sft_weight * errors.policy_winner
    return LossOutput(loss, metrics)


def loss_at_start(name: str, options: LossOptions) -> float | None:
    """The loss of a policy that is its reference, None where it depends on the pairs."""
    by_pair = options.sft_weight or options.margin_offset or options.margin_weights
    return None if by_pair else LOSSES[name].at_zero


def check_options(name: str, options: LossOptions) -> None:
    """Raises ValueError for an option that the loss would ignore or that contradicts another; names the parameter."""
    if name not in LOSSES:
        raise ValueError(f"training.loss={name!r}: there are {', '.join(LOSSES)}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"training.label_smoothing={options.label_smoothing}: must be in [0, 0.5)")
    for option in ("label_smoothing", "soft_labels", "sft_weight", "margin_offset"):
        value = getattr(options, option)
        if value and option not in LOSSES[name].takes:
            able = ", ".join(other for other, loss in LOSSES.items() if option in loss.takes)
            raise ValueError(f"training.{option}={value}: means nothing with training.loss={name!r}, but with {able}")
    for option, meaning in LOSSES[name].demands.items():
        if not getattr(options, option):
            raise ValueError(f"training.loss={name!r} needs training.{option} > 0, {meaning}")
    if options.margin_offset and options.soft_labels:
        raise ValueError(
            f"training.margin_offset={options.margin_offset}: not together with training.soft_labels, which say "
            "already how sure a preference is"
        )
