"""How often scorers agree with labels, and which preference scale fits them: `python -m scoring.accuracy SET`.

For example `python -m scoring.accuracy pickapic/test_unique.parquet --scorer pickscore --scorer hpsv2:v2.1`, or
`python -m scoring.accuracy HPD/test.json --scorer aesthetic --json accuracy.json`. docs/scorers.md explains the
figures. torch is loaded by scorers only.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tqdm import tqdm

from data.commands import JsonFile, check_figures, ends_with, run, tell
from data.ids import image_uid
from data.labelled import LabelledPair, read_labelled
from data.pictures import open_image
from scoring.labels.combine import order
from scoring.labels.expressions import Expression, Leaf, parse
from scoring.labels.soft_labels import fit_scale, log_loss, preference_probability
from scoring.scorers.registry import ScorerSource, known_scorers, load_scorer, parse_spec
from scoring.scorers.scorer import Scorer, ScorerInfo, ScoringError, info_of, score_images
from scoring.verdict.pair_statistics import (
    clustered_interval,
    hpdv2_accuracy,
    imagereward_accuracy,
    match,
    pickscore_accuracy,
)


@dataclass(frozen=True)
class ScoredPairs:
    """Labelled pairs with the scores of both sides."""

    prompt_ids: list[str]
    labels: np.ndarray
    """label_0, shape (n,)."""
    scores: np.ndarray
    """float64, shape (n, scorers, 2), in units of each scorer."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What one scorer is worth on one labelled set."""

    scorer: str
    """The scorer as it was asked for."""
    name: str
    version: str
    unit: str
    fingerprint: str
    weights: str
    accuracy: float
    """Share of decided pairs in the right order, an exact tie of the scorer counting half; NaN without such pairs."""
    low: float
    """Lower end of its 95 % interval, which allows for pairs that share a prompt (`clustered_interval`)."""
    high: float
    """Upper end of the interval."""
    pickscore_accuracy: float
    """PickScore's convention over all pairs, ties included, at `tie_threshold`."""
    tie_threshold: float
    """Largest |p1 - p0| that is predicted as a tie."""
    hpdv2_accuracy: float
    """1 - inversions / pairs, averaged over prompts."""
    imagereward_accuracy: float
    """Share of decided pairs in the right order, an exact tie of the scorer counting as wrong."""
    preference_scale: float | None
    """The one in the scorer's info; `pickscore_accuracy` falls back to the fitted one."""
    fitted_scale: float
    """The most likely scale on these pairs."""
    log_loss: float | None
    """Nats a pair at `preference_scale`; log 2 = 0.693 is what knowing nothing costs."""
    fitted_log_loss: float
    """Nats a pair at `fitted_scale`, on the pairs it was fitted to."""


def score_pairs(pairs: Iterable[LabelledPair], scorers: Sequence[Scorer], batch_size: int = 64) -> ScoredPairs:
    """Scores both sides of all pairs; an image is decoded and scored once a prompt, however many pairs it is in.

    `batch_size`: pairs that are looked at together, >= 1, so that at most twice as many images are in memory. Kept for
    the whole run are the scores of each image, about 200 bytes.
    Raises ValueError, naming the pair, for an image that cannot be read, and for no pair at all; ScoringError when a
    scorer fails.
    """
    known: dict[tuple[str, str], np.ndarray] = {}
    prompt_ids, labels, scores = [], [], []
    for batch in _batches(pairs, batch_size):
        sides = [[_key(pair.prompt, image) for image in (pair.image_0, pair.image_1)] for pair in batch]
        known |= _scored(batch, sides, known, scorers)
        prompt_ids += [pair.prompt_id for pair in batch]
        labels += [pair.label_0 for pair in batch]
        scores += [np.stack([known[key] for key in keys], axis=1) for keys in sides]
    if not labels:
        raise ValueError("the set holds no labelled pair")
    return ScoredPairs(prompt_ids, np.array(labels), np.stack(scores))


def _scored(
    batch: Sequence[LabelledPair],
    sides: Sequence[Sequence[tuple[str, str]]],
    known: Mapping[tuple[str, str], np.ndarray],
    scorers: Sequence[Scorer],
) -> dict[tuple[str, str], np.ndarray]:
    """Scores (scorers,) of the images of a batch that are not known yet."""
    new = {
        key: (pair, image)
        for pair, keys in zip(batch, sides, strict=True)
        for key, image in zip(keys, (pair.image_0, pair.image_1), strict=True)
        if key not in known
    }
    images = [_opened(pair, image) for pair, image in new.values()]
    prompts = [pair.prompt for pair, _ in new.values()]
    columns = [score_images(scorer, images, prompts).astype(np.float64) for scorer in scorers]
    return dict(zip(new, np.stack(columns, axis=1), strict=True))


def _batches(pairs: Iterable[LabelledPair], size: int) -> Iterator[list[LabelledPair]]:
    stream = iter(pairs)
    while batch := list(itertools.islice(stream, size)):
        yield batch


def _key(prompt: str, image: bytes | Path) -> tuple[str, str]:
    return prompt, image_uid(image) if isinstance(image, bytes) else str(image)


def _opened(pair: LabelledPair, image: bytes | Path) -> np.ndarray:
    try:
        return open_image(image)
    except ValueError as error:
        raise ValueError(f"pair {pair.id}: {error}") from error


def judgement(
    expression: Expression, specs: Sequence[str], infos: Mapping[str, ScorerInfo], scores: np.ndarray
) -> tuple[ScorerInfo, np.ndarray]:
    """What an expression makes of pairs: info and scores (n, 2) of its two sides.

    `scores`: (n, specs, 2). Of a combination only the difference means something (`combine`): side 0 gets the margin
    by which it is preferred, side 1 gets 0.
    """
    if isinstance(expression, Leaf):
        return infos[str(expression)], scores[:, specs.index(str(expression))]
    found = order(expression, {spec: scores[:, specs.index(spec)] for spec in expression.leaves}, infos)
    margins = np.array([found.margins(pair)[0, 1] for pair in range(found.prompts())])
    together = "+".join(sorted({infos[spec].fingerprint for spec in expression.leaves}))
    info = ScorerInfo(str(expression), "1", found.unit, fingerprint=together)
    return info, np.stack([margins, np.zeros_like(margins)], axis=1)


def measure(
    spec: str,
    info: ScorerInfo,
    scores: np.ndarray,
    labels: np.ndarray,
    prompt_ids: Sequence[str],
    tie_threshold: float = 0.0,
) -> Accuracy:
    """All figures of one scorer. `scores`: (n, 2), sides 0 and 1, in its unit; `labels`: (n,), label_0 of each pair.

    A scorer whose lower score is better is turned round for accuracies; its scales are negative, as the definition of
    `ScorerInfo.preference_scale` has it.
    """
    difference = scores[:, 0] - scores[:, 1]
    order = difference if info.higher_is_better else -difference
    decided = labels != 0.5
    right = match(order, labels - 0.5)[decided]
    groups = [prompt for prompt, counts in zip(prompt_ids, decided, strict=True) if counts]
    accuracy, low, high = clustered_interval(right, groups)
    own, fitted = info.preference_scale, fit_scale(difference, labels)
    probability = preference_probability(difference, fitted if own is None else own)
    return Accuracy(
        scorer=spec, name=info.name, version=info.version, unit=info.unit, fingerprint=info.fingerprint,
        weights=info.weights, accuracy=accuracy, low=low, high=high,
        pickscore_accuracy=pickscore_accuracy(probability, labels, tie_threshold), tie_threshold=tie_threshold,
        hpdv2_accuracy=hpdv2_accuracy(order, labels, prompt_ids),
        imagereward_accuracy=imagereward_accuracy(order, labels), preference_scale=own, fitted_scale=fitted,
        log_loss=None if own is None else log_loss(difference, labels, own),
        fitted_log_loss=log_loss(difference, labels, fitted),
    )  # fmt: skip


def agreements(specs: Sequence[str], infos: Sequence[ScorerInfo], scores: np.ndarray) -> dict[str, float]:
    """For each two scorers the share of pairs that they order alike, one tie counting half (`match`).

    `scores`: (n, scorers, 2). Keys are "a / b".
    """
    signs = np.array([1 if info.higher_is_better else -1 for info in infos])
    orders = (scores[:, :, 0] - scores[:, :, 1]) * signs
    columns = itertools.combinations(range(len(specs)), 2)
    return {f"{specs[i]} / {specs[j]}": float(match(orders[:, i], orders[:, j]).mean()) for i, j in columns}


def preset_lines(spec: str, scale: float) -> str:
    """What to put into a preset, or after the spec where one name stands for several scorers."""
    if "(" in spec:
        return f"{spec}: a combination has no scale of its own in a preset; on these pairs it would be {scale:.6g}"
    parsed = parse_spec(spec)
    if str(parsed) == parsed.name:
        return f"[scorers.{parsed.name}]\npreference_scale = {scale:.6g}"
    return f"{spec}{'&' if parsed.options else '?'}preference_scale={scale:.6g}"


@ends_with(OSError, ValueError, ScoringError)
def command(
    labelled_set: Annotated[str, typer.Argument(metavar="SET", help="Labelled set: file, folder or data-set id.")],
    scorer: Annotated[list[str], typer.Option(help="As in a preset; may be given several times.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the image names in a .json.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the hub.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many pairs, from the start.")] = None,
    tie_threshold: Annotated[float, typer.Option(help="|p1 - p0| that is a tie.")] = 0.0,
    source: Annotated[list[str], typer.Option(metavar="NAME=FOLDER", help="Weights of a scorer.")] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs that are looked at together.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """Measure how often scorers agree with labels, and fit the preference scale of each."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    check_figures(json_file)
    sources = dict(_source(text) for text in source)
    labelled = read_labelled(labelled_set, images, split)
    pairs = tqdm(itertools.islice(labelled, limit), total=limit, unit=" pairs", disable=None)
    scored, results, agreed = _measured(pairs, scorer, sources, device, batch_size, tie_threshold)
    figures = {
        "set": labelled.name,
        "pairs": len(scored.labels),
        "decided": int((scored.labels != 0.5).sum()),
        "prompts": len(set(scored.prompt_ids)),
        "unlabelled": labelled.unlabelled,
        "scorers": [_numbers(result) for result in results],
        "agreement": agreed,
    }
    tell(figures, json_file, lambda: _print(figures, results, agreed))


def _measured(
    pairs: Iterable[LabelledPair],
    texts: Sequence[str],
    sources: Mapping[str, ScorerSource],
    device: str,
    batch_size: int,
    tie_threshold: float,
) -> tuple[ScoredPairs, list[Accuracy], dict[str, float]]:
    """The scored pairs, each expression measured on them, and how often every two expressions order alike."""
    expressions = [parse(text, known_scorers(sources)) for text in texts]
    specs = list(dict.fromkeys(leaf for expression in expressions for leaf in expression.leaves))
    scorers = [load_scorer(spec, sources, device) for spec in specs]
    scored = score_pairs(pairs, scorers, batch_size)
    infos = {spec: info_of(scorer) for spec, scorer in zip(specs, scorers, strict=True)}
    judged = [judgement(expression, specs, infos, scored.scores) for expression in expressions]
    results = [
        measure(str(expression), info, scores, scored.labels, scored.prompt_ids, tie_threshold)
        for expression, (info, scores) in zip(expressions, judged, strict=True)
    ]
    for scorer in scorers:
        scorer.close()
    scores = np.stack([scores for _, scores in judged], axis=1)
    return scored, results, agreements(texts, [info for info, _ in judged], scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m scoring.accuracy", arguments)


def _numbers(result: Accuracy) -> dict[str, object]:
    """The figures as JSON knows them, which has no NaN."""
    return {name: None if value != value else value for name, value in asdict(result).items()}


def _print(report: Mapping[str, object], results: Sequence[Accuracy], agreed: Mapping[str, float]) -> None:
    facts = "{pairs} pairs of {prompts} prompts, {decided} decided; {unlabelled} rows without a label passed over"
    print(f"{report['set']}: {facts.format(**report)}")
    for result in results:
        interval = f"{result.accuracy:.4f} [{result.low:.4f}, {result.high:.4f}]"
        print(f"\n{result.scorer}  ({result.version}, {result.unit}, fingerprint {result.fingerprint})")
        print(f"  pairwise accuracy, 95 % interval over prompts   {interval}")
        rule = f"|p1 - p0| <= {result.tie_threshold:g} a tie"
        print(f"  PickScore's convention, {rule:<24}{result.pickscore_accuracy:.4f}")
        print(f"  HPDv2's convention, 1 - inversions / pairs      {result.hpdv2_accuracy:.4f}")
        print(f"  ImageReward's convention, ties wrong            {result.imagereward_accuracy:.4f}")
        scale = "no scale known"
        if result.log_loss is not None:
            scale = f"{result.log_loss:.4f} at scale {result.preference_scale:g}"
        print(f"  log loss a pair: chance {np.log(2):.4f}, {scale}, fitted {result.fitted_log_loss:.4f}")
        print(preset_lines(result.scorer, result.fitted_scale))
    for pair, share in agreed.items():
        print(f"\nordered alike by {pair}: {share:.4f}")


def _source(text: str) -> tuple[str, ScorerSource]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise ValueError(f"--source {text!r} is not of the form name=FOLDER")
    return name, ScorerSource(folder)


if __name__ == "__main__":
    raise SystemExit(main())
