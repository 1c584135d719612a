"""Prompt sets: read from anywhere, cleaned, split so that no evaluation prompt is ever trained on, and drawn."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.hub import HubTable
from data.ids import prompt_id
from data.tables import Table, read_table

COLUMNS = ("prompt", "caption", "text", "Prompt", "TEXT")
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow")
HUB_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?::(\w+))?(?:\[(\w+)\])?")
Prompts = dict[str, str]
"""Prompt texts by their stable id."""


def read_prompts(source: str, parameter: str = "prompts") -> Prompts:
    """A prompt set, without empty lines and duplicates, ordered by id so that the source's order is irrelevant.

    source: a .txt (a prompt a line), .json (list of strings or objects), .jsonl, .csv, .parquet or .arrow file,
    or a hub data set 'owner/name', each with an optional ':column' (default: prompt, caption or text), and for
    the hub an optional '[split]' (default train).
    Raises ValueError, naming `parameter`, when it cannot be read or holds no prompt.
    """
    try:
        texts = _texts(source)
    except ValueError as error:
        raise ValueError(f"{parameter}={source!r}: {error}") from error
    cleaned = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not cleaned:
        raise ValueError(f"{parameter}={source!r} holds no prompt")
    by_id: Prompts = {}
    for text in cleaned:
        by_id.setdefault(prompt_id(text), text)
    return dict(sorted(by_id.items()))


def _texts(source: str) -> list[Any]:
    """What stands in the column of the prompts, text or not."""
    table, column = _table(source)
    name = _column(table.text_columns, column)
    return [row[name] for row in table.rows([name])]


def _table(source: str) -> tuple[Table, str | None]:
    """The table that a source names, and the column, None = it names none."""
    name, colon, column = source.rpartition(":")
    for path, chosen in ((source, None), (name, column)) if colon else ((source, None),):
        if Path(path).suffix.lower() in SUFFIXES:
            if not Path(path).is_file():
                raise ValueError("no such file")
            return read_table(Path(path)), chosen
    if match := HUB_SOURCE.fullmatch(source):
        return HubTable(match[1], match[3] or "train", streamed=False), match[2]
    raise ValueError(f"this is neither a file ({', '.join(SUFFIXES)}) nor a hub data set 'owner/name:column'")


def _column(names: Sequence[str], column: str | None) -> str:
    """The column of the prompts; None = the first of COLUMNS that is there, or the only one."""
    wanted = [column] if column else [*COLUMNS, *(names if len(names) == 1 else [])]
    for name in wanted:
        if name in names:
            return name
    lacking = f"no column {column!r}" if column else f"no column named {', '.join(COLUMNS[:3])}"
    raise ValueError(f"{lacking}; there are {', '.join(names) or 'none'}; choose one with '<source>:<column>'")


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
