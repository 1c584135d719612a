"""Loaded models: released at once, by a collection only where a cycle holds them."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import models
from tests.training.worlds import make_plan
from training.loop import run, trainer
from training.model.reference import ModelRef


class Scorer:
    """A scorer with a network of its own; tied: the network is part of a cycle."""

    def __init__(self, tied: bool) -> None:
        self.network = torch.nn.Linear(2, 2)
        if tied:
            self.network.forward = self.network.forward  # as accelerate and its like do


@pytest.fixture(autouse=True)
def _no_other_collection() -> Iterator[None]:
    """Nothing is collected but by the code under test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    models._loaded.clear()


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The collections that were asked for; each is done."""
    asked: list[int] = []
    real = gc.collect
    monkeypatch.setattr(models.gc, "collect", lambda: asked.append(real()))
    return asked


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_in_a_cycle_is_collected_any_other_goes_by_itself(tied: bool, collections: list[int]) -> None:
    network = weakref.ref(models._keep("key", lambda: Scorer(tied)).network)
    models.release()
    assert network() is None and len(collections) == int(tied)


def test_nothing_loaded_nothing_done(collections: list[int]) -> None:
    models.release()
    assert not collections


def test_a_pipeline_goes_without_a_collection(tiny_preset: Path, collections: list[int]) -> None:
    pipeline = models.pipeline_for(ModelRef(str(tiny_preset.parent / "base")), "cpu", "auto")
    parts = [weakref.ref(part) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]
    del pipeline
    models.release()
    assert [part() for part in parts] == [None] * 3 and not collections


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_trained_network_is_gone_after_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Under bf16 accelerate ties the network to itself, so that nothing else frees it."""
    seen: list[weakref.ref[torch.nn.Module]] = []
    save = run.Run.save

    def spy(running: run.Run, *rest: Any) -> None:
        seen.append(weakref.ref(running.network))
        save(running, *rest)

    monkeypatch.setattr(run.Run, "save", spy)
    trainer.train(make_plan(tmp_path, steps=2, mixed_precision=precision))
    models.collect()
    assert seen and all(network() is None for network in seen)
