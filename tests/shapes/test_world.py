"""Grammar, renderer, oracle and prompt sets: everything of the world that has no weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from shapes.oracle import Oracle, claims, observe
from shapes.prompts import COUNTS, read_set, training_scenes, write_sets
from shapes.render import place, render, to_uint8
from shapes.world import Scene, Thing, all_scenes, parse, perturb


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    random, everything = Random(5), all_scenes()  # a tenth of a second to list
    return [random.choice(everything) for _ in range(256)]


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> np.ndarray:
    return to_uint8(render(scenes, Random(6))).numpy()


def test_every_caption_parses_to_its_scene() -> None:
    """36 things: 36 x 3 single captions; 36 x 30 x 4 x 3 pairs of different colours."""
    everything = all_scenes()
    assert len(everything) == 36 * 3 + 36 * 30 * 4 * 3
    assert len({scene.caption() for scene in everything}) == len(everything)
    assert all(parse(scene.caption()) == scene for scene in everything[::37])


def test_retold_scene_is_the_same_scene() -> None:
    red, blue = Thing("small", "red", "circle"), Thing("large", "blue", "square")
    assert Scene((red, blue), "right of", "gray").canonical() == Scene((blue, red), "left of", "gray")


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a cat",
        "",
        "a small red circle",
        "a small red circle left of a large red square on a white background",
        "a small pink circle on a white background",
    ],
)
def test_foreign_prompts_are_refused_by_name(prompt: str) -> None:
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="prompt") as error:
        Oracle().score(picture, [prompt])
    assert repr(prompt) in str(error.value)


def test_perturbation_changes_exactly_one_attribute(scenes: list[Scene]) -> None:
    random = Random(7)
    for scene in scenes:
        changed = perturb(scene, random)
        fields = (
            [(t.size, t.colour, t.shape) for t in scene.things],
            [(t.size, t.colour, t.shape) for t in changed.things],
        )
        differing = sum(a != b for x, y in zip(*fields, strict=True) for a, b in zip(x, y, strict=True))
        differing += (scene.relation != changed.relation) + (scene.background != changed.background)
        assert differing == 1


def test_layouts_stay_inside_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        placed = place(scene, Random(8))
        assert all(p.radius * 0.6 < p.x < 1 - p.radius * 0.6 for p in placed)
        if len(placed) == 2:
            first, second = placed
            along = second.x - first.x if scene.canonical().relation == "left of" else second.y - first.y
            assert along > 0.6 * (first.radius + second.radius)


def test_rendering_does_not_depend_on_the_batch(scenes: list[Scene], pictures: np.ndarray) -> None:
    again = to_uint8(render(scenes, Random(6))).numpy()
    assert np.array_equal(again, pictures)
    assert np.array_equal(to_uint8(render(scenes[:3], Random(6))).numpy(), pictures[:3])


def test_truth_is_exact(scenes: list[Scene], pictures: np.ndarray) -> None:
    scores = Oracle().score(pictures, [scene.caption() for scene in scenes])
    assert scores.dtype == np.float32 and scores.shape == (256,)
    assert (scores == 1).mean() >= 0.95
    retold = Oracle().score(pictures, [scene.canonical().caption() for scene in scenes])
    assert np.array_equal(retold, scores)


def test_one_attribute_off_is_never_exact(scenes: list[Scene], pictures: np.ndarray) -> None:
    random = Random(9)
    scores = Oracle().score(pictures, [perturb(scene, random).caption() for scene in scenes])
    assert (scores == 1).mean() <= 0.02
    assert 0.6 < scores.mean() < 0.95


def test_score_counts_checks() -> None:
    """A wrong background fails 1 check of 5; a wrong colour takes shape and size along and is dirt."""
    scene = parse("a large red circle on a white background")
    picture = to_uint8(render([scene], Random(1))).numpy()
    said = ["a large red circle on a black background", "a large blue circle on a white background"]
    assert Oracle().score(np.repeat(picture, 2, 0), said).tolist() == pytest.approx([4 / 5, 1 / 5])


def test_noise_and_strangers_are_dirt() -> None:
    scene = parse("a small red circle on a white background")
    stranger = Scene((Thing("small", "red", "circle"), Thing("large", "green", "square")), "above", "white")
    picture = to_uint8(render([stranger], Random(2))).numpy()
    assert Oracle().score(picture, [scene.caption()])[0] == pytest.approx(4 / 5)
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    assert Oracle().score(noise, [scene.caption()])[0] <= 2 / 5


def test_oracle_reads_other_sizes_and_lists(scenes: list[Scene], pictures: np.ndarray) -> None:
    captions = [scene.caption() for scene in scenes[:8]]
    doubled = [np.repeat(np.repeat(picture, 2, 0), 2, 1) for picture in pictures[:8]]
    assert (Oracle().score(doubled, captions) == 1).mean() >= 0.75
    assert Oracle().score(pictures[:0], []).shape == (0,)


def test_oracle_refuses_wrong_arrays(pictures: np.ndarray) -> None:
    caption = all_scenes()[0].caption()
    with pytest.raises(ValueError, match="uint8"):
        Oracle().score(pictures[:1].astype(np.float32), [caption])
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        Oracle().score(pictures[:2], [caption])


def test_oracle_introduces_itself() -> None:
    info = Oracle(source="somewhere").info
    assert (info.name, info.version, info.higher_is_better, info.source) == ("oracle", "1", True, "somewhere")
    assert info.unit == "fraction of checks passed" and len(info.fingerprint) == 16
    assert Oracle().info.fingerprint == info.fingerprint


def test_facts_do_not_depend_on_the_batch(pictures: np.ndarray) -> None:
    images = torch.from_numpy(pictures[:70]).permute(0, 3, 1, 2).float() / 255
    together, alone = observe(images), observe(images[66:67])
    assert torch.equal(together.shape[66], alone.shape[0])
    assert torch.allclose(together.radius[66], alone.radius[0])


def test_claims_read_a_caption_as_numbers() -> None:
    said = claims([parse("a small red circle below a large cyan triangle on a gray background")])
    assert said.colour.tolist() == [[0, 5]]
    assert said.shape.tolist() == [[0, 2]]
    assert said.large.tolist() == [[0, 1]]
    assert (said.background.item(), said.axis.item(), said.sign.item()) == (2, 1, -1)


def test_prompt_sets_are_disjoint_as_scenes() -> None:
    sets = {name: read_set(name) for name in COUNTS}
    assert {name: len(prompts) for name, prompts in sets.items()} == {
        "train": 3000,
        "tuning": 400,
        "heldout": 512,
    }
    scenes = {name: {parse(prompt).canonical() for prompt in prompts} for name, prompts in sets.items()}
    assert all(len(scenes[name]) == len(sets[name]) for name in sets)
    assert len(set.union(*scenes.values())) == sum(map(len, scenes.values()))


def test_models_never_learn_reserved_scenes() -> None:
    single, double = training_scenes()
    free = {scene.canonical() for scene in single + double}
    reserved = {parse(prompt).canonical() for name in ("tuning", "heldout") for prompt in read_set(name)}
    assert not free & reserved
    assert {parse(prompt).canonical() for prompt in read_set("train")} <= free


def test_shipped_prompt_files_are_what_the_script_writes(tmp_path: Path) -> None:
    write_sets(tmp_path)
    for name in COUNTS:
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"prompt": prompt} for prompt in read_set(name)]
