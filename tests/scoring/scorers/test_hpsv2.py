"""HPSv2 against the original package's own code, on random weights of a tiny ViT."""

import functools
import gzip
import importlib
import json
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import functional as vision

from bench.original_hpsv2 import original as import_original
from bench.original_hpsv2 import put_model
from bench.scoring import write_weights
from data.pictures import open_image
from scoring.scorers.checkpoints import load_weights
from scoring.scorers.hpsv2 import HPSv2, build_model, encode_text, preprocess
from scoring.scorers.scorer import ScoringError
from tests.rounding import of_cosines
from tests.scoring.conftest import HPSV2_CONFIG, PROMPTS

pytestmark = pytest.mark.numerical

ROUNDING = of_cosines(20, 16)


@pytest.fixture(scope="session")
def original() -> Iterator[types.ModuleType]:
    """hpsv2.img_score."""
    pytest.importorskip("hpsv2")
    with import_original("img_score") as module:
        yield module


@pytest.fixture(scope="session")
def original_score(original: types.ModuleType, hpsv2_checkpoint: Path) -> Any:
    """The original `score` of one picture, with the tiny model in place of the ViT-H it would download."""
    put_model(original, HPSV2_CONFIG, hpsv2_checkpoint.parent)

    def score(image: np.ndarray | Image.Image, prompt: str) -> float:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return float(original.score([picture], prompt, cp=str(hpsv2_checkpoint))[0])

    return score


@pytest.fixture(params=[True, False], ids=["antialias", "no antialias"])
def antialias(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The original leaves this to torchvision's default; here the default is set to what is asked for."""
    resize = functools.partial(vision.resize, antialias=request.param)
    monkeypatch.setattr("torchvision.transforms.functional.resize", resize)
    return bool(request.param)


def test_preprocessing_equals_the_original(
    original: types.ModuleType, images: list[np.ndarray], antialias: bool
) -> None:
    """Bit for bit, at every size but 224 x n, where the original forgets to pad (below)."""
    transform = importlib.import_module("hpsv2.src.open_clip").image_transform(224, False, resize_longest_max=True)
    for image in images:
        ours = preprocess(torch.from_numpy(image).permute(2, 0, 1)[None], 224, antialias=antialias)[0]
        torch.testing.assert_close(ours, transform(Image.fromarray(image)), rtol=0, atol=0)


def test_scores_equal_the_original(
    original_score: Any, hpsv2_folder: Path, images: list[np.ndarray], captions: list[str], antialias: bool
) -> None:
    """Over every size and prompt of the fixtures: html entities, mojibake, none at all, more than 77 tokens."""
    ours = HPSv2(str(hpsv2_folder), antialias=antialias).score(images, captions)
    theirs = np.array([original_score(image, caption) for image, caption in zip(images, captions, strict=True)])
    assert np.ptp(theirs) > 0.02  # or the agreement would say nothing
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_scores_equal_the_original_at_full_size(
    original: types.ModuleType, images: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A true ViT-H-14 with random weights, read by both sides from one file of the published name. Needs 16 GB."""
    monkeypatch.setattr(original, "model_dict", {})
    checkpoint = write_weights("ViT-H-14", tmp_path).rename(tmp_path / "HPS_v2.1_compressed.pt")
    config = tmp_path / "open_clip_config.json"
    put_model(original, json.loads(config.read_text())["model_cfg"], tmp_path)
    config.unlink()
    some, prompt = [images[1], images[6], images[7]], PROMPTS[1]
    theirs = original.score([Image.fromarray(image) for image in some], prompt, cp=str(checkpoint))
    original.model_dict.clear()
    ours = HPSv2(str(tmp_path)).score(some, [prompt] * 3)
    print(f"ours {ours}, theirs {theirs}, apart by {np.abs(ours - np.array(theirs)).max():.1e}")
    assert np.ptp(theirs) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_antialias_is_another_measure_of_the_same_weights(
    hpsv2_folder: Path, images: list[np.ndarray], captions: list[str]
) -> None:
    on, off = HPSv2(str(hpsv2_folder)), HPSv2(str(hpsv2_folder), antialias=False)
    assert on.info.fingerprint != off.info.fingerprint and on.info.preprocessing != off.info.preprocessing
    assert on.info.weights == off.info.weights
    assert np.abs(on.score(images, captions) - off.score(images, captions)).max() > 1e-4
    with pytest.raises(ValueError, match="'hpsv2': antialias must be 0 or 1, got 'off'"):
        HPSv2(str(hpsv2_folder), antialias="off")  # type: ignore[arg-type]


def test_transparent_images_score_where_the_original_fails(original_score: Any, tiny_hpsv2: HPSv2) -> None:
    """The original keeps the fourth channel and its tower refuses; ours sees the picture on white."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 4), dtype=np.uint8)
    picture, white = Image.fromarray(pixels, "RGBA"), Image.new("RGB", (60, 60), "white")
    with pytest.raises(RuntimeError):
        original_score(picture, "a cat")
    white.paste(picture, mask=picture)
    ours = tiny_hpsv2.score([open_image(picture)], ["a cat"])[0]
    assert ours == pytest.approx(original_score(white, "a cat"), abs=1e-4)  # paste rounds otherwise by one level
    assert abs(ours - original_score(picture.convert("RGB"), "a cat")) > 1e-3


def test_padding_of_prompts_is_not_computed(tiny_hpsv2: HPSv2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings are those of the whole context, from a tower that sees no more than the longest prompt."""
    model, lengths = tiny_hpsv2.load()._model, []
    watch = model.transformer.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    for prompts in (["a red circle", ""], PROMPTS):
        tokens = tiny_hpsv2._tokenizer(prompts)
        with torch.no_grad():
            whole = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
            torch.testing.assert_close(encode_text(model, tokens), whole, rtol=0, atol=ROUNDING)
    assert lengths == [77, 5, 77, 77]
    with monkeypatch.context() as patch, torch.no_grad():  # read out behind the prompt: nothing may be cut
        patch.setattr(model, "text_pool_type", "last")
        torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=0, atol=0)
    assert lengths[4:] == [77, 77]
    watch.remove()


def test_scores_where_the_original_fails(original_score: Any, tiny_hpsv2: HPSv2) -> None:
    """Longest side 224 and not square: the original skips the padding with the resize, its tower refuses."""
    image = np.random.default_rng(0).integers(0, 256, (224, 160, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError):
        original_score(image, "a cat")
    bars = np.zeros((224, 224, 3), dtype=np.uint8)
    bars[:, 32:192] = image  # what padding has to do: (224 - 160) / 2 = 32 black columns on each side
    ours = tiny_hpsv2.score([image, bars], ["a cat", "a cat"])
    assert ours[0] == pytest.approx(original_score(bars, "a cat"), abs=1e-6)
    assert ours[0] == pytest.approx(ours[1], abs=1e-6)


def test_preprocessing_is_antialiased_padded_and_unclamped() -> None:
    """Facts that hold without the original: black bars before normalising, and overshoot above white."""
    board = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    board[..., 40:] = 255
    out = preprocess(board, 20, mean=(0, 0, 0), std=(1, 1, 1))
    assert out.shape == (1, 3, 20, 20)
    assert (out[..., :5, :] == 0).all() and (out[..., 15:, :] == 0).all()
    assert out.max() > 1.001 and out.min() < -0.001
    stripes = (torch.arange(448) % 2 * 255).to(torch.uint8).expand(1, 3, 448, 448)
    assert preprocess(stripes, 224, mean=(0, 0, 0), std=(1, 1, 1)).std() < 0.05  # 0.5 without antialiasing


def test_a_pixel_too_thin_to_survive_is_kept() -> None:
    """A 1000 x 1 image would round to a height of 0."""
    assert torch.isfinite(preprocess(torch.zeros(1, 3, 1, 1000, dtype=torch.uint8), 224)).all()


@pytest.fixture(scope="session")
def tiny_hpsv2(hpsv2_folder: Path) -> HPSv2:
    return HPSv2(str(hpsv2_folder))


def _save_pt(state: dict, folder: Path, name: str, **options: Any) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(state, folder / name, **options)


FORMATS: dict[str, Any] = {
    "pt": lambda state, folder: _save_pt(state, folder, "open_clip_model.pt"),
    "nested": lambda state, folder: _save_pt({"state_dict": state, "epoch": 3}, folder, "open_clip_model.bin"),
    "old": lambda s, folder: _save_pt(s, folder, "open_clip_model.pt", _use_new_zipfile_serialization=False),
    "hub": lambda state, folder: _save_pt(state, folder, "open_clip_pytorch_model.bin"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_file_format_gives_the_same_scores(
    form: str,
    hpsv2_folder: Path,
    hpsv2_state: dict,
    tiny_hpsv2: HPSv2,
    tmp_path: Path,
    images: list[np.ndarray],
) -> None:
    prompts = ["a red circle", "", "x"]
    expected = tiny_hpsv2.score(images[:3], prompts)
    folder = Path(shutil.copytree(hpsv2_folder, tmp_path / "copy"))
    FORMATS[form](hpsv2_state, folder)
    np.testing.assert_array_equal(HPSv2(str(folder)).score(images[:3], prompts), expected)


def test_mean_and_std_of_the_config_count(tiny_hpsv2: HPSv2, hpsv2_folder: Path, tmp_path: Path) -> None:
    """null means the values of OpenAI, as open_clip writes it; how to resize is never taken from there."""
    folder = Path(shutil.copytree(hpsv2_folder, tmp_path / "copy"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    image, prompt = [np.full((30, 20, 3), 200, dtype=np.uint8)], ["a red circle"]
    scores = []
    for preprocessing in ({"mean": None, "resize_mode": "shortest"}, {"mean": [0.5] * 3, "std": [0.5] * 3}):
        (folder / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": preprocessing}))
        scores.append(HPSv2(str(folder)).score(image, prompt)[0])
    assert scores[0] == tiny_hpsv2.score(image, prompt)[0] != scores[1]


def test_half_precision_weights_run_in_float32(
    hpsv2_folder: Path, hpsv2_state: dict, tiny_hpsv2: HPSv2, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hpsv2_folder, tmp_path / "copy"))
    save_file({name: value.half() for name, value in hpsv2_state.items()}, folder / "open_clip_model.safetensors")
    image, prompt = [np.zeros((8, 8, 3), dtype=np.uint8)], ["x"]
    half, full = HPSv2(str(folder)).score(image, prompt), tiny_hpsv2.score(image, prompt)
    assert half.dtype == np.float32
    assert half == pytest.approx(full, abs=5e-3)


@pytest.mark.parametrize(("variant", "name"), [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")])
def test_published_checkpoints_need_no_config(
    variant: str,
    name: str,
    hpsv2_state: dict,
    tiny_hpsv2: HPSv2,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder with both checkpoints: the variant picks the file, open_clip knows the architecture."""
    config = json.loads((Path(tiny_hpsv2.info.source) / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-H-14": config}.__getitem__)
    for other in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        sign = 1 if other == name else -1
        torch.save({"state_dict": {k: sign * v for k, v in hpsv2_state.items()}}, tmp_path / other)
    image, prompt = [np.full((30, 20, 3), 200, dtype=np.uint8)], ["a red circle"]
    scorer = HPSv2(str(tmp_path), variant=variant)
    assert scorer.info.version == variant
    assert scorer.score(image, prompt) == tiny_hpsv2.score(image, prompt)


def test_vit_h_14_is_built_with_a_causal_mask_and_the_published_width() -> None:
    """The real architecture, without its 4 GB: names and shapes on the meta device, the mask with data."""
    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    model = build_model(config, state, "meta")
    assert sum(value.numel() for value in state.values()) == 986_109_441
    assert model.attn_mask.device.type == "cpu"
    assert model.attn_mask[0, 1] == -torch.inf and model.attn_mask[1, 0] == 0


def test_own_vocabulary_and_context_length_are_used(hpsv2_folder: Path, tmp_path: Path) -> None:
    """Three merges make "red" one token: 512 bytes, then "re", "ed</w>", "red</w>", then start and end."""
    folder = tmp_path / "small"
    folder.mkdir()
    with gzip.open(folder / "words.txt.gz", "wt") as file:
        file.write("#version\nr e\ne d</w>\nre d</w>")
    config = json.loads((hpsv2_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"].update(vocab_size=517, context_length=9)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    scorer = HPSv2(str(folder)).load()
    assert scorer._tokenizer(["red"]).tolist() == [[515, 514, 516, 0, 0, 0, 0, 0, 0]]
    assert np.isfinite(scorer.score([np.zeros((4, 4, 3), dtype=np.uint8)], ["red red red red red red red red"])).all()
    shutil.copy(folder / "words.txt.gz", folder / "more.txt.gz")
    with pytest.raises(ValueError, match=r"several vocabularies \(more.txt.gz, words.txt.gz\)"):
        HPSv2(str(folder))


@pytest.mark.parametrize("new_format", [True, False])
def test_poisoned_checkpoint_is_refused_and_does_not_run(new_format: bool, bomb: type, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "open_clip_model.pt"
    torch.save({"state_dict": {"x": bomb(marker)}}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ScoringError, match="loading it could run code"):
        load_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload is live, so its silence above means something


def test_weights_that_do_not_fit_are_refused(hpsv2_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hpsv2_folder, tmp_path / "copy"))
    state = load_file(folder / "open_clip_model.safetensors")
    del state["ln_final.weight"]
    save_file(state, folder / "open_clip_model.safetensors")
    scorer = HPSv2(str(folder))
    with pytest.raises(ScoringError, match=r"open_clip_model.safetensors: does not fit(.|\n)*ln_final.weight"):
        scorer.load()
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    with pytest.raises(ScoringError, match="no state dict"):
        load_weights(tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ScoringError, match="no state dict"):
        load_weights(tmp_path / "list.pt")


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_files_are_named(kept: float, suffix: str, hpsv2_state: dict, tmp_path: Path) -> None:
    path = tmp_path / f"open_clip_model.{suffix}"
    save_file(hpsv2_state, path) if suffix == "safetensors" else torch.save(hpsv2_state, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ScoringError, match=f"{path}: does not load|{path}: not a checkpoint"):
        load_weights(path)
