"""The README.md of a preference folder: what the rows are, where they come from, how to load them.

Fills `card.md.j2` with what a manifest and the shards' metadata say; reads no other file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.manifest import Manifest
from data.markdown import cell, table

TEMPLATE = Path(__file__).with_name("card.md.j2")
FACTS = ("base_model", "adapter_sha256", "generation", "latent", "embedding", "prompts", "code")
IMPORT_FACTS = ("imported", "counts")
SCORER_FACTS = ("name", "version", "unit")


def dataset_card(manifest: Manifest, metadata: Mapping[str, Any]) -> str:
    """Markdown with the YAML header by which `datasets` finds the shards.

    `metadata` is what `data.schema.read_metadata` returns; what it lacks is said to be not recorded.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    card = DatasetCard.from_template(
        DatasetCardData(tags=["text-to-image", "preference", "diffusion-dpo"], configs=[_config(manifest)]),
        template_path=str(TEMPLATE),
        manifest=manifest,
        file=manifest.shards[0].file if manifest.shards else "00000-of-00001.arrow",
        origin=origin(metadata),
        facts=_facts(manifest, metadata),
        scorers=[_scorer(scorer) for scorer in metadata.get("scorers", [])],
        label_rule=metadata.get("label_rule"),
        cell=cell,
        table=table,
    )
    return str(card).rstrip() + "\n"


def origin(metadata: Mapping[str, Any]) -> str:
    """Who says what is preferred."""
    if "imported" in metadata:
        return "Pictures and preferences were imported from the source below; its terms apply."
    return "Preferences come from models, not from people."


def _config(manifest: Manifest) -> dict[str, Any]:
    """Which files `datasets` reads."""
    if list(manifest.splits) == ["train"]:
        return {"config_name": "default", "data_files": "*.arrow"}
    files = {split: [shard.file for shard in shards] for split, shards in manifest.splits.items()}
    return {"config_name": "default", "data_files": [{"split": s, "path": paths} for s, paths in files.items()]}


def _facts(manifest: Manifest, metadata: Mapping[str, Any]) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [("data set id", manifest.dataset_id)]
    facts += [("schema version", manifest.schema_version), ("config hash", manifest.config_hash)]
    facts += [(key, metadata[key]) for key in IMPORT_FACTS if key in metadata]
    return facts + [(key.replace("_", " "), metadata.get(key)) for key in FACTS]


def _scorer(scorer: str | Mapping[str, Any]) -> tuple[object, ...]:
    facts = {"name": scorer} if isinstance(scorer, str) else scorer
    rest = {key: value for key, value in facts.items() if key not in SCORER_FACTS}
    return (*(facts.get(key) for key in SCORER_FACTS), rest or None)
