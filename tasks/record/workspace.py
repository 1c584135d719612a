"""Every path of a workspace, in one place.

    <workspace>/<experiment>/champion.json          the best accepted model, and how it came to be
                             runs/0001.json         the parameters of a run and the cycles it comprises
                             cycles/0001/plan.json  everything resolved
                                         prompts.json
                                         candidates/ embeddings/ scores/<scorer>/      of the training prompts
                                         preferences/  training/  relabelled/<scorer>/
                                         evaluation/<part>/candidates/ scores/ ...     base, tuned, control
                                         evaluation/results.json  promotion.json  report.html  finished.json

The disk is the truth: what is visible is complete, and `finished.json` is a cycle's last file.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["training", "base", "tuned", "control"]
EVALUATION_PARTS: tuple[Part, ...] = ("base", "tuned", "control")


@dataclass(frozen=True)
class CandidateSet:
    """Generated pictures of one part of a cycle, their prompt embeddings and their scores, shard by shard."""

    folder: Path
    shards: int

    def candidates(self, index: int) -> Path:
        return self.folder / "candidates" / shard_name(index, self.shards)

    def embeddings(self, index: int) -> Path:
        return self.folder / "embeddings" / shard_name(index, self.shards)

    def scores(self, scorer: str, index: int) -> Path:
        return self.folder / "scores" / safe_name(scorer) / shard_name(index, self.shards)


@dataclass(frozen=True)
class Cycle:
    """The folder of one cycle."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.json"

    @property
    def preferences(self) -> Path:
        return self.folder / "preferences"

    @property
    def comparison(self) -> Path:
        """How the labels compare with those of the cycle whose candidates these are."""
        return self.folder / "comparison.json"

    @property
    def training(self) -> Path:
        return self.folder / "training"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def results(self) -> Path:
        return self.evaluation / "results.json"

    @property
    def promotion(self) -> Path:
        return self.folder / "promotion.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def finished(self) -> Path:
        return self.folder / "finished.json"

    def part(self, part: Part, shards: int) -> CandidateSet:
        return CandidateSet(self.folder if part == "training" else self.evaluation / part, shards)


@dataclass(frozen=True)
class Experiment:
    """A line of cycles that share a champion."""

    folder: Path

    @property
    def champion(self) -> Path:
        return self.folder / "champion.json"

    def run(self, number: int) -> Path:
        return self.folder / "runs" / f"{number:04d}.json"

    def runs(self) -> list[Path]:
        return sorted((self.folder / "runs").glob("[0-9]*.json"))

    def last_cycle(self) -> int:
        """The highest number that any cycle has been given, planned or only announced by a run; 0 = none."""
        folders = [int(path.name) for path in (self.folder / "cycles").glob("[0-9]*")]
        announced: list[int] = [number for path in self.runs() for number in json.loads(path.read_text())["cycles"]]
        return max([0, *folders, *announced])

    def cycle(self, number: int) -> Cycle:
        return Cycle(self.folder / "cycles" / f"{number:04d}")


def experiment_at(workspace: str, experiment: str) -> Experiment:
    """Raises ValueError for a name that is no plain folder name."""
    return Experiment(Path(workspace).expanduser().resolve() / plain_name("experiment", experiment))


def plain_name(parameter: str, name: str) -> str:
    """The name, if it will do as a folder's. Raises ValueError that names the parameter."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{parameter}={name!r}: use letters, digits, '.', '_' and '-' only")
    return name


def shard_name(index: int, shards: int) -> str:
    return f"{index:05d}-of-{shards:05d}.arrow"


def safe_name(scorer: str) -> str:
    """A scorer's name as a folder name; a dotted path keeps its letters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", scorer)
