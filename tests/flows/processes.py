"""Runs the flow in a process of its own, so that it can be killed."""

import json
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests import processes
from tests.flows.quiet import quiet


def start(api_url: str, arguments: str, log: Path) -> ForkServerProcess:
    """The flow with JSON parameters, against a running server."""
    return processes.start(_run, api_url, arguments, log=log, preload=[*processes.HEAVY, "flows.full_cycle"])


def _run(api_url: str, arguments: str) -> None:
    from flows.full_cycle import full_cycle

    with quiet(api_url):
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
