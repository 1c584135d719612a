"""The command as a user types it: from any folder, with the exit status that scripts rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.files import write_json

RLAIF = Path(sys.executable).parent / "rlaif"
MODULES = {
    "cycle": "flows.serve", "summary": "bench.summary", "accuracy": "scoring.accuracy",
    "benchmark": "scoring.benchmark", "contract": "scoring.contract", "convert": "scoring.convert",
    "kohya": "training.kohya", "merge": "training.merge", "hub": "training.hub",
}  # fmt: skip


def rlaif(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return subprocess.run(
        [RLAIF, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command_and_waits_for_no_library(tmp_path: Path) -> None:
    shown = rlaif(tmp_path, "--help")
    assert shown.returncode == 0
    assert all(f" {name} " in shown.stdout for name in [*MODULES, "up", "down"])
    code = "import rlaif.cli, sys; print(sorted({'torch', 'prefect', 'transformers', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_a_command_and_its_module_are_the_same(name: str, tmp_path: Path) -> None:
    """They explain the same options; the module runs as `python -m`, from anywhere."""
    command = [sys.executable, "-m", MODULES[name], *(["cycle"] if name == "cycle" else []), "--help"]
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    module = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    shown = rlaif(tmp_path, name, "--help")
    assert shown.returncode == module.returncode == 0, shown.stderr + module.stderr
    assert shown.stdout.split("\n", 2)[2] == module.stdout.split("\n", 2)[2]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["convert", "no.pt", "out.safetensors"], "error: no file no.pt"),
        (["contract", "no_such_scorer"], "error: scorer 'no_such_scorer' is not known"),
        (["accuracy", "no.parquet", "--scorer", "pickscore"], "error: no.parquet"),
        (["benchmark", "no", "no"], "error: no: no folder"),
        (["merge", "no", "--to", "merged"], "error: no"),
        (["kohya", "no", "--to", "k.safetensors"], "error: no"),
        (["hub", "no", "--repo", "without-a-slash"], "error: "),
        (["kohya", "no"], "Missing option '--to'"),
        (["cycle", "--param", "scorer"], "'scorer' is not of the form NAME=VALUE"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_wrong_use_ends_with_two_and_says_why(arguments: list[str], reason: str, tmp_path: Path) -> None:
    done = rlaif(tmp_path, *arguments)
    assert done.returncode == 2 and reason in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


BROKEN = """
import numpy as np
from scoring.scorers.scorer import ScorerInfo

class Zero:
    info = ScorerInfo("zero", "1", "points")

    def __init__(self, source=None, device="cpu"):
        pass

    def score(self, images, prompts):
        return np.full(len(images), np.nan, np.float32)

    def close(self):
        pass
"""


def test_no_is_one_and_a_machine_reads_which_clause(tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text(BROKEN)
    command = [sys.executable, "-m", "scoring.contract", "broken_plugin:Zero", "--json", "-"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    outcomes = json.loads(done.stdout)
    assert {outcome["status"] for outcome in outcomes} >= {"fail"}
    assert all(outcome["clause"] and outcome["statement"] for outcome in outcomes)


def test_a_summary_for_people_and_for_machines(tmp_path: Path) -> None:
    cycle = tmp_path / "workspace" / "one" / "cycles" / "0001"
    verdict = {
        "judge": "pickscore", "held_out": True, "prompts": 60, "wins": 40, "ties": 2, "losses": 18,
        "win_rate": 0.683, "low": 0.55, "high": 0.79,
    }  # fmt: skip
    control = {key: value for key, value in verdict.items() if key != "held_out"}
    (cycle / "evaluation").mkdir(parents=True)
    write_json(cycle / "evaluation" / "results.json", {"verdicts": [verdict], "control": [control]})
    write_json(cycle / "plan.json", {"recipe": {"scorer": "hpsv2"}})
    assert "0001" not in rlaif(tmp_path, "summary").stdout, "a cycle that is not finished has no verdict yet"
    write_json(cycle / "finished.json", {"promoted": True})
    lines = rlaif(tmp_path, "summary").stdout.splitlines()
    assert lines[2] == "| one | 1 | hpsv2 | pickscore | 60 | 40 / 2 / 18 | 0.683 | [0.550, 0.790] | yes |"
    assert lines[3].endswith("| control |") and len(lines) == 4
    rows = json.loads(rlaif(tmp_path, "summary", "workspace", "--json", "-").stdout)
    assert [row["promoted"] for row in rows] == ["yes", "control"] and rows[0]["low"] == 0.55
