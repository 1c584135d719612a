"""`kill -9` during generation, training and evaluation, then the same call again: it finishes, nothing is lost or
done twice, and the result is that of an undisturbed run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.manifest import verify
from tests.flows.processes import kill_when, start


@pytest.fixture(scope="module")
def api_url(prefect_server: None) -> Iterator[str]:
    from prefect.settings import PREFECT_API_URL

    yield str(PREFECT_API_URL.value())


def finished_files(cycle: Path) -> dict[str, int]:
    """Modification time of every published shard, record and result."""
    wanted = [*cycle.rglob("*.arrow"), *cycle.rglob("*.json")]
    return {str(path.relative_to(cycle)): path.stat().st_mtime_ns for path in wanted if not path.name.startswith(".")}


def outcome(cycle: Path) -> dict[str, object]:
    """Everything that two equal runs must share to the last bit."""
    results = json.loads((cycle / "evaluation" / "results.json").read_text())
    record = json.loads((cycle / "training" / "checkpoint.json").read_text())
    manifest = json.loads((cycle / "preferences" / "manifest.json").read_text())
    candidates = {path.name: path.read_bytes() for path in sorted((cycle / "candidates").glob("*.arrow"))}
    return {"results": results, "weights": record["sha256"], "pairs": manifest["dataset_id"], "candidates": candidates}


def test_killed_three_times_it_ends_as_if_undisturbed(api_url: str, tiny_preset: Path, tmp_path: Path) -> None:
    parameters = {
        "preset": str(tiny_preset),
        "training": {"steps": 30, "checkpoint_every": 5},
        "generation": {"steps": 12},
        "execution": {"images_per_shard": 6},
    }
    log = tmp_path / "log.txt"
    killed, whole = (json.dumps(parameters | {"workspace": str(tmp_path / name)}) for name in ("killed", "whole"))
    cycle = tmp_path / "killed" / "default" / "cycles" / "0001"
    metrics = cycle / "training" / "metrics.jsonl"
    moments = {
        "generation": lambda: len(list((cycle / "candidates").glob("[0-9]*.arrow"))) >= 3,
        "training": lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 12,
        "evaluation": lambda: (cycle / "evaluation" / "tuned" / "candidates" / "00001-of-00002.arrow").is_file(),
    }
    seen: dict[str, int] = {}
    for moment, happened in moments.items():
        kill_when(start(api_url, killed, log), happened)
        now = finished_files(cycle)
        assert {name: now.get(name) for name in seen} == seen, f"redone before the kill in {moment}"
        assert not (cycle / "finished.json").exists()
        seen = now
    for arguments in (killed, whole):
        process = start(api_url, arguments, log)
        process.join(240)
        assert process.exitcode == 0, log.read_text()[-4000:]
    now = finished_files(cycle)
    assert {name: now[name] for name in seen} == seen, "a finished file was written again"
    assert outcome(cycle) == outcome(tmp_path / "whole" / "default" / "cycles" / "0001")
    assert len(metrics.read_text().splitlines()) == 30
    verify(cycle / "preferences", "deep")
    assert not list((tmp_path / "killed").rglob(".*.tmp")), "temporary files are left"
