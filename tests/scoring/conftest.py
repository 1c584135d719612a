"""Tiny random models in the real file formats: the tests run the real loading and scoring code, offline."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# The sizes at which resizing and padding can go wrong: square, portrait, landscape, one pixel, one pixel too
# large, one too small, exact, very wide, portrait again, and three rows, where the channel axis is ambiguous.
SHAPES = [
    (64, 64), (96, 48), (48, 96), (1, 1), (225, 224), (223, 223), (224, 224), (31, 2000), (100, 37), (3, 40),
]  # fmt: skip
PROMPTS = [
    "a red circle",
    "It\u2019s a &amp; b, naïve café",
    "",
    "a red circle",
    "two blue squares on green " * 20,
    "schÃ¶n, itâ€™s &lt;b&gt;BOLD&lt;/b&gt;",
]

HPSV2_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def hpsv2_state() -> dict:
    """Random weights of HPSV2_CONFIG, spread widely enough that scores differ in the second digit."""
    import open_clip
    import torch

    model = open_clip.CLIP(**HPSV2_CONFIG)
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="session")
def hpsv2_folder(hpsv2_state: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("hpsv2")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": HPSV2_CONFIG, "preprocess_cfg": {}}))
    save_file(hpsv2_state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def hpsv2_checkpoint(hpsv2_state: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as the original package takes them."""
    import torch

    path = tmp_path_factory.mktemp("original") / "tiny.pt"
    torch.save({"state_dict": hpsv2_state}, path)
    return path


@pytest.fixture(scope="session")
def pickscore_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with a CLIPProcessor whose tokenizer has the merges of CLIP's own vocabulary."""
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pickscore")
    bpe = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {renamed.get(token, token): index for token, index in bpe.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(bpe.bpe_ranks))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **special, "vocab_size": 49408},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.logit_scale.fill_(float(np.log(100)))  # where the published model ended up
    model.save_pretrained(folder)
    return folder


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture(scope="session")
def bomb() -> type[Bomb]:
    return Bomb


@pytest.fixture(scope="session", params=["hpsv2", "pickscore"])
def tiny_scorer(request: pytest.FixtureRequest) -> Iterator:
    """Each built-in scorer on its tiny weights, found by name as a flow finds it."""
    from scoring.scorers.registry import ScorerSource, load_scorer

    folder = request.getfixturevalue(f"{request.param}_folder")
    scorer = load_scorer(request.param, {request.param: ScorerSource(str(folder))})
    yield scorer
    scorer.close()


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """One image of each shape: noise over a gradient, so that both smooth and sharp content is there."""
    rng = np.random.default_rng(0)
    return [_image(rng, height, width) for height, width in SHAPES]


def _image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    gradient = np.linspace(0, 255, height * width).reshape(height, width, 1)
    noise = rng.integers(-128, 128, (height, width, 3)) * (rng.random((height, width, 1)) < 0.3)
    return np.clip(gradient + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def captions() -> list[str]:
    """One prompt an image, some of them repeated, one empty, one longer than the context."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(len(SHAPES))]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this folder may reach for the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
