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
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from data.files import write_json

log = logging.getLogger(__name__)

Part = Literal["candidates", "base", "tuned", "control"]
"""The pictures of a cycle: the candidates that are paired and trained on, and those of the evaluation."""
EVALUATION_PARTS: tuple[Part, ...] = ("base", "tuned", "control")


@dataclass(frozen=True)
class CandidateSet:
    """Generated pictures of one part of a cycle, their prompt embeddings and their scores, shard by shard."""

    folder: Path
    shards: int

    def candidates(self, index: int) -> Path:
        """The file of one shard of pictures."""
        return self.folder / "candidates" / shard_name(index, self.shards)

    def embeddings(self, index: int) -> Path:
        """The file of the prompt embeddings that belong to one shard of pictures."""
        return self.folder / "embeddings" / shard_name(index, self.shards)

    def scores(self, scorer: str, index: int) -> Path:
        """The file of one scorer's scores of one shard of pictures."""
        return self.folder / "scores" / safe_name(scorer) / shard_name(index, self.shards)


@dataclass(frozen=True)
class CycleFolder:
    """The folder of one cycle: the paths of its files, whether they are there or not."""

    folder: Path

    @property
    def experiment(self) -> "Experiment":
        """The experiment that the cycle belongs to."""
        return Experiment(self.folder.parent.parent)

    @property
    def plan_file(self) -> Path:
        return self.folder / "plan.json"

    @property
    def prompts_file(self) -> Path:
        return self.folder / "prompts.json"

    @property
    def preferences(self) -> Path:
        """The folder of the preference shards."""
        return self.folder / "preferences"

    @property
    def comparison(self) -> Path:
        """How the labels compare with those of the cycle whose candidates these are."""
        return self.folder / "comparison.json"

    @property
    def training(self) -> Path:
        """The folder of checkpoints, metrics and trained weights."""
        return self.folder / "training"

    @property
    def evaluation(self) -> Path:
        """The folder of the evaluation's pictures, scores and results."""
        return self.folder / "evaluation"

    @property
    def results(self) -> Path:
        """The verdicts and the gate's decision."""
        return self.evaluation / "results.json"

    @property
    def promotion(self) -> Path:
        """What became of the gate's decision."""
        return self.folder / "promotion.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def finished(self) -> Path:
        """The last file of a cycle."""
        return self.folder / "finished.json"

    def finish(self, promoted: bool) -> None:
        """Note that nothing is left to do in this cycle."""
        write_json(self.finished, {"promoted": promoted})


@dataclass(frozen=True)
class Experiment:
    """A line of cycles that share a champion."""

    folder: Path

    @property
    def champion(self) -> Path:
        """The file of the champion; it is there once a cycle has been decided."""
        return self.folder / "champion.json"

    def run(self, number: int) -> Path:
        """The file of one run."""
        return self.folder / "runs" / f"{number:04d}.json"

    def runs(self) -> list[Path]:
        """The files of all runs, oldest first."""
        return sorted((self.folder / "runs").glob("[0-9]*.json"))

    def last_cycle(self) -> int:
        """The highest number that any cycle has been given, planned or only announced by a run; 0 = none."""
        folders = [int(path.name) for path in (self.folder / "cycles").glob("[0-9]*")]
        announced: list[int] = [number for path in self.runs() for number in json.loads(path.read_text())["cycles"]]
        return max([0, *folders, *announced])

    def cycle(self, number: int) -> CycleFolder:
        """The folder of the cycle of that number, planned or not."""
        return CycleFolder(self.folder / "cycles" / f"{number:04d}")


def experiment_at(workspace: str, experiment: str) -> Experiment:
    """The experiment of that name in a workspace. Raises ValueError for a name that is no plain folder name."""
    return Experiment(Path(workspace).expanduser().resolve() / plain_name("experiment", experiment))


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one run at a time work in a folder, an experiment's or a training's.

    The lock goes with the process, however it ends. Within one process it may be taken again: a stage that runs
    inside a whole cycle holds the cycle's lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", thread_local=False, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another run works in %s; waiting for it to end", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def plain_name(parameter: str, name: str) -> str:
    """The name, if it will do as a folder's. Raises ValueError that names the parameter."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{parameter}={name!r}: use letters, digits, '.', '_' and '-' only")
    return name


def shard_name(index: int, shards: int) -> str:
    """The file name of one of several shards, counted from 0."""
    return f"{index:05d}-of-{shards:05d}.arrow"


def safe_name(scorer: str) -> str:
    """A scorer's name as a folder name; a dotted path keeps its letters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", scorer)
