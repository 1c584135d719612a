"""The README.md of a finished training: how to load it, how it was made, on which data, and what judges say of it.

Writes text from records; the one thing it looks up is whether a base is a folder on this machine.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.card import origin
from data.manifest import read_manifest
from data.markdown import NOT_RECORDED, table, text
from data.schema import read_metadata
from data.shards import open_shard
from training.model.reference import ADAPTER_FILE

KOHYA_FILE = "kohya/lora.safetensors"
"""Where the copy for ComfyUI and A1111 lies, seen from the card. In a folder of its own: `load_lora_weights` on a
folder, or on a hub repository, takes whichever weights file it finds beside the card."""
LEFT_OUT = ("model", "pairs", "output", "device")
"""Fields of a training plan that are not numbers of the recipe: where things lie, and what is told elsewhere."""


def provenance(pairs: Path) -> dict[str, Any]:
    """What a sealed preference folder says of itself, as JSON: its schema's metadata, and under `sealed` its manifest.

    Raises ShardError when it is not sealed.
    """
    manifest = read_manifest(pairs)
    names = ("dataset_id", "config_hash", "created_at", "rows")
    sealed = {name: getattr(manifest, name) for name in names} | {"shards": len(manifest.shards)}
    return read_metadata(open_shard(pairs / manifest.shards[0].file).schema) | {"sealed": sealed}


def model_card(
    record: Mapping[str, Any],
    plan: Mapping[str, Any],
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    kohya: bool = False,
) -> str:
    """Markdown with the YAML header by which the hub files the model.

    record: `checkpoint.json`. plan: the fields of the `TrainingPlan`. data: see `provenance`. evaluation:
    `results.json`, None = not evaluated. repo_id: where it is published; None = it stays in its folder, and the card
    names paths of this machine. kohya: whether there is a `KOHYA_FILE`.
    """
    lora = record["method"] == "lora"
    base = _Base(record["model"], published=repo_id is not None)
    kind = "LoRA" if lora else {"unet": "U-Net"}.get(_component(record), _component(record))
    sections = [
        f"---\n{_header(record, base, lora)}---",
        f"# {kind} for {base.name}, tuned {'on preferences' if 'imported' in data else 'from AI feedback'}",
        f"Trained for {record['steps']} steps with the loss `{record['loss']}` on {record['pairs']} preference pairs "
        f"of generated pictures. {origin(data)}",
        *([_TEXT_ENCODERS] if lora and plan.get("text_encoders") else []),
        "## Use",
        _usage(record, base, repo_id),
        *([_KOHYA] if kohya and lora else []),
        "## Recipe",
        table(("parameter", "value"), _recipe(record, plan)),
        "Means over the last tenth of the run, which say little about the pictures (see the evaluation):",
        table(("metric", "value"), [(name, f"{value:.4g}") for name, value in record["metrics"].items()]),
        "## Data",
        table(("fact", "value"), _data(data)),
        _scorers(data.get("scorers") or []),
        "## Evaluation",
        *_evaluation(evaluation),
        "## Limits",
        _LIMITS,
    ]
    card = "\n\n".join(sections) + "\n"
    return card if repo_id is None else _LOCAL.sub("path/to/", card)


_LOCAL = re.compile(r"(?<![\w:/.])/(?:[^\s/|,\"'()]+/)+(?=[^\s/|,\"'()])")
"""The folders of an absolute path, which is nobody else's business; no part of a URL."""
_KOHYA = f"For ComfyUI, A1111 and Forge: put `{KOHYA_FILE}` into their `loras` folder."
_TEXT_ENCODERS = (
    "It also tunes the text encoders: embed prompts, and the empty one for guidance, with the adapter loaded."
)
_LIMITS = (
    "What the base model gets wrong the tuned one may get wrong too, and training turns the leanings of the scorers "
    "up. The licence of the base model goes on to apply; this card states none of its own."
)


class _Base:
    """The base model as a card may name it: a hub id, or a folder of this machine."""

    def __init__(self, model: Mapping[str, Any], published: bool) -> None:
        base = str(model["base"])
        # A folder of that name comes first, as it did when the model was loaded.
        self.on_hub = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", base) is not None and not Path(base).is_dir()
        self.name = base if self.on_hub else Path(base).name
        self.revision = model.get("revision")
        self.place = base if self.on_hub else f"path/to/{self.name}" if published else str(Path(base).absolute())

    def arguments(self) -> str:
        return f'"{self.place}"' + (f', revision="{self.revision}"' if self.revision and self.on_hub else "")


def _header(record: Mapping[str, Any], base: _Base, lora: bool) -> str:
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if base.on_hub:  # the hub refuses a base that it does not have
        known |= {"base_model": base.name, "base_model_relation": "adapter" if lora else "finetune"}
    tags = ["text-to-image", "diffusers", *(["lora"] if lora else []), "preference-optimization"]
    if record["loss"] == "dpo":
        tags.append("diffusion-dpo")
    header: str = ModelCardData(**known, tags=tags).to_yaml()
    return header.rstrip() + "\n"


def _component(record: Mapping[str, Any]) -> str:
    """The pipeline's part that a full training replaces; its folder has that name."""
    return Path(record["model"].get("network") or "unet").name


def _usage(record: Mapping[str, Any], base: _Base, repo_id: str | None) -> str:
    """Code that runs as it stands, in the folder of the card or anywhere once it is published."""
    tuned, lines = record["model"].get("network"), ["from diffusers import DiffusionPipeline"]
    part, options = _component(record), ""
    if tuned:
        place = f'"{repo_id}", subfolder="{part}"' if repo_id else f'"{part}"'
        if record["method"] == "lora":  # the champion was fully tuned; its network lies where it was trained
            place = f'"path/to/{part}"' if repo_id else f'"{tuned}"'
        lines = [
            "from diffusers import AutoModel, DiffusionPipeline",
            "",
            f"{part} = AutoModel.from_pretrained({place})",
        ]
        options = f", {part}={part}"
    lines += [""] * (not tuned) + [f"pipeline = DiffusionPipeline.from_pretrained({base.arguments()}{options})"]
    if record["method"] == "lora":
        lines.append(f'pipeline.load_lora_weights("{repo_id or "adapter"}", weight_name="{ADAPTER_FILE}")')
    lines.append('image = pipeline("a red square on a blue background").images[0]')
    return "\n".join(["```python", *lines, "```"])


def _recipe(record: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """kappa: the factor on the difference of mean squared errors, since public "betas" mean different things."""
    numbers = {key: value for key, value in plan.items() if key not in LEFT_OUT and value is not None}
    lora = numbers.pop("lora", None)
    if lora and record["method"] == "lora":
        numbers |= {f"LoRA {key}": value for key, value in lora.items()}
    known = {"method": record["method"], "loss": record["loss"], "steps": record["steps"], "beta": record["beta"],
             "kappa": record["kappa"]}  # fmt: skip
    together = known | numbers | {"sha256 of the weights": record["sha256"]}
    return [(key.replace("_", " "), text(value)) for key, value in together.items()]


def _data(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    sealed, drawn_by = data["sealed"], dict(data.get("base_model") or {})
    if drawn_by.get("id"):
        drawn_by["id"] = _Base({"base": drawn_by["id"]}, published=True).name
    model = {key: value for key, value in drawn_by.items() if value}
    facts = [
        ("pairs", f"{sealed['rows']} in {sealed['shards']} shards, sealed {sealed['created_at']}"),
        ("data set id", sealed["dataset_id"]),
        ("config hash", sealed["config_hash"]),
        ("encoded by" if "imported" in data else "pictures drawn by", text(model or None)),
    ]
    facts += [(key, text(data[key])) for key in ("imported", "pictures") if key in data]
    return facts + [(key.replace("_", " "), text(data.get(key))) for key in ("generation", "label_rule", "code")]


def _scorers(scorers: Sequence[Mapping[str, Any]]) -> str:
    """All whose scores the pairs carry; the label rule names those that decided."""
    shown = ("name", "version", "unit", "fingerprint", "revision", "licence")
    if not scorers:
        return f"Scorers: {NOT_RECORDED}."
    rows = [[text(scorer.get(key) or None) for key in shown] for scorer in scorers]
    return "Scorers whose scores the pairs carry; the label rule names those that decided:\n\n" + table(shown, rows)


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated yet."]
    verdicts, decision = evaluation["verdicts"], evaluation["decision"]
    head = ("judge", "labelled the pairs", "wins / ties / losses", "win rate", "interval", "p", "p (Holm)")
    intro = "Tuned against base on prompts kept out of training, with equal seeds on both sides."
    found = [intro, table(head, [_verdict(verdict) for verdict in verdicts])]
    if evaluation.get("control"):
        rows = [(v["judge"], _rate(v), _interval(v)) for v in evaluation["control"]]
        found += ["The base against itself with other seeds, which must come out even:"]
        found += [table(("judge", "win rate", "interval"), rows)]
    outcome = "accepted" if decision["promoted"] else "not accepted"
    reasons = "\n".join(f"- {reason}" for reason in decision["reasons"])
    return [*found, f"By these numbers the model was **{outcome}**:\n\n{reasons}"]


def _verdict(verdict: Mapping[str, Any]) -> tuple[str, ...]:
    counts = f"{verdict['wins']} / {verdict['ties']} / {verdict['losses']}"
    probabilities = (f"{verdict['p_value']:.2g}", f"{verdict['p_holm']:.2g}")
    labelled = "no (held out)" if verdict["held_out"] else "yes"
    return verdict["judge"], labelled, counts, _rate(verdict), _interval(verdict), *probabilities


def _rate(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['win_rate']:.3f}"


def _interval(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['confidence']:.0%} [{verdict['low']:.3f}, {verdict['high']:.3f}]"
