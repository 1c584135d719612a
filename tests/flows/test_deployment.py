"""The deployment as a user drives it: server, pool, worker, schedule, `prefect deployment run`, and a clean end."""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.serve import ui_origins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An empty Prefect home and a free port; whatever was started is stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    bin_folder = str(Path(sys.executable).parent)
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }
    values = os.environ | own
    yield values
    serve("down", values)


def serve(command: str, environment: dict[str, str], *extra: str) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", "flows.serve", command, *extra]
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def prefect(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["prefect", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def processes(home: str) -> list[str]:
    """Command lines of all living processes that were given this Prefect home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [command for command in found if command]


@pytest.mark.timeout(400)
def test_up_schedules_nights_runs_one_at_a_time_and_down_leaves_nothing(
    environment: dict[str, str], tiny_preset: Path, tmp_path: Path
) -> None:
    up = serve("up", environment)
    assert up.returncode == 0, up.stdout + up.stderr
    a_foreign_page_is_refused(environment["PREFECT_API_URL"])
    given = ["--param", f"preset={tiny_preset}", "--param", f"workspace={tmp_path}"]
    bad = prefect(environment, "deployment", "run", "rlaif/full-cycle", "--param", 'generation={"candidates": 1}')
    assert bad.returncode == 1 and "candidates" in bad.stdout + bad.stderr
    for scorer in ("hpsv2", "nope"):  # the second has to wait for the first, and is then refused
        run = prefect(environment, "deployment", "run", "rlaif/full-cycle", *given, "--param", f"scorer={scorer}")
        assert run.returncode == 0, run.stdout + run.stderr
    good, refused = wait_for_two(environment)
    assert good["state_type"] == "COMPLETED"
    assert refused["state_type"] == "FAILED" and refused["start_time"] > good["end_time"], "two runs at once"
    message = refused["state"]["message"]
    assert "scorer='nope'" in message and "hpsv2" in message and "pickscore" in message
    plan = json.loads((tmp_path / "default" / "cycles" / "0001" / "plan.json").read_text())
    assert plan["recipe"]["scorer"] == "hpsv2"
    assert not (tmp_path / "default" / "cycles" / "0002").exists()
    a_stage_runs_alone(environment, tmp_path / "default" / "cycles" / "0001")
    scheduled = [run for run in flow_runs(environment) if run["auto_scheduled"] and run["state_type"] == "SCHEDULED"]
    assert len(scheduled) >= 1, "the cron schedule made no runs (see the pins of SQLAlchemy and fastapi)"
    down = serve("down", environment)
    assert "stopped worker and server" in down.stdout
    assert processes(environment["PREFECT_HOME"]) == []


def a_stage_runs_alone(environment: dict[str, str], cycle: Path) -> None:
    """Evaluated again, once the file is gone, from what is there; the same verdicts come out."""
    results = cycle / "evaluation" / "results.json"
    before = results.read_text()
    results.unlink()
    call = ["deployment", "run", "evaluate/cycle", "--param", f"cycle={cycle}", "--watch", "--watch-timeout", "120"]
    run = prefect(environment, *call)
    assert run.returncode == 0, run.stdout + run.stderr
    assert results.read_text() == before


def a_foreign_page_is_refused(api: str) -> None:
    """What a browser would ask for a page of another origin, and for the UI. A page may send a POST of plain text
    without asking first, and only the token stops that one; what it may read, the server's headers decide."""
    ui, foreign = api.removesuffix("/api"), "https://elsewhere.example"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origin in (ui, foreign):
        preflight = httpx.options(f"{api}/flow_runs/", headers={"Origin": origin, **asked}, timeout=30)
        read = httpx.get(f"{api}/csrf-token", params={"client": "page"}, headers={"Origin": origin}, timeout=30)
        allowed = {answer.headers.get("access-control-allow-origin") for answer in (preflight, read)}
        assert allowed == ({ui} if origin == ui else {None})
    page = httpx.post(f"{api}/flows/filter", content="{}", headers={"Origin": foreign}, timeout=30)
    assert page.status_code == 403 and "CSRF" in page.text


def test_bare_prefect_commands_start_a_server_that_is_closed_as_well() -> None:
    settings = tomllib.loads((ROOT / "prefect.toml").read_text())
    api = settings["server"]["api"]
    assert api["csrf_protection_enabled"] is True
    assert set(api["cors_allowed_origins"].split(",")) == set(ui_origins(settings["api"]["url"]))


def flow_runs(environment: dict[str, str]) -> list[dict[str, Any]]:
    """Every run of the flow `rlaif` that the server knows."""
    wanted = {"flows": {"name": {"any_": ["rlaif"]}}}
    api, client = environment["PREFECT_API_URL"], {"Prefect-Csrf-Client": "tests"}
    token = httpx.get(f"{api}/csrf-token", params={"client": "tests"}, timeout=30).raise_for_status().json()["token"]
    answer = httpx.post(
        f"{api}/flow_runs/filter", json=wanted, headers={**client, "Prefect-Csrf-Token": token}, timeout=30
    )
    runs: list[dict[str, Any]] = answer.raise_for_status().json()
    return runs


def wait_for_two(environment: dict[str, str], seconds: float = 250) -> list[dict[str, Any]]:
    """The two runs that were asked for by hand, when both have ended, in the order of their start."""
    end = time.monotonic() + seconds
    while True:
        runs = [run for run in flow_runs(environment) if not run["auto_scheduled"] and run["end_time"]]
        if len(runs) == 2:
            return sorted(runs, key=lambda run: run["start_time"])
        assert time.monotonic() < end, [(run["name"], run["state_name"]) for run in flow_runs(environment)]
        time.sleep(1)


@pytest.mark.timeout(400)
def test_one_command_runs_a_cycle_and_leaves_nothing_running(
    environment: dict[str, str], tiny_preset: Path, tmp_path: Path
) -> None:
    given = ["--param", f"preset={tiny_preset}", "--param", f"workspace={tmp_path}"]
    leave_a_dead_run(environment)
    done = serve("cycle", environment, *given)
    report = tmp_path / "default" / "cycles" / "0001" / "report.html"
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {report}" in done.stdout and report.is_file()
    assert "train: " in done.stdout + done.stderr or "trained: " in done.stdout + done.stderr
    assert processes(environment["PREFECT_HOME"]) == []


def leave_a_dead_run(environment: dict[str, str]) -> None:
    """What a power cut leaves: a run that says RUNNING although its process is gone. It would hold the only place."""
    code = """
import sys
from prefect.client.orchestration import get_client
from prefect.states import Running
from flows import serve
from flows.processes import running, stop
serve.prepare()
serve.start_server()
serve.deploy()
with get_client(sync_client=True) as client:
    deployment = client.read_deployment_by_name(serve.DEPLOYMENT)
    run = client.create_flow_run_from_deployment(deployment.id)
    client.set_flow_run_state(run.id, Running(), force=True)
stop(running("server"), 30)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
