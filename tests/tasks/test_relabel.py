"""Other labels for a cycle's candidates. Scores are random numbers of the report's tests: no model is loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.files import write_json
from data.manifest import verify
from data.schema import read_metadata
from data.shards import read_shard
from scoring.labels.expressions import parse
from tasks.link import link_candidates
from tasks.record.labels import LabelAgreement, comparisons
from tasks.record.plan import Plan, PlannedCycle
from tasks.record.recipe import ParameterError
from tasks.record.scores import read_scores
from tasks.record.settings import Execution, GivenPairing
from tasks.record.workspace import CycleFolder, Experiment
from tasks.relabel import relabel
from tasks.write_report import write_report
from tests.tasks.report.test_report import finished_cycle


@pytest.fixture
def finished(tmp_path: Path) -> PlannedCycle:
    return finished_cycle(tmp_path)


def files(cycle: PlannedCycle) -> dict[str, tuple[int, int]]:
    """Every file and when it was written."""
    found = [path for path in cycle.folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(cycle.folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def planned(folder: Path, plan: Plan, prompts: dict[str, dict[str, str]]) -> PlannedCycle:
    """A cycle of another experiment of which nothing is there but its plan."""
    cycle = PlannedCycle(Experiment(folder / "other").cycle(1).folder, plan)
    write_json(cycle.prompts_file, prompts)
    write_json(cycle.plan_file, plan.model_dump())
    return cycle


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables([read_shard(path) for path in sorted(folder.glob("*.arrow"))])


def test_other_pairs_lie_beside_the_own_ones_and_nothing_else_is_touched(finished: PlannedCycle) -> None:
    cycle = finished
    before = files(cycle)
    relabel.fn(cycle, parse("hpsv2"), GivenPairing())
    assert {name: state for name, state in files(cycle).items() if not name.startswith("relabelled")} == before
    folder = cycle.relabelled(parse("hpsv2"))
    verify(folder, "deep")
    table = rows_of(folder)
    assert read_metadata(table.schema)["label_rule"]["by"] == "hpsv2"
    gap = np.array(table["score_hpsv2_0"]) - np.array(table["score_hpsv2_1"])
    np.testing.assert_array_equal(np.array(table["label_0"]), gap > 0)
    assert table["score_pickscore_0"].null_count == 0 and table["soft_label_0"].null_count == table.num_rows


def test_the_comparison_is_what_counting_gives(finished: PlannedCycle) -> None:
    cycle = finished
    found = relabel.fn(cycle, parse("hpsv2"), GivenPairing(rule="all-pairs", min_margin=0.2))
    table = rows_of(cycle.relabelled(parse("hpsv2")))
    hpsv2, pickscore = (
        np.array(table[f"score_{n}_0"]) - np.array(table[f"score_{n}_1"]) for n in ("hpsv2", "pickscore")
    )
    agreed = np.sign(hpsv2) == np.sign(pickscore)
    assert found.agreement == pytest.approx(agreed.mean()) and found.pairs == len(agreed)
    assert found.low < found.agreement < found.high and 0.2 < found.high - found.low < 0.7
    assert found.prompts == len(set(table["prompt_id"].to_pylist()))
    assert found.other == "pickscore" and found.other_pairs == sum(1 for _ in rows_of(cycle.preferences)["pair_id"])
    folders = cycle.preferences, cycle.relabelled(parse("hpsv2"))
    ids = [set(rows_of(folder)["pair_id"].to_pylist()) for folder in folders]
    won = {
        row["pair_id"]: row["label_0"] for row in rows_of(cycle.preferences).select(["pair_id", "label_0"]).to_pylist()
    }
    same = [
        row for row in table.select(["pair_id", "label_0"]).to_pylist() if won.get(row["pair_id"]) == row["label_0"]
    ]
    assert found.same_pairs == len(same) <= len(ids[0] & ids[1])


def test_the_same_scorer_agrees_with_itself(finished: PlannedCycle) -> None:
    found = relabel.fn(finished, parse("pickscore"), GivenPairing())
    assert (found.agreement, found.high) == (1.0, 1.0) and found.low > 0.6
    assert found.pairs == found.other_pairs == found.same_pairs > 5


def test_the_report_shows_how_often_they_agree(finished: PlannedCycle) -> None:
    cycle = finished
    assert "Other labels of the same candidates" not in write_report.fn(cycle).read_text()
    found = [relabel.fn(cycle, parse(scorer), GivenPairing()) for scorer in ("hpsv2", "mean(oracle,2*hpsv2)")]
    page = write_report.fn(cycle).read_text()
    section = page[page.index("Other labels of the same candidates") :]
    for comparison in found:
        assert comparison.labelled_by in section
        assert f"[{comparison.low:.3f}, {comparison.high:.3f}]" in section
    assert sorted(comparisons(cycle), key=str) == sorted(found, key=str)


def test_doing_it_again_changes_nothing_and_another_rule_is_refused(finished: PlannedCycle) -> None:
    cycle = finished
    relabel.fn(cycle, parse("hpsv2"), GivenPairing(min_margin=0.1))
    manifest = (cycle.relabelled(parse("hpsv2")) / "manifest.json").read_bytes()
    relabel.fn(cycle, parse("hpsv2"), GivenPairing(min_margin=0.1))
    assert (cycle.relabelled(parse("hpsv2")) / "manifest.json").read_bytes() == manifest
    with pytest.raises(ParameterError, match=r"pairing=.*another rule; move it away"):
        relabel.fn(cycle, parse("hpsv2"), GivenPairing(min_margin=0.2))


def test_agreeing_scorers_make_the_pairs_on_which_both_say_the_same(finished: PlannedCycle) -> None:
    cycle = finished
    found = relabel.fn(cycle, parse("agree(pickscore,hpsv2)"), GivenPairing(rule="all-pairs", min_margin=0))
    assert found.agreement == 1.0  # with pickscore alone, which had to agree
    scored = read_scores(cycle, "candidates", ["pickscore", "hpsv2"])
    groups = [scored.scores[name].reshape(-1, 4) for name in ("pickscore", "hpsv2")]
    gaps = [values[:, :, None] - values[:, None, :] for values in groups]
    assert found.pairs == int(((gaps[0] > 0) & (gaps[1] > 0)).sum())
    assert str(parse("agree(pickscore,hpsv2)")) == found.labelled_by


def test_a_new_cycle_gets_links_to_the_pictures(finished: PlannedCycle, tmp_path: Path) -> None:
    source = finished
    plan = source.plan
    recipe = plan.recipe.model_copy(update={"candidates_of": str(source.folder), "scorer": parse("hpsv2")})
    prompts = json.loads(source.prompts_file.read_text())
    cycle = planned(tmp_path, plan.model_copy(update={"recipe": recipe}), prompts)
    link_candidates.fn(cycle)
    for part in ("candidates", "base", "control"):
        ours, theirs = (where.part(part) for where in (cycle, source))
        for index in range(ours.shards):
            assert ours.candidates(index).stat().st_ino == theirs.candidates(index).stat().st_ino
    assert not cycle.part("tuned").folder.exists() and not (cycle.folder / "scores").exists()


def test_of_other_held_out_prompts_only_the_training_pictures_are_linked(
    finished: PlannedCycle, tmp_path: Path
) -> None:
    source = finished
    plan, prompts = source.plan, json.loads(source.prompts_file.read_text())
    recipe = plan.recipe.model_copy(update={"candidates_of": str(source.folder)})
    other = {**prompts, "evaluation": {"f" * 16: "another prompt"}}
    cycle = planned(tmp_path, plan.model_copy(update={"recipe": recipe}), other)
    link_candidates.fn(cycle)
    assert cycle.part("candidates").candidates(0).is_file()
    assert not cycle.evaluation.exists()


def test_comparisons_are_read_back(tmp_path: Path) -> None:
    cycle = CycleFolder(tmp_path)
    assert comparisons(cycle) == []
    found = LabelAgreement(
        labelled_by="a", other="b", pairs=3, other_pairs=4, same_pairs=2, prompts=3, agreement=0.5, low=0.1, high=0.9,
        confidence=0.95,
    )  # fmt: skip
    write_json(cycle.comparison, vars(found))
    assert comparisons(cycle) == [found]


def test_a_margin_that_leaves_no_pair_can_be_lowered(finished: PlannedCycle) -> None:
    cycle = finished
    with pytest.raises(ParameterError, match="lower it"):
        relabel.fn(cycle, parse("hpsv2"), GivenPairing(min_margin=1000))
    assert relabel.fn(cycle, parse("hpsv2"), GivenPairing(min_margin=0.1)).pairs > 0


def test_candidates_that_their_own_scorer_has_not_scored_are_labelled_all_the_same(
    finished: PlannedCycle,
) -> None:
    cycle = finished
    shutil.rmtree(cycle.folder / "scores" / "pickscore")
    assert relabel.fn(cycle, parse("hpsv2"), GivenPairing()) is None
    assert "score_pickscore_0" not in rows_of(cycle.relabelled(parse("hpsv2"))).column_names
    assert comparisons(cycle) == []


def test_base_pictures_of_another_precision_are_not_linked(finished: PlannedCycle, tmp_path: Path) -> None:
    """Else the base would be drawn in one precision and the tuned model in another."""
    source = finished
    plan = source.plan
    execution = Execution(**{**plan.recipe.execution.model_dump(), "dtype": "bfloat16"})
    recipe = plan.recipe.model_copy(update={"candidates_of": str(source.folder), "execution": execution})
    prompts = json.loads(source.prompts_file.read_text())
    cycle = planned(tmp_path, plan.model_copy(update={"recipe": recipe}), prompts)
    link_candidates.fn(cycle)
    assert cycle.part("candidates").candidates(0).is_file() and not cycle.evaluation.exists()
