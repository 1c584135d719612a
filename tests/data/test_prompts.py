"""Prompt sets: every format, cleaning, and the wall between training and evaluation."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.ids import prompt_id
from data.prompts import draw_prompts, read_prompts, split_prompts

TEXTS = ["a red circle", "a blue square", "a red circle ", ""]
CLEAN = {"a red circle", "a blue square"}


def write(folder: Path, kind: str) -> Path:
    path = folder / f"set.{kind}"
    rows = [{"other": i, "caption": text} for i, text in enumerate(TEXTS)]
    if kind == "txt":
        path.write_text("\n".join(TEXTS))
    elif kind == "json":
        path.write_text(json.dumps(TEXTS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["other", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = pa.table({"other": range(4), "caption": TEXTS})
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "parquet", "arrow"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    prompts = read_prompts(str(write(tmp_path, kind)))
    assert set(prompts.values()) == CLEAN
    assert list(prompts) == sorted(map(prompt_id, CLEAN))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_a_column_is_chosen_by_name(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert set(read_prompts(f"{path}:caption").values()) == CLEAN
    with pytest.raises(ValueError, match=r"no column 'nope'.*caption"):
        read_prompts(f"{path}:nope")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file"),
        ("nonsense", "neither a file"),
        ("owner/name/too/deep", "neither a file"),
    ],
)
def test_what_cannot_be_read_is_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompts='{source}'.*{message}"):
        read_prompts(source)


def test_broken_and_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(tmp_path / "b.txt"))


SETS = st.sets(st.text(min_size=1).map(str.strip).filter(bool), max_size=40)


@given(texts=SETS, held=SETS)
def test_no_evaluation_prompt_is_ever_trained_on(texts: set[str], held: set[str]) -> None:
    prompts = {prompt_id(text): text for text in texts}
    for evaluation in (None, {prompt_id(text): text for text in held}):
        training, judged = split_prompts(prompts, evaluation)
        assert not set(training) & set(judged)
        assert set(training) | set(judged) >= set(prompts)


@given(texts=SETS, more=SETS)
def test_a_prompt_stays_on_its_side_when_the_set_grows(texts: set[str], more: set[str]) -> None:
    small = split_prompts({prompt_id(t): t for t in texts}, None)
    large = split_prompts({prompt_id(t): t for t in texts | more}, None)
    assert set(small[0]) <= set(large[0]) and set(small[1]) <= set(large[1])


@given(texts=SETS, count=st.integers(1, 50), seed=st.integers(0, 2**63 - 1))
def test_a_draw_depends_on_its_seed_alone(texts: set[str], count: int, seed: int) -> None:
    prompts = {prompt_id(text): text for text in texts}
    drawn = draw_prompts(prompts, count, seed)
    assert drawn == draw_prompts(dict(reversed(prompts.items())), count, seed)
    assert len(drawn) == min(count, len(prompts)) and drawn.items() <= prompts.items()


def test_other_seeds_draw_others() -> None:
    prompts = {prompt_id(str(i)): str(i) for i in range(500)}
    assert draw_prompts(prompts, 50, 1) != draw_prompts(prompts, 50, 2)
