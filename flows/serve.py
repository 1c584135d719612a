"""Starts and stops what the deployment needs: `rlaif cycle | up | down`, or `python -m flows.serve cycle`.

up: server, UI, worker and nightly schedule in the background. down: stops them. cycle: one full cycle through the
deployment, with everything it needs started before and stopped after.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlparse

import psutil
import typer

from flows.processes import ELSEWHERE, home, recorded, running, spawn, stop

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENT = "rlaif/full-cycle"
POOL = "rlaif"
WORKER = ["prefect", "worker", "start", "--pool", POOL, "--limit", "1", "--name", "rlaif"]
UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")
START_SECONDS = 240  # the first start migrates an empty database: 20 s on a quiet machine, far more on a busy one

app = typer.Typer(
    help="Start and stop what the deployment needs.", add_completion=False, pretty_exceptions_enable=False
)


def prepare() -> None:
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


def failure(reason: str) -> typer.Exit:
    """Tells why the command cannot go on; to be raised."""
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(2)


def say(text: str) -> None:
    """Tell the user what happens."""
    print(f"rlaif: {text}", flush=True)


# Server, pool, deployments ----------------------------------------------------------------------------


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
        raise failure(
            f"port {place.port} is taken by something that is no Prefect server; "
            "set PREFECT_API_URL, for example to http://127.0.0.1:4299/api"
        )
    say(f"starting a Prefect server at {url} (about 20 seconds the first time)")
    command = ["prefect", "server", "start", "--host", str(place.hostname), "--port", str(place.port or 4200)]
    os.environ["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] = ",".join(ui_origins(url))
    process = spawn("server", command)
    started = told = time.monotonic()
    while not _healthy():
        now = time.monotonic()
        if process.poll() is not None or now - started > START_SECONDS:
            stop(process, 5)
            raise failure(f"the Prefect server did not start; see {home() / 'server.log'}")
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
    say("deploying")
    command = ["prefect", "--no-prompt", "deploy", "--all"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise failure(f"prefect deploy failed:\n{result.stdout}{result.stderr}")


def _our_runs(client: "SyncPrefectClient", *states: str) -> "list[FlowRun]":
    """The pool's runs, of any deployment, in any of these states (SCHEDULED, PENDING, RUNNING, CANCELLING ...)."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType

    kinds = FlowRunFilterStateType(any_=[StateType(state) for state in states])
    wanted = FlowRunFilter(state=FlowRunFilterState(type=kinds))
    return client.read_flow_runs(
        flow_run_filter=wanted, work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    )


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
        dead = [run for run in _our_runs(client, *UNFINISHED) if recorded(run.infrastructure_pid) is None]
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
            process = recorded(run.infrastructure_pid)
            if process == ELSEWHERE:
                continue
            if isinstance(process, psutil.Process):
                say(f"stopping run {run.name}; the same parameters resume it")
                stop(process, 5)
            _report_crash(client, run)


def _report_crash(client: "SyncPrefectClient", run: "FlowRun") -> None:
    from prefect.states import Crashed

    client.set_flow_run_state(run.id, Crashed(message="its process is gone; the same parameters resume it"), force=True)


def _missed(run: "FlowRun") -> bool:
    due = run.next_scheduled_start_time
    return bool(run.auto_scheduled and due and due < datetime.now(UTC))


@app.command()
def up() -> None:
    """Start server, UI, worker and the nightly schedule in the background."""
    prepare()
    start_server()
    deploy()
    if running("worker"):
        say("the worker runs already")
    else:
        clear_left_overs()
        spawn("worker", WORKER)
    url = os.environ["PREFECT_API_URL"].removesuffix("/api")
    say(f"up. UI: {url}   nightly at 02:00 UTC   logs: {home()}/*.log")
    say(f"run one now with: prefect deployment run {DEPLOYMENT} --watch     stop with: rlaif down")


@app.command()
def down() -> None:
    """Stop what `up` started. A run that is stopped goes on where it was when it is started again."""
    prepare()
    stopped = []
    if worker := running("worker"):
        stop(worker, 3)
        stopped.append("worker")
    if _healthy():
        stop_runs()
    if server := running("server"):
        stop(server, 30)
        stopped.append("server")
    say(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running")


# One cycle --------------------------------------------------------------------------------------------


@app.command()
def cycle(
    param: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Of the cycle; a value is JSON.")] = [],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="For state and reports.")] = None,
) -> None:
    """Run one full cycle, show its output to the end, and stop what was started for it; 1 when it does not complete."""
    prepare()
    parameters, began = _parameters(param), time.time()
    own_server = not _healthy()
    try:
        start_server()
        deploy()
        with _worker() as worker:
            run, state, message = _wait(_submit(parameters), worker)
    finally:
        if own_server:
            if _healthy():
                stop_runs()
            if server := running("server"):
                stop(server, 30)
    reports = _reports(run, began) if state == "Completed" else []
    say(f"{state} after {time.time() - began:.0f} s{': ' + message if message and state != 'Completed' else ''}")
    for report in reports:
        say(f"report: {report}")
    if json_file:
        ended = {"run": str(run.id), "state": state, "message": message, "reports": [*map(str, reports)]}
        json_file.write_text(json.dumps(ended, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if state == "Completed" else 1)


def _parameters(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as `prefect deployment run` reads it: a value is JSON, or else a text."""
    parameters = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE", param_hint="--param")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


@contextmanager
def _worker() -> Iterator[psutil.Popen | None]:
    """A worker in the foreground of this terminal, unless `rlaif up` keeps one."""
    if running("worker"):
        say("the worker of `rlaif up` takes the run; its output is in the UI")
        yield None
        return
    clear_left_overs()
    process = psutil.Popen(WORKER, start_new_session=True)
    try:
        yield process
    finally:
        stop(process, 5)


def _submit(parameters: Mapping[str, Any]) -> "UUID":
    """Ask for a run. Ends the command with 2 when Prefect refuses the parameters, with its reason."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    say(f"prefect deployment run {' '.join([DEPLOYMENT, *(f'--param {k}={v!r}' for k, v in parameters.items())])}")
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        known = (deployment.parameter_openapi_schema or {}).get("properties", {})
        if unknown := sorted(set(parameters) - set(known)):
            raise failure(f"the run was refused: {unknown[0]!r} is no parameter; there are {', '.join(known)}")
        try:
            run = client.create_flow_run_from_deployment(
                deployment.id, parameters=dict(parameters), job_variables={"stream_output": True}
            )
        except PrefectHTTPStatusError as error:
            raise failure(f"the run was refused: {error.response.text}") from error
    return run.id


def _wait(run_id: "UUID", worker: psutil.Popen | None) -> "tuple[FlowRun, str, str]":
    """The run, and name and message of its final state. Interrupted, the run is stopped and can be resumed.

    The state is asked for each second, since Prefect's own wait hears of it by an event: it would wait for ever after
    one that was lost, and for a worker that has ended.
    """
    import httpx
    from prefect.client.orchestration import get_client

    answered = time.monotonic()
    with get_client(sync_client=True) as client:
        while True:
            try:
                run = client.read_flow_run(run_id)
                answered = time.monotonic()
            except httpx.HTTPError:  # a busy server may miss a beat
                if time.monotonic() - answered > 60:
                    raise
            else:
                if run.state is not None and run.state.is_final():
                    return run, str(run.state.name), run.state.message or ""
            if worker is not None and worker.poll() is not None:
                raise failure(f"the worker ended with {worker.returncode}; run the same command again")
            time.sleep(1)


def _reports(run: "FlowRun", began: float) -> list[Path]:
    """The reports that the run wrote."""
    given = run.parameters
    folder = Path(given.get("workspace", "workspace")).expanduser() / given.get("experiment", "default") / "cycles"
    reports = sorted(folder.resolve().glob("*/report.html"))
    return [report for report in reports if report.stat().st_mtime >= began] or reports[-1:]


if __name__ == "__main__":
    app()
