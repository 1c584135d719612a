"""Runs the flow in a process of its own, so that it can be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys
from flows.full_cycle import full_cycle
full_cycle(**json.loads(sys.argv[1]))
"""


def start(api_url: str, arguments: str, log: Path) -> "subprocess.Popen[bytes]":
    """The flow with JSON parameters, against a running server."""
    environment = os.environ | {"PREFECT_API_URL": api_url, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", CODE, arguments], cwd=ROOT, env=environment, stdout=file, stderr=file
        )


def kill_when(process: "subprocess.Popen[bytes]", happened: Callable[[], bool], seconds: float = 150.0) -> None:
    """SIGKILL as soon as `happened`. Fails when the process ends first or nothing happens in time."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, f"ended with {process.returncode} before it could be killed"
        assert time.monotonic() < end, "what the kill waits for did not happen"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
