"""What every built-in scorer promises, each test run on both."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.scorers.registry import ScorerSource, load_scorer
from scoring.scorers.scorer import ScoringError, score_images
from tests.rounding import of_cosines
from tests.scoring.conftest import SHAPES

pytestmark = pytest.mark.numerical

# Float32 noise of another matrix shape, in units of the scorer: of a cosine, and of one times the scale of 100.
NOISE = {"hpsv2": of_cosines(20, 16), "pickscore": 100 * of_cosines(20, 16)}


def test_a_score_does_not_depend_on_its_batch_mates(
    tiny_scorer: Any, images: list[np.ndarray], captions: list[str]
) -> None:
    together = tiny_scorer.score(images, captions)
    assert np.ptp(together) > 1e3 * NOISE[tiny_scorer.info.name]
    alone = [tiny_scorer.score([image], [caption])[0] for image, caption in zip(images, captions, strict=True)]
    order = np.random.default_rng(1).permutation(len(images))
    shuffled = tiny_scorer.score([images[i] for i in order], [captions[i] for i in order])
    atol = NOISE[tiny_scorer.info.name]
    np.testing.assert_allclose(alone, together, rtol=0, atol=atol)
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=atol)
    np.testing.assert_array_equal(tiny_scorer.score(images, captions), together)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(SHAPES))), batch_size=st.integers(1, 12))
def test_order_and_batch_size_move_no_score(
    tiny_scorer: Any, images: list[np.ndarray], captions: list[str], order: list[int], batch_size: int
) -> None:
    """By no more than rounding does, whatever shares a batch."""
    expected, usual = tiny_scorer.score(images, captions), tiny_scorer._batch_size
    tiny_scorer._texts.clear()
    tiny_scorer._batch_size = batch_size
    try:
        shuffled = tiny_scorer.score([images[i] for i in order], [captions[i] for i in order])
    finally:
        tiny_scorer._batch_size = usual
    np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=NOISE[tiny_scorer.info.name])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_no_chunk_is_larger_than_said(
    batch_size: int, tiny_scorer: Any, images: list[np.ndarray], captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = tiny_scorer._image_features
    monkeypatch.setattr(tiny_scorer, "_batch_size", batch_size)
    monkeypatch.setattr(tiny_scorer, "_image_features", lambda chunk: (sizes.append(len(chunk)), encode(chunk))[1])
    tiny_scorer.score(images, captions)
    assert max(sizes) == min(batch_size, len(images)) and sum(sizes) == len(images)


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
@pytest.mark.parametrize(("fits", "settled"), [(9, 5), (2, 2), (1, 1)])
def test_a_full_memory_halves_the_chunks(
    name: str,
    fits: int,
    settled: int,
    request: pytest.FixtureRequest,
    images: list[np.ndarray],
    captions: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """10 at once do not fit; what comes out is what a scorer gives that starts with chunks that do."""
    folder = str(request.getfixturevalue(f"{name}_folder"))
    kind: Any = type(load_scorer(name, {name: ScorerSource(folder)}))

    class Small(kind):
        def _image_features(self, some: Any) -> torch.Tensor:
            if len(some) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._image_features(some)

        def _text_features(self, some: Any) -> torch.Tensor:
            if len(some) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._text_features(some)

    small = Small(folder, batch_size=10)
    scores = small.score(images, captions)
    assert small._batch_size == settled and f"going on with {settled} at once" in caplog.text
    tensor, same = torch.from_numpy(np.stack([images[0]] * 4)).permute(0, 3, 1, 2), [captions[0]] * 4
    calm = kind(folder, batch_size=settled)
    calm._texts.update(small._texts)  # a chunk of texts may have passed before the images made it smaller
    np.testing.assert_array_equal(scores, calm.score(images, captions))
    np.testing.assert_array_equal(small.score(tensor, same), calm.score(tensor, same))
    np.testing.assert_allclose(scores, kind(folder).score(images, captions), rtol=0, atol=NOISE[name])


def test_a_memory_that_fills_up_midway_loses_and_repeats_nothing(
    tiny_scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_scorer, "_batch_size", 4)
    sizes: list[int] = []

    def encode(chunk: list[int]) -> torch.Tensor:
        sizes.append(len(chunk))
        if sizes == [4, 4]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(chunk)

    assert tiny_scorer._chunks(encode, list(range(9))).tolist() == list(range(9))
    assert sizes == [4, 4, 2, 2, 1]


def test_an_image_that_never_fits_is_an_error(hpsv2_folder: Path, images: list[np.ndarray]) -> None:
    from scoring.scorers.hpsv2 import HPSv2

    class Full(HPSv2):
        def _image_features(self, some: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Full(str(hpsv2_folder)).score(images, ["x"] * len(images))
    with pytest.raises(ScoringError, match="'hpsv2' failed at image 0 with prompt 'x': OutOfMemoryError"):
        score_images(Full(str(hpsv2_folder)), images, ["x"] * len(images))


@pytest.mark.parametrize("size", [(50, 70), (224, 224), (3, 3)])
def test_tensors_score_exactly_as_arrays(tiny_scorer: Any, size: tuple[int, int]) -> None:
    """Also a tensor that is a view of channels-last memory, and one image of it alone."""
    pixels = np.random.default_rng(3).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    prompts = ["a", "b", "a", "c", ""]
    expected = tiny_scorer.score(list(pixels), prompts)
    view = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(tiny_scorer.score(view, prompts), expected)
    np.testing.assert_array_equal(score_images(tiny_scorer, view.contiguous(), prompts), expected)
    np.testing.assert_array_equal(tiny_scorer.score(view[:0], []), np.zeros(0, np.float32))
    np.testing.assert_array_equal(tiny_scorer.score(view[:1], ["a"]), tiny_scorer.score([pixels[0]], ["a"]))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (torch.zeros(1, 3, 4, 4), r"torch.float32 \(1, 3, 4, 4\); of values in \[0, 1\] it is"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), r"torch.uint8 \(1, 4, 4, 3\)"),
        (torch.zeros(1, 3, 0, 4, dtype=torch.uint8), r"torch.uint8 \(1, 3, 0, 4\)"),
    ],
)
def test_tensors_of_another_kind_are_refused(tiny_scorer: Any, wrong: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=f"must be a uint8 tensor .*, got {found}"):
        tiny_scorer.score(wrong, ["a"])


def test_kept_texts_do_not_change_scores(
    tiny_scorer: Any, images: list[np.ndarray], captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: again, after other prompts, with the texts forgotten, and with no room to keep them."""
    tiny_scorer._texts.clear()
    first = tiny_scorer.score(images, captions)
    tiny_scorer.score(images[:2], [captions[1], "something else"])
    np.testing.assert_array_equal(tiny_scorer.score(images, captions), first)
    assert len(tiny_scorer._texts) == 2
    monkeypatch.setattr(tiny_scorer, "_texts", LRUCache(3, getsizeof=len))
    tiny_scorer.score(images[:2], [captions[1], "something else"])
    tiny_scorer.score(images[:1], ["takes the last place"])
    tiny_scorer.score(images[:1], ["makes the longest unused go"])
    assert list(tiny_scorer._texts) == [("takes the last place",), ("makes the longest unused go",)]
    np.testing.assert_array_equal(tiny_scorer.score(images, captions), first)
    assert len(tiny_scorer._texts) == 2, "more than there is room for is not kept"


def test_a_repeated_prompt_is_embedded_once(tiny_scorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = tiny_scorer._text_features
    monkeypatch.setattr(tiny_scorer, "_text_features", lambda prompts: (seen.extend(prompts), encode(prompts))[1])
    image = np.full((20, 20, 3), 90, dtype=np.uint8)
    scores = tiny_scorer.score([image] * 4, ["b", "a", "b", "b"])
    assert seen == ["b", "a"]
    assert scores[0] == scores[2] == scores[3] != scores[1]


def test_sizes_of_zero_and_one(tiny_scorer: Any) -> None:
    nothing, one = tiny_scorer.score([], []), tiny_scorer.score([np.zeros((5, 5, 3), dtype=np.uint8)], ["x"])
    assert (nothing.shape, nothing.dtype) == ((0,), np.float32)
    assert (one.shape, one.dtype) == ((1,), np.float32)


def test_arrays_of_any_memory_layout(tiny_scorer: Any, recwarn: pytest.WarningsRecorder) -> None:
    """Read-only as out of a memory map, mirrored (a negative stride), transposed: as their plain copies."""
    image = np.random.default_rng(2).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    frozen = np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(image.shape)
    views = [frozen, image[:, ::-1], image.transpose(1, 0, 2)]
    plain = [np.ascontiguousarray(view).copy() for view in views]
    np.testing.assert_array_equal(tiny_scorer.score(views, ["x"] * 3), tiny_scorer.score(plain, ["x"] * 3))
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_scores_depend_on_image_and_prompt(tiny_scorer: Any, images: list[np.ndarray]) -> None:
    scores = tiny_scorer.score([images[0], images[1], images[0]], ["a red circle", "a red circle", "blue"])
    assert len(set(scores.tolist())) == 3


def test_wrong_inputs_are_refused(tiny_scorer: Any) -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="got 1 images and 2 prompts"):
        tiny_scorer.score([image], ["a", "b"])
    with pytest.raises(ValueError, match="1 images and one string"):
        tiny_scorer.score([image], "a")
    with pytest.raises(ValueError, match=r"image 1 must be a uint8 array .*, got float32 \(4, 4, 3\)"):
        tiny_scorer.score([image, image.astype(np.float32)], ["a", "b"])
    with pytest.raises(ValueError, match=r"got uint8 \(4, 4, 4\)"):
        tiny_scorer.score([np.zeros((4, 4, 4), dtype=np.uint8)], ["a"])
    with pytest.raises(ValueError, match="prompt 0 must be a str, got NoneType"):
        tiny_scorer.score([image], [None])


def test_info_and_guard(tiny_scorer: Any, images: list[np.ndarray], captions: list[str]) -> None:
    info = tiny_scorer.info
    assert (info.unit, info.higher_is_better) == ({"hpsv2": "cosine", "pickscore": "logit"}[info.name], True)
    assert info.version == {"hpsv2": "v2.1", "pickscore": "v1"}[info.name]
    assert len(info.fingerprint) == 16 and int(info.fingerprint, 16) >= 0
    assert len(info.weights) == 16 and info.weights != info.fingerprint
    assert (info.lowest, info.highest) == {"hpsv2": (-1, 1), "pickscore": (None, None)}[info.name]
    assert info.preference_scale and info.needs_prompt and info.preprocessing and info.revision is None
    np.testing.assert_array_equal(score_images(tiny_scorer, images, captions), tiny_scorer.score(images, captions))


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
def test_closed_scorer_says_so(name: str, request: pytest.FixtureRequest) -> None:
    """Whether it had loaded its weights or not."""
    image = [np.zeros((4, 4, 3), dtype=np.uint8)]
    for used in (False, True):
        scorer: Any = load_scorer(name, {name: ScorerSource(str(request.getfixturevalue(f"{name}_folder")))})
        assert not used or scorer.score(image, ["a"]).shape == (1,)
        scorer.close()
        scorer.close()
        assert scorer._model is None and not scorer._texts
        for call in (lambda scorer=scorer: scorer.score(image, ["a"]), scorer.load):
            with pytest.raises(ScoringError, match=f"'{name}' is closed"):
                call()


@pytest.mark.parametrize(
    ("name", "weights"), [("hpsv2", "open_clip_model.safetensors"), ("pickscore", "model.safetensors")]
)
def test_weights_are_read_once_at_the_first_score(
    name: str, weights: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"{name}_folder"), tmp_path / "copy"))
    bound, image = {name: ScorerSource(str(folder))}, [np.zeros((4, 4, 3), dtype=np.uint8)]
    late, early = load_scorer(name, bound), cast(Any, load_scorer(name, bound))
    early.score(image, ["a"])
    (folder / weights).unlink()
    assert early.load() is early and early.score(image, ["b"]).shape == (1,)
    with pytest.raises((ScoringError, OSError), match=r"model\.safetensors"):
        late.score(image, ["a"])


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "8"])
def test_batch_sizes_that_are_none_are_refused(batch_size: Any, hpsv2_folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        load_scorer("hpsv2", {"hpsv2": ScorerSource(str(hpsv2_folder), options={"batch_size": batch_size})})


def _fingerprint(name: str, folder: Path, **source: Any) -> str:
    scorer = load_scorer(name, {name: ScorerSource(str(folder), **source)})
    scorer.close()
    return scorer.info.fingerprint


def _flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("name", "weights", "setting"),
    [
        ("hpsv2", "open_clip_model.safetensors", "open_clip_config.json"),
        ("pickscore", "model.safetensors", "processor_config.json"),
    ],
)
def test_fingerprint_follows_content_and_not_place(
    name: str, weights: str, setting: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Equal in a copy; another after one bit of the weights; another after a change of the settings."""
    original = request.getfixturevalue(f"{name}_folder")
    before = _fingerprint(name, original)
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    (folder / "README.md").write_text("no part of the model")
    assert _fingerprint(name, folder) == before
    _flip_last_byte(folder / weights)
    changed = _fingerprint(name, folder)
    assert changed != before
    config = json.loads((folder / setting).read_text())
    (folder / setting).write_text(json.dumps({**config, "comment": "changed"}))
    assert _fingerprint(name, folder) not in (changed, before)


def test_fingerprint_names_the_variant_and_the_arithmetic(hpsv2_folder: Path) -> None:
    from scoring.scorers.model import compute_dtype

    assert _fingerprint("hpsv2", hpsv2_folder, variant="v2.0") != _fingerprint("hpsv2", hpsv2_folder)
    assert compute_dtype("cpu") != compute_dtype("cuda:1") == compute_dtype("cuda")
