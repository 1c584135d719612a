"""Shards survive kills and failing disks, show every damage, and give back what was written."""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data.columns import latent_column
from data.files import write_json
from data.ids import image_uid, pair_id, prompt_id
from data.manifest import MANIFEST, make_manifest, read_manifest, verify, write_manifest
from data.schema import pair_schema, score_schema
from data.shards import ShardError, ShardRecord, adopt_shard, read_shard, write_shard

METADATA = {"config_hash": "c0ffee", "scorers": [{"name": "clip", "version": "1", "unit": "cosine"}]}
SCHEMA = pair_schema(4, 2, ["clip"], METADATA)
SHARDS, ROWS = 3, 70


@functools.cache
def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (index % 256, index // 256, 7)).save(file, "PNG")
    return file.getvalue()


def row(index: int, label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    prompt, data = prompt_id(f"prompt {index}"), [png(2 * index), png(2 * index + 1)]
    found: dict[str, Any] = {"pair_id": pair_id(prompt, 0, 1, "m", "m", "c"), "prompt_id": prompt}
    found |= {"caption": f"prompt {index}", "prompt_embedding": [0.5, index], "config_hash": "c"}
    for side in (0, 1):
        found |= {
            f"image_{side}": {"bytes": data[side], "path": None},
            f"seed_{side}": side,
            f"model_{side}": "m",
        }
        found |= {f"image_{side}_uid": image_uid(data[side]), f"latent_{side}": [index, side, 0, -1]}
        found |= {f"score_clip_{side}": 0.25 - side, f"label_{side}": label and abs(side - label)}
    found |= {
        "label_0": label,
        "label_1": None if label is None else 1 - label,
        "soft_label_0": None if label is None else 0.25 + label / 2,
        "soft_label_1": None if label is None else 0.75 - label / 2,
        "has_label": label is not None,
    }
    return found | {"are_different": True, "margin": 1.25} | changes


def table(*rows: dict[str, Any]) -> pa.Table:
    columns = {name: [r[name] for r in rows] for name in SCHEMA.names}
    halves = {name for name in SCHEMA.names if pa.types.is_fixed_size_list(SCHEMA.field(name).type)}
    arrays = {name: np.array(columns[name], np.float16) for name in halves}
    built = [latent_column(arrays[f.name]) if f.name in halves else pa.array(columns[f.name], f.type) for f in SCHEMA]
    return pa.Table.from_arrays(built, schema=SCHEMA)


@functools.cache
def shard_rows(index: int) -> pa.Table:
    return table(*(row(index * ROWS + i) for i in range(ROWS)))


def build(folder: Path, step: Callable[[], None] = lambda: None) -> None:
    """What a resumable stage does: adopt what is there, write the rest, seal."""
    records = []
    for index in range(SHARDS):
        path = folder / f"{index:05d}-of-{SHARDS:05d}.arrow"
        adopted = adopt_shard(path, SCHEMA, ROWS)
        records.append(adopted or write_shard(path, paced(shard_rows(index), step), SCHEMA))
    write_manifest(folder, make_manifest({"train": records}, "c0ffee", "2026-01-01T00:00:00Z"))


def paced(rows: pa.Table, step: Callable[[], None]) -> Iterator[pa.RecordBatch]:
    for batch in rows.to_batches(max_chunksize=20):
        step()
        yield batch


def seal(folder: Path, *rows: dict[str, Any]) -> Path:
    """A complete data set of one shard."""
    record = write_shard(folder / "00000-of-00001.arrow", table(*rows), SCHEMA)
    write_manifest(folder, make_manifest({"train": [record]}, "c0ffee", "2026-01-01T00:00:00Z"))
    return folder / "00000-of-00001.arrow"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where possible: these tests call fsync hundreds of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed build."""
    path = tmp_path_factory.mktemp("reference")
    build(path)
    assert len(contents(path)) == SHARDS + 1
    return contents(path)


def test_a_slice_carries_no_bits_of_its_neighbours(folder: Path) -> None:
    """Five rows of eight, and the same five alone: Arrow itself writes another last byte of `has_label`."""
    eight = table(*(row(i) for i in range(8)))
    cut = write_shard(folder / "cut.arrow", eight.slice(0, 5), SCHEMA)
    alone = write_shard(folder / "alone.arrow", table(*(row(i) for i in range(5))), SCHEMA)
    assert cut.sha256 == alone.sha256


def test_rows_of_another_schema_are_not_written(folder: Path) -> None:
    with pytest.raises(ShardError, match="not written: column margin is missing, expected float"):
        write_shard(folder / "a.arrow", table(row(0)).drop_columns("margin"), SCHEMA)
    assert contents(folder) == {}


# Kills, failing disks, left-overs


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


# Damage


def test_every_truncation_is_an_error(folder: Path) -> None:
    path = folder / "a.arrow"
    schema = score_schema({})
    scores = pa.table({"candidate_id": ["a", "b"], "score": pa.array([1, 2], pa.float32())}, schema=schema)
    whole = write_shard(path, scores, schema)
    for length in reversed(range(whole.bytes)):
        os.truncate(path, length)
        with pytest.raises(ShardError, match=r"a\.arrow: found .*; expected a complete shard\. Delete"):
            adopt_shard(path, schema, 2)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_caught_by_the_checksum_but_not_by_opening(folder: Path) -> None:
    """Arrow has no checksum: without ours, a caption would silently become another."""
    path = seal(folder, row(0), row(1))
    flip(path, path.read_bytes().index(b"prompt 0"))
    verify(folder, "open")
    assert read_shard(path).column("caption").to_pylist() == ["qrompt 0", "prompt 1"]
    with pytest.raises(ShardError, match=r"found sha256 .*, expected .*The file changed after it was sealed"):
        verify(folder)


def test_a_bit_flipped_anywhere_is_caught_and_never_more_than_a_shard_error(folder: Path) -> None:
    """Every byte of a small file, so also those of the footer, the schema and its JSON."""
    schema = score_schema({"scorer": "clip"})
    scores = pa.table({"candidate_id": ["a"], "score": pa.array([1], pa.float32())}, schema=schema)
    path = folder / "0.arrow"
    record = write_shard(path, scores, schema)
    write_manifest(folder, make_manifest({"train": [record]}, "c", "now"))
    for position in range(record.bytes):
        flip(path, position)
        with pytest.raises(ShardError, match="found sha256"):
            verify(folder)
        with contextlib.suppress(ShardError):
            verify(folder, "open")
            adopt_shard(path, schema, 1)
        flip(path, position)
    verify(folder, "deep")


def test_levels_and_a_missing_manifest(folder: Path) -> None:
    with pytest.raises(ShardError, match=r"no manifest\.json; the data set is unfinished\. Rerun the flow"):
        verify(folder)
    seal(folder, row(0))
    with pytest.raises(ValueError, match="level is 'full', expected one of"):
        verify(folder, "full")  # type: ignore[arg-type]
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(ShardError, match=r"found KeyError.*expected a rlaif-shards manifest"):
        verify(folder)


def test_missing_stray_and_shorter_shards_are_named(folder: Path) -> None:
    build(folder)
    (folder / "00003-of-00003.arrow").write_bytes(b"")
    with pytest.raises(ShardError, match=r"00003-of-00003.arrow: found a shard that manifest.json does not name"):
        verify(folder, "open")
    (folder / "00003-of-00003.arrow").rename(folder / ".aside")
    os.truncate(folder / "00001-of-00003.arrow", 100)
    with pytest.raises(ShardError, match=r"00001-of-00003.arrow: found 100 bytes, expected \d{5} bytes"):
        verify(folder, "open")
    (folder / "00001-of-00003.arrow").unlink()
    with pytest.raises(ShardError, match=r"00001-of-00003.arrow: found nothing, expected \d{5} bytes"):
        verify(folder, "open")


def test_one_data_set_has_one_schema(folder: Path) -> None:
    other = pair_schema(4, 2, ["clip"], METADATA | {"config_hash": "other"})
    records = [write_shard(folder / "0.arrow", table(row(0)), SCHEMA)]
    records.append(write_shard(folder / "1.arrow", table(row(1)).cast(other), other))
    write_manifest(folder, make_manifest({"train": records}, "c", "now"))
    with pytest.raises(ShardError, match=r'1.arrow: metadata config_hash is "other", expected "c0ffee"'):
        verify(folder, "open")


def test_a_shard_of_another_plan_is_not_adopted(folder: Path) -> None:
    path = seal(folder, row(0))
    assert adopt_shard(folder / "absent.arrow", SCHEMA) is None
    assert adopt_shard(path, SCHEMA, 1) == adopt_shard(path, None)
    other = pair_schema(4, 2, ["clip"], METADATA | {"config_hash": "other"})
    with pytest.raises(ShardError, match=r'config_hash is "c0ffee", expected "other". Another plan wrote it: delete'):
        adopt_shard(path, other)
    with pytest.raises(ShardError, match="found 1 rows, expected 2"):
        adopt_shard(path, SCHEMA, 2)


def test_an_unknown_major_version_is_refused_with_both_numbers(folder: Path) -> None:
    path = folder / "a.arrow"
    future = SCHEMA.with_metadata({"rlaif": '{"schema_version": "2.0"}'})
    write_shard(path, table(row(0)).cast(future), future)
    with pytest.raises(ShardError, match=r"a\.arrow: schema version 2\.0, this code reads 1\.x"):
        read_shard(path)
    (folder / MANIFEST).write_text('{"schema_version": "3.1"}')
    with pytest.raises(ShardError, match=r"manifest\.json: schema version 3\.1, this code reads 1\.x"):
        read_manifest(folder)


# Rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_1": {"bytes": png(9), "path": None}}, "image_1 hashes to .*, image_1_uid says"),
        ({"image_0": {"bytes": b"?", "path": None}, "image_0_uid": image_uid(b"?")}, "does not decode"),
        ({"image_0": None}, "image_0 is null"),
        ({"caption": None}, "caption is null"),
        ({"score_clip_0": float("nan")}, "score_clip_0 is not finite"),
        ({"margin": float("inf")}, "margin is not finite"),
        ({"latent_1": [0, 0, float("nan"), 0]}, "latent_1 is not finite"),
        ({"label_0": 0.75, "label_1": 0.25}, "labels are 0.75 and 0.25, expected 0, 0.5 or 1"),
        ({"label_0": 1.0, "label_1": 1.0}, "labels are 1.0 and 1.0"),
        ({"soft_label_0": 0.75, "soft_label_1": 0.5}, "soft labels are 0.75 and 0.5, expected a probability"),
        ({"soft_label_0": 1.5, "soft_label_1": -0.5}, "soft labels are 1.5 and -0.5"),
        ({"soft_label_0": 1.0, "soft_label_1": None}, "soft labels are 1.0 and None"),
        ({"label_0": None, "label_1": None}, "has_label is true but label_0 is null"),
        ({"are_different": False}, "are_different is False, the image uids say True"),
        ({"pair_id": row(0)["pair_id"]}, "occurs twice, expected unique ids"),
    ],
)
def test_a_deep_check_names_the_unfit_row(changes: dict[str, Any], message: str, folder: Path) -> None:
    path = seal(folder, row(0), row(1, **changes), row(2, label=None, score_clip_0=None))
    verify(folder, "checksum")
    with pytest.raises(ShardError, match=f"{path.name}: row 1: .*{message}"):
        verify(folder, "deep")


def test_shards_of_schema_1_0_pass_the_deep_check(folder: Path) -> None:
    """They have no soft labels."""
    old = table(row(0)).drop_columns(["soft_label_0", "soft_label_1"])
    record = write_shard(folder / "a.arrow", old, old.schema)
    write_manifest(folder, make_manifest({"train": [record]}, "c", "now"))
    verify(folder, "deep")


def test_sound_rows_of_each_label_pass_the_deep_check(folder: Path) -> None:
    seal(folder, row(0, 1.0), row(1, 0.0), row(2, 0.5), row(3, None, margin=None, score_clip_1=None))
    assert verify(folder, "deep").rows == 4


# Manifest


def test_the_manifest_tells_what_was_sealed(folder: Path) -> None:
    build(folder)
    manifest = read_manifest(folder)
    assert (manifest.rows, len(manifest.shards), manifest.config_hash) == (SHARDS * ROWS, SHARDS, "c0ffee")
    later = make_manifest(manifest.splits, "c0ffee", "2027-01-01T00:00:00Z")
    assert later.dataset_id == manifest.dataset_id and later.created_at != manifest.created_at
    assert make_manifest({"train": manifest.shards[1:]}, "c0ffee", "").dataset_id != manifest.dataset_id
    found = json.loads((folder / MANIFEST).read_text())
    assert found["format"] == "rlaif-shards" and found["splits"]["train"]["rows"] == SHARDS * ROWS


def test_a_folder_with_an_absent_shard_cannot_be_sealed(folder: Path) -> None:
    absent = ShardRecord("0.arrow", 1, 100, "0" * 64)
    with pytest.raises(ShardError, match=r"0\.arrow: found nothing, expected 100 bytes"):
        write_manifest(folder, make_manifest({"train": [absent]}, "c", "now"))
    assert contents(folder) == {}
