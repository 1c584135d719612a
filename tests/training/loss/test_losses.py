"""Every loss against its formula in float64, and the properties that known implementations get wrong."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from training.loss.errors import LossOutput, PairErrors, PairLabels, kappa_of, residual_alignment, squared_error
from training.loss.formulas import diffusion_dpo, ipo, mapo, robust_dpo, safeguarded_dpo
from training.loss.table import LARGEST_WEIGHT, LOSSES, LossOptions, check_options, loss_at_start, preference_loss

pytestmark = pytest.mark.numerical

NEEDED = {"rdpo": LossOptions(label_smoothing=0.1)}
"""Options without which a loss is refused."""
WITH_REFERENCE = [name for name, loss in LOSSES.items() if loss.reference]
WITH_MARGIN = [name for name, loss in LOSSES.items() if loss.loser]
NO_LABELS = PairLabels()
Row = list[float]
"""policy's error of winner and loser, the reference's of both."""


def errors_of(rows: list[Row], alignment: float | None = 0.1) -> PairErrors:
    columns = torch.tensor(rows, dtype=torch.float32).T
    errors = PairErrors(*columns)
    return errors if alignment is None else errors._replace(alignment=torch.full((len(rows),), alignment))


def what_it_needs(name: str, errors: PairErrors) -> PairErrors:
    """Without the fields that the loss says it does not need."""
    loss = LOSSES[name]
    needed = {"loser": loss.loser, "reference": loss.reference, "alignment": loss.alignment}
    dropped = [field for field in errors._fields for part, kept in needed.items() if part in field and not kept]
    return errors._replace(**dict.fromkeys(dropped, None))


def loss_of(name: str, errors: PairErrors, kappa: float = 100.0, labels: PairLabels = NO_LABELS) -> LossOutput:
    options = NEEDED.get(name, LossOptions())
    return preference_loss(name, what_it_needs(name, errors), kappa, options, labels)


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return float(np.logaddexp(0.0, x))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def phi(error: float) -> float:
    return 0.5 * error / math.expm1(0.5 * error) if error else 1.0


def margin64(row: Row, kappa: float) -> float:
    """-kappa * [(m_w - r_w) - (m_l - r_l)] in float64."""
    policy_w, policy_l, reference_w, reference_l = row
    return -kappa * ((policy_w - reference_w) - (policy_l - reference_l))


FORMULAS: dict[str, Callable[[Row, float], float]] = {
    "dpo": lambda row, k: softplus(-margin64(row, k)),
    "rdpo": lambda row, k: (0.9 * softplus(-margin64(row, k)) - 0.1 * softplus(margin64(row, k))) / 0.8,
    "hinge": lambda row, k: max(0.0, 1 - margin64(row, k)),
    "ipo": lambda row, k: k**2 * (margin64(row, k) / k - 1 / (2 * k)) ** 2,
    "sdpo": lambda row, k: softplus(-margin64(row, k)),
    "sft": lambda row, k: row[0],
    "dco": lambda row, k: softplus(k * (row[0] - row[2])),
    "mapo": lambda row, k: row[0] + 0.1 * softplus(-2 * k / 0.5 * (phi(row[0]) - phi(row[1]))),
    "kto": lambda row, k: 0.8 * (1 - sigmoid(-k * (row[0] - row[2]))) + 0.2 * (1 - sigmoid(k * (row[1] - row[3]))),
}
SLOPES = {"ipo": lambda h: 2 * (abs(h) + 0.5), "mapo": lambda h: 0.4, "rdpo": lambda h: 1.25}
"""How fast a loss moves with its margin h, where faster than 1."""
ERRORS = st.lists(st.floats(0, 4, width=32), min_size=4, max_size=4)
PAIRS = st.lists(ERRORS, min_size=1, max_size=8)


def test_every_loss_has_a_formula_here() -> None:
    assert list(FORMULAS) == list(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=60)
@given(rows=PAIRS, beta=st.floats(1, 5000))
def test_equals_its_formula_in_float64(name: str, rows: list[Row], beta: float) -> None:
    kappa = kappa_of(beta)
    loss = loss_of(name, errors_of(rows), kappa).loss
    assert loss.dtype == torch.float32 and loss.shape == (len(rows),)
    for row, found in zip(rows, loss.tolist(), strict=True):
        # The difference of float32 errors of size 4 is exact to 4 * 2^-22; kappa multiplies that.
        slope = SLOPES.get(name, lambda h: 1.0)(margin64(row, kappa))
        assert found == pytest.approx(FORMULAS[name](row, kappa), rel=4e-6, abs=1e-6 + slope * beta * 4 * 2**-22)


@pytest.mark.parametrize("beta", [1.0, 200.0, 5000.0])
def test_dpo_equals_the_published_script_on_the_same_predictions(beta: float) -> None:
    """SalesforceAIResearch/DiffusionDPO: the scale is -0.5 * beta, errors are means over elements, winners first."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(12, 4, 8, 8, generator=generator)
    reference = target + 0.3 * torch.randn(target.shape, generator=generator)
    policy = reference + 0.02 * torch.randn(target.shape, generator=generator)
    of_policy, of_reference = ((each - target).pow(2).mean(dim=[1, 2, 3]).chunk(2) for each in (policy, reference))
    inside = -0.5 * beta * ((of_policy[0] - of_policy[1]) - (of_reference[0] - of_reference[1]))
    published = -1 * F.logsigmoid(inside).mean()
    errors = PairErrors(*squared_error(policy, target).chunk(2), *squared_error(reference, target).chunk(2))
    ours = preference_loss("dpo", errors, kappa_of(beta), LossOptions(), NO_LABELS).loss.mean()
    assert ours.item() == pytest.approx(published.item(), rel=1e-6)
    assert inside.abs().max() > 1e-3 * beta, "the pairs must differ for this to say anything"


@pytest.mark.parametrize("name", WITH_MARGIN)
@settings(deadline=None, max_examples=60)
@given(rows=PAIRS)
def test_swapping_winner_and_loser_negates_the_margin(name: str, rows: list[Row]) -> None:
    swapped = [[row[1], row[0], row[3], row[2]] for row in rows]
    margin, other = (loss_of(name, errors_of(each)).metrics["margin"] for each in (rows, swapped))
    torch.testing.assert_close(margin, -other, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_equal_networks_give_zero_margin_and_half_accuracy(name: str) -> None:
    error = torch.rand(16)
    output = loss_of(name, PairErrors(error, error.flip(0), error, error.flip(0), torch.rand(16) - 0.5), 2500.0)
    assert output.loss.tolist() == pytest.approx([LOSSES[name].at_zero] * 16, abs=1e-7)
    assert output.metrics["implicit_accuracy"].tolist() == [0.5] * 16
    assert output.metrics["margin"].tolist() == [0.0] * 16


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [-0.004, 0.0, 0.004])
def test_a_gradient_step_lowers_the_winners_error_and_raises_the_losers(name: str, gap: float) -> None:
    """The sign error of kohya's PR 1427 and of diffusers' ORPO script, which treat an error as a likelihood."""
    winner, loser = (torch.full((3,), value, requires_grad=True) for value in (1.0 + gap, 1.0))
    errors = PairErrors(winner, loser, torch.ones(3), torch.ones(3), torch.full((3,), 0.5))
    loss_of(name, errors).loss.sum().backward()
    assert winner.grad is not None and (winner.grad > 0).all()
    if LOSSES[name].loser:
        assert loser.grad is not None and (loser.grad < 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_pairs_loss_depends_on_no_other_pair(name: str) -> None:
    """So neither batch size nor accumulation changes the mean. The log-sigmoid of a batch's mean (diffusers 6702,
    diffengine, dco) would, as would a reference point or a gradient scale that is taken over the batch."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.rand(12, 4, generator=generator) * 0.1).tolist()
    apart = torch.cat([_gradients(name, [row]) for row in rows], 1)
    torch.testing.assert_close(_gradients(name, rows), apart, rtol=1e-5, atol=1e-7)


def _gradients(name: str, rows: list[Row]) -> torch.Tensor:
    """Loss, and its gradient by the errors of the policy, (3, pairs)."""
    errors = errors_of(rows)
    sides = [errors.policy_winner.requires_grad_(), errors.policy_loser.requires_grad_()]
    loss = loss_of(name, errors._replace(alignment=errors.policy_winner.detach() - 0.05)).loss
    gradients = torch.autograd.grad(loss.sum(), sides, allow_unused=True)
    return torch.stack([loss.detach(), *(torch.zeros(len(rows)) if g is None else g for g in gradients)])


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_averaged_after_its_curve(name: str) -> None:
    """Two opposite pairs. For dpo the mean of the losses is (log(1+e^-4) + log(1+e^4)) / 2 = 2.018, whereas the loss of
    the mean margin (a bug of several public trees) is ln 2 = 0.693. The function returns them apart."""
    rows = [[0.0, 0.04, 0.0, 0.0], [0.04, 0.0, 0.0, 0.0]]
    loss = loss_of(name, errors_of(rows)).loss
    assert loss.shape == (2,) and loss[0] < loss[1]
    if name == "dpo":
        assert loss.mean().item() == pytest.approx(2.0181499, abs=1e-5)


def test_half_precision_inputs_are_compared_in_float32() -> None:
    """Float16 arithmetic on these numbers is off by about 3e-5; the float64 value is met to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 4, 4, 8, 8, generator=generator).half()
    error, alignment = squared_error(prediction, target), residual_alignment(prediction, target)
    residual = prediction.double() - target.double()
    assert error.dtype == alignment.dtype == torch.float32
    np.testing.assert_allclose(error.numpy(), residual.square().mean((1, 2, 3)).numpy(), rtol=1e-6)
    expected = (residual[:2] * residual[2:]).mean((1, 2, 3))
    np.testing.assert_allclose(alignment.numpy(), expected.numpy(), rtol=1e-5)


def test_error_is_a_mean_over_elements_not_a_sum() -> None:
    """SimpleTuner and the paper's pseudo-code sum, which makes kappa 16,384 times what it says for SD 1.5."""
    assert squared_error(torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)).tolist() == [4.0, 4.0]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
def test_kappa_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match="kappa=-1"):
        loss_of(name, errors_of([[0, 0, 0, 0]]), -1)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_needs_is_asked_for(name: str) -> None:
    if LOSSES[name].reference:
        with pytest.raises(ValueError, match="reference_winner is None"):
            loss_of(name, errors_of([[1, 1, 1, 1]])._replace(reference_winner=None))
    if LOSSES[name].loser:
        with pytest.raises(ValueError, match="policy_loser is None"):
            loss_of(name, errors_of([[1, 1, 1, 1]])._replace(policy_loser=None))


# Labels that are not sure


def dpo_with(rows: list[Row], labels: PairLabels = NO_LABELS, name: str = "dpo", **options: object) -> torch.Tensor:
    return preference_loss(name, errors_of(rows), 100.0, LossOptions(**options), labels).loss  # type: ignore[arg-type]


@settings(deadline=None)
@given(rows=PAIRS)
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_certain_soft_labels_and_no_smoothing_are_the_plain_loss(name: str, rows: list[Row]) -> None:
    sure = PairLabels(soft=torch.ones(len(rows)))
    plain = dpo_with(rows, name=name)
    torch.testing.assert_close(dpo_with(rows, sure, name, soft_labels=True), plain, rtol=0, atol=0)
    torch.testing.assert_close(dpo_with(rows, name=name, label_smoothing=0.0), plain, rtol=0, atol=0)
    exact = diffusion_dpo(errors_of(rows), 100.0) if name == "dpo" else ipo(errors_of(rows), 100.0)
    torch.testing.assert_close(plain, exact.loss, rtol=0, atol=0)


@settings(deadline=None)
@given(row=ERRORS, soft=st.floats(0, 1, width=32), smoothing=st.floats(0, 0.49))
def test_uncertain_labels_are_the_expected_loss(row: Row, soft: float, smoothing: float) -> None:
    labels = PairLabels(soft=torch.tensor([soft]))
    p, h = (1 - smoothing) * soft + smoothing * (1 - soft), margin64(row, 100.0)
    found = dpo_with([row], labels, soft_labels=True, label_smoothing=smoothing)
    assert found.item() == pytest.approx(p * softplus(-h) + (1 - p) * softplus(h), rel=4e-6, abs=1e-3)
    found = dpo_with([row], labels, "ipo", soft_labels=True, label_smoothing=smoothing)
    expected = p * (h - 0.5) ** 2 + (1 - p) * (h + 0.5) ** 2
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=(abs(h) + 1) * 1e-3)


@pytest.mark.parametrize(("name", "soft", "optimum"), [
    ("dpo", 0.5, 0.0), ("dpo", 0.9, math.log(9)), ("dpo", 0.2, -math.log(4)), ("ipo", 0.5, 0.0), ("ipo", 0.9, 0.4),
])  # fmt: skip
def test_the_optimum_lies_where_the_probability_says(name: str, soft: float, optimum: float) -> None:
    """P(winner preferred) = sigmoid(h) under dpo, 1/2 + h under ipo; a soft label of 1/2 pulls to the reference."""
    labels = PairLabels(soft=torch.tensor([soft, soft, soft]))
    at = [[0.0, (optimum + step) / 100.0, 0.0, 0.0] for step in (-0.01, 0.0, 0.01)]
    below, best, above = dpo_with(at, labels, name, soft_labels=True).double().tolist()
    assert best < below and best < above


@settings(deadline=None)
@given(row=ERRORS, flipped=st.floats(0, 0.45))
def test_robust_dpo_is_unbiased_under_flipped_labels(row: Row, flipped: float) -> None:
    right, wrong = errors_of([[v / 100 for v in row]]), errors_of([[v / 100 for v in (row[1], row[0], row[3], row[2])]])
    mean = (1 - flipped) * robust_dpo(right, 100.0, flipped).loss + flipped * robust_dpo(wrong, 100.0, flipped).loss
    assert mean.item() == pytest.approx(diffusion_dpo(right, 100.0).loss.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["dpo", "hinge", "sdpo"])
def test_an_offset_asks_for_a_larger_margin_in_proportion(name: str) -> None:
    rows, labels = [[0.0, 0.01, 0.0, 0.0]] * 2, PairLabels(margin=torch.tensor([1.0, 2.0]))  # h = 1
    found = dpo_with(rows, labels, name, margin_offset=0.5).tolist()
    curve = (lambda x: max(0.0, 1 - x)) if name == "hinge" else (lambda x: softplus(-x))
    assert found == pytest.approx([curve(0.5), curve(0.0)], rel=1e-5)


def test_weights_follow_the_margin_up_to_a_cap() -> None:
    rows, labels = [[0.01, 0.0, 0.0, 0.0]] * 3, PairLabels(margin=torch.tensor([0.5, 2.0, 100.0]))
    plain = dpo_with(rows)[0].item()
    found = dpo_with(rows, labels, margin_weights=True).tolist()
    assert found == pytest.approx([0.5 * plain, 2 * plain, LARGEST_WEIGHT * plain], rel=1e-6)


def test_sft_is_mixed_in_as_the_winners_error_alone() -> None:
    rows = [[0.3, 0.2, 0.1, 0.4]]
    assert (dpo_with(rows, sft_weight=0.25) - dpo_with(rows)).item() == pytest.approx(0.25 * 0.3, rel=1e-4)


# One loss at a time


def test_ipo_stops_where_the_paper_says() -> None:
    """The published target of the error difference is 1 / (2 kappa)."""
    kappa = 2500.0
    at = torch.tensor([0.0], requires_grad=True)
    target = 1 / (2 * kappa)
    loss = ipo(PairErrors(at, at.detach() + target, torch.zeros(1), torch.zeros(1)), kappa).loss
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss.sum(), at)[0].item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9])
def test_sdpo_leaves_the_winner_its_descent(mu: float) -> None:
    """The paper's condition, in the space of predictions: (-gA + lambda gB) . gA <= -mu |gA|^2, for every pair."""
    generator = torch.Generator().manual_seed(1)
    common, own = torch.randn(8, 4, 4, 4, generator=generator), torch.randn(16, 4, 4, 4, generator=generator)
    sign = torch.tensor([1.0, -1.0] * 4).view(8, 1, 1, 1)
    prediction = (torch.cat([common, 3 * sign * common]) + 0.3 * own).requires_grad_()
    target, reference = torch.zeros_like(prediction), torch.ones(8)
    winner, loser = squared_error(prediction, target).chunk(2)
    errors = PairErrors(winner, loser, reference, reference, residual_alignment(prediction, target))
    output, plain = safeguarded_dpo(errors, 0.1, mu), diffusion_dpo(errors, 0.1)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0)
    pull = torch.sigmoid(-output.metrics["margin"]) * 0.1  # what both gradients are multiplied by
    winner, loser = (
        torch.autograd.grad(output.loss.sum(), prediction)[0].flatten(1).div(pull.repeat(2)[:, None]).chunk(2)
    )
    step, own_square = -(winner + loser), winner.square().sum(1)
    assert ((step * winner).sum(1) <= (1e-6 - mu) * own_square).all()
    scale = output.metrics["loser_scale"]
    assert (scale[::2] < 1).all() and (scale[1::2] == 1).all(), "only a loser that resembles the winner is held back"


def test_sdpo_scales_by_the_published_rule() -> None:
    """(1 - mu) |gA|^2 / (gA . gB): the winner's residual is (1, 1), the loser's (2, 0): 0.1 * 2 / 2."""
    prediction, target = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 2)
    winner, loser = squared_error(prediction, target).chunk(2)
    errors = PairErrors(winner, loser, torch.ones(1), torch.ones(1), residual_alignment(prediction, target))
    assert safeguarded_dpo(errors, 1.0, 0.9).metrics["loser_scale"].item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"sdpo_mu=1\.5"):
        safeguarded_dpo(errors, 1.0, 1.5)


def test_mapo_at_kappa_250_is_the_published_loss() -> None:
    """mapo-t2i/mapo: T = 1000, snr 0.5, beta 0.1. Small errors: kappa is the factor on their difference."""
    winner, loser = torch.tensor([0.3]), torch.tensor([0.301])
    published = 0.3 + 0.1 * softplus(-1000 * (phi(0.3) - phi(0.301)))
    assert mapo(PairErrors(winner, loser), 250.0).loss.item() == pytest.approx(published, rel=1e-4)
    small = PairErrors(torch.tensor([0.001]), torch.tensor([0.003]))
    assert mapo(small, 250.0).metrics["margin"].item() == pytest.approx(250 * 0.002, rel=1e-2)


@pytest.mark.parametrize("error", [0.0, 1e-6, 0.19, 0.21, 3.0, 500.0])
def test_mapo_has_an_exact_gradient_everywhere(error: float) -> None:
    """x / (exp(x) - 1) is 0 / 0 at 0, overflows at 89, and loses its float32 gradient near 0."""
    loser = torch.tensor([error], requires_grad=True)
    margin = -torch.log(torch.expm1((mapo(PairErrors(torch.tensor([0.2]), loser), 0.01).loss - 0.2) * 10))
    found = torch.autograd.grad(margin.sum(), loser)[0].item()  # -T dphi/dl, T = 0.04
    x = 0.5 * error
    slope = -0.5 if x < 1e-5 else (math.expm1(x) - x * math.exp(x)) / math.expm1(x) ** 2 if x < 100 else 0.0
    assert found == pytest.approx(-0.04 * 0.5 * slope, rel=2e-3, abs=1e-9)


# Options


@pytest.mark.parametrize(("name", "options", "message"), [
    ("hinge", {"label_smoothing": 0.1}, r"training\.label_smoothing=0\.1.*'hinge'.*dpo, rdpo, ipo"),
    ("kto", {"soft_labels": True}, r"training\.soft_labels=True.*'kto'.*dpo, ipo"),
    ("sft", {"sft_weight": 0.1}, r"training\.sft_weight=0\.1.*'sft'"),
    ("mapo", {"sft_weight": 0.1}, r"training\.sft_weight"),
    ("ipo", {"margin_offset": 1.0}, r"training\.margin_offset=1\.0.*dpo, hinge, sdpo"),
    ("dpo", {"margin_offset": 1.0, "soft_labels": True}, r"training\.margin_offset=1\.0.*soft_labels"),
    ("cpo", {}, r"training\.loss='cpo': there are dpo, "),
    ("rdpo", {}, r"'rdpo' needs training\.label_smoothing"),
    ("dpo", {"label_smoothing": 0.5}, r"training\.label_smoothing=0\.5"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(name, LossOptions(**options))  # type: ignore[arg-type]


def test_where_the_loss_starts_is_known_only_where_it_is_the_same_for_every_pair() -> None:
    assert loss_at_start("dpo", LossOptions(label_smoothing=0.1, soft_labels=True)) == pytest.approx(math.log(2))
    assert loss_at_start("mapo", LossOptions()) is None
    for options in (LossOptions(sft_weight=0.1), LossOptions(margin_offset=1.0), LossOptions(margin_weights=True)):
        assert loss_at_start("dpo", options) is None


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_suit_every_loss(name: str) -> None:
    check_options(name, NEEDED.get(name, LossOptions()))
