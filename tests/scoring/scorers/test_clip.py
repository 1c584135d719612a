"""CLIPScore against the forward passes of transformers and open_clip, on tiny random models in their formats."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import sentencepiece
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from scoring.scorers.clip import CLIPScore, _repository
from scoring.scorers.registry import ScorerSource, check_scorer, load_scorer
from scoring.scorers.scorer import ScoringError

pytestmark = pytest.mark.numerical

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = 16
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip": ({"size": {"height": 32, "width": 32}}, {"image_size": 32}),
    "siglip2": ({"patch_size": 8, "max_num_patches": 16}, {"num_patches": 16}),
}
"""Images squashed to a square, or cut into patches: settings of the image processor and of the vision tower."""
GREY = [np.full((20, 30, 3), 90, dtype=np.uint8)]


def _vocabulary() -> bytes:
    """A small sentencepiece model, letters and a few longer pieces, in both cases."""
    text = ["a red circle", "two blue squares on green", "A RED CIRCLE", "abcdefghijklmnopqrstuvwxyz éï;"] * 20
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=file, vocab_size=80, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return file.getvalue()


def _part(kind: str, name: str) -> Any:
    """A class of transformers by the kind of model, for example SiglipModel."""
    return getattr(transformers, kind.capitalize() + name)


def _save_siglip(kind: str, folder: Path, **tokenizer_options: Any) -> Path:
    (folder / "vocabulary.model").write_bytes(_vocabulary())
    tokenizer = transformers.SiglipTokenizer(
        str(folder / "vocabulary.model"), model_max_length=LENGTH, **tokenizer_options
    )
    (folder / "vocabulary.model").unlink()
    image_settings, vision = KINDS[kind]
    images = _part(kind, "ImageProcessor")(**image_settings)
    _part(kind, "Processor")(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    text = {**TOWER, "vocab_size": 200, "max_position_embeddings": LENGTH, "projection_size": 32}
    torch.manual_seed(0)
    model = _part(kind, "Model")(
        _part(kind, "Config")(text_config=text, vision_config={**TOWER, "patch_size": 8, **vision})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_siglip("siglip", tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """open_clip's own format; squashes images to the square, unlike its default, and has its own mean."""
    folder = tmp_path_factory.mktemp("open_clip")
    tower = {"layers": 2, "width": 32}
    model_config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "head_width": 16, "patch_size": 8, **tower},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **tower},
    }
    preprocess = {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    state = open_clip.CLIP(**model_config).state_dict()
    state = {name: value + 0.1 * torch.randn(value.shape) for name, value in state.items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def _check(folder: Path, expected: torch.Tensor, images: list[np.ndarray], captions: list[str]) -> None:
    """Scores, also in chunks and of a tensor, are the expected ones, and those are worth comparing."""
    scorer = CLIPScore(variant=str(folder), batch_size=4)
    scores = scorer.score(images, captions)
    assert scores.dtype == np.float32 and np.ptp(expected.numpy()) > 0.05
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(scorer.score(images[:1], captions[:1]), scores[:1], rtol=0, atol=2e-6)
    tensor = torch.from_numpy(np.stack([images[1]] * 2)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(scorer.score(tensor, captions[1:3])[0], scores[1], rtol=0, atol=2e-6)


def test_clip_equals_the_forward_pass(pickscore_folder: Path, images: list[np.ndarray], captions: list[str]) -> None:
    model = transformers.CLIPModel.from_pretrained(pickscore_folder)
    inputs = transformers.CLIPProcessor.from_pretrained(pickscore_folder)(
        text=captions, images=[Image.fromarray(image) for image in images], return_tensors="pt",
        padding=True, truncation=True, max_length=77,
    )  # fmt: skip
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    _check(pickscore_folder, expected, images, captions)


@pytest.mark.parametrize("kind", list(KINDS))
def test_siglip_equals_the_forward_pass(
    kind: str, tmp_path: Path, images: list[np.ndarray], captions: list[str]
) -> None:
    """Padded on the right to the full length, as in its training; logits have a scale and a bias, cosines not."""
    folder = _save_siglip(kind, tmp_path)
    model = _part(kind, "Model").from_pretrained(folder)
    sizes = KINDS[kind][0] if kind == "siglip2" else {}  # its processor has the published sizes built in
    inputs = _part(kind, "Processor").from_pretrained(folder)(
        text=captions, images=[Image.fromarray(image) for image in images], return_tensors="pt",
        padding="max_length", truncation=True, max_length=LENGTH, padding_side="right", **sizes,
    )  # fmt: skip
    inputs.pop("attention_mask", None)  # the published tokenizers make none
    with torch.inference_mode():
        expected = (model(**inputs).logits_per_image.diagonal() - model.logit_bias) / model.logit_scale.exp()
    _check(folder, expected, images, captions)


def test_open_clip_equals_its_own_pipeline(
    open_clip_folder: Path, images: list[np.ndarray], captions: list[str]
) -> None:
    """The model, the transform and the tokenizer that open_clip makes of the folder, called one by one."""
    name = f"local-dir:{open_clip_folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(captions)
    expected = []
    with torch.inference_mode():
        for image, ids in zip(images, tokens, strict=True):
            pixels = transform(Image.fromarray(image))[None]
            expected.append(
                torch.nn.functional.cosine_similarity(model.eval().encode_image(pixels), model.encode_text(ids[None]))
            )
    _check(open_clip_folder, torch.cat(expected), images, captions)


def test_siglip_text_is_lowered_and_padded_on_the_right(siglip_folder: Path, tmp_path: Path) -> None:
    """Tokenizers of SigLIP 2 on the hub keep capitals, and some pad on the left; its training did neither."""
    folder = _save_siglip("siglip", tmp_path, do_lower_case=False, padding_side="left")
    tokenizer = transformers.SiglipProcessor.from_pretrained(folder).tokenizer
    assert tokenizer("A Red Circle").input_ids != tokenizer("a red circle").input_ids
    assert tokenizer("a", padding="max_length").input_ids[0] == tokenizer.pad_token_id
    expected = CLIPScore(str(siglip_folder)).score(GREY, ["a red circle"])
    np.testing.assert_array_equal(CLIPScore(str(folder)).score(GREY, ["A Red Circle"]), expected)
    assert CLIPScore(str(folder)).score(GREY, ["a blue circle"]) != expected


def test_prompts_are_cut_at_the_context(siglip_folder: Path, open_clip_folder: Path) -> None:
    for folder in (siglip_folder, open_clip_folder):
        a, b = CLIPScore(str(folder)).score(GREY * 2, ["a red circle " * 50, "a red circle " * 50 + "on green"])
        assert a == pytest.approx(b, rel=0, abs=2e-6)


def test_info(siglip_folder: Path, open_clip_folder: Path, pickscore_folder: Path) -> None:
    infos = [load_scorer(f"clip:{folder}", {}).info for folder in (siglip_folder, open_clip_folder, pickscore_folder)]
    assert {info.preprocessing for info in infos} == {
        "transformers-siglip-processor", "open_clip-transform", "transformers-clip-processor",
    }  # fmt: skip
    assert len({info.fingerprint for info in infos}) == len({info.weights for info in infos}) == 3
    for info in infos:
        assert (info.name, info.unit, info.lowest, info.highest) == ("clip", "cosine", -1.0, 1.0)
        assert info.preference_scale is None and info.needs_prompt and info.revision is None


@pytest.mark.parametrize("changed", ["spiece.model", "model.safetensors", "processor_config.json", "config.json"])
def test_fingerprint_follows_content_and_not_place(changed: str, siglip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siglip_folder, tmp_path / "copy"))
    before = CLIPScore(str(siglip_folder)).info
    assert CLIPScore(str(folder)).info.fingerprint == before.fingerprint
    with (folder / changed).open("ab") as file:
        file.write(b" ")
    assert CLIPScore(str(folder)).info.fingerprint != before.fingerprint
    assert (CLIPScore(str(folder)).info.weights == before.weights) == (
        changed not in ("model.safetensors", "config.json")
    )


def test_the_backend_is_chosen_by_what_is_there(open_clip_folder: Path, pickscore_folder: Path, tmp_path: Path) -> None:
    """transformers first; one word takes the other; both formats in a folder are two scorers."""
    folder = Path(shutil.copytree(pickscore_folder, tmp_path / "both"))
    shutil.copytree(open_clip_folder, folder, dirs_exist_ok=True)
    first = load_scorer("clip", {"clip": ScorerSource(str(folder))})
    other = load_scorer(f"clip:{folder}?backend=open_clip", {})
    alone = CLIPScore(str(open_clip_folder))
    assert first.score(GREY, ["x"]) == CLIPScore(str(pickscore_folder)).score(GREY, ["x"])
    assert other.score(GREY, ["x"]) == alone.score(GREY, ["x"]) != first.score(GREY, ["x"])
    with pytest.raises(ValueError, match=r"has no config.json; what works with backend transformers is a config.json"):
        check_scorer(f"clip:{open_clip_folder}?backend=transformers", {})


def test_other_models_are_refused_by_name(siglip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siglip_folder, tmp_path / "copy"))
    (folder / "config.json").write_text('{"model_type": "blip"}')
    expected = "has model_type 'blip'; what works is a config.json with model_type clip, siglip, siglip2"
    with pytest.raises(ValueError, match=re.escape(f"scorer 'clip': {folder} {expected}")):
        check_scorer(f"clip:{folder}", {})
    with pytest.raises(ValueError, match="unknown backend 'onnx', not transformers or open_clip"):
        check_scorer(f"clip:{siglip_folder}?backend=onnx", {})
    with pytest.raises(ValueError, match="the model is given twice, '/a' and '/b'"):
        check_scorer("clip:/b", {"clip": ScorerSource("/a")})
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set and 'openai/clip-vit-large-patch14' is not in the"):
        check_scorer("clip", {})


@pytest.mark.parametrize("missing", ["processor_config.json", "spiece.model", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(missing: str, siglip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siglip_folder, tmp_path / "copy"))
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"scorer 'clip': folder '{folder}' lacks .*{missing}"):
        check_scorer(f"clip:{folder}", {})


def test_architecture_and_tag_name_a_repository() -> None:
    assert _repository("open_clip/ViT-B-32/laion2b_s34b_b79k") == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert _repository("open_clip/ViT-L-14/openai") == "timm/vit_large_patch14_clip_224.openai"
    check_scorer("clip:open_clip/ViT-B-32/laion2b_s34b_b79k", {})
    with pytest.raises(ValueError, match=r"no hub repository for .*; tags: .*laion2b_s34b_b79k"):
        CLIPScore("open_clip/ViT-B-32/nonsense")
    with pytest.raises(ValueError, match="tags: none: no such architecture"):
        CLIPScore("open_clip/ViT-Z/openai")
    with pytest.raises(ValueError, match="not of the form open_clip/ARCHITECTURE/TAG"):
        check_scorer("clip:open_clip/ViT-B-32", {})


def test_weights_with_a_tensor_missing_are_refused(siglip_folder: Path, open_clip_folder: Path, tmp_path: Path) -> None:
    """transformers alone would fill it with random numbers and score on."""
    for original, name, tensor, message in (
        (siglip_folder, "model.safetensors", "text_model.head.weight", "1 tensors of a SiglipModel are missing"),
        (open_clip_folder, "open_clip_model.safetensors", "text_projection", "Missing key.*text_projection"),
    ):
        folder = Path(shutil.copytree(original, tmp_path / original.name))
        state = load_file(folder / name)
        del state[tensor]
        save_file(state, folder / name, metadata={"format": "pt"})
        with pytest.raises(ScoringError, match=f"(?s){folder}: .*{message}"):
            CLIPScore(str(folder)).load()
        (folder / name).write_bytes(b"damaged" * 100)
        with pytest.raises(ScoringError, match=f"{folder}: the weights do not load"):
            CLIPScore(str(folder)).load()


def test_poisoned_pickles_run_nothing(siglip_folder: Path, open_clip_folder: Path, bomb: type, tmp_path: Path) -> None:
    for original, old, new in (
        (siglip_folder, "model.safetensors", "pytorch_model.bin"),
        (open_clip_folder, "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ):
        folder = Path(shutil.copytree(original, tmp_path / original.name))
        state = load_file(folder / old)
        (folder / old).unlink()
        torch.save(state, folder / new)
        assert CLIPScore(str(folder)).score(GREY, ["x"]) == CLIPScore(str(original)).score(GREY, ["x"])
        torch.save({**state, "logit_scale": bomb(tmp_path / "ran")}, folder / new)
        with pytest.raises(ScoringError, match=f"{folder}: the weights are a pickle of more than tensors"):
            CLIPScore(str(folder)).load()
    assert not (tmp_path / "ran").exists()
