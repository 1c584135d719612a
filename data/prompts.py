"""Prompt sets: read from anywhere, cleaned, split so that no evaluation prompt is ever trained on, and drawn."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.ids import prompt_id

COLUMNS = ("prompt", "caption", "text", "Prompt", "TEXT")


SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow")


Prompts = dict[str, str]
"""Prompt texts by their stable id."""


def read_prompts(source: str, parameter: str = "prompts") -> Prompts:
    """A prompt set, without empty lines and duplicates, ordered by id so that the source's order is irrelevant.

    source: a .txt (a prompt a line), .json (list of strings or objects), .jsonl, .csv, .parquet or .arrow file,
    or a hub data set 'owner/name', each with an optional ':column' (default: prompt, caption or text), and for
    the hub an optional '[split]' (default train).
    Raises ValueError, naming `parameter`, when it cannot be read or holds no prompt.
    """
    texts = _read(source, parameter)
    cleaned = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not cleaned:
        raise ValueError(f"{parameter}={source!r} holds no prompt")
    by_id: Prompts = {}
    for text in cleaned:
        by_id.setdefault(prompt_id(text), text)
    return dict(sorted(by_id.items()))


def _read(source: str, parameter: str) -> Iterable[Any]:
    path, column = _file_and_column(source)
    if path is not None:
        if not path.is_file():
            raise ValueError(f"{parameter}={source!r}: no such file")
        try:
            rows = _read_file(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{parameter}={source!r} cannot be read: {error}") from error
        return _column(rows, column, f"{parameter}={source!r}")
    return _read_hub(source, parameter)


def _file_and_column(source: str) -> tuple[Path | None, str | None]:
    name, colon, column = source.rpartition(":")
    for path, chosen in ((source, None), (name, column)) if colon else ((source, None),):
        if Path(path).suffix.lower() in SUFFIXES:
            return Path(path), chosen
    return None, None


def _read_file(path: Path) -> list[Any]:
    kind = path.suffix.lower()
    if kind == ".txt":
        return path.read_text().splitlines()
    if kind == ".json":
        rows = json.loads(path.read_text())
        return rows if isinstance(rows, list) else [rows]
    if kind == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if kind == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return _read_table(path)


def _read_table(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        schema, read = pq.read_schema(path), lambda names: pq.read_table(path, columns=names)
    else:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        schema, read = reader.schema, lambda names: reader.read_all().select(names)
    names = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    rows: list[Any] = read(names).to_pylist()
    return rows


def _column(rows: list[Any], column: str | None, where: str) -> Iterable[Any]:
    """The prompts of rows that are strings or objects; None = the first of COLUMNS that is there, or the only one."""
    if not rows or isinstance(rows[0], str):
        return rows
    names = list(rows[0])
    candidates = [column] if column else [*COLUMNS, *(names if len(names) == 1 else [])]
    for name in candidates:
        if name in names:
            return [row.get(name) for row in rows]
    asked = f"no column {column!r}" if column else f"no column named {', '.join(COLUMNS[:3])}"
    raise ValueError(f"{where}: {asked}; there are {', '.join(names)}; choose one with '<source>:<column>'")


def _read_hub(source: str, parameter: str) -> Iterable[Any]:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(\w+))?(?:\[(\w+)\])?", source)
    if not match:
        raise ValueError(
            f"{parameter}={source!r} is neither a file ({', '.join(SUFFIXES)}) nor a hub data set 'owner/name:column'"
        )
    from datasets import load_dataset

    name, column, split = match.groups()
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen unrelated kinds; all mean the same to the user
        raise ValueError(f"{parameter}={source!r}: the hub data set cannot be loaded: {error}") from error
    chosen = column or next((c for c in COLUMNS if c in rows.column_names), None)
    if chosen not in rows.column_names:
        raise ValueError(f"{parameter}={source!r}: no column {column!r}; there are {', '.join(rows.column_names)}")
    return list(rows[chosen])


def split_prompts(prompts: Prompts, evaluation: Prompts | None) -> tuple[Prompts, Prompts]:
    """(training, evaluation), disjoint by id.

    evaluation=None holds back the tenth of the set whose ids end in a certain way: a prompt stays on its side
    whatever else the set holds tomorrow.
    """
    if evaluation is None:
        evaluation = {key: text for key, text in prompts.items() if int(key[:8], 16) % 10 == 0}
    return {key: text for key, text in prompts.items() if key not in evaluation}, evaluation


def draw_prompts(prompts: Prompts, count: int, seed: int) -> Prompts:
    """`count` of the prompts (all when there are fewer), drawn without replacement; a function of the seed alone."""
    ids = sorted(prompts)
    chosen = np.random.default_rng(seed).permutation(len(ids))[:count]
    return {ids[i]: prompts[ids[i]] for i in sorted(chosen)}
