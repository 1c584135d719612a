"""Files survive kills and failing disks: what is visible is complete."""

import functools
import itertools
import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.files import write_json
from data.manifest import MANIFEST, verify
from data.shards import write_shard
from tests.data.shard_world import SCHEMA, SHARDS, build, contents, row, seal, shard_rows


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed build."""
    path = tmp_path_factory.mktemp("reference")
    build(path)
    assert len(contents(path)) == SHARDS + 1
    return contents(path)


def in_child(work: Callable[[], object], kill_after: float | None = None) -> bool:
    """Run in a fork; True when it came to its end, False when it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    for _ in range(3000):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
            return not os.WIFSIGNALED(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise TimeoutError("the child did not end in 30 s")


def stepping(step: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Make every system call that matters call `step` before and after it."""
    for name in ("fsync", "replace"):
        patch.setattr(os, name, functools.partial(_between, step, getattr(os, name)))


def _between(step: Callable[[], None], real: Callable[..., None], *arguments: Any) -> None:
    step()
    real(*arguments)
    step()


def build_in_steps(folder: Path, last: int) -> int:
    """Build, but die by SIGKILL at step `last`; returns the number of steps."""
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        stepping(step, patch)
        build(folder, step)
    return next(steps) - 1


def assert_visible_is_complete(folder: Path, reference: dict[str, bytes]) -> None:
    visible = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
    assert visible.items() <= reference.items()
    if MANIFEST in visible:
        verify(folder, "deep")


def test_a_kill_at_any_step_leaves_whole_files_and_a_rerun_makes_the_same_bytes(
    folder: Path, reference: dict[str, bytes]
) -> None:
    steps = build_in_steps(folder / "count", last=0)
    assert steps == SHARDS * (4 + 2 * 3) + 2 * 3  # 4 batches, then fsync, replace, fsync; the manifest has no batch
    orphans = 0
    for last in range(1, steps + 1):
        place = folder / str(last)
        assert not in_child(functools.partial(build_in_steps, place, last))
        assert_visible_is_complete(place, reference)
        orphans += any(name.startswith(".") for name in contents(place))
        build(place)
        assert contents(place) == reference
    assert orphans > SHARDS  # else the kills hit nothing


def test_kills_at_random_instants(folder: Path, reference: dict[str, bytes]) -> None:
    """Five data sets, each killed and resumed until it is complete.

    Twelve steps of 5 ms take longer than the longest first delay, so each is killed at least once; the delays
    grow, so that a slow machine comes to an end too.
    """
    instants, kills = random.Random(0), 0
    for place in (folder / str(number) for number in range(5)):
        work = functools.partial(build, place, lambda: time.sleep(0.005))
        delays = (instants.uniform(0.001, 0.05) * 1.2**attempt for attempt in itertools.count())
        while not in_child(work, kill_after=next(delays)):
            kills += 1
            if place.exists():
                assert_visible_is_complete(place, reference)
        assert contents(place) == reference
    assert kills >= 5


@pytest.mark.parametrize(("name", "calls"), [("fsync", 2 * (SHARDS + 1)), ("replace", SHARDS + 1)])
def test_a_failing_call_leaves_no_half_file(
    name: str, calls: int, folder: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, name)
    for failing in range(calls):
        numbers = itertools.count()

        def fail(*arguments: Any, numbers: Iterator[int] = numbers, failing: int = failing) -> None:
            if next(numbers) == failing:
                raise OSError("no space left")
            real(*arguments)

        place = folder / str(failing)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(os, name, fail)
            build(place)
        assert not [path for path in contents(place) if path.startswith(".")]
        assert_visible_is_complete(place, reference)
        build(place)
        assert contents(place) == reference


@pytest.mark.parametrize("write", [lambda path: write_shard(path, shard_rows(0), SCHEMA),
                                   lambda path: write_json(path, {"rows": 70})])  # fmt: skip
def test_data_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    write: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL cannot show this: the page cache outlives the process. Power loss does not spare it."""
    calls: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        calls.append(("fsync folder", 0) if stat.S_ISDIR(found.st_mode) else ("fsync file", found.st_size))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append((f"{Path(source).name} -> {Path(target).name}", 0))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(folder / "a")
    size = (folder / "a").stat().st_size  # of the file at fsync: nothing was left in a buffer
    assert calls == [("fsync file", size), (f".a.{os.getpid()}.tmp -> a", 0), ("fsync folder", 0)]


def test_stale_temporaries_of_the_same_shard_go_and_others_stay(folder: Path) -> None:
    planted = [".00000-of-00001.arrow.99.tmp", ".00000-of-00001.arrow.7.tmp"]
    others = [".00001-of-00002.arrow.99.tmp", ".00000-of-00001.arrow.json.99.tmp"]
    for name in planted + others:
        (folder / name).write_bytes(b"half")
    seal(folder, row(0))
    verify(folder, "deep")
    assert sorted(contents(folder)) == sorted([*others, "00000-of-00001.arrow", MANIFEST])


def test_json_is_sorted_and_refuses_nan(folder: Path) -> None:
    write_json(folder / "a.json", {"b": 1, "a": [None]})
    assert (folder / "a.json").read_text() == '{\n  "a": [\n    null\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match=r"a\.json: not written: .*write null"):
        write_json(folder / "a.json", float("nan"))
    assert json.loads((folder / "a.json").read_text())["b"] == 1
