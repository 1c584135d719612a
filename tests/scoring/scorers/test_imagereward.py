"""ImageReward against the published code (numbers it gave), the papers' formulas, and the published transform."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from scoring.scorers.blip import TEXT_SIZES, VISION_SIZES, load_tokenizer
from scoring.scorers.imagereward import MAX_TOKENS, ImageReward, normalised, resized
from scoring.scorers.registry import ScorerSource, load_scorer
from scoring.scorers.scorer import Scorer, ScoringError
from scoring.scorers.sources import Snapshot, local_copy
from tests.rounding import of_networks

pytestmark = pytest.mark.numerical

GOLDEN = Path(__file__).parent / "golden" / "imagereward.json"
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "add_cross_attention": True,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0, "encoder_width": 768,
}  # fmt: skip
VISION = {
    "image_size": 224, "patch_size": 32, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
WORDS = [
    "the", "red", "blue", "green", "circle", "square", "two", "on", "of", "café", "cat", "kings", "wear", "crown",
]  # fmt: skip
ROUNDING = of_networks(3.0, 50)
"""Of float32 scores between 1 and 3: chunks, threads, and where tensors lie in memory change the last digits."""
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *"!,.'()[]猫", "cafe", *WORDS]
SIZES = [(224, 224), (64, 64), (96, 48), (48, 96), (1, 1), (225, 224), (223, 223), (31, 400), (300, 37), (3, 40)]
TEXTS = [
    "a red circle", "The CAFÉ, of two cats!", "", "unknown wörds 猫 2x", "a [DEC] b [ENC] c [MASK] [dec]",
    "two blue squares on green " * 12, "It\u2019s (a) cat's crown.", "a red circle", "kings wear the crown",
    "\u2603 \t x",
]  # fmt: skip


def published_shapes(text: Mapping, vision: Mapping, words: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint's tensors for some sizes, `position_ids` left out."""
    wide, patch = vision["hidden_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, wide),
        "blip.visual_encoder.pos_embed": (1, patches + 1, wide),
        "blip.visual_encoder.patch_embed.proj.weight": (wide, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (wide,),
    }

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    layer("blip.visual_encoder.norm", wide)
    for index in range(vision["num_hidden_layers"]):
        block = f"blip.visual_encoder.blocks.{index}"
        layer(f"{block}.norm1", wide)
        layer(f"{block}.norm2", wide)
        layer(f"{block}.attn.qkv", 3 * wide, wide)
        layer(f"{block}.attn.proj", wide, wide)
        layer(f"{block}.mlp.fc1", vision["intermediate_size"], wide)
        layer(f"{block}.mlp.fc2", wide, vision["intermediate_size"])
    width, inner = text["hidden_size"], text["intermediate_size"]
    embeddings = "blip.text_encoder.embeddings"
    shapes[f"{embeddings}.word_embeddings.weight"] = (words, width)
    shapes[f"{embeddings}.position_embeddings.weight"] = (text["max_position_embeddings"], width)
    layer(f"{embeddings}.LayerNorm", width)
    for index in range(text["num_hidden_layers"]):
        block = f"blip.text_encoder.encoder.layer.{index}"
        for kind, source in (("attention", width), ("crossattention", wide)):
            layer(f"{block}.{kind}.self.query", width, width)
            layer(f"{block}.{kind}.self.key", width, source)
            layer(f"{block}.{kind}.self.value", width, source)
            layer(f"{block}.{kind}.output.dense", width, width)
            layer(f"{block}.{kind}.output.LayerNorm", width)
        layer(f"{block}.intermediate.dense", inner, width)
        layer(f"{block}.output.dense", width, inner)
        layer(f"{block}.output.LayerNorm", width)
    layer("blip.vision_proj", 256, wide)
    layer("blip.text_proj", 256, width)
    widths = (width, 1024, 128, 64, 16, 1)
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        layer(f"mlp.layers.{number}", outputs, inputs)
    return shapes


def made_up_weights(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Random numbers under published names: embeddings small, so that the epsilons of the norms count."""
    rng = np.random.default_rng(20230412)
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name], dtype=np.float32)
        if ("embed" in name and "LayerNorm" not in name) or "cls_token" in name:
            yield name, np.float32(0.005) * values
        elif values.ndim == 1:
            one = np.float32("norm" in name.lower() and name.endswith("weight"))
            yield name, one + np.float32(0.2) * values
        else:
            gain = 1.0 if name.startswith("mlp.") else 1.5
            yield name, np.float32(gain / math.sqrt(values.shape[-1])) * values


def made_up_images(sizes: list[tuple[int, int]] = SIZES) -> list[np.ndarray]:
    """Gradients with noise over them, uint8 (height, width, 3)."""
    rng = np.random.default_rng(7)
    pictures = []
    for height, width in sizes:
        slope = np.linspace(0, 255, height * width).reshape(height, width, 1)
        noise = rng.integers(-128, 128, (height, width, 3)) * (rng.random((height, width, 1)) < 0.3)
        pictures.append(np.clip(slope + noise, 0, 255).astype(np.uint8))
    return pictures


@pytest.fixture(scope="module")
def state() -> dict:
    """The tiny network's tensors under their published names, with those that the score does not use."""
    shapes = published_shapes(TEXT, VISION, len(VOCABULARY) + 2)
    named = {name: torch.from_numpy(values) for name, values in made_up_weights(shapes)}
    return {**named, "blip.text_encoder.embeddings.position_ids": torch.arange(TEXT["max_position_embeddings"])[None]}


@pytest.fixture(scope="module")
def folder(state: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    save_file(state, path / "ImageReward.safetensors")
    (path / "med_config.json").write_text(json.dumps({**TEXT, "vocab_size": len(VOCABULARY) + 2}))
    (path / "vision_config.json").write_text(json.dumps(VISION))
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[Scorer]:
    scorer = load_scorer("imagereward", {"imagereward": ScorerSource(str(folder))})
    yield scorer
    scorer.close()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_scores_equal_those_of_the_published_code(scorer: Scorer, folder: Path) -> None:
    """The published repository, run once on these weights, images and prompts; see `made_with` in the file."""
    golden = json.loads(GOLDEN.read_text())
    tokenizer = load_tokenizer(folder / "vocab.txt", len(VOCABULARY) + 2)
    padded = [ids + [0] * (MAX_TOKENS - len(ids)) for ids in golden["ids"]]
    assert tokenizer(TEXTS, padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids == padded
    images = made_up_images()
    assert np.ptp(golden["scores"]) > 0.5 and np.ptp(golden["scores_of_the_first_image"]) > 0.5
    np.testing.assert_allclose(scorer.score(images, TEXTS), golden["scores"], rtol=0, atol=ROUNDING)
    of_first = scorer.score([images[0]] * len(TEXTS), TEXTS)
    np.testing.assert_allclose(of_first, golden["scores_of_the_first_image"], rtol=0, atol=ROUNDING)


def network_output(state: Mapping, image: np.ndarray, ids: list[int]) -> float:
    """One picture (3, 224, 224) of normalised pixels and one prompt, from the papers, in float64.

    ViT (arXiv:2010.11929, equations 1 to 4, norms before the sublayers), BERT with norms behind them
    (arXiv:1810.04805), cross-attention between self-attention and feed-forward (BLIP, arXiv:2201.12086, figure 2).
    Padding is left out instead of masked.
    """

    weights = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
        outputs = []
        for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)), strict=True):
            outputs.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v)
        return torch.cat(outputs, -1)

    root, side = "blip.visual_encoder", VISION["patch_size"]
    count = VISION["image_size"] // side
    tiles = torch.from_numpy(image).double().reshape(3, count, side, count, side).permute(1, 3, 0, 2, 4)
    kernel = weights[f"{root}.patch_embed.proj.weight"].flatten(1)
    patches = tiles.reshape(count * count, -1) @ kernel.T + weights[f"{root}.patch_embed.proj.bias"]
    x = torch.cat([weights[f"{root}.cls_token"][0], patches]) + weights[f"{root}.pos_embed"][0]
    for index in range(VISION["num_hidden_layers"]):
        block = f"{root}.blocks.{index}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(qkv[0], qkv[1], qkv[2], VISION["num_attention_heads"]))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{root}.norm", x, 1e-6)

    root = "blip.text_encoder.embeddings"
    words, places = weights[f"{root}.word_embeddings.weight"], weights[f"{root}.position_embeddings.weight"]
    x = norm(f"{root}.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
    for index in range(TEXT["num_hidden_layers"]):
        block = f"blip.text_encoder.encoder.layer.{index}"
        for kind, other in (("attention", None), ("crossattention", seen)):
            source = x if other is None else other
            query, key, value = (
                linear(f"{block}.{kind}.self.{part}", of)
                for part, of in (("query", x), ("key", source), ("value", source))
            )
            mixed = linear(f"{block}.{kind}.output.dense", attend(query, key, value, TEXT["num_attention_heads"]))
            x = norm(f"{block}.{kind}.output.LayerNorm", x + mixed, 1e-12)
        inner = gelu(linear(f"{block}.intermediate.dense", x))
        x = norm(f"{block}.output.LayerNorm", x + linear(f"{block}.output.dense", inner), 1e-12)
    x = x[0]
    for number in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{number}", x)
    return float(x)


def published_pixels(image: np.ndarray) -> np.ndarray:
    """The repository's transform: resize the shortest side, crop, make RGB, tensor, normalise."""
    transform = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            lambda picture: picture.convert("RGB"),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    return transform(PIL.Image.fromarray(image)).numpy()


def test_scores_equal_the_formulas_of_the_papers(scorer: Scorer, state: dict) -> None:
    """And sigmoid(preference_scale * difference) is the preference the network was trained for, equation 1."""
    prompts = ["red circle", "", "the cat of kings", "wear crown square " * 15, "on", "cat"] + ["blue"] * 4
    images = made_up_images()
    number = {token: index for index, token in enumerate(VOCABULARY)}
    ids = [[number["[CLS]"], *(number[word] for word in p.split()[:33]), number["[SEP]"]] for p in prompts]
    outputs = np.array(
        [network_output(state, published_pixels(image), row) for image, row in zip(images, ids, strict=True)]
    )
    scores = scorer.score(images, prompts)
    np.testing.assert_allclose(scores, (outputs - 0.16717362830052426) / 1.0333394966054072, rtol=0, atol=ROUNDING)
    assert np.ptp(outputs) > 0.5 and scores.dtype == np.float32
    assert scorer.info.preference_scale is not None
    odds = scorer.info.preference_scale * (float(scores[0]) - float(scores[1]))
    assert odds == pytest.approx(outputs[0] - outputs[1], abs=ROUNDING)


def test_pixels_equal_the_published_transform(images: list[np.ndarray]) -> None:
    """Every pixel, for squares, portraits, landscapes, one pixel and strips, as arrays and as a tensor."""
    for image in [*images, *made_up_images()]:
        expected = published_pixels(image)
        np.testing.assert_array_equal(normalised(resized([image], 224))[0].numpy(), expected)
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        np.testing.assert_array_equal(normalised(resized(tensor, 224))[0].numpy(), expected)


def test_a_score_depends_on_its_own_image_and_prompt_alone(scorer: Scorer, folder: Path) -> None:
    images, together = made_up_images(), scorer.score(made_up_images(), TEXTS)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    shuffled = scorer.score([images[i] for i in order], [TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=ROUNDING)
    for size in (1, 3):
        chunked = ImageReward(str(folder), batch_size=size).score(images, TEXTS)
        np.testing.assert_allclose(chunked, together, rtol=0, atol=ROUNDING)


def test_a_tensor_scores_as_its_arrays_do(scorer: Scorer) -> None:
    images = made_up_images([(40, 56)] * 3)
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(scorer.score(tensor, TEXTS[:3]), scorer.score(images, TEXTS[:3]))


def test_what_of_a_prompt_counts(scorer: Scorer) -> None:
    """Its first 33 word pieces, whatever their case and accents; an empty prompt is a prompt."""
    image, words = made_up_images([(50, 60)]), "red cat " * 16

    def score(prompt: str) -> float:
        return float(scorer.score(image, [prompt])[0])

    assert score(words + "on of the circle") == score(words + "on wear")
    assert score(words + "on") != score(words + "of")
    assert score("the CAFÉ") == score("The cafe") != score("the cat")
    assert math.isfinite(score("")) and score("") != score("the")


def test_all_forms_of_the_files_score_the_same(scorer: Scorer, state: dict, copy: Path) -> None:
    """A pickle, tokenizer.json, and the unused tensors left out."""
    used = {name: tensor for name, tensor in state.items() if "_proj." not in name and "position_ids" not in name}
    assert len(state) - len(used) == 5
    torch.save(used, copy / "ImageReward.pt")
    (copy / "ImageReward.safetensors").unlink()
    (copy / "vocab.txt").unlink()
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    (copy / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocabulary}}))
    other = ImageReward(str(copy))
    found, wanted = (each.score(made_up_images(), TEXTS) for each in (other, scorer))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)


def test_half_precision_weights_are_computed_with_in_float32(scorer: Scorer, state: dict, copy: Path) -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(halves, copy / "ImageReward.safetensors")
    other = ImageReward(str(copy)).load()
    assert {parameter.dtype for parameter in other._model.parameters()} == {torch.float32}
    np.testing.assert_allclose(other.score(made_up_images(), TEXTS), scorer.score(made_up_images(), TEXTS), atol=0.02)


def test_weights_that_do_not_fit_are_refused(state: dict, copy: Path) -> None:
    """The published code loads them without a word and scores with what it was initialised with."""
    name = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    changes: list[tuple[dict, str]] = [
        ({k: v for k, v in state.items() if k != name}, "Missing key.*crossattention.self.key.weight"),
        ({**state, "blip.temp": torch.ones(1)}, "Unexpected key.*blip.temp"),
        ({**state, name: state[name][:, :-1].contiguous()}, "size mismatch.*crossattention.self.key.weight"),
    ]
    for changed, message in changes:
        save_file(changed, copy / "ImageReward.safetensors")
        with pytest.raises(ScoringError, match=f"(?s){copy}.*does not fit the architecture.*{message}"):
            ImageReward(str(copy)).load()


def test_a_poisoned_pickle_is_refused_without_running(state: dict, copy: Path, bomb: type, tmp_path: Path) -> None:
    (copy / "ImageReward.safetensors").unlink()
    torch.save({**state, "mlp.layers.7.bias": bomb(tmp_path / "ran")}, copy / "ImageReward.pt")
    with pytest.raises(ScoringError, match="refused"):
        ImageReward(str(copy)).load()
    assert not (tmp_path / "ran").exists()


def spoil_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]))


def spoil_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text("{}")


def spoil_text_sizes(folder: Path) -> None:
    (folder / "med_config.json").write_text("no JSON")


def spoil_vision_sizes(folder: Path) -> None:
    (folder / "vision_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_vocabulary, r"vocab.txt: 102 tokens with \[DEC\] and \[ENC\], but the network was made for 103"),
        (spoil_tokenizer, "tokenizer.json: holds no vocabulary"),
        (spoil_text_sizes, "med_config.json: is not JSON"),
        (spoil_vision_sizes, "vision_config.json: must hold an object, got list"),
    ],
)
def test_files_that_cannot_be_used_are_named(spoil: Callable[[Path], None], message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(ScoringError, match=message):
        ImageReward(str(copy)).load()


def test_what_is_not_there_is_refused_before_anything_loads(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"'imagereward': unknown variant 'v2.0', not v1.0"):
        ImageReward.check(ScorerSource(str(copy), variant="v2.0"))
    with pytest.raises(ValueError, match="'THUDM/ImageReward' is not in the cache"):
        ImageReward.check(ScorerSource())
    (copy / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks vocab.txt or tokenizer.json; .*; copy there the one of google"):
        ImageReward(str(copy))
    (copy / "ImageReward.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks ImageReward.safetensors or ImageReward.pt"):
        ImageReward.check(ScorerSource(str(copy)))


def test_the_hub_repository_takes_its_vocabulary_from_bert(
    state: dict, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout of the hub's cache: the published repository has a pickle, a configuration, no vocabulary.

    The pickle is asked for only when the repository turned out to have nothing safer, and at the same commit.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("scoring.scorers.sources.PINNED", {})
    places = {}
    for repository, commit in (("THUDM--ImageReward", "1" * 40), ("google-bert--bert-base-uncased", "2" * 40)):
        places[repository] = tmp_path / f"models--{repository}" / "snapshots" / commit
        places[repository].mkdir(parents=True)
        refs = tmp_path / f"models--{repository}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(commit)
    weights, vocabulary = places.values()
    torch.save(state, weights / "ImageReward.pt")
    for name in ("med_config.json", "vision_config.json"):
        shutil.copy(folder / name, weights)
    shutil.copy(folder / "vocab.txt", vocabulary)
    asked = []

    def recorded(source: str, revision: str | None, patterns: list[str], scorer: str) -> Snapshot:
        asked.append((source, revision, "ImageReward.pt" in patterns))
        return local_copy(source, revision, patterns, scorer)

    monkeypatch.setattr("scoring.scorers.imagereward.local_copy", recorded)
    scorer, local = ImageReward(), ImageReward(str(folder))
    published, bert = [("THUDM/ImageReward", None, False), ("THUDM/ImageReward", "1" * 40, True)], asked[2]
    assert asked[:2] == published and bert == ("google-bert/bert-base-uncased", None, False)
    assert scorer.info.revision == "1" * 40 and scorer.info.source == f"THUDM/ImageReward@{'1' * 40}"
    image = made_up_images([(30, 40)])
    np.testing.assert_allclose(scorer.score(image, ["red cat"]), local.score(image, ["red cat"]), rtol=0, atol=ROUNDING)


def test_the_fingerprint_covers_every_file_and_the_digest_the_weights(scorer: Scorer, copy: Path) -> None:

    info = scorer.info
    assert (info.unit, info.lowest, info.highest, info.licence) == ("reward", None, None, "Apache-2.0")
    assert ImageReward(str(copy)).info.fingerprint == info.fingerprint
    for name in ("vocab.txt", "med_config.json", "vision_config.json"):
        before = ImageReward(str(copy)).info
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        after = ImageReward(str(copy)).info
        assert after.fingerprint != before.fingerprint and after.weights == before.weights == info.weights


@pytest.mark.slow
def test_the_published_size(tmp_path: Path) -> None:
    """The sizes without configuration files are those of the published checkpoint.

    The published code has 446,665,953 parameters, 459,264 of them in two layers without a part in the score; that
    and 4 KB of position numbers is ImageReward.pt with its 1,786,880,927 bytes.
    """
    rng = np.random.default_rng(3)
    shapes = published_shapes(TEXT_SIZES, VISION_SIZES, TEXT_SIZES["vocab_size"])
    assert sum(math.prod(shape) for shape in shapes.values()) == 446_665_953
    state = {
        name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).mul_(1 / math.sqrt(shape[-1]))
        for name, shape in shapes.items()
    }
    save_file(state, tmp_path / "ImageReward.safetensors")
    fillers = [f"filler{index}" for index in range(30522 - len(VOCABULARY))]
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, *fillers]), encoding="utf-8")
    scorer = ImageReward(str(tmp_path)).load()
    parameters = list(scorer._model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == 446_206_689
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    scores = scorer.score(made_up_images()[:2], TEXTS[:2])
    assert np.isfinite(scores).all() and scores[0] != scores[1]
