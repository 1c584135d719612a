"""The card of a data set: what is told, and that its code runs."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from data.card import dataset_card
from data.manifest import make_manifest, read_manifest
from tests.data.shard_world import FIRST, METADATA, ROWS, SCHEMA, SHARDS


def header(card: str) -> Any:
    """The YAML at the top of a card."""
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def test_the_code_on_the_card_runs(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    card = (sealed / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert 'data_files="*.arrow"' in code and FIRST in code
    monkeypatch.chdir(sealed)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["rows"]) == SHARDS * ROWS  # type: ignore[arg-type]


def test_the_card_tells_scorers_label_rule_and_every_column(sealed: Path) -> None:
    rule = {"label_rule": {"by": "clip", "margin": 0.1}, "base_model": {"id": "a|b", "revision": "r1"}}
    card = dataset_card(read_manifest(sealed), METADATA | rule)
    assert header(card) == {
        "tags": ["text-to-image", "preference", "diffusion-dpo"],
        "configs": [{"config_name": "default", "data_files": "*.arrow"}],
    }
    assert "| clip | 1 | cosine | not recorded |" in card and "by clip, margin 0.1. Train on rows" in card
    assert "| base model | id a\\|b, revision r1 |" in card and "| code | not recorded |" in card
    told = card.split("## Columns")[1]
    shown = {name.replace("score_clip", "score_<scorer>").removesuffix("_1") for name in SCHEMA.names}
    assert not [name for name in shown if name not in told]


def test_the_card_names_the_files_of_several_splits(sealed: Path) -> None:
    one, *others = read_manifest(sealed).shards
    manifest = make_manifest({"validation": [one], "train": others}, "c", "now")
    (config,) = header(dataset_card(manifest, {}))["configs"]
    assert config == {
        "config_name": "default",
        "data_files": [
            {"split": "train", "path": [shard.file for shard in others]},
            {"split": "validation", "path": [FIRST]},
        ],
    }
