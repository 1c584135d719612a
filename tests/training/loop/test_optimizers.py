"""Optimizers: what a step does and that it goes on after a restart; schedules and averages against closed forms."""

import importlib.util
import io
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.loop.ema import Ema
from training.loop.optimizers import OPTIMIZERS, SCHEDULES, check_optimizer, learning_rate, make_optimizer

pytestmark = pytest.mark.numerical

HERE = [name for name in OPTIMIZERS if name != "adamw-8bit"]  # that one needs a package of its own
RUNS = st.tuples(st.sampled_from(SCHEDULES), st.integers(1, 400), st.integers(0, 100), st.floats(1e-9, 1.0))


def trained(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: range) -> None:
    for step in steps:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6).clone())


@pytest.mark.parametrize("name", HERE)
def test_the_first_step_is_the_learning_rate_a_weight(name: str) -> None:
    """Both divide the gradient by the root of its own square at the first step: AdamW by each weight's, which leaves
    the sign; Adafactor by the factored one, which is the same for a gradient of rank one."""
    weight = parameter()
    before, gradient = weight.detach().clone(), torch.tensor([[1.0], [-2.0], [3.0], [-4.0]]) * torch.ones(4, 6)
    weight.grad = gradient.clone()
    make_optimizer(name, [weight], 1e-3, 0.0, fused=False).step()
    torch.testing.assert_close(weight.detach() - before, -1e-3 * gradient.sign(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", HERE)
def test_a_zero_matrix_moves_too(name: str) -> None:
    """Half of a LoRA starts at 0; torch's own Adafactor scales its steps by 1e-3 there."""
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    weight.grad = torch.ones(4, 6)
    make_optimizer(name, [weight], 1e-2, 0.0, fused=False).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), -1e-2))


@pytest.mark.parametrize("name", HERE)
def test_weight_decay_is_decoupled(name: str) -> None:
    weight = parameter()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    make_optimizer(name, [weight], 0.1, 0.5, fused=False).step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("name", HERE)
def test_state_survives_a_restart(name: str) -> None:
    """Through a file that is read without unpickling objects, as checkpoints are."""
    whole, cut = parameter(), parameter()
    trained(make_optimizer(name, [whole], 1e-2, 0.1, fused=False), whole, range(6))
    first = make_optimizer(name, [cut], 1e-2, 0.1, fused=False)
    trained(first, cut, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_optimizer(name, [cut], 1e-2, 0.1, fused=False)
    second.load_state_dict(torch.load(file, weights_only=True))
    trained(second, cut, range(3, 6))
    assert torch.equal(whole, cut)


def test_fused_steps_are_the_same() -> None:
    slow, fast = parameter(), parameter()
    for weight, fused in ((slow, False), (fast, True)):
        trained(make_optimizer("adamw", [weight], 1e-2, 0.1, fused), weight, range(3))
    torch.testing.assert_close(slow, fast)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.optimizer='adamw8': there are adamw, adamw-8bit, adafactor"):
        check_optimizer("adamw8", "cuda:0")
    with pytest.raises(ValueError, match="runs on cuda and cpu, not 'mps'; use adamw or adafactor"):
        check_optimizer("adamw-8bit", "mps")
    for name in HERE:
        check_optimizer(name, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_named() -> None:
    for device in ("cuda:0", "cpu"):
        with pytest.raises(ValueError, match=r"adamw-8bit.*pip install bitsandbytes"):
            check_optimizer("adamw-8bit", device)


@pytest.mark.parametrize(("version", "able"), [("0.50.2", True), ("1.0.0", True), ("0.49.0", False), ("0.9.1", False)])
def test_8_bits_on_a_cpu_need_a_version_that_has_them(
    monkeypatch: pytest.MonkeyPatch, version: str, able: bool
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    check_optimizer("adamw-8bit", "cuda:0")
    if able:
        return check_optimizer("adamw-8bit", "cpu")
    with pytest.raises(ValueError, match=rf"on a CPU needs bitsandbytes 0\.50 or later, here is {version}.*adafactor"):
        check_optimizer("adamw-8bit", "cpu")


def test_a_recipe_is_checked_without_torch() -> None:
    lines = [
        "from training.loop.optimizers import check_optimizer, check_schedule",
        "from training.loop.trackers import check_trackers",
        "import sys, training.loop.diagnostics",
        "check_optimizer('adafactor', 'cpu'), check_schedule('cosine'), check_trackers(['tensorboard'])",
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])",
    ]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@given(RUNS)
def test_rates_rise_to_the_peak_and_then_only_fall(run: tuple[str, int, int, float]) -> None:
    schedule, steps, warmup, peak = run
    rates = [learning_rate(schedule, step, steps, warmup, peak) for step in range(steps)]
    assert all(0 < rate <= peak for rate in rates), "no step is wasted at a rate of 0"
    top = min(warmup, steps)
    assert rates[:top] == pytest.approx([peak * (step + 1) / warmup for step in range(top)])
    after = rates[max(0, warmup - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after))
    if warmup < steps:
        assert rates[warmup] == peak == rates[max(0, warmup - 1)], "no jump at the end of the warm-up"
    if schedule == "constant":
        assert set(after) <= {peak}


@given(st.sampled_from(["linear", "cosine"]), st.integers(20, 400), st.floats(1e-9, 1.0))
def test_decaying_rates_end_near_zero(schedule: str, steps: int, peak: float) -> None:
    """One step before 0: linear 1 / steps of the peak, cosine (pi / 2 / steps)^2."""
    last = learning_rate(schedule, steps - 1, steps, 0, peak)
    expected = 1 / steps if schedule == "linear" else math.sin(math.pi / 2 / steps) ** 2
    assert last == pytest.approx(peak * expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_they_are_the_schedules_of_diffusers(schedule: str, warmup: int) -> None:
    """Theirs warm up one step later, beginning with a step of rate 0; after warm-up they are the same."""
    from diffusers.optimization import get_scheduler

    steps, peak = 40, 3e-4
    optimizer = torch.optim.SGD([parameter()], lr=peak)
    kind = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(schedule, step, steps, warmup, peak) for step in range(steps)]
    assert ours[: max(0, warmup - 1)] == pytest.approx(rates[1 : max(1, warmup)])
    assert ours[warmup:] == pytest.approx(rates[warmup:])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.schedule='cosin': there are constant, linear, cosine"):
        learning_rate("cosin", 0, 10, 0, 1.0)


def values(updates: int) -> list[torch.Tensor]:
    return [torch.tensor([math.sin(step), step * 1.0]) for step in range(updates + 1)]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_the_weighted_sum(decay: float) -> None:
    """sum_k (1 - d_k) p_k prod_{j > k} d_j, and the start times prod d_j; d_k = min(decay, (1 + k) / (10 + k))."""
    points = values(12)
    ema = Ema({"w": points[0]}, decay)
    for point in points[1:]:
        ema.update({"w": point})
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(12)]
    weights = [math.prod(decays)] + [(1 - decays[k]) * math.prod(decays[k + 1 :]) for k in range(12)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(weight * point for weight, point in zip(weights, points, strict=True))
    torch.testing.assert_close(ema.weights()["w"], expected)


def test_it_is_kept_in_float32() -> None:
    """In bfloat16 an average at 1 would not see steps of 0.1 % of a difference of 1."""
    ema = Ema({"w": torch.ones(1, dtype=torch.bfloat16)}, 0.999)
    ema.updates = 10**6  # warm-up is over
    for _ in range(1000):
        ema.update({"w": torch.zeros(1, dtype=torch.bfloat16)})
    assert ema.weights()["w"].item() == pytest.approx(0.999**1000, rel=1e-3)


def test_it_goes_on_after_a_restart() -> None:
    points = values(8)
    whole, cut, resumed = (Ema({"w": points[0]}, 0.9) for _ in range(3))
    for point in points[1:]:
        whole.update({"w": point})
    for point in points[1:5]:
        cut.update({"w": point})
    file = io.BytesIO()
    torch.save(cut.state(), file)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    for point in points[5:]:
        resumed.update({"w": point})
    assert torch.equal(whole.weights()["w"], resumed.weights()["w"])


def test_tensors_of_other_names_are_refused() -> None:
    ema = Ema({"w": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match=r"other tensors than these: \['v', 'w'\]"):
        ema.update({"v": torch.ones(1)})
    with pytest.raises(ValueError, match=r"training\.ema=1\.0: must be in \[0, 1\)"):
        Ema({}, 1.0)
