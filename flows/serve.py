"""Starts and stops what the deployment needs: `python -m flows.serve up | down | cycle [--param k=v ...]`.

up: server, UI, worker and nightly schedule in the background. down: stops them. cycle: one full cycle through
`prefect deployment run`, with everything it needs started before and stopped after.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENT = "rlaif/full-cycle"
POOL = "rlaif"
ELSEWHERE = -1  # in place of a process id: the run's process is another machine's, and not ours to judge
UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")
START_SECONDS = 240  # the first start migrates an empty database: 20 s on a quiet machine, far more on a busy one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["up", "down", "cycle"])
    command, extra = parser.parse_known_args()
    _environment()
    if command.command == "cycle":
        return cycle(extra)
    if extra:
        parser.error(f"unknown arguments: {' '.join(extra)}")
    return up() if command.command == "up" else down()


def _environment() -> None:
    """The project keeps its Prefect state to itself, under .prefect/, unless the user says otherwise."""
    os.chdir(ROOT)
    os.environ["PWD"] = str(ROOT)  # prefect.yaml takes the runs' working folder from it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
    os.environ.setdefault("PREFECT_API_URL", tomllib.loads((ROOT / "prefect.toml").read_text())["api"]["url"])
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home().mkdir(parents=True, exist_ok=True)


def home() -> Path:
    return Path(os.environ["PREFECT_HOME"])


def say(text: str) -> None:
    print(f"rlaif: {text}", flush=True)


# Background processes ---------------------------------------------------------------------------------


def _spawn(name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a background process in its own session; its output goes to .prefect/<name>.log."""
    with (home() / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    (home() / f"{name}.pid").write_text(str(process.pid))
    return process


def _alive(name: str) -> int | None:
    """The process id that `_spawn` wrote, when such a process of ours still runs."""
    file = home() / f"{name}.pid"
    if not file.is_file():
        return None
    try:
        pid = int(file.read_text())
        os.kill(pid, 0)
        ours = not Path("/proc").is_dir() or b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if ours else None  # the number may have been given to another process since


def _stop(name: str, seconds: float = 30.0) -> bool:
    """Ask the background process to end, then insist; True when there was one."""
    pid = _alive(name)
    (home() / f"{name}.pid").unlink(missing_ok=True)
    if pid is None:
        return False
    # A worker asked once drains its run and stays; the second request ends it.
    for request in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        _signal_group(pid, request)
        if _gone(pid, seconds if request == signal.SIGTERM else 5.0):
            return True
    return True


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return True
        except ChildProcessError:  # started by an earlier command, so not our child
            if not Path(f"/proc/{pid}").exists():
                return True
        time.sleep(0.2)
    return False


# Server, pool, deployment, worker ---------------------------------------------------------------------


def _healthy() -> bool:
    import httpx

    try:
        return httpx.get(f"{os.environ['PREFECT_API_URL']}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def ui_origins(api_url: str) -> list[str]:
    """The origins under which a browser on this machine may have opened the UI: all that the API answers."""
    place = urlparse(api_url)
    hosts = dict.fromkeys([str(place.hostname), "127.0.0.1", "localhost"])
    return [f"{place.scheme}://{host}:{place.port or 4200}" for host in hosts]


def start_server() -> bool:
    """True when started here; False when one answers already at PREFECT_API_URL."""
    url = os.environ["PREFECT_API_URL"]
    if _healthy():
        say(f"using the Prefect server at {url}")
        return False
    place = urlparse(url)
    if _taken(str(place.hostname), place.port or 4200):
        raise SystemExit(
            f"rlaif: port {place.port} is taken by something that is no Prefect server; "
            "set PREFECT_API_URL, for example to http://127.0.0.1:4299/api"
        )
    say(f"starting a Prefect server at {url} (about 20 seconds the first time)")
    command = ["prefect", "server", "start", "--host", str(place.hostname), "--port", str(place.port or 4200)]
    os.environ["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] = ",".join(ui_origins(url))
    process = _spawn("server", command)
    started = told = time.monotonic()
    while not _healthy():
        now = time.monotonic()
        if process.poll() is not None or now - started > START_SECONDS:
            _stop("server", 5)
            raise SystemExit(f"rlaif: the Prefect server did not start; see {home() / 'server.log'}")
        if now - told > 5:
            told = now
            say(f"  still starting ({now - started:.0f} s)")
        time.sleep(0.5)
    return True


def deploy() -> None:
    """Create the pool (one run at a time) and apply prefect.yaml; both may be done again at any time."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))
    say(f"deploying {DEPLOYMENT}")
    command = ["prefect", "--no-prompt", "deploy", "--all"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"rlaif: prefect deploy failed:\n{result.stdout}{result.stderr}")


def _our_runs(client: "SyncPrefectClient", *states: str) -> "list[FlowRun]":
    """The deployment's runs in any of these states (SCHEDULED, PENDING, RUNNING, CANCELLING ...)."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    kinds = FlowRunFilterStateType(any_=[StateType(state) for state in states])
    wanted = FlowRunFilter(state=FlowRunFilterState(type=kinds))
    ours = DeploymentFilter(name=DeploymentFilterName(any_=[DEPLOYMENT.split("/")[1]]))
    return client.read_flow_runs(flow_run_filter=wanted, deployment_filter=ours)


def clear_left_overs() -> None:
    """Before a worker of ours starts: what was left behind while none ran.

    Nightly runs whose hour passed would all start at once now. A run whose process is gone (kill -9, power cut)
    would hold the pool's only place for ever, since nobody was there to report it.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        missed = [run for run in _our_runs(client, "SCHEDULED") if _missed(run)]
        for run in missed:
            client.delete_flow_run(run.id)
        dead = [run for run in _our_runs(client, *UNFINISHED) if _process(run) is None]
        for run in dead:
            _report_crash(client, run)
    if missed:
        say(f"dropped {len(missed)} nightly runs that were missed while no worker ran")
    if dead:
        say(f"{len(dead)} runs had ended without a word; the same parameters resume them")


def stop_runs() -> None:
    """End the processes of unfinished runs: a run outlives its worker, and its work is kept."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for run in _our_runs(client, *UNFINISHED):
            pid = _process(run)
            if pid == ELSEWHERE:
                continue
            if pid is not None:
                say(f"stopping run {run.name}; the same parameters resume it")
                _signal_group(pid, signal.SIGTERM)
                if not _gone(pid, 10):
                    _signal_group(pid, signal.SIGKILL)
                    _gone(pid, 10)
            _report_crash(client, run)


def _process(run: "FlowRun") -> int | None:
    """The living process of a run on this machine, as its worker recorded it ("host:pid")."""
    host, _, pid = (run.infrastructure_pid or "").rpartition(":")
    if host not in ("", socket.gethostname()):
        return ELSEWHERE
    try:
        os.kill(int(pid), 0)
        return int(pid)
    except (OSError, ValueError):
        return None


def _report_crash(client: "SyncPrefectClient", run: "FlowRun") -> None:
    from prefect.states import Crashed

    client.set_flow_run_state(run.id, Crashed(message="its process is gone; the same parameters resume it"), force=True)


def _missed(run: "FlowRun") -> bool:
    due = run.next_scheduled_start_time
    return bool(run.auto_scheduled and due and due < datetime.now(UTC))


def _worker_command() -> list[str]:
    return ["prefect", "worker", "start", "--pool", POOL, "--limit", "1", "--name", "rlaif"]


def up() -> int:
    start_server()
    deploy()
    if _alive("worker"):
        say("the worker runs already")
    else:
        clear_left_overs()
        _spawn("worker", _worker_command())
    url = os.environ["PREFECT_API_URL"].removesuffix("/api")
    say(f"up. UI: {url}   nightly at 02:00 UTC   logs: {home()}/*.log")
    say(f"run one now with: prefect deployment run {DEPLOYMENT} --watch     stop with: make down")
    return 0


def down() -> int:
    stopped = []
    if _alive("worker"):
        _stop("worker", 3)
        stopped.append("worker")
    if _healthy():
        stop_runs()
    if _stop("server"):
        stopped.append("server")
    say(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running")
    return 0


# One cycle --------------------------------------------------------------------------------------------


def cycle(extra: Sequence[str]) -> int:
    """Start what is missing, run the deployment, show its output to the end, stop what was started here."""
    began = time.time()
    own_server = not _healthy()
    try:
        start_server()
        deploy()
        with _worker() as worker:
            run, state, message = _wait(_submit(extra), worker)
    finally:
        if own_server:
            if _healthy():
                stop_runs()
            _stop("server")
    say(f"{state} after {time.time() - began:.0f} s{': ' + message if message and state != 'Completed' else ''}")
    if state == "Completed":
        for report in _reports(run, began):
            say(f"report: {report}")
    return 0 if state == "Completed" else 1


@contextmanager
def _worker() -> "Iterator[subprocess.Popen[bytes] | None]":
    """A worker in the foreground of this terminal, unless `make up` keeps one."""
    if _alive("worker"):
        say("the worker of `make up` takes the run; its output is in the UI")
        yield None
        return
    clear_left_overs()
    process = subprocess.Popen(_worker_command(), start_new_session=True)
    try:
        yield process
    finally:
        for request in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            _signal_group(process.pid, request)
            if _gone(process.pid, 5):
                break


def _submit(extra: Sequence[str]) -> UUID:
    command = ["prefect", "deployment", "run", DEPLOYMENT, "--job-variable", "stream_output=true", *extra]
    say(f"prefect deployment run {' '.join([DEPLOYMENT, *extra])}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", result.stdout)
    if result.returncode or not found:
        raise SystemExit(f"rlaif: the run was refused:\n{result.stdout}{result.stderr}")
    return UUID(found.group())


def _wait(run: UUID, worker: "subprocess.Popen[bytes] | None") -> "tuple[FlowRun, str, str]":
    """The run, and name and message of its final state. Interrupted, the run is stopped and can be resumed."""
    import httpx
    from prefect.client.orchestration import get_client

    answered = time.monotonic()
    with get_client(sync_client=True) as client:
        while True:
            try:
                found = client.read_flow_run(run)
                answered = time.monotonic()
            except httpx.HTTPError:  # a busy server may miss a beat
                if time.monotonic() - answered > 60:
                    raise
            else:
                if found.state is not None and found.state.is_final():
                    return found, str(found.state.name), found.state.message or ""
            if worker is not None and worker.poll() is not None:
                raise SystemExit(f"rlaif: the worker ended with {worker.returncode}; run the same command again")
            time.sleep(1)


def _reports(run: "FlowRun", began: float) -> list[Path]:
    """The reports that the run wrote."""
    given = run.parameters
    folder = Path(given.get("workspace", "workspace")).expanduser() / given.get("experiment", "default") / "cycles"
    reports = sorted(folder.resolve().glob("*/report.html"))
    return [report for report in reports if report.stat().st_mtime >= began] or reports[-1:]


if __name__ == "__main__":
    sys.exit(main())
