"""Pictures kept in memory are those of the file, or are not kept."""

from pathlib import Path

import numpy as np
import pytest
from cachetools import LRUCache

from data.pictures import encode_image
from tasks import pictures


@pytest.fixture(autouse=True)
def _forget() -> None:
    pictures.forget()


def drawn(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "kept"), [("png", True), ("jpeg", False)])
def test_memory_and_file_give_the_same_pixels(kind: str, kept: bool) -> None:
    images, shard = drawn(), Path("a.arrow")
    encoded = [encode_image(image, kind) for image in images]
    stored = pictures.pictures(shard, slice(1, 4), encoded[1:4])
    pictures.keep(shard, images, kind)
    remembered = pictures.pictures(shard, slice(1, 4), encoded[1:4])
    np.testing.assert_array_equal(np.stack(remembered), np.stack(stored))
    assert (len(pictures.pictures(shard, slice(0, 5), [])) == 5) == kept  # without the files only memory has them


def test_the_oldest_shards_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LIMIT", 2 * drawn().nbytes)
    monkeypatch.setattr(pictures, "_kept", LRUCache(pictures.LIMIT, getsizeof=lambda images: images.nbytes))
    for name in "abc":
        pictures.keep(Path(name), drawn(), "png")
    assert [len(pictures.pictures(Path(name), slice(None), [])) for name in "abc"] == [0, 5, 5]
    pictures.keep(Path("large"), drawn(20), "png")
    assert pictures.pictures(Path("large"), slice(None), []) == []
