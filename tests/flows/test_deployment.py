"""The deployment as a user drives it: server, pool, worker, schedule, `prefect deployment run`, and a clean end."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    given = ["--param", f"preset={tiny_preset}", "--param", f"workspace={tmp_path}"]
    bad = prefect(environment, "deployment", "run", "rlaif/full-cycle", "--param", 'generation={"candidates": 1}')
    assert bad.returncode == 1 and "candidates" in bad.stdout + bad.stderr
    for experiment in ("a", "b"):
        run = prefect(
            environment, "deployment", "run", "rlaif/full-cycle", *given, "--param", f"experiment={experiment}"
        )
        assert run.returncode == 0, run.stdout + run.stderr
    finished = [tmp_path / experiment / "cycles" / "0001" / "finished.json" for experiment in ("a", "b")]
    end = time.monotonic() + 200
    while not all(path.is_file() for path in finished):
        assert time.monotonic() < end, prefect(environment, "flow-run", "ls").stdout
        both = [(path.parent / "plan.json").is_file() and not path.is_file() for path in finished]
        assert not all(both), "two runs at once"
        time.sleep(0.5)
    runs = json.loads(prefect(environment, "flow-run", "ls", "--limit", "50", "-o", "json").stdout)
    scheduled = [run for run in runs if run.get("auto_scheduled") and run["state_type"] == "SCHEDULED"]
    assert len(scheduled) >= 1, "the cron schedule made no runs (see the pins of SQLAlchemy and fastapi)"
    down = serve("down", environment)
    assert "stopped worker and server" in down.stdout
    assert processes(environment["PREFECT_HOME"]) == []


@pytest.mark.timeout(400)
def test_one_command_runs_a_cycle_and_leaves_nothing_running(
    environment: dict[str, str], tiny_preset: Path, tmp_path: Path
) -> None:
    given = ["--param", f"preset={tiny_preset}", "--param", f"workspace={tmp_path}"]
    done = serve("cycle", environment, *given)
    report = tmp_path / "default" / "cycles" / "0001" / "report.html"
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {report}" in done.stdout and report.is_file()
    assert "train: " in done.stdout + done.stderr or "trained: " in done.stdout + done.stderr
    assert processes(environment["PREFECT_HOME"]) == []


@pytest.mark.timeout(400)
def test_an_unknown_scorer_is_refused_with_the_valid_ones(
    environment: dict[str, str], tiny_preset: Path, tmp_path: Path
) -> None:
    given = ["--param", f"preset={tiny_preset}", "--param", f"workspace={tmp_path}", "--param", "scorer=nope"]
    done = serve("cycle", environment, *given)
    assert done.returncode == 1
    assert "scorer='nope'" in done.stdout and "hpsv2" in done.stdout and "pickscore" in done.stdout
    assert not list(tmp_path.rglob("*.arrow"))
