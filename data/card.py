"""The README.md of a preference folder: what the rows are, where they come from, how to load them.

Writes text from a manifest and the shards' metadata; reads no file.
"""

from collections.abc import Mapping
from typing import Any

from data.manifest import Manifest
from data.markdown import table, text

COLUMNS = {
    "pair_id": ("string", "identifies the pair; equal in every rerun of the same plan"),
    "prompt_id": ("string", "identifies the prompt; split and resample by it, never by row"),
    "caption": ("string", "the prompt"),
    "image_0, image_1": ("image", "the encoded files that the scorers saw"),
    "image_0_uid, image_1_uid": ("string", "sha256 of those files"),
    "latent_0, latent_1": (
        "float16 list",
        "the sampler's final latents, or the encoded picture, in model space, flattened",
    ),
    "prompt_embedding": (
        "float16 list",
        "the text encoder's output, tokens x width, flattened; may be absent",
    ),
    "pooled_embedding": ("float16 list", "the pooled text embedding, for models that take one"),
    "time_ids_0, time_ids_1": (
        "int32 list",
        "original height and width, crop top and left, target height and width; absent = whole pictures",
    ),
    "seed_0, seed_1": ("int64", "the generator seed of each image; -1 = not known"),
    "model_0, model_1": ("string", "the checkpoint that drew each image"),
    "score_<scorer>_0, _1": ("float32 or null", "raw scores, in the unit of the scorer"),
    "label_0, label_1": ("float32 or null", "1 = preferred, 0 = not, 0.5 = tie, null = not decided"),
    "soft_label_0, soft_label_1": ("float32 or null", "the probability that this side is preferred; null = not known"),
    "has_label": ("bool", "a decision was made"),
    "are_different": ("bool", "the two files differ"),
    "margin": (
        "float32 or null",
        "by how much the winner is preferred, in the labelling scorer's unit",
    ),
    "config_hash": ("string", "identifies the generation settings"),
}

LOADING = """```python
import datasets, duckdb, polars, pyarrow as pa

# pyarrow: maps the file, reads only the columns you touch
table = pa.ipc.open_file(pa.memory_map("{file}")).read_all()
# datasets: decodes the images; copies everything into its cache, so do not train through it
rows = datasets.load_dataset("arrow", data_files="*.arrow", split="train")
# polars
frame = polars.read_ipc("{file}")
# duckdb has no float16 type: leave those columns out
light = table.drop_columns([field.name for field in table.schema if "halffloat" in str(field.type)])
duckdb.sql("SELECT caption, label_0 FROM light WHERE has_label")
```"""


def dataset_card(manifest: Manifest, metadata: Mapping[str, Any]) -> str:
    """Markdown with the YAML header by which `datasets` finds the shards.

    `metadata` is what `data.schema.read_metadata` returns; what it lacks is said to be not recorded.
    """
    shards = manifest.shards
    sections = [
        f"---\n{_header(manifest)}\n---",
        "# Preference pairs of generated images",
        f"{manifest.rows} pairs in {len(shards)} shards, sealed {manifest.created_at}. " + origin(metadata),
        table(("fact", "value"), _facts(manifest, metadata)),
        "## Scorers",
        table(("name", "version", "unit", "weights"), [_scorer(s) for s in metadata.get("scorers", [])]),
        "## Label rule",
        f"{text(metadata.get('label_rule'))}. Train on rows with `has_label`, `are_different` and "
        "a `label_0` other than 0.5. Scores are kept, so labels can be decided again.",
        "## Columns",
        table(("column", "type", "meaning"), [(f"`{k}`", *v) for k, v in COLUMNS.items()]),
        "## Loading",
        LOADING.replace("{file}", shards[0].file if shards else "00000-of-00001.arrow"),
    ]
    return "\n\n".join(sections) + "\n"


def origin(metadata: Mapping[str, Any]) -> str:
    """Who says what is preferred."""
    if "imported" in metadata:
        return "Pictures and preferences were imported from the source below; its terms apply."
    return "Preferences come from models, not from people."


def _header(manifest: Manifest) -> str:
    lines = ["tags: [text-to-image, preference, diffusion-dpo]", "configs:", "- config_name: default"]
    if list(manifest.splits) == ["train"]:
        return "\n".join([*lines, '  data_files: "*.arrow"'])
    lines.append("  data_files:")
    for split, shards in manifest.splits.items():
        lines += [f"  - split: {split}", "    path:", *(f'    - "{shard.file}"' for shard in shards)]
    return "\n".join(lines)


def _facts(manifest: Manifest, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    keys = ("base_model", "adapter_sha256", "generation", "latent", "embedding", "prompts", "code")
    facts = [("data set id", manifest.dataset_id), ("schema version", manifest.schema_version)]
    facts.append(("config hash", manifest.config_hash))
    facts += [(key, text(metadata[key])) for key in ("imported", "counts") if key in metadata]
    return facts + [(key.replace("_", " "), text(metadata.get(key))) for key in keys]


def _scorer(scorer: str | Mapping[str, Any]) -> tuple[str, str, str, str]:
    known = {"name": scorer} if isinstance(scorer, str) else scorer
    shown = ("name", "version", "unit")
    rest = {key: value for key, value in known.items() if key not in shown}
    name, version, unit = (text(known.get(key)) for key in shown)
    return name, version, unit, text(rest or None)
