"""What a scorer is, how one is found by name, and the guard around its numbers.

Knows nothing of a particular scorer beyond the name of its class, and loads no weights to check a name. A
name is looked up in this order: the factory that a source binds to it, the built-ins, the entry points of the
group "rlaif.scorers", and last "package.module:Class".
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

ENTRY_POINT_GROUP = "rlaif.scorers"
BUILTINS = {"hpsv2": "scoring.hpsv2:HPSv2", "pickscore": "scoring.pickscore:PickScore"}


class UnknownScorer(ValueError):
    """No scorer has this name; the message lists the names that exist."""


class ScoringError(RuntimeError):
    """A scorer cannot be loaded from its weights, or returned something that is no score."""


@dataclass(frozen=True)
class ScorerInfo:
    """What has to be known to read a score and to decide whether two scores may be compared."""

    name: str
    """Name of the scorer, for example "pickscore"."""
    version: str
    """Which weights family, for example "v2.1"; scores of different versions are not comparable."""
    unit: str
    """Unit of the score, for example "logit" or "cosine"."""
    higher_is_better: bool
    """Whether a larger score means a better image."""
    source: str
    """Where the weights came from: a folder, or a hub id with its commit."""
    fingerprint: str
    """Short hex digest of what determines the numbers: name, version, preprocessing, dtype, weights."""


class Scorer(Protocol):
    """A function from (image, caption) to a number, with weights behind it."""

    info: ScorerInfo

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores image i against prompt i: uint8 arrays (height, width, 3) of any sizes -> float32 (n,)."""
        ...

    def close(self) -> None:
        """Frees the memory of the weights; the scorer cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class ScorerSource:
    """What a preset binds a scorer's name to."""

    source: str | None = None
    """Folder or hub id of the weights. None = the scorer's own default."""
    factory: str | None = None
    """"package.module:Class" of a plug-in. None = the built-in or entry point of that name."""
    revision: str | None = None
    """Commit or tag of a hub id. None = the newest one."""
    variant: str | None = None
    """Version of the weights, for example "v2.0" of hpsv2. None = the scorer's own default."""


def known_scorers(sources: Mapping[str, ScorerSource]) -> list[str]:
    """Every name there is, sorted: built-ins, plug-ins of installed packages, and what sources bind."""
    return sorted({*BUILTINS, *_plugins(), *sources})


def check_scorer(name: str, sources: Mapping[str, ScorerSource]) -> None:
    """Checks that a scorer can be found, without loading torch or weights; imports the module of a plug-in.

    A hub id is accepted as it is, because whether it exists is only known online; with HF_HUB_OFFLINE set it
    must be in the local cache. Raises UnknownScorer for a name nobody knows, and ValueError when a dotted
    path does not import, or when a folder of weights does not exist or lacks files.
    """
    path, source = _locate(name, sources)
    factory = _import(path)
    if path in BUILTINS.values():
        factory.check(source)


def load_scorer(name: str, sources: Mapping[str, ScorerSource], device: str = "cpu") -> Scorer:
    """Builds a scorer with its weights on `device` ("cpu", "cuda", "cuda:1").

    `name`: a name of `known_scorers`, or "package.module:Class". Plug-ins are called as Class(source=...,
    device=...), and with revision= and variant= only where a source sets them.
    Raises what `check_scorer` raises, and ScoringError when the weights do not load or the plug-in has no
    proper info.
    """
    path, source = _locate(name, sources)
    factory = _import(path)
    options = {"revision": source.revision, "variant": source.variant}
    given = {option: value for option, value in options.items() if value is not None}
    scorer: Scorer = factory(source=source.source, device=device, **given)
    info = getattr(scorer, "info", None)
    if missing := [field.name for field in fields(ScorerInfo) if not hasattr(info, field.name)]:
        kind = type(scorer).__qualname__
        raise ScoringError(f"scorer {name!r} ({kind}) lacks in its info: {', '.join(missing)}")
    return scorer


def score_images(scorer: Scorer, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Calls a scorer and vouches for the result: float32, shape (n,), every value finite.

    Raises ValueError for inputs that are no images and prompts of equal number, and ScoringError, naming the
    scorer, the index and the prompt, for a result of another shape, not numeric, NaN or infinite. With n = 0
    the scorer is not called.
    """
    check_inputs(images, prompts)
    if not len(images):
        return np.zeros(0, dtype=np.float32)
    name, values = scorer.info.name, np.asarray(scorer.score(images, prompts))
    if values.shape != (len(images),) or values.dtype.kind not in "fiu":
        raise ScoringError(
            f"scorer {name!r} returned {values.dtype} of shape {values.shape} for {len(images)} images; "
            f"expected float32 of shape ({len(images)},)"
        )
    # A double beyond the float32 range becomes infinite here and is refused below, so the warning says
    # nothing new.
    with np.errstate(over="ignore"):
        scores = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ScoringError(
            f"scorer {name!r} returned {values[bad[0]]} for image {bad[0]} with prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(scores)} scores are not finite)"
        )
    return scores


def check_inputs(images: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
    """Raises ValueError unless there is one str of a prompt for each uint8 array (height, width, 3)."""
    if isinstance(prompts, str) or len(images) != len(prompts):
        count = "one string" if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"need one prompt an image, got {len(images)} images and {count} prompts")
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not _is_rgb(image.shape):
            found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image {index} must be a uint8 array (height, width, 3), got {found}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index} must be a str, got {type(prompt).__name__}")


def _is_rgb(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 0 and shape[2] == 3


def _locate(name: str, sources: Mapping[str, ScorerSource]) -> tuple[str, ScorerSource]:
    """The dotted path behind a name, and the source bound to that name."""
    source, plugins = sources.get(name, ScorerSource()), _plugins()
    if path := source.factory or BUILTINS.get(name):
        return path, source
    if name in plugins:
        return plugins[name], source
    if ":" in name:
        return name, source
    why = "has a source but no factory" if name in sources else "is not known"
    known = ", ".join(known_scorers(sources))
    raise UnknownScorer(f'scorer {name!r} {why}; known scorers: {known}, or "package.module:Class"')


def _plugins() -> dict[str, str]:
    """Name -> dotted path of the scorers that installed packages announce."""
    return {entry.name: f"{entry.module}:{entry.attr}" for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _import(path: str) -> Any:
    """The object that "package.module:Class" names; ValueError when it does not import."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f'scorer {path!r} is not of the form "package.module:Class"')
    try:
        start: Any = importlib.import_module(module)
        return reduce(getattr, attribute.split("."), start)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scorer {path!r} does not import: {error}") from error
