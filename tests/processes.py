"""Runs functions in processes of their own that are forked from one that has done the imports.

Importing torch, diffusers and peft takes 7 seconds of a core; a tiny training takes one.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["tests.training.worlds", "training.loop.trainer", "accelerate", "pandas", "peft", "open_clip",
         "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]  # fmt: skip
"""What the process that forks imports; "pandas" because pyarrow looks for it."""


def start(
    target: Callable[..., object],
    *arguments: object,
    log: Path,
    environment: Mapping[str, str] | None = None,
    preload: Sequence[str] = HEAVY,
) -> ForkServerProcess:
    """`target(*arguments)` in a process of its own, with these variables; what it writes is added to `log`.

    target: a function of a module. preload: modules; it counts in the first call, which starts the process that forks.
    Nothing of this process is inherited: no thread, no lock, no variable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    process = context.Process(target=_run, args=(target, arguments, str(log), dict(environment or {})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # without it Python 3.11 skips our part of the preload in silence
        process.start()
    return process


def _run(target: Callable[..., object], arguments: tuple[Any, ...], log: str, environment: dict[str, str]) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    target(*arguments)


def run_together(
    count: int, target: Callable[..., object], *arguments: object, log: Path, environment: Mapping[str, str]
) -> None:
    """`target(*arguments)` in `count` processes that know of each other as torchrun tells them; all must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared = {**environment, **size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [start(target, *arguments, log=log, environment=shared | rank) for rank in ranks]
    for process in started:
        process.join(200)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count, f"{codes}\n{log.read_text()[-3000:]}"
