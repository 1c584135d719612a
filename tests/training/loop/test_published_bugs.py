"""Bugs that public preference trainers ship, and the test of ours that each one turns red.

Fast: every line that a bug would change is still there. Slow (`make test-slow`): each bug is put into a copy of the
code, and its tests must fail there and pass without it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("data", "training", "scoring", "tasks", "flows", "shapes", "recipes", "tests")


class Bug(NamedTuple):
    """seen: where. file, right, wrong: what turns our code into it. test: what must notice, as pytest selects it."""

    seen: str
    file: str
    right: str
    wrong: str
    test: str


LOSSES, LOSS_TESTS = "training/loss/formulas.py", "tests/training/loss/test_losses.py"
PAIR_LOSS, RUN = "training/loop/pair_loss.py", "training/loop/run.py"
BUGS = {
    "the sigmoid of a batch's mean": Bug(
        "huggingface/diffusers#6702, okotaku/diffengine", LOSSES,
        "    return -logsigmoid(margin)", "    return -logsigmoid(margin.mean()).expand_as(margin)",
        f"{LOSS_TESTS}::test_the_loss_is_averaged_after_its_curve",
    ),
    "errors taken for likelihoods": Bug(
        "kohya-ss/sd-scripts#1427", LOSSES,
        "    return -kappa * (errors.winner_delta()", "    return kappa * (errors.winner_delta()",
        f"{LOSS_TESTS}::test_a_gradient_step_lowers_the_winners_error_and_raises_the_losers",
    ),
    "the raw difference of errors without a reference": Bug(
        "train_diffusion_orpo_sdxl_lora.py of huggingface/diffusers", LOSSES,
        "(_likelihood_ratio(errors.policy_winner) - _likelihood_ratio(loser))", "(errors.policy_winner - loser)",
        f"{LOSS_TESTS}::test_a_gradient_step_lowers_the_winners_error_and_raises_the_losers",
    ),
    "IPO's target for another scale": Bug(
        "IPO of huggingface/diffusers and kohya-ss/sd-scripts#1427", LOSSES,
        "(h - 0.5).square()", "(h - 0.5 / kappa).square()", f"{LOSS_TESTS}::test_ipo_stops_where_the_paper_says",
    ),
    "errors summed over elements": Bug(
        "pseudo-code S9 of arXiv:2311.12908 with the code's beta", "training/loss/errors.py",
        ".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)",
        f"{LOSS_TESTS}::test_error_is_a_mean_over_elements_not_a_sum",
    ),
    "beta without its half": Bug(
        "huggingface/diffusers#6788", "training/loss/errors.py",
        "    return 0.5 * beta", "    return beta",
        f"{LOSS_TESTS}::test_dpo_equals_the_published_script_on_the_same_predictions",
    ),
    "errors in half precision": Bug(
        "the reference of SalesforceAIResearch/DiffusionDPO", "training/loss/errors.py",
        "(prediction.float() - target.float()).square()", "(prediction - target).square()",
        f"{LOSS_TESTS}::test_half_precision_inputs_are_compared_in_float32",
    ),
    "zero margins counted as wrong": Bug(
        "SalesforceAIResearch/DiffusionDPO", "training/loss/errors.py",
        "(margin > 0).float() + 0.5 * (margin == 0).float()", "(margin > 0).float()",
        f"{LOSS_TESTS}::test_equal_networks_give_zero_margin_and_half_accuracy",
    ),
    "adapters in the network's half precision": Bug(
        "train_diffusion_dpo.py of huggingface/diffusers under bf16", "training/loop/lora_policy.py",
        "            parameter.data = parameter.data.float()", "            pass",
        "tests/training/loop/test_trainer.py::test_adapter_weights_train_in_float32_under_a_half_precision_base",
    ),
    "other noise for the loser": Bug(
        "asked in SalesforceAIResearch/DiffusionDPO#3", PAIR_LOSS,
        "        latents = to_device(torch.cat(images), self.device)\n",
        "        noise = torch.cat([noise[: len(draws)], *[noise[: len(draws)].flip(0)] * (sides - 1)])\n"
        "        latents = to_device(torch.cat(images), self.device)\n",
        "tests/training/loop/test_trainer.py::test_winner_and_loser_share_noise_and_timestep",
    ),
    "winner and loser with captions dropped apart": Bug(
        "Nerogar/OneTrainer#1403", PAIR_LOSS,
        "lambda each: _repeat(to_device(each, self.device), sides))",
        "lambda each: torch.cat([to_device(one, self.device) for one in (each, each.roll(1, 0))[:sides]]))",
        "tests/training/loop/test_run_options.py::test_dropped_prompts_are_dropped_for_both_sides_at_the_rate_asked_for",
    ),
    "time ids of another picture": Bug(
        "Nerogar/OneTrainer#1403, train.py of SalesforceAIResearch/DiffusionDPO", PAIR_LOSS,
        "batch.time_ids[:, :sides].transpose(0, 1).flatten(0, 1)", "batch.time_ids[:, :sides].flatten(0, 1)",
        "tests/training/loop/test_family_training.py::test_each_picture_has_its_own_size_and_the_pair_its_pooled_embedding",
    ),
    "the reference moved by a resume": Bug(
        "Nerogar/OneTrainer#1403", RUN,
        '        if "reference" in state.tensors:\n'
        '            self.policy.load_reference(state.tensors["reference"])\n',
        "        self.policy.refresh_reference() if self.plan.training.method == 'full' else None\n",
        "tests/training/loop/test_trainer.py::test_a_resumed_run_is_bit_equal_to_an_undisturbed_one",
    ),
    "gradients not clipped under Adafactor": Bug(
        "SDXL of SalesforceAIResearch/DiffusionDPO", RUN,
        "self.policy.parameters(), training.max_grad_norm)",
        "self.policy.parameters(), training.max_grad_norm if training.optimizer == 'adamw' else 1e9)",
        "tests/training/loop/test_run_options.py::test_gradients_are_clipped_under_every_optimizer",
    ),
    "quartiles of a thousand steps whatever the schedule": Bug(
        "Nerogar/OneTrainer#1403", "training/model/noise.py",
        "        return times / self.steps", "        return times / 1000",
        "tests/training/loop/test_flow_matching.py::test_levels_are_shares_of_the_schedule",
    ),
    "ties as wins of the first picture": Bug(
        "train_diffusion_dpo.py of huggingface/diffusers", "data/columns.py",
        "pa.scalar(0.5, pa.float32())", "pa.scalar(0.25, pa.float32())",
        "tests/data/test_columns.py::test_trainable_rows_have_a_decision_between_different_images_that_is_no_tie",
    ),
    "features of transformers 5 not unwrapped": Bug(
        "Lightning-AI/torchmetrics#3407", "scoring/scorers/transformers_clip.py",
        "output if isinstance(output, torch.Tensor) else output.pooler_output", "output",
        "tests/scoring/scorers/test_pickscore.py::test_both_returns_of_transformers_are_understood",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_there_is_one_place_for_each(bug: Bug) -> None:
    """Or the slow test would put the bug nowhere, or into something else."""
    assert (ROOT / bug.file).read_text().count(bug.right) == 1
    file, name = bug.test.split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code, to be broken."""
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_each_is_noticed(copy: Path, bug: Bug) -> None:
    assert _passes(copy, bug.test), "fails without the bug as well"
    file = copy / bug.file
    text = file.read_text()
    file.write_text(text.replace(bug.right, bug.wrong))
    try:
        assert not _passes(copy, bug.test), f"{bug.test} does not notice: {bug.seen}"
    finally:
        file.write_text(text)


def _passes(folder: Path, test: str) -> bool:
    """Whether every case of a test passes. Anything but passing and failing, such as no test at all, is an error."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 0
