"""Seals a folder of shards: the card first, the manifest last, whose existence says that the folder is complete."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.card import dataset_card
from data.files import write_text
from data.manifest import Splits, make_manifest, write_manifest


def seal(folder: Path, records: Splits, config_hash: str, metadata: Mapping[str, Any]) -> None:
    """Write card and manifest of a folder whose shards are all published.

    records: of each split. metadata: what the card tells, see `data.card.dataset_card`.
    """
    manifest = make_manifest(records, config_hash, datetime.now(UTC).isoformat(timespec="seconds"))
    write_text(folder / "README.md", dataset_card(manifest, metadata))
    write_manifest(folder, manifest)
