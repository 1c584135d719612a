"""Progress of anything longer than a few seconds: a bar in a terminal, log lines and a Prefect artifact elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException
from prefect.logging.handlers import PrefectConsoleHandler
from tqdm import tqdm

log = logging.getLogger(__name__)
PACKAGES = ("flows", "tasks", "training", "scoring")
LOG_SECONDS = 5.0
Advance = Callable[..., None]


def show_logs() -> None:
    """Let the log lines of our packages reach the terminal as well; prefect.toml sends them to the UI."""
    handler = PrefectConsoleHandler(stream=sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)-7s | %(message)s", "%H:%M:%S"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        if not any(isinstance(known, PrefectConsoleHandler) for known in logger.handlers):
            logger.addHandler(handler)
            logger.propagate = False


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Yields `advance(n, note="")`. Updates cost a request, so they come at most every few seconds."""
    bar = tqdm(total=total, desc=description, unit=unit, disable=not sys.stderr.isatty(), leave=False)
    reporter = _Reporter(description, total, unit)

    def advance(count: int, note: str = "") -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update(count)
        reporter.advance(count, note)

    try:
        yield advance
        reporter.close()
    finally:
        bar.close()


@contextmanager
def _unimportant() -> Iterator[None]:
    """A server that restarts must not end a training of hours for want of a progress bar."""
    try:
        yield
    except (HTTPError, PrefectException) as error:
        log.debug("progress not reported: %s", error)


class _Reporter:
    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, 0
        self.started = self.told = time.monotonic()
        self.artifact = self._create() if TaskRunContext.get() else None

    def _create(self) -> UUID | None:
        with _unimportant():
            return cast(UUID, create_progress_artifact(progress=0.0, description=self.description))
        return None

    def _update(self, percent: float) -> None:
        if self.artifact is not None:
            with _unimportant():
                update_progress_artifact(self.artifact, progress=percent)

    def advance(self, count: int, note: str) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= LOG_SECONDS:
            self.told = now
            self._tell(note)

    def _tell(self, note: str) -> None:
        pace = self.done / (time.monotonic() - self.started)
        log.info("%s: %d/%d %s (%.1f/s) %s", self.description, self.done, self.total, self.unit, pace, note)
        self._update(min(100.0, 100.0 * self.done / self.total))  # a total may be a guess

    def close(self) -> None:
        self._update(100.0)
