"""The whole loop on tiny random models: it runs, resumes, refuses, and starts from its champion."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(preset: Path, workspace: Path, **parameters: object) -> list[str]:
    from flows.full_cycle import full_cycle

    reports: list[str] = full_cycle(preset=str(preset), workspace=str(workspace), **parameters)
    return reports


def test_a_cycle_leaves_everything_it_promises(tiny_preset: Path, tmp_path: Path) -> None:
    reports = run(tiny_preset, tmp_path)
    cycle = tmp_path / "default" / "cycles" / "0001"
    assert reports == [str(cycle / "report.html")]
    assert json.loads((cycle / "finished.json").read_text())["promoted"] in (True, False)
    assert (cycle / "training" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
