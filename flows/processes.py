"""The processes of the deployment on this machine: Prefect's server and worker, found again and stopped for good.

`prefect server start --background` is not used: what that server says is lost, a `kill -9` leaves a pid file behind
that refuses the next start, and `prefect server stop` does not wait for the end. So both run in a session of their
own, write to a log, and are found by what they are: a Prefect command with this PREFECT_HOME.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ELSEWHERE = "elsewhere"


def home() -> Path:
    """Prefect's folder of this project: database, logs."""
    return Path(os.environ["PREFECT_HOME"])


def spawn(name: str, command: Sequence[str]) -> psutil.Popen:
    """Start a background process in a session of its own; its output goes to PREFECT_HOME/<name>.log."""
    with (home() / f"{name}.log").open("ab") as log:
        return psutil.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip


def running(kind: str) -> psutil.Process | None:
    """This project's Prefect `server` or `worker`, if one runs on this machine."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words = process.cmdline()
            if words[2:4] == [kind, "start"] and process.environ().get("PREFECT_HOME") == str(home()):
                return process
    return None


def stop(process: psutil.Process, patience: float) -> None:
    """Ask the process and its group to end, twice, `patience` seconds each, then insist.

    Twice, since a worker that is asked once drains its run and stays; the second request ends it.
    """
    for request in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        if not psutil.wait_procs([process], timeout=patience)[1]:
            return


def recorded(place: str | None) -> psutil.Process | str | None:
    """The living process that a worker recorded as "host:pid"; ELSEWHERE when it is another machine's, not ours to
    judge."""
    host, _, pid = (place or "").rpartition(":")
    if host not in ("", socket.gethostname()):
        return ELSEWHERE
    try:
        process = psutil.Process(int(pid))
        return process if process.status() != psutil.STATUS_ZOMBIE else None
    except (ValueError, psutil.Error):
        return None
