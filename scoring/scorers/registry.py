"""How one scorer is found: "pickscore", "hpsv2:v2.0?antialias=0", "clip:owner/name@commit", "package.module:Class".

Knows nothing of a particular scorer beyond the name of its class, and loads no weights to check a name. A name is
looked up in this order: what a source binds to it, the built-ins, the entry points of the group "rlaif.scorers",
and last "package.module:Class".
"""

from __future__ import annotations

import inspect
import json
import math
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

from scoring.scorers.pair_judge import Judge, is_pair_judge
from scoring.scorers.scorer import Scorer, ScoringError, info_of

ENTRY_POINT_GROUP = "rlaif.scorers"
BUILTINS = {
    "aesthetic": "scoring.scorers.aesthetic:Aesthetic",
    "clip": "scoring.scorers.clip:CLIPScore",
    "hpsv2": "scoring.scorers.hpsv2:HPSv2",
    "imagereward": "scoring.scorers.imagereward:ImageReward",
    "pickscore": "scoring.scorers.pickscore:PickScore",
    "vlm": "scoring.scorers.vlm.judge:VisionLanguageJudge",
}
SPEC = re.compile(
    r"(?P<name>[^\s:@?,()]+)(:(?P<variant>[^\s@?,()]+))?(@(?P<revision>[^\s?,()]+))?(\?(?P<options>[^\s,()]+))?"
)
RESERVED = ("source", "revision", "variant", "preference_scale")
"""What every scorer may be given after "?" or in a source; all else are the scorer's own options."""
TEXTS = ("source", "revision", "variant")
"""Options that stay text: read as a number, the commit 12345e7 would be another one."""


class UnknownScorer(ValueError):
    """No scorer has this name; the message lists the names that exist."""


@dataclass(frozen=True)
class ScorerSource:
    """What a preset binds a scorer's name to."""

    source: str | None = None
    """Folder or hub id of the weights. None = the scorer's own default."""
    factory: str | None = None
    """A built-in's name, or "package.module:Class" of a plug-in. None = the built-in or entry point of that name."""
    revision: str | None = None
    """Commit or tag of a hub id. None = the pinned commit of a default repository (`sources.PINNED`), of others the
    newest one, with a warning that names its commit."""
    variant: str | None = None
    """Version of the weights, for example "v2.0" of hpsv2. None = the scorer's own default."""
    preference_scale: float | None = None
    """Replaces the one in the scorer's info; `python -m scoring.accuracy` fits it. None = the scorer's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the scorer, for example {"antialias": False}."""


@dataclass(frozen=True)
class Spec:
    """A scorer as a user writes it: name[:variant][@revision][?key=value&key=value]."""

    name: str
    variant: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        tail = "&".join(f"{key}={_text(value)}" for key, value in sorted(self.options.items()))
        parts = [self.name, f":{self.variant}" if self.variant else "", f"@{self.revision}" if self.revision else ""]
        return "".join(parts) + (f"?{tail}" if tail else "")


def parse_spec(text: str) -> Spec:
    """Reads one scorer; of the values after "?" numbers, true, false and null are read as such, all else as text.

    `parse_spec(str(spec)) == spec` for every spec that it returns. Raises ValueError for what has not that form,
    and for a value that is given twice.
    """
    found = SPEC.fullmatch(text)
    if not found:
        raise ValueError(f"scorer {text!r} is not of the form name[:variant][@revision][?key=value&key=value]")
    options: dict[str, Any] = {}
    for item in (found["options"] or "").split("&") if found["options"] else []:
        key, equals, value = item.partition("=")
        if not key.isidentifier() or not equals:
            raise ValueError(f"scorer {text!r}: {item!r} after '?' is not of the form key=value")
        if key in options or (key in ("variant", "revision") and found[key]):
            raise ValueError(f"scorer {text!r}: {key} is given twice")
        options[key] = value if key in TEXTS else _value(value)
    return Spec(found["name"], found["variant"], found["revision"], options)


def _value(text: str) -> Any:
    """A finite JSON number, true, false or null; else the text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if value is None or (isinstance(value, int | float) and abs(value) < math.inf) else text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def known_scorers(sources: Mapping[str, ScorerSource]) -> list[str]:
    """Every name there is, sorted: built-ins, plug-ins of installed packages, and what sources bind."""
    return sorted({*BUILTINS, *_plugins(), *sources})


def check_scorer(spec: str, sources: Mapping[str, ScorerSource]) -> None:
    """Checks that one scorer can be found, without loading torch or weights; imports the module of a plug-in.

    A hub id is accepted as it is, because whether it exists is only known online; with HF_HUB_OFFLINE set it
    must be in the local cache. Raises UnknownScorer for a name nobody knows, and ValueError when a dotted
    path does not import, when the scorer knows no such option, or when a folder of weights does not exist or
    lacks files.
    """
    path, source = _locate(spec, sources)
    factory = _import(path)
    _check_arguments(spec, factory, source)
    if path in BUILTINS.values():
        factory.check(source)


def load_scorer(spec: str, sources: Mapping[str, ScorerSource], device: str = "cpu") -> Scorer:
    """The same as `load_judge` where a score of each image is needed. Raises ValueError also for a pair judge."""
    judge = load_judge(spec, sources, device)
    if is_pair_judge(judge):
        raise ValueError(f"scorer={spec!r}: it compares two images and gives none a score; leave out its mode")
    return judge


def load_judge(spec: str, sources: Mapping[str, ScorerSource], device: str = "cpu") -> Judge:
    """Builds a scorer or pair judge on `device` ("cpu", "cuda", "cuda:1"); built-ins read weights at the first score.

    `spec`: see the top of this module. Plug-ins are called as Class(source=..., device=...), and with revision=,
    variant= and further options only where a source or the spec sets them.
    Raises what `check_scorer` raises, and ScoringError when the weights do not load or the plug-in has no
    proper info.
    """
    path, source = _locate(spec, sources)
    factory = _import(path)
    _check_arguments(spec, factory, source)
    scorer: Judge = factory(source=source.source, device=device, **_arguments(source))
    info = info_of(scorer)
    if source.preference_scale is not None:
        if info.higher_is_better != (source.preference_scale > 0):
            raise ValueError(
                f"scorer {spec!r}: preference_scale={source.preference_scale} would prefer the worse image"
            )
        scorer.info = replace(info, preference_scale=source.preference_scale)
    return scorer


def _arguments(source: ScorerSource) -> dict[str, Any]:
    """What goes to a factory beside source and device: only what is set."""
    given = {"revision": source.revision, "variant": source.variant}
    return {**{name: value for name, value in given.items() if value is not None}, **source.options}


def _check_arguments(spec: str, factory: Any, source: ScorerSource) -> None:
    """Raises ValueError for an argument that the factory does not take, listing those it takes."""
    scale = source.preference_scale
    if scale is not None and not (isinstance(scale, int | float) and scale and math.isfinite(scale)):
        raise ValueError(f"scorer {spec!r}: preference_scale must be a finite number other than 0, got {scale!r}")
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a factory written in C tells nothing
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    taken = [name for name in parameters if name not in ("source", "device")]
    if unknown := [name for name in _arguments(source) if name not in taken]:
        raise ValueError(f"scorer {spec!r} takes no {unknown[0]!r}; it takes {', '.join(taken) or 'no options'}")


def _locate(text: str, sources: Mapping[str, ScorerSource]) -> tuple[str, ScorerSource]:
    """The dotted path behind a spec, and what its name is bound to with the spec's own values on top."""
    spec, plugins = parse_spec(text), _plugins()
    bound = sources.get(spec.name, ScorerSource())
    path = BUILTINS.get(bound.factory or "", bound.factory) or BUILTINS.get(spec.name) or plugins.get(spec.name)
    variant = spec.variant
    if not path and variant and spec.name not in sources:
        path, variant = f"{spec.name}:{variant}", None
    if not path:
        why = "has a source but no factory" if spec.name in sources else "is not known"
        known = ", ".join(known_scorers(sources))
        raise UnknownScorer(f'scorer {spec.name!r} {why}; known scorers: {known}, or "package.module:Class"')
    reserved = {name: spec.options[name] for name in RESERVED if name in spec.options}
    own = {name: value for name, value in spec.options.items() if name not in RESERVED}
    given = {"variant": variant, "revision": spec.revision, **reserved}
    given = {name: value for name, value in given.items() if value is not None}
    return path, replace(bound, **given, options={**bound.options, **own})


def _plugins() -> dict[str, str]:
    """Name -> dotted path of the scorers that installed packages announce."""
    return {entry.name: f"{entry.module}:{entry.attr}" for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _import(path: str) -> Any:
    """The object that "package.module:Class" names; ValueError when it does not import."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f'scorer {path!r} is not of the form "package.module:Class"')
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scorer {path!r} does not import: {error}") from error


__all__ = [
    "BUILTINS", "ENTRY_POINT_GROUP", "ScorerSource", "ScoringError", "Spec", "UnknownScorer",
    "check_scorer", "known_scorers", "load_judge", "load_scorer", "parse_spec",
]  # fmt: skip
