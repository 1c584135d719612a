"""Where the time of a training step goes, by its parts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from training.loop.run import Run


def parts(run: Run, steps: Iterable[int], clock: Callable[[], float]) -> dict[str, float]:
    """Share of each part of the time of some steps. Parts within parts are taken out of the outer ones."""
    spent = dict.fromkeys(("read", "noise", "reference", "policy", "backward", "clip", "optimizer", "metrics"), 0.0)
    stack: list[float] = []
    inside: list[str] = []

    def timing(name: str, call: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if inside[-1:] == ["reference"]:  # its own forward pass
                return call(*args, **kwargs)
            start = clock()
            inside.append(name)
            stack.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                whole = clock() - start
                inside.pop()
                spent[name] += whole - stack.pop()
                if stack:
                    stack[-1] += whole

        return wrapped

    with ExitStack() as patches:
        for owner, attribute, name in _places(run):
            patches.enter_context(mock.patch.object(owner, attribute, timing(name, getattr(owner, attribute))))
        with _whole(clock) as whole:
            for step in steps:
                run.step(step)
    spent["rest"] = whole[0] - sum(spent.values())
    return {name: seconds / whole[0] for name, seconds in spent.items()}


def _places(run: Run) -> list[tuple[Any, str, str]]:
    return [
        (run, "_batches", "read"), (run.loss, "_inputs", "noise"), (run.loss, "_reference", "reference"),
        (run.loss, "_predict", "policy"), (run.accelerator, "backward", "backward"),
        (run.accelerator, "clip_grad_norm_", "clip"), (run.optimizer, "step", "optimizer"), (run, "_means", "metrics"),
    ]  # fmt: skip


@contextmanager
def _whole(clock: Callable[[], float]) -> Iterator[list[float]]:
    spent, start = [0.0], clock()
    yield spent
    spent[0] = clock() - start
