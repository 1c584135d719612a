"""The parameters of a run: a preset from `recipes/`, and what the user wants to differ."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from scoring.labels.expressions import Expression, parse
from scoring.scorers.registry import ScorerSource, known_scorers
from tasks.record.settings import Evaluation, Execution, Gate, Generation, Given, Pairing, Settings, Training

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SECTIONS: dict[str, type[Settings]] = {
    "generation": Generation,
    "pairing": Pairing,
    "training": Training,
    "evaluation": Evaluation,
    "gate": Gate,
    "execution": Execution,
}


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names it, its value and the way out."""


class Weights(BaseModel):
    """Where a scorer's weights come from; see `scoring.scorers.registry.ScorerSource`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str | None = None
    factory: str | None = None
    revision: str | None = None
    variant: str | None = None
    preference_scale: float | None = None
    options: dict[str, Any] = {}

    def bound(self) -> ScorerSource:
        return ScorerSource(**self.model_dump())


def _expression(value: Expression | str) -> Expression:
    return parse(value) if isinstance(value, str) else value


Written = Annotated[Expression, PlainValidator(_expression), PlainSerializer(lambda value: value.text, return_type=str)]
"""A scorer expression that is stored as it was written."""


class Recipe(BaseModel):
    """A complete, resolved set of parameters: no field is left open."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    preset: str
    base_model: str
    revision: str | None = None
    prompts: str
    scorer: Written
    judges: list[Written] = Field(min_length=1)
    scorers: dict[str, Weights]
    seed: int
    candidates_of: str | None = None
    generation: Generation
    pairing: Pairing
    training: Training
    evaluation: Evaluation
    gate: Gate
    execution: Execution

    def sources(self) -> dict[str, ScorerSource]:
        """What scorers' names are bound to."""
        return {name: weights.bound() for name, weights in self.scorers.items()}


def preset_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_preset(preset: str) -> dict[str, Any]:
    """A recipe by name, or any TOML file by path, on top of the one that it `extends`, if it does.

    Raises ParameterError listing the names there are, or when recipes extend one another in a circle.
    """
    path = _recipe_file(preset)
    values, seen = _read_toml(preset, path), [path]
    while "extends" in values:
        name = str(values.pop("extends"))
        path = _recipe_file(name, beside=path.parent)
        if path in seen:
            chain = " -> ".join(file.stem for file in [*seen, path])
            raise ParameterError(f"preset={preset!r}: recipes extend one another in a circle ({chain}); break it")
        seen.append(path)
        values = _merged(_read_toml(name, path), values)
    return values


def _recipe_file(preset: str, beside: Path = Path()) -> Path:
    """Where a recipe lies; beside: the folder that a path is relative to."""
    path = beside / Path(preset).expanduser() if preset.endswith(".toml") else RECIPES / f"{preset}.toml"
    if not path.is_file():
        names = ", ".join(preset_names())
        raise ParameterError(f"preset={preset!r}: no such recipe; there are {names}, or give the path of a .toml")
    return path.resolve()


def _read_toml(preset: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ParameterError(f"preset={preset!r}: {path} is not valid TOML: {error}") from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Section by section, field by field. A field that is a table itself is one value and is replaced as a whole:
    a scheduler's options and where a scorer comes from mean nothing under another one's name."""
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            merged[name] = {**below[name], **above[name]}
    return merged


def resolve(preset: str, seed: int, flat: dict[str, Any], sections: Mapping[str, Given[Settings]]) -> Recipe:
    """Put what the user gave on top of the preset.

    flat: the swappable parameters by name, None = as the preset says. sections: what was given of groups, by name.
    Raises ParameterError when preset and user together leave a field open, and for a scorer or judge that cannot be
    read.
    """
    values = read_preset(preset)
    values |= {name: value for name, value in flat.items() if value is not None}
    for name, kind in SECTIONS.items():
        given = sections[name].values() if name in sections else {}
        merged = {**values.get(name, {}), **given}
        missing = sorted(set(kind.model_fields) - set(merged))
        if missing:
            raise ParameterError(f"preset={preset!r} names no value for {', '.join(f'{name}.{f}' for f in missing)}")
        values[name] = merged
    if "scorer" in values and "judges" in values:
        sources = sources_of(values)
        values["scorer"] = read_expression("scorer", values["scorer"], sources)
        values["judges"] = [read_expression("judges", text, sources) for text in values["judges"]]
    return Recipe(preset=preset, seed=seed, **values)


def sources_of(preset: Mapping[str, Any]) -> dict[str, ScorerSource]:
    """What a preset's names of scorers are bound to."""
    return {name: Weights(**weights).bound() for name, weights in preset.get("scorers", {}).items()}


def read_expression(parameter: str, text: str, sources: Mapping[str, ScorerSource]) -> Expression:
    """The expression that a parameter holds. Raises ParameterError that names the parameter and lists the scorers."""
    try:
        return parse(text, known_scorers(sources))
    except ValueError as error:
        raise ParameterError(f"{parameter}={text!r}: {error}") from error
