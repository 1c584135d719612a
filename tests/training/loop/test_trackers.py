"""Trackers: what TensorBoard's files hold afterwards, on resuming too, and names that are refused before training."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.loop.trackers import TRACKERS, check_trackers, tracking


def write(folder: Path, first: int, steps: Mapping[int, float], names: tuple[str, ...] = ("tensorboard",)) -> None:
    with tracking(
        names, folder, "night/0001", {"learning_rate": 1e-4, "targets": ["to_q"], "loss": "dpo"}, first
    ) as log:
        for step, loss in steps.items():
            log(step, {"step": step, "loss": loss, "margin_q1": math.nan if step % 2 else 1.0})


def curve(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = events.Scalars(name)
    assert len({event.step for event in found}) == len(found), "a step is there twice"
    return {event.step: event.value for event in found}


def test_tensorboard_holds_the_numbers_at_their_steps(tmp_path: Path) -> None:
    write(tmp_path, 0, {step: 1 / step for step in range(1, 6)})
    assert curve(tmp_path, "loss") == pytest.approx({step: 1 / step for step in range(1, 6)})
    assert curve(tmp_path, "margin_q1") == {2: 1.0, 4: 1.0}, "what is not finite is left out"


def test_the_settings_are_shown_beside_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, {1: 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate = 0.0001" in text and "targets = ['to_q']" in text
    assert [path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == [], "no second run"


@pytest.mark.parametrize("first", [0, 4])
def test_a_resumed_run_goes_on_in_the_same_curve(tmp_path: Path, first: int) -> None:
    """Steps after the checkpoint are done again: they replace the old ones, and those up to it stay."""
    write(tmp_path, 0, {step: 1.0 for step in range(1, 8)})
    write(tmp_path, first, {step: 2.0 for step in range(first + 1, 10)})
    assert curve(tmp_path, "loss") == {step: 1.0 if step <= first else 2.0 for step in range(1, 10)}


def test_two_runs_of_one_process_do_not_mix(tmp_path: Path) -> None:
    """A worker trains many plans, each with an Accelerator of its own, and one may fail."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    for name, precision in (("a", "no"), ("b", "bf16")):
        AcceleratorState._reset_state(reset_partial_state=False)
        Accelerator(cpu=True, mixed_precision=precision)
        with pytest.raises(FloatingPointError), tracking(("tensorboard",), tmp_path / name, name, {}, 0) as log:
            log(1, {"loss": 1.0 if name == "a" else 2.0})
            raise FloatingPointError
    assert curve(tmp_path / "a", "loss") == {1: 1.0} and curve(tmp_path / "b", "loss") == {1: 2.0}


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 0, {1: 0.5}, names=())
    assert list(tmp_path.iterdir()) == []


def test_the_names_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    available = {str(tracker) for tracker in get_available_trackers()}
    assert "tensorboard" in available
    for name in TRACKERS:
        if name in available:
            check_trackers([name])
        else:
            with pytest.raises(ValueError, match=f"'{name}'.*pip install {TRACKERS[name]}"):
                check_trackers([name])


def test_unknown_names_and_repetitions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"execution\.trackers: 'tensorbord' is unknown; there are tensorboard, wandb"):
        check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match="named twice"):
        check_trackers(["tensorboard", "tensorboard"])
