"""The stages of a cycle as flows and deployments of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.utilities.importtools import import_object

from tasks.record.recipe import ParameterError, resolve
from tasks.record.workspace import experiment_at

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["generate", "score", "pair", "train", "evaluate"]


def test_every_stage_is_a_deployment_that_takes_a_cycles_folder() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = {each["entrypoint"]: import_object(each["entrypoint"]) for each in deployments}
    assert all(isinstance(flow, Flow) for flow in flows.values())
    assert {each["work_pool"]["name"] for each in deployments} == {"rlaif"}, "one pool, so that nights do not overlap"
    stages = [each for each in deployments if each["name"] == "cycle"]
    assert [each["entrypoint"] for each in stages] == [f"flows.stages.{name}" for name in ORDER]
    for stage in stages:
        flow = flows[stage["entrypoint"]]
        assert "cycle" in flow.parameters.required, flow.name
    assert len({flow.name for flow in flows.values()}) == len(flows), "they would share runs and parameters in the UI"


@pytest.mark.usefixtures("prefect_server")
def test_stage_by_stage_gives_what_the_whole_cycle_gives(tiny_preset: Path, tmp_path: Path) -> None:
    from flows import stages
    from flows.full_cycle import full_cycle
    from tasks.plan_cycle import plan_cycle

    experiment = experiment_at(str(tmp_path / "alone"), "default")
    planned = plan_cycle(experiment, resolve(str(tiny_preset), 0, {}, {}), 1)
    for name in ORDER:
        getattr(stages, name)(planned.folder)
    full_cycle(preset=str(tiny_preset), workspace=str(tmp_path / "whole"))
    whole = tmp_path / "whole" / "default" / "cycles" / "0001"
    kinds = ("*.arrow", "results.json", "*.safetensors")
    made = {path.relative_to(whole) for kind in kinds for path in whole.rglob(kind) if path.parent.name != "kohya"}
    assert len(made) > 10
    for path in made:
        alone = planned.folder / path
        assert alone.is_file() and alone.read_bytes() == (whole / path).read_bytes(), path


HOLD = """
import sys, time
from pathlib import Path
from tasks.record.workspace import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1], "released").touch()
"""


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_waits_for_whoever_works_in_the_experiment(tiny_preset: Path, tmp_path: Path) -> None:
    from flows.stages import open_stage
    from tasks.plan_cycle import plan_cycle

    experiment = experiment_at(str(tmp_path), "default")
    planned = plan_cycle(experiment, resolve(str(tiny_preset), 0, {}, {}), 1)
    command = [sys.executable, "-c", HOLD, str(experiment.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.stdin.write("go on\n")
        other.stdin.flush()
        with open_stage(planned.folder):
            assert (experiment.folder / "released").is_file(), "it began while another process held the lock"


def test_a_folder_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    from flows.stages import open_stage

    refused = pytest.raises(ParameterError, match=r"cycle='.*': there is no planned cycle \(.*plan.json is missing\)")
    with refused, open_stage(tmp_path):
        pass
