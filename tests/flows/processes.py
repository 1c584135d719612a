"""Runs the flow in a process of its own, so that it can be killed."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["flows.full_cycle", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "open_clip", "peft"]
"""Imported once, in the process from which all others are forked: that takes longer than a tiny cycle."""


def start(api_url: str, arguments: str, log: Path) -> ForkServerProcess:
    """The flow with JSON parameters, against a running server (the same one in every call)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=_run, args=(arguments, str(log)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", api_url)
        patch.setenv("PYTHONUNBUFFERED", "1")
        patch.setenv("PYTHONPATH", str(ROOT))  # without it Python 3.11 skips our part of the preload in silence
        process.start()
    return process


def _run(arguments: str, log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from flows.full_cycle import full_cycle

    full_cycle(**json.loads(arguments))


def kill_when(process: ForkServerProcess, happened: Callable[[], bool], seconds: float = 150.0) -> None:
    """SIGKILL as soon as `happened`. Fails when the process ends first or nothing happens in time."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.is_alive(), f"ended with {process.exitcode} before it could be killed"
        assert time.monotonic() < end, "what the kill waits for did not happen"
        time.sleep(0.002)
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
