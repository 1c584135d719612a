"""The shipped models: stock libraries load them, they are small, and they behave as shapes/README.md says."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from bench.agreement import fresh_pictures, oracle_scores, ranked_pairs, share
from shapes.generate import DEFAULT_GUIDANCE, DEFAULT_STEPS
from shapes.prompts import COUNTS, read_set
from shapes.scorers import JUDGES, load_judge, score, standardise
from shapes.stage import MODELS
from shapes.tokenizer import CONTEXT, OPEN_CLIP_FILE

pytestmark = pytest.mark.numerical

PROMPTS, EACH = 64, 4  # of the tuning set


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_clip_tokenizer() -> open_clip.tokenizer.SimpleTokenizer:
    """open_clip's tokenizer on the shipped merges."""
    return open_clip.tokenizer.SimpleTokenizer(str(MODELS / "hpsv2" / OPEN_CLIP_FILE), context_length=CONTEXT)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [prompt for prompt in read_set("tuning")[:PROMPTS] for _ in range(EACH)]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Made by the shipped base model as the default recipe samples: (256, 3, 32, 32)."""
    return fresh_pictures(read_set("tuning")[:PROMPTS], EACH, seed=77)


def test_weights_are_small_half_precision_safetensors() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    assert sum(path.stat().st_size for path in files) < 25e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    for path in weights:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path


def test_base_loads_as_a_stock_pipeline() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "base")
    assert pipe.tokenizer.model_max_length == CONTEXT == pipe.text_encoder.config.max_position_embeddings
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.vae.config.scaling_factor == 1.0


def test_a_picture_depends_on_its_noise_alone(pictures: Tensor) -> None:
    """Neither on the batch nor on chance: two of the fixture's pictures, drawn again in another batch."""
    again = fresh_pictures(read_set("tuning")[:1], EACH, seed=77)
    assert (again - pictures[:EACH]).abs().max() <= 2 / 255


def test_base_is_good_but_not_perfect(pictures: Tensor, captions: list[str]) -> None:
    truth = oracle_scores(pictures, captions)
    assert BAND[0] <= (truth == 1).float().mean() <= BAND[1]
    assert truth.mean() > 0.8


def test_agreement_is_measured_as_the_recipe_samples() -> None:
    """Steps, guidance, solver and spacing of the recipe are those of `fresh_pictures`."""
    recipe = tomllib.loads((Path(__file__).parents[2] / "recipes" / "shapes.toml").read_text())["generation"]
    assert (recipe["steps"], recipe["guidance"]) == (DEFAULT_STEPS, DEFAULT_GUIDANCE)
    scheduler = StableDiffusionPipeline.from_pretrained(MODELS / "base").scheduler
    assert recipe["scheduler"] == type(scheduler).__name__
    assert {key: scheduler.config[key] for key in recipe["scheduler_options"]} == recipe["scheduler_options"]


@pytest.mark.parametrize("name", list(JUDGES))
def test_judges_agree_with_the_oracle(name: str, pictures: Tensor, captions: list[str]) -> None:
    guess = score(load_judge(name, MODELS / name), pictures, captions).view(PROMPTS, EACH)
    outcomes, _ = ranked_pairs(guess, oracle_scores(pictures, captions).view(PROMPTS, EACH))
    assert len(outcomes) > 80
    assert outcomes.mean() > FLOOR[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(JUDGES))
def test_judges_reach_four_pairs_in_five_on_held_out_prompts(name: str) -> None:
    """What `python -m bench.agreement --set heldout --prompts 512 --seed 9001` prints."""
    prompts = read_set("heldout")
    captions = [prompt for prompt in prompts for _ in range(4)]
    images = fresh_pictures(prompts, 4, 9001)
    guess = score(load_judge(name, MODELS / name), images, captions).view(-1, 4)
    outcomes, _ = ranked_pairs(guess, oracle_scores(images, captions).view(-1, 4))
    assert outcomes.mean() > 0.80


def test_judges_differ(pictures: Tensor, captions: list[str]) -> None:
    """One may judge what the other has chosen only if they do not share their errors altogether."""
    first, second = (score(load_judge(name, MODELS / name), pictures, captions) for name in JUDGES)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] < 0.97


def test_pickscore_is_what_transformers_computes(pictures: Tensor, captions: list[str]) -> None:
    """The stock model and processor, from bytes to logits, give the same numbers."""
    model = CLIPModel.from_pretrained(MODELS / "pickscore").eval()
    processor = CLIPProcessor.from_pretrained(MODELS / "pickscore")
    assert model.dtype == torch.float32
    batch = processor(
        text=captions[:8],
        images=[(picture * 255).round().to(torch.uint8) for picture in pictures[:8]],
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**batch).logits_per_image.diagonal()
    expected = score(load_judge("pickscore", MODELS / "pickscore"), pictures[:8], captions[:8])
    assert torch.allclose(logits, expected, atol=1e-3)


def test_hpsv2_folder_is_complete_for_open_clip(pictures: Tensor, captions: list[str]) -> None:
    """Exactly the persistent keys of open_clip.CLIP, its own tokenizer file, its own encoders."""
    folder = MODELS / "hpsv2"
    config = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=True)
    ids = open_clip_tokenizer()(captions[:8])
    with torch.no_grad():
        image = model.eval().encode_image(standardise(pictures[:8]), normalize=True)
        cosine = (image * model.encode_text(ids, normalize=True)).sum(-1)
    assert torch.allclose(cosine, score(load_judge("hpsv2", folder), pictures[:8], captions[:8]), atol=1e-5)


def test_tokenizers_agree() -> None:
    """transformers' and open_clip's ids are equal up to padding, for every prompt and for foreign words."""
    prompts = [prompt for name in COUNTS for prompt in read_set(name)[:100]] + ["Hello, world!", "a pink cat"]
    open_ids = open_clip_tokenizer()(prompts)
    for folder in (MODELS / "base" / "tokenizer", MODELS / "pickscore"):
        rows = CLIPTokenizer.from_pretrained(folder)(prompts).input_ids
        assert max(map(len, rows[:-2])) <= CONTEXT
        assert [row + [0] * (CONTEXT - len(row)) for row in rows] == open_ids.tolist()


def test_shares_have_both_intervals() -> None:
    """8 of 10: ((0.8 + 0.19208) -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38416 = .490, .943; two prompts say far less."""
    outcomes = np.repeat([1.0, 0.0], [8, 2])
    told = share(outcomes, ["a"] * 5 + ["b"] * 5)
    assert told.startswith("0.800 [0.490, 0.943] n=10, by 2 prompts [")
    low, high = map(float, told.rpartition("[")[2].rstrip("]").split(","))
    assert low < 0.3 and high > 0.95


def test_ranked_pairs_count_ties_half_and_skips_equal_truths() -> None:
    """Truth 1 > .5 twice, .5 = .5 skipped: right once, tied once: 1.5 of 2."""
    guess, truth = torch.tensor([[3.0, 1.0, 3.0]]), torch.tensor([[1.0, 0.5, 0.5]])
    outcomes, prompts = ranked_pairs(guess, truth)
    assert sorted(outcomes.tolist()) == [0.5, 1.0] and prompts == ["0", "0"]


BAND = (0.45, 0.80)
FLOOR = {"pickscore": 0.68, "hpsv2": 0.68}
